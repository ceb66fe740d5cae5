"""Runs compared, for the terminal."""

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
from cgd_stages.report.page import heading
from cgd_stages.results import comparison
from cgd_stages.results.formatting import count, percent, points, spread

STYLES = {"better": "green", "worse": "red", "noise": "dim"}
NOTE = (
    "Accuracy with its 95 % interval, and the difference to base in percentage points: better or worse than chance "
    "explains, or noise. * is the highest of its column, which may be noise too."
)


def joined_reports(reports: Mapping[str, bytes]) -> comparison.Table:
    """One table of several `report.json`, by where each came from. Raises UserError."""
    read = [_read(source, data) for source, data in reports.items()]
    if len(read) < 2:
        raise UserError(f"there is nothing to compare {', '.join(reports)} with", hint="Name two runs or more.")
    times = Counter(name for name, _ in read)
    # Runs of one name, in two namespaces or one after the other, are told apart by where they came from.
    named = zip(reports, read, strict=True)
    return comparison.joined({name if times[name] == 1 else source: table for source, (name, table) in named})


def _read(source: str, data: bytes) -> tuple[str, comparison.Table]:
    """Name and table of a run."""
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
    """The table and its legend; what differs by the seed alone taken together, and accuracy over corrupted critiques,
    where there are such runs."""
    parts: list[RenderableType] = [_results(table), plain(NOTE, "dim")]
    if seeds := comparison.over_seeds(table):
        parts += ["", _seeds(table, seeds)]
    if curve := comparison.robustness(table):
        parts += ["", _curve(curve)]
    return parts


def _results(table: comparison.Table) -> Table:
    shown = Table(box=None, pad_edge=False)
    shown.add_column("model", no_wrap=True)
    shown.add_column("run")
    for column in table.columns:
        asked = table.questions.get(column)
        head = plain(heading(column, table)).append(f"\nn = {count(asked.n)}" if asked else "")
        shown.add_column(head, justify="right")
    shown.add_column("tokens", justify="right")
    for line in table.lines:
        cells = [*(_cell(table, line, column) for column in table.columns), _tokens(line)]
        shown.add_row(plain(line.name, "bold"), ", ".join(line.runs), *cells)
    return shown


def _cell(table: comparison.Table, line: comparison.Line, column: str) -> Text:
    cell = table.cell(line, column)
    if cell is None:
        return plain("-", "dim")
    best = cell.accuracy == table.best(column)
    text = plain(f"{'* ' if best else ''}{percent(cell.accuracy)}", "bold" if best else "")
    text.append(f"\n{100 * cell.low:.1f} - {100 * cell.high:.1f}", style="not bold dim")
    if difference := cell.difference:
        told = f"\n{points(difference.value)} {difference.outcome}"
        text.append(told, style=f"not bold {STYLES[difference.outcome]}")
    return text.append("\n")


def _tokens(line: comparison.Line) -> Text:
    if line.mean is None:
        return plain("-", "dim")
    text = plain(count(line.mean.tokens))
    return text.append(f"\n{line.mean.longer:.2f} x base", style="dim") if line.mean.longer else text


def _seeds(table: comparison.Table, seeds: list[comparison.Seeds]) -> Table:
    title = "Over seeds: mean accuracy and standard deviation, in %"
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    shown.add_column("model", no_wrap=True)
    shown.add_column("runs")
    for column in table.columns:
        shown.add_column(heading(column, table), justify="right")
    for one in seeds:
        found = [one.columns.get(column) for column in table.columns]
        cells = [spread(each.mean, each.deviation) if each else "-" for each in found]
        shown.add_row(one.name, ", ".join(one.runs), *cells)
    return shown


def _curve(curve: list[comparison.Point]) -> Table:
    shown = Table(title="CGD over corrupted critiques", title_justify="left", box=None, pad_edge=False)
    for column in ("corrupted", "accuracy", "95 % interval"):
        shown.add_column(column, justify="right")
    shown.add_column("run")
    for one in curve:
        interval = f"{100 * one.low:.1f} - {100 * one.high:.1f}"
        shown.add_row(percent(one.rate), percent(one.accuracy), interval, one.run)
    return shown
