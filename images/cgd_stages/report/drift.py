"""Whether a training that moved mathematics has moved what else a model can do: the form of its answers first. Pure.

IFEval asks for answers in a given form and checks the form alone, so a model that has come to answer everything as it
answers mathematics loses there. A loss is called drift when the exact test of its pairs says so; otherwise the prompts
that were asked cannot show any.
"""

from collections.abc import Mapping, Sequence

from cgd_stages.results.comparison import Difference, Table, lm_eval_tasks, table_of
from cgd_stages.results.formatting import count, points, probability
from cgd_stages.results.model import ReportData
from cgd_stages.results.scores import NOISE, RIVALS, Comparison, comparisons

IFEVAL = ("ifeval", "leaderboard_ifeval", "leaderboard_instruction_following")
"""Tasks of lm-eval, and a group of one, that are IFEval; strict or loose is their metric."""

Sentence = dict[str, str]
"""`outcome` (better, worse or noise), `claim` and `detail`."""


def drifts(data: ReportData, named: Mapping[str, str]) -> list[Sentence]:
    """A sentence for each trained model that answered IFEval and mathematics as the base did, and one for all other
    tasks of lm-eval; `named`: how models are written. None where a run has no such tasks beside mathematics."""
    tasks, table = lm_eval_tasks(data), table_of(data)
    gained = {line.model: line.mean.difference for line in table.lines if line.mean and line.mean.difference}
    found = [one for one in comparisons(data) if one.benchmark in tasks and one.trained not in RIVALS]
    found = [one for one in found if one.trained in gained]
    form = [one for one in found if tasks[one.benchmark] in IFEVAL]
    other = [one for one in found if tasks[one.benchmark] not in IFEVAL]
    sentences = [
        _form(own, gained[model], table, who)
        for model, who in named.items()
        if (own := [one for one in form if one.trained == model])
    ]
    return sentences + ([_others(other, named, beside=bool(form))] if other else [])


def _form(found: Sequence[Comparison], gained: Difference, table: Table, who: str) -> Sentence:
    """Of one model: how mathematics and every metric of IFEval moved against the base."""
    (first, *more) = table.averaged
    mathematics = f"the mean of {len(table.averaged)} benchmarks" if more else first
    moved = [f"{mathematics} {points(gained.value)}", *(f"{one.benchmark} {points(one.difference)}" for one in found)]
    told = [f"{mathematics} {_interval(gained.low, gained.high)}"]
    told += [f"{one.benchmark} {_interval(one.low, one.high)} ({probability(one.p)}): {_judged(one)}" for one in found]
    outcomes = {one.outcome for one in found}
    outcome = next((one for one in ("worse", "better") if one in outcomes), "noise")
    detail = f"95 % intervals: {'; '.join(told)}"
    drifted = ", and the format drifted" if outcome == "worse" else ""
    claim = f"{who} against base, in points: {', '.join(moved)}{drifted}"
    return {"outcome": outcome, "claim": claim, "detail": detail}


def _judged(one: Comparison) -> str:
    if one.outcome == "worse":
        return "the format drifted"
    return f"no drift that {count(one.n)} {'prompt' if one.n == 1 else 'prompts'} can show"


def _others(found: Sequence[Comparison], named: Mapping[str, str], *, beside: bool) -> Sentence:
    """Of all models: which of the other general tasks moved more than chance explains."""
    tasks = list(dict.fromkeys(one.benchmark for one in found))
    moved = [one for one in found if one.outcome != "noise"]
    told = [
        f"{named[one.trained]} {one.outcome} on {one.benchmark} ({points(one.difference)} points, {probability(one.p)})"
        for one in moved
    ]
    if len(moved) < len(found):
        told.append(f"{len(found) - len(moved)} of {len(found)} differences within noise (p < {NOISE} each)")
    outcomes = {one.outcome for one in moved}
    return {
        "outcome": next((one for one in ("worse", "better") if one in outcomes), "noise"),
        "claim": f"{'Other general' if beside else 'General'} tasks: {', '.join(tasks)}",
        "detail": "; ".join(told),
    }


def _interval(low: float, high: float) -> str:
    return f"{points(low)} to {points(high)}"
