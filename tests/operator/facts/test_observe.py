"""Facts from objects: fates, reasons, exit codes, last words."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from support.builders import ended, job, pod

from cgd_operator.facts.children import Fate, observe
from cgd_operator.facts.pods import last_state
from cgd_operator.planning.manifests import GIVEN_UP, KINDS, REPLICA_INDEX, REPLICA_TYPE, suspension
from cgd_stages.contract import NO_TRANSFER


def words(message: str = "", hint: str = "", outcome: str = "failed", **stages: Any) -> str:
    return json.dumps({"outcome": outcome, "message": message, "hint": hint, "stages": stages})


def fate(child: dict[str, Any], *pods: dict[str, Any]) -> Fate:
    return observe([child], pods)["answer"].fate


@pytest.mark.parametrize(
    ("condition", "expected"),
    [("Complete", Fate.SUCCEEDED), ("Succeeded", Fate.SUCCEEDED), ("Failed", Fate.FAILED), ("Running", Fate.WAITING)],
)
def test_a_condition_that_is_true_settles_the_fate(condition: str, expected: Fate) -> None:
    assert fate(job("answer", condition)) is expected


def test_a_condition_that_is_false_settles_nothing() -> None:
    child = job("answer", "Failed")
    child["status"]["conditions"][0]["status"] = "False"
    assert fate(child) is Fate.WAITING


def test_a_child_runs_when_one_of_its_pods_runs() -> None:
    assert fate(job("answer"), pod("answer", "Pending"), pod("answer", "Running", shard=1)) is Fate.RUNNING


def test_pods_of_other_stages_say_nothing() -> None:
    assert fate(job("answer"), pod("prepare", "Running")) is Fate.WAITING


@pytest.mark.parametrize("kind", KINDS)
def test_a_child_of_any_kind_is_suspended_where_its_kind_says_so(kind: str) -> None:
    child = job("answer", kind=kind)
    child["spec"] = suspension(kind, True)
    assert fate(child) is Fate.SUSPENDED
    child["spec"] = suspension(kind, False)
    assert fate(child) is Fate.WAITING


def test_a_trainjob_that_failed_tells_the_pods_words_and_the_jobsets_reason() -> None:
    child = job("answer", kind="TrainJob")
    failed = {"type": "Failed", "status": "True", "reason": "ReachedMaxRestarts", "message": "jobset failed"}
    child["status"] = {"conditions": [failed], "jobsStatus": [{"name": "node", "failed": 1}]}
    gone = observe([child], [])["answer"]
    assert (gone.fate, gone.reason, gone.message) == (Fate.FAILED, "ReachedMaxRestarts", "jobset failed")
    pods = [pod("answer", "Failed", shard=1, terminated=ended(3, words("no such model", "change it")))]
    assert observe([child], pods)["answer"].message == "pod demo-answer-1: exit code 3: no such model. change it"


def test_a_child_that_leaves_gives_way_to_one_that_stays() -> None:
    leaving = job("answer", "Complete")
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert observe([job("answer"), leaving], [])["answer"].fate is Fate.WAITING
    assert observe([leaving, job("answer")], [])["answer"].fate is Fate.WAITING


def test_a_failure_tells_pod_exit_code_message_and_mend() -> None:
    message = words("no such bucket", "create it or change storage.uri")
    failed = pod("answer", "Failed", shard=2, terminated=ended(3, message))
    facts = observe([job("answer", "Failed")], [failed])["answer"]
    assert facts.reason == "FailedReason"
    assert facts.message == "pod demo-answer-2: exit code 3: no such bucket. create it or change storage.uri"


def test_a_failure_without_last_words_tells_the_last_line_of_the_log() -> None:
    failed = pod("answer", "Failed", terminated=ended(137, "loading\nKilled by the kernel\n"))
    assert observe([job("answer", "Failed")], [failed])["answer"].message.endswith(
        "exit code 137: Killed by the kernel"
    )


def test_a_permanent_failure_is_told_rather_than_a_later_retryable_one() -> None:
    first = pod("answer", "Failed", shard=0, terminated=ended(3, words("bad prompt file")))
    later = pod("answer", "Failed", shard=1, terminated=ended(143, words("stopped", outcome="interrupted")))
    assert "bad prompt file" in observe([job("answer", "Failed")], [later, first])["answer"].message


@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
@pytest.mark.parametrize("given_up", [False, True])
def test_a_training_that_does_not_transfer_fails_with_that_reason(kind: str, given_up: bool) -> None:
    child = job("train-cgd", "Failed", kind=kind)
    if given_up:  # the operator has ended the job, because its controller would have tried again
        child["metadata"].setdefault("annotations", {})[GIVEN_UP] = "pod demo-train-cgd-0: exit code 3: no gain"
    message = json.dumps({"outcome": "failed", "error": NO_TRANSFER, "message": "no gain"})
    facts = observe([child], [pod("train-cgd", "Failed", terminated=ended(3, message))])["train-cgd"]
    assert (facts.fate, facts.reason) == (Fate.FAILED, "NoTransfer")
    assert "no gain" in facts.message


def test_a_failure_whose_pods_are_gone_tells_the_conditions_words() -> None:
    child = job("answer", "Failed")
    child["status"]["conditions"][0]["message"] = "Job has reached the specified backoff limit"
    assert observe([child], [])["answer"].message == "Job has reached the specified backoff limit"


def test_an_evicted_pod_tells_why() -> None:
    evicted = pod("answer", "Failed")
    evicted["status"] |= {"reason": "Evicted", "message": 'Usage of EmptyDir volume "scratch" exceeds the limit "1Gi"'}
    assert "Evicted: Usage of EmptyDir" in observe([job("answer", "Failed")], [evicted])["answer"].message


def test_an_unschedulable_pod_says_what_is_missing() -> None:
    pending = pod("answer", "Pending")
    pending["status"]["conditions"] = [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes: no nvidia.com/gpu",
        }
    ]
    facts = observe([job("answer")], [pending])["answer"]
    assert (facts.fate, facts.reason) == (Fate.WAITING, "Unschedulable")
    assert "no nvidia.com/gpu" in facts.message


def test_a_container_that_cannot_start_says_why() -> None:
    state = {"reason": "CreateContainerConfigError", "message": 'secret "keys" not found'}
    facts = observe([job("answer")], [pod("answer", "Pending", waiting=state)])["answer"]
    assert facts.reason == "CreateContainerConfigError"
    assert 'secret "keys" not found' in facts.message


def beside(ours: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """A pod with a sidecar in front of our container, as an injector may put it."""
    ours["status"]["containerStatuses"].insert(0, {"name": "proxy", "state": state})
    return ours


def test_our_container_is_read_by_its_name() -> None:
    failed = pod("answer", "Failed", terminated=ended(3, words("no such bucket")))
    message = observe([job("answer", "Failed")], [beside(failed, {"terminated": ended(0)})])["answer"].message
    assert message == "pod demo-answer-0: exit code 3: no such bucket."


def test_a_sidecar_that_keeps_a_pod_is_named_with_what_to_do() -> None:
    kept = beside(pod("answer", "Running", terminated=ended(0)), {"running": {"startedAt": "2026-01-01T00:00:00Z"}})
    facts = observe([job("answer")], [kept], now=NOW)["answer"]
    assert (facts.fate, facts.reason) == (Fate.RUNNING, "SidecarRuns")
    for part in ("pod demo-answer-0", "(exit code 0)", "container proxy still runs", "native sidecar", "podMetadata"):
        assert part in facts.message
    soon = datetime(2026, 1, 1, 0, 1, 50, tzinfo=UTC)
    assert observe([job("answer")], [kept], now=soon)["answer"].message == "", "it has ten seconds to end by itself"


def test_a_pod_that_was_killed_for_its_memory_names_what_to_raise_and_no_line_of_its_log() -> None:
    killed = pod("answer", "Failed", terminated={**ended(137, "loading weights: 97%"), "reason": "OOMKilled"})
    killed["metadata"]["labels"]["cgd.dev/pool"] = "student"
    killed["spec"]["containers"][0]["resources"] = {"limits": {"memory": "64Gi"}}
    message = observe([job("answer", "Failed")], [killed])["answer"].message
    assert "limit of 64Gi; raise spec.placement.student.resources.limits.memory" in message
    assert "loading weights" not in message
    del killed["spec"]["containers"][0]["resources"]
    unlimited = observe([job("answer", "Failed")], [killed])["answer"].message
    assert "set spec.placement.student.resources.requests.memory" in unlimited


NOW = datetime(2026, 1, 1, 0, 10, 30, tzinfo=UTC)


def leaving(phase: str = "Running", *, until: str, shard: int = 0) -> dict[str, Any]:
    """A pod that is being deleted: the timestamp is the end of its grace period."""
    found = pod("answer", phase, shard=shard, running={})
    found["metadata"]["deletionTimestamp"] = until
    return found


def test_a_pod_that_outlives_its_grace_period_is_on_a_lost_node() -> None:
    facts = observe([job("answer")], [leaving(until="2026-01-01T00:05:00Z")], now=NOW)["answer"]
    assert (facts.fate, facts.reason) == (Fate.WAITING, "NodeLost")
    for part in ("node gpu-7", "2026-01-01T00:05:00Z", "kubectl taint nodes gpu-7 node.kubernetes.io/out-of-service"):
        assert part in facts.message
    assert "replaceLostPodsAfterSeconds" in facts.message


@pytest.mark.parametrize("until", ["2026-01-01T00:11:00Z", "2026-01-01T00:10:00Z"])
def test_a_pod_in_its_grace_period_or_just_after_it_is_only_leaving(until: str) -> None:
    assert observe([job("answer")], [leaving(until=until)], now=NOW)["answer"].fate is Fate.RUNNING


def test_a_pod_that_has_ended_and_waits_for_its_controller_is_not_lost() -> None:
    facts = observe([job("answer")], [leaving("Failed", until="2026-01-01T00:05:00Z")], now=NOW)["answer"]
    assert facts.reason == "Retrying"


def test_one_lost_node_of_many_is_told_while_the_others_run() -> None:
    pods = [pod("answer", shard=0, running={}), leaving(until="2026-01-01T00:05:00Z", shard=1)]
    facts = observe([job("answer")], pods, now=NOW)["answer"]
    assert (facts.fate, facts.reason) == (Fate.RUNNING, "NodeLost")


def test_a_pod_that_never_had_a_node_has_lost_none() -> None:
    """It stays while its controller, which holds it, is away."""
    unscheduled = pod("answer", "Pending")
    del unscheduled["spec"]["nodeName"]
    unscheduled["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    facts = observe([job("answer")], [unscheduled], now=datetime(2026, 1, 2, tzinfo=UTC))["answer"]
    assert (facts.reason, facts.pods[0].phase) == ("Starting", "Pending")


def test_a_failure_whose_pods_are_gone_is_told_in_their_last_words_if_their_deletion_was_seen() -> None:
    left = last_state(pod("answer", "Failed", terminated=ended(3, words("no such bucket"))), NOW)
    assert "no such bucket" in observe([job("answer", "Failed")], [], gone=[left])["answer"].message
    assert observe([job("answer")], [], gone=[left])["answer"].reason == "NoPods", (
        "what goes on is told by what is there"
    )


def test_a_container_that_is_being_created_is_no_trouble() -> None:
    facts = observe([job("answer")], [pod("answer", "Pending", waiting={"reason": "ContainerCreating"})])["answer"]
    assert facts.reason == "Starting"


def test_a_child_without_pods_says_so() -> None:
    assert observe([job("answer")], [])["answer"].reason == "NoPods"


def test_a_second_try_tells_about_the_first() -> None:
    first = pod("answer", "Failed", name="a", terminated=ended(201, words("S3 did not answer")))
    second = pod("answer", "Running", name="b", running={"startedAt": "2026-01-01T00:02:00Z"})
    facts = observe([job("answer")], [first, second])["answer"]
    assert facts.attempts == 2
    assert facts.message.startswith("trying again after pod a: exit code 201: S3 did not answer")


def test_attempts_are_counted_by_shard() -> None:
    pods = [pod("answer", "Running", shard=shard) for shard in range(8)]
    assert observe([job("answer")], pods)["answer"].attempts == 1


@pytest.mark.parametrize(("code", "is_told"), [(201, True), (143, False)])
def test_a_failed_pod_that_is_gone_before_the_next_is_made_is_told(code: int, *, is_told: bool) -> None:
    """As the Training Operator makes pods again; one that was asked to go has not failed."""
    left = last_state(pod("answer", "Failed", terminated=ended(code, words("no peer"))), datetime.now(UTC))
    facts = observe([job("answer", kind="PyTorchJob")], [], gone=[left])["answer"]
    assert facts.reason == "NoPods"
    assert facts.message.startswith("its controller has made no pod yet")
    assert ("trying again after pod" in facts.message and "no peer" in facts.message) == is_told


def test_tries_whose_pods_are_gone_count_by_what_the_next_pod_bears() -> None:
    bears = {"batch.kubernetes.io/job-index-failure-count": "2"}
    last = pod("answer", name="c")
    last["metadata"]["annotations"] |= bears
    assert observe([job("answer")], [last])["answer"].attempts == 3
    last["metadata"]["annotations"]["batch.kubernetes.io/job-index-ignored-failure-count"] = "4"
    assert observe([job("answer")], [pod("answer", shard=1), last])["answer"].attempts == 7
    last["metadata"]["annotations"] |= dict.fromkeys(bears, "-1")
    assert observe([job("answer")], [last])["answer"].attempts == 5, "nobody is trusted to write a number there"


def numbered(kind: str, index: int) -> dict[str, Any]:
    """A pod of a PyTorchJob."""
    made = pod("answer", name=f"t-{kind}-{index}")
    made["metadata"]["annotations"] = {}
    made["metadata"]["labels"] |= {REPLICA_TYPE: kind, REPLICA_INDEX: str(index)}
    return made


@pytest.mark.parametrize("first", ["master", "worker"], ids=["of an older operator", "of this one"])
def test_the_pods_of_a_pytorchjob_are_told_apart(first: str) -> None:
    pods = [numbered(first, 0), *(numbered("worker", index) for index in range(first == "worker", 3))]
    facts = observe([job("answer", kind="PyTorchJob")], pods)["answer"]
    assert len({one.shard for one in facts.pods}) == len(pods)
    assert facts.attempts == 1


def test_pods_that_a_jobset_has_begun_anew_are_another_attempt() -> None:
    pods = [pod("answer", shard=shard) for shard in range(2)]
    for one in pods:
        one["metadata"]["labels"]["jobset.sigs.k8s.io/restart-attempt"] = "2"
    assert observe([job("answer", kind="TrainJob")], pods)["answer"].attempts == 3


def test_a_child_that_was_given_up_tells_why() -> None:
    child = job("answer", "Failed", kind="PyTorchJob")
    child["metadata"]["annotations"] = {"cgd.dev/given-up": "tried 4 times"}
    facts = observe([child], [])["answer"]
    assert (facts.fate, facts.reason, facts.message) == (Fate.FAILED, "GivenUp", "tried 4 times")


def test_json_in_a_log_is_not_taken_for_last_words() -> None:
    failed = pod("answer", "Failed", terminated=ended(1, '{"level": "error"}'))
    assert '{"level": "error"}' in observe([job("answer", "Failed")], [failed])["answer"].message


def test_a_pod_that_a_more_urgent_one_has_replaced_says_so() -> None:
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    condition["message"] = "default-scheduler: preempting to accommodate a higher priority pod"
    preempted = pod("answer", "Failed", terminated=ended(143))
    preempted["status"]["conditions"] = [condition]
    message = observe([job("answer")], [preempted])["answer"].message
    assert message.startswith("trying again after pod demo-answer-0: exit code 143: PreemptionByScheduler: default-sch")
    preempted["status"]["conditions"] = [{**condition, "status": "False"}]
    assert "Preemption" not in observe([job("answer")], [preempted])["answer"].message


def test_an_init_container_that_an_injector_has_put_before_ours_is_named_when_it_fails() -> None:
    failed = pod("answer", "Failed", waiting={"reason": "PodInitializing"})
    state = {"terminated": ended(1, "resolving istiod\nno such host")}
    failed["status"]["initContainerStatuses"] = [{"name": "istio-init", "state": state}]
    message = observe([job("answer", "Failed")], [failed])["answer"].message
    assert "init container istio-init, which is not the operator's, ended with exit code 1: no such host" in message


def test_a_sidecar_that_ends_badly_is_named_as_what_failed_and_only_if_ours_ended_well() -> None:
    failed = beside(pod("answer", "Failed", terminated=ended(0)), {"terminated": ended(2)})
    message = observe([job("answer", "Failed")], [failed])["answer"].message
    assert (
        "exit code 0: ContainerFailed: container proxy, which is not the operator's, ended with exit code 2" in message
    )
    ours = beside(pod("answer", "Failed", terminated=ended(3, words("no such bucket"))), {"terminated": ended(2)})
    assert "proxy" not in observe([job("answer", "Failed")], [ours])["answer"].message


def test_a_child_that_somebody_has_suspended_says_who_has_not_and_how_it_goes_on() -> None:
    for kind, name in (("Job", "job"), ("PyTorchJob", "pytorchjob"), ("TrainJob", "trainjob")):
        child = job("answer", kind=kind)
        child["spec"] = suspension(kind, True)
        facts = observe([child], [], now=NOW)["answer"]
        assert (facts.fate, facts.reason, facts.held) == (Fate.SUSPENDED, "Suspended", False)
        assert facts.message.startswith(f"somebody has suspended its {kind}, not the operator: `kubectl patch {name} ")
        assert json.dumps({"spec": suspension(kind, False)}) in facts.message


def test_a_child_in_a_queue_without_a_workload_points_to_kueue_and_not_at_once() -> None:
    child = job("answer", suspend=True)
    child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpus"
    assert "whether Kueue works" in observe([child], [], now=NOW)["answer"].message
    child["metadata"]["creationTimestamp"] = "2026-01-01T00:10:20Z"
    assert observe([child], [], now=NOW)["answer"].message == ""


def test_a_child_that_others_keep_from_going_names_their_finalizers() -> None:
    leaving = job("answer")
    leaving["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["backup.example/keep"]}
    assert observe([leaving], [])["answer"].message == (
        "is being deleted; it stays until these finalizers are removed: backup.example/keep"
    )
