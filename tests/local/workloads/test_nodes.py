"""Nodes that lose their power: their pods stay until somebody says that the machine is off."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from support.builders import job, labels
from support.local_world import FAST, IMAGE, World, condition, container, phase

from cgd_local.cluster import LocalCluster
from cgd_local.jobs import TRACKED
from cgd_local.node import Node
from cgd_local.nodes import OUT_OF_SERVICE, declare_unreachable, taint
from cgd_operator.facts.children import observe
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import JOB, NODE, POD
from cgd_operator.planning.manifests import disruption

IGNORED = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
FOREVER = {"podReplacementPolicy": "Failed", "completions": 1, "podFailurePolicy": {"rules": [IGNORED]}}


@pytest_asyncio.fixture(loop_scope="function")
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A cluster whose node runs a pod of a Job, and then another node joins."""
    async with LocalCluster(tmp_path / "cluster", environment=IMAGE, backoff=FAST) as cluster:
        world = World(cluster, "default")
        await world.job("sleep 60", **FOREVER)
        await world.when_pods(lambda pods: [pod for pod in pods if phase(pod) == "Running"])
        other = Node(cluster.client, tmp_path / "other", environment=IMAGE, name="other", backoff=FAST)
        await other.start()
        yield world
        await other.stop()


async def lose(world: World) -> Object:
    """The first node crashes, which is noticed; its pod."""
    (pod,) = await world.pods()
    await world.cluster.node.crash()
    await declare_unreachable(world.client, "local")
    return pod


def is_replaced(lost: Object, pods: list[Object]) -> bool:
    return [phase(pod) for pod in pods if pod["metadata"]["uid"] != lost["metadata"]["uid"]] == ["Running"]


async def test_the_pod_of_a_crashed_node_stays_as_it_was_and_is_not_replaced(world: World) -> None:
    lost = await lose(world)
    ended = await world.until(POD, lost["metadata"]["name"], lambda pod: "deletionTimestamp" in pod["metadata"])
    assert (phase(ended), condition(ended, "DisruptionTarget")["reason"]) == ("Running", "DeletionByTaintManager")
    node = await world.client.get(NODE, "local")
    assert node is not None
    assert condition(node, "Ready")["status"] == "Unknown"
    assert [pod["metadata"]["uid"] for pod in await world.pods()] == [lost["metadata"]["uid"]]


@pytest.mark.parametrize("word", ["taint", "deletion"])
async def test_a_node_that_is_said_to_be_off_lets_go_of_its_pods(world: World, word: str) -> None:
    lost = await lose(world)
    if word == "taint":
        await taint(world.client, "local", OUT_OF_SERVICE, "NoExecute", "nodeshutdown")
    else:
        await world.client.delete(NODE, "local")
    pods = await world.when_pods(lambda pods: is_replaced(lost, pods))
    assert [pod["spec"]["nodeName"] for pod in pods] == ["other"]


async def test_deletion_by_force_frees_a_pod_of_a_job_only_when_it_is_said_to_have_failed(world: World) -> None:
    lost = await lose(world)
    name = lost["metadata"]["name"]
    await world.client.delete(POD, name, "default", grace=0)
    held = await world.until(POD, name, lambda pod: pod["metadata"].get("deletionGracePeriodSeconds") == 0)
    assert held["metadata"]["finalizers"] == [TRACKED]
    await asyncio.sleep(0.3)
    assert [phase(pod) for pod in await world.pods()] == ["Running"], "it is neither gone nor replaced"
    said = disruption(held, datetime.now(UTC))
    await world.client.patch(POD, name, "default", said, subresource="status")
    await world.when_pods(lambda pods: is_replaced(lost, pods))
    await world.gone(POD, name)
    job = await world.client.get(JOB, "j", "default")
    assert job is not None
    assert job["status"]["failed"] == 0, "a disruption costs no try"


async def test_a_pod_that_is_deleted_before_it_has_a_node_goes_and_is_replaced(world: World) -> None:
    waiting = container("true", resources={"limits": {"cpu": "1000"}})
    await world.make(JOB, "w", spec={"template": {"spec": {"restartPolicy": "Never", "containers": [waiting]}}})
    pods = await world.when_pods(lambda pods: any("nodeName" not in one["spec"] for one in pods))
    (pod,) = [one for one in pods if "nodeName" not in one["spec"]]
    await world.client.delete(POD, pod["metadata"]["name"], "default")
    await world.gone(POD, pod["metadata"]["name"])


async def test_a_node_leaves_the_pods_of_others_alone(world: World) -> None:
    (pod,) = await world.pods()
    await world.client.delete(POD, pod["metadata"]["name"], "default")
    await world.when_pods(lambda pods: is_replaced(pod, pods))


async def test_the_operator_knows_a_lost_node_from_its_pod_alone(world: World) -> None:
    lost = await lose(world)
    lost = await world.until(POD, lost["metadata"]["name"], lambda pod: "deletionTimestamp" in pod["metadata"])
    lost["metadata"]["labels"] = labels("answer")
    due = datetime.fromisoformat(lost["metadata"]["deletionTimestamp"])

    def reason(after: float) -> str:
        return observe([job("answer")], [lost], now=due + timedelta(seconds=after))["answer"].reason

    assert [reason(after) for after in (-1, 59, 61)] == ["", "", "NodeLost"]
