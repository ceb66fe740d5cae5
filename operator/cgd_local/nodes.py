"""How a control plane handles nodes that do not answer: node lifecycle controller and pod garbage collector.

A node that has lost its power (`Node.crash`) writes nothing. The control plane deletes its pods with their grace
period, and they stay: only their kubelet could report their end. They disappear when an admin declares the machine off,
with the taint `node.kubernetes.io/out-of-service` or by deleting the Node: the collector marks them as failed and
deletes them by force.

Deviation: nodes send no heartbeats; a test that plays a crash also calls `declare_unreachable`.
"""

import asyncio

from cgd_local.controllers import condition, forever, phase, set_condition
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import NODE, POD

UNREACHABLE, OUT_OF_SERVICE = "node.kubernetes.io/unreachable", "node.kubernetes.io/out-of-service"


async def declare_unreachable(cluster: Cluster, name: str) -> None:
    """Do what happens 40 s after the last heartbeat, and what then happens to pods when their toleration of an
    unreachable node ends, after 300 s by default."""
    node = await cluster.get(NODE, name)
    assert node is not None
    conditions = node["status"]["conditions"]
    set_condition(conditions, "Ready", "Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.")
    await cluster.patch(NODE, name, None, {"status": {"conditions": conditions}}, subresource="status")
    await taint(cluster, name, UNREACHABLE, "NoExecute")
    for pod in await _pods_on(cluster, name):
        await disrupt(cluster, pod, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")
        meta = pod["metadata"]
        await cluster.delete(POD, meta["name"], meta["namespace"], uid=meta["uid"])


async def preempt(cluster: Cluster, pod: Object) -> None:
    """Do what the scheduler does to a pod whose place a more urgent one takes."""
    message = "default-scheduler: preempting to accommodate a higher priority pod"
    await disrupt(cluster, pod, "PreemptionByScheduler", message)
    meta = pod["metadata"]
    await cluster.delete(POD, meta["name"], meta["namespace"], uid=meta["uid"])


async def taint(cluster: Cluster, name: str, key: str, effect: str, value: str = "") -> None:
    """`kubectl taint nodes NAME KEY=VALUE:EFFECT`"""
    node = await cluster.get(NODE, name)
    assert node is not None
    taints = [*(node.get("spec", {}).get("taints") or []), {"key": key, "value": value, "effect": effect}]
    await cluster.patch(NODE, name, None, {"spec": {"taints": taints}})


class PodCollector:
    """Deletes pods whose kubelet never will."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def run(self) -> None:
        nodes = forever("pod garbage collector's watch of nodes", self._watch_nodes)
        await asyncio.gather(nodes, forever("pod garbage collector's watch of pods", self._watch_pods))

    async def _watch_pods(self) -> None:
        """End the pods that somebody deletes before they have a node, and so a kubelet that could report their end."""
        async for event, pod in self._cluster.watch(POD):
            if event in ("SYNCED", "DELETED") or "nodeName" in pod["spec"]:
                continue
            meta = pod["metadata"]
            if "deletionTimestamp" in meta and phase(pod) not in ("Succeeded", "Failed"):
                body = {"status": {"phase": "Failed"}}
                await self._cluster.patch(POD, meta["name"], meta["namespace"], body, subresource="status")
                await self._cluster.delete(POD, meta["name"], meta["namespace"], uid=meta["uid"], grace=0)

    async def _watch_nodes(self) -> None:
        async for event, node in self._cluster.watch(NODE):
            if event == "SYNCED":
                continue
            name = node["metadata"]["name"]
            if event == "DELETED":
                await self._collect(name, "PodGC: node no longer exists")
                continue
            taints = [entry["key"] for entry in node.get("spec", {}).get("taints") or []]
            is_ready = condition(node.get("status", {}).get("conditions") or [], "Ready")
            if OUT_OF_SERVICE in taints and not is_ready:
                await self._collect(name, "PodGC: node is out-of-service", leaving=True)

    async def _collect(self, node: str, why: str, *, leaving: bool = False) -> None:
        for pod in await _pods_on(self._cluster, node):
            meta = pod["metadata"]
            if leaving and "deletionTimestamp" not in meta:
                continue
            if phase(pod) not in ("Succeeded", "Failed"):
                await disrupt(self._cluster, pod, "DeletionByPodGC", why, phase="Failed")
            await self._cluster.delete(POD, meta["name"], meta["namespace"], uid=meta["uid"], grace=0)


async def _pods_on(cluster: Cluster, node: str) -> list[Object]:
    return [pod for pod in (await cluster.list(POD))[0] if pod["spec"].get("nodeName") == node]


async def disrupt(cluster: Cluster, pod: Object, reason: str, message: str, **more: str) -> None:
    """Write into a pod's status that the cluster ends it, by no fault of the pod."""
    conditions = list(pod.get("status", {}).get("conditions") or [])
    set_condition(conditions, "DisruptionTarget", "True", reason, message)
    body = {"status": {"conditions": conditions, **more}}
    await cluster.patch(POD, pod["metadata"]["name"], pod["metadata"]["namespace"], body, subresource="status")
