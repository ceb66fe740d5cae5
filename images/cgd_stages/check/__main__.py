"""Make the examples of every training once, on a CPU, and refuse what would waste a GPU.

    CGD_TASK='{...}' python -m cgd_stages.check

Examples can be made only after refine, and the training pods with their GPUs start next. So this program counts the
tokens that each objective learns, the rows that it leaves out and the lengths of its examples. It stores these figures
and the rejected rows, but no example: the training pods make the same examples from the same rows. It measures the
quality of the rows, and refuses rows that are worse than the run allows, and stored checkpoints from which the training
pods could not go on.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import logging
import time

from cgd_stages.chat.template import ChatTemplate
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
"""Rows between two reports of the progress."""


def main(context: Context) -> dict[str, StageFacts]:
    work, stage, clock = context.work_of(Check), context.task.stage, time.monotonic()
    datasets = [Dataset.of(context.store, training) for training in work.trainings]
    students = [resolve.resolve(_student(context, training), context.store) for training in work.trainings]
    templates = [_template(context, training) for training in work.trainings]
    # The stored figures do not depend on this: the same rows and settings may be trained in another layout.
    for dataset, student, template in zip(datasets, students, templates, strict=True):
        training = train_stage(dataset.work.objective)
        trained = context.store.place(training, inputs_of(training, dataset, student, template))
        if trained.done() is None:
            checkpoints_of(trained, dataset.work).newest()  # raises UserError where the pods could not go on from it
    inputs = {
        "stage": stage,
        "trainings": [
            dataset.identity(template)
            | {"student": student.identity()}
            | dataset.work.model_dump(by_alias=True, include={"max_sequence_length", "max_rejected", "seed"})
            for dataset, student, template in zip(datasets, students, templates, strict=True)
        ],
        "graded": SAMPLED,
    }

    def check(folder: Folder) -> Product:
        parts = _count_examples(context, folder, datasets, templates)
        review, part = review_rows(folder, datasets[0].refine)
        for caution in cautions(review.quality):
            log.warning("%s", caution)
        facts = context.facts[stage]
        seconds, metrics = round(time.monotonic() - clock, 3), facts.metrics | review.quality.metrics()
        return Product(facts.model_copy(update={"seconds": seconds, "metrics": metrics}), [*parts, part])

    done = context.store.make_once(stage, inputs, check)
    context.facts[stage] = done.facts
    _refuse_bad_rows(done.facts.metrics, work.min_right_refinements)
    context.store.point_at(done)
    return {stage: done.facts}


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


def _student(context: Context, work: Train) -> Model:
    return resolve.pinned(work.student, context.store)


def _template(context: Context, work: Train) -> ChatTemplate:
    return resolve.spoken(_student(context, work), work.chat, context.store, context.scratch)


def _count_examples(
    context: Context, folder: Folder, datasets: list[Dataset], templates: list[ChatTemplate]
) -> list[Part]:
    """Count the examples of every training into the stage's facts, in metrics that begin with the objective's name.
    Stores the rejected rows and returns their parts.

    Raises one UserError about all trainings that reject too many rows.
    """
    metrics: dict[str, float] = {}
    total, ended, pace = sum(dataset.total for dataset in datasets), Rows(), Pace()
    refusals: list[UserError] = []
    parts: list[Part] = []
    for dataset, template in zip(datasets, templates, strict=True):
        work = dataset.work
        counts = ExampleCounts.of(work, dataset.held_out())
        for row, example in dataset.examples(template):
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
