"""Outputs of many kinds, right and wrong, and properties that every grade has."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graded_outputs import OUTPUTS

from cgd_stages.grading.compare import compare
from cgd_stages.grading.extraction import find_answer
from cgd_stages.grading.reference import reference_answer


@pytest.mark.parametrize(("kind", "right", "reference", "output"), OUTPUTS)
def test_an_output_is_graded_by_what_it_says(kind: str, right: bool, reference: str, output: str) -> None:
    found = find_answer(output)
    assert (found.source != "none" and compare(reference_answer(reference), found.text).equal) is right


VALUES = [
    "0", "1", "2", "12", "0.5", "-3", r"\frac{1}{2}", r"\frac{24}{2}", r"\sqrt{2}", r"\frac{2}{\sqrt{2}}", "x+1", "1+x",
    r"2\pi", "1011_2", "11", "10^{-20}", "10^{-21}", r"0.\overline{3}", r"\frac{1}{3}", "1, 2", "2, 1", r"\{1, 2\}",
    "x = 2", "2 = x", "i^2", "-1", "10:30", "1:3", "(1, 2)", "(2, 1)", "[1, 2]", r"\emptyset", "even", "[2]", "12345",
    "12 345",
]  # fmt: skip
"""Values without unit, percent or lettered text."""
KINDS = {"1, 2", "2, 1", "(1, 2)", "(2, 1)", "[1, 2]"}
"""A list without brackets equals a point and a list in brackets of its order, which differ from each other."""


def equal(one: str, other: str) -> bool:
    return compare(one, other).equal


@pytest.mark.parametrize("one", VALUES)
def test_equality_is_reflexive_symmetric_and_transitive(one: str) -> None:
    assert equal(one, one)
    equals = [other for other in VALUES if equal(one, other)]
    assert equals == [other for other in VALUES if equal(other, one)]
    for other in equals:
        for third in equals:
            assert equal(other, third) or {one, other, third} <= KINDS | {r"\{1, 2\}"}


@pytest.mark.parametrize(
    ("one", "between", "other"),
    [
        ("25", "25%", "0.25"),
        ("12 m", "12", "12 cm"),
        ("B", "(B) 12", "12"),
        ("(1, 2)", "1, 2", "[1, 2]"),
        ("x = 5", "5", "y = 5"),
    ],
)
def test_what_stands_between_two_kinds_equals_both_and_they_differ(one: str, between: str, other: str) -> None:
    assert equal(one, between)
    assert equal(other, between)
    assert not equal(one, other)


EXPRESSIONS = [
    r"\frac{1}{2}",
    "12345",
    "(3, 4]",
    r"x^2 + 1",
    r"\{1, 2\}",
    r"\sqrt{2}",
    r"12\text{ cm}",
    "8:15",
    "-7",
    r"\frac{\pi}{3}",
]
SPACES = ["", " ", r"\,", r"\;", r"\ ", "~", r"\!"]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.sampled_from(EXPRESSIONS), st.sampled_from(SPACES), st.sampled_from(SPACES))
def test_spacing_around_an_answer_and_left_and_right_change_no_grade(expression: str, before: str, after: str) -> None:
    sized = expression
    for bracket in ("(", ")", "[", "]", r"\{", r"\}"):
        sized = sized.replace(bracket, (r"\left" if bracket in "([" + r"\{" else r"\right") + bracket)
    spaced = f"{before}{sized}{after}"
    assert equal(expression, spaced)
    assert equal(spaced, expression)
    assert not equal("99", spaced)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=5, unique=True))
def test_order_counts_in_points_and_not_in_sets_or_lists(numbers: list[int]) -> None:
    turned = [*numbers[1:], numbers[0]]
    values, others = ([str(number) for number in group] for group in (numbers, turned))
    assert equal(", ".join(values), ", ".join(others))
    assert equal(rf"\{{{', '.join(values)}\}}", rf"\{{{', '.join(others)}\}}")
    assert equal(", ".join(values), f"{', '.join(others[:-1])} and {others[-1]}")
    assert not equal(f"({', '.join(values)})", f"({', '.join(others)})")
    assert not equal(f"[{', '.join(values)}]", f"[{', '.join(others)}]")


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(-999, 999), st.sampled_from(["m", "cm", "hours", r"\text{ miles}", "dollars", r"^\circ"]))
def test_a_unit_is_ignored_where_one_side_alone_has_it(number: int, unit: str) -> None:
    assert equal(str(number), f"{number} {unit}")
    assert equal(f"{number} {unit}", str(number))
    assert not equal(f"{number} {unit}", str(number + 1))
    assert not equal(f"{number} {unit}", f"{number} kg")


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.fractions(max_denominator=9999), st.fractions(max_denominator=9999))
def test_two_fractions_are_equal_when_their_values_are(one: object, other: object) -> None:
    assert equal(str(one), str(one).replace("/", " / "))
    assert equal(str(one), str(other)) is (one == other)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(alphabet=r"\{}()[]$*_^=,.!:/0123456789abxAB" + " \n", max_size=80))
def test_every_text_has_an_answer_or_none_and_raises_nothing(text: str) -> None:
    found = find_answer(text)
    assert (found.source == "none") == (found.text == "")
