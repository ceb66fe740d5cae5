"""What the report says, as values: everything read of a run, and every figure computed from it. Pure.

Intervals and tests are exact or conservative where the samples are small, because small benchmarks are the rule:
Wilson's interval for a proportion, McNemar's exact test for pairs, and the adjusted Wald interval of Bonett and Price
(2012) for the difference of paired proportions.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from pydantic import Field

from cgd_stages.contract import Contract, RunRef, StageFacts

T = TypeVar("T")
Z = 1.959963984540054
"""Quantile of the normal distribution for intervals of 95 %."""
NOISE = 0.05
"""A p-value from here on is called noise."""
UNFINISHED = ("length", "repetition")
"""Finish reasons of an output without an end."""


class StageRecord(Contract):
    """One stage as its folder tells of it. `facts` is None when the run has no output of the stage."""

    name: str
    facts: StageFacts | None = None
    started: str = ""
    """RFC 3339, UTC."""
    completed: str = ""
    rejections: dict[str, int] = Field(default_factory=dict)
    """Reason -> rows."""
    inputs: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """Wall clock from the stage's start to its promise; None when the times are not known."""
        if not (self.started and self.completed):
            return None
        return max(0.0, at(self.completed) - at(self.started))


class Step(Contract):
    """One line of a training's log."""

    step: int
    loss: float = math.nan
    learning_rate: float | None = None
    grad_norm: float | None = None
    supervised_tokens: int | None = None
    supervised_tokens_per_second: float | None = None
    tokens_per_second: float | None = None
    validation_loss: float | None = None
    """Where it was measured: after every so many steps and after the last."""
    mfu: float | None = None
    """Share of the devices' peak, a fraction of 1; None where the peak is not known."""
    peak_memory_bytes: float | None = None


class Sample(Contract):
    """One graded output of an evaluated model."""

    benchmark: str
    id: str
    sample: int = 0
    prompt: str
    reference: str
    output: str
    finish_reason: str
    tokens: int
    extracted: str
    answer_source: str
    correct: bool
    grade_error: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.benchmark, self.id, self.sample


class Quadruple(Contract):
    """A row that training learns from; texts may have been cut for display."""

    id: str
    sample: int
    prompt: str
    reference: str
    answer: str
    critique: str
    refinement: str
    verdict: str
    """right, wrong or missing."""
    tokens: dict[str, int]
    """Text -> its tokens."""
    draft_right: bool | None = None
    """What the grader says of the answer; None where there is no reference to hold it against, or no decision."""
    refinement_right: bool | None = None


class Quadruples(Contract):
    total: int
    verdicts: dict[str, int]
    """Over all rows, not only those shown."""
    shown: tuple[Quadruple, ...]


class Rejected(Contract):
    """A row that a stage could not use."""

    id: str
    sample: int
    stage: str
    reason: str
    detail: str
    prompt: str = ""
    """Empty where the row has none, as some that prepare has read."""


class ReportData(Contract):
    """Everything that the report is made of."""

    run: RunRef
    spec: str
    stages: tuple[StageRecord, ...]
    training: dict[str, tuple[Step, ...]] = Field(default_factory=dict)
    """Stage -> its log, in order of steps."""
    evaluations: dict[str, tuple[Sample, ...]] = Field(default_factory=dict)
    """Label of the model (`base`, `cgd`) -> its graded outputs."""
    quadruples: Quadruples | None = None
    rejected: tuple[Rejected, ...] = ()
    """Some of the rejected rows of each stage and reason."""


class Score(Contract):
    """One model on one benchmark. Shares are fractions of 1."""

    model: str
    benchmark: str
    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    truncated: int
    """Outputs cut by the token limit; they count as what their text says, which is mostly wrong."""
    unparsed: int
    """Outputs in which no answer was found."""
    ungraded: int
    """Outputs that the grader could not decide on (time-outs and errors): counted as not correct."""
    refused: int
    """Questions that were never answered: too long for the context, or refused by the engine."""
    mean_tokens: float


class Comparison(Contract):
    """Two models on the same questions. `difference` is trained minus base, a fraction of 1."""

    benchmark: str
    base: str
    trained: str
    n: int
    both: int
    neither: int
    fixed: int
    """Wrong before, right now."""
    broken: int
    p: float
    difference: float
    low: float
    high: float

    @property
    def outcome(self) -> str:
        """better, worse or noise."""
        if self.p >= NOISE:
            return "noise"
        return "better" if self.fixed > self.broken else "worse"


class Change(Contract):
    """A question that training fixed or broke."""

    benchmark: str
    trained: str
    kind: str
    """fixed or broken."""
    base: Sample
    after: Sample


def at(time: str) -> float:
    """Seconds since the epoch of an RFC 3339 time."""
    return datetime.fromisoformat(time).timestamp()


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (E. B. Wilson, 1927); (0, 1) when nothing was tried."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return max(0.0, low), min(1.0, high)


def mcnemar(fixed: int, broken: int) -> float:
    """Two-sided exact p-value that as many questions were fixed as broken but for chance."""
    changed = fixed + broken
    tail = ways = 1
    for i in range(min(fixed, broken)):
        ways = ways * (changed - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << changed))


def paired_interval(fixed: int, broken: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two proportions over the same n questions (Bonett and Price, 2012)."""
    up, down = (fixed + 1) / (n + 2), (broken + 1) / (n + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def benchmarks(data: ReportData) -> list[str]:
    """Names of the benchmarks, in the order in which they were met."""
    return list(dict.fromkeys(sample.benchmark for samples in data.evaluations.values() for sample in samples))


def scores(data: ReportData) -> list[Score]:
    """One for each benchmark and model that has outputs on it, benchmark by benchmark."""
    return [
        score(model, benchmark, chosen)
        for benchmark in benchmarks(data)
        for model, samples in data.evaluations.items()
        if (chosen := [sample for sample in samples if sample.benchmark == benchmark])
    ]


def score(model: str, benchmark: str, samples: Sequence[Sample]) -> Score:
    n, correct = len(samples), sum(sample.correct for sample in samples)
    low, high = wilson(correct, n)
    return Score(
        model=model,
        benchmark=benchmark,
        n=n,
        correct=correct,
        accuracy=correct / n,
        low=low,
        high=high,
        truncated=sum(sample.finish_reason in UNFINISHED for sample in samples),
        unparsed=sum(sample.answer_source == "none" for sample in samples),
        ungraded=sum(bool(sample.grade_error) for sample in samples),
        refused=sum(sample.finish_reason not in {"stop", *UNFINISHED} for sample in samples),
        mean_tokens=sum(sample.tokens for sample in samples) / n,
    )


def comparisons(data: ReportData, base: str = "base") -> list[Comparison]:
    """Every trained model against the base, on the questions that both have outputs for."""
    found = []
    for model in data.evaluations:
        groups: dict[str, list[tuple[Sample, Sample]]] = {}
        for pair in paired(data, base, model) if model != base else ():
            groups.setdefault(pair[0].benchmark, []).append(pair)
        found += [compare(name, base, model, groups[name]) for name in benchmarks(data) if name in groups]
    return found


def compare(benchmark: str, base: str, trained: str, pairs: Sequence[tuple[Sample, Sample]]) -> Comparison:
    cells = Counter((before.correct, after.correct) for before, after in pairs)
    n, fixed, broken = len(pairs), cells[False, True], cells[True, False]
    low, high = paired_interval(fixed, broken, n)
    return Comparison(
        benchmark=benchmark,
        base=base,
        trained=trained,
        n=n,
        both=cells[True, True],
        neither=cells[False, False],
        fixed=fixed,
        broken=broken,
        p=mcnemar(fixed, broken),
        difference=(fixed - broken) / n,
        low=low,
        high=high,
    )


def paired(data: ReportData, base: str, trained: str) -> list[tuple[Sample, Sample]]:
    """Outputs of both models on the same questions, in the order of the questions' keys."""
    before = {sample.key: sample for sample in data.evaluations.get(base, ())}
    after = {sample.key: sample for sample in data.evaluations.get(trained, ())}
    return [(before[key], after[key]) for key in sorted(before.keys() & after.keys())]


def changes(data: ReportData, base: str = "base", *, most: int = 6) -> list[Change]:
    """Questions that a training fixed or broke: at most `most` of each kind, benchmark and model."""
    found: list[Change] = []
    taken: Counter[tuple[str, str, str]] = Counter()
    for model in data.evaluations:
        for before, after in paired(data, base, model) if model != base else ():
            kind = "fixed" if after.correct else "broken"
            group = (before.benchmark, model, kind)
            if before.correct != after.correct and taken[group] < most:
                taken[group] += 1
                found.append(Change(benchmark=before.benchmark, trained=model, kind=kind, base=before, after=after))
    return sorted(found, key=lambda change: (change.trained, change.benchmark, change.kind == "broken"))


def moving_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value and its neighbours, up to `reach` of them on either side."""
    sums = [0.0, *itertools.accumulate(values)]
    edges = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in edges]


def thinned(steps: Sequence[T], most: int) -> list[T]:
    """At most about `most` steps, evenly spaced, the last one among them."""
    stride = math.ceil(len(steps) / most) or 1
    return [step for i, step in enumerate(steps) if i % stride == 0 or i == len(steps) - 1]


def validations(steps: Sequence[Step]) -> list[Step]:
    """The steps after which a finite validation loss was measured."""
    return [step for step in steps if step.validation_loss is not None and math.isfinite(step.validation_loss)]


def best_step(steps: Sequence[Step]) -> Step | None:
    """The step of the least validation loss, the earliest of equals."""
    return min(validations(steps), key=lambda step: step.validation_loss or 0.0, default=None)


def figures(data: ReportData) -> dict[str, Any]:
    """Every figure on the page, as JSON values: the content of `report.json`."""
    return {
        "run": data.run.model_dump(by_alias=True),
        "spec": data.spec,
        "models": models(data),
        "stages": [{**stage.model_dump(by_alias=True, mode="json"), "seconds": stage.seconds} for stage in data.stages],
        "training": {
            stage: [step.model_dump(by_alias=True) for step in steps] for stage, steps in data.training.items()
        },
        "best": {
            stage: best.model_dump(by_alias=True)
            for stage, steps in data.training.items()
            if (best := best_step(steps))
        },
        "scores": [score.model_dump(by_alias=True) for score in scores(data)],
        "comparisons": [{**c.model_dump(by_alias=True), "outcome": c.outcome} for c in comparisons(data)],
        "quadruples": data.quadruples.model_dump(by_alias=True, exclude={"shown"}) if data.quadruples else None,
    }


def models(data: ReportData) -> dict[str, str]:
    """Who answered and who taught, by name, as far as the finished stages tell."""
    found: dict[str, str] = {}
    for stage, who in (("answer", "student"), ("critique", "teacher")):
        for record in data.stages:
            name = record.inputs.get("model", {}).get("name") if record.name == stage else None
            if name:
                found[who] = str(name)
    return found


def finite_or_none(value: Any) -> Any:
    """The same JSON value with NaN and infinities as null, which JSON and the page can carry."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return value


def total_of(records: Iterable[StageRecord], name: str) -> float:
    """Sum of one of the facts over the stages that have it."""
    return math.fsum(getattr(record.facts, name) for record in records if record.facts)


def gpu_hours(stages: Sequence[StageRecord]) -> dict[str, float]:
    """GPU-hours of the stages that ran on GPUs: from the start of a stage to its promise, times its GPUs.

    A run is on GPUs when one of its engines says so; a training does not tell. Refinements that came while critiques
    were still being written are those of a fused teacher: only what was left after the critiques is counted for them.
    Nothing is told of a stage that found everything done by an earlier attempt and started no engine.
    """
    devices = {stage.settings["device"] for stage in stages if "device" in stage.settings}
    if not devices - {"cpu"}:
        return {}
    critique = next((stage for stage in stages if stage.name == "critique" and stage.seconds is not None), None)
    hours = {}
    for stage in stages:
        count, seconds = gpus(stage), stage.seconds
        if not count or seconds is None:
            continue
        if stage.name == "refine" and critique and at(critique.completed) > at(stage.started):
            seconds = max(0.0, at(stage.completed) - at(critique.completed))
        hours[stage.name] = count * seconds / 3600
    return hours


def gpus(stage: StageRecord) -> int:
    """GPUs of all pods of a stage, if it ran on GPUs; 0 where its settings name none."""
    given = stage.settings
    if stage.name.startswith("train-"):
        return int(given.get("workers", 0) * given.get("processes", 0))
    return int(given.get("tensorParallel", 0) * given.get("shards", 1))
