"""Faults of the API server, its definitions and the operator's own machine: what a run does, and what people see."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from support.builders import CHILDREN, manifest
from support.pod_player import ago, make_pod

from cgd_operator.kube import client as kube
from cgd_operator.kube.clock import Clock
from cgd_operator.kube.kinds import CRD, JOB, NAMESPACE, POD, RUN, ApiError
from cgd_operator.planning.manifests import RUN_LABEL, STAGE_LABEL

embedded_only = pytest.mark.parametrize("world", ["embedded"], indirect=True)
"""For faults of the API server."""
HELD = "batch.kubernetes.io/job-tracking"
Fault = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens without any event is seen in the sweep, every 30 s on a cluster."""
    monkeypatch.setattr("cgd_operator.controller.queue.SWEEP_SECONDS", 0.1)
    monkeypatch.setattr("cgd_operator.controller.queue.RETRY_SECONDS", 0.05)


async def has_child(world: Any, stage: str) -> bool:
    return stage in await world.children()


async def state_is(world: Any, state: str) -> bool:
    return bool(await world.state() == state)


async def condition(world: Any, kind: str) -> dict[str, Any]:
    found = (await world.get()).get("status", {}).get("conditions", [])
    return next((one for one in found if one["type"] == kind), {})


async def stage(world: Any, name: str) -> dict[str, Any]:
    stages: list[dict[str, Any]] = (await world.get()).get("status", {}).get("stages", [])
    return next((one for one in stages if one["name"] == name), {})


@pytest.mark.parametrize("hours", [-1, 1])
async def test_an_operator_whose_clock_is_an_hour_off_calls_no_node_lost_and_ends_no_run_early(
    world: Any, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    monkeypatch.setattr(kube, "Clock", lambda: Clock(lambda: time.time() + hours * 3600))

    async def is_counted() -> bool:
        return bool((await stage(world, "answer")).get("gpuSeconds", 0) >= 60)

    async def has_seen_it() -> bool:
        return bool((await world.get())["status"]["observedGeneration"] == 2)

    async with world.operator():
        run = await world.apply({"ttlSecondsAfterFinished": 3000, "budget": {"deadlineSeconds": 3000}})
        await world.end("prepare")
        await world.until(lambda: has_child(world, "answer"))
        await make_pod(world, run, HELD, phase="Running", startTime=ago(100), state={"running": {}})
        await world.client.delete(POD, "pod", "default", grace=1000)
        await world.until(is_counted)
        told = await stage(world, "answer")
        assert (told["state"], told.get("reason")) == ("Running", None)
        assert told["gpuSeconds"] < 3000
        await world.play(*CHILDREN[1:])
        await world.until(lambda: state_is(world, "Succeeded"))
        await world.client.patch(RUN, "demo", "default", {"spec": {"ttlSecondsAfterFinished": 3001}})
        await world.until(has_seen_it)


def of_operator(request: web.Request, method: str, path: str) -> bool:
    """Whether it is a read of the run's children, or a write, by the operator, and no dry run."""
    by = "fieldManager=cgd-operator" if method != "GET" else "run-uid"
    return (
        request.method == method
        and path in request.path
        and by in request.path_qs
        and not {"dryRun", "watch"} & set(request.query)
    )


@embedded_only
async def test_a_read_that_hangs_is_given_up_and_the_run_goes_on(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube, "READ_TIMEOUT", aiohttp.ClientTimeout(total=0.5))
    hung: list[str] = []

    async def hangs(request: web.Request) -> web.StreamResponse | None:
        if not hung and of_operator(request, "GET", "/jobs"):
            hung.append(request.path)
            await asyncio.sleep(3600)
        return None

    world.embedded.fault = hangs
    async with world.operator():
        await world.apply()
        await world.until(lambda: has_child(world, "prepare"))
    assert hung


@embedded_only
async def test_a_write_may_take_longer_than_a_read_because_webhooks_do(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (kube.WRITE_TIMEOUT.total or 0) > 30, "the longest time-out of a webhook"
    monkeypatch.setattr(kube, "READ_TIMEOUT", aiohttp.ClientTimeout(total=0.05))

    async def slow(_: web.Request) -> None:
        await asyncio.sleep(0.2)

    world.embedded.fault = slow
    await world.client.create(RUN, {"metadata": {"name": "a", "namespace": "default"}} | {"spec": manifest()["spec"]})
    with pytest.raises(ApiError, match="Unreachable"):
        await world.client.get(RUN, "a", "default")
    world.embedded.fault = None


@embedded_only
async def test_a_child_whose_creation_is_never_answered_is_made_once(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube, "WRITE_TIMEOUT", aiohttp.ClientTimeout(total=0.5))
    hung: list[str] = []

    async def acts_and_hangs(request: web.Request) -> web.StreamResponse | None:
        if not hung and of_operator(request, "POST", "/jobs"):
            hung.append(request.path)
            await world.embedded._route(request)
            await asyncio.sleep(3600)
        return None

    world.embedded.fault = acts_and_hangs
    async with world.operator():
        await world.apply()
        await world.play("prepare")
        await world.until(lambda: has_child(world, "answer"))
    assert hung


@embedded_only
@pytest.mark.parametrize("status", [200, 500])
async def test_a_proxy_that_answers_with_a_page_is_no_bug_and_the_run_goes_on(
    world: Any, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    pages: list[str] = []

    async def page(request: web.Request) -> web.StreamResponse | None:
        if len(pages) < 3 and of_operator(request, "GET", "/jobs"):
            pages.append(request.path)
            return web.Response(text="<html>please log in</html>", status=status)
        return None

    world.embedded.fault = page
    async with world.operator():
        await world.apply()
        await world.until(lambda: has_child(world, "prepare"))
    assert pages
    assert "this is a bug" not in caplog.text


@embedded_only
async def test_a_webhook_that_times_out_on_a_suspension_is_told_and_the_run_is_not_called_suspended(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = 'Internal error occurred: failed calling webhook "vjob.kb.io": failed to call webhook: Post '
    words += '"https://kueue-webhook-service.kueue-system.svc:443/validate?timeout=10s": context deadline exceeded'
    over: list[bool] = []

    async def down(request: web.Request) -> web.StreamResponse | None:
        if over or not of_operator(request, "PATCH", "/jobs/"):
            return None
        return web.json_response(
            {"kind": "Status", "code": 500, "reason": "InternalError", "message": words}, status=500
        )

    async def is_told() -> bool:
        told = await condition(world, "Reconciling")
        return told.get("reason") == "WebhookUnavailable" and "answer cannot be suspended" in told["message"]

    async with world.operator():
        await world.apply()
        await world.play("prepare")
        await world.until(lambda: has_child(world, "answer"))
        world.embedded.fault = down
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(is_told)
        assert (await condition(world, "Suspended"))["status"] == "False"
        assert (await condition(world, "Stalled"))["status"] == "False"
        over.append(True)
        await world.until(lambda: state_is(world, "Suspended"))
    assert (await world.children())["answer"]["spec"]["suspend"] is True


@embedded_only
async def test_a_change_that_a_policy_refuses_is_told_with_what_stays(world: Any) -> None:
    async def denied(request: web.Request) -> web.StreamResponse | None:
        if not of_operator(request, "PATCH", "/jobs/"):
            return None
        words = 'admission webhook "freeze.example" denied the request: changes are frozen'
        return web.json_response({"kind": "Status", "code": 403, "reason": "Forbidden", "message": words}, status=403)

    async def is_told() -> bool:
        told = await condition(world, "Stalled")
        return told.get("reason") == "ChangeRefused" and told["status"] == "True"

    async with world.operator():
        await world.apply()
        await world.until(lambda: has_child(world, "prepare"))
        world.embedded.fault = denied
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(is_told)
        told = (await condition(world, "Stalled"))["message"]
        assert "stage prepare cannot be suspended, and stays as it was: " in told
        assert "changes are frozen" in told
        world.embedded.fault = None
        await world.until(lambda: state_is(world, "Suspended"))


async def definition(world: Any) -> dict[str, Any]:
    found: dict[str, Any] = await world.client.get(CRD, "cgdruns.cgd.dev")
    return found


@pytest.mark.parametrize("old", ["no subresource", "no such field"])
async def test_a_definition_that_takes_no_status_is_named_in_the_log_and_the_status_comes_when_it_is_mended(
    world: Any, old: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = (await definition(world))["spec"]["versions"]
    bad = (await definition(world))["spec"]["versions"]
    if old == "no subresource":
        bad[0]["subresources"] = {}
    else:
        del bad[0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]["state"]
        bad[0]["additionalPrinterColumns"] = []
    await world.client.patch(CRD, "cgdruns.cgd.dev", None, {"spec": {"versions": bad}})

    async def is_named() -> bool:
        return "the CGDRun definition is not the one of this release" in caplog.text

    async with world.operator():
        await world.apply()
        await world.until(is_named)
        assert await has_child(world, "prepare"), "the run itself goes on"
        assert "this is a bug" not in caplog.text
        await world.client.patch(CRD, "cgdruns.cgd.dev", None, {"spec": {"versions": good}})
        await world.until(lambda: state_is(world, "Preparing"))


async def make_run(world: Any, namespace: str, changes: dict[str, Any] | None = None) -> None:
    body = manifest(changes, namespace=namespace)
    del body["metadata"]["uid"], body["metadata"]["generation"]
    await world.client.create(RUN, body)


async def jobs_of(world: Any, namespace: str) -> list[str]:
    jobs = (await world.client.list(JOB, namespace, labels=f"{RUN_LABEL}=demo"))[0]
    return [job["metadata"]["labels"][STAGE_LABEL] for job in jobs]


@embedded_only
async def test_two_operators_of_two_namespaces_leave_each_others_runs_alone(world: Any) -> None:
    await world.client.create(NAMESPACE, {"metadata": {"name": "team"}})
    for namespace in ("team", "default"):
        await make_run(world, namespace)
    since = len(world.embedded.requests)
    async with world.operator(("default",)):
        await world.until(lambda: jobs_of(world, "default"))
    asked = [path for _, path in list(world.embedded.requests)[since:]]
    assert not [path for path in asked if "/namespaces/team/" in path or "/v1alpha1/cgdruns" in path]
    async with world.operator(("default",)), world.operator(("team",)):
        await world.until(lambda: jobs_of(world, "team"))
        await world.play("prepare")
        await world.until(lambda: has_child(world, "answer"))
    assert await jobs_of(world, "team") == ["prepare"]


@embedded_only
async def test_a_namespace_that_goes_takes_its_runs_along_though_nothing_can_be_made_in_it(world: Any) -> None:
    await world.client.create(NAMESPACE, {"metadata": {"name": "team"}})

    async def is_gone() -> bool:
        return await world.client.get(NAMESPACE, "team") is None

    async def is_held() -> bool:
        run = await world.client.get(RUN, "demo", "team")
        return bool(run["metadata"].get("finalizers"))

    async with world.operator():
        await make_run(world, "team", {"deletionPolicy": "Delete"})
        await world.until(lambda: jobs_of(world, "team"))
        await world.until(is_held)
        await world.client.delete(NAMESPACE, "team")
        await world.until(is_gone)


@embedded_only
async def test_a_definition_that_is_deleted_and_comes_back_is_worked_with_again(world: Any) -> None:
    whole = await definition(world)

    async def is_gone() -> bool:
        return await world.client.get(CRD, "cgdruns.cgd.dev") is None

    async def is_served() -> bool:
        try:
            await make_run(world, "default")
        except ApiError:  # it is not served yet
            return False
        return True

    async with world.operator():
        await world.apply()
        await world.until(lambda: has_child(world, "prepare"))
        name = (await world.children())["prepare"]["metadata"]["name"]
        await world.client.delete(CRD, "cgdruns.cgd.dev")
        await world.until(is_gone)
        await world.client.delete(JOB, name, "default")  # as the garbage collector does
        fresh = {key: whole[key] for key in ("apiVersion", "kind", "spec")}
        await world.client.create(CRD, fresh | {"metadata": {"name": "cgdruns.cgd.dev"}})
        await world.until(is_served)
        await world.until(lambda: has_child(world, "prepare"))


@pytest.mark.parametrize("reason", ["ImagePullBackOff", "ErrImagePull"])
async def test_an_image_that_is_pulled_in_the_end_ends_the_alarm(
    world: Any, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr("cgd_operator.status.render.STALLED_AFTER", timedelta(0))
    monkeypatch.setenv("CGD_STALLED_AFTER_SECONDS", "0")

    async def stalled() -> bool:
        return (await condition(world, "Stalled")).get("reason") == reason

    async def goes_on() -> bool:
        return (await condition(world, "Stalled")).get("status") == "False" and await state_is(world, "Answering")

    async with world.operator():
        run = await world.apply()
        await world.end("prepare")
        await world.until(lambda: has_child(world, "answer"))
        waiting = {"waiting": {"reason": reason, "message": "Back-off pulling image"}}
        await make_pod(world, run, phase="Pending", startTime=ago(10), state=waiting)
        await world.until(stalled)
        assert (await condition(world, "Stalled"))["status"] == "True"
        await pod_is(world, phase="Running", startTime=ago(10), state={"running": {"startedAt": ago(1)}})
        await world.until(goes_on)


async def pod_is(world: Any, **status: Any) -> None:
    container = {"name": "stage", "image": "image", "imageID": "", "ready": True, "restartCount": 0}
    status["containerStatuses"] = [{**container, "state": status.pop("state", {})}]
    await world.client.patch(POD, "pod", "default", {"status": status}, subresource="status")


async def test_a_volume_that_is_not_bound_is_told_and_alarms_nobody(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CGD_STALLED_AFTER_SECONDS", "0")
    words = "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims."

    async def is_told() -> bool:
        return words in (await condition(world, "Reconciling")).get("message", "")

    async with world.operator():
        run = await world.apply()
        await world.end("prepare")
        await world.until(lambda: has_child(world, "answer"))
        unbound = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
        await make_pod(world, run, phase="Pending", conditions=[unbound])
        await world.until(is_told)
        assert (await condition(world, "Stalled"))["status"] == "False"
        assert await world.state() == "Waiting"
