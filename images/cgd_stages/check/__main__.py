"""Make the examples of every training once, on a CPU, and refuse what would waste a GPU.

    CGD_TASK='{...}' python -m cgd_stages.check

Examples can be made only after refine, and the training pods with their GPUs start next. So this program chooses the
rows that are learned (see `quality.selection`) and counts the tokens that each objective learns of them, the rows that
it cannot use and the lengths of its examples. All trainings learn from the rows that every objective can use. It stores
these figures and the rows that are left out, but no example: the training pods make the same examples from the same
rows. It looks for questions of benchmarks in the rows (see `quality.paraphrases`). It measures the quality of the rows,
and refuses rows that are worse than the run allows, and stored checkpoints from which the training pods could not go
on.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import logging
import time
from array import array
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from cgd_stages.chat.example import Example
from cgd_stages.check import masked
from cgd_stages.check.masked import FirstExamples
from cgd_stages.contract import Check, Rows, StageFacts
from cgd_stages.engines.replies import rejection
from cgd_stages.errors import UserError
from cgd_stages.grading.grader import Grader
from cgd_stages.method.prompts import whole_prompt
from cgd_stages.models import resolve
from cgd_stages.models.fit import read_config
from cgd_stages.quality import selection
from cgd_stages.quality.marks import SAMPLED, cautions
from cgd_stages.quality.paraphrases import FOUND, FOUND_SCHEMA, Findings, Originals
from cgd_stages.quality.review import GRADE_SECONDS, GRADERS, review_rows
from cgd_stages.results.formatting import percent
from cgd_stages.runtime.pace import Pace
from cgd_stages.runtime.program import Context, run
from cgd_stages.store.benchmarks import read_originals
from cgd_stages.store.folder import REJECTED, Folder, Part, read_rows
from cgd_stages.store.rows import KEY, REJECTION_SCHEMA, Key, Row, key_of
from cgd_stages.store.run import Product
from cgd_stages.training.dataset import CHECK, UNUSABLE, Dataset, ExampleCounts, LeftOut, read_left_out
from cgd_stages.training.job import checkpoints_of, inputs_of, router_loss_weight

log = logging.getLogger(__name__)

CONTAMINATED = "contaminated"
"""The reason of a row that is left out because it paraphrases a benchmark's question."""
EVERY = 1000
"""Rows between two reports of the progress."""


def main(context: Context) -> dict[str, StageFacts]:
    work, stage, clock = context.work_of(Check), context.task.stage, time.monotonic()
    datasets, students = [], []
    for training in work.trainings:
        model = resolve.pinned(training.student, context.store)
        template = resolve.spoken(model, training.chat, context.store, context.scratch)
        # This program finds the rows that the trainings have in common.
        alone = training.model_copy(update={"common_rows": False})
        datasets.append(Dataset.of(context.store, alone, template, scored=False))
        students.append(resolve.resolve(model, context.store))
    draws = datasets[0].draws
    inputs: dict[str, Any] = {
        "stage": stage,
        "trainings": [
            dataset.identity()
            | {"student": student.identity()}
            | dataset.work.model_dump(
                by_alias=True, exclude_none=True, include={"name", "max_sequence_length", "max_rejected", "seed"}
            )
            for dataset, student in zip(datasets, students, strict=True)
        ],
        "graded": SAMPLED,
    }
    if draws > 1 or work.keep != "all":
        inputs["choice"] = {"draws": draws, "select": work.select, "keep": work.keep}
    originals: list[Row] = []
    if work.decontaminate:
        originals, content = read_originals(context.store.input("prepare"))
        inputs["paraphrases"] = [work.decontaminate.paraphrases, work.decontaminate.share, content]

    def check(folder: Folder) -> Product:
        refine, removes = datasets[0].refine, bool(work.decontaminate and work.decontaminate.paraphrases == "remove")
        findings = Findings(Originals(originals, work.decontaminate.share)) if work.decontaminate else None
        choice = _paraphrases(refine, findings) if findings and removes else {}
        if "choice" in inputs:
            choice |= _choice(refine, work, draws, choice)
        if findings and not removes:
            _paraphrases(refine, findings, choice)
        parts = _count_examples(context, folder, datasets, choice)
        review, part = review_rows(folder, datasets[0].refine, work.keep)
        for caution in cautions(review.quality):
            log.warning("%s", caution)
        facts = context.facts[stage]
        seconds, metrics = round(time.monotonic() - clock, 3), facts.metrics | review.quality.metrics()
        if findings:
            metrics |= findings.metrics
            parts.append(folder.put_rows(FOUND, findings.questions(), FOUND_SCHEMA))
        return Product(facts.model_copy(update={"seconds": seconds, "metrics": metrics}), [*parts, part])

    done = context.store.make_once(stage, inputs, check)
    context.facts[stage] = done.facts
    _refuse_bad_rows(done.facts.metrics, work.min_right_refinements)
    for training, dataset, student in zip(work.trainings, datasets, students, strict=True):
        left_out = read_left_out(context.store.place(stage, inputs), training.stage) if training.common_rows else {}
        _refuse_foreign_checkpoints(context, replace(dataset, work=training, left_out=left_out), student)
    context.store.point_at(done)
    return {stage: done.facts}


def _refuse_foreign_checkpoints(context: Context, dataset: Dataset, student: resolve.Resolved) -> None:
    """Raise UserError where the training pods could not go on from the checkpoints that they will find. The stored
    figures do not depend on this: the same rows and settings may be trained in another layout. The checkpoints of a
    training that waits for other stages are not known yet."""
    stage = dataset.work.stage
    if dataset.work.start or dataset.work.scores or dataset.work.on_policy:
        return
    model = resolve.pinned(dataset.work.student, context.store)
    files = resolve.fetch(model, context.store, context.scratch, weights=False)
    weight = router_loss_weight(dataset.work, read_config(files, model, "spec.student"))
    trained = context.store.place(stage, inputs_of(stage, dataset, student, weight))
    if trained.done() is None:
        checkpoints_of(trained, dataset.work).newest()


def _refuse_bad_rows(metrics: dict[str, float], least: float | None) -> None:
    """Raise UserError when fewer refinements are right than the run allows. The stored figures do not depend on the
    limit, so a run with another limit uses the same ones."""
    if least is None:
        return
    right = metrics.get("right_refinements")
    if right is None:
        raise UserError(
            "spec.generation.minRightRefinements is set, but no reference ends on an answer to grade refinements with",
            hint="Set spec.prompts.fields.reference to the column of the references, or remove the limit.",
        )
    if right < least:
        raise UserError(
            f"{percent(right)} of {metrics['graded']:.0f} graded refinements are right, less than the "
            f"{percent(least)} of spec.generation.minRightRefinements",
            hint="`cgd rows` shows them: use a better teacher or other prompts, or lower the limit.",
        )


def _paraphrases(refine: Folder, findings: Findings, without: Collection[Key] = ()) -> dict[Key, LeftOut]:
    """The rows, but those of `without`, whose prompt, reference or refinement paraphrases a benchmark's question, which
    `findings` gets to know. Prompts and references are looked at again because prepare counts rows that were rejected
    later."""
    found = {}
    for row in read_rows(refine, [*KEY, "prompt", "turns", "reference", "refinement"]):
        if key_of(row) not in without:
            texts = {"prompt": whole_prompt(row), "reference": row["reference"], "refinement": row["refinement"]}
            if detail := findings.add(row, texts):
                found[key_of(row)] = LeftOut(CONTAMINATED, detail)
    return found


def _choice(refine: Folder, work: Check, draws: int, without: Collection[Key]) -> dict[Key, LeftOut]:
    """The rows, but those of `without`, that the run chooses not to learn."""
    columns = [*KEY, "reference", "refinement", "refinement_tokens"]
    rows = (row for row in read_rows(refine, columns) if key_of(row) not in without)
    if not selection.judges(work.select, work.keep):
        judged = selection.judged(rows, None)
    else:
        with Grader(workers=GRADERS, seconds=GRADE_SECONDS) as grader:
            judged = selection.judged(rows, grader)
    reasons = selection.left_out(judged, draws=draws, select=work.select, keep=work.keep)
    return {key: LeftOut(reason, selection.DETAILS[reason]) for key, reason in reasons.items()}


@dataclass
class Examples:
    """The examples of one training over all rows of the run."""

    dataset: Dataset
    counts: ExampleCounts
    lengths: "array[int]"
    """Of each row, in tokens; 0: the row makes no example, or is not chosen."""
    starts: "array[int]"
    """The first token that is learned."""
    first: FirstExamples
    thoughtless: set[int] = field(default_factory=set)
    spared: set[int] = field(default_factory=set)
    """Rows that this training alone leaves out: they stay in the others."""


def _count_examples(
    context: Context, folder: Folder, datasets: list[Dataset], choice: dict[Key, LeftOut]
) -> list[Part]:
    """Count the examples of every training into the stage's facts, in metrics that begin with the training's name.
    `choice` are the rows that no training learns. Stores the rows that a training cannot use, under its stage, and
    those that are not chosen, and returns their parts.

    Raises one UserError about all trainings that reject too many rows.
    """
    places = {key_of(row): place for place, row in enumerate(read_rows(datasets[0].refine, KEY))}
    made = _make_examples(context, datasets, places, choice)
    usable = ({place for place, length in enumerate(examples.lengths) if length} | examples.spared for examples in made)
    common = set.intersection(*usable)
    total, done, rejected = sum(dataset.total for dataset in datasets), 0, 0
    metrics: dict[str, float] = {}
    refusals: list[UserError] = []
    for examples in made:
        counts, work = examples.counts, examples.dataset.work
        for key, place in places.items():
            if place in examples.spared:
                continue
            if place in common:
                thought = place not in examples.thoughtless
                counts.keep(key, examples.lengths[place], examples.starts[place], thought=thought)
            elif examples.lengths[place]:  # another objective cannot use the row
                counts.left_out[UNUSABLE] += 1
        log.info("%s: %s, %s", work.title, counts.rows, counts.metrics())
        if counts.without_thought:
            log.warning(
                "%s: %d of %d examples learn an empty thought, because their targets were written without one",
                work.title,
                counts.without_thought,
                counts.kept,
            )
        figures = counts.metrics() | {"rejected": float(len(counts.rejected))}
        figures |= {"left_out": float(counts.left_out.total())} if counts.left_out else {}
        metrics |= {f"{work.stage.model}_{figure}": value for figure, value in figures.items()}
        done, rejected = done + counts.rows.done, rejected + counts.rows.rejected
        try:
            counts.refuse_unless_enough(examples.dataset.total, work.max_rejected)
        except UserError as error:
            refusals.append(error)
    metrics |= {"common_examples": float(len(common))} if len(made) > 1 else {}
    reasons = Counter(left_out.reason for left_out in choice.values())
    metrics |= {f"left_out_{reason}": float(count) for reason, count in sorted(reasons.items())}
    rows = Rows(total=total, done=done, rejected=rejected)
    context.facts[context.task.stage] = StageFacts(rows=rows, digest=folder.digest, metrics=metrics)
    if refusals:
        raise UserError(" ".join(error.message for error in refusals), hint=refusals[0].hint)
    not_chosen = [
        rejection(CHECK, {"id": identity, "sample": sample}, left_out.reason, left_out.detail)
        for (identity, sample), left_out in sorted(choice.items())
    ]
    listed = [*(examples.counts.rejected for examples in made), not_chosen]
    learned = (key for key, place in places.items() if place in common)
    shown = masked.store(folder, (examples.first for examples in made), learned)
    return [shown, *(folder.put_rows(REJECTED, unused, REJECTION_SCHEMA) for unused in listed if unused)]


def _make_examples(
    context: Context, datasets: list[Dataset], places: dict[Key, int], choice: dict[Key, LeftOut]
) -> list[Examples]:
    """Make the examples of the chosen rows for every training, and remember their lengths. Reports how many are made,
    over all trainings."""
    total, done, pace = sum(dataset.total for dataset in datasets), 0, Pace()
    made = []
    for dataset in datasets:
        counts = ExampleCounts.of(dataset)
        zeros = bytes(4 * len(places))
        examples = Examples(dataset, counts, array("I", zeros), array("I", zeros), FirstExamples(dataset))
        chosen = replace(dataset, left_out=choice)
        for row, example in chosen.examples():
            if isinstance(example, Example):
                place = places[key_of(row)]
                examples.lengths[place], examples.starts[place] = len(example.input_ids), example.start
                examples.first.add(key_of(row), example)
                if not example.thought:
                    examples.thoughtless.add(place)
            else:
                counts.add(row, example)
                if isinstance(example, LeftOut) and key_of(row) not in choice:
                    examples.spared.add(places[key_of(row)])
            done += 1
            if done % EVERY == 0:
                eta = pace.remaining(done, total - done)
                context.progress.report(context.task.stage, Rows(total=total, done=done), eta=eta)
        made.append(examples)
    return made


if __name__ == "__main__":
    run(main)
