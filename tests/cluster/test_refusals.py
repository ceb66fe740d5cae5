"""A run with a child that the API server will not have is told so before its first child is made."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web

from cgd_operator.controller.reconciler import Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import NAMESPACE, ApiError, Kind
from cgd_operator.planning import manifests

QUOTA = Kind("v1", "ResourceQuota", "resourcequotas")
LIMITS = Kind("v1", "LimitRange", "limitranges")
PRIORITY = Kind("scheduling.k8s.io/v1", "PriorityClass", "priorityclasses", namespaced=False)
ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")
GPUS = {"placement.training": {"resources": {"limits": {"memory": "64Gi"}}}}

embedded_only = pytest.mark.parametrize("world", ["embedded"], indirect=True)
"""For faults, and for admission of ServiceAccounts, which a server without their controller does not have."""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused run is tried again in the sweep, every 30 s on a cluster."""
    monkeypatch.setattr("cgd_operator.controller.queue.SWEEP_SECONDS", 0.1)


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"placement.student.tolerations": [{"operator": {"is": "Exists"}}]}, "answer"),
        ({"placement.teacher.affinity": {"nodeAffinity": "gpu"}}, "teacher"),
        ({"placement.training.affinity": {"nodeAffinity": "gpu"}}, "train-cgd"),
        ({"placement.training.affinity": {"nodeAffinity": "gpu"}, "training.backend": "TrainJob"}, "train-cgd"),
        ({"placement.cpu.affinity": {"podAffinity": []}}, "prepare"),
    ],
)
async def test_a_child_that_would_be_refused_is_told_before_anything_is_started(
    world: Any, changes: dict[str, Any], stage: str
) -> None:
    async with world.operator():
        await world.apply(changes)
        await world.until(lambda: is_refused(world))
    assert f"refused the child of stage {stage}: " in (await stalled(world))["message"]
    assert (await stalled(world))["status"] == "True"
    assert await world.children() == {}


async def stalled(world: Any) -> dict[str, Any]:
    found: list[dict[str, Any]] = (await world.get()).get("status", {}).get("conditions", [])
    return next((one for one in found if one["type"] == "Stalled"), {})


async def is_refused(world: Any) -> bool:
    return (await stalled(world)).get("reason") == "ChildRefused"


async def started(world: Any) -> bool:
    return "prepare" in await world.children()


async def make(world: Any, kind: Kind, name: str, **body: Any) -> None:
    meta = {"name": name} | ({"namespace": "default"} if kind.namespaced else {})
    await world.client.create(kind, {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": meta, **body})


@embedded_only
async def test_an_absent_service_account_is_told_and_the_run_goes_on_when_it_is_made(world: Any) -> None:
    async with world.operator():
        await world.apply({"serviceAccountName": "trainer"})
        await world.until(lambda: is_refused(world))
        told = await stalled(world)
        assert 'serviceaccount "trainer" not found; create the ServiceAccount' in told["message"]
        assert told["status"] == "False"  # it may be on its way: alarms after some minutes
        await make(world, ACCOUNT, "trainer")
        await world.until(lambda: started(world))


async def test_an_absent_priority_class_is_told(world: Any) -> None:
    async with world.operator():
        await world.apply({"placement.training.priorityClassName": "urgent"})
        await world.until(lambda: is_refused(world))
        assert "stage train-cgd: no PriorityClass with name urgent was found" in (await stalled(world))["message"]
        await make(world, PRIORITY, "urgent", value=1000)
        await world.until(lambda: started(world))


async def test_a_limit_range_that_no_pod_of_a_stage_can_pass_is_told(world: Any) -> None:
    limit = {"type": "Container", "max": {"memory": "16Gi"}}
    await make(world, LIMITS, "small", spec={"limits": [limit]})
    async with world.operator():
        await world.apply(GPUS)
        await world.until(lambda: is_refused(world))
    told = (await stalled(world))["message"]
    assert "stage train-cgd: maximum memory usage per Container is 16Gi, but limit is 64Gi; change resources" in told


async def test_a_quota_that_wants_limits_is_told_with_the_field_to_set(world: Any) -> None:
    await make(world, QUOTA, "compute", spec={"hard": {"limits.cpu": "100"}})
    async with world.operator():
        await world.apply()
        await world.until(lambda: is_refused(world))
    told = (await stalled(world))["message"]
    assert "stage prepare: failed quota: compute: must specify limits.cpu" in told
    assert "resources of the stage's pool in spec.placement" in told


async def test_a_quota_that_is_full_now_refuses_nothing(world: Any) -> None:
    await make(world, QUOTA, "full", spec={"hard": {"pods": "0"}})
    async with world.operator():
        await world.apply()
        await world.until(lambda: started(world))


@embedded_only
async def test_a_quota_of_jobs_that_is_full_is_a_wait_and_no_alarm(world: Any) -> None:
    world.embedded.fault = full = Refusing("/jobs", 403, 'jobs.batch "x" is forbidden: exceeded quota: jobs')
    async with world.operator():
        await world.apply()
        await world.until(lambda: says(world, "exceeded quota: jobs; it goes on by itself"))
        assert ((await stalled(world))["status"], (await stalled(world))["reason"]) == ("False", "QuotaExceeded")
        full.over = True
        await world.until(lambda: started(world))


async def says(world: Any, words: str) -> bool:
    return words in (await stalled(world)).get("message", "")


class Refusing:
    """Answers the operator's creations below a path with an error, until it is over."""

    def __init__(self, path: str, code: int, message: str, *, dry: bool = False) -> None:
        self.path, self.code, self.message, self.dry, self.over = path, code, message, dry, False
        self.asked = 0

    def __call__(self, request: web.Request) -> web.Response | None:
        ours = request.method == "POST" and request.path.endswith(self.path) and "cgd-operator" in request.path_qs
        if self.over or not ours or (self.dry and "dryRun" not in request.query):
            return None
        self.asked += 1
        body = {"kind": "Status", "code": self.code, "reason": "Refused", "message": self.message}
        return web.json_response(body, status=self.code)


@embedded_only
async def test_a_policy_against_pods_is_told_with_whom_to_ask(world: Any) -> None:
    world.embedded.fault = Refusing(
        "/pods", 400, 'admission webhook "owners" denied the request: name an owner', dry=True
    )
    async with world.operator():
        await world.apply()
        await world.until(lambda: is_refused(world))
    told = (await stalled(world))["message"]
    assert "name an owner; change what the policy names" in told
    assert "rehearsal.pods=false" in told


@embedded_only
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (400, 'admission webhook "old" does not support dry run because the sideEffects field is not set to None'),
        (403, 'pods is forbidden: User "system:serviceaccount:cgd:cgd" cannot create resource "pods" in API group ""'),
        (500, 'Internal error occurred: failed calling webhook "slow": context deadline exceeded'),
    ],
)
async def test_what_cannot_be_judged_beforehand_refuses_nothing(world: Any, code: int, message: str) -> None:
    world.embedded.fault = fault = Refusing("/pods", code, message, dry=True)
    async with world.operator():
        await world.apply()
        await world.until(lambda: started(world))
    assert fault.asked == 4  # pods of four pools


@embedded_only
async def test_a_webhook_that_is_down_is_told_and_waited_for(world: Any) -> None:
    down = 'Internal error occurred: failed calling webhook "mjob.kb.io": connection refused'
    world.embedded.fault = fault = Refusing("/jobs", 500, down)
    async with world.operator():
        await world.apply()
        await world.until(lambda: says(world, 'failed calling webhook "mjob.kb.io"'))
        assert ((await stalled(world))["status"], (await stalled(world))["reason"]) == ("False", "WebhookUnavailable")
        fault.over = True
        await world.until(lambda: started(world))


@embedded_only
async def test_a_right_that_the_operator_lacks_is_told_with_whom_to_ask(world: Any) -> None:
    words = 'jobs.batch is forbidden: User "system:serviceaccount:cgd:cgd" cannot create resource "jobs"'
    world.embedded.fault = Refusing("/jobs", 403, words)
    async with world.operator():
        await world.apply()
        await world.until(lambda: is_refused(world))
    assert "administrator must give this user the right" in (await stalled(world))["message"]


@embedded_only
async def test_a_trainjob_is_not_tried_without_its_runtime_which_is(world: Any) -> None:
    """The Trainer's webhook refuses each dry run of a TrainJob: the runtime that it names is not there yet."""
    missing = 'admission webhook "validator.trainjob" denied the request: spec.runtimeRef: Invalid value'
    world.embedded.fault = fault = Refusing("/trainjobs", 403, missing, dry=True)
    async with world.operator():
        await world.apply({"training.backend": "TrainJob"})
        await world.until(lambda: started(world))
    assert fault.asked == 0
    tried = [path for method, path in world.embedded.requests if method == "POST" and "dryRun" in path]
    assert len([path for path in tried if "/trainingruntimes" in path]) == 1
    assert len([path for path in tried if "/pods" in path]) == len([path for path in tried if "/jobs" in path]) == 4


@embedded_only
async def test_without_the_right_to_create_pods_none_is_tried(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGD_REHEARSE_PODS", "false")
    async with world.operator():
        await world.apply()
        await world.until(lambda: started(world))
    assert not [path for method, path in world.embedded.requests if method == "POST" and "/pods" in path]


@embedded_only
async def test_a_refusal_alarms_after_the_time_that_people_have(world: Any) -> None:
    run = await world.apply({"serviceAccountName": "trainer"})
    patience = datetime.now(UTC) - datetime.fromisoformat(run["metadata"]["creationTimestamp"])
    for late, status in ((timedelta(hours=1), "False"), (patience, "True")):
        release = manifests.Release("generate", "train")
        reconciler = Reconciler(world.client, release, Board(), b"key", stalled_after=late)
        await reconciler.reconcile("default", "demo")
        assert (await stalled(world))["status"] == status


async def test_a_quota_that_is_used_up_at_the_start_refuses_nothing_for_good(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Cluster.create

    async def refuse(self: Cluster, kind: Kind, body: dict[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        if dry_run:
            raise ApiError(403, "Forbidden", "exceeded quota")
        return await create(self, kind, body)

    monkeypatch.setattr(Cluster, "create", refuse)
    async with world.operator():
        await world.apply()
        await world.play("prepare")
        await world.play("answer")


async def test_stage_pods_pass_a_namespace_that_enforces_restricted(world: Any) -> None:
    label = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    await world.client.patch(NAMESPACE, "default", None, label)
    async with world.operator():
        await world.apply()
        await world.until(lambda: started(world))
