"""GPU time: what the pods say, also when they are gone."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.builders import ended, pod, run

from cgd_operator.api.status import CGDRunStatus, StageStatus
from cgd_operator.facts.gpu_usage import Used, count, hours, total
from cgd_operator.facts.pods import Gone, last_state, pods_by_stage
from cgd_operator.planning.dag import plan

NOW = datetime(2026, 1, 1, 0, 10, 30, tzinfo=UTC)


def used(
    *pods: dict[str, Any], before: Used | None = None, now: datetime = NOW, gone: tuple[Gone, ...] = (), gpus: int = 1
) -> Used:
    """Of the stage answer; `gone` are pods whose deletion was seen."""
    stages = (
        (StageStatus(name="answer", gpu_seconds=before.gpu_seconds, pod_gpu_seconds=before.pods),) if before else ()
    )
    children = plan(run({"student.tensorParallel": gpus}))
    return count(children, pods_by_stage(pods, gone, now), CGDRunStatus(stages=stages), now)["answer"]


def ended_pod(name: str, phase: str = "Succeeded", exit_code: int = 0) -> dict[str, Any]:
    """It lasted 100 seconds."""
    return pod("answer", phase, name=name, terminated=ended(exit_code))


def test_a_pod_counts_from_when_a_node_took_it_until_its_container_ended() -> None:
    assert used(ended_pod("a"), gpus=4).gpu_seconds == 400
    slow = ended_pod("a")
    slow["status"]["containerStatuses"][0]["state"]["terminated"]["startedAt"] = "2026-01-01T00:01:00Z"
    assert used(slow).gpu_seconds == 100, "its image was pulled for a minute, on GPUs that nobody else could have"


def test_a_pod_that_no_node_has_taken_counts_nothing() -> None:
    pending = pod("answer", "Pending")
    del pending["status"]["startTime"]
    assert used(pending).gpu_seconds == 0


def test_a_running_pod_counts_whole_minutes_and_one_that_is_being_deleted_every_second() -> None:
    running = pod("answer")
    assert used(running).gpu_seconds == 600
    running["metadata"]["deletionTimestamp"] = "2026-01-01T00:12:00Z"
    assert used(running).gpu_seconds == 630


def test_every_try_counts() -> None:
    assert (
        used(ended_pod("a", "Failed", 201), ended_pod("b", "Failed", 201), pod("answer", name="c")).gpu_seconds == 800
    )


def test_an_evicted_pod_counts_until_its_conditions_last_changed() -> None:
    evicted = pod("answer", "Failed")
    evicted["status"] |= {"reason": "Evicted", "containerStatuses": []}
    evicted["status"]["conditions"] = [
        {"type": "DisruptionTarget", "status": "True", "lastTransitionTime": "2026-01-01T00:05:00Z"},
        {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
    ]
    assert used(evicted).gpu_seconds == 300


def test_a_pod_that_is_gone_counts_what_it_counted_and_the_next_one_comes_on_top() -> None:
    first = used(ended_pod("a"))
    assert used(before=first) == first
    both = used(ended_pod("b"), before=first)
    assert both.gpu_seconds == 200
    assert used(ended_pod("b"), before=both) == both, "counted once, however often it is looked at"


def test_a_pod_that_is_made_again_under_its_name_is_another_pod() -> None:
    again = ended_pod("master-0")
    first = used(again)
    again["metadata"]["uid"] = "another"
    assert used(again, before=first).gpu_seconds == 200


def test_a_pod_counts_to_its_last_second_when_its_deletion_is_seen() -> None:
    running = used(pod("answer", name="a"), now=NOW - timedelta(minutes=5))
    assert running.gpu_seconds == 300
    left = ended_pod("a", "Failed", 143)
    left["status"]["containerStatuses"][0]["state"]["terminated"]["finishedAt"] = "2026-01-01T00:07:43Z"
    seen = used(gone=(last_state(left, NOW),), before=running)
    assert seen == Used(463, {"uid-of-a": 463})
    assert used(gone=(last_state(left, NOW),), before=seen) == seen, "counted once, however often it is looked at"
    assert used(before=seen) == seen


def test_a_deletion_that_is_told_after_a_list_without_the_pod_is_not_counted_twice() -> None:
    unseen = used(before=used(ended_pod("a")))
    assert used(gone=(last_state(ended_pod("a"), NOW),), before=unseen).gpu_seconds == 100


def test_what_each_of_many_pods_that_are_gone_has_used_is_forgotten_and_their_sum_is_kept() -> None:
    assert used(before=Used(5000, {str(number): 10 for number in range(500)})) == Used(5000, {})


def test_a_pod_that_was_deleted_by_force_counts_until_then() -> None:
    assert used(gone=(last_state(pod("answer"), NOW),)).gpu_seconds == 630


def test_a_pod_that_was_deleted_before_it_began_counts_until_then() -> None:
    """Its image was being pulled; the kubelet knows no time at which its container ended."""
    unknown = pod("answer", "Failed", terminated={"exitCode": 137, "reason": "ContainerStatusUnknown"})
    unknown["metadata"]["deletionTimestamp"] = "2026-01-01T00:12:00Z"
    started = {"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-01T00:00:01Z"}
    unknown["status"]["conditions"] = [started]
    assert used(gone=(last_state(unknown, NOW),)).gpu_seconds == 630


def test_a_pod_whose_child_was_deleted_counts_until_it_is_gone() -> None:
    leaving = pod("answer")
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:12:00Z"
    assert used(leaving).gpu_seconds == 630


def test_the_pod_of_a_lost_node_counts_until_it_should_have_been_gone() -> None:
    lost = pod("answer")
    lost["metadata"]["deletionTimestamp"] = "2026-01-01T00:05:00Z"
    assert used(lost).gpu_seconds == 300
    assert used(lost, now=NOW + timedelta(hours=9)).gpu_seconds == 300
    lost["status"] |= {"phase": "Failed", "conditions": [{"type": "DisruptionTarget", "status": "True"}]}
    lost["status"]["conditions"][0]["lastTransitionTime"] = "2026-01-01T09:00:00Z"
    assert used(lost).gpu_seconds == 300, "nine hours later an admin has said that the node is gone"


def test_a_pod_that_a_sidecar_keeps_holds_its_gpus() -> None:
    kept = pod("answer", terminated=ended(0))
    kept["status"]["containerStatuses"].append({"name": "proxy", "state": {"running": {}}})
    assert used(kept).gpu_seconds == 600
    kept["status"]["phase"] = "Succeeded"
    kept["status"]["containerStatuses"][1]["state"] = {"terminated": ended(0, end="2026-01-01T00:05:00Z")}
    assert used(kept).gpu_seconds == 300


def test_the_count_never_goes_back() -> None:
    running = used(pod("answer", name="a"))
    assert used(pod("answer", name="a"), before=running, now=NOW - timedelta(minutes=5)) == running
    assert used(ended_pod("a"), before=running).gpu_seconds == 600


@pytest.mark.parametrize("changes", [{"placement.accelerator": "none"}, {"student.tensorParallel": 2}])
def test_a_run_counts_gpus_and_nothing_else(changes: dict[str, Any]) -> None:
    pods = [pod(stage, "Succeeded", terminated=ended(0)) for stage in ("prepare", "answer")]
    counted = count(plan(run(changes)), pods_by_stage(pods, (), NOW), CGDRunStatus(), NOW)
    assert "prepare" not in counted
    assert total(counted) == (0 if "placement.accelerator" in changes else 200)


def test_hours_have_two_decimals() -> None:
    assert hours(800) == "0.22"
