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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cgd_stages.contract import LENGTH, Critique
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
    gpu_hours,
    gpus,
    models,
    moving_mean,
    scores,
    thinned,
    total_of,
    validations,
)
from cgd_stages.quality import Quality, Share
from cgd_stages.quality import cautions as data_cautions
from cgd_stages.tables import MEAN, NAMES, Point, Table, name_of, robustness, table_of
from cgd_stages.words import THIN, count, duration, number, percent, points, probability

HERE = Path(__file__).parent
CHART_POINTS = 600
SENTENCES = 3
"""More comparisons than this are summed up, one sentence a model."""
CAUTIONS = 5
"""More of them are folded."""
EXAMPLES = 60
"""Fixed and broken questions that the page carries, about."""
TEXT_LIMIT = 4000
"""Characters of a text that the page carries."""


def render(report: ReportData, quality: Quality | None = None) -> str:
    """The page. The same data give the same bytes."""
    return _page(
        "report.html.j2",
        title=f"{report.run.name} \u00b7 CGD run report",
        run=report.run,
        spec=report.spec,
        head=_head(report, quality),
        quality=_quality(quality, report) if quality and quality.rows else None,
        table=table_of(report),
        results=_results(report),
        timeline=_timeline(report.stages),
        funnel=_funnel(report.stages),
        trainings=_trainings(report),
        quadruples=report.quadruples,
        rejected=report.rejected,
        changes=changes(report, most=max(1, min(6, EXAMPLES // (2 * len(comparisons(report)) or 1)))),
        stages=report.stages,
        embedded=embedded(_browser(report)),
    )


def render_comparison(table: Table) -> str:
    """The page of several runs: their table, and accuracy over corrupted critiques where some runs corrupted them."""
    runs = list(dict.fromkeys(run for line in table.lines for run in line.runs))
    curve = _robustness_chart(robustness(table))
    return _page("compare.html.j2", title="CGD runs compared", table=table, runs=runs, curve=curve)


def _page(template: str, **values: Any) -> str:
    html, _ = page(HERE / template, HERE / "report.js", **values)
    return html


def page(template: Path, script: Path, *styles: Path, connect: str = "'none'", **values: Any) -> tuple[str, str]:
    """A page in our design, and its Content-Security-Policy: nothing is fetched, no script runs but ours.

    `template` extends `shell.html.j2`; `styles` go on from the report's; `connect` is where the script may ask for
    data, in the policy's words.
    """
    style = Markup("").join(_text(one) for one in (HERE / "report.css", *styles))
    scripts = _text(HERE / "shell.js") + _text(script)
    digest = base64.b64encode(hashlib.sha256(scripts.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    shell = {"style": style, "script": scripts, "policy": Markup(policy)}  # noqa: S704
    return _environment(template.parent).get_template(template.name).render(**shell, **values), policy


def fingerprint() -> str:
    """Hash of everything that makes a page of data: a report made by another page is another report."""
    files = (
        "page.py",
        "figures.py",
        "stats.py",
        "tables.py",
        "quality.py",
        "words.py",
        "shell.html.j2",
        "table.html.j2",
        "report.html.j2",
    )
    own = (*files, "report.css", "shell.js", "report.js")
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in own)).hexdigest()


def _text(file: Path) -> Markup:
    """A file of ours, put into the page as it is."""
    return Markup(file.read_text())  # noqa: S704


def embedded(value: Any) -> Markup:
    """JSON for a `<script type="application/json">`: no text in it can end the element or open a comment."""
    text = json.dumps(finite_or_none(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))  # noqa: S704


@cache
def _environment(folder: Path) -> Environment:
    loader = FileSystemLoader([folder, HERE])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
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
        heading=heading,
        gpus=gpus,
        pretty=lambda value: json.dumps(finite_or_none(value), indent=2, ensure_ascii=False, default=str),
    )
    return environment


# --- names -------------------------------------------------------------------------------------------------------


def short_name(model: str) -> str:
    """A hub id as it is; of a path or a URI the last part."""
    return model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", ".", "~", "s3://")) else model


def label(model: str) -> str:
    """How people write the label of an evaluated model or an objective."""
    return NAMES.get(model, model)


def objective(stage: StageRecord) -> str:
    """What a training learned, with the ablation of its critiques if it had one."""
    critique = Critique.model_validate(stage.inputs.get("critique", {}))
    return name_of(stage.name.removeprefix("train-"), critique)


def heading(column: str, table: Table) -> str:
    """A column of the comparison: the benchmark, or how many benchmarks the mean is over."""
    return f"mean of {len(table.averaged)}" if column == MEAN else column


def cut(text: str, most: int = TEXT_LIMIT) -> str:
    """The beginning of a very long text, with a note of what is left out."""
    return text if len(text) <= most else f"{text[:most]}\n[cut here: {count(len(text) - most)} more characters]"


def moment(time: str, *, with_day: bool = True) -> str:
    return datetime.fromisoformat(time).astimezone(UTC).strftime("%-d %B %Y, %H:%M" if with_day else "%H:%M")


# --- the head ----------------------------------------------------------------------------------------------------


def _head(report: ReportData, quality: Quality | None) -> dict[str, Any]:
    names = models(report)
    objectives = [objective(stage) for stage in report.stages if stage.name.startswith("train-")]
    return {
        "verdicts": verdicts(comparisons(report)) or [_without_comparison(report)],
        "data_cautions": data_cautions(quality) if quality else [],
        "cautions": cautions(report),
        "shown": CAUTIONS,
        "student": names.get("student", ""),
        "teacher": names.get("teacher", ""),
        "objectives": ", ".join(objectives),
        "when": _when(report.stages),
        "prompt_tokens": total_of(report.stages, "prompt_tokens"),
        "generated_tokens": total_of(report.stages, "generated_tokens"),
        "seconds": total_of(report.stages, "seconds"),
        "gpu_hours": (hours := gpu_hours(report.stages)),
        "all_gpu_hours": math.fsum(hours.values()),
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
        f"{len(group) - better - worse} (p < {NOISE} each)",
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


def _robustness_chart(points: Sequence[Point]) -> dict[str, Any] | None:
    """Accuracy over the share of corrupted critiques: a line, each point with its interval, in percent of the plot."""
    if not points:
        return None
    ticks = nice_ticks(min(one.low for one in points), max(one.high for one in points))
    low, high, most = ticks[0], ticks[-1], max(one.rate for one in points) or 1.0

    def y(share: float) -> float:
        return 100 - _scaled(share, low, high)

    xs = [_scaled(one.rate, 0.0, most) for one in points]
    rates = {one.rate: [other.accuracy for other in points if other.rate == one.rate] for one in points}
    told = [
        f"{100 * one.rate:g}{THIN}% corrupted \u00b7 accuracy {percent(one.accuracy)} "
        f"({percent(one.low)} to {percent(one.high)}) \u00b7 {one.run}"
        for one in points
    ]
    return {
        "line": _path(
            [_scaled(rate, 0.0, most) for rate in rates],
            [y(math.fsum(found) / len(found)) for found in rates.values()],
        ),
        "bars": [(x, y(one.low), y(one.high)) for x, one in zip(xs, points, strict=True)],
        "places": [(x, y(one.accuracy)) for x, one in zip(xs, points, strict=True)],
        "y_ticks": [(f"{100 * tick:g}{THIN}%", y(tick)) for tick in ticks],
        "x_ticks": [(f"{100 * rate:g}{THIN}%", _scaled(rate, 0.0, most)) for rate in _apart(rates, most / 12)],
        "points": embedded([[x, y(one.accuracy), text] for x, one, text in zip(xs, points, told, strict=True)]),
        "told": told,
    }


def _apart(values: Iterable[float], distance: float) -> list[float]:
    """Of rising values those that are far enough from the one before to be written."""
    kept: list[float] = []
    for value in values:
        if not kept or value - kept[-1] >= distance:
            kept.append(value)
    return kept


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


# --- data quality ------------------------------------------------------------------------------------------------


def _quality(quality: Quality, report: ReportData) -> dict[str, Any]:
    """Measures as (name, share, what it is of, what it means), those of no rows left out; lengths; what was graded."""
    everything = [
        ("Critiques without a verdict", quality.missing, "all rows", "not named right or wrong"),
        ("Refinement is the answer", quality.unchanged, "all rows", "the same words, but for white space"),
        ("Near-duplicate prompts", quality.near_duplicates, "all prompts",
         "equal to an earlier one but for numbers, case and punctuation"),
    ]  # fmt: skip
    prepare = next((stage.rejections for stage in report.stages if stage.name == "prepare"), {})
    top = max((one.high for one in quality.lengths.values()), default=0) or 1
    return {
        "rows": quality.rows,
        "measures": everything + _graded_measures(quality),
        "graded": quality.graded,
        "lengths": [
            (text, one, {"low": one.low, "high": one.high, "accuracy": one.median})
            for text, one in quality.lengths.items()
        ],
        "top": top,
        "removed": {reason: prepare[reason] for reason in ("duplicate", "contaminated") if reason in prepare},
    }


def _graded_measures(quality: Quality) -> list[tuple[str, Share, str, str]]:
    graded = quality.graded
    if graded is None:
        return []
    measures = [
        ("Right drafts", graded.drafts_right, "graded rows", "the student's answer has the reference's result"),
        ("Right refinements", graded.refinements_right, "graded rows", "what the student learns to say"),
        ("Mended drafts", graded.mended, "wrong drafts", "the refinement is right"),
        ("Broken drafts", graded.broken, "right drafts", "the refinement is wrong"),
        ("Right verdicts", graded.verdicts_right, "verdicts given",
         f"the same verdict for every draft would have {percent(graded.constant)}"),
        ("Leaked answers", graded.leaks, "drafts without the reference's answer",
         f"the critique tells it; a critique of another row does by chance in {percent(graded.chance.share)}"),
    ]  # fmt: skip
    return [measure for measure in measures if measure[1].n]


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
    """The quadruples that the page carries, and after them the rejected rows; only these have a stage."""
    rows = (*(report.quadruples.shown if report.quadruples else ()), *report.rejected)
    return [
        {name: cut(value) if isinstance(value, str) else value for name, value in row.model_dump().items()}
        for row in rows
    ]
