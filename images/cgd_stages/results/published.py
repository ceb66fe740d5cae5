"""Figures that others have published, as a user gives them (`evaluation.published`). Pure.

The file is JSON: {"tables": [...]}, its figures percentages from 0 to 100 as they were printed. A table says where it
is from and whose results it has:

    {"source": "Table 2", "student": "org/name", "teacher": "org/name",
     "averages": {"math": ["MATH-500", "GSM8K"]},
     "rows": [{"method": "CGD", "figures": {"MATH-500": 54.2, "GSM8K": 85.7}, "averages": {"math": 70.0}}]}

`student` and `teacher` may be missing; a row may have a `teacher`, a `critique` (as `training.critique`) and a `source`
of its own.
"""

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated, Any, get_args

from pydantic import Field, ValidationError

from cgd_stages.contract import Contract, Critique, Objective, Published, RivalKind
from cgd_stages.errors import UserError

METHODS = ("base", *get_args(Objective), *get_args(RivalKind))
HINT = "Correct spec.evaluation.published, or the file."
SHOWN = 5
"""The most faults of a file that a message names."""
Figure = Annotated[Decimal, Field(strict=True, ge=0, le=100, decimal_places=6)]
"""In percent, with the digits that were printed."""


class PublishedRow(Contract):
    """A line of a published table."""

    method: str
    """`base`, an objective, or a rival."""
    critique: Critique = Critique()
    teacher: str = ""
    """Where it is not the table's."""
    source: str = ""
    """Such as what the line is called there."""
    figures: dict[str, Figure]
    """Benchmark -> accuracy."""
    averages: dict[str, Figure] = Field(default_factory=dict)
    """Average of the table -> as published."""

    def contradictions(self, averages: Mapping[str, tuple[str, ...]]) -> dict[str, Decimal]:
        """The row's averages that cannot be the means of its figures, with these means in percent. Every printed figure
        may have been rounded: it may be off by half a unit of its last digit."""
        found = {}
        for name, published in self.averages.items():
            figures = [self.figures[benchmark] for benchmark in averages[name] if benchmark in self.figures]
            if len(figures) == len(averages[name]):
                mean, slack = _mean(figures), _mean([*map(_half, figures)]) + _half(published)
                if abs(published - mean) > slack:
                    found[name] = mean
        return found


class PublishedTable(Contract):
    """A published table: the methods of one student."""

    source: Annotated[str, Field(min_length=1)]
    student: str = ""
    """Empty: any."""
    teacher: str = ""
    averages: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Name of an average -> its benchmarks, each with the same weight."""
    rows: tuple[PublishedRow, ...]

    @property
    def benchmarks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for row in self.rows for name in row.figures))


class PublishedFile(Contract):
    tables: tuple[PublishedTable, ...]


def read(text: str, asked: Published) -> tuple[PublishedTable, ...]:
    """The tables of a file that are about the run's student.

    Raises UserError for a file that is wrong, names an unknown benchmark or method, or has no table of that student.
    """
    try:
        file = PublishedFile.model_validate(_parsed(text))
    except ValidationError as error:
        raise UserError(_together(asked, map(_fault, error.errors())), hint=HINT) from error
    except (ValueError, RecursionError) as error:
        raise UserError(_together(asked, [f"it is not JSON: {error}"]), hint=HINT) from error
    if faults := [fault for table in file.tables for fault in _faults(table, asked)]:
        raise UserError(_together(asked, faults), hint=HINT)
    tables = tuple(table for table in file.tables if not table.student or same_model(table.student, asked.student))
    if not tables and not file.tables:
        raise UserError(f"{asked.uri} has no table", hint=HINT)
    if not tables:
        students = ", ".join(dict.fromkeys(table.student for table in file.tables))
        raise UserError(
            f"{asked.uri} has figures of {students}, and none of {asked.student}",
            hint="Name the student there as the run does, or leave spec.evaluation.published out.",
        )
    return tables


def contradictions(tables: Iterable[PublishedTable]) -> Iterator[str]:
    """In words: every average that cannot be the mean of its figures."""
    for table in tables:
        for row in table.rows:
            title = f"{row.method}, teacher {row.teacher}" if row.teacher else row.method
            for name, gives in row.contradictions(table.averages).items():
                printed = row.averages[name]
                yield f"{title}: {name} {printed:f}, its figures give {rounded(gives, printed)}"


def rounded(mean: Decimal, printed: Decimal) -> str:
    """A mean with as many digits as were printed."""
    return f"{mean.quantize(Decimal(1).scaleb(_exponent(printed)), rounding=ROUND_HALF_UP):f}"


def same_model(one: str, other: str) -> bool:
    """Whether two names end in the same part: a model on the hub, and a copy of it in a folder of that name."""
    first, second = (name.rstrip("/").rpartition("/")[2].casefold() for name in (one, other))
    return first == second


def _parsed(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]} stands twice in one object")
        return dict(pairs)

    return json.loads(text, parse_float=Decimal, parse_int=Decimal, object_pairs_hook=once)


def _fault(error: Any) -> str:
    place, value = ".".join(map(str, error["loc"])) or "the file", error["input"]
    shown = f"(it is {value})" if isinstance(value, Decimal) else f'(it is "{value}")' if isinstance(value, str) else ""
    match error["type"]:
        case "model_type":
            return f"{place} must be an object"
        case "missing":
            return f"{place} is missing"
        case "extra_forbidden":
            return f"{place}: there is no such field"
        case "is_instance_of" | "decimal_type":
            return f"{place} must be a number, a percentage {shown}".rstrip()
        case "greater_than_equal" | "less_than_equal" | "finite_number":
            return f"{place} must be a percentage from 0 to 100 {shown}"
        case "decimal_max_places":
            return f"{place} has more than six digits behind the point"
        case _:
            return f"{place}: {error['msg']} {shown}".rstrip()


def _faults(table: PublishedTable, asked: Published) -> Iterator[str]:
    """What is wrong with the names in a table."""
    known, where = asked.benchmarks, f"{table.source}, "
    if not table.rows:
        yield f"{where}there are no rows"
    for average, members in table.averages.items():
        yield from _unknown(f"{where}average {average}: there is no benchmark", members, known)
        if len(set(members)) < len(members) or len(members) < 2:
            yield f"{where}average {average}: it must be of two benchmarks or more, each named once"
        if average in table.benchmarks:
            yield f"{where}{average} names an average and a benchmark"
    seen = set[tuple[str, str, str]]()
    for number, row in enumerate(table.rows, 1):
        place = f"{where}row {number}: "
        yield from _unknown(f"{place}there is no method", [row.method], METHODS)
        yield from _unknown(f"{place}there is no benchmark", row.figures, known)
        yield from _unknown(f"{place}the table has no average", row.averages, tuple(table.averages))
        if not row.figures:
            yield f"{place}there are no figures"
        if row.method != "CGD" and row.critique != Critique():
            yield f"{place}only CGD has a critique of another kind"
        identity = row.method, row.critique.to_json(), row.teacher
        if identity in seen:
            yield f"{place}there is a row of {row.method} with this teacher and critique already"
        seen.add(identity)


def _unknown(said: str, names: Iterable[str] | Mapping[str, Any], known: tuple[str, ...]) -> Iterator[str]:
    by_fold, all_known = {name.casefold(): name for name in known}, ", ".join(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.casefold(), by_fold, n=1)
            yield f"{said} {name} ({f'did you mean {by_fold[near[0]]}?' if near else f'known: {all_known}'})"


def _together(asked: Published, faults: Iterable[str]) -> str:
    found = list(faults)
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{asked.uri}: {'; '.join(found[:SHOWN])}{more}"


def _mean(figures: list[Decimal]) -> Decimal:
    return sum(figures, Decimal()) / len(figures)


def _half(figure: Decimal) -> Decimal:
    """Half a unit of the last digit that was printed."""
    return Decimal(5).scaleb(_exponent(figure) - 1)


def _exponent(figure: Decimal) -> int:
    exponent = figure.as_tuple().exponent
    assert isinstance(exponent, int), "not finite"
    return exponent
