"""Whether a training on mathematics has changed a model's other abilities, above all the form of its answers. Pure.

IFEval asks for answers in a given form and checks only the form. A model that now answers every prompt as if it were
mathematics scores lower there. A loss is called drift when the exact test of its pairs finds it; without that, the
report says that these prompts show no drift.
"""

from collections.abc import Mapping, Sequence

from cgd_stages.results.comparison import Difference, Table, lm_eval_tasks
from cgd_stages.results.formatting import count, points, probability
from cgd_stages.results.model import ReportData
from cgd_stages.results.scores import NOISE, RIVALS, Comparison, comparisons

IFEVAL = ("ifeval", "leaderboard_ifeval", "leaderboard_instruction_following")
"""The tasks of lm-eval, and a group, that are IFEval. Their metrics are strict or loose."""

Sentence = dict[str, str]
"""`outcome` (better, worse or noise), `claim` and `detail`."""


def drifts(data: ReportData, names: Mapping[str, str], table: Table) -> list[Sentence]:
    """A sentence for each trained model that answered IFEval and mathematics, as the base did, and one for all other
    tasks of lm-eval. `names`: how sentences name the models; `table`: the run's.
    Empty where a run has no such tasks beside mathematics."""
    tasks = lm_eval_tasks(data)
    gains = {line.model: line.mean.difference for line in table.lines if line.mean and line.mean.difference}
    compared = [
        pair for pair in comparisons(data)
        if pair.benchmark in tasks and pair.trained not in RIVALS and pair.trained in gains
    ]  # fmt: skip
    form = [pair for pair in compared if tasks[pair.benchmark] in IFEVAL]
    other = [pair for pair in compared if tasks[pair.benchmark] not in IFEVAL]
    sentences = [
        _form(pairs, gains[model], table, name)
        for model, name in names.items()
        if (pairs := [pair for pair in form if pair.trained == model])
    ]
    return sentences + ([_others(other, names, beside=bool(form))] if other else [])


def _form(pairs: Sequence[Comparison], gain: Difference, table: Table, name: str) -> Sentence:
    """How mathematics and every metric of IFEval moved against the base, for one model."""
    (first, *more) = table.averaged
    mathematics = f"the mean of {len(table.averaged)} benchmarks" if more else first
    moved, intervals = [f"{mathematics} {points(gain.value)}"], [f"{mathematics} {_interval(gain.low, gain.high)}"]
    for pair in pairs:
        prompts = f"{count(pair.n)} {'prompt' if pair.n == 1 else 'prompts'}"
        judgement = "the format drifted" if pair.outcome == "worse" else f"no drift that {prompts} can show"
        interval = f"{_interval(pair.low, pair.high)} ({probability(pair.p)})"
        moved.append(f"{pair.benchmark} {points(pair.difference)}")
        intervals.append(f"{pair.benchmark} {interval}: {judgement}")
    outcomes = {pair.outcome for pair in pairs}
    outcome = next((outcome for outcome in ("worse", "better") if outcome in outcomes), "noise")
    drifted = ", and the format drifted" if outcome == "worse" else ""
    claim = f"{name} against base, in points: {', '.join(moved)}{drifted}"
    return {"outcome": outcome, "claim": claim, "detail": f"95 % intervals: {'; '.join(intervals)}"}


def _others(pairs: Sequence[Comparison], names: Mapping[str, str], *, beside: bool) -> Sentence:
    """Which models moved on which of the other general tasks, by more than chance explains."""
    tasks = list(dict.fromkeys(pair.benchmark for pair in pairs))
    moved = [pair for pair in pairs if pair.outcome != "noise"]
    details = [
        f"{names[pair.trained]} {pair.outcome} on {pair.benchmark} "
        f"({points(pair.difference)} points, {probability(pair.p)})"
        for pair in moved
    ]
    if len(moved) < len(pairs):
        details.append(f"{len(pairs) - len(moved)} of {len(pairs)} differences within noise (p < {NOISE} each)")
    outcomes = {pair.outcome for pair in moved}
    return {
        "outcome": next((outcome for outcome in ("worse", "better") if outcome in outcomes), "noise"),
        "claim": f"{'Other general' if beside else 'General'} tasks: {', '.join(tasks)}",
        "detail": "; ".join(details),
    }


def _interval(low: float, high: float) -> str:
    return f"{points(low)} to {points(high)}"
