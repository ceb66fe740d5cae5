"""Which rows are learned, where several refinements were drawn of an answer or the grader has a say.

First `select` chooses among the refinements of one answer:

first           the first that refine has kept
shortest-right  the shortest right one; the first, if none is right
all-right       every right one; the first, if none is right

Then `keep` judges each row that is left:

all             every row stays
right           rows with a right refinement stay
one-right       of each prompt the first row with a right refinement stays

A row whose reference holds no answer, or that the grader could not decide on, counts as not right. Every objective
learns from the rows that stay, whichever text of a row it learns.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, islice

from cgd_stages.contract import Keep, Select
from cgd_stages.errors import UserError
from cgd_stages.grading.grader import Grader
from cgd_stages.quality.marks import final_answer
from cgd_stages.store.rows import Key, Row, key_of

NOT_SELECTED, WRONG, UNGRADED, SURPLUS = "not_selected", "wrong", "ungraded", "surplus"
"""Why a row does not stay: another refinement of its answer was selected; its refinement is wrong, or not known to be
right or wrong; or another row of its prompt stays."""
DETAILS = {
    NOT_SELECTED: "another refinement of the same answer was selected",
    WRONG: "the refinement is wrong",
    UNGRADED: "the refinement is not known to be right: the reference holds no answer, or the grader could not decide",
    SURPLUS: "another row of the same prompt has a right refinement",
}
"""The reasons in words."""
BATCH = 512
"""Rows whose texts are in memory at a time."""


@dataclass(frozen=True)
class Judged:
    """What decides on a row."""

    key: Key
    right: bool | None
    """Whether its refinement is right; None: not known."""
    tokens: int
    """The length of its refinement. Of a server that counts no tokens: in characters."""


def judges(select: Select, keep: Keep) -> bool:
    """Whether the choice needs grades."""
    return select != "first" or keep != "all"


def judged(rows: Iterable[Row], grader: Grader | None) -> list[Judged]:
    """What decides on each of the rows; without a grader nothing is known to be right.

    Raises UserError when a grader finds no reference to grade with.
    """
    found: list[Judged] = []
    waiting = iter(rows)
    while batch := list(islice(waiting, BATCH)):
        rights: dict[Key, bool | None] = {}
        if grader is not None:
            gradable = [row for row in batch if final_answer(row["reference"] or "") is not None]
            grades = grader.grade_all((row["reference"], row["refinement"]) for row in gradable)
            for row, grade in zip(gradable, grades, strict=True):
                rights[key_of(row)] = None if grade.grade_error else grade.correct
        found += [Judged(key_of(row), rights.get(key_of(row)), _length(row)) for row in batch]
    if grader is not None and found and all(row.right is None for row in found):
        raise UserError(
            "spec.training.keep or spec.generation.refine.select asks for right refinements, but no reference ends on "
            "an answer to grade refinements with",
            hint="Set spec.prompts.fields.reference to a column of answers, or leave keep and select out.",
        )
    return found


def _length(row: Row) -> int:
    return row["refinement_tokens"] or len(row["refinement"])


def left_out(rows: Iterable[Judged], *, draws: int, select: Select, keep: Keep) -> dict[Key, str]:
    """The rows that do not stay, each with the reason. `draws` refinements were drawn of each answer. The order of the
    rows does not matter."""
    reasons: dict[Key, str] = {}
    seen: set[str] = set()
    """Prompts of which a right row stays."""
    ordered = sorted(rows, key=lambda row: row.key)
    for _, group in groupby(ordered, key=lambda row: (row.key[0], row.key[1] // draws)):
        refinements = list(group)
        selected = _selected(refinements, select)
        for row in refinements:
            if row not in selected:
                reasons[row.key] = NOT_SELECTED
            elif reason := _unkept(row, keep, seen):
                reasons[row.key] = reason
    return reasons


def _selected(refinements: list[Judged], select: Select) -> list[Judged]:
    """Of the refinements of one answer, in the order of their samples."""
    right = [row for row in refinements if row.right]
    match select:
        case "shortest-right" if right:
            return [min(right, key=lambda row: (row.tokens, row.key))]
        case "all-right" if right:
            return right
        case _:
            return refinements[:1]


def _unkept(row: Judged, keep: Keep, seen: set[str]) -> str:
    """Why `keep` leaves the row out; empty if it stays. `seen` gets the prompts whose row stays."""
    if keep == "all":
        return ""
    if not row.right:
        return UNGRADED if row.right is None else WRONG
    if keep == "one-right" and row.key[0] in seen:
        return SURPLUS
    seen.add(row.key[0])
    return ""
