"""The comparison of runs, for the terminal."""

import json
from collections import Counter
from collections.abc import Mapping

from pydantic import ValidationError
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cgd_cli.terminal import plain
from cgd_stages.contract import RunRef
from cgd_stages.errors import UserError
from cgd_stages.report import head_to_head
from cgd_stages.report.page import heading
from cgd_stages.results import comparison
from cgd_stages.results.formatting import count, percent, points, probability, spread
from cgd_stages.results.head_to_head import HeadToHead, head_to_heads, without_answers

STYLES = {"better": "green", "worse": "red", "noise": "dim"}
NOTE = (
    "Accuracy with its 95 % interval, and the difference to base in percentage points: better or worse than chance "
    "explains, or noise. * is the highest of its column, which may be noise too."
)
PAIRS_NOTE = (
    "Differences in percentage points on the questions that both models have a grade for, with 95 % intervals. p is of "
    "the exact McNemar test, with several outputs or seeds of a test over flips of the questions' signs; it is "
    "corrected by Holm for the pairs of one model in one column."
)


def joined_reports(reports: Mapping[str, bytes]) -> comparison.Table:
    """One table of several `report.json`; the keys say where each came from. Raises UserError."""
    tables = {source: _read(source, data) for source, data in reports.items()}
    if len(tables) < 2:
        raise UserError(f"there is nothing to compare {', '.join(reports)} with", hint="Name two runs or more.")
    uses = Counter(name for name, _ in tables.values())
    # Runs that share a name (in two namespaces, or one after the other) go by their source.
    named = {name if uses[name] == 1 else source: table for source, (name, table) in tables.items()}
    return comparison.joined(named)


def report_table(source: str, data: bytes) -> comparison.Table:
    """The table of one `report.json`, which came from `source`. Raises UserError."""
    name, table = _read(source, data)
    return comparison.joined({name: table})


def _read(source: str, data: bytes) -> tuple[str, comparison.Table]:
    """The name and the table of a run."""
    try:
        report = json.loads(data)
        return RunRef.model_validate(report["run"]).name, comparison.Table.model_validate(report["table"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = "is not valid" if isinstance(error, ValidationError) else f"has no {error}"
        raise UserError(
            f"{source}: the report has no table that this version can read ({why})",
            hint="Apply the run once more under another name: everything but its report is stored already.",
        ) from error


def shown(table: comparison.Table) -> list[RenderableType]:
    """The table and its legend; the trained models against each other; then means over runs that differ only in their
    seed, and the accuracy over the rate of wrong critiques, if the table has such trainings."""
    parts: list[RenderableType] = [_results(table), plain(NOTE, "dim"), *_against_each_other(table)]
    if seeds := comparison.over_seeds(table):
        parts += ["", _seeds(table, seeds)]
    if curves := comparison.robustness(table):
        parts += ["", _curves(curves)]
    return parts


def _results(table: comparison.Table) -> Table:
    results = Table(box=None, pad_edge=False)
    results.add_column("model", no_wrap=True)
    results.add_column("run")
    for column in table.columns:
        questions = table.questions.get(column)
        head = plain(heading(column, table)).append(f"\nn = {count(questions.n)}" if questions else "")
        results.add_column(head, justify="right")
    results.add_column("tokens", justify="right")
    for line in table.lines:
        tokens = plain("-", "dim")
        if mean := line.mean:
            tokens = plain(count(mean.tokens)).append(f"\n{mean.longer:.2f} x base" if mean.longer else "", "dim")
        cells = (_cell(table, line, column) for column in table.columns)
        results.add_row(plain(line.name, "bold"), ", ".join(line.runs), *cells, tokens)
    return results


def _cell(table: comparison.Table, line: comparison.Line, column: str) -> Text:
    cell = table.cell(line, column)
    if cell is None:
        return plain("-", "dim")
    best = cell.accuracy == table.best(column)
    text = plain(f"{'* ' if best else ''}{percent(cell.accuracy)}", "bold" if best else "")
    text.append(f"\n{100 * cell.low:.1f} - {100 * cell.high:.1f}", style="not bold dim")
    if difference := cell.difference:
        words = f"\n{points(difference.value)} {difference.outcome}"
        text.append(words, style=f"not bold {STYLES[difference.outcome]}")
    return text.append("\n")


def _against_each_other(table: comparison.Table) -> list[RenderableType]:
    """The headline, and a line for each pair of trained models."""
    parts: list[RenderableType] = []
    if pairs := head_to_heads(table):
        for sentence in head_to_head.headline(table, pairs):
            parts += ["", plain(sentence["claim"], "bold"), plain(f"{sentence['detail']}.", "dim")]
        lines = Table(title="Trained models against each other", title_justify="left", box=None, pad_edge=False)
        lines.add_column("pair")
        for column in table.columns:
            lines.add_column(plain(heading(column, table)), justify="right")
        for row in head_to_head.rows(pairs):
            other = plain(f"minus {row.other}", "not bold")
            name = plain(row.one, "bold").append("\n").append_text(other).append("\n")
            lines.add_row(name, *(_pair(row.cells.get(column)) for column in table.columns))
        parts += ["", lines, plain(PAIRS_NOTE, "dim")]
    if silent := without_answers(table):
        parts += ["", plain(head_to_head.unpaired(silent), "yellow")]
    return parts


def _pair(pair: HeadToHead | None) -> Text:
    if pair is None:
        return plain("-", "dim")
    gap = pair.difference
    text = plain(f"{points(gap.value)} {gap.outcome}", STYLES[gap.outcome])
    details = [f"{points(gap.low)} to {points(gap.high)}", probability(pair.corrected), f"n = {count(pair.n)}"]
    if gap.outcome == "noise":
        details.append(head_to_head.in_brief(pair))
    if pair.left_out:
        details.append(f"{count(pair.left_out)} left out")
    if pair.one.seeds > 1 or pair.other.seeds > 1:
        details += [head_to_head.seeds(pair.one), head_to_head.seeds(pair.other)]
    return text.append_text(plain("".join(f"\n{detail}" for detail in details) + "\n", "not bold dim", lines=True))


def _seeds(table: comparison.Table, seeds: list[comparison.Seeds]) -> Table:
    title = "Over seeds: mean accuracy and standard deviation, in %"
    means = Table(title=title, title_justify="left", box=None, pad_edge=False)
    means.add_column("model", no_wrap=True)
    means.add_column("runs")
    for column in table.columns:
        means.add_column(heading(column, table), justify="right")
    for model in seeds:
        spreads = [model.columns.get(column) for column in table.columns]
        cells = [spread(cell.mean, cell.deviation) if cell else "-" for cell in spreads]
        means.add_row(model.name, ", ".join(model.runs), *cells)
    return means


def _curves(curves: list[comparison.Curve]) -> Table:
    lines = Table(title="CGD over the share of wrong critiques", title_justify="left", box=None, pad_edge=False)
    lines.add_column("wrong critiques")
    for column in ("rows", "of the examples", "accuracy", "95 % interval"):
        lines.add_column(column, justify="right")
    lines.add_column("run")
    for curve in curves:
        for point in curve.points:
            interval = f"{100 * point.low:.1f} - {100 * point.high:.1f}"
            figures = map(percent, (point.rate, point.wrong, point.accuracy))
            lines.add_row(curve.name, *figures, interval, point.run)
    return lines
