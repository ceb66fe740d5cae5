"""Trained models against each other: the headline, and the rows of a table. Pure.

A sentence claims no more than the corrected test shows. Where two models cannot be told apart, it says which difference
would have shown.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cgd_stages.report.drift import Sentence
from cgd_stages.results.comparison import MEAN, Difference, Table
from cgd_stages.results.formatting import THIN, count, listed, percent, points, probability, spread
from cgd_stages.results.head_to_head import HeadToHead, Side
from cgd_stages.results.statistics import FLIPS, POWER

TESTS = {
    "mcnemar": "exact McNemar test",
    "signFlips": "exact sign-flip test over questions",
    "drawnFlips": f"sign-flip test over questions with {count(FLIPS)} drawn flips",
}
EACH = 3
"""The most pairs that get a sentence each; of more, each model gets one sentence."""


_Identity = tuple[str, str, tuple[str, ...]]
_Names = dict[_Identity, str]


@dataclass(frozen=True)
class Row:
    """Two models in all columns of a table."""

    one: str
    other: str
    cells: dict[str, HeadToHead]


def rows(pairs: Iterable[HeadToHead]) -> list[Row]:
    pairs = list(pairs)
    names = _names(pairs)
    found: dict[tuple[_Identity, _Identity], Row] = {}
    for pair in pairs:
        one, other = _identity(pair.one), _identity(pair.other)
        found.setdefault((one, other), Row(names[one], names[other], {})).cells[pair.column] = pair
    return list(found.values())


def headline(table: Table, pairs: Sequence[HeadToHead]) -> list[Sentence]:
    """A sentence for each pair, or for each first of pairs where there are more than `EACH`: on the mean of the
    benchmarks, or on each where the table has no mean."""
    columns = (MEAN,) if MEAN in table.columns else table.averaged or table.columns
    shown, names = [pair for pair in pairs if pair.column in columns], _names(pairs)
    if len(shown) <= EACH:
        return [_sentence(pair, _where(pair.column, table), names) for pair in shown]
    groups = itertools.groupby(shown, key=lambda pair: (pair.column, _identity(pair.one)))
    return [_summary(list(group), _where(column, table), names) for (column, _), group in groups]


def _where(column: str, table: Table) -> str:
    return f"in the mean of {len(table.averaged)} benchmarks" if column == MEAN else f"on {column}"


def _identity(side: Side) -> _Identity:
    return side.model, side.name, side.runs


def _names(pairs: Iterable[HeadToHead]) -> _Names:
    """How sentences and rows name the models: with their runs or labels where several have the same name."""
    sides = {_identity(side): side.name for pair in pairs for side in (pair.one, pair.other)}
    uses = list(sides.values())
    return {
        identity: f"{name} ({', '.join(identity[2]) or identity[0]})" if uses.count(name) > 1 else name
        for identity, name in sides.items()
    }


def _sentence(pair: HeadToHead, where: str, names: _Names) -> Sentence:
    one, other = names[_identity(pair.one)], names[_identity(pair.other)]
    gap = pair.difference
    if gap.outcome == "noise":
        claim = f"{one} and {other} cannot be told apart with {_questions(pair.n)} {where}"
        seen = f"{one} minus {other} {points(gap.value)} points ({_interval(gap)}), {tested(pair)}"
        detail = f"{seen}: {power(pair)}{_assumed(pair)}{_more(pair)}"
        return {"outcome": "noise", "claim": claim, "detail": detail}
    winner, loser, won, lost, low, high = one, other, pair.won, pair.lost, gap.low, gap.high
    if gap.outcome == "worse":
        winner, loser, won, lost, low, high = other, one, pair.lost, pair.won, -gap.high, -gap.low
    return {
        "outcome": gap.outcome,
        "claim": f"{winner} beats {loser} by {_plain(abs(gap.value))} points {where} "
        f"(95{THIN}% {_plain(low)} to {_plain(high)})",
        "detail": f"{_questions(pair.n)} in pairs, {count(won)} for {winner} and {count(lost)} for {loser}: "
        f"{tested(pair)}{_more(pair)}",
    }


def _summary(group: Sequence[HeadToHead], where: str, names: _Names) -> Sentence:
    """One model against several."""
    words = {"better": "beats", "worse": "is beaten by", "noise": "cannot be told apart from"}
    sorted_out = {
        outcome: [names[_identity(pair.other)] for pair in group if pair.difference.outcome == outcome]
        for outcome in words
    }
    claims = [f"{words[outcome]} {listed(others)}" for outcome, others in sorted_out.items() if others]
    details = [f"minus {names[_identity(pair.other)]} {_briefly(pair)}" for pair in group]
    corrected = f"; tests corrected for {len(group)} pairs (Holm)" if len(group) > 1 else ""
    one, fewest = names[_identity(group[0].one)], min(pair.n for pair in group)
    better, worse = bool(sorted_out["better"]), bool(sorted_out["worse"])
    return {
        "outcome": "better" if better and not worse else "worse" if worse and not better else "noise",
        "claim": f"{one} {', and '.join(claims)} {where} with {_questions(fewest)}",
        "detail": f"{one} {', '.join(details)}{corrected}",
    }


def _briefly(pair: HeadToHead) -> str:
    gap = pair.difference
    shown = f"; {in_brief(pair)}" if gap.outcome == "noise" else ""
    return f"{points(gap.value)} points ({_interval(gap)}{shown})"


def tested(pair: HeadToHead) -> str:
    """The test with its p-value, and the corrected p-value where there were several tests."""
    corrected = f", {probability(pair.corrected)} corrected for {pair.tests} pairs (Holm)" if pair.tests > 1 else ""
    return f"{TESTS[pair.test]} {probability(pair.p)}{corrected}"


def power(pair: HeadToHead) -> str:
    """What a pair within noise could have shown."""
    if pair.detectable is None:
        return "no difference could have shown with so few questions"
    return f"a difference of {_plain(pair.detectable)} points would have shown"


def in_brief(pair: HeadToHead) -> str:
    """The same for a cell of a table."""
    return "too few to show any" if pair.detectable is None else f"{_plain(pair.detectable)} would have shown"


def _assumed(pair: HeadToHead) -> str:
    """How the difference that would have shown was computed."""
    if pair.detectable is None:
        return ""
    if pair.test == "mcnemar":
        seen = f"where {percent((pair.won + pair.lost) / pair.n)} of the questions change sides as here"
    else:
        seen = "where the interval is as wide as here"
    return f" (in {100 * POWER:.0f}{THIN}% of cases, at level {pair.level:.3g}, {seen})"


def unpaired(runs: Sequence[str]) -> str:
    """Why the models of these runs are compared with no others, and what to do."""
    return (
        f"{listed(runs)}: the report is of an earlier version and does not say which questions were right, so the "
        "trained models are not compared with others. Apply the run once more under another name: everything but its "
        "report is stored already."
    )


def _more(pair: HeadToHead) -> str:
    """The spread of the seeds, and how many questions are left out."""
    words = ""
    if pair.one.seeds > 1 or pair.other.seeds > 1:
        words += f"; over seeds {seeds(pair.one)} and {seeds(pair.other)}"
    if pair.left_out:
        words += f"; {_questions(pair.left_out)} left out, with a grade for one of the two alone"
    return words


def seeds(side: Side) -> str:
    """The accuracy in percent, with its spread over the trainings."""
    if side.deviation is None:
        return f"{100 * side.accuracy:.1f} (one seed)"
    return f"{spread(side.accuracy, side.deviation)} ({side.seeds} seeds)"


def _interval(gap: Difference) -> str:
    return f"95{THIN}% {points(gap.low)} to {points(gap.high)}"


def _plain(share: float) -> str:
    """Percentage points with a sign only where they are negative."""
    return points(share).removeprefix("+")


def _questions(n: int) -> str:
    return f"{count(n)} question{'' if n == 1 else 's'}"
