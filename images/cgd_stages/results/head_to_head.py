"""Trained models against each other, question by question: is CGD better than the others? Pure.

Each model that learned by CGD is compared with each other trained model; where none learned by CGD, each trained model
with those that follow. Both of a pair are compared on the questions that both have a grade for. Trainings that differ
in their seed alone are taken together: a question then counts with the mean of their shares of right outputs. The
p-values of one model and one benchmark are corrected for their number (Holm).
"""

import math
import statistics as averages
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cgd_stages.contract import Contract
from cgd_stages.results import statistics
from cgd_stages.results.answers import Answers
from cgd_stages.results.comparison import BASE, MEAN, Difference, Line, Table, mean_of
from cgd_stages.results.scores import NOISE, RIVALS, Outcome

Method = Literal["mcnemar", "signFlips", "drawnFlips"]
"""The test: McNemar's exact one, all flips of the questions' signs, or some of them, drawn with a fixed seed."""
IntervalKind = Literal["paired", "resampled", "combined"]
"""The interval: of Bonett and Price (2012), by resampling questions, or combined from those of the benchmarks."""


class Side(Contract):
    """One of the two models of a pair, with the trainings that differ in their seed alone."""

    model: str
    """`cgd`, ..."""
    name: str
    runs: tuple[str, ...] = ()
    """The runs that the trainings come from; empty in the table of one run."""
    accuracy: float
    """On the questions of the pair, the mean over the trainings."""
    seeds: int
    """Trainings."""
    deviation: float | None = None
    """The sample standard deviation of the trainings' accuracies; None for one training."""


class HeadToHead(Contract):
    """Two trained models on the same questions."""

    column: str
    """The benchmark, or `mean` for the mean of several."""
    one: Side
    other: Side
    n: int
    """Questions that both have a grade for."""
    left_out: int
    """Questions that only one of the two has a grade for."""
    won: int
    """Questions that `one` solves more often."""
    lost: int
    difference: Difference
    """One minus other. Its outcome is that of the corrected p-value; its interval is not corrected."""
    interval: IntervalKind
    test: Method
    p: float
    corrected: float
    """p, corrected for the number of `tests` by Holm."""
    tests: int
    """Pairs of `one` in this column."""
    level: float
    """Holm's level for the pairs within noise: a p-value below it would not be noise."""
    detectable: float | None
    """The smallest difference that would have been found at `level` with a chance of 80 %; None if none would."""


@dataclass(frozen=True)
class Arm:
    """A trained model, or several that differ in their seed alone."""

    lines: tuple[Line, ...]

    @property
    def runs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run for line in self.lines for run in line.runs))

    def trainings(self, benchmark: str) -> list[Answers]:
        """The answers of each training; a training that several runs evaluated counts once."""
        texts: dict[int | None, str] = {}
        for line in self.lines:
            if (cell := line.cells.get(benchmark)) and cell.answers:
                texts.setdefault(line.seed, cell.answers)
        return [Answers.read(text) for text in texts.values()]


@dataclass(frozen=True)
class Paired:
    """Two arms on the questions of a benchmark that both have a grade for, in every training."""

    one: NDArray[np.float64]
    """The share of right outputs by training and question."""
    other: NDArray[np.float64]
    unit: int
    """Times this the questions' differences are whole numbers."""
    single: bool
    """Whether each model has one training, and one output for each question."""
    left_out: int

    @property
    def n(self) -> int:
        return int(self.one.shape[1])

    @property
    def differences(self) -> NDArray[np.float64]:
        """For each question, from -1 to 1."""
        gaps = self.one.mean(axis=0) - self.other.mean(axis=0)
        # Equal shares of unequal numbers of outputs differ in their last bits; the sign of that is no difference.
        rounded: NDArray[np.float64] = gaps.round(12) + 0.0
        return rounded


def head_to_heads(table: Table) -> tuple[HeadToHead, ...]:
    """All pairs in the order of the table's columns, in each with the corrected p-values of each `one`."""
    groups: dict[object, list[Line]] = {}
    for line in table.lines:
        if _is_trained(line):
            groups.setdefault(line.recipe or (line.model, line.runs), []).append(line)
    arms = [Arm(tuple(group)) for group in groups.values()]
    by_cgd = [arm for arm in arms if (arm.lines[0].objective or arm.lines[0].model).lower() == "cgd"]
    firsts, rest = (by_cgd, [arm for arm in arms if arm not in by_cgd]) if by_cgd else (arms, [])
    opponents = [(arm, rest + firsts[i + 1 :]) for i, arm in enumerate(firsts)]  # each pair once
    found = []
    for column in table.columns:
        for one, others in opponents:
            benchmarks = table.averaged if column == MEAN else (column,)
            pairs = ((other, [_paired(one, other, name) for name in benchmarks]) for other in others)
            family = [_compared(column, one, other, [pair for pair in paired if pair])
                      for other, paired in pairs if all(paired)]  # fmt: skip
            found += _corrected(family)
    return tuple(found)


def without_answers(table: Table) -> tuple[str, ...]:
    """The runs whose trained models cannot be paired, because their reports are of a version without the answers."""
    silent = [
        line for line in table.lines
        if _is_trained(line) and not all(cell.answers for cell in line.cells.values())
    ]  # fmt: skip
    return tuple(dict.fromkeys(run for line in silent for run in line.runs))


def _is_trained(line: Line) -> bool:
    return line.model not in (BASE, *RIVALS)


def _paired(one: Arm, other: Arm, benchmark: str) -> Paired | None:
    """The two arms on a benchmark; None if they have no question in common."""
    sides = one.trainings(benchmark), other.trainings(benchmark)
    if not all(sides):
        return None
    graded = [np.all([training.graded > 0 for training in side], axis=0) for side in sides]
    common = graded[0] & graded[1]
    if not common.any():
        return None
    outputs = [np.array([training.graded[common] for training in side]) for side in sides]
    rights = [np.array([training.right[common] for training in side]) for side in sides]
    return Paired(
        one=rights[0] / outputs[0],
        other=rights[1] / outputs[1],
        unit=math.lcm(*(len(counts) * math.lcm(*np.unique(counts).tolist()) for counts in outputs)),
        single=all(len(counts) == 1 and bool((counts == 1).all()) for counts in outputs),
        left_out=int((graded[0] ^ graded[1]).sum()),
    )


def _compared(column: str, one: Arm, other: Arm, benchmarks: Sequence[Paired]) -> HeadToHead:
    """Two arms on one benchmark, or on the mean of several. Not corrected yet: see `_corrected`."""
    differences = [paired.differences for paired in benchmarks]
    # In the mean every benchmark has the same weight.
    weights = [len(benchmarks) * paired.n for paired in benchmarks]
    unit = math.lcm(*(weight * paired.unit for weight, paired in zip(weights, benchmarks, strict=True)))
    weighted = np.concatenate([gaps / weight for gaps, weight in zip(differences, weights, strict=True)])
    p, exact = statistics.mean_flip(weighted, unit)
    estimates = [_estimate(paired) for paired in benchmarks]
    value, low, high = mean_of(estimates) if len(estimates) > 1 else estimates[0]
    single = len(benchmarks) == 1 and benchmarks[0].single
    resampled = not single and statistics.is_resampled(differences[0].tolist())
    return HeadToHead(
        column=column,
        one=_side(one, [paired.one for paired in benchmarks]),
        other=_side(other, [paired.other for paired in benchmarks]),
        n=sum(paired.n for paired in benchmarks),
        left_out=sum(paired.left_out for paired in benchmarks),
        won=int((weighted > 0).sum()),
        lost=int((weighted < 0).sum()),
        difference=Difference(value=value, low=low, high=high, outcome="noise"),
        interval="combined" if len(benchmarks) > 1 else "resampled" if resampled else "paired",
        test="mcnemar" if single else "signFlips" if exact else "drawnFlips",
        p=p,
        corrected=p,
        tests=1,
        level=NOISE,
        detectable=None,
    )


def _estimate(paired: Paired) -> tuple[float, float, float]:
    """The mean difference of a benchmark's questions with its 95 % interval."""
    differences = paired.differences.tolist()
    if paired.single:
        won, lost = (sum(sign * value > 0 for value in differences) for sign in (1, -1))
        low, high = statistics.paired_interval(won, lost, paired.n)
    else:
        low, high = statistics.difference_interval(differences)
    return math.fsum(differences) / paired.n, low, high


def _side(arm: Arm, shares: Sequence[NDArray[np.float64]]) -> Side:
    """shares: for each benchmark, those of right outputs by training and question."""
    line = arm.lines[0]
    trainings = min(len(benchmark) for benchmark in shares)
    accuracies = [averages.fmean(float(benchmark[i].mean()) for benchmark in shares) for i in range(trainings)]
    return Side(
        model=line.model,
        name=line.name,
        runs=arm.runs,
        accuracy=averages.fmean(float(benchmark.mean()) for benchmark in shares),
        seeds=trainings,
        deviation=averages.stdev(accuracies) if trainings > 1 else None,
    )


def _corrected(family: Sequence[HeadToHead]) -> list[HeadToHead]:
    """One model's pairs in one column, corrected for their number, with what those within noise could have shown."""
    corrected = statistics.holm([pair.p for pair in family])
    level = NOISE / (sum(p >= NOISE for p in corrected) or 1)
    results = []
    for pair, p in zip(family, corrected, strict=True):
        gap = pair.difference
        outcome: Outcome = "noise" if p >= NOISE else "better" if gap.value > 0 else "worse"
        if pair.test == "mcnemar":
            detectable = statistics.detectable(pair.n, (pair.won + pair.lost) / pair.n, level)
        else:
            detectable = statistics.detectable_mean(pair.n, gap.low, gap.high, level)
        changes = {
            "difference": gap.model_copy(update={"outcome": outcome}),
            "corrected": p,
            "tests": len(family),
            "level": level,
            "detectable": detectable,
        }
        results.append(pair.model_copy(update=changes))
    return results
