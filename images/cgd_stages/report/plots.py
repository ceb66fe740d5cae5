"""The plots of the pages, as places in percent: a plot is as wide as the screen, and its letters are not. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from cgd_stages.results.comparison import NAMES, Point
from cgd_stages.results.formatting import THIN, count, number, percent
from cgd_stages.results.model import Step
from cgd_stages.results.scores import PassAt, Score, best_step, moving_mean, thinned, validations

CHART_POINTS = 600
"""Points of a line, about."""


class Plot(TypedDict):
    """What plot.html.j2 draws, at percents from the left and from the top, with classes of the style sheet."""

    y_ticks: list[tuple[str, float]]
    x_ticks: list[tuple[str, float]]
    bands: list[tuple[str, str]]
    """Class and path of the intervals around a line."""
    whiskers: list[tuple[float, float, float]]
    """The interval of a point: where from the left, its low and its high end from the top."""
    lines: list[tuple[str, str]]
    """Class and path."""
    places: list[tuple[str, float, float]]
    """Class of a point and where it is."""
    points: list[tuple[float, float, str]]
    """What the pointer and the arrow keys find: where, and what is told."""


# --- loss --------------------------------------------------------------------------------------------------------


def loss_chart(log: Sequence[Step]) -> dict[str, Any] | None:
    """The loss over steps: lines (each step, a moving mean of long logs, what was held out), axes, values to hover."""
    finite = [step for step in log if math.isfinite(step.loss)]
    if not finite:
        return None
    steps = thinned(finite, CHART_POINTS)
    losses = [step.loss for step in steps]
    held_out, best = validations(finite), best_step(finite)
    held_losses = [step.validation_loss or 0.0 for step in held_out]
    y_ticks = nice_ticks(min(losses + held_losses), max(losses + held_losses))
    low, high = min(y_ticks[0], *losses, *held_losses), max(y_ticks[-1], *losses, *held_losses)
    first, last = steps[0].step, steps[-1].step
    xs, ys = [_scaled(step.step, first, last) for step in steps], [_down(loss, low, high) for loss in losses]
    held_xs = [_scaled(step.step, first, last) for step in held_out]
    held_ys = [_down(loss, low, high) for loss in held_losses]
    means = moving_mean(losses, max(2, len(losses) // 24)) if len(losses) > 24 else []
    lines = [("faint" if means else "", _path(xs, ys))]
    lines += [("", _path(xs, [_down(mean, low, high) for mean in means]))] if means else []
    lines += [("held", _path(held_xs, held_ys))] if held_out else []
    plot = Plot(
        y_ticks=[(number(tick), _down(tick, low, high)) for tick in y_ticks],
        x_ticks=_step_ticks(first, last),
        bands=[],
        whiskers=[],
        lines=lines,
        places=[
            ("held best" if step is best else "held", x, y)
            for step, x, y in zip(held_out, held_xs, held_ys, strict=True)
        ],
        points=[(round(x, 2), round(y, 2), _told(step)) for x, y, step in zip(xs, ys, steps, strict=True)],
    )
    return {
        "plot": plot,
        "mean": bool(means),
        "validation": best and {"best": best, "last": held_out[-1]},
        "first": losses[0],
        "last": losses[-1],
        "least": min(losses),
        "steps": len(log),
        "left_out": len(log) - len(finite),
        "thinned": len(steps) < len(finite),
    }


def _told(step: Step) -> str:
    parts = [f"step {count(step.step)}", f"loss {step.loss:.4f}"]
    if step.validation_loss is not None and math.isfinite(step.validation_loss):
        parts.append(f"validation loss {step.validation_loss:.4f}")
    if step.learning_rate is not None:
        parts.append(f"learning rate {number(step.learning_rate)}")
    if step.grad_norm is not None and math.isfinite(step.grad_norm):
        parts.append(f"gradient norm {number(step.grad_norm)}")
    return " \u00b7 ".join(parts)


def sparks(log: Sequence[Step]) -> list[dict[str, Any]]:
    """Small lines beside the loss: gradient norm and learning rate, from zero to their largest value."""
    lines = []
    for name, title in (("grad_norm", "Gradient norm"), ("learning_rate", "Learning rate")):
        known = [
            (step.step, value) for step in log if (value := getattr(step, name)) is not None and math.isfinite(value)
        ]
        if not known:
            continue
        (first, before), (last, after), most = known[0], known[-1], max(value for _, value in known)
        shown = thinned(known, CHART_POINTS)
        xs = [_scaled(step, first, last) for step, _ in shown]
        line = _path(xs, [_down(value, 0.0, most) for _, value in shown])
        lines.append({"title": title, "line": line, "first": before, "most": most, "last": after})
    return lines


# --- Pass@k ------------------------------------------------------------------------------------------------------


def pass_charts(scores: Sequence[Score]) -> dict[str, Any]:
    """Pass@k of some models on a benchmark: over k, and over the tokens that k outputs cost. Both axes are logarithmic;
    of a model whose outputs hold no token there is nothing to draw over tokens."""
    series = [Series(score.model, score.pass_at) for score in scores]
    spent = [Series(one.model, [at for at in one.ladder if at.tokens > 0]) for one in series]
    costs = [at.tokens for one in spent for at in one.ladder]
    over_k = _pass_plot(series, "k", sorted({float(at.k) for one in series for at in one.ladder}))
    over_tokens = _pass_plot(spent, "tokens", log_ticks(min(costs), max(costs))) if costs else None
    return {"k": over_k, "tokens": over_tokens, "names": [(one.style, one.name) for one in series]}


@dataclass(frozen=True)
class Series:
    """What one model reached with 1, 2, 4, ... outputs."""

    model: str
    ladder: Sequence[PassAt]

    @property
    def name(self) -> str:
        return NAMES.get(self.model, self.model)

    @property
    def style(self) -> str:
        """Of the style sheet: a colour and a dash."""
        return f"s{rank(self.model)}"


def rank(model: str) -> int:
    """Place of a model in the paper's table; the last of those that it does not have."""
    return list(NAMES).index(model) if model in NAMES else len(NAMES)


def _pass_plot(series: Sequence[Series], axis: str, ticks: Sequence[float]) -> Plot:
    every = [at for one in series for at in one.ladder]
    y_ticks = nice_ticks(min(at.low for at in every), max(at.high for at in every))
    least, most = (math.log(which(getattr(at, axis) for at in every)) for which in (min, max))

    def across(at: PassAt) -> float:
        return round(_scaled(math.log(getattr(at, axis)), least, most), 2)

    def down(share: float) -> float:
        return round(_down(share, y_ticks[0], y_ticks[-1]), 2)

    def band(ladder: Sequence[PassAt]) -> str:
        bounds = [(across(at), down(at.low)) for at in ladder] + [(across(at), down(at.high)) for at in ladder[::-1]]
        return _path([x for x, _ in bounds], [y for _, y in bounds]) + " Z"

    drawn = [one for one in series if len(one.ladder) > 1]
    return Plot(
        y_ticks=[(f"{100 * tick:g}{THIN}%", down(tick)) for tick in y_ticks],
        x_ticks=[
            (count(math.exp(tick)), _scaled(tick, least, most))
            for tick in _apart([math.log(tick) for tick in ticks], (most - least) / 8)
        ],
        bands=[(one.style, band(one.ladder)) for one in drawn],
        whiskers=[],
        lines=[
            (one.style, _path([across(at) for at in one.ladder], [down(at.share) for at in one.ladder]))
            for one in drawn
        ],
        places=[(f"point {one.style}", across(at), down(at.share)) for one in series for at in one.ladder],
        points=[(across(at), down(at.share), _pass_told(one.name, at)) for one in series for at in one.ladder],
    )


def _pass_told(name: str, at: PassAt) -> str:
    return (
        f"{name} \u00b7 Pass@{at.k} {percent(at.share)} ({percent(at.low)} to {percent(at.high)}) "
        f"\u00b7 {count(at.tokens)} tokens"
    )


# --- robustness --------------------------------------------------------------------------------------------------


def robustness_chart(points: Sequence[Point]) -> dict[str, Any] | None:
    """Accuracy over the share of corrupted critiques: a line through their means, each point with its interval."""
    if not points:
        return None
    ticks = nice_ticks(min(one.low for one in points), max(one.high for one in points))
    low, high, most = ticks[0], ticks[-1], max(one.rate for one in points) or 1.0
    rates = {one.rate: [other.accuracy for other in points if other.rate == one.rate] for one in points}
    means = [_down(math.fsum(found) / len(found), low, high) for found in rates.values()]
    told = [
        f"{100 * one.rate:g}{THIN}% corrupted \u00b7 accuracy {percent(one.accuracy)} "
        f"({percent(one.low)} to {percent(one.high)}) \u00b7 {one.run}"
        for one in points
    ]
    xs, ys = [_scaled(one.rate, 0.0, most) for one in points], [_down(one.accuracy, low, high) for one in points]
    plot = Plot(
        y_ticks=[(f"{100 * tick:g}{THIN}%", _down(tick, low, high)) for tick in ticks],
        x_ticks=[(f"{100 * rate:g}{THIN}%", _scaled(rate, 0.0, most)) for rate in _apart(rates, most / 12)],
        bands=[],
        whiskers=[
            (x, _down(one.low, low, high), _down(one.high, low, high)) for x, one in zip(xs, points, strict=True)
        ],
        lines=[("", _path([_scaled(rate, 0.0, most) for rate in rates], means))],
        places=[("point", x, y) for x, y in zip(xs, ys, strict=True)],
        points=list(zip(xs, ys, told, strict=True)),
    )
    return {"plot": plot, "told": told}


# --- axes --------------------------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values that span [low, high], at most about `most` of them."""
    if high - low < 1e-12:
        return [low - abs(low) / 10 - 1e-9, low, low + abs(low) / 10 + 1e-9]
    rough = (high - low) / (most - 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= rough * 0.999)
    start, end = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(start, end + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The values of 1, 2 or 5 times a power of ten in [low, high], both positive; over more than two decades powers of
    ten alone, about six of them at most."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 2
    every = decades[:: math.ceil(len(decades) / 6)] if wide else decades
    ticks = [factor * 10.0**power for power in every for factor in ((1,) if wide else (1, 2, 5))]
    return [tick for tick in ticks if low <= tick <= high]


def _step_ticks(first: int, last: int) -> list[tuple[str, float]]:
    inner = [round(tick) for tick in nice_ticks(first, last) if first < tick < last] if last > first else []
    near = (last - first) / 12
    kept = [tick for tick in dict.fromkeys(inner) if tick - first > near and last - tick > near]
    return [(count(tick), _scaled(tick, first, last)) for tick in dict.fromkeys([first, *kept, last])]


def _apart(values: Iterable[float], distance: float) -> list[float]:
    """Of rising values those that are far enough from the one before to be written."""
    kept: list[float] = []
    for value in values:
        if not kept or value - kept[-1] >= distance:
            kept.append(value)
    return kept


def _scaled(value: float, low: float, high: float) -> float:
    return 50.0 if high <= low else 100 * (value - low) / (high - low)


def _down(value: float, low: float, high: float) -> float:
    """From the top."""
    return 100 - _scaled(value, low, high)


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    return "M" + " L".join(f"{x:.2f} {y:.2f}" for x, y in zip(xs, ys, strict=True)) if ys else ""
