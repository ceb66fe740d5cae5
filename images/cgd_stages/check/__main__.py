"""Make the examples of every training once, on a CPU, and refuse what would waste a GPU.

    CGD_TASK='{...}' python -m cgd_stages.check

Examples can be made only after refine, and the training pods with their GPUs start next. So this program chooses the
rows that are learned (see `quality.selection`) and counts the tokens that each objective learns of them, the rows that
it cannot use and the lengths of its examples. All trainings learn from the rows that every objective can use. It stores
these figures and the rows that are left out, but no example: the training pods make the same examples from the same
rows. It measures the quality of the rows, and refuses rows that are worse than the run allows, and stored checkpoints
from which the training pods could not go on.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import logging
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from cgd_stages.chat.example import Example
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Check, Model, Rows, StageFacts, Train
from cgd_stages.engines.replies import rejection
from cgd_stages.errors import UserError
from cgd_stages.grading.grader import Grader
from cgd_stages.models import resolve
from cgd_stages.models.fit import read_config
from cgd_stages.quality import selection
from cgd_stages.quality.marks import SAMPLED, cautions
from cgd_stages.quality.review import GRADE_SECONDS, GRADERS, review_rows
from cgd_stages.results.formatting import percent
from cgd_stages.runtime.pace import Pace
from cgd_stages.runtime.program import Context, run
from cgd_stages.store.folder import REJECTED, Folder, Part, read_rows
from cgd_stages.store.rows import KEY, REJECTION_SCHEMA, Key, key_of
from cgd_stages.store.run import Product
from cgd_stages.training.dataset import CHECK, UNUSABLE, Dataset, ExampleCounts, LeftOut, read_left_out
from cgd_stages.training.job import checkpoints_of, inputs_of, router_loss_weight

log = logging.getLogger(__name__)

EVERY = 1000
"""Rows between two reports of the progress."""


def main(context: Context) -> dict[str, StageFacts]:
    work, stage, clock = context.work_of(Check), context.task.stage, time.monotonic()
    # This program finds the rows that they have in common.
    trainings = [training.model_copy(update={"common_rows": False}) for training in work.trainings]
    datasets = [Dataset.of(context.store, training, _template(context, training)) for training in trainings]
    students = [resolve.resolve(_student(context, training), context.store) for training in trainings]
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

    def check(folder: Folder) -> Product:
        choice = _choice(datasets[0].refine, work, draws) if "choice" in inputs else {}
        parts = _count_examples(context, folder, datasets, choice)
        review, part = review_rows(folder, datasets[0].refine, work.keep)
        for caution in cautions(review.quality):
            log.warning("%s", caution)
        facts = context.facts[stage]
        seconds, metrics = round(time.monotonic() - clock, 3), facts.metrics | review.quality.metrics()
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
    figures do not depend on this: the same rows and settings may be trained in another layout."""
    stage = dataset.work.stage
    model = _student(context, dataset.work)
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


def _student(context: Context, work: Train) -> Model:
    return resolve.pinned(work.student, context.store)


def _template(context: Context, work: Train) -> ChatTemplate:
    return resolve.spoken(_student(context, work), work.chat, context.store, context.scratch)


def _choice(refine: Folder, work: Check, draws: int) -> dict[Key, str]:
    """The rows that the run chooses not to learn, with the reasons."""
    rows = read_rows(refine, [*KEY, "reference", "refinement", "refinement_tokens"])
    if not selection.judges(work.select, work.keep):
        judged = selection.judged(rows, None)
    else:
        with Grader(workers=GRADERS, seconds=GRADE_SECONDS) as grader:
            judged = selection.judged(rows, grader)
    return selection.left_out(judged, draws=draws, select=work.select, keep=work.keep)


@dataclass
class Examples:
    """The examples of one training over all rows of the run."""

    dataset: Dataset
    counts: ExampleCounts
    lengths: "array[int]"
    """Of each row, in tokens; 0: the row makes no example, or is not chosen."""
    starts: "array[int]"
    """The first token that is learned."""
    thoughtless: set[int] = field(default_factory=set)

    def usable(self) -> set[int]:
        return {place for place, length in enumerate(self.lengths) if length}


def _count_examples(context: Context, folder: Folder, datasets: list[Dataset], choice: dict[Key, str]) -> list[Part]:
    """Count the examples of every training into the stage's facts, in metrics that begin with the training's name.
    `choice` are the rows that no training learns. Stores the rows that are left out and returns their parts.

    Raises one UserError about all trainings that reject too many rows.
    """
    places = {key_of(row): place for place, row in enumerate(read_rows(datasets[0].refine, KEY))}
    progress = _Progress(context, sum(dataset.total for dataset in datasets))
    made = [_make_examples(dataset, places, choice, progress) for dataset in datasets]
    common = set.intersection(*(examples.usable() for examples in made))
    metrics: dict[str, float] = {}
    refusals: list[UserError] = []
    ended = Rows()
    for examples in made:
        _count(examples, places, common)
        ended = _sum(ended, examples.counts.rows, progress.total)
        metrics |= _metrics(examples)
        try:
            examples.counts.refuse_unless_enough(examples.dataset.total, examples.dataset.work.max_rejected)
        except UserError as error:
            refusals.append(error)
    metrics |= {"common_examples": float(len(common))} if len(made) > 1 else {}
    metrics |= {f"left_out_{reason}": float(count) for reason, count in sorted(Counter(choice.values()).items())}
    context.facts[context.task.stage] = StageFacts(rows=ended, digest=folder.digest, metrics=metrics)
    if refusals:
        raise UserError(" ".join(error.message for error in refusals), hint=refusals[0].hint)
    return _store_left_out(folder, made, choice)


def _make_examples(dataset: Dataset, places: dict[Key, int], choice: dict[Key, str], progress: "_Progress") -> Examples:
    """Make the examples of the chosen rows, and remember their lengths."""
    chosen = replace(dataset, left_out={key: LeftOut(reason, "") for key, reason in choice.items()})
    counts = ExampleCounts.of(chosen)
    made = Examples(dataset, counts, array("I", bytes(4 * len(places))), array("I", bytes(4 * len(places))))
    for row, example in chosen.examples():
        if isinstance(example, Example):
            place = places[key_of(row)]
            made.lengths[place], made.starts[place] = len(example.input_ids), example.start
            if not example.thought:
                made.thoughtless.add(place)
        else:
            counts.add(row, example)
        progress.report_one()
    return made


def _count(examples: Examples, places: dict[Key, int], common: set[int]) -> None:
    """Count the rows that the training learns, and those that it leaves out because another objective cannot use
    them."""
    for key, place in places.items():
        if place in common:
            thought = place not in examples.thoughtless
            examples.counts.keep(key, examples.lengths[place], examples.starts[place], thought=thought)
        elif examples.lengths[place]:
            examples.counts.left_out[UNUSABLE] += 1


def _metrics(examples: Examples) -> dict[str, float]:
    counts, work = examples.counts, examples.dataset.work
    log.info("%s: %s, %s", work.title, counts.rows, counts.metrics())
    metrics = counts.metrics() | {"rejected": float(len(counts.rejected))}
    metrics |= {"left_out": float(counts.left_out.total())} if counts.left_out else {}
    if counts.without_thought:
        log.warning(
            "%s: %d of %d examples learn an empty thought, because their targets were written without one",
            work.title,
            counts.without_thought,
            counts.kept,
        )
    return {f"{work.stage.model}_{figure}": value for figure, value in metrics.items()}


def _store_left_out(folder: Folder, made: list[Examples], choice: dict[Key, str]) -> list[Part]:
    """Store the rows that a training cannot use, under its stage, and those that are not chosen."""
    listed = [examples.counts.rejected for examples in made]
    listed.append(
        [
            rejection(CHECK, {"id": identity, "sample": sample}, reason, selection.DETAILS[reason])
            for (identity, sample), reason in sorted(choice.items())
        ]
    )
    return [folder.put_rows(REJECTED, rows, REJECTION_SCHEMA) for rows in listed if rows]


@dataclass
class _Progress:
    """Reports how many examples are made, over all trainings."""

    context: Context
    total: int
    made: int = 0
    pace: Pace = field(default_factory=Pace)

    def report_one(self) -> None:
        self.made += 1
        if self.made % EVERY == 0:
            eta = self.pace.remaining(self.made, self.total - self.made)
            self.context.progress.report(self.context.task.stage, Rows(total=self.total, done=self.made), eta=eta)


def _sum(ended: Rows, under_way: Rows, total: int) -> Rows:
    return Rows(total=total, done=ended.done + under_way.done, rejected=ended.rejected + under_way.rejected)


if __name__ == "__main__":
    run(main)
