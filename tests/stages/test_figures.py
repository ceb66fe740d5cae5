"""The report's figures: intervals and tests against closed forms, counts against hand-made runs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_builders import report_data, sample, samples, steps

from cgd_stages.figures import (
    best_step,
    changes,
    comparisons,
    figures,
    finite_or_none,
    mcnemar,
    models,
    moving_mean,
    paired_interval,
    scores,
    thinned,
    wilson,
)

COUNTS = st.integers(0, 60)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_gives_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_covers_the_truth_95_times_in_100_on_average() -> None:
    n, truths = 32, [i / 100 for i in range(1, 100)]

    def coverage(truth: float) -> float:
        return math.fsum(
            math.comb(n, k) * truth**k * (1 - truth) ** (n - k)
            for k in range(n + 1)
            if wilson(k, n)[0] <= truth <= wilson(k, n)[1]
        )

    assert math.fsum(map(coverage, truths)) / len(truths) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(
    ("fixed", "broken", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (10, 1, 24 / 2048), (3, 1, 0.625)]
)
def test_mcnemar_is_the_two_sided_binomial_tail(fixed: int, broken: int, p: float) -> None:
    assert mcnemar(fixed, broken) == pytest.approx(p)


def test_mcnemar_bears_thousands_of_changes() -> None:
    assert 0 <= mcnemar(5000, 3000) < 1e-50


@given(COUNTS, COUNTS)
def test_mcnemar_does_not_care_which_way_and_is_a_probability(fixed: int, broken: int) -> None:
    assert 0 < mcnemar(fixed, broken) == mcnemar(broken, fixed) <= 1


@given(COUNTS, COUNTS, COUNTS)
def test_the_paired_interval_turns_with_the_models(fixed: int, broken: int, same: int) -> None:
    n = fixed + broken + same
    low, high = paired_interval(fixed, broken, n)
    turned = paired_interval(broken, fixed, n)
    assert (low, high) == pytest.approx((-turned[1], -turned[0]))
    assert -1 <= low <= high <= 1


def test_the_paired_interval_of_an_example_computed_by_hand() -> None:
    assert paired_interval(10, 1, 32) == pytest.approx((0.0769, 0.4525), abs=1e-4)


def test_a_score_counts_what_was_cut_not_found_and_not_graded_apart() -> None:
    outputs = (
        sample("a", correct=True, tokens=10),
        sample("b", correct=False, finish_reason="length", tokens=30),
        sample("c", correct=False, answer_source="none", tokens=20),
        sample("d", correct=False, grade_error="timeout", tokens=20),
    )
    (score,) = scores(report_data(evaluations={"base": outputs}))
    assert (score.n, score.correct, score.truncated, score.unparsed, score.ungraded) == (4, 1, 1, 1, 1)
    assert (score.accuracy, score.mean_tokens) == (0.25, 20.0)


def test_a_comparison_counts_pairs_on_the_same_question() -> None:
    (one,) = comparisons(report_data())
    assert (one.n, one.both, one.fixed, one.broken, one.neither) == (8, 1, 3, 1, 3)
    assert one.difference == 0.25
    assert one.p == 0.625
    assert one.outcome == "noise"


def test_only_questions_that_both_models_answered_are_compared() -> None:
    data = report_data(evaluations={"base": samples("+-"), "cgd": samples("+-++")})
    (one,) = comparisons(data)
    assert one.n == 2


@pytest.mark.parametrize(("base", "after", "outcome"), [("-" * 8, "+" * 8, "better"), ("+" * 8, "-" * 8, "worse")])
def test_a_change_of_every_question_is_no_noise(base: str, after: str, outcome: str) -> None:
    (one,) = comparisons(report_data(evaluations={"base": samples(base), "cgd": samples(after)}))
    assert one.outcome == outcome


def test_each_benchmark_and_each_trained_model_is_compared() -> None:
    two = samples("+-") + samples("--", benchmark="other")
    data = report_data(evaluations={"base": two, "cgd": two, "cft": two})
    assert [(one.trained, one.benchmark) for one in comparisons(data)] == [
        ("cgd", "sums"),
        ("cgd", "other"),
        ("cft", "sums"),
        ("cft", "other"),
    ]


def test_changes_list_what_was_fixed_before_what_was_broken_and_not_too_many() -> None:
    assert [(change.kind, change.base.id) for change in changes(report_data())] == [
        ("fixed", "q02"),
        ("fixed", "q03"),
        ("fixed", "q04"),
        ("broken", "q01"),
    ]
    assert len(changes(report_data(), most=1)) == 2


def test_student_and_teacher_are_named_by_the_stages_that_asked_them() -> None:
    assert models(report_data()) == {"student": "some/student", "teacher": "some/teacher"}
    assert models(report_data(stages=())) == {}


def test_a_moving_mean_keeps_a_straight_line_and_smooths_a_zigzag() -> None:
    assert moving_mean([1, 2, 3, 4, 5], 1) == pytest.approx([1.5, 2, 3, 4, 4.5])
    assert moving_mean([0, 3, 0, 3, 0], 1)[1:4] == pytest.approx([1, 2, 1])


def test_thinning_keeps_the_first_and_the_last_step() -> None:
    few = thinned(steps(1000), 100)
    assert (few[0].step, few[-1].step) == (1, 1000)
    assert len(few) <= 101
    assert thinned(steps(3), 100) == list(steps(3))


def test_what_is_not_finite_becomes_null() -> None:
    assert finite_or_none({"a": [math.nan, math.inf, 1.5], "b": (2, "x")}) == {"a": [None, None, 1.5], "b": [2, "x"]}


def test_report_json_holds_scores_comparisons_stages_and_steps() -> None:
    told = figures(report_data())
    assert [one["accuracy"] for one in told["scores"]] == [0.25, 0.5]
    assert told["comparisons"][0]["outcome"] == "noise"
    assert told["stages"][1]["seconds"] == 30
    assert len(told["training"]["train-cgd"]) == 30
    assert told["quadruples"] == {"total": 1, "verdicts": {"wrong": 1}}


def test_the_best_step_is_the_earliest_of_the_least_finite_validation_losses() -> None:
    losses = [None, 2.0, math.nan, 1.0, 1.0, 3.0]
    log = [step.model_copy(update={"validation_loss": loss}) for step, loss in zip(steps(6), losses, strict=True)]
    chosen = best_step(log)
    assert chosen is not None
    assert chosen.step == 4
    told = figures(report_data(training={"train-cgd": tuple(log), "train-sft": steps(3)}))
    assert {stage: best["step"] for stage, best in told["best"].items()} == {"train-cgd": 4}
