"""The page's first figure, to be copied into a message or a slide: accuracy with 95 % intervals, base before trained.
Pure: scores in, coordinates of an SVG out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cgd_stages.report.plots import nice_ticks, rank
from cgd_stages.report.summary import label
from cgd_stages.results.formatting import count, percent
from cgd_stages.results.model import ReportData
from cgd_stages.results.scores import Score, scores

WIDTH, LEFT, RIGHT, ROW, TOP = 720, 170, 190, 26, 44
"""Pixels: of the figure, of the names, of the figures beside the axis, of a row, above the first row."""
MOST = 24
"""The most rows; a run with more has its table."""
BASE, TRAINED = "#8a939c", "#0f766e"


@dataclass(frozen=True)
class Row:
    y: float
    name: str
    x: float
    low: float
    high: float
    colour: str
    text: str


def outcome(report: ReportData) -> dict[str, Any] | None:
    """What `figure.html.j2` draws; None where fewer than two models were evaluated, or more than have room."""
    found = scores(report)
    if len({score.model for score in found}) < 2 or len(found) > MOST:
        return None
    ticks = nice_ticks(0.0, max(score.high for score in found))
    wide = WIDTH - LEFT - RIGHT

    def across(share: float) -> float:
        return round(LEFT + wide * share / ticks[-1], 1)

    rows, headings, y = list[Row](), list[tuple[float, str]](), float(TOP)
    for benchmark in dict.fromkeys(score.benchmark for score in found):
        members = sorted((one for one in found if one.benchmark == benchmark), key=lambda one: rank(one.model))
        headings.append((y + 14, f"{benchmark} ({count(max(one.n for one in members))} questions)"))
        y += ROW
        for score in members:
            rows.append(_row(score, y + ROW / 2 - 4, across))
            y += ROW
    bottom = y + 4
    return {
        "width": WIDTH,
        "height": round(bottom + 50),
        "top": TOP,
        "bottom": bottom,
        "title": f"{report.run.name}: base and trained",
        "ticks": [(across(tick), f"{100 * tick:g}") for tick in ticks],
        "headings": headings,
        "rows": rows,
        "foot": "Right answers in percent; lines are 95 % intervals.",
        "label": _said(found),
    }


def _row(score: Score, y: float, across: Any) -> Row:
    colour = BASE if score.model == "base" else TRAINED
    text = f"{percent(score.accuracy)}  ({100 * score.low:.1f} \u2013 {100 * score.high:.1f})"
    return Row(y, label(score.model), across(score.accuracy), across(score.low), across(score.high), colour, text)


def _said(found: Sequence[Score]) -> str:
    """The figure for those who do not see it."""
    return "; ".join(f"{label(score.model)} {percent(score.accuracy)} on {score.benchmark}" for score in found)
