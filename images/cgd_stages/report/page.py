"""The report as one HTML file that asks nothing of any network: data in, page out.

Whatever a model said is shown as text: templates escape, embedded JSON holds no `<`, and the page's own policy lets no
script run but ours.
"""

import base64
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cgd_stages.contract import LENGTH
from cgd_stages.quality.marks import Quality, Share
from cgd_stages.quality.near_duplicates import ALIKE
from cgd_stages.report.plots import loss_chart, nice_ticks, pass_charts, rank, robustness_chart, sparks
from cgd_stages.report.summary import head, label, objective
from cgd_stages.results.comparison import MEAN, Table, over_seeds, robustness, table_of
from cgd_stages.results.formatting import THIN, count, duration, number, percent, points, probability, spread
from cgd_stages.results.model import ReportData, StageRecord, at
from cgd_stages.results.scores import Score, comparisons, finite_or_none, gpus, scores

HERE = Path(__file__).parent
TEXT_LIMIT = 4000
"""Characters of a text that the page carries."""


def render(report: ReportData, quality: Quality | None = None) -> str:
    """The page. The same data give the same bytes."""
    return _page(
        "report.html.j2",
        title=f"{report.run.name} \u00b7 CGD run report",
        run=report.run,
        spec=report.spec,
        head=head(report, quality),
        quality=_quality(quality, report) if quality and quality.rows else None,
        table=table_of(report),
        results=_results(report),
        tries=_tries(report),
        timeline=_timeline(report.stages),
        funnel=_funnel(report.stages),
        trainings=_trainings(report),
        quadruples=report.quadruples,
        rejected=report.rejected,
        changes=report.changes,
        stages=report.stages,
        embedded=embedded(_browser(report)),
    )


def render_comparison(table: Table) -> str:
    """The page of several runs: their table, what differs by the seed alone taken together, and accuracy over corrupted
    critiques where some runs corrupted them."""
    runs = list(dict.fromkeys(run for line in table.lines for run in line.runs))
    curve = robustness_chart(robustness(table))
    seeds = over_seeds(table)
    return _page("compare.html.j2", title="CGD runs compared", table=table, runs=runs, curve=curve, seeds=seeds)


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
    rooms = [HERE, *(HERE.parent / room for room in ("results", "quality"))]
    files = sorted(file for room in rooms for file in room.iterdir() if file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _text(file: Path) -> Markup:
    """A file of ours, put into the page as it is."""
    return Markup(file.read_text())  # noqa: S704


def embedded(value: Any) -> Markup:
    """JSON for a `<script type="application/json">`: no text in it can end the element or open a comment."""
    text = json.dumps(finite_or_none(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
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
        spread=spread,
        heading=heading,
        embedded=embedded,
        gpus=gpus,
        pretty=lambda value: json.dumps(finite_or_none(value), indent=2, ensure_ascii=False, default=str),
    )
    return environment


# --- names -------------------------------------------------------------------------------------------------------


def short_name(model: str) -> str:
    """A hub id as it is; of a path or a URI the last part."""
    return model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", ".", "~", "s3://")) else model


def heading(column: str, table: Table) -> str:
    """A column of the comparison: the benchmark, or how many benchmarks the mean is over."""
    return f"mean of {len(table.averaged)}" if column == MEAN else column


def cut(text: str, most: int = TEXT_LIMIT) -> str:
    """The beginning of a very long text, with a note of what is left out."""
    return text if len(text) <= most else f"{text[:most]}\n[cut here: {count(len(text) - most)} more characters]"


# --- results -----------------------------------------------------------------------------------------------------


def _results(report: ReportData) -> list[dict[str, Any]]:
    """One block a benchmark: its scores, scaled to a common axis, and its comparisons."""
    all_scores, all_comparisons = scores(report), comparisons(report)
    blocks = []
    for benchmark, group in itertools.groupby(all_scores, key=lambda one: one.benchmark):
        members: list[Score] = list(group)
        blocks.append(
            {
                "benchmark": benchmark,
                "scores": members,
                "ticks": nice_ticks(0.0, max(one.high for one in members)),
                "comparisons": [one for one in all_comparisons if one.benchmark == benchmark],
            }
        )
    return blocks


def _tries(report: ReportData) -> list[dict[str, Any]]:
    """One block for each benchmark whose questions some model answered several times: Pass@k, drawn and as a table."""
    blocks = []
    for benchmark, group in itertools.groupby(scores(report), key=lambda one: one.benchmark):
        members = sorted(group, key=lambda one: rank(one.model))
        ladders = {one.model: {at.k: at for at in one.pass_at} for one in members}
        columns = sorted({k for ladder in ladders.values() for k in ladder})
        if columns != [1]:
            plots = pass_charts(members)
            blocks.append({"benchmark": benchmark, "plots": plots, "columns": columns, "ladders": ladders})
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
    counted = [stage for stage in stages if stage.facts and stage.name.kind not in ("evaluate", "check")]
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
         f"{100 * ALIKE:g}{THIN}% of the word triples shared with another, numbers, case and punctuation aside"),
    ]  # fmt: skip
    prepare = next((stage.rejections for stage in report.stages if stage.name == "prepare"), {})
    top = max((one.high for one in quality.lengths.values()), default=0) or 1
    return {
        "rows": quality.rows,
        "measures": everything + _graded_measures(quality),
        "graded": quality.graded,
        "alike": quality.alike,
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
    records: dict[str, StageRecord] = {stage.name: stage for stage in report.stages if stage.name.kind == "train"}
    blocks = []
    for name in dict.fromkeys([*records, *report.training]):
        facts = records[name].facts if name in records else None
        metrics = facts.metrics if facts else {}
        block = {
            "stage": name,
            "objective": objective(records.get(name) or StageRecord(name=name)),
            "chart": loss_chart(report.training.get(name, ())),
            "sparks": sparks(report.training.get(name, ())),
            "metrics": {name: value for name, value in metrics.items() if not name.startswith(LENGTH)},
            "lengths": _lengths(metrics),
        }
        if block["chart"] or metrics:
            blocks.append(block)
    return blocks


def _lengths(metrics: Mapping[str, float]) -> list[tuple[int, float, float]]:
    """The histogram of examples: most tokens, examples, and their share of the largest bar in percent."""
    lengths = {name.removeprefix(LENGTH): value for name, value in metrics.items() if name.startswith(LENGTH)}
    found = {int(length): value for length, value in lengths.items() if length.isdecimal() and len(length) < 20}
    top = max(found.values(), default=0.0) or 1.0
    return [(most, found[most], 100 * found[most] / top) for most in sorted(found)]


# --- the browser of quadruples -----------------------------------------------------------------------------------


def _browser(report: ReportData) -> list[dict[str, Any]]:
    """The quadruples that the page carries, and after them the rejected rows; only these have a stage."""
    rows = (*(report.quadruples.shown if report.quadruples else ()), *report.rejected)
    return [
        {name: cut(value) if isinstance(value, str) else value for name, value in row.model_dump().items()}
        for row in rows
    ]
