"""Grading: what is taken as the answer, what counts as equal, and what happens when the grader itself fails."""

from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest
from support import broken_graders

from cgd_stages.errors import TransientError
from cgd_stages.grading import grader as grading
from cgd_stages.grading.grader import FoundAnswer, Grade, Grader, find_answer, reference_answer


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
        ("The answer is 3 and 5.", "3, 5", "text"),
        (r"The solutions are $x=1$, $x=-2$ and $x = 4$ as shown.", "x=1, x=-2, x = 4", "text"),
        ("The answer is 3 for 5 people.", "3", "text"),
        ("3 boxes of 4 make 12", "12", "text"),
        ("It costs $1,250.50 in all.", "$1,250.50", "text"),
        ("half of it, 1/2", "1/2", "text"),
        ("a share of 25 %", "25 %", "text"),
        ("I do not know.", "", "none"),
        ("", "", "none"),
    ],
)
def test_the_answer_is_found_and_it_is_told_where(output: str, text: str, source: str) -> None:
    assert find_answer(output) == FoundAnswer(text, source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("16 eggs\n#### 18", "18"),
        ("#### 70,000", "70,000"),
        (r"Therefore $\boxed{\left( 3, \frac{\pi}{2} \right)}$.", r"\left( 3, \frac{\pi}{2} \right)"),
        (" 18 ", "18"),
        ('["$1$, $-2$"]', "$1$, $-2$"),
        ('["1", "2"]', "1, 2"),
        ("[1, 2]", "[1, 2]"),
        (r"\text{Evelyn}", r"\text{Evelyn}"),
    ],
)
def test_a_reference_is_read_in_each_of_its_forms(reference: str, value: str) -> None:
    assert reference_answer(reference) == value


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, seconds=20) as grader:
        yield grader


def test_the_grader_grades_in_its_own_process(grader: Grader) -> None:
    grades = grader.grade_all(
        [("#### 18", r"so \boxed{\frac{36}{2}}"), ("#### 18", "She makes 17 dollars."), ("#### 18", "no idea")]
    )
    assert grades == [
        Grade(r"\frac{36}{2}", "boxed", correct=True, rule="value"),
        Grade("17", "text", correct=False, rule="value"),
        Grade("", "none", correct=False),
    ]


def test_every_grade_tells_the_rule_that_decided(grader: Grader) -> None:
    pairs = [
        (r"12\text{ cm}", r"\boxed{12\text{ m}}"),
        ("1, 2", r"\boxed{2} and \boxed{1}"),
        ("3", r"\boxed{3}"),
        ("3", "?"),
    ]
    assert [(one.correct, one.rule) for one in grader.grade_all(pairs)] == [
        (False, "unit"), (True, "several"), (True, "spelling"), (False, ""),
    ]  # fmt: skip
    assert grader.grade("0.5", r"\boxed{0.49}", "0.1") == Grade("0.49", "boxed", correct=True, rule="tolerance")


def test_an_expression_that_cannot_be_parsed_is_no_error_of_the_grader_but_a_wrong_answer(grader: Grader) -> None:
    assert grader.grade("18", r"\boxed{\frac{1}{}}") == Grade(r"\frac{1}{}", "boxed", correct=False, rule="value")


@pytest.mark.parametrize(("serve", "error"), [(broken_graders.hanging, "timeout"), (broken_graders.crashing, "crash")])
def test_a_worker_that_hangs_or_dies_is_an_outcome_of_its_own_and_is_replaced(
    serve: Callable[[Connection], None], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Grader(workers=1, seconds=2) as grader:
        with monkeypatch.context() as broken:
            broken.setattr(grading, "_serve", serve)
            assert grader.grade("18", "19") == Grade("19", "text", correct=False, grade_error=error)
        assert grader.grade("18", "19") == Grade("19", "text", correct=False, rule="value")


@pytest.mark.parametrize(
    ("serve", "seconds", "reason"),
    [
        (broken_graders.never_ready, 2.0, "was not ready within 2 s"),
        (broken_graders.ending_at_once, 60.0, "ended with 9"),
    ],
)
def test_workers_that_cannot_start_end_the_stage(
    serve: Callable[[Connection], None], seconds: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grading, "_serve", serve)
    monkeypatch.setattr(grading, "START_SECONDS", seconds)
    with Grader(workers=2) as grader, pytest.raises(TransientError, match=f"does not start: it {reason}"):
        grader.grade_all([("18", "19"), ("18", "20"), ("18", "21")])


def test_an_expression_that_cannot_be_computed_is_told_as_an_error_or_a_time_out() -> None:
    with Grader(workers=1, seconds=2) as grader:
        grade = grader.grade("18", r"\boxed{9^{9^{9^{9}}} + \sqrt{2}}")
    assert not grade.correct
    assert grade.grade_error


@pytest.mark.parametrize("output", ["It is 4.", "The answer is Evelyn.", r"\boxed{1/2}"])
def test_each_of_several_right_answers_is_right(output: str) -> None:
    with Grader(workers=1) as grader:  # the same spelling needs no worker
        assert grader.grade('{"any": ["4", "Evelyn", "1/2"]}', output).correct


def test_an_answer_that_is_none_of_several_is_wrong() -> None:
    with Grader(workers=1) as grader:
        assert grader.grade(r'{"any": ["\\boxed{4}", "2"]}', "It is 0.5.") == Grade(
            "0.5", "text", correct=False, rule="value"
        )
        assert grader.grade(r'{"any": ["7", "\\frac{1}{2}"]}', "It is 0.5.").correct
        assert not grader.grade('["4", "5"]', "It is 4.").correct


def test_a_grader_that_fails_on_one_of_several_right_answers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with Grader(workers=1) as grader:
        verdicts = iter([(grading.UNDECIDED, "timeout"), (grading.Verdict(False, "value"), "")])
        monkeypatch.setattr(grader._workers[0], "ask", lambda *_: next(verdicts))
        assert grader.grade('{"any": ["1", "2"]}', "It is 3.").grade_error == "timeout"
