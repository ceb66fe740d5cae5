"""Grading: what is taken as the answer, what counts as equal, and what happens when the grader itself fails."""

from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import broken_graders
import pytest

from cgd_stages import grading
from cgd_stages.grading import Found, Grade, Grader, equal, find_answer, reference_answer, spell


@pytest.mark.parametrize(
    ("output", "text", "source"),
    [
        (r"So we get \boxed{18}.", "18", "boxed"),
        (r"First \boxed{1}, but really it is \boxed{\frac{1}{2}}", r"\frac{1}{2}", "boxed"),
        (r"The roots are $\boxed{1}$ and $\boxed{-2}$.", "1, -2", "boxed"),
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", "1, 2, 3", "boxed"),
        (r"Step: \boxed{1} is not it. So \boxed{2}", "2", "boxed"),
        (r"\boxed{\text{the set } \{1, 2\}}", r"\text{the set } \{1, 2\}", "boxed"),
        (r"\fbox{7}", "7", "boxed"),
        (r"\boxed 7", "7", "boxed"),
        (r"\boxed{\boxed{7}}", "{7}", "boxed"),
        (r"\boxed{} and then the answer is 4", "4", "text"),
        (r"unclosed \boxed{12", "12", "text"),
        ("16 - 3 = 13\n#### 13", "13", "text"),
        ("The answer is 5. The answer is 18 eggs per day.", "18", "text"),
        ("the final answer is: **$1,250** a year", "$1,250", "text"),
        (r"The answer is $\frac{3}{4}$ of 8.", r"\frac{3}{4}", "text"),
        (r"The answer is $\$32,\!348$.", r"\$32,\!348", "text"),
        ("The answer is Evelyn.", "Evelyn", "text"),
        ("Answer: -3.5", "-3.5", "text"),
        ("3 boxes of 4 make 12", "12", "text"),
        ("It costs $1,250.50 in all.", "$1,250.50", "text"),
        ("half of it, 1/2", "1/2", "text"),
        ("a share of 25 %", "25 %", "text"),
        ("I do not know.", "", "none"),
        ("", "", "none"),
    ],
)
def test_the_answer_is_found_and_it_is_told_where(output: str, text: str, source: str) -> None:
    assert find_answer(output) == Found(text, source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("16 eggs\n#### 18", "18"),
        ("#### 70,000", "70,000"),
        (r"Therefore $\boxed{\left( 3, \frac{\pi}{2} \right)}$.", r"\left( 3, \frac{\pi}{2} \right)"),
        (" 18 ", "18"),
        (r"\text{Evelyn}", r"\text{Evelyn}"),
    ],
)
def test_a_reference_is_read_in_each_of_its_forms(reference: str, value: str) -> None:
    assert reference_answer(reference) == value


EQUAL = [
    ("18", "18"),
    ("18", "18.0"),
    ("18", "018"),
    ("1000", "1,000"),
    ("1,000", "1000"),
    ("58,500", r"58{,}500"),
    (r"10,\!080", "10080"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"\$32,\!348", "32348"),
    (r"\$18.90", "18.9"),
    ("70000", r"\$70,000"),
    ("-5", "\u22125"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac43", r"\dfrac{4}{3}"),
    (r"\frac{14}{3}", r"\frac{28}{6}"),
    (r"1\frac{4}{5}", r"\frac{9}{5}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"11\sqrt2", r"11\sqrt{2}"),
    ("25%", "25"),
    ("25", r"25\%"),
    (r"25\%", "0.25"),
    (r"25\%", "25 percent"),
    (r"90^\circ", "90"),
    (r"90^\circ", r"90^{\circ}"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"864 \mbox{ inches}^2", "864"),
    ("18", "18 eggs"),
    ("18", r"18\text{ dollars}"),
    ("p - q", "-q+p"),
    ("x=5", "5"),
    ("y = 2x + 3", "y=3+2x"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    ("(3,4]", "(3, 4]"),
    (r"(0,9) \cup (9,36)", r"(0, 9)\cup(9, 36)"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("1,-2", "-2, 1"),
    ("3, 5, 7", r"\{7, 5, 3\}"),
    ("2, 5", r"2 \text{ and } 5"),
    ("2, 5", "5 or 2"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    ("B", r"\textbf{(B)}"),
    ("52_8", "52_{8}"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix}-\frac13\\ \frac23\end{pmatrix}"),
]

DIFFERENT = [
    ("18", "19"),
    ("18", "-18"),
    ("18", "180"),
    ("1000", "1"),
    ("(3,100)", "3100"),
    (r"\frac{1}{3}", "0.333333"),
    (r"\frac{2}{3}", "0.67"),
    ("0.1", "0.1000001"),
    ("25%", "25.5"),
    ("25%", r"2500\%"),
    ("25", "0.25"),
    ("3, 5, 7", "3"),
    ("3, 5, 7", "3, 5"),
    ("1,-2", "1, 2"),
    ("(1,2)", "(2,1)"),
    ("(3,4]", "[3,4]"),
    ("(3,4]", "(3,4)"),
    (r"x \in [-2,7]", "[-2,8]"),
    (r"\sqrt{2}", r"\sqrt{3}"),
    (r"\sqrt{2}", "1.414"),
    ("p - q", "q - p"),
    (r"\text{Evelyn}", "Carla"),
    (r"\text{(C)}", "D"),
    ("even", "odd"),
    ("18", ""),
    ("x=5", "x=6"),
]


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_two_spellings_of_one_value_are_equal(reference: str, answer: str) -> None:
    assert equal(reference, answer)


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_two_values_are_never_equal(reference: str, answer: str) -> None:
    assert not equal(reference, answer)


def test_a_trailing_unit_goes_but_words_stay() -> None:
    assert spell(r"864 \mbox{ inches}^2") == "864"
    assert spell(r"\text{Evelyn}") == r"\text{Evelyn}"


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, seconds=20) as grader:
        yield grader


def test_the_grader_grades_in_its_own_process(grader: Grader) -> None:
    grades = grader.grade_all(
        [("#### 18", r"so \boxed{\frac{36}{2}}"), ("#### 18", "She makes 17 dollars."), ("#### 18", "no idea")]
    )
    assert grades == [
        Grade(r"\frac{36}{2}", "boxed", correct=True),
        Grade("17", "text", correct=False),
        Grade("", "none", correct=False),
    ]


def test_an_expression_that_cannot_be_parsed_is_no_error_of_the_grader_but_a_wrong_answer(grader: Grader) -> None:
    assert grader.grade("18", r"\boxed{\frac{1}{}}") == Grade(r"\frac{1}{}", "boxed", correct=False)


@pytest.mark.parametrize(("serve", "error"), [(broken_graders.hanging, "timeout"), (broken_graders.crashing, "crash")])
def test_a_worker_that_hangs_or_dies_is_an_outcome_of_its_own_and_is_replaced(
    serve: Callable[[Connection], None], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Grader(workers=1, seconds=2) as grader:
        with monkeypatch.context() as broken:
            broken.setattr(grading, "_serve", serve)
            assert grader.grade("18", "19") == Grade("19", "text", correct=False, grade_error=error)
        assert grader.grade("18", "19") == Grade("19", "text", correct=False)


def test_an_expression_that_cannot_be_computed_is_told_as_an_error_or_a_time_out() -> None:
    with Grader(workers=1, seconds=2) as grader:
        grade = grader.grade("18", r"\boxed{9^{9^{9^{9}}} + \sqrt{2}}")
    assert not grade.correct
    assert grade.grade_error
