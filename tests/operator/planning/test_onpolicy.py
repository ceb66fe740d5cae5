"""Trainings that learn what their own student samples: the three children that the plan makes of each."""

from typing import Any

import pytest
from support.builders import run

from cgd_operator.api.spec import InvalidRun
from cgd_operator.planning.dag import Child, plan
from cgd_stages.contract import OnPolicy, Prepare, Rollout, Score, Train

GKD = {"name": "gkd", "kind": "GKD", "from": "CGD"}
OPD = {"name": "opd", "kind": "OPD"}


def planned(*variants: dict[str, Any], **changes: Any) -> dict[str, Child]:
    children = plan(run({"training.objectives": ["CGD"], "training.variants": list(variants)} | changes))
    return {child.stage: child for child in children}


def works(children: dict[str, Child], name: str) -> tuple[Rollout, Score, Train]:
    found = tuple(children[f"{kind}-{name}"].task.work for kind in ("rollout", "score", "train"))
    assert isinstance(found[0], Rollout)
    assert isinstance(found[1], Score)
    assert isinstance(found[2], Train)
    return found[0], found[1], found[2]


def sampling(work: Train) -> OnPolicy:
    assert work.on_policy
    return work.on_policy


def test_sampling_scoring_and_training_start_together_each_on_its_own_gpus() -> None:
    children = planned(GKD, OPD)
    for name, before in (("gkd", ("check", "train-cgd")), ("opd", ("check", "train-gkd"))):
        three = [children[f"{kind}-{name}"] for kind in ("rollout", "score", "train")]
        assert [child.after for child in three] == [before] * 3
        assert [child.pool for child in three] == ["student", "teacher", "training"]
        assert [child.kind for child in three] == ["Job", "Job", "PyTorchJob"]
    assert {"rollout-gkd", "score-gkd", "rollout-opd", "score-opd"} <= set(children["report"].after)


def test_each_has_as_many_pods_as_its_model_has_shards() -> None:
    children = planned(OPD, **{"student.shards": 3, "teacher.shards": 2})
    assert [children[f"{kind}-opd"].pods for kind in ("rollout", "score", "train")] == [3, 2, 1]
    rollout, score, _ = works(children, "opd")
    assert (rollout.shards, score.shards) == (3, 2)


def test_all_three_get_the_same_training_so_that_they_find_the_same_folders() -> None:
    for name in ("gkd", "opd"):
        rollout, score, train = works(planned(GKD, OPD), name)
        assert rollout.training == score.training == train
        assert (train.rollouts, train.scored_rollouts) == (f"rollout-{name}", f"score-{name}")


def test_what_the_manifest_leaves_out_is_filled_in() -> None:
    _, score, train = works(planned(GKD, OPD), "gkd")
    drawn = sampling(train)
    assert (train.beta, train.top_k, train.form, train.start) == (0.5, 16, None, "train-cgd")
    assert (drawn.share, drawn.refresh, drawn.max_tokens) == (0.5, 8, 512)
    assert (drawn.teacher.name, score.model, score.top_k) == ("s3://data/models/teacher", drawn.teacher, 16)
    assert (score.engine, score.objective) == (drawn.teacher_engine, "RefinedSFT")
    _, score, train = works(planned(GKD, OPD), "opd")
    assert (train.beta, train.top_k, train.form, sampling(train).share, score.top_k) == (None, None, "reward", 1, 0)


def test_what_the_manifest_says_reaches_all_three() -> None:
    own = {"beta": "1", "onPolicy": "0.25", "refresh": 2, "maxTokens": 99, "topK": 5}
    _, score, train = works(planned(GKD | own), "gkd")
    drawn = sampling(train)
    assert (train.beta, train.top_k, score.top_k) == (1.0, 5, 5)
    assert (drawn.share, drawn.refresh, drawn.max_tokens) == (0.25, 2, 99)
    assert works(planned(OPD | {"form": "loss"}), "opd")[2].form == "loss"


@pytest.mark.parametrize(("share", "stored", "sampled"), [("0", True, False), ("0.5", True, True), ("1", False, True)])
def test_stored_texts_are_scored_where_some_are_learned_and_samples_where_some_are_drawn(
    share: str, stored: bool, sampled: bool
) -> None:
    children = planned(GKD | {"onPolicy": share, "topK": 7})
    train = children["train-gkd"].task.work
    assert isinstance(train, Train)
    assert ("score-refined" in children) is stored
    assert (train.scores == "score-refined") is stored
    assert ("rollout-gkd" in children) is ("score-gkd" in children) is (train.on_policy is not None) is sampled
    assert (train.beta, train.top_k) == (0.5, 7)
    if stored:
        score = children["score-refined"].task.work
        assert isinstance(score, Score)
        assert (score.top_k, score.training) == (7, None)
        assert "score-refined" in children["check"].after


def test_a_student_that_samples_has_no_model_of_drafts() -> None:
    drafts = {"speculative": {"method": "ngram", "numSpeculativeTokens": 3}}
    children = planned(
        OPD, **{f"{model}.{name}": value for model in ("student", "teacher") for name, value in drafts.items()}
    )
    drawn = sampling(works(children, "opd")[2])
    assert drawn.engine.speculative is drawn.teacher_engine.speculative is None


def test_prepare_is_told_that_the_teacher_scores_so_that_it_compares_the_tokens() -> None:
    for variant in (GKD, GKD | {"onPolicy": "1"}, OPD):
        prepare = planned(variant)["prepare"].task.work
        assert isinstance(prepare, Prepare)
        assert prepare.scores
        assert all(score.model == prepare.teacher for score in prepare.scores)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({**GKD, "beta": "0.04"}, 'takes "0"'),
    ({**GKD, "beta": "0.951"}, "from 0.05 to 0.95"),
    ({**GKD, "form": "loss"}, "form is for the kind OPD"),
    ({**GKD, "texts": "refined"}, "texts is for the kind SupervisedKD"),
    ({**OPD, "beta": "1"}, "beta is for the kind DPO or GKD"),
    ({**OPD, "onPolicy": "1"}, "onPolicy is for the kind GKD"),
    ({**OPD, "topK": 4}, "topK is for the kind"),
    ({**GKD, "onPolicy": "0", "refresh": 4}, "remove them"),
    ({"name": "x", "kind": "DPO", "beta": "0"}, "DPO takes a number above 0"),
    ({"name": "x", "kind": "CGD", "maxTokens": 9}, "maxTokens is for the kind GKD or OPD"),
    ({**GKD, "from": "SFT"}, "from names one of objectives"),
]


@pytest.mark.parametrize(("variant", "mend"), WRONG)
def test_what_cannot_work_is_refused_with_its_mend(variant: dict[str, Any], mend: str) -> None:
    with pytest.raises(InvalidRun, match=mend):
        planned(variant)


@pytest.mark.parametrize("beta", ["0", "0.05", "0.5", "0.95", "1"])
def test_both_ends_and_what_lies_well_between_them_are_taken(beta: str) -> None:
    assert works(planned(GKD | {"beta": beta}), "gkd")[2].beta == float(beta)


@pytest.mark.parametrize("variant", [GKD, OPD])
def test_a_teacher_behind_an_endpoint_is_refused(variant: dict[str, Any]) -> None:
    endpoint = {"endpoint": {"url": "https://teacher.example/v1", "model": "large"}}
    with pytest.raises(InvalidRun, match=r"set\s+teacher.model"):
        planned(variant, teacher=endpoint)
