"""The table of a comparison: a line for each model, a column for each benchmark, and the mean of the columns. Pure.

`table_of` makes the table of one run from its outputs, and `joined` makes one of several runs' tables, which their
`report.json` hold. A difference is always to the base of the same run, question by question.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from cgd_stages.contract import Contract, Count, Critique, Measure, StageName
from cgd_stages.errors import UserError
from cgd_stages.results.answers import PATTERN, Answers, answers_of
from cgd_stages.results.formatting import THIN
from cgd_stages.results.model import ReportData, StageRecord
from cgd_stages.results.scores import Comparison, Outcome, Score, benchmarks, comparisons, scores
from cgd_stages.store.rows import digest_of

BASE = "base"
NAMES = {
    BASE: "base",
    "selfrefine": "Self-Refine",
    "reflexion": "Reflexion",
    "majority": "Majority",
    "bestofn": "Best-of-n",
    "sft": "SFT",
    "distilledsft": "Distilled SFT",
    "refinedsft": "Refined SFT",
    "cft": "CFT",
    "cgd": "CGD",
    "dpo": "DPO",
    "contextdistillation": "context distillation",
    "supervisedkd": "supervised KD",
}
"""The name of each evaluated model for people, in the order of the paper's table."""
MEAN = "mean"
Share = Annotated[float, Field(ge=-2, le=2)]
"""A fraction of 1, or the difference of two, from which a rounded sum may be a little away."""


class Difference(Contract):
    """A model minus another, in the table the base of its run: a fraction of 1, with its 95 % interval."""

    value: Share
    low: Share
    high: Share
    outcome: Outcome
    """The exact test of the pairs decides it on a benchmark; for a mean, whether the interval contains 0."""


class Cell(Contract):
    """A model on a benchmark, or its mean over several. Shares are fractions of 1, the interval one of 95 %."""

    n: Count
    """Questions."""
    accuracy: Share
    low: Share
    high: Share
    difference: Difference | None = None
    """None for the base, and if the base has no outputs on the benchmark."""
    tokens: Measure
    """The mean number of tokens in an output."""
    longer: Measure | None = None
    """The factor by which outputs are longer than the base's; None like `difference`, or if the base's are empty."""
    answers: str = Field("", pattern=PATTERN)
    """For each question, by id, `right/graded` outputs; empty for a mean, and in reports of early versions."""


class Line(Contract):
    model: str
    """`base`, `cgd`, ..."""
    name: str
    """The model's name for people, with the ablation of the critiques if there is one."""
    objective: str = ""
    """What the model was trained for: `CGD`, ...; empty if it was not trained."""
    critique: Critique = Critique()
    misled: Share | None = None
    """The share of the learned examples with a miscritique; None where the training reads none."""
    recipe: str = ""
    """A hash of the training's inputs without the seed; empty if the model was not trained."""
    seed: int | None = None
    runs: tuple[str, ...] = ()
    """The runs that the line comes from; empty in the table of one run."""
    cells: dict[str, Cell]
    """Benchmark -> result."""
    mean: Cell | None = None


class QuestionSet(Contract):
    """The questions of a benchmark: their number, and a hash of their ids, prompts and references."""

    n: Count
    digest: str
    general: bool = False
    """A task of lm-eval: it has its own column and no part in the mean."""


class Table(Contract):
    lines: tuple[Line, ...]
    questions: dict[str, QuestionSet]
    """Benchmark -> its questions, in the order of the columns."""
    averaged: tuple[str, ...]
    """The benchmarks without general ones that every model was asked. They have the same weight in `mean`."""

    @model_validator(mode="after")
    def _answers_fit(self) -> Self:
        for line in self.lines:
            for name, cell in line.cells.items():
                answers = Answers.read(cell.answers)
                possible = len(answers.graded) == self.questions[name].n and (answers.right <= answers.graded).all()
                if cell.answers and not possible:
                    raise ValueError(f"the answers of {line.model} do not fit the questions of {name}")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The benchmarks, and the mean if it is over several."""
        return (*self.questions, *((MEAN,) if len(self.averaged) > 1 else ()))

    def cell(self, line: Line, column: str) -> Cell | None:
        return line.mean if column == MEAN else line.cells.get(column)

    def best(self, column: str) -> float:
        """The highest accuracy of a column; NaN, which no cell equals, if all of them are the same."""
        accuracies = [cell.accuracy for line in self.lines if (cell := self.cell(line, column))]
        return max(accuracies) if len(set(accuracies)) > 1 else math.nan


class Spread(Contract):
    """The mean and the sample standard deviation of several trainings' accuracies, fractions of 1."""

    mean: float
    deviation: float


class Seeds(Contract):
    """Trainings that differ only in their seed."""

    name: str
    runs: tuple[str, ...]
    columns: dict[str, Spread]
    """Benchmark, or the mean of several -> accuracies; only benchmarks that all of the trainings were asked."""


class Point(Contract):
    """The accuracy of a training for which the share `rate` of the rows was given a wrong critique."""

    rate: float
    wrong: float
    """The share of the learned examples that had one, where it was counted: less than `rate` where the teacher has not
    turned every verdict round. Else `rate`."""
    run: str
    accuracy: float
    low: float
    high: float


class Curve(Contract):
    """Accuracy over the rate of one kind of wrong critiques, from the training without any."""

    name: str
    points: tuple[Point, ...]


def table_of(data: ReportData) -> Table:
    """The table of one run: every evaluated model on every benchmark."""
    model_scores = {(score.model, score.benchmark): score for score in scores(data)}
    to_base = {(comparison.trained, comparison.benchmark): comparison for comparison in comparisons(data, BASE)}
    answers = answers_of(data.evaluations)
    stages = {stage.name: stage for stage in data.stages}
    lines = []
    for model in data.evaluations:
        cells = {
            name: _cell(score, to_base.get((model, name)), model_scores.get((BASE, name)), answers[model, name])
            for name in benchmarks(data)
            if (score := model_scores.get((model, name)))
        }
        training_stage = stages.get(StageName.of("train", model))
        trained = training_stage.inputs if training_stage else {}
        critique = Critique.model_validate(trained.get("critique") or {})
        line = Line(
            model=model,
            name=name_of(model, trained),
            objective=trained.get("objective", ""),
            critique=critique,
            misled=misled(training_stage),
            cells=cells,
        )
        if training := trained.get("training"):
            recipe = trained | {"training": {name: value for name, value in training.items() if name != "seed"}}
            line = line.model_copy(update={"recipe": digest_of(**recipe), "seed": training.get("seed")})
        lines.append(line)
    return assembled(lines, {name: questions_of(data, name) for name in benchmarks(data)})


def misled(training: StageRecord | None) -> float | None:
    """The share of a training's learned examples that have a miscritique; None where it reads none."""
    metrics = training.facts.metrics if training and training.facts else {}
    if "misled_examples" not in metrics:
        return None
    return metrics["misled_examples"] / (metrics["train_examples"] or 1)


def _cell(score: Score, comparison: Comparison | None, base: Score | None, answers: str) -> Cell:
    difference = None
    if comparison:
        value, outcome = comparison.difference, comparison.outcome
        difference = Difference(value=value, low=comparison.low, high=comparison.high, outcome=outcome)
    return Cell(
        n=score.n,
        accuracy=score.accuracy,
        low=score.low,
        high=score.high,
        difference=difference,
        tokens=score.mean_tokens,
        longer=score.mean_tokens / base.mean_tokens if comparison and base and base.mean_tokens else None,
        answers=answers,
    )


def name_of(model: str, trained: Mapping[str, Any]) -> str:
    """The name of a model for people: with the objective of a variant, the ablation of its critiques, and the share of
    its rows whose context is the prompt alone. `trained` are the inputs of its training; empty: it was not trained."""
    objective, critique = trained.get("objective", ""), Critique.model_validate(trained.get("critique") or {})
    about = [NAMES.get(objective.lower(), objective)] if objective and model not in NAMES else []
    about += [f"{100 * share:g}{THIN}% on the prompt alone"] if (share := trained.get("bareShare")) else []
    match critique.kind:
        case "matched":
            pass
        case "corrupted":
            about.append(f"{100 * critique.rate:g}{THIN}% of critiques corrupted")
        case "miscritique":
            about.append(f"{100 * critique.rate:g}{THIN}% miscritiques, target {critique.target}")
        case kind:
            about.append(f"critique: {kind}")
    name = NAMES.get(model, model)
    return f"{name} ({', '.join(about)})" if about else name


def questions_of(data: ReportData, benchmark: str) -> QuestionSet:
    """The questions of a benchmark that a run asked its models; the number of samples does not matter."""
    questions = {
        (sample.id, sample.asked)
        for samples in data.evaluations.values()
        for sample in samples
        if sample.benchmark == benchmark
    }
    digest = digest_of(questions=sorted(questions))
    n = len({identity for identity, _ in questions})
    return QuestionSet(n=n, digest=digest, general=benchmark in lm_eval_tasks(data))


def lm_eval_tasks(data: ReportData) -> dict[str, str]:
    """The run's tasks of lm-eval: the benchmark's name -> the task's."""
    stages = (stage for stage in data.stages if stage.name.kind == "harness")
    return {task["name"]: task["task"] for stage in stages for task in stage.inputs.get("tasks", ())}


def assembled(lines: Iterable[Line], questions: dict[str, QuestionSet]) -> Table:
    """The table of some lines: in the paper's order, each with its mean over the benchmarks that all lines have."""
    order = list(NAMES)
    ordered = sorted(
        lines,
        key=lambda line: (
            order.index(line.model) if line.model in order else len(order),
            line.critique.kind != "matched",
            line.critique.kind,
            line.critique.target or "",
            line.critique.rate,
        ),
    )
    special = (name for name, benchmark in questions.items() if not benchmark.general)
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
    """The mean of some benchmarks, each with the same weight; its intervals combine theirs."""
    accuracy, low, high = mean_of([(cell.accuracy, cell.low, cell.high) for cell in cells])
    differences = [cell.difference for cell in cells if cell.difference]
    difference = None
    if len(differences) == len(cells):
        value, least, most = mean_of([(gain.value, gain.low, gain.high) for gain in differences])
        outcome: Outcome = "better" if least > 0 else "worse" if most < 0 else "noise"
        difference = Difference(value=value, low=least, high=most, outcome=outcome)
    base_tokens = [cell.tokens / cell.longer for cell in cells if cell.longer]
    tokens = math.fsum(cell.tokens for cell in cells)
    return Cell(
        n=sum(cell.n for cell in cells),
        accuracy=accuracy,
        low=low,
        high=high,
        difference=difference,
        tokens=tokens / len(cells),
        longer=tokens / math.fsum(base_tokens) if len(base_tokens) == len(cells) else None,
    )


def mean_of(estimates: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The mean of independent estimates (value, low, high). The squares of the distances to their bounds add up (MOVER,
    Zou and Donner 2008), which keeps the intervals of small benchmarks wide."""
    k = len(estimates)
    middle = math.fsum(value for value, _, _ in estimates) / k
    below = math.sqrt(math.fsum((value - low) ** 2 for value, low, _ in estimates)) / k
    above = math.sqrt(math.fsum((high - value) ** 2 for value, _, high in estimates)) / k
    return middle, middle - below, middle + above


def joined(tables: Mapping[str, Table]) -> Table:
    """One table of several runs, given by name. Bases with the same results share a line.

    Raises UserError if a benchmark does not have the same questions in all of the runs that have it.
    """
    questions: dict[str, QuestionSet] = {}
    first_runs: dict[str, str] = {}
    faults = []
    for run, table in tables.items():
        for name, other in table.questions.items():
            first = questions.setdefault(name, other)
            first_run = first_runs.setdefault(name, run)
            if (first.digest, first.n) != (other.digest, other.n):
                faults.append(f"{name}: {first.n:,} in {first_run}, {other.n:,} others in {run}")
    if faults:
        raise UserError(
            f"the runs were not asked the same questions ({'; '.join(faults)})",
            hint="Compare runs whose benchmarks have the same source, limit, fields and instruction.",
        )
    lines: list[Line] = []
    for run, table in tables.items():
        for line in table.lines:
            same = (i for i, base in enumerate(lines) if base.model == line.model == BASE and base.cells == line.cells)
            if (place := next(same, None)) is None:
                lines.append(line.model_copy(update={"runs": (run,)}))
            else:
                lines[place] = lines[place].model_copy(update={"runs": (*lines[place].runs, run)})
    return assembled(lines, questions)


def over_seeds(table: Table) -> list[Seeds]:
    """The mean and deviation of every recipe that was trained with several seeds, in the order of the lines."""
    groups: dict[str, dict[int | None, Line]] = {}
    for line in table.lines:
        if line.recipe:
            groups.setdefault(line.recipe, {}).setdefault(line.seed, line)
    recipes = []
    for lines in (list(group.values()) for group in groups.values() if len(group) > 1):
        spreads = {}
        for column in table.columns:
            accuracies = [cell.accuracy for line in lines if (cell := table.cell(line, column))]
            if len(accuracies) == len(lines):
                spreads[column] = Spread(mean=statistics.fmean(accuracies), deviation=statistics.stdev(accuracies))
        runs = dict.fromkeys(run for line in lines for run in line.runs)
        recipes.append(Seeds(name=lines[0].name, runs=tuple(runs), columns=spreads))
    return recipes


WRONG = {
    ("corrupted", None): "another prompt's critique under the opposite verdict",
    ("miscritique", "kept"): "miscritique, target kept",
    ("miscritique", "refined"): "miscritique, target refined from it",
}
"""The curves of robustness by kind and target, in their order, with their names."""


def robustness(table: Table) -> list[Curve]:
    """The mean accuracy of CGD over the rate of wrong critiques, a curve for each kind and target that the table has;
    all begin with the trainings without any. Variants are on the curves too."""
    lines = [line for line in table.lines if line.model == "cgd" or line.objective == "CGD"]
    clean = [_point(line) for line in lines if line.model == "cgd" and line.critique.kind == "matched" and line.mean]
    curves = []
    for kind, name in WRONG.items():
        wrong = [line for line in lines if (line.critique.kind, line.critique.target) == kind]
        if wrong:
            points = clean + [_point(line) for line in wrong if line.mean]
            curves.append(Curve(name=name, points=tuple(sorted(points, key=lambda point: point.rate))))
    return curves


def _point(line: Line) -> Point:
    assert line.mean
    rate = line.critique.rate if line.critique.kind != "matched" else 0.0
    return Point(
        rate=rate,
        wrong=rate if line.misled is None else line.misled,
        run=", ".join(line.runs),
        accuracy=line.mean.accuracy,
        low=line.mean.low,
        high=line.mean.high,
    )
