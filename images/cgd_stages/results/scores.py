"""What the report says: every figure that is computed from what was read of a run. Pure.

A question may have several outputs; it counts once, with the share of them that is right. Which interval and which test
goes with how many outputs is told in `stats`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

from cgd_stages.contract import Contract
from cgd_stages.results import statistics
from cgd_stages.results.model import Evaluations, ReportData, Sample, StageRecord, Step, at

T = TypeVar("T")
NOISE = 0.05
"""A p-value from here on is called noise."""
RIVALS = ("selfrefine", "reflexion")
"""Labels of what is no trained model but the base with more passes at inference."""
EXAMPLES = 60
"""Fixed and broken questions that the page carries, about."""
UNFINISHED = ("length", "repetition")
"""Finish reasons of an output without an end."""
Pair = tuple[Sample, Sample]
"""Outputs of two models on the same question."""


class PassAt(Contract):
    """Chance that at least one of k outputs is right: the mean over the questions of the unbiased estimate."""

    k: int
    share: float
    low: float
    high: float
    tokens: float
    """What k outputs cost: generated tokens, on average over all outputs."""


class Score(Contract):
    """One model on one benchmark. Shares are fractions of 1."""

    model: str
    benchmark: str
    n: int
    """Questions."""
    samples: int
    """Outputs of a question; of unequal numbers the smallest."""
    outputs: int
    """Of all questions together."""
    correct: int
    accuracy: float
    """Mean over the questions of the share of right outputs."""
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
    median_tokens: float
    p90_tokens: float
    """Nine of ten outputs are at most as long."""
    pass_at: tuple[PassAt, ...]
    """For k of 1, 2, 4, ... and `samples`."""


class Comparison(Contract):
    """Two models on the same questions. `difference` is trained minus base, a fraction of 1.

    Every question is one of four: solved more often than before (fixed), less often (broken), or as often, in at least
    half of its outputs (both) or in fewer (neither).
    """

    benchmark: str
    base: str
    trained: str
    n: int
    """Questions that both have outputs for."""
    samples: int
    """Outputs of each on a question; of unequal numbers the smallest."""
    before: float
    """Accuracy of the base on these questions."""
    after: float
    both: int
    neither: int
    fixed: int
    broken: int
    p: float
    difference: float
    low: float
    high: float
    token_ratio: float | None
    """Mean tokens that the trained model spends on an output over those of the base; None where it spends none."""

    @property
    def outcome(self) -> str:
        """better, worse or noise."""
        if self.p >= NOISE:
            return "noise"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Changed:
    """A question that training fixed or broke: the first pair of outputs that shows it."""

    trained: str
    kind: str
    """fixed or broken."""
    base: Sample
    after: Sample


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


def score(model: str, benchmark: str, outputs: Sequence[Sample]) -> Score:
    groups = by_question(outputs)
    tries = [(len(group), sum(one.correct for one in group)) for group in groups]
    samples, correct = min(n for n, _ in tries), sum(right for _, right in tries)
    mean_tokens = sum(one.tokens for one in outputs) / len(outputs)
    ladder = tuple(pass_at(k, tries, k * mean_tokens) for k in ks(samples))
    return Score(
        model=model,
        benchmark=benchmark,
        n=len(tries),
        samples=samples,
        outputs=len(outputs),
        correct=correct,
        accuracy=ladder[0].share,
        low=ladder[0].low,
        high=ladder[0].high,
        truncated=sum(one.finish_reason in UNFINISHED for one in outputs),
        unparsed=sum(one.answer_source == "none" for one in outputs),
        ungraded=sum(bool(one.grade_error) for one in outputs),
        refused=sum(any(one.finish_reason not in {"stop", *UNFINISHED} for one in group) for group in groups),
        mean_tokens=mean_tokens,
        median_tokens=median(one.tokens for one in outputs),
        p90_tokens=quantile([one.tokens for one in outputs], 0.9),
        pass_at=ladder,
    )


def pass_at(k: int, tries: Sequence[tuple[int, int]], tokens: float) -> PassAt:
    """Of questions as (outputs, right ones), each with at least k outputs."""
    shares = [statistics.pass_at_k(n, right, k) for n, right in tries]
    single = all(n == 1 for n, _ in tries)
    low, high = statistics.wilson(math.fsum(shares), len(shares)) if single else statistics.share_interval(shares)
    return PassAt(k=k, share=math.fsum(shares) / len(shares), low=low, high=high, tokens=tokens)


def ks(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    return sorted({1 << power for power in range(samples.bit_length())} | {samples})


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def by_question(outputs: Iterable[Sample]) -> list[list[Sample]]:
    """The outputs of each question together, in the order in which the questions were met."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for output in outputs:
        groups.setdefault(output.question, []).append(output)
    return list(groups.values())


def comparisons(data: ReportData, base: str = "base") -> list[Comparison]:
    """Every trained model against the base, on the questions that both have outputs for."""
    found = []
    for model in data.evaluations:
        groups: dict[str, list[list[Pair]]] = {}
        for pairs in paired(data.evaluations, base, model) if model != base else ():
            groups.setdefault(pairs[0][0].benchmark, []).append(pairs)
        found += [compare(name, base, model, groups[name]) for name in benchmarks(data) if name in groups]
    return found


def compare(benchmark: str, base: str, trained: str, questions: Sequence[Sequence[Pair]]) -> Comparison:
    """Two models by the pairs of their outputs on each question."""
    rights = [(sum(one.correct for one, _ in pairs), sum(one.correct for _, one in pairs)) for pairs in questions]
    gains = [after - before for before, after in rights]
    counts = [len(pairs) for pairs in questions]
    n, fixed, broken = len(questions), sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    both = sum(after == before and 2 * before >= of for (before, after), of in zip(rights, counts, strict=True))
    shares = [gain / of for gain, of in zip(gains, counts, strict=True)]
    single = max(counts) == 1
    low, high = statistics.paired_interval(fixed, broken, n) if single else statistics.difference_interval(shares)
    tokens = [sum(pair[which].tokens for pairs in questions for pair in pairs) for which in (0, 1)]
    return Comparison(
        benchmark=benchmark,
        base=base,
        trained=trained,
        n=n,
        samples=min(counts),
        before=math.fsum(before / of for (before, _), of in zip(rights, counts, strict=True)) / n,
        after=math.fsum(after / of for (_, after), of in zip(rights, counts, strict=True)) / n,
        both=both,
        neither=n - both - fixed - broken,
        fixed=fixed,
        broken=broken,
        p=statistics.sign_flip(gains),
        difference=math.fsum(shares) / n,
        low=low,
        high=high,
        token_ratio=tokens[1] / tokens[0] if tokens[0] else None,
    )


def paired(evaluations: Evaluations, base: str, trained: str) -> list[list[Pair]]:
    """For each question that both models answered, in the order of their keys, the pairs of outputs."""
    before = {sample.key: sample for sample in evaluations.get(base, ())}
    after = {sample.key: sample for sample in evaluations.get(trained, ())}
    keys = sorted(before.keys() & after.keys())
    return [
        [(before[key], after[key]) for key in group]
        for _, group in itertools.groupby(keys, key=lambda key: before[key].question)
    ]


def changed(evaluations: Evaluations, base: str = "base", *, most: int | None = None) -> list[Changed]:
    """Questions that a training fixed or broke: at most `most` of each kind, benchmark and model; without it as many as
    make about `EXAMPLES` of all."""
    pairings = {model: paired(evaluations, base, model) for model in evaluations if model not in (base, *RIVALS)}
    if most is None:
        groups = {(model, pairs[0][0].benchmark) for model, questions in pairings.items() for pairs in questions}
        most = max(1, min(6, EXAMPLES // (2 * len(groups) or 1)))
    found: list[Changed] = []
    taken: Counter[tuple[str, str, str]] = Counter()
    for model, questions in pairings.items():
        for pairs in questions:
            gain = sum(after.correct - before.correct for before, after in pairs)
            kind = "fixed" if gain > 0 else "broken"
            group = (pairs[0][0].benchmark, model, kind)
            if gain and taken[group] < most:
                taken[group] += 1
                before, after = next(pair for pair in pairs if (pair[1].correct - pair[0].correct) * gain > 0)
                found.append(Changed(trained=model, kind=kind, base=before, after=after))
    return sorted(found, key=lambda one: (one.trained, one.base.benchmark, one.kind == "broken"))


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
    hours: dict[str, float] = {}
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
    if stage.name.kind == "train":
        return int(given.get("workers", 0) * given.get("processes", 0))
    return int(given.get("tensorParallel", 0) * given.get("shards", 1))
