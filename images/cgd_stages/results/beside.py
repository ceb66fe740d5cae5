"""Published figures beside a run's own: the same benchmark, method and student. Pure."""

from collections.abc import Iterator
from typing import Any, Literal, get_args

from cgd_stages.contract import Contract, Objective
from cgd_stages.results.comparison import Cell, Line, Share, Table, mean, name_of
from cgd_stages.results.model import ReportData
from cgd_stages.results.published import PublishedRow, PublishedTable, contradictions, rounded, same_model
from cgd_stages.results.scores import models


class BesideCell(Contract):
    """A published figure and the run's own, fractions of 1. None: it was not published, or the run does not have it."""

    published: Share | None = None
    printed: str = ""
    """The published one as it was printed, in percent."""
    gives: str = ""
    """Of an average that contradicts its own figures: what they give, in percent, with as many digits."""
    ours: Share | None = None
    low: Share | None = None
    high: Share | None = None
    """The 95 % interval of ours."""
    difference: Share | None = None
    """Ours minus the published one; None for an average that contradicts its own figures."""
    side: Literal["above", "inside", "below"] | None = None
    """Where ours lies: inside where the published one is within the interval of ours."""


class BesideRow(Contract):
    """A method. A method that the run has trained several times has a row for each of its models."""

    name: str
    """For people."""
    method: str
    source: str
    teacher: str
    """Of the published figures; empty: none is named."""
    other_teacher: bool = False
    """It is not the run's."""
    model: str = ""
    """The run's: `base`, `cgd`, ...; empty: it has none."""
    cells: dict[str, BesideCell]
    """Benchmark or average -> figures."""


class BesideTable(Contract):
    source: str
    student: str
    columns: tuple[str, ...]
    averages: dict[str, tuple[str, ...]]
    """Those of the columns that are averages -> their benchmarks."""
    rows: tuple[BesideRow, ...]


class Beside(Contract):
    """All tables about the run's student, and what has no counterpart."""

    tables: tuple[BesideTable, ...]
    contradictions: tuple[str, ...]
    """Every published average that cannot be the mean of its figures, in words."""
    not_asked: tuple[str, ...]
    """Published benchmarks that the run does not ask."""
    not_run: tuple[str, ...]
    """Published methods of which the run has no model."""
    not_published: tuple[str, ...]
    """The run's benchmarks and models that no table has."""


def beside(data: ReportData, table: Table) -> Beside:
    """The published figures of a run's report beside those in its table."""
    published, teacher = data.published, models(data).get("teacher", "")
    tables = tuple(_table(table, one, teacher) for one in published)
    rows = [row for one in tables for row in one.rows]
    benchmarks = dict.fromkeys(name for one in published for name in one.benchmarks)
    with_model = {row.model for row in rows}
    ours = [name for name in table.questions if name not in benchmarks]
    ours += [line.name for line in table.lines if line.model not in with_model]
    return Beside(
        tables=tables,
        contradictions=tuple(contradictions(published)),
        not_asked=tuple(name for name in benchmarks if name not in table.questions),
        not_run=tuple(dict.fromkeys(row.name for row in rows if not row.model)),
        not_published=tuple(ours),
    )


def _table(table: Table, published: PublishedTable, teacher: str) -> BesideTable:
    return BesideTable(
        source=published.source,
        student=published.student,
        columns=(*published.benchmarks, *published.averages),
        averages=published.averages,
        rows=tuple(row for one in published.rows for row in _rows(table, published, one, teacher)),
    )


def _rows(table: Table, published: PublishedTable, row: PublishedRow, teacher: str) -> Iterator[BesideRow]:
    its_teacher = "" if row.method == "base" else row.teacher or published.teacher
    lines = [line for line in table.lines if _is_of(line, row)]
    for line in lines or (None,):
        critique = {"critique": row.critique.model_dump()}
        yield BesideRow(
            name=line.name if line else name_of(row.method.lower(), critique),
            method=row.method,
            source=row.source,
            teacher=its_teacher,
            other_teacher=bool(its_teacher and teacher) and not same_model(its_teacher, teacher),
            model=line.model if line else "",
            cells={
                **{name: _cell(line, row, name) for name in published.benchmarks},
                **{name: _average(line, row, published.averages, name) for name in published.averages},
            },
        )


def _is_of(line: Line, row: PublishedRow) -> bool:
    """Whether a model of the run was made by this method."""
    if row.method in get_args(Objective):
        return line.objective == row.method and line.critique == row.critique
    return line.model == row.method.lower()


def _cell(line: Line | None, row: PublishedRow, benchmark: str) -> BesideCell:
    figure, cell = row.figures.get(benchmark), line.cells.get(benchmark) if line else None
    return _joined(BesideCell() if figure is None else BesideCell(published=figure / 100, printed=f"{figure:f}"), cell)


def _average(line: Line | None, row: PublishedRow, averages: dict[str, tuple[str, ...]], average: str) -> BesideCell:
    cells = [line.cells[name] for name in averages[average] if name in line.cells] if line else []
    ours = mean(cells) if len(cells) == len(averages[average]) else None
    if (figure := row.averages.get(average)) is None:
        return _joined(BesideCell(), ours)
    mean_of_figures = row.contradictions(averages).get(average)
    gives = "" if mean_of_figures is None else rounded(mean_of_figures, figure)
    return _joined(BesideCell(published=figure / 100, printed=f"{figure:f}", gives=gives), ours)


def _joined(theirs: BesideCell, ours: Cell | None) -> BesideCell:
    if ours is None:
        return theirs
    changes: dict[str, Any] = {"ours": ours.accuracy, "low": ours.low, "high": ours.high}
    published = theirs.published
    if published is not None and not theirs.gives:
        changes["difference"] = ours.accuracy - published
        changes["side"] = "above" if ours.low > published else "below" if ours.high < published else "inside"
    return theirs.model_copy(update=changes)
