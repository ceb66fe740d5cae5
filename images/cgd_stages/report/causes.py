"""What in a run itself makes a gain unlikely, or hard to see: its models, its rows, its training, its benchmarks. Pure.

Each sentence names a figure and what would change it. None of them says that a gain is not there.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from cgd_stages.contract import METHODS
from cgd_stages.results import statistics
from cgd_stages.results.comparison import name_of
from cgd_stages.results.formatting import count, listed, percent
from cgd_stages.results.model import ReportData, StageRecord, Step
from cgd_stages.results.scores import NOISE, Comparison, comparisons, scores

FEW_STEPS = 20
"""So few optimizer steps, of which the learning rate's rise and fall take a part, move a model little."""
FEW_ROWS = 500
"""So few rows are not much to learn from in one epoch."""
FEW_QUESTIONS = 100
"""With fewer, intervals are wider than most gains."""


def causes(report: ReportData) -> list[str]:
    return [*_same_model(report), *_lost_rows(report), *_little_training(report), *_losses(report), *_few(report)]


def _same_model(report: ReportData) -> Iterator[str]:
    asked: dict[str, Any] = {stage.name: stage.inputs.get("model") for stage in report.stages if stage.facts}
    student, teacher = asked.get("answer") or {}, asked.get("critique") or {}
    revision = student.get("revision")
    if student and (student == teacher or (revision and revision == teacher.get("revision"))):
        yield (
            f"Teacher and student are the same model ({teacher.get('name')}): its critiques can say nothing that the "
            "student does not know."
        )


def _lost_rows(report: ReportData) -> Iterator[str]:
    """A sentence for each stage before training that rejected more rows than it kept."""
    for stage in report.stages:
        rows = stage.facts.rows if stage.facts else None
        if rows is None or stage.name.kind in ("check", "train", "evaluate", "harness") or not rows.total:
            continue
        if 2 * rows.rejected > rows.total:
            worst = max(stage.rejections, key=lambda reason: stage.rejections[reason], default="")
            mostly = f", most of them {worst}" if worst else ""
            yield (
                f"{stage.name} rejected {count(rows.rejected)} of {count(rows.total)} rows "
                f"({percent(rows.rejected / rows.total)}){mostly}: what is learned is what was left, and may differ "
                "from what was asked."
            )


def _trainings(report: ReportData) -> list[tuple[str, StageRecord]]:
    """Those that have ended, with their names."""
    trained = [stage for stage in report.stages if stage.name.kind == "train" and stage.facts]
    return [(name_of(stage.name.model, stage.inputs), stage) for stage in trained]


def _little_training(report: ReportData) -> Iterator[str]:
    """A sentence for the trainings that are short in the same way."""
    short: dict[str, list[str]] = {}
    for name, stage in _trainings(report):
        if said := _short(stage):
            short.setdefault(said, []).append(name)
    for said, names in short.items():
        yield f"{listed(names)}: {said}."


def _short(stage: StageRecord) -> str:
    """How little a training has learned; empty for one that is long enough."""
    metrics = stage.facts.metrics if stage.facts else {}
    steps, rows = metrics.get("steps"), metrics.get("train_examples")
    once = stage.inputs.get("training", {}).get("epochs") == 1
    few_steps, few_rows = steps is not None and steps < FEW_STEPS, rows is not None and once and rows < FEW_ROWS
    made = f"{count(steps or 0)} optimizer step{'' if steps == 1 else 's'}"
    learned = f"{count(rows or 0)} row{'' if rows == 1 else 's'}, each learned once"
    match few_steps, few_rows:
        case True, True:
            return f"{learned}, in {made}: that moves a model little. More prompts or epochs give more steps"
        case True, False:
            return f"{made}: so few move a model little. More epochs or a smaller globalBatchSize give more"
        case False, True:
            return f"{learned}: that is little to learn from. More prompts, or more epochs, teach more"
    return ""


def _losses(report: ReportData) -> Iterator[str]:
    """A sentence for each loss that is higher at the end of its training."""
    for name, stage in _trainings(report):
        log = report.training.get(stage.name, ())
        unit = "" if stage.inputs.get("objective") in METHODS else " nats a token"
        yield from _risen(name, log, unit)


def _risen(name: str, log: Sequence[Step], unit: str) -> Iterator[str]:
    losses = [step.loss for step in log if math.isfinite(step.loss)]
    part = max(1, len(losses) // 4)
    first, last = (math.fsum(some) / part for some in (losses[:part], losses[-part:]))
    if len(losses) > 1 and last > first:
        over = "first and last step" if part == 1 else f"means of the first and the last {part} steps"
        yield f"{name}: the training loss rose from {first:.3f} to {last:.3f}{unit} ({over})."
    held = [(step.step, step.validation_loss) for step in log if step.validation_loss is not None]
    if len(held) > 1 and held[-1][1] > held[0][1]:
        (begin, before), (end, after) = held[0], held[-1]
        yield (
            f"{name}: the loss on held-out prompts rose from {before:.3f} after step {count(begin)} to {after:.3f} "
            f"after step {count(end)}."
        )


def _few(report: ReportData) -> Iterator[str]:
    """A sentence for each small benchmark."""
    compared = comparisons(report)
    for name, n in {score.benchmark: score.n for score in scores(report)}.items():
        if n < FEW_QUESTIONS:
            pairs = [pair for pair in compared if pair.benchmark == name]
            questions = f"{n} question{'' if n == 1 else 's'}"
            yield f"{name} has only {questions}: {_visible(pairs) if pairs else 'intervals are wide'}."


def _visible(pairs: Sequence[Comparison]) -> str:
    gains = [gain for pair in pairs if (gain := visible(pair)) is not None]
    return f"gains below {100 * min(gains):.1f} points cannot be seen with so few" if gains else "none can show a gain"


def visible(pair: Comparison) -> float | None:
    """The smallest gain that these questions show with a chance of 80 %, a fraction of 1; None: they show none."""
    if pair.samples == 1:
        return statistics.detectable(pair.n, (pair.fixed + pair.broken) / pair.n, NOISE)
    return statistics.detectable_mean(pair.n, pair.low, pair.high, NOISE)
