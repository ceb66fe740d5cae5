"""What becomes of pods: deleted ones are told by the watch alone, and those of lost nodes by nobody."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest
from support.builders import ended
from support.pod_player import ago, in_an_hour, make_pod, stopped, tell_pod

from cgd_operator.kube.client import Cluster
from cgd_operator.kube.clock import Clock
from cgd_operator.kube.kinds import EVENT, POD, RUN, Kind

WORDS = '{"outcome": "failed", "message": "no such bucket", "hint": "create it"}'
HELD = "batch.kubernetes.io/job-tracking"
"""The finalizer with which the Job controller holds a pod until it has succeeded or failed."""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens without any event is seen in the sweep, every 30 s on a cluster."""
    monkeypatch.setattr("cgd_operator.controller.queue.SWEEP_SECONDS", 0.1)


async def stage(world: Any, name: str = "answer") -> dict[str, Any]:
    stages: list[dict[str, Any]] = (await world.get()).get("status", {}).get("stages", [])
    return next((one for one in stages if one["name"] == name), {})


@asynccontextmanager
async def answering(world: Any) -> AsyncIterator[dict[str, Any]]:
    """The run, whose stage answer has begun under an operator."""
    async with world.operator():
        run = await world.apply()
        await world.end("prepare")

        async def has_begun() -> bool:
            return "answer" in await world.children()

        await world.until(has_begun)
        yield run


async def test_a_deleted_pod_is_paid_for_to_its_last_second(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    began = ago(100)
    monkeypatch.setattr(Clock, "now", stopped(100, after=began))
    async with answering(world) as run:
        await make_pod(world, run, phase="Running", startTime=began, state={"running": {"startedAt": began}})

        async def counts_a_minute() -> bool:
            return bool((await stage(world)).get("gpuSeconds") == 60)

        await world.until(counts_a_minute)
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(lambda: is_suspended(world, True))
        end = (datetime.fromisoformat(began) + timedelta(seconds=117)).strftime("%Y-%m-%dT%H:%M:%SZ")
        await tell_pod(world, phase="Failed", startTime=began, state={"terminated": ended(143, end=end)})
        await world.client.delete(POD, "pod", "default", grace=0)
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": False}})
        await world.until(lambda: is_suspended(world, False))
        await world.end("answer")

        async def has_ended() -> bool:
            return bool((await stage(world)).get("state") == "Succeeded")

        await world.until(has_ended)
    assert (await stage(world))["gpuSeconds"] == 117
    assert (await world.get())["status"]["usage"]["gpuHours"] == "0.03"


async def is_suspended(world: Any, suspended: bool) -> bool:
    return bool((await world.state() == "Suspended") is suspended)


async def test_a_pod_that_fails_and_is_gone_before_anybody_looks_has_its_last_words_told(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with answering(world) as run:
        monkeypatch.setattr("cgd_operator.controller.reconciler.SETTLE_SECONDS", 60.0)
        monkeypatch.setattr("cgd_operator.controller.queue.SWEEP_SECONDS", 60.0)
        await make_pod(world, run, phase="Failed", startTime=ago(9), state={"terminated": ended(3, WORDS)})
        await world.client.delete(POD, "pod", "default", grace=0)
        await world.end("answer", "Failed")

        async def has_failed() -> bool:
            return bool((await stage(world)).get("state") == "Failed")

        await world.until(has_failed)
        assert (await stage(world))["message"] == "pod pod: exit code 3: no such bucket. create it"
    async with world.operator():
        await world.client.patch(RUN, "demo", "default", {"spec": {"ttlSecondsAfterFinished": 600}})

        async def has_seen_it() -> bool:
            return bool((await world.get())["status"]["observedGeneration"] == 2)

        await world.until(has_seen_it)
    assert (await stage(world))["message"] == "pod pod: exit code 3: no such bucket. create it"


async def test_the_pod_of_a_lost_node_is_told_and_made_again_if_the_run_asks_for_it(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "now", in_an_hour)
    began = ago(60)
    async with answering(world) as run:
        await make_pod(world, run, HELD, phase="Running", startTime=began, state={"running": {"startedAt": began}})
        await world.client.delete(POD, "pod", "default", grace=30)

        async def is_lost() -> bool:
            return bool((await stage(world)).get("reason") == "NodeLost")

        await world.until(is_lost)
        told = await stage(world)
        assert told["state"] == "Waiting"
        assert "node gpu-7" in told["message"]
        assert 90 <= told["gpuSeconds"] < 3600
        assert await pod_is(world, "Running"), "it is not the operator's to end"
        await world.client.patch(RUN, "demo", "default", {"spec": {"replaceLostPodsAfterSeconds": 60}})
        await world.until(lambda: pod_is(world, "Failed"))
        pod = await world.client.get(POD, "pod", "default")
        (condition,) = pod["status"]["conditions"]
        assert (condition["type"], condition["status"]) == ("DisruptionTarget", "True")
        await world.client.patch(POD, "pod", "default", {"metadata": {"finalizers": []}})  # its Job counts it now
        assert await world.client.get(POD, "pod", "default") is None, "nothing waits for its kubelet any more"

        async def is_told() -> bool:
            return any(one["reason"] == "PodReplaced" for one in (await world.client.list(EVENT, "default"))[0])

        await world.until(is_told)


async def test_a_pod_that_has_the_name_of_a_lost_one_by_now_is_left_alone(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Training Operator makes them: by the same name, at once."""
    monkeypatch.setattr(Clock, "now", in_an_hour)
    delete = Cluster.delete

    async def made_again(self: Cluster, kind: Kind, name: str, *place: Any, **options: Any) -> Any:
        answer = await delete(self, kind, name, *place, **options)
        if kind is POD and options.get("grace") == 0 and "uid" in options:
            old = await self.get(POD, name, "default")
            assert old is not None
            await self.patch(POD, name, "default", {"metadata": {"finalizers": []}})
            meta = {"name": name, "namespace": "default", "labels": old["metadata"]["labels"]}
            await self.create(POD, {"metadata": meta, "spec": old["spec"]})
        return answer

    async with answering(world) as run:
        began = ago(60)
        await make_pod(world, run, HELD, phase="Running", startTime=began, state={"running": {"startedAt": began}})
        await world.client.delete(POD, "pod", "default", grace=30)
        lost = (await world.client.get(POD, "pod", "default"))["metadata"]["uid"]
        monkeypatch.setattr(Cluster, "delete", made_again)
        await world.client.patch(RUN, "demo", "default", {"spec": {"replaceLostPodsAfterSeconds": 60}})

        async def is_told() -> bool:
            return any(one["reason"] == "PodReplaced" for one in (await world.client.list(EVENT, "default"))[0])

        await world.until(is_told)
        pod = await world.client.get(POD, "pod", "default")
        assert pod["metadata"]["uid"] != lost
        assert pod["status"].get("phase") != "Failed"


async def pod_is(world: Any, phase: str) -> bool:
    pod = await world.client.get(POD, "pod", "default")
    return bool(pod and pod["status"]["phase"] == phase)
