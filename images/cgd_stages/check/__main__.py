"""Make the examples of every training on a CPU: refuse here what would waste a GPU.

    CGD_TASK='{...}' python -m cgd_stages.check

Examples exist only after refine, so this is the last place before training pods, and their GPUs, are asked for. Counts
the tokens that each objective learns, the rows that it must leave out and the lengths of its examples; stores these
figures and the rejected rows, and no example: the training pods make the same ones of the same rows. Says what the rows
are like, and refuses those that are worse than the run allows. Checkpoints that are stored already must be such that
the training pods can go on from them.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import logging
import time
from typing import Any

from cgd_stages.contract import Check, Model, Rows, StageFacts, Train, train_stage
from cgd_stages.errors import UserError
from cgd_stages.models import resolve
from cgd_stages.quality.marks import SAMPLED, cautions
from cgd_stages.quality.review import review_rows
from cgd_stages.results.formatting import percent
from cgd_stages.runtime.pace import Pace
from cgd_stages.runtime.program import Context, run
from cgd_stages.store.folder import REJECTED, Folder, Part
from cgd_stages.store.rows import REJECTION_SCHEMA
from cgd_stages.store.run import Product
from cgd_stages.training.dataset import Dataset, ExampleCounts
from cgd_stages.training.job import checkpoints_of, inputs_of

log = logging.getLogger(__name__)

EVERY = 1000
"""Rows between two reports."""


def main(context: Context) -> dict[str, StageFacts]:
    work, stage, clock = context.work_of(Check), context.task.stage, time.monotonic()
    datasets = [Dataset.of(context.store, training) for training in work.trainings]
    students = [resolve.resolve(_student(context, training), context.store) for training in work.trainings]
    # Not a part of what is stored: the same rows and settings may be trained in another layout.
    _refuse_other_layouts(context, datasets, students)

    def check(folder: Folder) -> Product:
        parts = _check(context, folder, datasets)
        review, part = review_rows(folder, datasets[0].refine)
        for caution in cautions(review.quality):
            log.warning("%s", caution)
        facts = context.facts[stage]
        seconds, metrics = round(time.monotonic() - clock, 3), facts.metrics | review.quality.metrics()
        return Product(facts.model_copy(update={"seconds": seconds, "metrics": metrics}), [*parts, part])

    done = context.store.make_once(stage, _inputs(stage, datasets, students), check)
    context.facts[stage] = done.facts
    _refuse_bad_rows(done.facts.metrics, work.min_right_refinements)
    context.store.point_at(done)
    return {stage: done.facts}


def _refuse_other_layouts(context: Context, datasets: list[Dataset], students: list[resolve.Resolved]) -> None:
    """Raise UserError when a training is begun, not done, and would not go on from its newest checkpoint."""
    for dataset, student in zip(datasets, students, strict=True):
        stage = train_stage(dataset.work.objective)
        folder = context.store.place(stage, inputs_of(stage, dataset, student))
        if folder.done() is None:
            checkpoints_of(folder, dataset.work).newest()


def _refuse_bad_rows(metrics: dict[str, float], least: float | None) -> None:
    """Raise UserError when fewer refinements are right than the run allows. No part of what is stored: another limit
    is held against the same figures."""
    if least is None:
        return
    right = metrics.get("right_refinements")
    if right is None:
        raise UserError(
            "spec.generation.minRightRefinements is set, but no reference ends on an answer to grade refinements by",
            hint="Name the column of the references in spec.prompts.fields.reference, or leave the limit out.",
        )
    if right < least:
        raise UserError(
            f"{percent(right)} of {metrics['graded']:.0f} graded refinements are right, less than the "
            f"{percent(least)} of spec.generation.minRightRefinements",
            hint="`cgd rows` shows them: use a better teacher or other prompts, or lower the limit.",
        )


def _inputs(stage: str, datasets: list[Dataset], students: list[resolve.Resolved]) -> dict[str, Any]:
    trainings = [
        dataset.identity()
        | {"student": student.identity()}
        | dataset.work.model_dump(by_alias=True, include={"max_sequence_length", "max_rejected", "seed"})
        for dataset, student in zip(datasets, students, strict=True)
    ]
    return {"stage": stage, "trainings": trainings, "graded": SAMPLED}


def _student(context: Context, work: Train) -> Model:
    return resolve.pinned(work.student, context.store)


def _check(context: Context, folder: Folder, datasets: list[Dataset]) -> list[Part]:
    """Count every training into the stage's facts, under its objective's name; the rejected rows, stored.

    Raises one UserError for all that cannot be trained.
    """
    from transformers import AutoTokenizer

    metrics: dict[str, float] = {}
    total, ended, pace = sum(dataset.total for dataset in datasets), Rows(), Pace()
    refusals: list[UserError] = []
    parts: list[Part] = []
    for dataset in datasets:
        work = dataset.work
        student = resolve.fetch(_student(context, work), context.store, context.scratch, weights=False)
        tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=False)
        counts = ExampleCounts(train_stage(work.objective), work.objective, dataset.held_out())
        for row, example in dataset.examples(tokenizer):
            counts.add(row, example)
            if counts.rows.total % EVERY == 0:
                rows = _sum(ended, counts.rows, total)
                eta = pace.remaining(rows.done + rows.rejected, total - rows.done - rows.rejected)
                context.progress.report(context.task.stage, rows, eta=eta)
        if counts.rejected:
            parts.append(folder.put_rows(REJECTED, counts.rejected, REJECTION_SCHEMA))
        ended = _sum(ended, counts.rows, total)
        metrics |= {f"{work.objective.lower()}_{name}": value for name, value in counts.metrics().items()}
        metrics[f"{work.objective.lower()}_rejected"] = float(counts.rows.rejected)
        context.facts[context.task.stage] = StageFacts(rows=ended, digest=folder.digest, metrics=metrics)
        log.info("%s: %s, %s", work.objective, counts.rows, counts.metrics())
        try:
            counts.refuse_unless_enough(dataset.total, work.max_rejected)
        except UserError as error:
            refusals.append(error)
    if refusals:
        raise UserError(" ".join(error.message for error in refusals), hint=refusals[0].hint)
    return parts


def _sum(ended: Rows, under_way: Rows, total: int) -> Rows:
    return Rows(total=total, done=ended.done + under_way.done, rejected=ended.rejected + under_way.rejected)


if __name__ == "__main__":
    run(main)
