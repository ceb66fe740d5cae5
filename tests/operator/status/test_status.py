"""The status: derived anew, moving forward, readable by people and by kstatus."""

import json
from datetime import timedelta
from typing import Any

import pytest
from support.builders import CHILDREN, ended, job, pod, run
from support.status_builders import NOW, finished, render_of

from cgd_operator.api.status import CGDRunStatus, StageStatus
from cgd_operator.facts.due import previous_status
from cgd_operator.facts.progress import StageProgress
from cgd_operator.facts.trouble import Trouble
from cgd_operator.status.events import transitions
from cgd_operator.status.render import acknowledged, refused
from cgd_stages.contract import LastWords, RoundOf, Rows, StageFacts


def conditions(status: CGDRunStatus) -> dict[str, str]:
    return {condition.type: condition.status for condition in status.conditions}


def stage(status: CGDRunStatus, name: str) -> Any:
    return next(one for one in status.stages if one.name == name)


def words(name: str, done: int = 10, rejected: int = 0, **more: Any) -> str:
    rows = {"total": done + rejected, "done": done, "rejected": rejected}
    return json.dumps({"outcome": "done", "stages": {name: {"rows": rows, **more}}})


FAILURE = json.dumps({"outcome": "failed", "message": "no such bucket", "hint": "create it"})


@pytest.mark.parametrize(
    ("count", "word"),
    [
        (1, "Answering"),
        (2, "Critiquing"),
        (3, "Checking"),
        (4, "Training"),
        (5, "Evaluating"),
        (7, "Reporting"),
        (8, "Succeeded"),
    ],
)
def test_the_state_is_one_word_for_people(count: int, word: str) -> None:
    running = [job(name) for name in CHILDREN[count : count + 1]]
    pods = tuple(pod(name) for name in CHILDREN[count : count + 1])
    assert render_of(*finished(*CHILDREN[:count]), *running, pods=pods).state == word


def test_a_new_run_lists_every_stage_as_pending() -> None:
    status = render_of()
    assert status.state == "Pending"
    assert [one.state for one in status.stages] == ["Pending"] * 9


@pytest.mark.parametrize(
    ("children", "expected"),
    [
        ([job("prepare")], {"Reconciling": "True", "Stalled": "False", "Ready": "False", "Succeeded": "Unknown"}),
        (finished(*CHILDREN), {"Reconciling": "False", "Stalled": "False", "Ready": "True", "Succeeded": "True"}),
        (
            [job("prepare", "Failed")],
            {"Reconciling": "False", "Stalled": "True", "Ready": "False", "Succeeded": "False"},
        ),
    ],
)
def test_conditions_are_those_that_kstatus_reads(children: list[dict[str, Any]], expected: dict[str, str]) -> None:
    assert conditions(render_of(*children)) == {"Accepted": "True", "Suspended": "False", **expected}


def test_a_run_that_is_suspended_from_birth_has_its_generation_observed() -> None:
    status = render_of(changes={"suspend": True})
    assert (status.state, status.observed_generation) == ("Suspended", 1)
    assert conditions(status)["Suspended"] == "True"
    assert conditions(status)["Reconciling"] == "False"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"training": {"thinking": "learn"}}, "on, training.thinking learn, teacher.chat.thinking auto"),
        (
            {"teacher": {"model": "m", "chat": {"thinking": "on"}}},
            "off, training.thinking drop, teacher.chat.thinking on",
        ),
    ],
)
def test_the_condition_accepted_names_the_modes_of_a_run_that_says_anything_of_them(
    changes: dict[str, Any], message: str
) -> None:
    accepted = next(one for one in render_of(changes=changes).conditions if one.type == "Accepted")
    assert accepted.message == (f"student.chat.thinking is {message}" if message else "")


def test_a_failed_stage_is_told_in_the_conditions() -> None:
    status = render_of(job("prepare", "Failed"), pods=(pod("prepare", "Failed", terminated=ended(3, FAILURE)),))
    told = next(one for one in status.conditions if one.type == "Succeeded").message
    assert told == "stage prepare: pod demo-prepare-0: exit code 3: no such bucket. create it"
    assert stage(status, "prepare").reason == "FailedReason"


def test_a_run_whose_training_does_not_transfer_fails_with_that_reason() -> None:
    words = json.dumps({"outcome": "failed", "error": "NoTransfer", "message": "no gain"})
    before = finished(*CHILDREN[: CHILDREN.index("train-cgd")])
    failed = pod("train-cgd", "Failed", terminated=ended(3, words))
    status = render_of(*before, job("train-cgd", "Failed", kind="PyTorchJob"), pods=(failed,))
    reasons = {one.type: one.reason for one in status.conditions}
    assert (reasons["Succeeded"], reasons["Stalled"], status.state) == ("NoTransfer", "NoTransfer", "Failed")


def test_trouble_without_a_failed_stage_stalls_but_does_not_end_the_run() -> None:
    status = render_of(trouble=Trouble("TrainingBackendMissing", "install it"))
    assert conditions(status)["Stalled"] == "True"
    assert conditions(status)["Succeeded"] == "Unknown"


def test_rows_of_shards_are_added_up_from_last_words() -> None:
    pods = tuple(pod("answer", "Succeeded", shard=n, terminated=ended(0, words("answer", 10, n))) for n in range(3))
    rows = stage(render_of(*finished("prepare", "answer"), pods=pods), "answer").rows
    assert (rows.total, rows.done, rows.rejected) == (33, 30, 3)


def test_of_two_tries_of_a_shard_the_last_words_count_once() -> None:
    first = pod("answer", "Failed", name="a", terminated=ended(143, words("answer", 4)))
    second = pod("answer", "Succeeded", name="b", terminated=ended(0, words("answer", 10), "2026-01-01T00:05:00Z"))
    second["status"]["containerStatuses"][0]["state"]["terminated"]["startedAt"] = "2026-01-01T00:02:00Z"
    assert stage(render_of(*finished("prepare", "answer"), pods=(second, first)), "answer").rows.done == 10


def test_what_a_vanished_pod_once_said_stays_on_the_screen() -> None:
    pods = (pod("prepare", "Succeeded", terminated=ended(0, words("prepare", 48, outputURI="s3://x", digest="d"))),)
    before = render_of(*finished("prepare"), pods=pods)
    after = render_of(*finished("prepare"), previous=before)
    assert stage(after, "prepare") == stage(before, "prepare").model_copy(
        update={"attempts": 1, "start_time": stage(after, "prepare").start_time}
    )


def test_progress_shows_rows_percent_speed_and_eta() -> None:
    progress = {"answer": StageProgress(Rows(total=48, done=30, rejected=2), 66, 812, 130)}
    status = render_of(*finished("prepare"), job("answer"), pods=(pod("answer"),), progress=progress)
    assert (status.stage, status.progress, status.eta) == ("answer", "66% (32/48)", "2m10s")
    assert stage(status, "answer").tokens_per_second == 812


CONVEYOR = ("rollout-gkd", "score-gkd", "train-gkd")
SAMPLING = {"training.objectives": ["CGD"], "training.variants": [{"name": "gkd", "kind": "GKD", "onPolicy": "1"}]}


def conveyor(*ended_stages: str, round_: RoundOf | None = None, previous: CGDRunStatus | None = None) -> CGDRunStatus:
    """A run whose student samples while it is trained, all else before having ended."""
    before = finished("prepare", "answer", "teacher", "check", "train-cgd", *ended_stages)
    at_work = [stage for stage in CONVEYOR if stage not in ended_stages]
    seen = {stage: StageProgress(Rows(total=90, done=30), 33, 9, None, round=round_) for stage in at_work}
    pods = tuple(pod(stage) for stage in at_work)
    jobs = [job(stage) for stage in at_work]
    return render_of(*before, *jobs, pods=pods, progress=seen, changes=SAMPLING, previous=previous)


def test_the_round_of_each_stage_is_shown_while_it_is_at_work() -> None:
    status = conveyor(round_=RoundOf(number=3, of=12, waits_for="train-gkd"))
    assert [stage(status, name).state for name in CONVEYOR] == ["Running"] * 3
    assert stage(status, "rollout-gkd").round == "3 of 12, waits for train-gkd"
    assert (status.state, status.progress) == ("Sampling", "33% (30/90)")
    kept = conveyor(previous=status)
    assert stage(kept, "score-gkd").round == "3 of 12, waits for train-gkd", "an operator that has just started"
    later = conveyor("rollout-gkd", round_=RoundOf(number=12, of=12), previous=status)
    assert (stage(later, "rollout-gkd").round, stage(later, "score-gkd").round) == (None, "12 of 12")
    assert later.state == "Scoring"
    assert conveyor("rollout-gkd", "score-gkd", previous=later).state == "Training"


def test_when_a_pod_has_said_its_last_its_rows_and_percent_agree_and_nothing_is_left_to_wait_for() -> None:
    progress = {"answer": StageProgress(Rows(total=4, done=1), 25, 90, 22)}
    ended_pod = pod("answer", "Succeeded", terminated=ended(0, words("answer", 4)))
    status = render_of(*finished("prepare"), job("answer"), pods=(ended_pod, pod("answer", shard=1)), progress=progress)
    assert (status.progress, status.eta) == ("100% (4/4)", None)


def test_a_shard_that_has_ended_hides_nothing_of_those_that_report() -> None:
    progress = {"answer": StageProgress(Rows(total=40, done=20), 50, 90, 22)}
    ended_pod = pod("answer", "Succeeded", terminated=ended(0, words("answer", 10)))
    status = render_of(*finished("prepare"), job("answer"), pods=(ended_pod, pod("answer", shard=1)), progress=progress)
    assert (status.progress, status.eta) == ("50% (20/40)", "22s")


def test_a_failure_keeps_what_its_pods_said_when_they_are_gone() -> None:
    failed = pod("prepare", "Failed", terminated=ended(3, FAILURE))
    before = render_of(job("prepare", "Failed"), pods=(failed,))
    assert stage(render_of(job("prepare", "Failed"), previous=before), "prepare").message == (
        "pod demo-prepare-0: exit code 3: no such bucket. create it"
    )


def test_words_that_a_kubelet_tells_after_the_failure_are_told() -> None:
    before = render_of(job("prepare", "Failed"), pods=(pod("prepare", running={}),))
    late = pod("prepare", "Failed", terminated=ended(3, FAILURE))
    after = render_of(job("prepare", "Failed"), pods=(late,), previous=before)
    assert stage(after, "prepare").message == "pod demo-prepare-0: exit code 3: no such bucket. create it"


def test_a_failure_that_was_never_seen_tells_what_the_try_before_said() -> None:
    failed = pod("prepare", "Failed", name="a", terminated=ended(201, FAILURE))
    before = render_of(job("prepare"), pods=(failed, pod("prepare", name="b")))
    after = render_of(job("prepare", "Failed"), previous=before)
    assert stage(after, "prepare").message == (
        "failed; its pods are gone; pod a: exit code 201: no such bucket. create it"
    )


def test_progress_never_goes_back() -> None:
    def at(percent: int, previous: CGDRunStatus | None = None) -> CGDRunStatus:
        progress = {"answer": StageProgress(None, percent, None, None)}
        return render_of(
            *finished("prepare"), job("answer"), pods=(pod("answer"),), progress=progress, previous=previous
        )

    assert stage(at(10, at(60)), "answer").percent == 60


def test_the_second_stage_of_a_fused_pod_is_pending_until_it_reports() -> None:
    children = [*finished("prepare", "answer"), job("teacher")]
    status = render_of(*children, pods=(pod("teacher"),))
    assert [stage(status, name).state for name in ("critique", "refine")] == ["Running", "Pending"]
    progress = {
        "critique": StageProgress(Rows(total=4, done=4), 100, None, None),
        "refine": StageProgress(Rows(total=4, done=1), 25, None, None),
    }
    status = render_of(*children, pods=(pod("teacher"),), progress=progress)
    assert [stage(status, name).state for name in ("critique", "refine")] == ["Succeeded", "Running"]


def test_a_stage_of_a_fused_pod_is_through_when_every_shard_is() -> None:
    children, changes = [*finished("prepare", "answer"), job("teacher")], {"teacher.shards": 8}

    def critique(shards: int, previous: CGDRunStatus | None = None) -> StageStatus:
        told = StageProgress(Rows(total=100 * shards, done=100 * shards), 100, None, None, shards=shards)
        status = render_of(
            *children, pods=(pod("teacher"),), changes=changes, progress={"critique": told}, previous=previous
        )
        again = render_of(*children, pods=(pod("teacher"),), changes=changes, previous=status)  # after a restart
        assert stage(again, "critique").state == stage(status, "critique").state
        return stage(status, "critique")

    assert critique(1).state == "Running"
    assert critique(7).state == "Running"
    assert critique(8).state == "Succeeded"


def test_an_operator_that_has_just_started_leaves_the_stages_of_a_fused_pod_as_they_were() -> None:
    children, shared = [*finished("prepare", "answer"), job("teacher")], (pod("teacher"),)
    rows = {"critique": Rows(total=8, done=7, rejected=1), "refine": Rows(total=8, done=3)}
    told = {stage: StageProgress(its, None, None, None) for stage, its in rows.items()}
    before = render_of(*children, pods=shared, progress=told)
    after = render_of(*children, pods=shared, previous=before)
    states = {one.name: one.state for one in after.stages}
    assert (states["critique"], states["refine"]) == ("Succeeded", "Running")


def test_gpu_seconds_are_pod_seconds_times_gpus_and_counted_once_for_a_fused_pod() -> None:
    pods = (pod("teacher", "Succeeded", terminated=ended(0)),)
    status = render_of(*finished(*CHILDREN[:3]), pods=pods, changes={"teacher.tensorParallel": 8})
    assert [stage(status, name).gpu_seconds for name in ("critique", "refine")] == [800, 0]
    assert status.usage.gpu_hours == "0.22"


def test_gpu_seconds_of_a_pod_that_is_gone_are_not_given_back() -> None:
    before = render_of(*finished("prepare", "answer"), pods=(pod("answer", "Succeeded", terminated=ended(0)),))
    after = render_of(*finished("prepare", "answer"), previous=before)
    assert stage(after, "answer").gpu_seconds == 100


def test_gpu_seconds_in_the_status_of_a_newer_operator_are_read_all_the_same() -> None:
    newer = {"state": "Training", "mood": "fine", "stages": [{"name": "answer", "gpuSeconds": 100, "colour": "red"}]}
    assert previous_status({"status": newer}).stages == (StageStatus(name="answer", gpu_seconds=100),)


def test_a_failed_job_that_was_deleted_leaves_its_gpu_seconds_and_nothing_else() -> None:
    failed = pod("answer", "Failed", terminated=ended(3))
    before = render_of(*finished("prepare"), job("answer", "Failed"), pods=(failed,))
    after = render_of(*finished("prepare"), previous=before)
    spent = {failed["metadata"]["uid"]: 100}
    assert stage(after, "answer") == StageStatus(name="answer", gpu_seconds=100, pod_gpu_seconds=spent)
    assert after.usage.gpu_hours == before.usage.gpu_hours == "0.03"


def test_pods_that_end_after_their_job_was_deleted_are_counted_once() -> None:
    before = render_of(*finished("prepare"), job("answer"), pods=(pod("answer"),))
    assert stage(before, "answer").gpu_seconds == 600
    leaving = pod("answer", "Failed", terminated=ended(143, end="2026-01-01T00:10:30Z"))
    after = render_of(*finished("prepare"), pods=(leaving,), previous=before)
    assert stage(after, "answer").gpu_seconds == 630
    assert stage(render_of(*finished("prepare"), pods=(leaving,), previous=after), "answer").gpu_seconds == 630


def test_a_running_pod_changes_the_status_once_a_minute_at_most() -> None:
    children, pods = [*finished("prepare"), job("answer")], (pod("answer"),)
    first = render_of(*children, pods=pods)
    later = render_of(*children, pods=pods, previous=first, now=NOW + timedelta(seconds=59))
    assert later == first


def test_a_condition_keeps_its_time_until_it_changes() -> None:
    first = render_of(job("prepare"))
    second = render_of(job("prepare"), previous=first, now=NOW + timedelta(hours=1))
    third = render_of(job("prepare", "Failed"), previous=second, now=NOW + timedelta(hours=2))
    times = [{one.type: one.last_transition_time for one in status.conditions} for status in (first, second, third)]
    assert times[0] == times[1]
    assert times[2]["Stalled"] == "2026-01-01T02:10:00Z"
    assert times[2]["Accepted"] == times[0]["Accepted"]


def test_artifacts_are_listed_when_their_stage_has_succeeded() -> None:
    pods = tuple(
        pod(name, "Succeeded", terminated=ended(0, words(told, outputURI=f"s3://data/{told}")))
        for name, told in [("teacher", "refine"), ("train-cgd", "train-cgd"), ("report", "report")]
    )
    artifacts = render_of(*finished(*CHILDREN), pods=pods).artifacts
    assert artifacts.quadruples == "s3://data/refine"
    assert artifacts.checkpoints == {"CGD": "s3://data/train-cgd"}
    assert artifacts.report == "s3://data/report"


def test_every_objective_has_a_checkpoint_under_the_name_that_the_spec_has() -> None:
    order = [*CHILDREN[:3], "distill", "check", "train-cgd", "train-distilledsft"]
    pods = tuple(
        pod(name, "Succeeded", terminated=ended(0, words(name, outputURI=f"s3://data/{name}"))) for name in order
    )
    status = render_of(*finished(*order), pods=pods, changes={"training.objectives": ["CGD", "DistilledSFT"]})
    assert status.artifacts.checkpoints == {
        "CGD": "s3://data/train-cgd",
        "DistilledSFT": "s3://data/train-distilledsft",
    }


def test_a_variant_has_a_checkpoint_under_its_name() -> None:
    order = [*CHILDREN[:4], "train-cgd", "train-cgd-bare"]
    pods = tuple(
        pod(name, "Succeeded", terminated=ended(0, words(name, outputURI=f"s3://data/{name}"))) for name in order
    )
    bare = {"training.variants": [{"name": "cgd-bare", "kind": "CGD", "bareShare": "0.5"}]}
    assert render_of(*finished(*order), pods=pods, changes=bare).artifacts.checkpoints == {
        "CGD": "s3://data/train-cgd",
        "cgd-bare": "s3://data/train-cgd-bare",
    }


@pytest.mark.parametrize(("count", "word"), [(3, "Distilling"), (4, "Checking"), (6, "Training")])
def test_a_run_with_several_objectives_says_what_it_does(count: int, word: str) -> None:
    order = [*CHILDREN[:3], "distill", "check", "train-cgd", "train-distilledsft"]
    status = render_of(
        *finished(*order[:count]),
        job(order[count]),
        pods=(pod(order[count]),),
        changes={"training.objectives": ["CGD", "DistilledSFT"]},
    )
    assert (status.state, status.stage) == (word, order[count])


def test_a_run_says_when_its_teacher_writes_wrong_critiques() -> None:
    wrong = {"training.critique": {"kind": "miscritique", "rate": "1", "target": "kept"}}
    order = [*CHILDREN[:3], "misteacher"]
    status = render_of(*finished(*order[:3]), job("misteacher"), pods=(pod("misteacher"),), changes=wrong)
    assert (status.state, status.stage) == ("Miscritiquing", "miscritique")


def test_an_artifact_whose_pod_vanished_unseen_is_named_by_the_runs_pointer() -> None:
    artifacts = render_of(*finished(*CHILDREN)).artifacts
    assert artifacts.report == "s3://data/runs/default/runs/demo/report.json"


def test_a_job_that_was_cleaned_up_keeps_its_stage_succeeded() -> None:
    before = render_of(*finished(*CHILDREN[:4]))
    after = render_of(job("train-cgd"), previous=before)
    assert [one.state for one in after.stages[:5]] == ["Succeeded"] * 5


def test_a_refused_run_is_stalled_and_ended() -> None:
    status = refused(3, "spec.typo: there is no such field", CGDRunStatus(), NOW)
    assert conditions(status) == {
        "Accepted": "False", "Reconciling": "False", "Stalled": "True", "Ready": "False", "Succeeded": "False",
        "Suspended": "False",
    }  # fmt: skip
    assert status.observed_generation == 3


def test_of_a_run_that_is_refused_by_now_what_is_known_of_its_stages_stays() -> None:
    before = render_of(*finished("prepare"), job("answer"), pods=(pod("answer"),))
    status = refused(2, "spec.later: there is no such field", before, NOW)
    assert (status.stages, status.usage) == (before.stages, before.usage)
    assert (status.state, status.stage, status.progress) == ("Refused", None, None)


def test_the_status_survives_the_journey_through_the_api_server() -> None:
    status = render_of(*finished("prepare"), job("answer"), pods=(pod("answer"),))
    body = status.model_dump(by_alias=True, exclude_none=True, mode="json")
    assert CGDRunStatus.model_validate(body) == status


def reasons(old: CGDRunStatus, new: CGDRunStatus) -> list[str]:
    return [event["reason"] for event in transitions(run(), old, new, NOW)]


def test_events_tell_transitions_and_nothing_else() -> None:
    started = render_of(*finished("prepare"), job("answer"), pods=(pod("answer"),))
    ended_ = render_of(*finished("prepare", "answer"))
    assert reasons(CGDRunStatus(), render_of(job("prepare"), pods=(pod("prepare"),))) == []
    assert reasons(started, ended_) == ["StageSucceeded"]
    assert reasons(ended_, ended_) == []


@pytest.mark.parametrize("stage", ["prepare", "check", "evaluate-base"])
def test_a_stage_that_makes_no_rows_and_no_model_ends_well_without_an_event(stage: str) -> None:
    before = CHILDREN[: CHILDREN.index(stage)]
    running = render_of(*finished(*before), job(stage), pods=(pod(stage),))
    assert reasons(running, render_of(*finished(*before, stage))) == []
    assert reasons(running, render_of(*finished(*before), job(stage, "Failed"))) == ["StageFailed", "RunFailed"]


TEACHER = {"critique": 35, "refine": 30}


def test_stages_that_end_together_are_one_event_with_their_rows_and_times() -> None:
    told = {name: StageFacts(rows=Rows(total=40, done=done, rejected=40 - done)) for name, done in TEACHER.items()}
    last = LastWords(outcome="done", stages=told).model_dump_json(by_alias=True)
    before = render_of(*finished("prepare", "answer"))
    pods = (pod("teacher", "Succeeded", terminated=ended(0, last)),)
    after = render_of(*finished("prepare", "answer", "teacher"), pods=pods)
    (event,) = transitions(run(), before, after, NOW)
    assert event["reason"] == "StageSucceeded"
    assert event["message"] == "critique (35 rows, 5 rejected, 1m40s), refine (30 rows, 10 rejected, 1m40s)"


def test_the_last_stage_is_told_with_the_end_of_the_run() -> None:
    before, after = render_of(*finished(*CHILDREN[:-1])), render_of(*finished(*CHILDREN))
    (event,) = transitions(run(), before, after, NOW)
    assert event["reason"] == "RunSucceeded"
    assert event["message"].startswith("report")
    assert event["message"].endswith("; every stage has succeeded")


def test_what_a_stage_waits_for_is_told_unless_every_stage_does() -> None:
    unschedulable = pod("answer", "Pending")
    unschedulable["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU is free"}
    ]
    before = render_of(*finished("prepare"))
    waiting = render_of(*finished("prepare"), job("answer"), pods=(unschedulable,))
    (event,) = transitions(run(), before, waiting, NOW)
    assert (event["reason"], event["type"]) == ("StageWaiting", "Normal")
    assert "no GPU is free" in event["message"]
    starting = render_of(*finished("prepare"), job("answer"), pods=(pod("answer", "Pending"),))
    assert reasons(before, starting) == []


def test_the_end_of_a_run_is_told_with_its_reason() -> None:
    failed = render_of(job("prepare", "Failed"))
    told = list(transitions(run(), CGDRunStatus(), failed, NOW))
    assert [(event["reason"], event["type"]) for event in told] == [
        ("StageFailed", "Warning"),
        ("RunFailed", "Warning"),
    ]


def test_the_same_transition_has_the_same_event_name() -> None:
    ended_ = render_of(*finished("prepare"))
    first, again = (
        [event["metadata"]["name"] for event in transitions(run(), CGDRunStatus(), ended_, moment)]
        for moment in (NOW, NOW + timedelta(minutes=5))
    )
    assert first == again


@pytest.mark.parametrize("changes", [{}, {"suspend": True}])
def test_a_run_at_its_limit_has_failed_and_says_why_once(changes: dict[str, Any]) -> None:
    children = [*finished("prepare"), job("answer", suspend=True, held=True)]
    met = Trouble("BudgetExceeded", "too much", final=True)
    status = render_of(*children, trouble=met, changes=changes)
    assert status.state == "Failed"
    assert conditions(status) == {
        "Accepted": "True", "Reconciling": "False", "Stalled": "True", "Ready": "False", "Succeeded": "False",
        "Suspended": "False",
    }  # fmt: skip
    reasons = {one.type: (one.reason, one.message) for one in status.conditions}
    assert reasons["Succeeded"] == reasons["Stalled"] == ("BudgetExceeded", "too much")
    before = render_of(*finished("prepare"), job("answer"))
    told = list(transitions(run(), before, status, NOW))
    assert [(event["reason"], event["message"]) for event in told] == [("RunFailed", "too much")]
    assert list(transitions(run(), status, status, NOW)) == []


def test_a_finished_run_acknowledges_a_new_generation_and_changes_nothing_else() -> None:
    before = render_of(*finished(*CHILDREN))
    after = acknowledged(before, 7)
    assert after.observed_generation == 7
    assert {one.observed_generation for one in after.conditions} == {7}
    assert acknowledged(after, 1) == before
