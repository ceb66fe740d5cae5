"""Why a child is not at work, or not with all its pods: from Events and pods to conditions that alarm in time."""

from datetime import timedelta
from typing import Any

import pytest
from support.builders import ended, job, pod, run
from support.status_builders import NOW, finished, render_of

from cgd_operator.api.status import CGDRunStatus
from cgd_operator.facts.children import ChildFacts, Fate, observe, unexplained
from cgd_operator.facts.trouble import Trouble
from cgd_operator.planning.manifests import KINDS
from cgd_operator.status.events import transitions

MADE = "2026-01-01T00:00:00Z"
LATER = "2026-01-01T00:04:00Z"
ABSENT = 'Error creating: pods "demo-answer-0-x7k2p" is forbidden: error looking up service account default/trainer: '
ABSENT += 'serviceaccount "trainer" not found'
FULL = 'Error creating: pods "demo-answer-0-x7k2p" is forbidden: exceeded quota: q, requested: pods=1, used: pods=1'


def event(
    message: str, *, kind: str = "Job", name: str = "demo-answer", reason: str = "FailedCreate", last: str = LATER
) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "default", "creationTimestamp": MADE},
        "involvedObject": {"kind": kind, "name": name},
        "reason": reason,
        "message": message,
        "firstTimestamp": "2026-01-01T00:00:10Z",
        "lastTimestamp": last,
    }


def child(kind: str = "Job", pods: int = 2) -> dict[str, Any]:
    made = job("answer", kind=kind)
    made["spec"] = {
        "Job": {"completions": pods, "parallelism": pods},
        "PyTorchJob": {"pytorchReplicaSpecs": {"Master": {"replicas": 1}, "Worker": {"replicas": pods - 1}}},
        "TrainJob": {"trainer": {"numNodes": pods}},
    }[kind]
    return made


def pending(name: str = "", *, shard: int = 0, **state: Any) -> dict[str, Any]:
    return pod("answer", "Pending", name=name, shard=shard, **state)


def facts(
    *pods: dict[str, Any], of: dict[str, Any] | None = None, events: tuple[dict[str, Any], ...] = (), now: Any = NOW
) -> ChildFacts:
    return observe([of or child()], pods, (), events, now)["answer"]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("Job", event(ABSENT)),
        ("PyTorchJob", event(ABSENT, kind="PyTorchJob", reason="FailedCreatePod")),
        ("TrainJob", event(ABSENT, name="demo-answer-node-0")),
        ("TrainJob", event(ABSENT, kind="JobSet", reason="JobCreationFailed")),
    ],
)
def test_a_child_without_pods_says_what_its_controller_was_answered(kind: str, told: dict[str, Any]) -> None:
    found = facts(of=child(kind), events=(told,))
    assert (found.fate, found.reason) == (Fate.WAITING, told["reason"])
    assert "no pod can be made: error looking up service account default/trainer" in found.message
    assert "create the ServiceAccount" in found.message
    assert "x7k2p" not in found.message


def test_an_event_of_the_newer_recorders_is_read_by_its_series() -> None:
    told = event(ABSENT, kind="JobSet", reason="JobCreationFailed")
    told |= {"firstTimestamp": None, "lastTimestamp": None, "eventTime": "2026-01-01T00:01:00.000000Z"}
    told["series"] = {"count": 9, "lastObservedTime": "2026-01-01T00:39:00.000000Z"}
    found = facts(of=child("TrainJob"), events=(told,), now=NOW + timedelta(minutes=30))
    assert (found.reason, found.stuck) == ("JobCreationFailed", NOW - timedelta(minutes=9))


def test_events_of_another_child_or_of_a_former_one_of_that_name_say_nothing() -> None:
    former = event(ABSENT, last="2025-12-31T23:59:00Z")
    found = facts(events=(event(ABSENT, name="demo-teacher"), former, event(ABSENT, kind="ReplicaSet")))
    assert found.reason == "PodsMissing"


def test_a_controllers_warning_of_something_else_is_not_why_a_pod_is_missing() -> None:
    restarts = event("is restarting", kind="PyTorchJob", reason="PyTorchJobRestarting")
    assert facts(of=child("PyTorchJob"), events=(restarts,)).reason == "PodsMissing"


def test_each_try_with_another_pod_name_is_the_same_wait() -> None:
    tries = [event(ABSENT.replace("x7k2p", name), last=f"2026-01-01T00:0{n}:00Z") for n, name in enumerate("bcd", 1)]
    for n, one in enumerate(tries, 1):
        one["firstTimestamp"] = f"2026-01-01T00:0{n}:00Z"
    now = NOW - timedelta(minutes=2)
    assert facts(events=tuple(tries), now=now).stuck == NOW - timedelta(minutes=9)


def test_a_gang_that_gets_no_pods_is_told_where_to_look() -> None:
    gang = child("PyTorchJob")
    gang["spec"]["runPolicy"] = {"schedulingPolicy": {"minAvailable": 2}}
    assert facts(of=gang).message.endswith("runs, and what its PodGroup waits for")


def test_an_event_of_an_hour_ago_is_not_why_a_pod_is_missing_now() -> None:
    assert facts(events=(event(ABSENT),), now=NOW + timedelta(hours=1)).reason == "PodsMissing"


def test_a_refusal_that_was_mended_is_not_why_a_pod_is_missing_after_a_later_deletion() -> None:
    """It was met for three minutes; the next try, seven minutes later at most, has made a pod."""
    tries = event(ABSENT, last="2026-01-01T00:03:10Z")
    assert facts(events=(tries,), now=NOW).reason == "FailedCreate"
    assert facts(events=(tries,), now=NOW + timedelta(minutes=2)).reason == "PodsMissing"


def test_the_wait_begins_anew_when_a_child_is_resumed() -> None:
    resumed = child()
    resumed["status"]["startTime"] = "2026-01-01T00:03:00Z"
    assert facts(of=resumed, events=(event(ABSENT),)).stuck == NOW - timedelta(minutes=7)


def test_a_child_that_was_just_resumed_is_not_missing_its_pods_though_its_controller_does_not_know_yet() -> None:
    resumed = child()
    resumed["status"]["conditions"] = [{"type": "Suspended", "status": "True", "lastTransitionTime": MADE}]
    assert facts(of=resumed).reason == "PodsMissing"
    resumed["metadata"]["managedFields"] = [{"manager": "cgd-operator", "time": "2026-01-01T00:09:30Z"}]
    assert facts(of=resumed).reason == "NoPods"


def leaving() -> dict[str, Any]:
    made = pod("answer")
    made["metadata"]["deletionTimestamp"] = "2026-01-01T00:11:00Z"
    return made


def test_a_running_pod_that_is_deleted_is_told_until_it_has_gone() -> None:
    found = facts(leaving(), of=child(pods=1))
    assert (found.fate, found.reason) == (Fate.RUNNING, "")
    assert found.message == "pod demo-answer-0 is being deleted, and is made again when it has ended"


def test_a_suspended_child_says_how_many_of_its_pods_still_run() -> None:
    held = child(pods=1)
    held["spec"]["suspend"] = True
    held["metadata"]["annotations"]["cgd.dev/suspended-by-run"] = "true"
    found = facts(leaving(), of=held)
    assert (found.fate, found.message) == (
        Fate.SUSPENDED,
        "pods that still run until they have stored what is finished: 1",
    )
    assert facts(of=held).message == ""


def test_a_full_quota_is_told_and_nobody_must_mend_it() -> None:
    found = facts(events=(event(FULL),))
    assert "exceeded quota: q" in found.message
    assert found.stuck is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_controller_that_says_nothing_for_a_minute_is_asked_after(kind: str) -> None:
    assert facts(of=child(kind), now=NOW - timedelta(minutes=9, seconds=30)).reason == "NoPods"
    found = facts(of=child(kind))
    assert found.reason == "PodsMissing"
    assert {"Job": "kube-controller-manager", "PyTorchJob": "Training Operator", "TrainJob": "JobSet"}[
        kind
    ] in found.message


def test_a_job_that_pauses_after_a_failure_whose_pod_was_deleted_is_not_called_silent() -> None:
    pauses = child()
    pauses["status"]["failed"] = 1
    assert facts(of=pauses).reason == "NoPods"


def test_a_pod_that_waits_beside_one_that_runs_is_told_with_their_number() -> None:
    stays = pending(shard=1, waiting={"reason": "ImagePullBackOff", "message": "no such image"})
    found = facts(pod("answer"), stays)
    assert (found.fate, found.reason) == (Fate.RUNNING, "ImagePullBackOff")
    assert found.message == "1 of 2 pods run; pod demo-answer-1: ImagePullBackOff: no such image"
    assert found.stuck == NOW - timedelta(minutes=10)


def test_a_pod_that_is_missing_beside_one_that_runs_is_told_with_the_reason() -> None:
    found = facts(pod("answer"), events=(event(FULL),))
    assert found.message.startswith("1 of 2 pods run; no pod can be made: exceeded quota")


def test_a_job_with_a_pod_that_has_succeeded_lacks_none() -> None:
    assert facts(pod("answer"), pod("answer", "Succeeded", shard=1, terminated=ended(0))).message == ""
    gone = child()
    gone["status"]["succeeded"] = 1
    assert facts(pod("answer"), of=gone).message == ""


def test_more_shards_than_run_at_once_are_no_missing_pods() -> None:
    many = child(pods=8)
    many["spec"]["parallelism"] = 1
    assert facts(pod("answer"), of=many).message == ""


def test_a_retry_that_is_refused_is_told_with_the_refusal() -> None:
    failed = pod("answer", "Failed", terminated=ended(201, "lost"))
    assert facts(failed).reason == "Retrying"
    assert facts(failed, events=(event(FULL),)).reason == "FailedCreate"


def test_an_init_container_that_cannot_start_says_why() -> None:
    waits = pending(waiting={"reason": "PodInitializing"})
    state = {"waiting": {"reason": "CreateContainerConfigError", "message": "image will run as root"}}
    waits["status"]["initContainerStatuses"] = [{"name": "init-pytorch", "state": state}]
    found = facts(waits)
    assert found.message == "pod demo-answer-0: CreateContainerConfigError: image will run as root"
    assert found.stuck


def test_a_volume_that_cannot_be_mounted_is_told_from_the_kubelets_event() -> None:
    waits = pending(waiting={"reason": "ContainerCreating"})
    missing = 'MountVolume.SetUp failed for volume "ca" : configmap "roots" not found'
    told = event(missing, kind="Pod", name="demo-answer-0", reason="FailedMount", last="2026-01-01T00:08:00Z")
    found = facts(waits, events=(told,))
    assert found.reason == "FailedMount"
    assert 'configmap "roots" not found' in found.message
    assert found.stuck == NOW - timedelta(minutes=10)


def mount(first: str, last: str) -> dict[str, Any]:
    told = event("timed out", kind="Pod", name="demo-answer-0", reason="FailedMount", last=f"2026-01-01T{last}:00Z")
    return told | {"firstTimestamp": f"2026-01-01T{first}:00Z"}


def test_a_mount_that_failed_once_is_not_why_a_pod_that_pulls_its_image_waits() -> None:
    pulls = pending(waiting={"reason": "ContainerCreating"})
    found = facts(pulls, of=child(pods=1), events=(mount("00:00", "00:00"),))
    assert (found.reason, found.stuck) == ("Starting", None)


def test_what_was_said_of_an_earlier_pod_of_that_name_is_not_why_this_one_waits() -> None:
    pulls = pending(waiting={"reason": "ContainerCreating"})
    pulls["status"]["startTime"] = "2026-01-01T00:09:00Z"
    assert facts(pulls, of=child(pods=1), events=(mount("00:00", "00:08"),)).reason == "Starting"


def test_a_mount_that_fails_for_long_is_told_although_the_kubelet_says_so_more_rarely() -> None:
    waits = pending(waiting={"reason": "ContainerCreating"})
    found = facts(waits, events=(mount("00:00", "00:40"),), now=NOW + timedelta(minutes=40))
    assert found.reason == "FailedMount"
    assert found.stuck


def test_what_a_person_must_mend_is_told_before_what_may_pass() -> None:
    unscheduled = pending("a")
    unscheduled["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]
    broken = pending("b", shard=1, waiting={"reason": "InvalidImageName"})
    assert facts(unscheduled, broken).reason == "InvalidImageName"
    assert facts(unscheduled).stuck is None


def asked(of: dict[str, Any], *pods: dict[str, Any], seconds: int = 11) -> set[str]:
    begun = NOW - timedelta(minutes=10)
    return {fields for _, fields in unexplained([of], pods, begun + timedelta(seconds=seconds))}


def test_events_are_read_only_where_nothing_else_says_why() -> None:
    both = (pod("answer"), pod("answer", shard=1))
    assert asked(child()) == {"involvedObject.kind=Job,type=Warning"}
    assert asked(child("TrainJob")) == {
        f"involvedObject.kind={kind},type=Warning" for kind in ("TrainJob", "JobSet", "Job")
    }
    assert asked(child(), seconds=9) == set()
    assert asked(child(), *both) == set()
    assert asked(job("answer", "Complete")) == set()
    assert asked(job("answer", suspend=True)) == set()
    mute = pending(shard=1, waiting={"reason": "ContainerCreating"})
    assert asked(child(), pod("answer"), mute) == {
        f"involvedObject.kind=Pod,reason={reason}" for reason in ("FailedMount", "FailedCreatePodSandBox")
    }
    assert asked(child(), pod("answer"), pending(shard=1, waiting={"reason": "ErrImagePull"})) == set()


# --- what a run makes of it

BROKEN = pending(waiting={"reason": "ImagePullBackOff", "message": "no such image"})


def shown(*pods: dict[str, Any], minutes: float = 10, previous: CGDRunStatus | None = None) -> CGDRunStatus:
    now = NOW - timedelta(minutes=10) + timedelta(minutes=minutes)
    return render_of(*finished("prepare"), job("answer"), pods=pods, now=now, previous=previous)


def conditions(status: CGDRunStatus) -> dict[str, tuple[str, str]]:
    return {one.type: (one.status, one.reason) for one in status.conditions if one.type in ("Stalled", "Reconciling")}


def test_a_run_is_stalled_by_what_a_person_must_mend_after_five_minutes_and_not_before() -> None:
    before, after = shown(BROKEN, minutes=4.9), shown(BROKEN, minutes=5)
    assert conditions(before) == {"Reconciling": ("True", "ImagePullBackOff"), "Stalled": ("False", "ImagePullBackOff")}
    assert conditions(after) == {"Reconciling": ("False", "ImagePullBackOff"), "Stalled": ("True", "ImagePullBackOff")}
    told = {one.type: one.message for one in after.conditions}
    assert told["Stalled"] == "stage answer waits: pod demo-answer-0: ImagePullBackOff: no such image"


def test_a_stalled_run_is_told_in_one_event_and_goes_on_when_its_pod_starts() -> None:
    before, after = shown(BROKEN, minutes=4), shown(BROKEN, minutes=6)
    (told,) = transitions(run(), before, after, NOW)
    assert (told["reason"], told["type"]) == ("RunStalled", "Warning")
    assert "no such image" in told["message"]
    assert list(transitions(run(), after, after, NOW)) == []
    started = shown(pod("answer"), previous=after)
    assert conditions(started)["Stalled"][0] == "False"
    assert list(transitions(run(), after, started, NOW)) == []


def test_a_pod_without_a_node_never_stalls_a_run() -> None:
    unscheduled = pending()
    unscheduled["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
    ]
    status = shown(unscheduled, minutes=600)
    assert conditions(status) == {"Reconciling": ("True", "Unschedulable"), "Stalled": ("False", "Unschedulable")}
    assert (status.state, status.progress) == ("Waiting", "1/9 stages")


def test_a_stage_that_begins_as_every_stage_does_is_no_wait() -> None:
    status = shown(pending(waiting={"reason": "ContainerCreating"}), minutes=0.5)
    assert (status.state, status.progress) == ("Answering", "0%")


@pytest.mark.parametrize(("since", "stalled"), [(NOW - timedelta(minutes=6), "True"), (NOW, "False"), (None, "False")])
def test_trouble_stalls_a_run_when_somebody_has_had_time_to_mend_it(since: Any, stalled: str) -> None:
    status = render_of(trouble=Trouble("ChildRefused", "no", since=since))
    assert conditions(status)["Stalled"] == (stalled, "ChildRefused")
    assert conditions(status)["Reconciling"][0] != stalled


def test_a_run_of_which_one_pod_waits_says_so_while_it_runs() -> None:
    stays = pending(shard=1, waiting={"reason": "ErrImagePull", "message": "no such image"})
    made = job("answer")
    made["spec"] = {"completions": 2, "parallelism": 2}
    status = render_of(*finished("prepare"), made, pods=(pod("answer"), stays), now=NOW - timedelta(minutes=8))
    assert status.state == "Answering"
    (told,) = [one.message for one in status.conditions if one.type == "Reconciling"]
    assert told == "stage answer waits: 1 of 2 pods run; pod demo-answer-1: ErrImagePull: no such image"
    reasons = [one["reason"] for one in transitions(run(), render_of(*finished("prepare")), status, NOW)]
    assert reasons == ["StageWaiting"]
