"""What the page says of trainings by other losses than the likelihood of a text."""

from typing import Any

from support.report_builders import report_data, stage, steps

from cgd_stages.report.summary import known_before, told_apart


def scored(mass: float) -> Any:
    facts = {"metrics": {"top_mass": mass, "scored_tokens": 200.0}}
    return report_data(stages=(stage("score-refined", facts=facts, inputs={"topK": 16}),))


def test_likeliest_tokens_that_hold_little_of_the_distribution_are_told() -> None:
    (sentence,) = told_apart(scored(150))
    assert sentence.startswith("score-refined: the 16 likeliest tokens hold 75")
    assert told_apart(scored(190)) == []


def test_a_loss_that_is_no_likelihood_or_of_no_untrained_student_says_nothing_of_what_it_knew() -> None:
    low = [step.model_copy(update={"loss": 0.1}) for step in steps(3)]
    for inputs, told in (
        ({"objective": "CGD"}, 1),
        ({"objective": "DPO"}, 0),
        ({"objective": "CGD", "start": "0123"}, 0),
    ):
        report = report_data(stages=(stage("train-x", inputs=inputs),), training={"train-x": tuple(low)})
        assert len(known_before(report)) == told, inputs
