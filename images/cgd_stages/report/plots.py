"""The plots of the pages, with places in percent: a plot grows with the screen, and its letters do not. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from cgd_stages.results.comparison import NAMES, WRONG, Curve, Point
from cgd_stages.results.formatting import THIN, count, number, percent
from cgd_stages.results.model import Step
from cgd_stages.results.scores import PassAt, Score, moving_mean, thinned

CHART_POINTS = 600
"""About the most points of a line."""


class Plot(TypedDict):
    """What plot.html.j2 draws. Places are percents from the left and from the top; classes are the style sheet's."""

    y_ticks: list[tuple[str, float]]
    x_ticks: list[tuple[str, float]]
    bands: list[tuple[str, str]]
    """Class, and path around the intervals of a line."""
    whiskers: list[tuple[float, float, float]]
    """The interval of a point: its place from the left, its low and its high end from the top."""
    lines: list[tuple[str, str]]
    """Class and path."""
    places: list[tuple[str, float, float]]
    """Class and place of a point."""
    points: list[tuple[float, float, str]]
    """What the pointer and the arrow keys reach: place and text."""


# --- loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A loss on held-out rows over steps."""

    name: str
    style: str
    """The classes of the style sheet."""
    steps: Sequence[int]
    losses: Sequence[float]

    @property
    def least(self) -> tuple[int, float]:
        """Step and value of the least loss, the earliest of equals."""
        return min(zip(self.steps, self.losses, strict=True), key=lambda point: point[1])


def held_losses(log: Sequence[Step]) -> list[Held]:
    """The losses on held-out rows, as far as the log has finite ones. The one in the objective's own context comes
    last, and has no other name where it is the only one."""
    found: list[Held] = []
    for field, name, style in (
        ("bare_validation_loss", "validation loss given the prompt alone", "held bare"),
        ("validation_loss", "validation loss", "held"),
    ):
        points = [(step.step, value) for step in log if (value := getattr(step, field)) is not None]
        if points := [(step, value) for step, value in points if math.isfinite(value)]:
            name += " in the objective's own context" if found else ""
            found.append(Held(name, style, *zip(*points, strict=True)))
    return found


def loss_chart(log: Sequence[Step], exported: Step | None = None) -> dict[str, Any] | None:
    """The loss over steps: each step, a moving mean of a long log, and the validation losses, where the points of the
    `exported` step are large. None without a finite loss."""
    finite = [step for step in log if math.isfinite(step.loss)]
    if not finite:
        return None
    steps = thinned(finite, CHART_POINTS)
    losses = [step.loss for step in steps]
    held = held_losses(finite)
    drawn = losses + [loss for line in held for loss in line.losses]
    y_ticks = nice_ticks(min(drawn), max(drawn))
    low, high = min(y_ticks[0], *drawn), max(y_ticks[-1], *drawn)
    first, last = steps[0].step, steps[-1].step
    xs, ys = [_scaled(step.step, first, last) for step in steps], [_down(loss, low, high) for loss in losses]
    means = moving_mean(losses, max(2, len(losses) // 24)) if len(losses) > 24 else []
    lines = [("faint" if means else "", _path(xs, ys))]
    lines += [("", _path(xs, [_down(mean, low, high) for mean in means]))] if means else []
    places = []
    for line in held:
        across = [_scaled(step, first, last) for step in line.steps]
        down = [_down(loss, low, high) for loss in line.losses]
        lines.append((line.style, _path(across, down)))
        large = [" exported" if exported and step == exported.step else "" for step in line.steps]
        places += [(line.style + size, x, y) for size, x, y in zip(large, across, down, strict=True)]
    plot = Plot(
        y_ticks=[(number(tick), _down(tick, low, high)) for tick in y_ticks],
        x_ticks=_step_ticks(first, last),
        bands=[],
        whiskers=[],
        lines=lines,
        places=places,
        points=[(round(x, 2), round(y, 2), _step_text(step)) for x, y, step in zip(xs, ys, steps, strict=True)],
    )
    return {
        "plot": plot,
        "mean": bool(means),
        "held": held,
        "first": losses[0],
        "last": losses[-1],
        "least": min(losses),
        "steps": len(log),
        "left_out": len(log) - len(finite),
        "thinned": len(steps) < len(finite),
    }


def _step_text(step: Step) -> str:
    parts = [f"step {count(step.step)}", f"loss {step.loss:.4f}"]
    parts += [f"{line.name} {line.losses[0]:.4f}" for line in held_losses([step])]
    if step.learning_rate is not None:
        parts.append(f"learning rate {number(step.learning_rate)}")
    if step.grad_norm is not None and math.isfinite(step.grad_norm):
        parts.append(f"gradient norm {number(step.grad_norm)}")
    return " \u00b7 ".join(parts)


def sparks(log: Sequence[Step]) -> list[dict[str, Any]]:
    """Small lines beside the loss: gradient norm, learning rate, and for a mixture of experts the routers' loss, from
    zero to their largest value."""
    lines = []
    for name, title in (
        ("grad_norm", "Gradient norm"),
        ("learning_rate", "Learning rate"),
        ("router_loss", "Routers' loss"),
    ):
        finite = [
            (step.step, value) for step in log if (value := getattr(step, name)) is not None and math.isfinite(value)
        ]
        if not finite:
            continue
        (first, before), (last, after), most = finite[0], finite[-1], max(value for _, value in finite)
        shown = thinned(finite, CHART_POINTS)
        xs = [_scaled(step, first, last) for step, _ in shown]
        line = _path(xs, [_down(value, 0.0, most) for _, value in shown])
        lines.append({"title": title, "line": line, "first": before, "most": most, "last": after})
    return lines


# --- Pass@k ------------------------------------------------------------------------------------------------------


def pass_charts(scores: Sequence[Score]) -> dict[str, Any]:
    """Pass@k of models on a benchmark: over k, and over the tokens that k outputs cost. Both axes are logarithmic, so a
    model whose outputs hold no token is not drawn over tokens."""
    series = [Series(score.model, score.pass_at) for score in scores]
    with_tokens = [Series(score.model, [at for at in score.pass_at if at.tokens > 0]) for score in scores]
    costs = [at.tokens for model in with_tokens for at in model.ladder]
    over_k = _pass_plot(series, "k", sorted({float(at.k) for model in series for at in model.ladder}))
    over_tokens = _pass_plot(with_tokens, "tokens", log_ticks(min(costs), max(costs))) if costs else None
    return {"k": over_k, "tokens": over_tokens, "names": [(model.style, model.name) for model in series]}


@dataclass(frozen=True)
class Series:
    """Pass@k of one model with 1, 2, 4, ... outputs."""

    model: str
    ladder: Sequence[PassAt]

    @property
    def name(self) -> str:
        return NAMES.get(self.model, self.model)

    @property
    def style(self) -> str:
        """The class of the style sheet with its colour and dash."""
        return f"s{rank(self.model)}"


def rank(model: str) -> int:
    """The place of a model in the paper's table; models that the table lacks come last."""
    return list(NAMES).index(model) if model in NAMES else len(NAMES)


def _pass_plot(series: Sequence[Series], axis: str, ticks: Sequence[float]) -> Plot:
    points = [(model, at) for model in series for at in model.ladder]
    y_ticks = nice_ticks(min(at.low for _, at in points), max(at.high for _, at in points))
    least, most = (math.log(extreme(getattr(at, axis) for _, at in points)) for extreme in (min, max))

    def across(at: PassAt) -> float:
        return round(_scaled(math.log(getattr(at, axis)), least, most), 2)

    def down(share: float) -> float:
        return round(_down(share, y_ticks[0], y_ticks[-1]), 2)

    def band(ladder: Sequence[PassAt]) -> str:
        bounds = [(across(at), down(at.low)) for at in ladder] + [(across(at), down(at.high)) for at in ladder[::-1]]
        return _path([x for x, _ in bounds], [y for _, y in bounds]) + " Z"

    def text(name: str, at: PassAt) -> str:
        share = f"{percent(at.share)} ({percent(at.low)} to {percent(at.high)})"
        return f"{name} \u00b7 Pass@{at.k} {share} \u00b7 {count(at.tokens)} tokens"

    lines = [model for model in series if len(model.ladder) > 1]
    return Plot(
        y_ticks=[(f"{100 * tick:g}{THIN}%", down(tick)) for tick in y_ticks],
        x_ticks=[
            (count(math.exp(tick)), _scaled(tick, least, most))
            for tick in _apart([math.log(tick) for tick in ticks], (most - least) / 8)
        ],
        bands=[(model.style, band(model.ladder)) for model in lines],
        whiskers=[],
        lines=[
            (model.style, _path([across(at) for at in model.ladder], [down(at.share) for at in model.ladder]))
            for model in lines
        ],
        places=[(f"point {model.style}", across(at), down(at.share)) for model, at in points],
        points=[(across(at), down(at.share), text(model.name, at)) for model, at in points],
    )


# --- robustness --------------------------------------------------------------------------------------------------


STYLES = dict(zip(WRONG.values(), ("s6", "s7", "s5"), strict=True))
"""The class of the style sheet with the colour and dash of each curve."""


def robustness_chart(curves: Sequence[Curve]) -> dict[str, Any] | None:
    """Accuracy over the share of wrong critiques: for each curve a line through the means, and each point with its
    interval. The trainings without wrong critiques, where all curves begin, are drawn once."""
    drawn = [(curve, point) for curve in curves for point in curve.points if point.rate or curve == curves[0]]
    if not drawn:
        return None
    points = [point for _, point in drawn]
    ticks = nice_ticks(min(point.low for point in points), max(point.high for point in points))
    low, high, most = ticks[0], ticks[-1], max(point.rate for point in points) or 1.0
    lines = []
    for curve in curves:
        accuracies: dict[float, list[float]] = {}
        for point in curve.points:
            accuracies.setdefault(point.rate, []).append(point.accuracy)
        means = [_down(math.fsum(values) / len(values), low, high) for values in accuracies.values()]
        lines.append((STYLES[curve.name], _path([_scaled(rate, 0.0, most) for rate in accuracies], means)))
    texts = [_point_text(curve, point) for curve, point in drawn]
    xs = [_scaled(point.rate, 0.0, most) for point in points]
    ys = [_down(point.accuracy, low, high) for point in points]
    rates = sorted({point.rate for point in points})
    plot = Plot(
        y_ticks=[(f"{100 * tick:g}{THIN}%", _down(tick, low, high)) for tick in ticks],
        x_ticks=[(f"{100 * rate:g}{THIN}%", _scaled(rate, 0.0, most)) for rate in _apart(rates, most / 12)],
        bands=[],
        whiskers=[
            (x, _down(point.low, low, high), _down(point.high, low, high)) for x, point in zip(xs, points, strict=True)
        ],
        lines=lines,
        places=[
            (f"point {STYLES[curve.name] if point.rate else ''}", x, y)
            for x, y, (curve, point) in zip(xs, ys, drawn, strict=True)
        ],
        points=list(zip(xs, ys, texts, strict=True)),
    )
    return {"plot": plot, "texts": texts, "names": [(STYLES[curve.name], curve.name) for curve in curves]}


def _point_text(curve: Curve, point: Point) -> str:
    rate = f"{100 * point.rate:g}{THIN}% wrong"
    rate += f" ({percent(point.wrong)} of the examples)" if point.wrong != point.rate else ""
    accuracy = f"accuracy {percent(point.accuracy)} ({percent(point.low)} to {percent(point.high)})"
    return " \u00b7 ".join(part for part in (rate, accuracy, curve.name if point.rate else "", point.run) if part)


# --- axes --------------------------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values that span [low, high], about `most` at most."""
    if high - low < 1e-12:
        return [low - abs(low) / 10 - 1e-9, low, low + abs(low) / 10 + 1e-9]
    rough = (high - low) / (most - 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= rough * 0.999)
    start, end = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(start, end + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The values in [low, high] of 1, 2 or 5 times a power of ten; both ends are positive. Beyond two decades only
    powers of ten, about six at most."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 2
    powers = decades[:: math.ceil(len(decades) / 6)] if wide else decades
    ticks = [factor * 10.0**power for power in powers for factor in ((1,) if wide else (1, 2, 5))]
    return [tick for tick in ticks if low <= tick <= high]


def _step_ticks(first: int, last: int) -> list[tuple[str, float]]:
    inner = [round(tick) for tick in nice_ticks(first, last) if first < tick < last] if last > first else []
    near = (last - first) / 12
    kept = [tick for tick in dict.fromkeys(inner) if tick - first > near and last - tick > near]
    return [(count(tick), _scaled(tick, first, last)) for tick in dict.fromkeys([first, *kept, last])]


def _apart(values: Iterable[float], distance: float) -> list[float]:
    """Those of the rising values that are far enough apart to be written."""
    kept: list[float] = []
    for value in values:
        if not kept or value - kept[-1] >= distance:
            kept.append(value)
    return kept


def _scaled(value: float, low: float, high: float) -> float:
    return 50.0 if high <= low else 100 * (value - low) / (high - low)


def _down(value: float, low: float, high: float) -> float:
    """The place of a value in percent from the top."""
    return 100 - _scaled(value, low, high)


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    return "M" + " L".join(f"{x:.2f} {y:.2f}" for x, y in zip(xs, ys, strict=True)) if ys else ""
