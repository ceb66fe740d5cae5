"""Tell a whole run on one page: `report.html` for people, `report.json` with every figure on it.

    CGD_TASK='{...}' python -m cgd_stages.report

Reads what the run's stages have stored, a part at a time, and writes both files beside a marker, as every stage does.
Of an output there remain a few numbers; texts are kept of what is shown. A stage without output is shown as missing.
The same stored rows give the same bytes, so that a repeated attempt conflicts with nothing.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import bisect
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from cgd_stages.contract import Report, RunRef, StageFacts, StageName
from cgd_stages.quality.marks import Quality, cautions
from cgd_stages.quality.review import REVIEW, Review
from cgd_stages.report import page
from cgd_stages.report.summary import verdicts
from cgd_stages.results.comparison import table_of
from cgd_stages.results.model import Change, Key, Quadruples, Rejected, ReportData, Said, Sample, StageRecord, Step
from cgd_stages.results.scores import Changed, changed, figures, finite_or_none, gpu_hours
from cgd_stages.runtime.program import Context, run
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import REJECTED, Done, Folder, read_rows
from cgd_stages.store.rows import Row, from_parquet, now
from cgd_stages.store.run import open_input, write_pointer

REJECTIONS = 5
"""Rejected rows of a stage and reason that the page carries."""
TRAINING_LOG = "metrics.jsonl"


def main(context: Context) -> dict[str, StageFacts]:
    started, clock = now(), time.monotonic()
    work = context.work_of(Report)
    outputs = find_outputs(context.bucket, context.task.run, work.stages)
    inputs = {
        "run": context.task.run.model_dump(),
        "stages": {name: output.done.digest for name, output in outputs.items()},
        "missing": sorted(set(work.stages) - outputs.keys()),
        "spec": work.spec,
        "page": page.fingerprint(),
    }
    folder = context.folder(context.task.stage, inputs)
    done = folder.done()
    if done is None:
        review = read_review(outputs)
        quadruples, quality = (review.quadruples, review.quality) if review else (None, None)
        data = read_run(context.task.run, work, outputs, quadruples)
        parts = [
            folder.put("report.html", page.render(data, quality).encode()),
            folder.put("report.json", to_json(data, quality)),
        ]
        facts = StageFacts(seconds=round(time.monotonic() - clock, 3), metrics={"stages": float(len(outputs))})
        done = folder.finish(facts=facts, parts=parts, started=started, inputs=inputs)
    write_pointer(context.bucket, context.task.run, done)
    return {context.task.stage: done.facts}


@dataclass(frozen=True)
class Output:
    """The finished folder of one stage and its promise."""

    folder: Folder
    done: Done


def find_outputs(bucket: Bucket, run: RunRef, stages: Iterable[str]) -> dict[str, Output]:
    """What the run's stages have stored, by stage; stages without a pointer are left out.

    Raises TransientError when a pointer is there but leads to another run's life or to an unfinished folder.
    """
    pointers = f"{run.namespace}/runs/{run.name}/"
    there = {stored.key.removeprefix(pointers).removesuffix(".json") for stored in bucket.list(pointers)}
    folders = {stage: open_input(bucket, run, stage) for stage in stages if stage in there}
    return {stage: Output(folder, folder.require()) for stage, folder in folders.items()}


def read_run(run: RunRef, work: Report, outputs: dict[str, Output], quadruples: Quadruples | None = None) -> ReportData:
    """Everything the report is made of, in an order that does not depend on how parts are named."""
    finished = [stage for stage in work.stages if stage in outputs]
    folders: dict[str, list[Folder]] = {}
    for stage in finished:
        if stage.kind in ("evaluate", "harness"):
            folders.setdefault(stage.model, []).append(outputs[stage].folder)
    evaluations = {model: read_samples(found) for model, found in folders.items()}
    return ReportData(
        run=run,
        spec=work.spec,
        stages=tuple(stage_record(stage, outputs.get(stage)) for stage in work.stages),
        training={stage: tuple(read_log(outputs[stage])) for stage in finished if stage.kind == "train"},
        evaluations=evaluations,
        changes=tuple(read_changes(folders, changed(evaluations))),
        quadruples=quadruples,
        rejected=tuple(read_rejected(outputs)),
    )


def read_samples(folders: Iterable[Folder]) -> tuple[Sample, ...]:
    """A model's graded outputs without their texts, ordered by benchmark, id and sample."""
    columns = [*(field.name for field in fields(Sample) if field.name != "asked"), "prompt", "reference"]
    rows = (row for folder in folders for row in read_rows(folder, columns))
    return tuple(sorted(map(Sample.of, rows), key=lambda sample: sample.key))


def read_changes(folders: dict[str, list[Folder]], found: list[Changed]) -> Iterator[Change]:
    """The texts of the questions that training has changed, from the folders of base and trained model."""
    models = {one.trained for one in found} | ({"base"} if found else set())
    wanted = {one.base.key for one in found}
    texts = {(model, *key): row for model in sorted(models) for key, row in read_texts(folders[model], wanted)}
    for one in found:
        base, after = texts["base", *one.base.key], texts[one.trained, *one.after.key]
        yield Change(
            benchmark=one.base.benchmark,
            id=one.base.id,
            trained=one.trained,
            kind=one.kind,
            prompt=base["prompt"],
            reference=base["reference"],
            base=said(base),
            after=said(after),
        )


def read_texts(folders: Iterable[Folder], wanted: set[Key]) -> Iterator[tuple[Key, Row]]:
    """The rows of some outputs, by their keys."""
    columns = ["benchmark", "id", "sample", "prompt", "reference", *Said.model_fields]
    for row in (row for folder in folders for row in read_rows(folder, columns)):
        key = row["benchmark"], row["id"], row["sample"]
        if key in wanted:
            yield key, row


def said(row: Row) -> Said:
    return Said(output=row["output"], extracted=row["extracted"], correct=row["correct"])


def read_rejected(outputs: dict[str, Output]) -> list[Rejected]:
    """The first `REJECTIONS` rows by id that each stage has rejected for each reason, with their prompts."""
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
    """Prompts by id, of those that prepare has kept."""
    if not ids or "prepare" not in outputs:
        return {}
    rows = read_rows(outputs["prepare"].folder, ["id", "prompt"])
    return {row["id"]: row["prompt"] for row in rows if row["id"] in ids}


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
    """A training's steps, in their order. A step that an interrupted training repeated counts as it came out last."""
    steps: dict[int, Step] = {}
    for part in output.done.under(TRAINING_LOG):
        for line in output.folder.read(part).decode().splitlines():
            step = Step.model_validate(_known(json.loads(line)))
            steps[step.step] = step
    return [steps[number] for number in sorted(steps)]


def read_review(outputs: dict[str, Output]) -> Review | None:
    """What the check has found out about the rows; None where it has not ended."""
    if "check" not in outputs:
        return None
    (part,) = outputs["check"].done.under(REVIEW)
    return Review.model_validate_json(outputs["check"].folder.read(part))


def to_json(data: ReportData, quality: Quality | None = None) -> bytes:
    told = figures(data) | {"table": table_of(data).model_dump(by_alias=True)}
    told["summary"] = verdicts(data)
    told["gpuHours"] = gpu_hours(data.stages)
    told["quality"] = quality and quality.model_dump(by_alias=True) | {"cautions": cautions(quality)}
    return json.dumps(finite_or_none(told), indent=1, ensure_ascii=False, allow_nan=False).encode()


def _known(line: Row) -> Row:
    """The fields of a step that the report knows; whatever else the writer has told stays in its own files."""
    return {name: line[name] for name in Step.model_fields if line.get(name) is not None}


if __name__ == "__main__":
    run(main)
