"""A kubelet whose words come late: what happens goes on meanwhile, and the end is told before the pod is gone."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest_asyncio
from support.local_world import FAST, IMAGE, World, phase
from support.patience import PATIENCE

from cgd_local.cluster import LocalCluster
from cgd_local.node import Node
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import POD

LAG = 1.5
SAYS_GOODBYE = "trap 'exit 143' TERM; touch $HOME/up; while :; do sleep 0.02; done"


@pytest_asyncio.fixture(loop_scope="function")
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A cluster whose only node tells everything late."""
    async with LocalCluster(tmp_path / "cluster", environment=IMAGE, backoff=FAST) as cluster:
        await cluster.node.stop()
        late = Node(cluster.client, tmp_path / "late", environment=IMAGE, backoff=FAST, name="late", status_lag=LAG)
        await late.start()
        cluster.node = late
        yield World(cluster, "default")
        await late.stop()


async def changes(world: World, told: list[tuple[str, Object]], listening: asyncio.Event) -> None:
    """All that a watch of pods says until one is gone."""
    async for event, pod in world.client.watch(POD, "default"):
        listening.set()
        if event not in ("SYNCED", "LISTED"):
            told.append((event, pod))
        if event == "DELETED":
            return


def container_of(pod: Object) -> Object:
    (container,) = pod["status"]["containerStatuses"]
    state: Object = container["state"]
    return state


async def test_what_has_begun_and_ended_is_told_later_with_the_times_at_which_it_was(world: World) -> None:
    await world.pod("until [ -e $HOME/end ]; do sleep 0.02; done; exit 3")
    begun = container_of(await world.running())["running"]["startedAt"]
    assert seconds_since(begun) > LAG, "it ran, and nobody knew"
    (world.folder() / "end").touch()
    end = container_of(await world.ended())["terminated"]
    assert (end["startedAt"], end["exitCode"]) == (begun, 3)
    assert seconds_since(end["finishedAt"]) > LAG


def seconds_since(moment: str) -> float:
    """At least; the kubelet cuts off the parts of a second."""
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


async def test_several_changes_in_a_short_time_are_told_as_one(world: World) -> None:
    """One pod of ten at least begins and ends in a short time, also on a busy machine."""
    for _ in range(10):
        told: list[tuple[str, Object]] = []
        listening = asyncio.Event()
        watch = asyncio.create_task(changes(world, told, listening))
        await asyncio.wait_for(listening.wait(), PATIENCE)
        await world.pod("true")
        await world.ended()
        await world.client.delete(POD, "p", "default")
        await asyncio.wait_for(watch, PATIENCE)
        if "Running" not in {phase(pod) for _, pod in told}:
            return
    raise AssertionError("each pod was told of as running")


async def test_a_deleted_pod_goes_only_when_its_end_is_told(world: World) -> None:
    told: list[tuple[str, Object]] = []
    listening = asyncio.Event()
    watch = asyncio.create_task(changes(world, told, listening))
    await asyncio.wait_for(listening.wait(), PATIENCE)
    await world.pod(SAYS_GOODBYE, terminationGracePeriodSeconds=30)
    await world.running()
    await world.client.delete(POD, "p", "default")
    await asyncio.wait_for(watch, PATIENCE)
    states = [(event, phase(pod)) for event, pod in told]
    assert states[-2:] == [("MODIFIED", "Failed"), ("DELETED", "Failed")]
    assert container_of(told[-1][1])["terminated"]["exitCode"] == 143


async def test_a_deletion_that_comes_while_the_end_is_on_its_way_loses_nothing(world: World) -> None:
    told: list[tuple[str, Object]] = []
    listening = asyncio.Event()
    watch = asyncio.create_task(changes(world, told, listening))
    await asyncio.wait_for(listening.wait(), PATIENCE)
    await world.pod("until [ -e $HOME/end ]; do sleep 0.02; done; exit 3")
    await world.running()
    (world.folder() / "end").touch()
    await asyncio.sleep(LAG / 2)
    await world.client.delete(POD, "p", "default", grace=30)
    await asyncio.wait_for(watch, PATIENCE)
    assert container_of(told[-1][1])["terminated"]["exitCode"] == 3
