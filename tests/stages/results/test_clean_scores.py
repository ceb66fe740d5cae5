"""Scores without the questions that training has met in other words."""

from typing import Any

import pytest
from support.report_builders import report_data, samples

from cgd_stages.results.model import Decontamination, Paraphrased
from cgd_stages.results.scores import clean_scores, figures, scores, uncompared
from cgd_stages.results.statistics import wilson


def met(*questions: str, **changes: Any) -> Decontamination:
    given: dict[str, Any] = {
        "paraphrases": "keep",
        "similarity": 0.5,
        "compared": ("sums",),
        "prepare_rows": 4,
        "check_rows": 3,
        "questions": tuple(
            Paraphrased(benchmark="sums", question=one, rows=1, id="r", sample=0, text="prompt", similarity=0.8)
            for one in questions
        ),
    }
    return Decontamination(**(given | changes))


def test_questions_that_training_has_met_are_left_out_with_the_same_interval() -> None:
    data = report_data(decontamination=met("q00", "q04", "elsewhere"))  # base ++------, cgd +-+++---
    base, cgd = clean_scores(data)
    assert (base.model, base.paraphrased, base.n, base.clean_n) == ("base", 2, 8, 6)
    assert (base.accuracy, base.clean_accuracy) == (2 / 8, 1 / 6)
    assert (cgd.accuracy, cgd.clean_accuracy) == (4 / 8, 2 / 6)
    assert (cgd.clean_low, cgd.clean_high) == pytest.approx(wilson(2, 6))
    assert [(one.low, one.high) for one in (base, cgd)] == [(one.low, one.high) for one in scores(data)]


def test_a_question_of_the_same_id_on_another_benchmark_stays() -> None:
    other = samples("+-", benchmark="other")
    evaluations = {"cgd": (*other, *samples("++"))}
    first, second = clean_scores(
        report_data(evaluations=evaluations, decontamination=met("q00", compared=("sums", "other")))
    )
    assert [(one.benchmark, one.paraphrased) for one in (first, second)] == [("other", 0), ("sums", 1)]


def test_where_every_question_is_met_nothing_is_left_to_say() -> None:
    data = report_data(evaluations={"cgd": samples("+-")}, decontamination=met("q00", "q01"))
    (score,) = clean_scores(data)
    assert (score.clean_n, score.clean_accuracy, score.clean_low, score.clean_high) == (0, None, None, None)


def test_what_was_not_compared_has_no_clean_score_and_is_named() -> None:
    evaluations = {"cgd": (*samples("+", benchmark="IFEval"), *samples("+", benchmark="other"), *samples("+"))}
    decontamination = met(compared=("sums", "IFEval"), unchecked={"IFEval": "no hub"})
    data = report_data(evaluations=evaluations, decontamination=decontamination)
    assert [score.benchmark for score in clean_scores(data)] == ["sums"]
    told = {"IFEval": "no hub", "other": "prompts.decontaminate.against does not name it"}
    assert uncompared(data) == told
    document = figures(data)["decontamination"]
    assert (document["uncompared"], document["scores"][0]["cleanN"]) == (told, 1)


def test_without_rows_that_were_kept_there_is_one_accuracy() -> None:
    assert clean_scores(report_data(decontamination=met(paraphrases="remove"))) == []
    assert clean_scores(report_data()) == []
    assert figures(report_data())["decontamination"] is None
