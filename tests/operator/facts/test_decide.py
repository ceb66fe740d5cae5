"""Decisions: values in, actions out."""

from typing import Any

import pytest
from support.builders import job, pod, run

from cgd_operator.facts.children import observe
from cgd_operator.facts.decide import GiveUp, Hold, Keep, Resume, Start, decide, done_stages
from cgd_operator.planning.dag import plan

ORDER = ["prepare", "answer", "teacher", "check", "train-cgd", "evaluate-base", "evaluate-cgd", "report"]
DONE = {name: job(name, "Complete", kind="PyTorchJob" if name == "train-cgd" else "Job") for name in ORDER}


def decisions(
    *children: dict[str, Any],
    pods: list[dict[str, Any]] | None = None,
    stop: bool = False,
    enough: dict[str, str] | None = None,
    changes: dict[str, Any] | None = None,
) -> list[str]:
    actions = decide(plan(run(changes)), observe(children, pods or []), stop=stop, enough=enough or {})
    named = []
    for action in actions:
        match action:
            case Start(child):
                named.append(f"start {child.stage}")
            case Hold(facts):
                named.append(f"hold {facts.stage}")
            case Resume(facts):
                named.append(f"resume {facts.stage}")
            case Keep(facts):
                named.append(f"keep {facts.stage}")
            case GiveUp(facts, why):
                named.append(f"give up {facts.stage}: {why}")
    return named


def done(*stages: str) -> list[dict[str, Any]]:
    return [DONE[stage] for stage in stages]


def test_a_new_run_starts_with_prepare() -> None:
    assert decisions() == ["start prepare"]


@pytest.mark.parametrize(
    ("finished", "started"),
    [
        (1, ["start answer"]),
        (2, ["start teacher"]),
        (3, ["start check"]),
        (4, ["start train-cgd"]),
        (5, ["start evaluate-base", "start evaluate-cgd"]),
        (7, ["start report"]),
        (8, []),
    ],
)
def test_each_end_starts_what_waited_for_it(finished: int, started: list[str]) -> None:
    assert decisions(*done(*ORDER[:finished])) == started


@pytest.mark.parametrize("stage", ORDER)
def test_while_a_child_is_there_nothing_is_started_twice(stage: str) -> None:
    before = done(*ORDER[: ORDER.index(stage)])
    assert f"start {stage}" not in decisions(*before, job(stage))


def test_one_evaluation_that_is_left_holds_up_the_report() -> None:
    assert decisions(*done(*ORDER[:6]), job("evaluate-cgd")) == []


@pytest.mark.parametrize("stage", ORDER)
def test_after_a_failure_nothing_is_started(stage: str) -> None:
    before = done(*ORDER[: ORDER.index(stage)])
    assert not [one for one in decisions(*before, job(stage, "Failed")) if one.startswith("start")] or stage in (
        "evaluate-base",
        "evaluate-cgd",
    )


def test_a_failure_holds_the_sibling_that_still_runs() -> None:
    siblings = [job("evaluate-base", "Failed"), job("evaluate-cgd")]
    assert decisions(*done(*ORDER[:5]), *siblings, pods=[pod("evaluate-cgd")]) == ["hold evaluate-cgd"]


def test_a_run_that_is_to_stop_holds_what_runs_and_starts_nothing() -> None:
    assert decisions(*done("prepare"), job("answer"), pods=[pod("answer")], stop=True) == ["hold answer"]
    assert decisions(stop=True) == []
    assert decisions(*done("prepare"), job("answer", suspend=True, held=True), stop=True) == []


def test_a_run_that_goes_on_resumes_what_it_held() -> None:
    assert decisions(*done("prepare"), job("answer", suspend=True, held=True)) == ["resume answer"]


def test_a_child_that_a_queue_suspended_is_left_to_the_queue() -> None:
    assert decisions(*done("prepare"), job("answer", suspend=True)) == []


def test_a_finished_job_that_was_cleaned_up_is_not_made_again() -> None:
    assert decisions(job("answer")) == []
    assert decisions(*done("train-cgd")) == ["start evaluate-base", "start evaluate-cgd"]
    assert decisions(*done("report")) == []


def test_a_failed_job_that_somebody_deleted_is_tried_again() -> None:
    assert decisions(*done("prepare")) == ["start answer"]


def test_a_child_that_is_being_deleted_is_waited_for() -> None:
    leaving = job("answer")
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert decisions(*done("prepare"), leaving) == []


def test_done_stages_of_a_fused_teacher_are_both_of_its_stages() -> None:
    facts = observe(done("prepare", "answer", "teacher"), [])
    assert done_stages(plan(run()), facts) == {"prepare", "answer", "critique", "refine"}


@pytest.mark.parametrize("stop", [False, True])
def test_a_child_that_was_tried_often_enough_is_given_up_unless_it_is_held(stop: bool) -> None:
    training = job("train-cgd", kind="PyTorchJob")
    made = decisions(*done(*ORDER[:4]), training, stop=stop, enough={"train-cgd": "4 times"})
    assert made == (["hold train-cgd"] if stop else ["give up train-cgd: 4 times"])


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
def test_a_failed_child_that_a_policy_would_have_deleted_is_kept_and_one_that_succeeded_is_not(kind: str) -> None:
    """Without it the stage would begin anew, and fail anew, without end."""
    short = {"ttlSecondsAfterFinished": 100}
    failed, good = job("answer", "Failed", kind=kind), job("prepare", "Complete")
    failed["spec"] = {"runPolicy": short} if kind == "PyTorchJob" else short
    good["spec"] = short
    assert decisions(good, failed) == ["keep answer"]
    failed["spec"] = {}
    assert decisions(good, failed) == []


OPD: dict[str, Any] = {"training.objectives": [], "training.variants": [{"name": "opd", "kind": "OPD"}]}
BESIDE = ["rollout-opd", "score-opd", "train-opd"]


def beside(*children: dict[str, Any], **given: Any) -> list[str]:
    """What is decided for a run whose student samples while it is trained, when everything before that has ended."""
    return decisions(*done("prepare", "answer", "teacher", "check"), *children, changes=OPD, **given)


def test_what_samples_what_scores_and_what_trains_start_together_and_each_that_is_missing_alone() -> None:
    assert beside() == [f"start {stage}" for stage in BESIDE]
    assert beside(job("rollout-opd"), job("train-opd", kind="PyTorchJob")) == ["start score-opd"]


@pytest.mark.parametrize("failed", BESIDE)
def test_one_of_them_that_fails_holds_the_others(failed: str) -> None:
    children = [job(stage, *(["Failed"] if stage == failed else []), kind=kind_of(stage)) for stage in BESIDE]
    held = [f"hold {stage}" for stage in BESIDE if stage != failed]
    assert beside(*children, pods=[pod(stage) for stage in BESIDE if stage != failed]) == held


def test_a_run_that_is_suspended_holds_all_of_them_and_resumes_all() -> None:
    children = [job(stage, kind=kind_of(stage)) for stage in BESIDE]
    assert beside(*children, pods=[pod(stage) for stage in BESIDE], stop=True) == [f"hold {stage}" for stage in BESIDE]
    held = [job(stage, suspend=True, held=True, kind=kind_of(stage)) for stage in BESIDE]
    assert beside(*held) == [f"resume {stage}" for stage in BESIDE]


def test_the_evaluation_waits_for_the_training_alone_and_the_report_for_all() -> None:
    trained = [job("train-opd", "Complete", kind="PyTorchJob"), job("rollout-opd"), job("score-opd", "Complete")]
    assert beside(*trained) == ["start evaluate-base", "start evaluate-opd"]
    evaluated = [job(stage, "Complete") for stage in ("evaluate-base", "evaluate-opd")]
    assert beside(*trained, *evaluated) == []
    ended = [job(stage, "Complete", kind=kind_of(stage)) for stage in BESIDE]
    assert beside(*ended, *evaluated) == ["start report"]


def kind_of(stage: str) -> str:
    return "PyTorchJob" if stage.startswith("train") else "Job"
