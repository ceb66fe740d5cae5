"""The report as one HTML file that needs no network: data in, page out.

Outputs of models are shown as text: templates escape them, embedded JSON holds no `<`, and the page's policy runs no
script but ours.
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
from cgd_stages.quality.marks import Quality, Share, share
from cgd_stages.quality.near_duplicates import ALIKE
from cgd_stages.report import figure, head_to_head, words
from cgd_stages.report.plots import Held, loss_chart, nice_ticks, pass_charts, rank, robustness_chart, sparks
from cgd_stages.report.reasons import reasons
from cgd_stages.report.summary import head, label, objective
from cgd_stages.results.beside import beside
from cgd_stages.results.comparison import MEAN, Table, over_seeds, robustness, table_of
from cgd_stages.results.formatting import THIN, count, duration, number, percent, points, probability, spread
from cgd_stages.results.head_to_head import head_to_heads, without_answers
from cgd_stages.results.model import ReportData, StageRecord, Step, at
from cgd_stages.results.scores import (
    Score,
    clean_scores,
    comparisons,
    exported_step,
    finite_or_none,
    gpus,
    scores,
    uncompared,
)

HERE = Path(__file__).parent
REMOVED = ("duplicate", "near_duplicate", "contaminated")
"""The reasons of prompts that prepare rejects although they are sound."""
TEXT_LIMIT = 4000
"""The most characters of a text that the page shows."""


def render(report: ReportData, quality: Quality | None = None) -> str:
    """The page. The same data give the same bytes."""
    table = table_of(report)
    pairs = head_to_heads(table)
    return _page(
        "report.html.j2",
        title=f"{report.run.name} \u00b7 CGD run report",
        run=report.run,
        manifest=words.manifest(report),
        asked=words.asked(report),
        places=words.places(report),
        made_with=words.made_with(report),
        found=(found := words.found_stages(report)),
        told_of_found=words.told_of_found(found),
        outcome=figure.outcome(report),
        head=head(report, quality, table, pairs),
        quality=_quality(quality, report) if quality and quality.rows else None,
        table=table,
        pairs=head_to_head.rows(pairs),
        reasons=reasons(report, quality),
        curve=robustness_chart(robustness(table)),
        beside=beside(report, table) if report.published else None,
        results=_results(report),
        tries=_tries(report),
        timeline=_timeline(report.stages),
        funnel=_funnel(report.stages),
        trainings=_trainings(report),
        quadruples=report.quadruples,
        rejected=report.rejected,
        changes=report.changes,
        audit=report.audit,
        decontamination=report.decontamination,
        clean=clean_scores(report),
        uncompared=uncompared(report),
        stages=report.stages,
        embedded=embedded(_browser(report)),
    )


def render_comparison(table: Table) -> str:
    """The page of several runs: their table, the trained models against each other, the spread of trainings that differ
    in their seed alone, and accuracy over the share of wrong critiques where trainings had some."""
    runs = list(dict.fromkeys(run for line in table.lines for run in line.runs))
    curve = robustness_chart(robustness(table))
    pairs = head_to_heads(table)
    return _page(
        "compare.html.j2",
        title="CGD runs compared",
        table=table,
        runs=runs,
        verdicts=head_to_head.headline(table, pairs),
        pairs=head_to_head.rows(pairs),
        unpaired=head_to_head.unpaired(silent) if (silent := without_answers(table)) else "",
        curve=curve,
        seeds=over_seeds(table),
    )


def _page(template: str, **values: Any) -> str:
    html, _ = page(HERE / template, HERE / "report.js", **values)
    return html


def page(template: Path, script: Path, *styles: Path, connect: str = "'none'", **values: Any) -> tuple[str, str]:
    """A page in our design, and its Content-Security-Policy: the page fetches nothing and runs no script but ours.

    `template` extends `shell.html.j2`; `styles` come after the report's; `connect` is the policy's `connect-src`, from
    which the script may fetch data.
    """
    style = Markup("").join(_text(file) for file in (HERE / "report.css", *styles))
    scripts = _text(HERE / "shell.js") + _text(script)
    digest = base64.b64encode(hashlib.sha256(scripts.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    shell = {"style": style, "script": scripts, "policy": Markup(policy)}  # noqa: S704
    return _environment(template.parent).get_template(template.name).render(**shell, **values), policy


def fingerprint() -> str:
    """Hash of all code that turns data into the page. Another page gives another report."""
    rooms = [HERE, *(HERE.parent / room for room in ("results", "quality"))]
    files = sorted(file for room in rooms for file in room.iterdir() if file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _text(file: Path) -> Markup:
    """A file of ours, which the page contains as it is."""
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
        short=words.short_name,
        label=label,
        cut=cut,
        tail=tail,
        probability=probability,
        seeds=head_to_head.seeds,
        tested=head_to_head.tested,
        in_brief=head_to_head.in_brief,
        spread=spread,
        heading=heading,
        embedded=embedded,
        named=words.named,
        gpus=gpus,
        pretty=lambda value: json.dumps(finite_or_none(value), indent=2, ensure_ascii=False, default=str),
    )
    return environment


# --- names -------------------------------------------------------------------------------------------------------


def heading(column: str, table: Table) -> str:
    """The heading of a column of the comparison: the benchmark, or the number of benchmarks in the mean."""
    return f"mean of {len(table.averaged)}" if column == MEAN else column


def cut(text: str, most: int = TEXT_LIMIT) -> str:
    """The text, or the beginning of a very long text with the number of characters that follow."""
    return text if len(text) <= most else f"{text[:most]}\n[cut here: {count(len(text) - most)} more characters]"


def tail(text: str, most: int = TEXT_LIMIT) -> str:
    """The text, or the end of a very long text with the number of characters before it."""
    return text if len(text) <= most else f"[cut here: {count(len(text) - most)} characters before]\n{text[-most:]}"


# --- results -----------------------------------------------------------------------------------------------------


def _results(report: ReportData) -> list[dict[str, Any]]:
    """A block for each benchmark: its scores, the ticks of their common axis, and its comparisons."""
    all_comparisons = comparisons(report)
    blocks = []
    for benchmark, group in itertools.groupby(scores(report), key=lambda score: score.benchmark):
        members: list[Score] = list(group)
        blocks.append(
            {
                "benchmark": benchmark,
                "scores": members,
                "ticks": nice_ticks(0.0, max(score.high for score in members)),
                "comparisons": [pair for pair in all_comparisons if pair.benchmark == benchmark],
            }
        )
    return blocks


def _tries(report: ReportData) -> list[dict[str, Any]]:
    """A block for each benchmark with several outputs of a question: Pass@k as plots and as a table."""
    blocks = []
    for benchmark, group in itertools.groupby(scores(report), key=lambda score: score.benchmark):
        members = sorted(group, key=lambda score: rank(score.model))
        ladders = {score.model: {at.k: at for at in score.pass_at} for score in members}
        columns = sorted({k for ladder in ladders.values() for k in ladder})
        if columns != [1]:
            plots = pass_charts(members)
            blocks.append({"benchmark": benchmark, "plots": plots, "columns": columns, "ladders": ladders})
    return blocks


# --- timeline ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A stage in the timeline. `left` and `width` are percents; `left` is None when the stage has no times."""

    stage: StageRecord
    left: float | None
    width: float
    rate: float | None
    """Generated tokens a second, in training supervised tokens."""


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
    ticks = [(share, length * share / 100) for share in (0, 25, 50, 75)] if spans else []
    return {
        "bars": bars,
        "ticks": ticks,
        "busy": length if spans else None,
        "wall": wall,
        "paused": wall > length * 1.05 + 1,
    }


def _without_pauses(spans: list[tuple[float, float]]) -> Any:
    """A clock that leaves out long pauses, as between an earlier run and this one that uses its stages. Each
    such pause takes a quarter of `allowed` seconds."""
    allowed = max(60.0, sum(end - start for start, end in spans) / 10)
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
    return facts.metrics.get("tokens_per_second") or facts.generated_tokens / facts.seconds or None


# --- rows --------------------------------------------------------------------------------------------------------


def _funnel(stages: Sequence[StageRecord]) -> list[dict[str, Any]]:
    """The rows of the stages that pass rows on, scaled to the largest. Evaluation counts other rows, and check counts
    the rows of all trainings together."""
    counted = [
        (stage, stage.facts.rows)
        for stage in stages
        if stage.facts and stage.facts.rows.total and stage.name.kind not in ("evaluate", "check")
    ]
    most = max((rows.total for _, rows in counted), default=1)
    return [
        {
            "name": stage.name,
            "rows": rows,
            "share": rows.done / rows.total,
            "kept": 100 * rows.done / most,
            "lost": 100 * rows.rejected / most,
            "reasons": sorted(stage.rejections.items(), key=lambda item: (-item[1], item[0])),
            "balanced": rows.total == rows.done + rows.rejected,
        }
        for stage, rows in counted
    ]


# --- data quality ------------------------------------------------------------------------------------------------


def _quality(quality: Quality, report: ReportData) -> dict[str, Any]:
    """The measures (name, share, of which rows, meaning), the grades, and the lengths of the texts."""
    measures = [
        ("Critiques without a verdict", quality.missing, "all rows", "not named right or wrong"),
        ("Refinement is the answer", quality.unchanged, "all rows", "the same words, but for white space"),
        ("Near-duplicate prompts", quality.near_duplicates, "all prompts",
         f"{100 * ALIKE:g}{THIN}% of the word triples shared with another, numbers, case and punctuation aside"),
    ]  # fmt: skip
    prepare = next((stage.rejections for stage in report.stages if stage.name == "prepare"), {})
    top = max((length.high for length in quality.lengths.values()), default=0) or 1
    return {
        "rows": quality.rows,
        "measures": measures + _unfinished(report.stages) + _graded_measures(quality),
        "graded": quality.graded,
        "alike": quality.alike,
        "lengths": [
            (text, length, {"low": length.low, "high": length.high, "accuracy": length.median})
            for text, length in quality.lengths.items()
        ],
        "top": top,
        "removed": {reason: prepare[reason] for reason in REMOVED if reason in prepare},
    }


def _unfinished(stages: Sequence[StageRecord]) -> list[tuple[str, Share, str, str]]:
    """The measure of drafts without an end, where the run keeps them."""
    measures = []
    for stage in stages:
        if stage.name == "answer" and stage.facts and stage.inputs.get("unfinished") == "keep":
            told = stage.facts.metrics
            cut, loops = (int(told.get(f"unfinished_{ending}", 0)) for ending in ("length", "repetition"))
            meaning = f"{cut} cut by maxTokens, {loops} that loop; the student reads them and learns none"
            measures.append(("Unfinished drafts", share(cut + loops, stage.facts.rows.done), "all drafts", meaning))
    return measures


def _graded_measures(quality: Quality) -> list[tuple[str, Share, str, str]]:
    """The measures that need grades, without those of no rows."""
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
    """A block for each training: its loss, its figures, and the lengths of its examples."""
    records: dict[str, StageRecord] = {stage.name: stage for stage in report.stages if stage.name.kind == "train"}
    blocks = []
    for name in dict.fromkeys([*records, *report.training]):
        record = records.get(name) or StageRecord(name=name)
        metrics = record.facts.metrics if record.facts else {}
        log = report.training.get(name, ())
        chart = loss_chart(log, exported_step(record, log))
        block = {
            "stage": name,
            "objective": objective(record),
            "chart": chart,
            "exported": _exported(record, chart["held"] if chart else []),
            "sparks": sparks(log),
            "early": _early(log),
            "bare": _bare(metrics),
            "misled": _misled(metrics),
            "critique": record.inputs.get("critique"),
            "metrics": {name: value for name, value in metrics.items() if not name.startswith(LENGTH)},
            "lengths": _lengths(metrics),
            "masked": next((one for one in report.masked if one.stage == name), None),
        }
        if block["chart"] or metrics:
            blocks.append(block)
    return blocks


def _exported(training: StageRecord, held: Sequence[Held]) -> str:
    """Which model the training has exported and why, in a sentence; empty while it has not ended."""
    metrics = training.facts.metrics if training.facts else {}
    if metrics.get("validation_examples") == 0:
        return "No prompts were held out, so the model after the last step is exported."
    if "exported_step" not in metrics or not held:
        return ""
    select = training.inputs["training"]["validation"]["select"]
    loss = held[0 if select == "bare" else -1].name
    why = "as the run asks" if select == "last" else f"whose {loss} is the least"
    return f"Exported is the model after step {count(metrics['exported_step'])} (large points), {why}."


def _early(log: Sequence[Step]) -> list[tuple[int, Share]]:
    """The early looks at the student in training: the steps before them, and its right answers."""
    found: list[tuple[int, Share]] = []
    for step in log:
        asked, right, before = step.early_questions, step.early_accuracy, step.early_accuracy_before
        if asked and right is not None and before is not None:
            found += [] if found else [(0, share(round(before * asked), asked))]
            found.append((step.step, share(round(right * asked), asked)))
    return found


def _bare(metrics: Mapping[str, float]) -> Share | None:
    """The examples whose context is the prompt alone; None where the training has no share of them."""
    if "bare_examples" not in metrics:
        return None
    return share(int(metrics["bare_examples"]), int(metrics["train_examples"] + metrics["validation_examples"]))


def _misled(metrics: Mapping[str, float]) -> Share | None:
    """The learned examples with a miscritique; None where the training reads none."""
    if "misled_examples" not in metrics:
        return None
    return share(int(metrics["misled_examples"]), int(metrics["train_examples"]))


def _lengths(metrics: Mapping[str, float]) -> list[tuple[int, float, float]]:
    """The histogram of lengths. For each bar: the most tokens, the examples, its percent of the largest bar."""
    lengths = {name.removeprefix(LENGTH): value for name, value in metrics.items() if name.startswith(LENGTH)}
    bars = {int(length): value for length, value in lengths.items() if length.isdecimal() and len(length) < 20}
    top = max(bars.values(), default=0.0) or 1.0
    return [(most, bars[most], 100 * bars[most] / top) for most in sorted(bars)]


# --- the browser of quadruples -----------------------------------------------------------------------------------


def _browser(report: ReportData) -> list[dict[str, Any]]:
    """The quadruples that the page shows, then the rejected rows. Only rejected rows have a stage."""
    rows = (*(report.quadruples.shown if report.quadruples else ()), *report.rejected)
    return [
        {name: cut(value) if isinstance(value, str) else value for name, value in row.model_dump().items()}
        for row in rows
    ]
