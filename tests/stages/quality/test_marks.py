"""The quality of rows: what is counted, what is graded, what counts as a leak, and what is called bad."""

from collections.abc import Iterator
from typing import Any

import pytest
from support import broken_graders

from cgd_stages.grading import grader as grading
from cgd_stages.grading.grader import Grader
from cgd_stages.quality.marks import (
    Graded,
    Lengths,
    Marks,
    Quality,
    Tally,
    cautions,
    final_answer,
    grade_rows,
    holds,
    quantiles,
    share,
)
from cgd_stages.quality.near_duplicates import outline
from cgd_stages.results.formatting import THIN
from cgd_stages.store.rows import Row


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1) as started:
        yield started


def row(**changes: Any) -> Row:
    given = {
        "id": "0", "sample": 0, "prompt": "What is 2 + 2?", "reference": "#### 4", "answer": "It is 5.",
        "critique": "Add again.", "refinement": "It is 4.", "verdict": "wrong",
    }  # fmt: skip
    tokens = {f"{text}_tokens": 3 for text in ("prompt", "answer", "critique", "refinement")}
    return given | tokens | changes


def graded(grader: Grader, *rows: Row) -> Graded:
    found, _ = grade_rows(rows, grader)
    assert found is not None
    return found


def tallied(*rows: Row) -> Quality:
    tally = Tally()
    for one in rows:
        tally.add(one)
    prompts = {one["id"]: one["prompt"] for one in rows}
    return tally.quality(None, lambda ids: {one: prompts[one] for one in ids})


# --- over all rows


def test_verdicts_and_refinements_that_change_nothing_are_counted() -> None:
    found = tallied(row(verdict=None), row(answer="It is  4.\n", refinement="It is 4."), row(), row())
    assert (found.rows, found.missing.count, found.unchanged.count) == (4, 1, 1)


@pytest.mark.parametrize(
    ("prompt", "alike"),
    [
        ("what is 17 + 3", 1),
        ("What is 2 * 3?", 1),
        ("What was 2 + 2?", 0),
        ("What is the sum of 2 and 2?", 0),
    ],
)
def test_prompts_that_differ_in_numbers_case_and_punctuation_are_near_duplicates(prompt: str, alike: int) -> None:
    assert tallied(row(), row(id="1", prompt=prompt)).near_duplicates.count == alike


STORY = "She sells each of them at the market on the first day of every month and spends half of what she gets on bread"


def test_prompts_that_differ_in_a_few_words_are_near_duplicates_and_the_largest_groups_are_shown() -> None:
    trio = [
        ("a", f"Sue has 3 apples. {STORY}"),
        ("b", f"Sue has 12 apples! {STORY}"),
        ("c", f"Ann has 3 apples. {STORY}"),
    ]
    others = [(f"d{n}", f"How many letters has the word {n * 3}, and how many of them come twice?") for n in "vwxyz"]
    found = tallied(*(row(id=name, prompt=prompt) for name, prompt in trio + others), row(id="c", sample=1))
    assert (found.near_duplicates.count, found.near_duplicates.n) == (2, 8)
    (group,) = found.alike
    assert (group.size, group.examples) == (3, (trio[0][1], trio[1][1]))


def test_samples_of_one_prompt_are_no_duplicates_of_each_other() -> None:
    found = tallied(row(), row(sample=1), row(sample=2))
    assert (found.near_duplicates.count, found.near_duplicates.n) == (0, 1)


def test_prompts_without_words_are_compared_as_they_are() -> None:
    assert outline({"prompt": "?!"}) != outline({"prompt": "!?"})


def test_lengths_are_told_by_their_quantiles() -> None:
    assert quantiles([*range(100, 0, -1)]) == Lengths(low=11, median=51, high=90, most=100)
    assert quantiles([7]) == Lengths(low=7, median=7, high=7, most=7)


def test_no_row_at_all_is_no_crash() -> None:
    found = tallied()
    assert (found.rows, found.lengths, cautions(found)) == (0, {}, [])


# --- what is an answer


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("so it is\n#### 4", "4"),
        (r"Thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("42", "42"),
        ("", None),
        ("The velocity follows from the momentum and the mass.", None),
        ("one\ntwo", None),
        ("<think>It is \\boxed{3}.</think>The velocity follows from the momentum and the mass.", None),
        ("<think>one\ntwo</think>\n\n4", "4"),
        ("<think>It is \\boxed{3}.", None),
    ],
)
def test_prose_is_no_answer_to_hold_a_draft_against(reference: str, answer: str | None) -> None:
    assert final_answer(reference) == answer


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("the total is 4.", "4", True),
        ("the total is 4.5", "4", False),
        ("the total is 14", "4", False),
        ("x4 is free", "4", False),
        ("about $1,234 in all", "1234", True),
        ("so x = -3 holds", "-3", True),
        ("so 5-3 holds", "-3", False),
        ("so 5 - 3 holds", "-3", False),
        ("so x = -5 holds", "5", False),
        ("-5", "5", False),
        ("(-5)", "5", False),
        ("\u22125 it is", "5", False),
        ("it is \u00b15", "5", False),
        ("so 10-5 holds", "5", True),
        ("f(2)-5", "5", True),
        ("- 5 of them", "5", True),
        (r"so -\frac{1}{2}", r"\frac{1}{2}", False),
        ("so x > 5", "5", False),
        ("so x>=5", "5", False),
        (r"so x \le 5", "5", False),
        ("so 5 < x", "5", False),
        ("so x \u2264 5", r"x \leq 5", True),
        ("so x < 5", "x<5", True),
        ("so x <= 5", "x<5", False),
        ("so x < 5.2", "x<5", False),
        (r"in $\left[0, 1\right]$", "[0,1]", True),
        ("non-empty", "empty", True),
        ("the point (1,2)", "(1, 2)", True),
        ("x=3", "x = 3", True),
        (r"we get $\dfrac{1}{2}$ here", r"\frac{1}{2}", True),
        ("The answer is Paris", "paris", True),
        ("anything", "", False),
    ],
)
def test_an_answer_stands_in_a_text_as_a_word_of_its_own(text: str, answer: str, found: bool) -> None:
    assert holds(text, answer) is found


# --- graded


def test_drafts_refinements_and_verdicts_are_held_against_the_reference(grader: Grader) -> None:
    found = graded(
        grader,
        row(),  # mended, and the verdict is right
        row(answer="4", refinement="It is 7.", verdict="right"),  # broken
        row(answer="4", refinement="4", verdict="wrong"),
        row(refinement="It is 6.", verdict=None),
        row(refinement="It is 6.", verdict=None),
    )
    assert found.confusion == {
        "right": {"right": 1, "wrong": 0}, "wrong": {"right": 1, "wrong": 1}, "missing": {"right": 0, "wrong": 2},
    }  # fmt: skip
    counts = {name: (getattr(found, name).count, getattr(found, name).n) for name in Graded.model_fields
              if hasattr(getattr(found, name), "count") and hasattr(getattr(found, name), "n")}  # fmt: skip
    assert counts == {
        "drafts_right": (2, 5), "refinements_right": (2, 5), "broken": (1, 2), "mended": (1, 3),
        "verdicts_right": (2, 3), "leaks": (0, 3), "chance": (0, 3),
    }  # fmt: skip
    assert found.constant == pytest.approx(2 / 3)


def test_each_row_is_given_its_own_marks(grader: Grader) -> None:
    rows = [row(), row(reference=None), row(answer="4", refinement="5")]
    _, marks = grade_rows(rows, grader)
    assert marks == [Marks(False, True), Marks(), Marks(True, False)]


def test_rows_without_a_reference_are_not_graded(grader: Grader) -> None:
    assert grade_rows([row(reference=None), row(reference="a b\nc")], grader)[0] is None
    found = graded(grader, row(), row(reference=None))
    assert (found.sampled, found.rows) == (2, 1)


def test_what_the_grader_cannot_decide_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_serve", broken_graders.hanging)
    with Grader(workers=1, seconds=0.1) as hasty:
        undecided = row(answer=r"It is $\boxed{x + 1}$.")  # numbers are compared without a worker
        found, marks = grade_rows([undecided, row(answer="4", refinement="4")], hasty)
    assert found is not None
    assert (found.rows, found.undecided) == (1, 1)
    assert marks[0] == Marks(None, True)


def test_a_critique_leaks_what_the_draft_does_not_have(grader: Grader) -> None:
    found = graded(
        grader,
        row(critique="It should be 4."),
        row(critique="Add again.", answer="It is 7."),
        row(critique="It should be 4.", answer="Is it 4 or 5? 5."),
    )
    assert (found.leaks.count, found.leaks.n) == (1, 2)
    assert (found.chance.count, found.chance.n) == (1, 2)


def test_one_row_alone_has_no_other_to_leak_by_chance(grader: Grader) -> None:
    assert graded(grader, row(critique="It should be 4.")).chance.n == 0


# --- in words


def quality(**changes: Any) -> Quality:
    """Rows with nothing wrong about them, but for the changes."""
    good = {
        "drafts_right": share(40, 100), "refinements_right": share(90, 100), "broken": share(2, 40),
        "mended": share(52, 60), "verdicts_right": share(80, 100), "leaks": share(10, 60), "chance": share(5, 60),
    }  # fmt: skip
    mine = {name: changes.pop(name) for name in list(changes) if name in good or name == "constant"}
    told = Graded(sampled=100, rows=100, undecided=0, confusion={}, **({"constant": 0.6} | good | mine))
    shares = {name: share(0, 100) for name in ("missing", "unchanged", "near_duplicates")}
    return Quality(**({"rows": 100, "lengths": {}, "graded": told} | shares | changes))


def test_good_rows_are_not_cautioned_against() -> None:
    assert cautions(quality()) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"missing": share(11, 100)}, "11.0 % of the critiques end without a verdict"),
        ({"unchanged": share(21, 100)}, "21.0 % of the refinements repeat the student's answer"),
        ({"near_duplicates": share(21, 100)}, "21.0 % of the prompts nearly repeat another one"),
        ({"verdicts_right": share(59, 100)}, "right for only 59.0 % of 100 drafts"),
        ({"refinements_right": share(69, 100)}, "31.0 % of 100 refinements are wrong"),
        ({"refinements_right": share(80, 100), "drafts_right": share(81, 100)}, "right less often (80.0 %)"),
        ({"broken": share(5, 40)}, "12.5 % of 40 right drafts have a wrong refinement"),
        ({"leaks": share(31, 60)}, "51.7 % of 60 critiques state the reference's answer"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], told: str) -> None:
    (said,) = cautions(quality(**change))
    assert told in said.replace(THIN, " ")


@pytest.mark.parametrize(("keep", "learned"), [("all", True), ("right", False), ("one-right", False)])
def test_wrong_refinements_are_learned_only_where_every_row_is_kept(keep: str, learned: bool) -> None:
    (said,) = cautions(quality(refinements_right=share(69, 100), keep=keep))
    assert ("the student learns wrong answers" in said) == learned


@pytest.mark.parametrize(
    "change",
    [
        {"verdicts_right": share(0, 0)},
        {"refinements_right": share(0, 0)},
        {"broken": share(0, 0), "leaks": share(0, 0)},
    ],
)
def test_a_share_of_nothing_is_no_reason_for_caution(change: dict[str, Any]) -> None:
    assert cautions(quality(**change)) == []


def test_the_figures_are_read_from_their_json_as_they_were() -> None:
    assert Quality.model_validate_json(quality().to_json()) == quality()
