"""Which rows are learned: select among the refinements of an answer, keep by the grade."""

import itertools
from typing import Any

import pytest

from cgd_stages.contract import Keep, Select
from cgd_stages.errors import UserError
from cgd_stages.grading.grader import Grade
from cgd_stages.quality.selection import Judged, judged, judges, left_out
from cgd_stages.store.rows import Row


def rows(prompt: str, *marks: tuple[bool | None, int]) -> list[Judged]:
    """The rows of a prompt, in the order of their samples: right, and length."""
    return [Judged((prompt, sample), right, tokens) for sample, (right, tokens) in enumerate(marks)]


def kept(found: list[Judged], *, draws: int = 1, select: Select = "first", keep: Keep = "all") -> set[tuple[str, int]]:
    reasons = left_out(found, draws=draws, select=select, keep=keep)
    return {row.key for row in found} - reasons.keys()


MIXED = rows("a", (False, 5), (True, 9), (True, 7), (None, 1), (False, 3), (False, 2))
"""Two answers with three refinements each; no refinement of the second is right."""


@pytest.mark.parametrize(
    ("select", "samples"),
    [("first", {0, 3}), ("shortest-right", {2, 3}), ("all-right", {1, 2, 3})],
)
def test_select_chooses_among_the_refinements_of_one_answer(select: Select, samples: set[int]) -> None:
    assert kept(MIXED, draws=3, select=select) == {("a", sample) for sample in samples}


@pytest.mark.parametrize(
    ("select", "keep", "samples"),
    [
        ("first", "right", set()),
        ("shortest-right", "right", {2}),
        ("all-right", "right", {1, 2}),
        ("all-right", "one-right", {1}),
    ],
)
def test_keep_judges_what_was_selected(select: Select, keep: Keep, samples: set[int]) -> None:
    assert kept(MIXED, draws=3, select=select, keep=keep) == {("a", sample) for sample in samples}


def test_each_reason_is_told() -> None:
    found = [*MIXED, *rows("b", (True, 1), (True, 1), (False, 1), (None, 1))]
    reasons = left_out(found, draws=1, select="first", keep="one-right")
    assert reasons == {
        ("a", 0): "wrong",
        ("a", 2): "surplus",
        ("a", 3): "ungraded",
        ("a", 4): "wrong",
        ("a", 5): "wrong",
        ("b", 1): "surplus",
        ("b", 2): "wrong",
        ("b", 3): "ungraded",
    }
    assert left_out(MIXED, draws=3, select="first", keep="all")[("a", 1)] == "not_selected"


def test_the_first_refinement_is_the_first_that_was_kept() -> None:
    assert kept([row for row in MIXED if row.key[1] != 0], draws=3) == {("a", 1), ("a", 3)}


def test_one_right_row_stays_of_each_prompt() -> None:
    found = [*rows("a", (False, 1), (True, 9), (True, 1)), *rows("b", (False, 1)), *rows("c", (True, 1))]
    assert kept(found, keep="one-right") == {("a", 1), ("c", 0)}
    assert kept(found, keep="right") == {("a", 1), ("a", 2), ("c", 0)}


def test_of_equally_short_refinements_the_first_is_selected() -> None:
    assert kept(rows("a", (True, 3), (True, 3)), draws=2, select="shortest-right") == {("a", 0)}


def test_the_order_of_the_rows_does_not_matter() -> None:
    found = [*MIXED[:4], *rows("b", (True, 1))]
    expected = left_out(found, draws=3, select="all-right", keep="one-right")
    for order in itertools.permutations(found):
        assert left_out(order, draws=3, select="all-right", keep="one-right") == expected


def test_only_a_choice_by_grades_needs_the_grader() -> None:
    assert not judges("first", "all")
    assert judges("all-right", "all")
    assert judges("first", "one-right")


class Marking:
    """A grader that is right where the refinement is the reference, and cannot decide on a question mark."""

    def grade_all(self, pairs: Any) -> list[Grade]:
        return [Grade(b, "text", correct=a == b, grade_error="timeout" if b == "?" else "") for a, b in pairs]


def stored(number: int, reference: str | None, refinement: str) -> Row:
    return {
        "id": f"{number}",
        "sample": 0,
        "reference": reference,
        "refinement": refinement,
        "refinement_tokens": number,
    }


def test_where_no_tokens_are_counted_the_shortest_is_that_of_the_fewest_characters() -> None:
    given = [stored(0, "4", "It is 4 then") | {"sample": 0}, stored(0, "4", "4") | {"sample": 1}]
    found = judged(given, None)
    assert [row.tokens for row in found] == [12, 1]


def test_rows_without_an_answer_to_grade_with_are_not_known_to_be_right() -> None:
    prose = "Nobody grades this reference: it ends on no answer, and it is long."
    given = [stored(1, "4", "4"), stored(2, "4", "5"), stored(3, None, "4"), stored(4, prose, "4"), stored(5, "4", "?")]
    assert [row.right for row in judged(given, Marking())] == [True, False, None, None, None]  # type: ignore[arg-type]
    assert [row.tokens for row in judged(given, None)] == [1, 2, 3, 4, 5]


def test_a_choice_by_grades_without_references_is_refused() -> None:
    with pytest.raises(UserError, match=r"spec\.training\.keep .* no reference ends on an answer") as caught:
        judged([stored(1, None, "4"), stored(2, None, "4")], Marking())  # type: ignore[arg-type]
    assert "fields.reference" in caught.value.hint
