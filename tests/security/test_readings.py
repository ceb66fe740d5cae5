"""What a look starts from when it takes over what a sweep has read: nothing that is of another namespace, nothing that
is over."""

import asyncio
from typing import Any

import kopf
import pytest
from cluster.conftest import world  # noqa: F401  a fixture
from support.builders import ENDED, ENDS, RELEASE

from cgd_operator import handlers
from cgd_operator.controller.children import ChildReader
from cgd_operator.controller.queue import Loop
from cgd_operator.controller.reconciler import Reading, Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.kube.kinds import JOB, NAMESPACE, RUN, SECRET, ApiError
from cgd_operator.planning.dag import Run, plan
from cgd_operator.planning.manifests import KINDS, manifest

Json = dict[str, Any]

pytestmark = pytest.mark.parametrize("world", ["embedded"], indirect=True)


@pytest.fixture
def loop(world: Any) -> Loop:  # noqa: F811
    return Loop(Reconciler(world.client, RELEASE, Board(), b"key of the test, of 32 bytes and more"))


async def settle(loop: Loop) -> None:
    while loop._tasks or loop._first or loop._waiting:  # noqa: ASYNC110  the loop keeps no event for a test
        await asyncio.sleep(0.01)


async def forge(world: Any, run: Json, condition: str) -> None:  # noqa: F811
    """All of a run's children, in another namespace, ended: labels are anybody's to write."""
    await world.client.create(NAMESPACE, {"metadata": {"name": "other"}})
    for child in plan(Run.of(run), "PyTorchJob"):
        body = manifest(Run.of(run), child, RELEASE)
        del body["metadata"]["ownerReferences"]
        body["metadata"]["namespace"] = "other"
        kind, name = KINDS[child.kind], body["metadata"]["name"]
        await world.client.create(kind, body)
        await world.client.patch(kind, name, "other", {"status": ENDS[child.kind](condition)}, subresource="status")


@pytest.mark.parametrize("condition", ["Complete", "Failed"])
async def test_objects_with_a_run_s_labels_in_another_namespace_do_not_end_it(
    world: Any,  # noqa: F811
    loop: Loop,
    condition: str,
) -> None:
    run = await world.apply()
    await loop.reconciler.reconcile("default", "demo")
    await forge(world, run, condition)
    for _ in range(2):
        await loop._sweep()
        await settle(loop)
    assert await world.state() not in ("Succeeded", "Failed")
    assert (await world.children()).keys() == {"prepare"}
    await loop.stop()


async def test_a_run_that_is_deleted_after_it_was_read_is_not_looked_at(
    world: Any,  # noqa: F811
    loop: Loop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = await world.apply()
    monkeypatch.setattr("cgd_operator.controller.queue.AT_ONCE", 0)
    await loop._sweep()
    assert loop._readings.keys() == {("default", "demo")}
    await world.client.delete(RUN, "demo", "default")
    await handlers.run_changed(body=kopf.Body(run), memo=kopf.Memo(loop=loop), type="DELETED")
    monkeypatch.setattr("cgd_operator.controller.queue.AT_ONCE", 16)
    loop._begin()
    await settle(loop)
    assert loop.reconciler.known() == set()
    assert (await world.client.list(JOB, "default"))[0] == (await world.client.list(SECRET, "default"))[0] == []


async def test_what_was_read_before_a_run_s_labels_changed_is_read_again(
    world: Any,  # noqa: F811
    loop: Loop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await world.apply()
    await loop.reconciler.reconcile("default", "demo")
    await world.end("prepare")
    monkeypatch.setattr("cgd_operator.controller.queue.AT_ONCE", 0)
    await loop._sweep()
    queued = {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "team"}}}
    run = await world.client.patch(RUN, "demo", "default", queued)
    await handlers.run_changed(body=kopf.Body(run), memo=kopf.Memo(loop=loop), type="MODIFIED")
    monkeypatch.setattr("cgd_operator.controller.queue.AT_ONCE", 16)
    loop._begin()
    await settle(loop)
    child = (await world.children())["answer"]
    assert child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    await loop.stop()


async def test_a_reading_is_as_old_as_the_run_that_was_read_first(
    world: Any,  # noqa: F811
    loop: Loop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the API server has each list wait, and no watch tells what happens meanwhile."""
    await world.apply()
    monkeypatch.setattr("cgd_operator.controller.queue.READING_SECONDS", 59.0)
    clock = [1000.0]
    read = ChildReader.read

    async def slow(self: ChildReader, namespace: str | None, homes: Any) -> Any:
        objects = await read(self, namespace, homes)
        clock[0] += 60
        return objects

    seen: list[Reading | None] = []

    async def looked(self: Reconciler, namespace: str, name: str, reading: Reading | None = None) -> None:
        seen.append(reading)

    monkeypatch.setattr("cgd_operator.controller.queue.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(ChildReader, "read", slow)
    monkeypatch.setattr(Reconciler, "reconcile", looked)
    await loop._sweep()
    await settle(loop)
    assert seen == [None]


async def test_a_run_that_was_given_more_time_after_it_was_read_is_not_deleted(
    world: Any,  # noqa: F811
    loop: Loop,
) -> None:
    await world.apply({"ttlSecondsAfterFinished": 0, "suspend": True})
    await loop.reconciler.reconcile("default", "demo")
    ended = {"type": "Succeeded", "status": "True", "reason": "Played", "message": "", "lastTransitionTime": ENDED}
    status = {"status": {"state": "Succeeded", "observedGeneration": 1, "conditions": [ended]}}
    await world.client.patch(RUN, "demo", "default", status, subresource="status")
    run = await world.get()
    there = (await loop.reconciler.reader.read("default", {run["metadata"]["uid"]: "default"}))[run["metadata"]["uid"]]
    await world.client.patch(RUN, "demo", "default", {"spec": {"ttlSecondsAfterFinished": None}})
    with pytest.raises(ApiError, match="ResourceVersion in precondition"):
        await loop.reconciler.reconcile("default", "demo", Reading(run, there))
    await loop.reconciler.reconcile("default", "demo")
    assert "ttlSecondsAfterFinished" not in (await world.get())["spec"]


async def test_what_a_sweep_reads_while_a_run_is_looked_at_is_read_again(
    world: Any,  # noqa: F811
    loop: Loop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sweep has listed the children, then the look ends that it has not seen begin."""
    await world.apply()
    key, read, seen = ("default", "demo"), ChildReader.read, list[Reading | None]()

    async def late(self: ChildReader, namespace: str | None, homes: Any) -> Any:
        objects = await read(self, namespace, homes)
        loop._tasks[key] = asyncio.create_task(loop._attend(key))
        await loop._tasks[key]
        return objects

    async def looked(self: Reconciler, namespace: str, name: str, reading: Reading | None = None) -> None:
        seen.append(reading)

    monkeypatch.setattr(ChildReader, "read", late)
    monkeypatch.setattr(Reconciler, "reconcile", looked)
    await loop._sweep()
    await settle(loop)
    assert seen == [None, None]
