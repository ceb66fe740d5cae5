"""The report as one HTML file that asks nothing of any network: data in, page out.

Whatever a model said is shown as text: templates escape, embedded JSON holds no `<`, and the page's own policy lets no
script run but ours. Positions in charts are percentages, so that a chart is as wide as the screen and its letters are
not.
"""

import base64
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cgd_stages.contract import LENGTH
from cgd_stages.figures import (
    NOISE,
    RIVALS,
    Comparison,
    ReportData,
    Score,
    StageRecord,
    Step,
    at,
    best_step,
    changes,
    comparisons,
    finite_or_none,
    models,
    moving_mean,
    scores,
    thinned,
    total_of,
    validations,
)

HERE = Path(__file__).parent
OBJECTIVES = {
    "cgd": "CGD",
    "cft": "CFT",
    "distilledsft": "Distilled SFT",
    "sft": "SFT",
    "refinedsft": "Refined SFT",
    "selfrefine": "Self-Refine",
}
THIN = "\u202f"
"""Narrow space that does not break: between a number and its unit, and between thousands."""
CHART_POINTS = 600
SENTENCES = 3
"""More comparisons than this are summed up, one sentence a model."""
EXAMPLES = 60
"""Fixed and broken questions that the page carries, about."""
TEXT_LIMIT = 4000
"""Characters of a text that the page carries."""


def render(report: ReportData) -> str:
    """The page. The same data give the same bytes."""
    script = _own("report.js")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=report.run,
            spec=report.spec,
            style=_own("report.css"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            head=_head(report),
            results=_results(report),
            timeline=_timeline(report.stages),
            funnel=_funnel(report.stages),
            trainings=_trainings(report),
            quadruples=report.quadruples,
            changes=changes(report, most=max(1, min(6, EXAMPLES // (2 * len(comparisons(report)) or 1)))),
            stages=report.stages,
            embedded=embedded(_browser(report)),
        )
    )


def fingerprint() -> str:
    """Hash of everything that makes a page of data: a report made by another page is another report."""
    files = ("page.py", "figures.py", "stats.py", "report.html.j2", "report.css", "report.js")
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in files)).hexdigest()


def _own(name: str) -> Markup:
    """A file that stands beside this one, put into the page as it is."""
    return Markup((HERE / name).read_text())  # noqa: S704


def embedded(value: Any) -> Markup:
    """JSON for a `<script type="application/json">`: no text in it can end the element or open a comment."""
    text = json.dumps(finite_or_none(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))  # noqa: S704


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=percent,
        points=points,
        count=count,
        number=number,
        duration=duration,
        short=short_name,
        label=label,
        cut=cut,
        probability=probability,
        pretty=lambda value: json.dumps(finite_or_none(value), indent=2, ensure_ascii=False, default=str),
    )
    return environment


# --- words and numbers -------------------------------------------------------------------------------------------


def count(value: float) -> str:
    """A whole number with its thousands apart."""
    return f"{round(value):,}".replace(",", THIN) if math.isfinite(value) else "\u2013"


def number(value: float | None) -> str:
    """A quantity to three or four digits; a dash for what is not known or not finite."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    if float(value).is_integer() or abs(value) >= 1000:
        return count(value)
    return f"{value:.3f}".rstrip("0") if abs(value) < 10 else f"{value:.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}{THIN}%" if math.isfinite(share) else "\u2013"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, signed."""
    return f"{100 * difference:+.1f}".replace("-", "\u2212")


def probability(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "\u2013"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{THIN}s"
    if whole < 3600:
        return f"{whole // 60}{THIN}min {whole % 60:02d}{THIN}s"
    return f"{count(whole // 3600)}{THIN}h {whole % 3600 // 60:02d}{THIN}min"


def short_name(model: str) -> str:
    """A hub id as it is; of a path or a URI the last part."""
    return model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", ".", "~", "s3://")) else model


def label(model: str) -> str:
    """How people write the label of an evaluated model or an objective."""
    return OBJECTIVES.get(model, model)


def objective(stage: StageRecord) -> str:
    """What a training learned, with the ablation of its critiques if it had one."""
    name, critique = label(stage.name.removeprefix("train-")), stage.inputs.get("critique", {})
    match critique.get("kind", "matched"):
        case "matched":
            return name
        case "corrupted":
            return f"{name} ({percent(critique['rate'])} of the critiques corrupted)"
        case kind:
            return f"{name} (critique: {kind})"


def cut(text: str, most: int = TEXT_LIMIT) -> str:
    """The beginning of a very long text, with a note of what is left out."""
    return text if len(text) <= most else f"{text[:most]}\n[cut here: {count(len(text) - most)} more characters]"


def moment(time: str, *, with_day: bool = True) -> str:
    return datetime.fromisoformat(time).astimezone(UTC).strftime("%-d %B %Y, %H:%M" if with_day else "%H:%M")


# --- the head ----------------------------------------------------------------------------------------------------


def _head(report: ReportData) -> dict[str, Any]:
    names = models(report)
    objectives = [objective(stage) for stage in report.stages if stage.name.startswith("train-")]
    return {
        "verdicts": verdicts(comparisons(report)) or [_without_comparison(report)],
        "cautions": cautions(report),
        "student": names.get("student", ""),
        "teacher": names.get("teacher", ""),
        "objectives": ", ".join(objectives),
        "when": _when(report.stages),
        "prompt_tokens": total_of(report.stages, "prompt_tokens"),
        "generated_tokens": total_of(report.stages, "generated_tokens"),
        "seconds": total_of(report.stages, "seconds"),
    }


def verdicts(compared: Sequence[Comparison]) -> list[dict[str, str]]:
    """One for each comparison, or for each trained model where that would be many."""
    groups = {one.trained: [other for other in compared if other.trained == one.trained] for one in compared}
    trained = [model for model in groups if model not in RIVALS]
    named = {model: label(model) for model in groups}
    named |= {model: f"{label(model)}-trained" if len(trained) > 1 else "Trained" for model in trained}
    if len(compared) <= SENTENCES:
        return [sentence(one, named[one.trained]) for one in compared]
    return [summary(group, named[model]) for model, group in groups.items()]


def summary(group: Sequence[Comparison], trained: str) -> dict[str, str]:
    """What a model's comparisons on several benchmarks come to; every benchmark weighs the same."""
    after = math.fsum(one.after for one in group) / len(group)
    before = math.fsum(one.before for one in group) / len(group)
    better, worse = (sum(one.outcome == outcome for one in group) for outcome in ("better", "worse"))
    return {
        "outcome": "better" if better and not worse else "worse" if worse and not better else "noise",
        "claim": f"{trained} {percent(after)}, base {percent(before)}: the mean of {len(group)} benchmarks",
        "detail": f"Better than chance explains on {better}, worse on {worse}, within noise on "
        f"{len(group) - better - worse} (each at p < {NOISE}, not corrected for the number of tests)",
    }


def sentence(one: Comparison, trained: str) -> dict[str, str]:
    """What a comparison comes to, in words that claim no more than its numbers do; `trained` names the model."""
    judgement = {
        "better": f"better than chance explains ({probability(one.p)})",
        "worse": f"worse than chance explains ({probability(one.p)})",
        "noise": f"a difference within noise ({probability(one.p)})",
    }[one.outcome]
    if one.fixed == one.broken == 0:
        judgement = "no question changed sides"
    questions = "question" if one.n == 1 else "questions"
    return {
        "outcome": one.outcome,
        "claim": f"{trained} {percent(one.after)}, base {percent(one.before)} on {one.benchmark}",
        "detail": f"{count(one.n)} {questions}, {one.fixed} fixed and {one.broken} broken: {judgement}",
    }


def _without_comparison(report: ReportData) -> dict[str, str]:
    missing = [stage.name for stage in report.stages if stage.facts is None]
    detail = f"no output of {', '.join(missing)}" if missing else "the run evaluates no pair of models"
    return {"outcome": "noise", "claim": "No comparison of base and trained model", "detail": detail}


def cautions(report: ReportData) -> list[str]:
    """What a reader should know before believing the numbers."""
    found = []
    for one in scores(report):
        who = f"{label(one.model).capitalize() if one.model == 'base' else label(one.model)} on {one.benchmark}"
        if one.truncated > one.outputs / 20:
            found.append(f"{who}: {percent(one.truncated / one.outputs)} of the outputs were cut by the token limit.")
        if one.unparsed > one.outputs / 20:
            found.append(f"{who}: no answer was found in {percent(one.unparsed / one.outputs)} of the outputs.")
        if one.refused:
            found.append(f"{who}: {one.refused} questions were never answered; they count as not correct.")
        if one.ungraded:
            found.append(f"{who}: {one.ungraded} outputs could not be graded; they count as not correct.")
    sizes = {one.benchmark: one.n for one in scores(report)}
    found += [f"{name} has only {n} questions: intervals are wide." for name, n in sizes.items() if n < 100]
    return found


def _when(stages: Sequence[StageRecord]) -> str:
    times = [time for stage in stages for time in (stage.started, stage.completed) if time]
    if not times:
        return "not yet run"
    first, last = moment(min(times, key=at)), moment(max(times, key=at))
    same_day = first.partition(",")[0] == last.partition(",")[0]
    return f"{first}\u2013{last.rpartition(', ')[2] if same_day else last} UTC"


# --- results -----------------------------------------------------------------------------------------------------


def _results(report: ReportData) -> list[dict[str, Any]]:
    """One block a benchmark: its scores, scaled to a common axis, and its comparisons."""
    all_scores, all_comparisons = scores(report), comparisons(report)
    blocks = []
    for benchmark, group in itertools.groupby(all_scores, key=lambda one: one.benchmark):
        members: list[Score] = list(group)
        top = min(1.0, math.ceil(max(one.high for one in members) * 10) / 10)
        blocks.append(
            {
                "benchmark": benchmark,
                "scores": members,
                "top": top,
                "ticks": [top * i / 4 for i in range(5)],
                "comparisons": [one for one in all_comparisons if one.benchmark == benchmark],
            }
        )
    return blocks


# --- timeline ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A stage in the timeline; `left` and `width` are percentages, None when its times are not known."""

    stage: StageRecord
    left: float | None
    width: float
    rate: float | None
    """Generated (in training: supervised) tokens a second."""


def _timeline(stages: Sequence[StageRecord]) -> dict[str, Any]:
    spans = {stage.name: (at(stage.started), at(stage.completed)) for stage in stages if stage.seconds is not None}
    clock = _without_pauses(sorted(spans.values()))
    length = max((clock(end) for _, end in spans.values()), default=0.0) or 1.0
    bars = []
    for stage in stages:
        left, right = (clock(time) / length * 100 for time in spans[stage.name]) if stage.name in spans else (None, 0.0)
        bars.append(Bar(stage, left, max(0.0, right - (left or 0.0)), _rate(stage)))
    wall = max((end for _, end in spans.values()), default=0.0) - min(
        (start for start, _ in spans.values()), default=0.0
    )
    return {"bars": bars, "busy": length if spans else None, "wall": wall, "paused": wall > length * 1.05 + 1}


def _without_pauses(spans: list[tuple[float, float]]) -> Any:
    """A clock that stands still while no stage runs for long, as between a run and the earlier one it builds on."""
    busy = sum(end - start for start, end in spans)
    allowed = max(60.0, busy / 10)
    cuts: list[tuple[float, float]] = []
    reached = spans[0][0] if spans else 0.0
    origin = reached
    for start, end in spans:
        if start - reached > allowed:
            cuts.append((reached, start - reached - allowed / 4))
        reached = max(reached, end)

    def clock(time: float) -> float:
        return time - origin - sum(length for after, length in cuts if time > after)

    return clock


def _rate(stage: StageRecord) -> float | None:
    facts = stage.facts
    if facts is None or facts.seconds <= 0:
        return None
    told = facts.metrics.get("tokens_per_second")
    if told:
        return told
    return facts.generated_tokens / facts.seconds if facts.generated_tokens else None


# --- rows --------------------------------------------------------------------------------------------------------


def _funnel(stages: Sequence[StageRecord]) -> list[dict[str, Any]]:
    """Rows of the stages that pass rows on, scaled to the largest. Evaluation counts other rows, and check those of all
    trainings together."""
    counted = [stage for stage in stages if stage.facts and not stage.name.startswith(("evaluate-", "check"))]
    most = max((stage.facts.rows.total for stage in counted if stage.facts), default=0) or 1
    funnel = []
    for stage in counted:
        rows = stage.facts.rows if stage.facts else None
        if rows is None or rows.total == 0:
            continue
        funnel.append(
            {
                "name": stage.name,
                "rows": rows,
                "kept": 100 * rows.done / most,
                "lost": 100 * rows.rejected / most,
                "reasons": sorted(stage.rejections.items(), key=lambda item: (-item[1], item[0])),
                "balanced": rows.total == rows.done + rows.rejected,
            }
        )
    return funnel


# --- training ----------------------------------------------------------------------------------------------------


def _trainings(report: ReportData) -> list[dict[str, Any]]:
    """One block a training: its loss, its figures, and how long its examples are."""
    records = {stage.name: stage for stage in report.stages if stage.name.startswith("train-")}
    blocks = []
    for name in dict.fromkeys([*records, *report.training]):
        facts = records[name].facts if name in records else None
        metrics = facts.metrics if facts else {}
        block = {
            "stage": name,
            "objective": objective(records.get(name) or StageRecord(name=name)),
            "chart": _loss_chart(report.training.get(name, ())),
            "sparks": _sparks(report.training.get(name, ())),
            "metrics": {name: value for name, value in metrics.items() if not name.startswith(LENGTH)},
            "lengths": _lengths(metrics),
        }
        if block["chart"] or metrics:
            blocks.append(block)
    return blocks


def _lengths(metrics: Mapping[str, float]) -> list[tuple[int, float, float]]:
    """The histogram of examples: most tokens, examples, and their share of the largest bar in percent."""
    found = {int(name.removeprefix(LENGTH)): value for name, value in metrics.items() if name.startswith(LENGTH)}
    top = max(found.values(), default=0.0) or 1.0
    return [(most, found[most], 100 * found[most] / top) for most in sorted(found)]


def _loss_chart(log: Sequence[Step]) -> dict[str, Any] | None:
    """The loss over steps: lines (each step, a moving mean of long logs, what was held out), axes, values to hover."""
    finite = [step for step in log if math.isfinite(step.loss)]
    if not finite:
        return None
    steps = thinned(finite, CHART_POINTS)
    losses = [step.loss for step in steps]
    held_out = validations(finite)
    values = [*losses, *(step.validation_loss or 0.0 for step in held_out)]
    y_ticks = nice_ticks(min(values), max(values))
    low, high = min(y_ticks[0], *values), max(y_ticks[-1], *values)
    first, last = steps[0].step, steps[-1].step
    xs = [_scaled(step.step, first, last) for step in steps]
    means = moving_mean(losses, max(2, len(losses) // 24)) if len(losses) > 24 else []
    return {
        "line": _path(xs, [100 - _scaled(loss, low, high) for loss in losses]),
        "mean": _path(xs, [100 - _scaled(mean, low, high) for mean in means]),
        "y_ticks": [(number(tick), 100 - _scaled(tick, low, high)) for tick in y_ticks],
        "x_ticks": _step_ticks(first, last),
        "validation": _validation(held_out, first, last, low, high),
        "points": embedded([_hover(step, x, low, high) for step, x in zip(steps, xs, strict=True)]),
        "first": losses[0],
        "last": losses[-1],
        "least": min(losses),
        "steps": len(log),
        "left_out": len(log) - len(finite),
        "thinned": len(steps) < len(finite),
    }


def _validation(steps: Sequence[Step], first: int, last: int, low: float, high: float) -> dict[str, Any] | None:
    """The line of the validation loss, its points, and the best of them."""
    best = best_step(steps)
    if best is None:
        return None
    places = [
        (_scaled(step.step, first, last), 100 - _scaled(step.validation_loss or 0.0, low, high), step is best)
        for step in steps
    ]
    return {
        "line": _path([x for x, *_ in places], [y for _, y, _ in places]),
        "places": places,
        "best": best,
        "last": steps[-1],
    }


def _sparks(log: Sequence[Step]) -> list[dict[str, Any]]:
    """Small lines beside the loss: gradient norm and learning rate, from zero to their largest value."""
    sparks = []
    for name, title in (("grad_norm", "Gradient norm"), ("learning_rate", "Learning rate")):
        known = [
            (step.step, value) for step in log if (value := getattr(step, name)) is not None and math.isfinite(value)
        ]
        if not known:
            continue
        (first, before), (last, after), most = known[0], known[-1], max(value for _, value in known)
        shown = thinned(known, CHART_POINTS)
        xs = [_scaled(step, first, last) for step, _ in shown]
        line = _path(xs, [100 - _scaled(value, 0.0, most) for _, value in shown])
        sparks.append({"title": title, "line": line, "first": before, "most": most, "last": after})
    return sparks


def _hover(step: Step, x: float, low: float, high: float) -> list[Any]:
    parts = [f"step {count(step.step)}", f"loss {step.loss:.4f}"]
    if step.validation_loss is not None and math.isfinite(step.validation_loss):
        parts.append(f"validation loss {step.validation_loss:.4f}")
    if step.learning_rate is not None:
        parts.append(f"learning rate {number(step.learning_rate)}")
    if step.grad_norm is not None and math.isfinite(step.grad_norm):
        parts.append(f"gradient norm {number(step.grad_norm)}")
    return [round(x, 2), round(100 - _scaled(step.loss, low, high), 2), " \u00b7 ".join(parts)]


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values that span [low, high], at most about `most` of them."""
    if high - low < 1e-12:
        return [low - abs(low) / 10 - 1e-9, low, low + abs(low) / 10 + 1e-9]
    rough = (high - low) / (most - 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= rough * 0.999)
    start, end = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(start, end + 1)]


def _step_ticks(first: int, last: int) -> list[tuple[str, float]]:
    inner = [round(tick) for tick in nice_ticks(first, last) if first < tick < last] if last > first else []
    near = (last - first) / 12
    kept = [tick for tick in dict.fromkeys(inner) if tick - first > near and last - tick > near]
    return [(count(tick), _scaled(tick, first, last)) for tick in dict.fromkeys([first, *kept, last])]


def _scaled(value: float, low: float, high: float) -> float:
    return 50.0 if high <= low else 100 * (value - low) / (high - low)


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    return "M" + " L".join(f"{x:.2f} {y:.2f}" for x, y in zip(xs, ys, strict=True)) if ys else ""


# --- the browser of quadruples -----------------------------------------------------------------------------------


def _browser(report: ReportData) -> list[dict[str, Any]]:
    shown = report.quadruples.shown if report.quadruples else ()
    return [
        {name: cut(value) if isinstance(value, str) else value for name, value in row.model_dump().items()}
        for row in shown
    ]
