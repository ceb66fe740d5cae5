"""A PyTorchJob whose pods fail again and again: its controller makes them again without end, the operator does not."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.builders import RELEASE

from cgd_local.controllers import Controller
from cgd_local.pytorchjobs import decide
from cgd_operator.kube.kinds import POD, PYTORCHJOB
from cgd_operator.planning.dag import Run, plan
from cgd_operator.planning.manifests import manifest

pytestmark = pytest.mark.parametrize("world", ["embedded"], indirect=True)

BEFORE = ("prepare", "answer", "teacher", "check")


@pytest.fixture
async def training(world: Any) -> AsyncIterator[str]:
    """The name of the PyTorchJob of a run with `retries: 1`, with its controller; the kubelet is the test."""
    controller = asyncio.create_task(Controller(world.client, PYTORCHJOB, decide).run())
    async with world.operator():
        await world.apply({"retries": 1})
        await world.play(*BEFORE)
        await world.until(lambda: worker(world))
        yield (await world.children())["train-cgd"]["metadata"]["name"]
    controller.cancel()
    await asyncio.wait([controller])


async def worker(world: Any, gone: str = "") -> Any:
    """The training's pod, once it is another than `gone`."""
    pods, _ = await world.client.list(POD, "default")
    return next((pod for pod in pods if pod["metadata"]["uid"] != gone), None)


async def fails(world: Any, code: int, message: str) -> str:
    """Its pod fails with these last words, once the operator has seen it; the pod's uid."""
    pod = await world.until(lambda: worker(world))
    meta = pod["metadata"]
    await world.until(lambda: has_seen(world, meta["uid"]))
    end = {"terminated": {"exitCode": code, "message": message}}
    container = {"name": "pytorch", "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": end}
    status = {"phase": "Failed", "containerStatuses": [container]}
    await world.client.patch(POD, meta["name"], "default", {"status": status}, subresource="status")
    return str(meta["uid"])


async def has_seen(world: Any, uid: str) -> bool:
    return any(one["uid"] == uid for one in (await stage(world)).get("podAttempts", []))


async def stage(world: Any) -> dict[str, Any]:
    stages: list[dict[str, Any]] = (await world.get()).get("status", {}).get("stages", [])
    return next((one for one in stages if one["name"] == "train-cgd"), {})


async def failed(world: Any) -> bool:
    return bool(await world.state() == "Failed")


async def test_attempts_grow_and_end_at_the_retries(world: Any, training: str) -> None:
    first = await fails(world, 201, "no peer")
    await world.until(lambda: worker(world, first))
    await world.until(lambda: attempts_are(world, 2))
    await fails(world, 201, "no peer")
    await world.until(lambda: failed(world))
    told = await stage(world)
    assert (told["attempts"], told["reason"]) == (3, "GivenUp")
    assert told["message"].startswith(f"pod {training}-worker-0 was tried 2 times, and spec.retries is 1")
    assert told["message"].endswith(f"pod {training}-worker-0: exit code 201: no peer")
    job = (await world.children())["train-cgd"]
    assert {one["type"] for one in job["status"]["conditions"] if one["status"] == "True"} >= {"Failed"}


async def attempts_are(world: Any, count: int) -> bool:
    return bool((await stage(world)).get("attempts") == count)


async def test_a_training_that_was_given_up_is_tried_again_when_its_job_is_deleted(world: Any, training: str) -> None:
    for _ in range(2):
        gone = await fails(world, 201, "no peer")
        await world.until(lambda gone=gone: worker(world, gone))
    await world.until(lambda: failed(world))
    await world.until(lambda: is_bare(world))
    await world.client.delete(PYTORCHJOB, training, "default")
    new = await world.until(lambda: worker(world))
    await world.until(lambda: has_seen(world, new["metadata"]["uid"]))
    assert not await failed(world)
    assert [one["attempts"] for one in (await stage(world))["podAttempts"]] == [1]


async def test_a_training_with_a_master_of_an_older_operator_is_finished_as_it_is(world: Any) -> None:
    run = Run.of(await world.apply())
    (child,) = [one for one in plan(run) if one.kind == "PyTorchJob"]
    job = manifest(run, child, RELEASE)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    replicas["Master"] = replicas.pop("Worker")
    made = await world.client.create(PYTORCHJOB, job)
    async with world.operator():
        await world.play("train-cgd")
        await world.until(lambda: has_child(world, "evaluate-cgd"))
    assert (await world.children())["train-cgd"]["metadata"]["uid"] == made["metadata"]["uid"]


async def has_child(world: Any, stage: str) -> bool:
    return stage in await world.children()


async def is_bare(world: Any) -> bool:
    """Its controller has cleaned up."""
    return not (await world.client.list(POD, "default"))[0]
