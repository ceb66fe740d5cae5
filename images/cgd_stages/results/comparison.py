"""The table of a comparison: a line for each model, a column for each benchmark, and their mean. Pure.

`table_of` makes it of one run's outputs and `joined` of several runs' tables, which `report.json` holds. A difference
is always to the base of the same run, question by question.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from cgd_stages.contract import Contract, Critique, StageName
from cgd_stages.errors import UserError
from cgd_stages.results.formatting import THIN
from cgd_stages.results.model import ReportData
from cgd_stages.results.scores import Comparison, Score, benchmarks, comparisons, scores
from cgd_stages.store.rows import digest_of

BASE = "base"
NAMES = {
    BASE: "base",
    "selfrefine": "Self-Refine",
    "reflexion": "Reflexion",
    "sft": "SFT",
    "distilledsft": "Distilled SFT",
    "refinedsft": "Refined SFT",
    "cft": "CFT",
    "cgd": "CGD",
}
"""How people write the label of an evaluated model, in the order of the paper's table."""
MEAN = "mean"

Outcome = Literal["better", "worse", "noise"]


class Difference(Contract):
    """A model minus the base of its run, a fraction of 1, with its 95 % interval."""

    value: float
    low: float
    high: float
    outcome: Outcome
    """On a benchmark by the exact test of its pairs; of a mean by whether the interval holds 0."""


class Cell(Contract):
    """A model on a benchmark, or its mean over several. Shares are fractions of 1, the interval one of 95 %."""

    n: int
    """Questions."""
    accuracy: float
    low: float
    high: float
    difference: Difference | None = None
    """None for the base, and where the base was not asked."""
    tokens: float
    """Of an output, on average."""
    longer: float | None = None
    """How many times as long as the base's outputs; None as `difference`, or where the base said nothing."""


class Line(Contract):
    model: str
    """`base`, `cgd`, ..."""
    name: str
    """The same for people, with the ablation of the critiques if there is one."""
    critique: Critique = Critique()
    recipe: str = ""
    """A hash of all that the training was made of but its seed; empty where nothing was trained."""
    seed: int | None = None
    runs: tuple[str, ...] = ()
    """The runs that it comes from; none in the table of one run."""
    cells: dict[str, Cell]
    """Benchmark -> result."""
    mean: Cell | None = None


class Asked(Contract):
    """The questions of a benchmark: how many, and a hash of their ids, prompts and references."""

    n: int
    digest: str
    general: bool = False
    """A task of lm-eval, beside what the run distils for: its own column, and no part of the mean."""


class Table(Contract):
    lines: tuple[Line, ...]
    questions: dict[str, Asked]
    """Benchmark -> its questions, in the order of the columns."""
    averaged: tuple[str, ...]
    """The benchmarks, general ones apart, that every model was asked: `mean` is over these, each with the same
    weight."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The benchmarks, and their mean where that says more than they do."""
        return (*self.questions, *((MEAN,) if len(self.averaged) > 1 else ()))

    def cell(self, line: Line, column: str) -> Cell | None:
        return line.mean if column == MEAN else line.cells.get(column)

    def best(self, column: str) -> float:
        """The highest accuracy of a column; NaN, which nothing equals, where there is nothing to choose from."""
        found = [cell.accuracy for line in self.lines if (cell := self.cell(line, column))]
        return max(found) if len(set(found)) > 1 else math.nan


class Spread(Contract):
    """Accuracies of several trainings: their mean and sample standard deviation, fractions of 1."""

    mean: float
    deviation: float


class Seeds(Contract):
    """Trainings that differ in their seed alone, taken together."""

    name: str
    runs: tuple[str, ...]
    columns: dict[str, Spread]
    """Benchmark, or the mean of several -> accuracies; what all of the trainings were asked."""


class Point(Contract):
    """What a training reached with a share `rate` of its critiques corrupted."""

    rate: float
    run: str
    accuracy: float
    low: float
    high: float


def table_of(data: ReportData) -> Table:
    """The table of one run: every evaluated model on every benchmark."""
    found = {(one.model, one.benchmark): one for one in scores(data)}
    pairs = {(one.trained, one.benchmark): one for one in comparisons(data, BASE)}
    lines = []
    for model in data.evaluations:
        cells = {
            name: cell(found[model, name], pairs.get((model, name)), found.get((BASE, name)))
            for name in benchmarks(data)
            if (model, name) in found
        }
        critique, made = critique_of(data, model), recipe_of(data, model)
        lines.append(Line(model=model, name=name_of(model, critique), critique=critique, cells=cells, **made))
    return assembled(lines, {name: asked(data, name) for name in benchmarks(data)})


def cell(score: Score, pair: Comparison | None, base: Score | None) -> Cell:
    difference = pair and Difference(value=pair.difference, low=pair.low, high=pair.high, outcome=_outcome(pair))
    return Cell(
        n=score.n,
        accuracy=score.accuracy,
        low=score.low,
        high=score.high,
        difference=difference,
        tokens=score.mean_tokens,
        longer=score.mean_tokens / base.mean_tokens if pair and base and base.mean_tokens else None,
    )


def _outcome(pair: Comparison) -> Outcome:
    match pair.outcome:
        case "better" | "worse" as known:
            return known
    return "noise"


def critique_of(data: ReportData, model: str) -> Critique:
    """What stood in the critique's place when the model was trained."""
    return Critique.model_validate(_trained_from(data, model).get("critique") or {})


def recipe_of(data: ReportData, model: str) -> dict[str, Any]:
    """A line's `recipe` and `seed`."""
    inputs = _trained_from(data, model)
    if not (training := inputs.get("training")):
        return {}
    rest = {name: value for name, value in training.items() if name != "seed"}
    return {"recipe": digest_of(**inputs | {"training": rest}), "seed": training.get("seed")}


def _trained_from(data: ReportData, model: str) -> dict[str, Any]:
    return next((stage.inputs for stage in data.stages if stage.name == StageName.of("train", model)), {})


def name_of(model: str, critique: Critique) -> str:
    """How people write a model or an objective, with the ablation of its critiques if it had one."""
    name = NAMES.get(model, model)
    match critique.kind:
        case "matched":
            return name
        case "corrupted":
            return f"{name} ({100 * critique.rate:g}{THIN}% of critiques corrupted)"
        case kind:
            return f"{name} (critique: {kind})"


def asked(data: ReportData, benchmark: str) -> Asked:
    """What the models of a run were asked in a benchmark; how often each question was sampled does not matter."""
    questions = {
        (sample.id, sample.asked)
        for samples in data.evaluations.values()
        for sample in samples
        if sample.benchmark == benchmark
    }
    return Asked(
        n=len(questions), digest=digest_of(questions=sorted(questions)), general=benchmark in lm_eval_tasks(data)
    )


def lm_eval_tasks(data: ReportData) -> dict[str, str]:
    """What the run's models were asked by lm-eval: the benchmark's name -> the task behind it."""
    stages = (stage for stage in data.stages if stage.name.kind == "harness")
    return {task["name"]: task["task"] for stage in stages for task in stage.inputs.get("tasks", ())}


def assembled(lines: Iterable[Line], questions: dict[str, Asked]) -> Table:
    """The lines in the paper's order, each with its mean over the benchmarks that all of them have."""
    order = list(NAMES)
    ordered = sorted(
        lines,
        key=lambda line: (
            order.index(line.model) if line.model in order else len(order),
            line.critique.kind != "matched",
            line.critique.kind,
            line.critique.rate,
        ),
    )
    special = (name for name, asked in questions.items() if not asked.general)
    averaged = tuple(name for name in special if all(name in line.cells for line in ordered))
    return Table(
        lines=tuple(
            line.model_copy(update={"mean": mean([line.cells[name] for name in averaged]) if averaged else None})
            for line in ordered
        ),
        questions=questions,
        averaged=averaged,
    )


def mean(cells: Sequence[Cell]) -> Cell:
    """The mean of some benchmarks, each with the same weight. Its intervals are put together from theirs."""
    accuracy, low, high = _mean([(one.accuracy, one.low, one.high) for one in cells])
    differences = [one.difference for one in cells if one.difference]
    difference = None
    if len(differences) == len(cells):
        value, least, most = _mean([(one.value, one.low, one.high) for one in differences])
        outcome: Outcome = "better" if least > 0 else "worse" if most < 0 else "noise"
        difference = Difference(value=value, low=least, high=most, outcome=outcome)
    bases = [one.tokens / one.longer for one in cells if one.longer]
    tokens = math.fsum(one.tokens for one in cells)
    return Cell(
        n=sum(one.n for one in cells),
        accuracy=accuracy,
        low=low,
        high=high,
        difference=difference,
        tokens=tokens / len(cells),
        longer=tokens / math.fsum(bases) if len(bases) == len(cells) else None,
    )


def _mean(estimates: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of independent estimates (value, low, high): the distances to their bounds add up as squares (MOVER, Zou
    and Donner 2008), which keeps the intervals of small benchmarks wide."""
    k = len(estimates)
    middle = math.fsum(value for value, _, _ in estimates) / k
    below = math.sqrt(math.fsum((value - low) ** 2 for value, low, _ in estimates)) / k
    above = math.sqrt(math.fsum((high - value) ** 2 for value, _, high in estimates)) / k
    return middle, middle - below, middle + above


def joined(tables: Mapping[str, Table]) -> Table:
    """One table of several runs, by the runs' names. Bases with the same results are one line.

    Raises UserError when a benchmark does not have the same questions in all of the runs that have it.
    """
    questions: dict[str, Asked] = {}
    first: dict[str, str] = {}
    faults = []
    for run, table in tables.items():
        for name, there in table.questions.items():
            here = questions.setdefault(name, there)
            origin = first.setdefault(name, run)
            if here.digest != there.digest:
                faults.append(f"{name}: {here.n:,} in {origin}, {there.n:,} others in {run}")
    if faults:
        raise UserError(
            f"the runs were not asked the same questions ({'; '.join(faults)})",
            hint="Compare runs whose benchmarks have the same source, limit, fields and instruction.",
        )
    lines: list[Line] = []
    for run, table in tables.items():
        for line in table.lines:
            twin = next((i for i, one in enumerate(lines) if _same_base(one, line)), None)
            if twin is None:
                lines.append(line.model_copy(update={"runs": (run,)}))
            else:
                lines[twin] = lines[twin].model_copy(update={"runs": (*lines[twin].runs, run)})
    return assembled(lines, questions)


def _same_base(one: Line, other: Line) -> bool:
    return one.model == other.model == BASE and one.cells == other.cells


def over_seeds(table: Table) -> list[Seeds]:
    """Mean and deviation of every recipe that was trained with several seeds, in the order of the lines."""
    groups: dict[str, dict[int | None, Line]] = {}
    for line in table.lines:
        if line.recipe:
            groups.setdefault(line.recipe, {}).setdefault(line.seed, line)
    return [_together(table, list(group.values())) for group in groups.values() if len(group) > 1]


def _together(table: Table, lines: Sequence[Line]) -> Seeds:
    found = {column: [cell for line in lines if (cell := table.cell(line, column))] for column in table.columns}
    spreads = {
        column: Spread(mean=statistics.fmean(values), deviation=statistics.stdev(values))
        for column, cells in found.items()
        if len(values := [cell.accuracy for cell in cells]) == len(lines)
    }
    runs = dict.fromkeys(run for line in lines for run in line.runs)
    return Seeds(name=lines[0].name, runs=tuple(runs), columns=spreads)


def robustness(table: Table) -> list[Point]:
    """Mean accuracy of CGD by the rate of corrupted critiques, as the lines are; empty where no run corrupted any."""
    chosen = [line for line in table.lines if line.model == "cgd" and line.critique.kind in {"matched", "corrupted"}]
    if all(line.critique.kind == "matched" for line in chosen):
        return []
    return [
        Point(
            rate=line.critique.rate if line.critique.kind == "corrupted" else 0.0,
            run=", ".join(line.runs),
            accuracy=line.mean.accuracy,
            low=line.mean.low,
            high=line.mean.high,
        )
        for line in chosen
        if line.mean
    ]
