"""The report's figures, against hand-made runs."""

import math

import pytest
from support.report_builders import report_data, sample, samples, stage, steps

from cgd_stages.results import statistics
from cgd_stages.results.model import UNFINISHED_THOUGHT, Sample
from cgd_stages.results.scores import (
    changed,
    comparisons,
    exported_step,
    figures,
    finite_or_none,
    models,
    moving_mean,
    scores,
    thinned,
)


def test_a_score_counts_what_was_cut_not_found_and_not_graded_apart() -> None:
    outputs = (
        sample("a", correct=True, tokens=10),
        sample("b", correct=False, finish_reason="length", tokens=30),
        sample("c", correct=False, answer_source="none", tokens=20),
        sample("d", correct=False, grade_error="timeout", tokens=20),
    )
    (score,) = scores(report_data(evaluations={"base": outputs}))
    assert (score.n, score.correct, score.truncated, score.unparsed, score.ungraded) == (4, 1, 1, 1, 1)
    assert score.unfinished == 0
    assert (score.accuracy, score.mean_tokens, score.median_tokens, score.p90_tokens) == (0.25, 20.0, 20.0, 30.0)
    assert (score.low, score.high) == statistics.wilson(1, 4)
    assert [at.k for at in score.pass_at] == [1]


def test_an_output_whose_thought_never_ended_has_no_answer_and_is_counted_as_such() -> None:
    outputs = (
        sample("a", correct=False, answer_source="none"),
        sample("b", correct=False, answer_source=UNFINISHED_THOUGHT, finish_reason="length"),
        sample("c", correct=False, answer_source=UNFINISHED_THOUGHT),
    )
    (score,) = scores(report_data(evaluations={"base": outputs}))
    assert (score.unparsed, score.unfinished, score.truncated, score.refused) == (3, 2, 1, 0)


def tries(*marks: str) -> tuple[Sample, ...]:
    """For each question its outputs: + is right, - is wrong; each costs as many tokens as its number says."""
    return tuple(
        sample(f"q{i:02d}", correct=mark == "+", sample=number, tokens=number + 1)
        for i, question in enumerate(marks)
        for number, mark in enumerate(question)
    )


def test_several_outputs_count_as_shares_of_their_question() -> None:
    (score,) = scores(report_data(evaluations={"base": tries("+++++", "+----", "-----")}))
    assert (score.n, score.samples, score.outputs, score.correct) == (3, 5, 15, 6)
    assert score.accuracy == pytest.approx(0.4)
    assert (score.low, score.high) == statistics.share_interval([1, 0.2, 0])
    assert [(at.k, at.share, at.tokens) for at in score.pass_at] == [
        (1, pytest.approx(0.4), 3.0),
        (2, pytest.approx(1.4 / 3), 6.0),
        (4, pytest.approx(1.8 / 3), 12.0),
        (5, pytest.approx(2 / 3), 15.0),
    ]


def test_models_with_several_outputs_are_compared_question_by_question() -> None:
    before, after = tries("++--", "----", "+++-", "++--", "----"), tries("+++-", "++++", "++--", "+--+", "----")
    (one,) = comparisons(report_data(evaluations={"base": before, "cgd": after}))
    assert (one.n, one.samples, one.fixed, one.broken, one.both, one.neither) == (5, 4, 2, 1, 1, 1)
    assert (one.before, one.after, one.difference) == pytest.approx((0.35, 0.55, 0.2))
    assert (one.low, one.high) == statistics.difference_interval([0.25, 1, -0.25, 0, 0])
    assert one.p == statistics.sign_flip([1, 4, -1, 0, 0])
    assert one.outcome == "noise"


def test_a_comparison_tells_how_much_longer_the_outputs_are() -> None:
    longer = {"base": samples("++", tokens=100), "cgd": samples("++", tokens=440)}
    assert [one.token_ratio for one in comparisons(report_data(evaluations=longer))] == [4.4]
    silent = {"base": samples("++", tokens=0), "cgd": samples("++")}
    assert [one.token_ratio for one in comparisons(report_data(evaluations=silent))] == [None]


def test_a_question_that_changed_is_shown_once_with_outputs_that_show_it() -> None:
    data = report_data(evaluations={"base": tries("+---", "++-+", "+-"), "cgd": tries("-+++", "+-+-", "-+")})
    shown = [
        (one.kind, one.base.question[1], one.base.sample, one.base.correct, one.after.correct)
        for one in changed(data.evaluations)
    ]
    assert shown == [("fixed", "q00", 1, False, True), ("broken", "q01", 1, True, False)]


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
    assert [(one.kind, one.base.id) for one in changed(report_data().evaluations)] == [
        ("fixed", "q02"),
        ("fixed", "q03"),
        ("fixed", "q04"),
        ("broken", "q01"),
    ]
    assert len(changed(report_data().evaluations, most=1)) == 2


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


def test_the_exported_step_is_what_the_training_says_whatever_its_losses() -> None:
    log = tuple(step.model_copy(update={"validation_loss": float(step.step)}) for step in steps(6))
    trained = stage("train-cgd", 0, 10, facts={"metrics": {"exported_step": 4.0}})
    under_way = stage("train-sft", 10, 20)
    assert exported_step(trained, log) is log[3]
    assert exported_step(under_way, log) is None
    told = figures(report_data(stages=(trained, under_way), training={"train-cgd": log, "train-sft": steps(3)}))
    assert {name: step["step"] for name, step in told["exported"].items()} == {"train-cgd": 4}


def test_a_rival_is_compared_but_fixes_nothing_by_training() -> None:
    data = report_data(evaluations={"base": samples("+-"), "selfrefine": samples("++", tokens=30)})
    (one,) = comparisons(data)
    assert (one.trained, one.difference, one.token_ratio) == ("selfrefine", 0.5, 3.0)
    assert changed(data.evaluations) == []
