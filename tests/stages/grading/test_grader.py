"""Grading an output in a process of its own, and what happens when the grader itself fails."""

from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest
from support import broken_graders

from cgd_stages.errors import TransientError
from cgd_stages.grading import grader as grading
from cgd_stages.grading.grader import Grade, Grader
from cgd_stages.text.references import any_of


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
        Grade("17 dollars", "text", correct=False, rule="value"),
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


@pytest.mark.parametrize(
    "reference",
    [
        r"<think>Is it \boxed{3}? No.</think> The answer is 17.",
        "<think>12 + 5 = 3</think>\n\n17",
        any_of(["<think>Not \\boxed{3}.</think>seventeen apples", "<think>\\boxed{3}?</think>17"]),
    ],
)
def test_the_thought_of_a_reference_is_never_right(grader: Grader, reference: str) -> None:
    outputs = [r"\boxed{17}", r"\boxed{3}"]
    assert [grader.grade(reference, output).correct for output in outputs] == [True, False]


def test_a_reference_that_never_ends_its_thought_has_no_right_answer(grader: Grader) -> None:
    assert not grader.grade(r"<think>It is \boxed{3}", r"\boxed{3}").correct


def test_an_expression_that_cannot_be_parsed_is_no_error_of_the_grader_but_a_wrong_answer(grader: Grader) -> None:
    assert grader.grade("18", r"\boxed{\frac{1}{}}") == Grade(r"\frac{1}{}", "boxed", correct=False, rule="value")


@pytest.mark.parametrize(("serve", "error"), [(broken_graders.hanging, "timeout"), (broken_graders.crashing, "crash")])
def test_a_worker_that_hangs_or_dies_is_an_outcome_of_its_own_and_is_replaced(
    serve: Callable[[Connection], None], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Grader(workers=1, seconds=2) as grader:
        with monkeypatch.context() as broken:
            broken.setattr(grading, "_serve", serve)
            assert grader.grade("18", r"\boxed{x}") == Grade("x", "boxed", correct=False, grade_error=error)
        assert grader.grade("18", r"\boxed{x}") == Grade("x", "boxed", correct=False, rule="value")


def test_a_deadline_counts_processor_time_so_a_busy_machine_gives_the_same_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grading, "_serve", broken_graders.waiting)
    with Grader(workers=1, seconds=0.5) as grader:
        assert grader.grade("18", r"\boxed{x}").correct


def test_a_worker_that_no_system_starts_ends_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(grading.SpawnProcess, "start", full)
    with Grader(workers=1) as grader, pytest.raises(TransientError, match=r"does not start.*temporarily unavailable"):
        grader.grade_all([("18", r"\boxed{x}")])


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
        grader.grade_all([("18", r"\boxed{x}"), ("18", r"\boxed{y}"), ("18", r"\boxed{z}")])


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
        assert grader.grade('{"any": ["1", "2"]}', r"\boxed{x}").grade_error == "timeout"
