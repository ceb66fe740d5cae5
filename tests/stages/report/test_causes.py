"""What the page says of a run in which a gain is unlikely, or cannot be seen."""

from collections.abc import Iterable
from typing import Any

import pytest
from support.report_builders import report_data, samples, stage, steps

from cgd_stages.contract import Rows
from cgd_stages.report.causes import causes
from cgd_stages.results.formatting import THIN
from cgd_stages.results.model import ReportData, StageRecord, Step

MANY = {"evaluations": {name: samples("+-" * 100) for name in ("base", "cgd")}}
STUDENT = {"name": "some/student", "revision": "abc"}


def asked(student: dict[str, str], teacher: dict[str, str]) -> tuple[StageRecord, ...]:
    return stage("answer", inputs={"model": student}), stage("critique", inputs={"model": teacher})


def training(name: str = "train-cgd", objective: str = "CGD", epochs: int = 1, **metrics: float) -> StageRecord:
    inputs = {"objective": objective, "training": {"epochs": epochs}}
    return stage(name, inputs=inputs, facts={"metrics": metrics})


def found(*stages: StageRecord, log: Iterable[Step] = (), **changes: Any) -> list[str]:
    data: ReportData = report_data(stages=stages, training={"train-cgd": tuple(log)}, **(MANY | changes))
    return causes(data)


def test_a_run_with_many_of_everything_has_no_cause_to_doubt_it() -> None:
    stages = (*asked(STUDENT, {"name": "some/teacher", "revision": "def"}), training(steps=20, train_examples=500))
    assert found(*stages, log=steps(20)) == []


@pytest.mark.parametrize("name", ["some/student", "s3://mirror/student"])
def test_a_teacher_that_is_the_student_is_named_under_whatever_name(name: str) -> None:
    (said,) = found(*asked(STUDENT, {"name": name, "revision": "abc"}))
    assert said.startswith(f"Teacher and student are the same model ({name})")


def test_a_teacher_without_a_revision_is_not_taken_for_a_student_without_one() -> None:
    """An endpoint has none."""
    assert found(*asked({"name": "some/student", "revision": ""}, {"name": "gpt", "revision": ""})) == []
    assert found(*asked({"name": "some/student"}, {"name": "gpt"})) == []


@pytest.mark.parametrize(("rejected", "named"), [(50, False), (51, True)])
def test_a_stage_that_rejects_most_rows_is_named_with_the_likeliest_reason(rejected: int, named: bool) -> None:
    rows = Rows(total=100, done=100 - rejected, rejected=rejected)
    said = found(stage("answer", facts={"rows": rows}, rejections={"truncated": rejected - 3, "empty": 3}))
    told = "answer rejected 51 of 100 rows (51.0 %), most of them truncated: what is learned is what was left, and may"
    assert [one.replace(THIN, " ").startswith(told) for one in said] == ([True] if named else [])


@pytest.mark.parametrize(
    ("epochs", "few", "said"),
    [
        (1, {"steps": 3, "train_examples": 48}, "48 rows, each learned once, in 3 optimizer steps: that moves"),
        (2, {"steps": 19, "train_examples": 48}, "19 optimizer steps: so few move a model little"),
        (1, {"steps": 20, "train_examples": 499}, "499 rows, each learned once: that is little to learn from"),
        (2, {"steps": 20, "train_examples": 499}, ""),
        (1, {"steps": 20, "train_examples": 500}, ""),
        (1, {}, ""),
    ],
)
def test_little_training_is_named_by_what_is_little(epochs: int, few: dict[str, float], said: str) -> None:
    told = found(training(epochs=epochs, **few))
    assert [one.startswith(f"CGD: {said}") for one in told] == ([True] if said else [])


def test_trainings_that_are_short_in_the_same_way_share_a_sentence() -> None:
    short = {"steps": 3, "train_examples": 48}
    both = training(**short), training("train-refinedsft", "RefinedSFT", **short)
    (said,) = found(*both)
    assert said.startswith("CGD and Refined SFT: 48 rows")


def test_a_loss_that_rose_is_told_by_the_means_of_its_ends() -> None:
    """A single high last batch is no rise."""
    one = [Step(step=i + 1, loss=loss) for i, loss in enumerate([2.0, 2.2, 2.0, 2.0, 2.0, 2.0, 2.3, 2.1])]
    (said,) = found(training(), log=one)
    assert said == (
        "CGD: the training loss rose from 2.100 to 2.200 nats a token (means of the first and the last 2 steps)."
    )
    falls = [Step(step=i + 1, loss=loss) for i, loss in enumerate([2.0, 2.2, 2.0, 2.0, 2.0, 2.0, 1.0, 2.3])]
    assert found(training(), log=falls) == []
    (said,) = found(training(), log=[Step(step=1, loss=1.0), Step(step=2, loss=1.5)])
    assert "from 1.000 to 1.500" in said
    assert "(first and last step)" in said


def test_a_loss_that_is_no_likelihood_has_no_unit() -> None:
    (said,) = found(training(objective="DPO"), log=[Step(step=1, loss=1.0), Step(step=2, loss=1.5)])
    assert "nats" not in said


def test_a_loss_on_held_out_prompts_that_rose_is_told_with_its_steps() -> None:
    log = [
        Step(step=1, loss=2.0, validation_loss=1.0),
        Step(step=2, loss=1.0, validation_loss=0.9),
        Step(step=3, loss=1.0, validation_loss=1.1),
    ]
    (said,) = found(training(), log=log)
    assert said == "CGD: the loss on held-out prompts rose from 1.000 after step 1 to 1.100 after step 3."


def test_a_small_benchmark_is_named_with_the_gain_that_it_could_have_shown() -> None:
    small = {"base": samples("+-" * 16), "cgd": samples("+-" * 16)}
    (said,) = found(evaluations=small)
    assert said == "sums has only 32 questions: gains below 23.6 points cannot be seen with so few."
    (said,) = found(evaluations={name: samples("+-") for name in small})
    assert said == "sums has only 2 questions: none can show a gain."
    (said,) = found(evaluations={"base": samples("+")})
    assert said == "sums has only 1 question: intervals are wide."
