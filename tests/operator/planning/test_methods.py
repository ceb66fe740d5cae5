"""Trainings that start from another's model, or learn from stored log-probabilities: what the plan makes of them."""

from typing import Any

import pytest
from support.builders import run

from cgd_operator.api.spec import InvalidRun
from cgd_operator.planning.dag import Child, plan
from cgd_stages.contract import Score, Train


def planned(variants: list[dict[str, Any]], **training: Any) -> dict[str, Child]:
    given = {"training.objectives": ["CGD"], "training.variants": variants}
    children = plan(run(given | {f"training.{name}": value for name, value in training.items()}))
    return {child.stage: child for child in children}


def train_of(child: Child) -> Train:
    work = child.task.work
    assert isinstance(work, Train)
    return work


def score_of(child: Child) -> Score:
    work = child.task.work
    assert isinstance(work, Score)
    return work


def test_a_training_starts_from_anothers_model_and_waits_for_it() -> None:
    children = planned([{"name": "dpo", "kind": "DPO", "from": "CGD"}])
    assert children["train-dpo"].after == ("check", "train-cgd")
    work = train_of(children["train-dpo"])
    assert (work.objective, work.start, work.beta, work.scores) == ("DPO", "train-cgd", 0.1, None)
    assert work.student.name == train_of(children["train-cgd"]).student.name, "the tokens are the student's"


def test_trainings_are_in_an_order_in_which_each_finds_its_start() -> None:
    children = planned(
        [
            {"name": "third", "kind": "DPO", "from": "second"},
            {"name": "second", "kind": "SFT", "from": "first"},
            {"name": "first", "kind": "CFT"},
        ]
    )
    trained = [stage for stage in children if stage.startswith("train")]
    assert trained == ["train-cgd", "train-first", "train-second", "train-third"]
    assert children["train-third"].after == ("check", "train-second")


def test_side_by_side_a_training_waits_for_its_place_and_for_its_start() -> None:
    variants = [{"name": "a", "kind": "CFT"}, {"name": "b", "kind": "DPO", "from": "CGD"}, {"name": "c", "kind": "CFT"}]
    after = {stage: child.after for stage, child in planned(variants, parallel=2).items() if stage.startswith("train")}
    assert after == {
        "train-cgd": ("check",),
        "train-a": ("check",),
        "train-b": ("check", "train-cgd"),
        "train-c": ("check", "train-a"),
    }


def test_the_teacher_scores_each_kind_of_texts_once_for_all_that_learn_on_it() -> None:
    children = planned(
        [
            {"name": "kd", "kind": "SupervisedKD", "topK": 4},
            {"name": "kd-more", "kind": "SupervisedKD", "topK": 20},
            {"name": "kd-own", "kind": "SupervisedKD", "texts": "distilled"},
        ]
    )
    stages = [stage for stage in children if stage.startswith("score")]
    assert stages == ["score-refined", "score-distilled"]
    assert "distill" in children
    refined, distilled = (score_of(children[stage]) for stage in stages)
    assert (refined.objective, refined.top_k, refined.model.name) == ("RefinedSFT", 20, "s3://data/models/teacher")
    assert (distilled.objective, distilled.top_k) == ("DistilledSFT", 16)
    assert children["score-refined"].pool == "teacher"
    assert "score-refined" in children["check"].after
    assert [train_of(children[f"train-{name}"]).scores for name in ("kd", "kd-more", "kd-own")] == [
        "score-refined", "score-refined", "score-distilled",
    ]  # fmt: skip


def test_the_model_that_a_training_starts_from_scores_for_it_in_the_context_of_cgd() -> None:
    children = planned([{"name": "inner", "kind": "ContextDistillation", "from": "CGD", "context": "system"}])
    score, work = score_of(children["score-inner"]), train_of(children["train-inner"])
    assert (score.model.name, score.objective, score.context) == ("stage://train-cgd", "CGD", "system")
    assert children["score-inner"].pool == "student"
    assert children["score-inner"].after == ("train-cgd",)
    assert children["train-inner"].after == ("check", "train-cgd", "score-inner")
    assert (work.scores, work.start, work.top_k) == ("score-inner", "train-cgd", 16)


def test_without_a_start_the_student_itself_scores() -> None:
    score = score_of(planned([{"name": "inner", "kind": "ContextDistillation"}])["score-inner"])
    assert score.model == score.student


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"training.variants": [{"name": "x", "kind": "DPO", "from": "SFT"}]}, "from names one of objectives"),
    ({"training.variants": [{"name": "x", "kind": "DPO", "from": "x"}]}, "in no circle"),
    (
        {"training.variants": [{"name": "x", "kind": "DPO", "from": "y"}, {"name": "y", "kind": "CFT", "from": "x"}]},
        "in no circle",
    ),
    ({"training.variants": [{"name": "x", "kind": "CGD", "beta": "0.1"}]}, "beta is for the kind DPO or GKD"),
    ({"training.variants": [{"name": "x", "kind": "DPO", "topK": 4}]}, "topK is for the kind"),
    ({"training.variants": [{"name": "x", "kind": "SupervisedKD", "topK": 21}]}, "less than or equal to 20"),
    ({"training.variants": [{"name": "x", "kind": "DPO", "texts": "refined"}]}, "texts is for the kind SupervisedKD"),
    ({"training.variants": [{"name": "refined", "kind": "DPO"}]}, "take another one"),
    (
        {
            "training.variants": [{"name": "x", "kind": "SupervisedKD"}],
            "teacher": {"endpoint": {"url": "https://teacher.example/v1", "model": "large"}},
        },
        "set teacher.model",
    ),
]


@pytest.mark.parametrize(("changes", "mend"), WRONG)
def test_what_cannot_work_is_refused_with_its_mend(changes: dict[str, Any], mend: str) -> None:
    with pytest.raises(InvalidRun, match=mend):
        run(changes)
