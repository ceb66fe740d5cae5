"""The figures of the report, computed from the values that were read of a run. Pure.

A question with several outputs counts once, with the share of its outputs that is right. `statistics` explains which
interval and which test belong to the number of outputs.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, TypeVar

from cgd_stages.contract import Contract
from cgd_stages.results import statistics
from cgd_stages.results.model import UNFINISHED_THOUGHT, Evaluations, ReportData, Sample, StageRecord, Step, at

T = TypeVar("T")
NOISE = 0.05
"""A difference with a p-value of this or more is noise."""
RIVALS = ("selfrefine", "reflexion", "majority", "bestofn")
"""The labels of rivals: the base model with more passes at inference, not a trained model."""
EXAMPLES = 60
"""About the number of fixed and broken questions on the page."""
UNFINISHED = ("length", "repetition")
"""The finish reasons of an output without an end."""
UNPARSED = ("none", UNFINISHED_THOUGHT)
"""The answer sources of an output without an answer."""
Pair = tuple[Sample, Sample]
"""The outputs of two models on the same question."""
Outcome = Literal["better", "worse", "noise"]


class PassAt(Contract):
    """The chance that at least one of k outputs is right: the mean over the questions of the unbiased estimate."""

    k: int
    share: float
    low: float
    high: float
    tokens: float
    """The generated tokens of k outputs, at the mean of all outputs."""


class Score(Contract):
    """The results of a model on a benchmark. Shares are fractions of 1."""

    model: str
    benchmark: str
    n: int
    """Questions."""
    samples: int
    """Outputs for each question; the smallest number if they differ."""
    outputs: int
    """Outputs for all questions together."""
    correct: int
    accuracy: float
    """The mean over the questions of the share of right outputs."""
    low: float
    high: float
    truncated: int
    """Outputs without an end; they are graded by their text, and most are wrong."""
    unparsed: int
    """Outputs without an answer."""
    unfinished: int
    """Those of them whose thought never ended."""
    ungraded: int
    """Outputs that the grader could not decide on (time-outs and errors): they count as not correct."""
    refused: int
    """Questions without an answer: too long for the context, or refused by the engine."""
    mean_tokens: float
    median_tokens: float
    p90_tokens: float
    """Nine of ten outputs have at most so many tokens."""
    pass_at: tuple[PassAt, ...]
    """For k of 1, 2, 4, ... and `samples`."""


class CleanScore(Contract):
    """The results of a model on a benchmark, with the questions that training has met in other words and without."""

    model: str
    benchmark: str
    paraphrased: int
    """Questions that training has met."""
    n: int
    accuracy: float
    low: float
    high: float
    clean_n: int
    """The other questions."""
    clean_accuracy: float | None
    """On these; None if there are none, as the interval."""
    clean_low: float | None
    clean_high: float | None


class Comparison(Contract):
    """Two models on the same questions. `difference` is trained minus base, a fraction of 1.

    A question is solved more often than before (fixed), less often (broken), or as often: in at least half of its
    outputs (both) or in fewer (neither).
    """

    benchmark: str
    base: str
    trained: str
    n: int
    """Questions for which both models have outputs."""
    samples: int
    """Outputs of each model for a question; the smallest number if they differ."""
    before: float
    """The base's accuracy on these questions."""
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
    """The mean tokens of the trained model's outputs, divided by the base's; None if the base's have no tokens."""

    @property
    def outcome(self) -> Outcome:
        if self.p >= NOISE:
            return "noise"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Changed:
    """A question that training fixed or broke, with the first pair of outputs that shows it."""

    trained: str
    kind: str
    """fixed or broken."""
    base: Sample
    after: Sample


def benchmarks(data: ReportData) -> list[str]:
    """The names of the benchmarks, in the order of the outputs."""
    return list(dict.fromkeys(sample.benchmark for samples in data.evaluations.values() for sample in samples))


def scores(data: ReportData) -> list[Score]:
    """The score of each model on each benchmark for which it has outputs, benchmark by benchmark."""
    return [
        score(model, benchmark, outputs)
        for benchmark in benchmarks(data)
        for model, samples in data.evaluations.items()
        if (outputs := [sample for sample in samples if sample.benchmark == benchmark])
    ]


def clean_scores(data: ReportData) -> list[CleanScore]:
    """The scores with and without the questions that training has met; none where such rows were removed, and none of
    benchmarks that were not compared with the rows."""
    decontamination = data.decontamination
    if decontamination is None or decontamination.paraphrases == "remove":
        return []
    compared = set(decontamination.compared) - decontamination.unchecked.keys()
    met = {(question.benchmark, question.question) for question in decontamination.questions}
    results = []
    for full in (one for one in scores(data) if one.benchmark in compared):
        outputs = [sample for sample in data.evaluations[full.model] if sample.benchmark == full.benchmark]
        clean = [sample for sample in outputs if sample.question not in met]
        rest = score(full.model, full.benchmark, clean) if clean else None
        results.append(
            CleanScore(
                model=full.model,
                benchmark=full.benchmark,
                paraphrased=full.n - (rest.n if rest else 0),
                n=full.n,
                accuracy=full.accuracy,
                low=full.low,
                high=full.high,
                clean_n=rest.n if rest else 0,
                clean_accuracy=rest and rest.accuracy,
                clean_low=rest and rest.low,
                clean_high=rest and rest.high,
            )
        )
    return results


def uncompared(data: ReportData) -> dict[str, str]:
    """The benchmarks with scores whose questions were not compared with what training learns, and why."""
    if data.decontamination is None:
        return {}
    known = data.decontamination.compared
    named = {name: "prompts.decontaminate.against does not name it" for name in benchmarks(data) if name not in known}
    return dict(data.decontamination.unchecked) | named


def score(model: str, benchmark: str, outputs: Sequence[Sample]) -> Score:
    questions: dict[str, list[Sample]] = {}
    for output in outputs:
        questions.setdefault(output.id, []).append(output)
    tries = [(len(group), sum(output.correct for output in group)) for group in questions.values()]
    samples, correct = min(n for n, _ in tries), sum(right for _, right in tries)
    mean_tokens = sum(output.tokens for output in outputs) / len(outputs)
    ladder = []
    for k in sorted({1 << power for power in range(samples.bit_length())} | {samples}):
        shares = [statistics.pass_at_k(n, right, k) for n, right in tries]
        total, single = math.fsum(shares), all(n == 1 for n, _ in tries)
        low, high = statistics.wilson(total, len(shares)) if single else statistics.share_interval(shares)
        ladder.append(PassAt(k=k, share=total / len(shares), low=low, high=high, tokens=k * mean_tokens))
    tokens = sorted(output.tokens for output in outputs)
    finished = {"stop", *UNFINISHED}
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
        truncated=sum(output.finish_reason in UNFINISHED for output in outputs),
        unparsed=sum(output.answer_source in UNPARSED for output in outputs),
        unfinished=sum(output.answer_source == UNFINISHED_THOUGHT for output in outputs),
        ungraded=sum(bool(output.grade_error) for output in outputs),
        refused=len({output.id for output in outputs if output.finish_reason not in finished}),
        mean_tokens=mean_tokens,
        median_tokens=median(tokens),
        p90_tokens=tokens[math.ceil(0.9 * len(tokens)) - 1],
        pass_at=tuple(ladder),
    )


def comparisons(data: ReportData, base: str = "base") -> list[Comparison]:
    """Compares every other model with the base, on the questions for which both have outputs."""
    results = []
    for model in data.evaluations:
        groups: dict[str, list[list[Pair]]] = {}
        for pairs in paired(data.evaluations, base, model) if model != base else ():
            groups.setdefault(pairs[0][0].benchmark, []).append(pairs)
        results += [compare(name, base, model, groups[name]) for name in benchmarks(data) if name in groups]
    return results


def compare(benchmark: str, base: str, trained: str, questions: Sequence[Sequence[Pair]]) -> Comparison:
    """Compares two models by the pairs of their outputs for each question."""
    counts = [len(pairs) for pairs in questions]
    befores = [sum(before.correct for before, _ in pairs) for pairs in questions]
    afters = [sum(after.correct for _, after in pairs) for pairs in questions]
    gains = [after - before for before, after in zip(befores, afters, strict=True)]
    n, fixed, broken = len(questions), sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    both = sum(gain == 0 and 2 * right >= count for gain, right, count in zip(gains, befores, counts, strict=True))
    shares = [gain / count for gain, count in zip(gains, counts, strict=True)]
    single = max(counts) == 1
    low, high = statistics.paired_interval(fixed, broken, n) if single else statistics.difference_interval(shares)
    base_tokens = sum(before.tokens for pairs in questions for before, _ in pairs)
    trained_tokens = sum(after.tokens for pairs in questions for _, after in pairs)
    return Comparison(
        benchmark=benchmark,
        base=base,
        trained=trained,
        n=n,
        samples=min(counts),
        before=math.fsum(right / count for right, count in zip(befores, counts, strict=True)) / n,
        after=math.fsum(right / count for right, count in zip(afters, counts, strict=True)) / n,
        both=both,
        neither=n - both - fixed - broken,
        fixed=fixed,
        broken=broken,
        p=statistics.sign_flip(gains),
        difference=math.fsum(shares) / n,
        low=low,
        high=high,
        token_ratio=trained_tokens / base_tokens if base_tokens else None,
    )


def paired(evaluations: Evaluations, base: str, trained: str) -> list[list[Pair]]:
    """The pairs of outputs for each question that both models answered, in the order of the keys."""
    before = {sample.key: sample for sample in evaluations.get(base, ())}
    after = {sample.key: sample for sample in evaluations.get(trained, ())}
    keys = sorted(before.keys() & after.keys())
    return [
        [(before[key], after[key]) for key in group]
        for _, group in itertools.groupby(keys, key=lambda key: before[key].question)
    ]


def changed(evaluations: Evaluations, base: str = "base", *, most: int | None = None) -> list[Changed]:
    """The questions that a training fixed or broke: at most `most` of each kind, benchmark and model. By default,
    `most` leads to about `EXAMPLES` questions in all."""
    pairings = {model: paired(evaluations, base, model) for model in evaluations if model not in (base, *RIVALS)}
    if most is None:
        groups = {(model, pairs[0][0].benchmark) for model, questions in pairings.items() for pairs in questions}
        most = max(1, min(6, EXAMPLES // (2 * len(groups) or 1)))
    examples: list[Changed] = []
    counts: Counter[tuple[str, str, str]] = Counter()
    for model, questions in pairings.items():
        for pairs in questions:
            gain = sum(after.correct - before.correct for before, after in pairs)
            kind = "fixed" if gain > 0 else "broken"
            group = (pairs[0][0].benchmark, model, kind)
            if gain and counts[group] < most:
                counts[group] += 1
                before, after = next(pair for pair in pairs if (pair[1].correct - pair[0].correct) * gain > 0)
                examples.append(Changed(trained=model, kind=kind, base=before, after=after))
    return sorted(examples, key=lambda example: (example.trained, example.base.benchmark, example.kind == "broken"))


def moving_mean(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and its neighbours, up to `reach` of them on either side."""
    sums = [0.0, *itertools.accumulate(values)]
    edges = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in edges]


def thinned(steps: Sequence[T], most: int) -> list[T]:
    """About `most` steps or fewer, evenly spaced, with the last step."""
    stride = math.ceil(len(steps) / most) or 1
    return [step for i, step in enumerate(steps) if i % stride == 0 or i == len(steps) - 1]


def exported_step(stage: StageRecord, steps: Sequence[Step]) -> Step | None:
    """The step whose model a training has exported; None while it has not ended."""
    number = stage.facts and stage.facts.metrics.get("exported_step")
    return next((step for step in steps if step.step == number), None)


def figures(data: ReportData) -> dict[str, Any]:
    """Every figure on the page, as the JSON values of `report.json`."""
    return {
        "run": data.run.model_dump(by_alias=True),
        "spec": data.spec,
        "models": models(data),
        "stages": [{**stage.model_dump(by_alias=True, mode="json"), "seconds": stage.seconds} for stage in data.stages],
        "training": {
            stage: [step.model_dump(by_alias=True) for step in steps] for stage, steps in data.training.items()
        },
        "exported": {
            stage.name: exported.model_dump(by_alias=True)
            for stage in data.stages
            if (exported := exported_step(stage, data.training.get(stage.name, ())))
        },
        "scores": [score.model_dump(by_alias=True) for score in scores(data)],
        "comparisons": [
            {**comparison.model_dump(by_alias=True), "outcome": comparison.outcome} for comparison in comparisons(data)
        ],
        "decontamination": data.decontamination
        and data.decontamination.model_dump(by_alias=True)
        | {
            "scores": [score.model_dump(by_alias=True) for score in clean_scores(data)],
            "uncompared": uncompared(data),
        },
        "audit": data.audit and data.audit.model_dump(by_alias=True),
        "quadruples": data.quadruples.model_dump(by_alias=True, exclude={"shown"}) if data.quadruples else None,
    }


def models(data: ReportData) -> dict[str, str]:
    """The names of the student and the teacher, if a finished stage has them in its inputs."""
    who = {"answer": "student", "critique": "teacher"}
    names = {who[stage.name]: stage.inputs.get("model", {}).get("name") for stage in data.stages if stage.name in who}
    return {role: str(names[role]) for role in who.values() if names.get(role)}


def finite_or_none(value: Any) -> Any:
    """The JSON value with null for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return value


def total_of(records: Iterable[StageRecord], name: str) -> float:
    """The sum of a field of the facts over all stages with facts."""
    return math.fsum(getattr(record.facts, name) for record in records if record.facts)


def gpu_hours(stages: Sequence[StageRecord]) -> dict[str, float]:
    """The GPU-hours of the stages that ran on GPUs: the time from a stage's start to its promise, times its GPUs.

    A run uses GPUs if the settings of an engine say so; those of a training do not. A fused teacher writes refinements
    and critiques at the same time: the time after the last critique counts for the refinements. The same holds of
    miscritiques and what is refined from them. A stage that started
    no engine, because an earlier attempt had done all its work, has no entry.
    """
    devices = {stage.settings["device"] for stage in stages if "device" in stage.settings}
    if not devices - {"cpu"}:
        return {}
    ended: dict[str, float] = {stage.name: at(stage.completed) for stage in stages if stage.seconds is not None}
    hours: dict[str, float] = {}
    for stage in stages:
        count, seconds = gpus(stage), stage.seconds
        if not count or seconds is None:
            continue
        before = ended.get({"refine": "critique", "misrefine": "miscritique"}.get(stage.name, ""), 0.0)
        if before > at(stage.started):
            seconds = max(0.0, at(stage.completed) - before)
        hours[stage.name] = count * seconds / 3600
    return hours


def gpus(stage: StageRecord) -> int:
    """The GPUs of all pods of a stage that ran on GPUs; 0 if its settings name none."""
    settings = stage.settings
    if stage.name.kind == "train":
        return int(settings.get("workers", 0) * settings.get("processes", 0))
    return int(settings.get("tensorParallel", 0) * settings.get("shards", 1))
