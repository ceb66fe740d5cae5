"""A run whose pods are refused: controllers and admission are the local cluster's, the rest is real."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web
from support.builders import CHILDREN

from cgd_local import jobs, pytorchjobs, trainjobs
from cgd_local.controllers import Controller, Decision
from cgd_operator.controller.reconciler import Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.kube.kinds import EVENT, JOB, POD, PYTORCHJOB, Kind
from cgd_operator.planning.manifests import STAGE_LABEL, Release

QUOTA = Kind("v1", "ResourceQuota", "resourcequotas")
ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")

embedded_only = pytest.mark.parametrize("world", ["embedded"], indirect=True)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds on a cluster: the sweep, the patience with a missing pod. No rehearsal, or it ended there."""
    monkeypatch.setattr("cgd_operator.controller.queue.SWEEP_SECONDS", 0.1)
    monkeypatch.setattr("cgd_operator.facts.waiting.QUIET", timedelta(0))
    monkeypatch.setattr("cgd_local.controllers.REFUSED_SECONDS", 0.1)
    monkeypatch.setenv("CGD_REHEARSE_PODS", "false")


def of_jobsets(job: dict[str, Any], pods: list[dict[str, Any]], now: float) -> Decision:
    """The Job controller for Jobs that the test does not end itself."""
    return Decision({}) if STAGE_LABEL in job["metadata"].get("labels", {}) else jobs.decide(job, pods, now)


@asynccontextmanager
async def controllers(world: Any, decide: Any = jobs.decide) -> AsyncIterator[None]:
    made = [
        Controller(world.client, JOB, decide),
        Controller(world.client, PYTORCHJOB, pytorchjobs.decide, refusal="FailedCreatePod"),
        trainjobs.TrainJobController(world.client),
    ]
    works = [asyncio.create_task(one.run()) for one in made]
    try:
        yield
    finally:
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)


async def make(world: Any, kind: Kind, name: str, **body: Any) -> None:
    meta = {"name": name, "namespace": "default"}
    await world.client.create(kind, {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": meta, **body})


async def condition(world: Any, kind: str) -> dict[str, Any]:
    found = (await world.get()).get("status", {}).get("conditions", [])
    return next((one for one in found if one["type"] == kind), {})


async def says(world: Any, *words: str) -> bool:
    message = (await condition(world, "Reconciling")).get("message", "")
    return all(one in message for one in words)


async def is_stalled(world: Any, status: str) -> bool:
    return (await condition(world, "Stalled")).get("status") == status


async def has_pod(world: Any) -> bool:
    return bool((await world.client.list(POD, "default"))[0])


@pytest.mark.parametrize(("backend", "reason"), [("PyTorchJob", "FailedCreatePod"), ("TrainJob", "FailedCreate")])
@embedded_only
async def test_an_absent_service_account_is_told_of_every_kind_of_child(world: Any, backend: str, reason: str) -> None:
    async with controllers(world, of_jobsets), world.operator():
        await world.apply({"serviceAccountName": "trainer", "training.backend": backend})
        await world.play(*CHILDREN[: CHILDREN.index("train-cgd")])
        await world.until(lambda: says(world, "stage train-cgd waits", 'serviceaccount "trainer" not found'))
        assert (await condition(world, "Stalled"))["reason"] == reason
        assert await world.state() == "Waiting"
        await make(world, ACCOUNT, "trainer")
        await world.until(lambda: has_pod(world))
        await world.until(lambda: says(world, "the pod is being started"))


@embedded_only
async def test_a_job_that_its_jobset_may_not_make_is_told_from_the_jobset(world: Any) -> None:
    def no_jobs_of_jobsets(request: web.Request) -> web.Response | None:
        if request.method != "POST" or not request.path.endswith("/jobs") or "cgd-operator" in request.path_qs:
            return None
        words = 'jobs.batch "x" is forbidden: exceeded quota: jobs'
        return web.json_response({"kind": "Status", "code": 403, "reason": "Forbidden", "message": words}, status=403)

    world.embedded.fault = no_jobs_of_jobsets
    async with controllers(world, of_jobsets), world.operator():
        await world.apply({"training.backend": "TrainJob"})
        await world.play(*CHILDREN[: CHILDREN.index("train-cgd")])
        await world.until(lambda: says(world, "stage train-cgd waits: no pod can be made: exceeded quota: jobs"))
    assert (await condition(world, "Reconciling"))["reason"] == "JobCreationFailed"


@embedded_only
async def test_what_a_person_must_mend_stalls_the_run_in_time_until_it_is_mended(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CGD_STALLED_AFTER_SECONDS", "2")
    async with controllers(world), world.operator():
        await world.apply({"serviceAccountName": "trainer"})
        await world.until(lambda: says(world, "service account"))
        await world.until(lambda: is_stalled(world, "True"))
        told = [one["reason"] for one in (await world.client.list(EVENT, "default"))[0] if one["type"] == "Warning"]
        assert "RunStalled" in told
        await make(world, ACCOUNT, "trainer")
        await world.until(lambda: is_stalled(world, "False"))


async def test_a_child_without_a_pod_is_looked_at_again_when_its_events_say_why(world: Any) -> None:
    reconciler = Reconciler(world.client, Release("generate", "train"), Board(), b"key")
    await world.apply()
    assert await reconciler.reconcile("default", "demo") == 11
    await world.end("prepare", "Failed")
    assert await reconciler.reconcile("default", "demo") is None


async def test_a_full_quota_is_told_and_stalls_nothing(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGD_STALLED_AFTER_SECONDS", "0")
    await make(world, QUOTA, "small", spec={"hard": {"pods": "0"}})
    async with controllers(world), world.operator():
        await world.apply()
        await world.until(lambda: says(world, "stage prepare waits: no pod can be made: exceeded quota: small"))
        assert await is_stalled(world, "False")
        await world.client.patch(QUOTA, "small", "default", {"spec": {"hard": {"pods": "1"}}})
        await world.until(lambda: has_pod(world))
        await world.until(lambda: says(world, "the pod is being started"))
