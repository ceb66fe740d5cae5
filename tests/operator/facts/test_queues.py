"""Kueue: what a child tells it, and what its Workload tells of a child."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from support.builders import CHILDREN, RELEASE, job, manifest, pod
from support.kueue_player import QUEUE
from support.status_builders import NOW, render_of

from cgd_operator.facts.children import ChildFacts, Fate, observe, queued
from cgd_operator.facts.decide import Hold, Resume, decide
from cgd_operator.planning.dag import BACKENDS, Backend, Run, plan
from cgd_operator.planning.manifests import manifest as child_manifest
from cgd_operator.planning.manifests import suspension, training_runtime


def in_queue(*, suspend: bool = True, held: bool = False, kind: str = "Job") -> dict[str, Any]:
    child = job("answer", kind=kind, held=held)
    child["spec"] = suspension(kind, suspend)
    child["metadata"]["uid"] = "uid-of-answer"
    child["metadata"]["labels"] |= QUEUE
    return child


def workload(
    *conditions: tuple[str, str, str], active: bool = True, held: bool = False, **status: Any
) -> dict[str, Any]:
    """`conditions`: type, which is false after a `!`; reason; message."""
    told = [
        {"type": kind.strip("!"), "status": "False" if kind[0] == "!" else "True", "reason": reason, "message": message}
        for kind, reason, message in conditions
    ]
    meta = {
        "name": "job-answer-1",
        "labels": {"kueue.x-k8s.io/job-uid": "uid-of-answer"},
        "annotations": {"cgd.dev/suspended-by-run": "true"} if held else {},
    }
    head = {"apiVersion": "kueue.x-k8s.io/v1beta2", "metadata": meta}
    return {**head, "spec": {"active": active}, "status": {"conditions": told, **status}}


def facts(
    child: dict[str, Any], *workloads: dict[str, Any], pods: tuple[dict[str, Any], ...] = (), now: datetime = NOW
) -> ChildFacts:
    return observe([child], pods, workloads, now=now)["answer"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_child_has_the_runs_queue_and_priority_and_nothing_else_of_its_labels(backend: Backend) -> None:
    body = manifest()
    body["metadata"]["labels"] = {**QUEUE, "app.kubernetes.io/instance": "argo"}
    this = Run.of(body)
    made = {child.stage: child_manifest(this, child, RELEASE) for child in plan(this, backend)}
    assert [stage for stage, one in made.items() if QUEUE.items() <= one["metadata"]["labels"].items()] == CHILDREN
    assert "argo" not in str(made)
    assert "kueue" not in str([one["spec"] for one in made.values()])
    assert "kueue" not in str([training_runtime(this, child, RELEASE) for child in plan(this, backend)])


def test_a_child_of_a_run_without_a_queue_names_none() -> None:
    this = Run.of(manifest())
    assert "kueue" not in str([child_manifest(this, child, RELEASE) for child in plan(this)])


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob", "TrainJob"])
def test_a_child_that_waits_for_quota_says_so_in_kueues_words(kind: str) -> None:
    full = ("!QuotaReserved", "Pending", "couldn't assign flavors: insufficient quota for nvidia.com/gpu")
    found = facts(in_queue(kind=kind), workload(full))
    assert (found.fate, found.reason) == (Fate.WAITING, "WaitingForQuota")
    assert found.message == f"waiting for quota; {full[1]}: {full[2]}"


def test_a_workload_that_nobody_has_looked_at_yet_waits_for_quota() -> None:
    assert facts(in_queue(), workload()).message == "waiting for quota"
    bare = workload()
    del bare["status"], bare["spec"]["active"], bare["metadata"]["annotations"]
    assert facts(in_queue(), bare).message == "waiting for quota"


def test_an_eviction_is_told_while_the_child_waits_again() -> None:
    evicted = ("Evicted", "Preempted", "Preempted to accommodate a workload of higher priority")
    again = facts(in_queue(), workload(("!QuotaReserved", "Pending", "no quota"), evicted))
    assert again.message == f"waiting for quota; Pending: no quota; evicted before: Preempted: {evicted[2]}"
    same = facts(in_queue(), workload(("!QuotaReserved", "Pending", evicted[2]), evicted))
    assert same.message == f"waiting for quota; Pending: {evicted[2]}"


def test_quota_alone_is_not_admission() -> None:
    checks = [{"name": "ready", "state": "Ready"}, {"name": "nodes", "state": "Pending", "message": "provisioning"}]
    reserved = ("QuotaReserved", "QuotaReserved", "")
    found = facts(in_queue(), workload(reserved, admissionChecks=checks))
    assert (found.fate, found.reason) == (Fate.WAITING, "WaitingForAdmission")
    assert found.message == "has quota, waits for Kueue's admission checks (nodes: provisioning)"
    assert facts(in_queue(), workload(reserved, ("Admitted", "Admitted", ""))).reason == "Admitted"


def test_what_kueue_has_admitted_and_cannot_start_is_told_with_where_to_look() -> None:
    admitted = workload(("Admitted", "Admitted", ""))
    admitted["status"]["conditions"][0]["lastTransitionTime"] = "2026-01-01T00:10:00Z"
    assert facts(in_queue(), admitted, now=NOW + timedelta(seconds=14)).reason == "Admitted"
    found = facts(in_queue(), admitted, now=NOW + timedelta(seconds=15))
    assert (found.fate, found.reason, found.stuck) == (Fate.WAITING, "NotStarted", None)
    assert "admitted it at 2026-01-01T00:10:00Z" in found.message
    assert "Kueue's controller and its webhooks" in found.message


def test_a_workload_that_somebody_deactivated_says_how_to_go_on_and_is_left_alone() -> None:
    found = facts(in_queue(), workload(("Evicted", "Deactivated", "The workload is deactivated"), active=False))
    assert (found.fate, found.reason) == (Fate.SUSPENDED, "Deactivated")
    assert "job-answer-1 was deactivated (The workload is deactivated); set the Workload's spec.active" in found.message
    for stop in (True, False):
        assert decide(plan(Run.of(manifest())), {"answer": found, "prepare": done()}, stop=stop, enough={}) == ()


def done() -> ChildFacts:
    return observe([job("prepare", "Complete")], [])["prepare"]


def decided(found: ChildFacts, *, stop: bool) -> list[type]:
    return [
        type(one)
        for one in decide(plan(Run.of(manifest())), {"answer": found, "prepare": done()}, stop=stop, enough={})
    ]


def test_a_child_that_waits_in_a_queue_is_left_to_the_queue_until_the_run_stops() -> None:
    waiting = facts(in_queue(), workload())
    assert decided(waiting, stop=False) == []
    assert decided(waiting, stop=True) == [Hold]


def test_a_child_is_held_once_even_while_kueue_has_not_stopped_it() -> None:
    running = facts(in_queue(suspend=False), workload(active=False, held=True), pods=(pod("answer"),))
    assert running.fate is Fate.RUNNING
    assert decided(running, stop=True) == []
    assert decided(running, stop=False) == [Resume]
    stopped = facts(in_queue(), workload(active=False, held=True))
    assert (stopped.fate, stopped.reason) == (Fate.SUSPENDED, "Suspended")
    assert decided(stopped, stop=False) == [Resume]


def test_what_an_administrator_activated_again_is_held_again() -> None:
    assert decided(facts(in_queue(), workload(active=True, held=True)), stop=True) == [Hold]


def test_a_child_that_the_operator_suspended_itself_does_not_wait_for_quota() -> None:
    assert facts(in_queue(held=True), workload()).fate is Fate.SUSPENDED


def test_kueue_is_asked_about_children_that_it_may_hold_and_no_others() -> None:
    def asked(child: dict[str, Any]) -> bool:
        return bool(queued([child]))

    assert all(asked(one) for one in (in_queue(), in_queue(suspend=False), in_queue(held=True)))
    ended = in_queue()
    ended["status"]["conditions"] = [{"type": "Complete", "status": "True"}]
    assert not asked(ended)
    nameless, running, ours = (job("answer", suspend=suspend) for suspend in (True, False, True))
    ours["metadata"]["annotations"]["cgd.dev/suspended-by-run"] = "true"
    for one in (nameless, running, ours):
        one["metadata"]["uid"] = "u"
    assert asked(nameless)
    assert not asked(running)
    assert not asked(ours)


def test_the_status_of_a_run_says_which_stage_waits_for_quota() -> None:
    status = render_of(
        job("prepare", "Complete"), in_queue(), workloads=(workload(("!QuotaReserved", "Pending", "no quota")),)
    )
    (answer,) = [one for one in status.stages if one.name == "answer"]
    assert (answer.state, answer.reason) == ("Waiting", "WaitingForQuota")
    assert (status.state, status.progress) == ("Queued", "1/9 stages")
    told = {one.type: one for one in status.conditions}
    assert told["Reconciling"].message == "stage answer waits: waiting for quota; Pending: no quota"
    assert (told["Reconciling"].status, told["Stalled"].status) == ("True", "False")
