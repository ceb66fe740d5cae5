"""The operator beside Kueue, played by the test: it owns `suspend` of the children that name a queue."""

from datetime import timedelta
from typing import Any

import pytest
from support.builders import CHILDREN
from support.kueue_player import QUEUE, Kueue, conditions, is_true, suspended

from cgd_operator.kube.kinds import RUN, WORKLOADS, Kind


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Workload's reason is seen in the sweep, every 30 s on a cluster."""
    monkeypatch.setattr("cgd_operator.controller.queue.SWEEP_SECONDS", 0.1)


async def runs(world: Any, stage: str) -> bool:
    child = (await world.children()).get(stage)
    return child is not None and not suspended(child)


async def waits(world: Any, stage: str, reason: str) -> bool:
    stages = (await world.get()).get("status", {}).get("stages", [])
    return any(one["name"] == stage and (one.get("reason"), one["state"]) == (reason, "Waiting") for one in stages)


async def state_is(world: Any, state: str) -> bool:
    return bool(await world.state() == state)


async def workloads(world: Any, served: Kind = WORKLOADS[0]) -> list[dict[str, Any]]:
    return list((await world.client.list(served, "default"))[0])


@pytest.mark.parametrize("backend", ["PyTorchJob", "TrainJob"])
async def test_a_run_goes_through_its_queue(world: Any, backend: str) -> None:
    async with Kueue(world).at_work() as kueue, world.operator():
        await world.apply({"training.backend": backend}, labels=QUEUE)
        for stage in CHILDREN:
            await world.until(lambda stage=stage: runs(world, stage))
            await world.end(stage)
        await world.until(lambda: state_is(world, "Succeeded"))
    assert kueue.evicted == 0
    assert {one["spec"]["queueName"] for one in await workloads(world)} == {"gpus"}


async def test_waiting_for_quota_is_told_and_an_eviction_costs_nothing(world: Any) -> None:
    async with Kueue(world).at_work() as kueue, world.operator():
        kueue.full = "insufficient unused quota for cpu"
        await world.apply(labels=QUEUE)
        await world.until(lambda: waits(world, "prepare", "WaitingForQuota"))
        (told,) = [one for one in conditions(await world.get()) if one["type"] == "Reconciling"]
        await world.until(lambda: says(world, "waiting for quota; Pending: insufficient unused quota for cpu"))
        assert told["status"] == "True"
        assert not await runs(world, "prepare")
        kueue.full = ""
        await world.until(lambda: runs(world, "prepare"))
        kueue.full = "a more urgent workload"
        await world.until(lambda: waits(world, "prepare", "WaitingForQuota"))
        kueue.full = ""
        await world.until(lambda: runs(world, "prepare"))
        await world.end("prepare")
        await world.until(lambda: runs(world, "answer"))


async def test_a_child_that_kueue_admits_and_cannot_start_is_told_until_it_starts(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cgd_operator.facts.kueue.STARTING", timedelta(0))
    async with Kueue(world).at_work() as kueue, world.operator():
        kueue.webhook_down = True
        await world.apply(labels=QUEUE)
        await world.until(lambda: waits(world, "prepare", "NotStarted"))
        assert await world.state() == "Queued"
        await world.until(lambda: says(world, "check the log of Kueue's controller and its webhooks"))
        kueue.webhook_down = False
        await world.until(lambda: runs(world, "prepare"))


async def says(world: Any, message: str) -> bool:
    return any(message in str(one.get("message")) for one in conditions(await world.get()))


@pytest.mark.parametrize("served", WORKLOADS, ids=lambda kind: kind.api_version)
async def test_a_suspended_run_leaves_the_queue_and_comes_back_only_with_quota(world: Any, served: Kind) -> None:
    async with Kueue(world, served).at_work() as kueue, world.operator():
        await world.apply(labels=QUEUE)
        await world.until(lambda: is_admitted(world, "prepare", served))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(lambda: state_is(world, "Suspended"))
        await world.until(lambda: is_stopped(world, "prepare"))
        (held,) = await workloads(world, served)
        assert held["spec"]["active"] is False
        kueue.full = "taken by others meanwhile"
        stopped = kueue.stopped
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": False}})
        await world.until(lambda: waits(world, "prepare", "WaitingForQuota"))
        assert not await runs(world, "prepare")
        assert kueue.stopped == stopped
        kueue.full = ""
        await world.until(lambda: runs(world, "prepare"))
        (free,) = await workloads(world, served)
        assert free["spec"]["active"] is True
        assert "cgd.dev/suspended-by-run" not in free["metadata"].get("annotations", {})
    assert kueue.evicted == 1


async def is_admitted(world: Any, stage: str, served: Kind) -> bool:
    """Kueue has seen the child, and lets it run."""
    return any(is_true(one, "Admitted") for one in await workloads(world, served)) and await runs(world, stage)


async def is_stopped(world: Any, stage: str) -> bool:
    return not await runs(world, stage)


async def stage_is(world: Any, state: str) -> bool:
    (first, *_) = (await world.get()).get("status", {}).get("stages") or [{}]
    return first.get("state") == state


async def test_a_queue_label_in_a_cluster_without_kueue_changes_nothing(world: Any) -> None:
    async with world.operator():
        await world.apply(labels=QUEUE)
        await world.until(lambda: runs(world, "prepare"))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(lambda: stage_is(world, "Suspended"))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": False}})
        await world.until(lambda: runs(world, "prepare"))
        await world.play(*CHILDREN)
        await world.until(lambda: state_is(world, "Succeeded"))
