"""Write the report of a run: `report.html`, a page for people, and `report.json` with all its figures.

    CGD_TASK='{...}' python -m cgd_stages.report

Reads the outputs of the run's stages, a part at a time. Memory holds a few numbers of each output, and the texts of
those that the page shows. A stage without output is shown as missing. The same stored rows give the same bytes, so
that a repeated attempt writes the same report.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import bisect
import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from cgd_stages.contract import Report, RunRef, StageFacts, StageName
from cgd_stages.method.prompts import whole_prompt
from cgd_stages.quality.marks import Quality, cautions
from cgd_stages.quality.paraphrases import FOUND
from cgd_stages.quality.review import REVIEW, Review
from cgd_stages.report import page
from cgd_stages.report.modes import modes
from cgd_stages.report.reasons import reasons
from cgd_stages.report.summary import verdicts
from cgd_stages.results.beside import beside
from cgd_stages.results.comparison import table_of
from cgd_stages.results.head_to_head import head_to_heads
from cgd_stages.results.model import (
    MASKED,
    Audit,
    Change,
    Decontamination,
    Evaluations,
    GradedOutput,
    Key,
    Masked,
    Paraphrased,
    Quadruples,
    Rejected,
    ReportData,
    Sample,
    StageRecord,
    Step,
)
from cgd_stages.results.published import HINT, PublishedTable, read
from cgd_stages.results.scores import Changed, changed, figures, finite_or_none, gpu_hours
from cgd_stages.runtime.inputs import read_text
from cgd_stages.runtime.program import Context, run
from cgd_stages.store.folder import REJECTED, Done, Folder, read_rows
from cgd_stages.store.rows import Row, from_parquet
from cgd_stages.store.run import Product, RunStore
from cgd_stages.text.references import in_words

REJECTIONS = 5
"""The most rejected rows that the page shows for a stage and reason."""
TRAINING_LOG = "metrics.jsonl"


def main(context: Context) -> dict[str, StageFacts]:
    clock, work, stage = time.monotonic(), context.work_of(Report), context.task.stage
    outputs = find_outputs(context.store, work.stages)
    inputs: dict[str, Any] = {
        "run": context.task.run.model_dump(),
        "stages": {name: output.done.digest for name, output in outputs.items()},
        "missing": sorted(set(work.stages) - outputs.keys()),
        "spec": work.spec,
        "modes": [work.student_chat.model_dump(), work.teacher_chat.model_dump(), work.thinking],
        "page": page.fingerprint(),
    }
    if work.audit:
        inputs["audit"] = [work.audit, importlib.metadata.version("lm_eval")]
    published: tuple[PublishedTable, ...] = ()
    if work.published:
        text = read_text(context, work.published.uri, "the file", HINT)
        published, inputs["published"] = read(text, work.published), text

    def write(folder: Folder) -> Product:
        review = read_review(outputs)
        quadruples, quality = (review.quadruples, review.quality) if review else (None, None)
        data = read_run(context.task.run, work, outputs, quadruples).model_copy(update={"published": published})
        parts = [
            folder.put("report.html", page.render(data, quality).encode(), alone=True),
            folder.put("report.json", to_json(data, quality), alone=True),
        ]
        seconds, metrics = round(time.monotonic() - clock, 3), {"stages": float(len(outputs))}
        return Product(StageFacts(seconds=seconds, metrics=metrics), parts)

    return {stage: context.store.produce(stage, inputs, write).facts}


@dataclass(frozen=True)
class Output:
    """The finished folder of one stage, and its marker."""

    folder: Folder
    done: Done


def find_outputs(store: RunStore, stages: Iterable[str]) -> dict[str, Output]:
    """The outputs of the run's stages, by stage; stages without a pointer are left out.

    Raises TransientError when a pointer leads to an unfinished folder, or belongs to an earlier run of this name.
    """
    pointers = store.stages()
    folders = {stage: store.input(stage) for stage in stages if stage in pointers}
    return {stage: Output(folder, folder.require()) for stage, folder in folders.items()}


def read_run(run: RunRef, work: Report, outputs: dict[str, Output], quadruples: Quadruples | None = None) -> ReportData:
    """All data of the report, in an order that does not depend on the names of parts."""
    finished = [stage for stage in work.stages if stage in outputs]
    folders: dict[str, list[Folder]] = {}
    for stage in finished:
        if stage.kind in ("evaluate", "harness"):
            folders.setdefault(stage.model, []).append(outputs[stage].folder)
    evaluations = {model: read_samples(model_folders) for model, model_folders in folders.items()}
    benchmarks = {stage.model: outputs[stage].folder for stage in finished if stage.kind == "evaluate"}
    return ReportData(
        run=run,
        spec=work.spec,
        student_chat=work.student_chat,
        teacher_chat=work.teacher_chat,
        thinking=work.thinking,
        stages=tuple(stage_record(stage, outputs.get(stage)) for stage in work.stages),
        training={stage: tuple(read_log(outputs[stage])) for stage in finished if stage.kind == "train"},
        evaluations=evaluations,
        changes=tuple(read_changes(folders, changed(evaluations))),
        audit=read_audit(benchmarks, evaluations, work.audit) if work.audit else None,
        decontamination=read_decontamination(outputs),
        quadruples=quadruples,
        masked=tuple(read_masked(outputs)),
        rejected=tuple(read_rejected(outputs)),
    )


def read_samples(folders: Iterable[Folder]) -> tuple[Sample, ...]:
    """The graded outputs of a model without their texts, ordered by benchmark, id and sample."""
    columns = [*(field.name for field in fields(Sample) if field.name != "asked"), "prompt", "reference"]
    rows = (row for folder in folders for row in read_rows(folder, columns))
    return tuple(sorted(map(Sample.of, rows), key=lambda sample: sample.key))


def read_changes(folders: dict[str, list[Folder]], pairs: list[Changed]) -> Iterator[Change]:
    """The changed questions with their texts, from the folders of the base and the trained models."""
    models = {pair.trained for pair in pairs} | ({"base"} if pairs else set())
    keys = {pair.base.key for pair in pairs}
    texts = {(model, *key): row for model in sorted(models) for key, row in read_texts(folders[model], keys)}
    for pair in pairs:
        base, after = texts["base", *pair.base.key], texts[pair.trained, *pair.after.key]
        yield Change(
            benchmark=pair.base.benchmark,
            id=pair.base.id,
            trained=pair.trained,
            kind=pair.kind,
            prompt=whole_prompt(base),
            reference=in_words(base["reference"]),
            base=GradedOutput(**{name: base.get(name) for name in GradedOutput.model_fields}),
            after=GradedOutput(**{name: after.get(name) for name in GradedOutput.model_fields}),
        )


def read_audit(folders: dict[str, Folder], evaluations: Evaluations, most: int) -> Audit:
    """lm-eval's verdicts on at most `most` outputs of each benchmark and model. `folders`: model -> the folder of its
    stage `evaluate`; the tasks that `harness` asked have lm-eval's grades already."""
    from cgd_stages.report import audit  # loads lm-eval, which takes seconds

    rows = (
        (model, row)
        for model, folder in folders.items()
        for _, row in read_texts([folder], audit.chosen(evaluations[model], most))
    )
    return audit.audit(rows, list(evaluations))


def read_texts(folders: Iterable[Folder], keys: set[Key]) -> Iterator[tuple[Key, Row]]:
    """The rows of the outputs with these keys."""
    columns = ["benchmark", "id", "sample", "prompt", "turns", "reference", "rule", *GradedOutput.model_fields]
    for row in (row for folder in folders for row in read_rows(folder, columns)):
        key = row["benchmark"], row["id"], row["sample"]
        if key in keys:
            yield key, row


def read_rejected(outputs: dict[str, Output]) -> list[Rejected]:
    """For each stage and reason the first `REJECTIONS` rejected rows, by id, with their prompts."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for name, output in outputs.items():
        for part in output.done.under(REJECTED):
            for row in from_parquet(output.folder.read(part)):
                kept = groups.setdefault((name, row["reason"]), [])
                bisect.insort(kept, row, key=lambda row: (row["id"], row["sample"]))
                del kept[REJECTIONS:]
    chosen = [(stage, reason, row) for (stage, reason), rows in sorted(groups.items()) for row in rows]
    prompts = read_prompts(outputs, {row["id"] for _, _, row in chosen})
    return [
        Rejected(
            id=row["id"],
            sample=row["sample"],
            stage=stage,
            reason=reason,
            detail=row["detail"] or "",
            prompt=prompts.get(row["id"], ""),
        )
        for stage, reason, row in chosen
    ]


def read_prompts(outputs: dict[str, Output], ids: set[str]) -> dict[str, str]:
    """The prompts of these ids, by id, as far as prepare has kept them."""
    if not ids or "prepare" not in outputs:
        return {}
    rows = read_rows(outputs["prepare"].folder, ["id", "prompt", "turns"])
    return {row["id"]: whole_prompt(row) for row in rows if row["id"] in ids}


def stage_record(name: StageName, output: Output | None) -> StageRecord:
    if output is None:
        return StageRecord(name=name)
    done = output.done
    reasons: Counter[str] = Counter()
    for part in done.under(REJECTED):
        reasons.update(row["reason"] for row in from_parquet(output.folder.read(part), ["reason"]))
    return StageRecord(
        name=name,
        facts=done.facts,
        started=done.started,
        completed=done.completed,
        rejections=dict(sorted(reasons.items())),
        inputs=done.inputs,
        settings=done.settings,
    )


def read_log(output: Output) -> list[Step]:
    """The steps of a training, in order. A step that was repeated after an interruption counts as it last was."""
    steps: dict[int, Step] = {}
    for part in output.done.under(TRAINING_LOG):
        for line in output.folder.read(part).decode().splitlines():
            logged = json.loads(line)  # it may hold more than a report shows
            shown = [name for name in Step.model_fields if logged.get(name) is not None]
            step = Step.model_validate({name: logged[name] for name in shown})
            steps[step.step] = step
    return [steps[number] for number in sorted(steps)]


def read_review(outputs: dict[str, Output]) -> Review | None:
    """The review of the rows by the stage check; None where it has not ended."""
    if "check" not in outputs:
        return None
    (part,) = outputs["check"].done.under(REVIEW)
    return Review.model_validate_json(outputs["check"].folder.read(part))


def read_masked(outputs: dict[str, Output]) -> Iterator[Masked]:
    """An example of each training; none where an earlier version of check has stored none."""
    for part in outputs["check"].done.under(MASKED) if "check" in outputs else ():
        yield from map(Masked.model_validate, json.loads(outputs["check"].folder.read(part)))


def read_decontamination(outputs: dict[str, Output]) -> Decontamination | None:
    """What prepare and check have found of the benchmarks' questions; None where the run does not look for it, or check
    has not ended."""
    if "check" not in outputs or "prepare" not in outputs or "paraphrases" not in outputs["check"].done.inputs:
        return None
    prepare, check = outputs["prepare"].done, outputs["check"].done
    (part,) = check.under(FOUND)
    paraphrases, similarity, _ = check.inputs["paraphrases"]
    return Decontamination(
        paraphrases=paraphrases,
        similarity=similarity,
        compared=tuple(prepare.inputs["prompts"]["decontaminate"]["against"]),
        unchecked=prepare.inputs.get("unchecked", {}),
        prepare_rows=int(prepare.facts.metrics["paraphrased"]),
        check_rows=int(check.facts.metrics["paraphrased"]),
        questions=tuple(map(Paraphrased.model_validate, from_parquet(outputs["check"].folder.read(part)))),
    )


def to_json(data: ReportData, quality: Quality | None = None) -> bytes:
    table = table_of(data)
    pairs = head_to_heads(table)
    document = figures(data) | {"table": table.model_dump(by_alias=True)}
    document["headToHead"] = [pair.model_dump(by_alias=True) for pair in pairs]
    document["summary"] = verdicts(data, table, pairs)
    document["reasons"] = [reason.to_json() for reason in reasons(data, quality)]
    document["modes"] = modes(data)
    document["gpuHours"] = gpu_hours(data.stages)
    if data.published:
        document["published"] = beside(data, table).model_dump(by_alias=True)
    document["quality"] = quality and quality.model_dump(by_alias=True) | {"cautions": cautions(quality)}
    return json.dumps(finite_or_none(document), indent=1, ensure_ascii=False, allow_nan=False).encode()


if __name__ == "__main__":
    run(main)
