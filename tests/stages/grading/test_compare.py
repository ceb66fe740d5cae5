"""Equality of answers: by which rule two are the same, and that no rule is too kind."""

import pytest
from support.answer_pairs import DIFFERENT, EQUAL, RULES

from cgd_stages.grading.compare import Verdict, compare


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_two_spellings_of_one_value_are_equal(reference: str, answer: str) -> None:
    assert compare(reference, answer).equal


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_two_values_are_never_equal(reference: str, answer: str) -> None:
    assert not compare(reference, answer).equal


@pytest.mark.parametrize(
    ("rule", "reference", "answer"), [(rule, one, answer) for rule, one, equals, _ in RULES for answer in equals]
)
def test_a_rule_accepts_what_says_the_same(rule: str, reference: str, answer: str) -> None:
    verdict = compare(reference, answer)
    assert verdict.equal
    assert verdict.rule in (rule, "spelling")


@pytest.mark.parametrize(("reference", "answer"), [(one, answer) for _, one, _, others in RULES for answer in others])
def test_a_rule_refuses_what_says_something_else(reference: str, answer: str) -> None:
    assert not compare(reference, answer).equal


def test_the_rule_that_decided_is_told() -> None:
    told = {rule: compare(one, answer).rule for rule, one, answers, _ in RULES for answer in answers[-1:]}
    assert told == {rule: rule for rule in told}


@pytest.mark.parametrize(
    ("reference", "answer", "tolerance", "verdict"),
    [
        ("0.5", "0.59", "1e-1", Verdict(True, "tolerance")),
        ("0.5", "0.61", "1e-1", Verdict(False, "tolerance")),
        ("0.5", "0.59", "", Verdict(False, "value")),
        ("2", "2.05", "0.1", Verdict(True, "tolerance")),
        (r"\sqrt{2}", "1.414", "0.001", Verdict(True, "tolerance")),
        ("0.5, 7", "7.05 and 0.509", "0.01,0.1", Verdict(True, "several")),
        ("0.5, 7", "7.05 and 0.509", "0.1,0.01", Verdict(False, "several")),
        ("3.464", r"2\sqrt{3}", "4%", Verdict(True, "tolerance")),
        ("3.464", "3.7", "4%", Verdict(False, "tolerance")),
        ("14", "14.2", "4%", Verdict(False, "value")),
        ("[0.5, 2.5]", "[0.51, 2.45]", "4%", Verdict(True, "interval")),
        ("x", "y", "0.1", Verdict(False, "value")),
    ],
)
def test_numbers_may_be_off_only_where_the_benchmark_says_so(
    reference: str, answer: str, tolerance: str, verdict: Verdict
) -> None:
    assert compare(reference, answer, tolerance) == verdict
