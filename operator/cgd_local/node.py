"""The node: registers itself, binds pods to itself, runs them as processes, serves their logs.

It is kubelet, scheduler and pod garbage collector for one machine. `sandbox` says what a container can see and how
paths are rewritten, `pods` describes the life of a pod, `launcher` how processes are kept and ended.

Deviations: there are no images (a container's command runs with the pod's environment plus the constructor's "image
environment"); the node honours only `nvidia.com/gpu` and `cpu` of a pod's requests, and does not renew its heartbeat.
It serves logs over plain HTTP: a real kube-apiserver requires TLS, so `kubectl logs` does not work with that.
"""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from cgd_local.controllers import BACKOFF_SECONDS, forever, now, phase, record, set_condition, stop_task
from cgd_local.names import Names
from cgd_local.nodes import disrupt
from cgd_local.pods import Container, PodRunner, Verdict, pod_namespace, remove
from cgd_local.quotas import quantity, together
from cgd_local.sandbox import Sandbox
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import NODE, POD, AlreadyExists, ApiError

NAME, GPU = "local", "nvidia.com/gpu"
LEAST_GRACE_SECONDS = 2.0
"""What a kubelet lets pass between SIGTERM and SIGKILL even of a pod that it evicts at once."""
PROCESSORS = 8
"""For each played GPU, as machines with GPUs have them at least."""
STOP_GRACE_SECONDS, STOP_SECONDS, FOLLOW_SECONDS = 5.0, 10.0, 0.1


class Node:
    """`environment` is what a container image would set, above all PATH. `folder` holds the pods' folders. Any of
    several nodes takes a pod that fits. `status_lag`: seconds between a change of a pod and the write of its status."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *,
        environment: dict[str, str],
        name: str = NAME,
        gpus: int = 0,
        backoff: float = BACKOFF_SECONDS,
        status_lag: float = 0,
    ) -> None:
        self.cluster, self.folder, self.name = cluster, folder, name
        self._environment, self._backoff, self._status_lag = environment, backoff, status_lag
        self._capacity = {"cpu": max(float(os.cpu_count() or 1), float(PROCESSORS * gpus)), GPU: float(gpus)}
        self._runners: dict[str, PodRunner] = {}
        self._waiting: dict[str, Object] = {}
        self._watches: list[asyncio.Task[None]] = []
        app = web.Application()
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        self._server = web.AppRunner(app, access_log=None)

    async def start(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # of a former node process
        self.folder.mkdir(parents=True, mode=0o700)  # Secrets become files below it
        await self._server.setup()
        await web.TCPSite(self._server, "127.0.0.1", 0).start()
        for pod in (await self.cluster.list(POD))[0]:  # pods of an earlier node process have no processes any more
            if pod["spec"].get("nodeName") == self.name and phase(pod) not in ("Succeeded", "Failed"):
                await disrupt(self.cluster, pod, "TerminationByKubelet", "its processes are gone", phase="Failed")
                await remove(self.cluster, pod)
        await self._register(self._server.addresses[0][1])
        names = Names(self.cluster, lambda: [runner.sandbox for runner in self._runners.values()])
        works = [forever("node's watch of pods", self._watch_pods), names.run()]
        self._watches = [asyncio.create_task(work) for work in works]

    async def stop(self) -> None:
        """End every process; pods report a node shutdown, as with a kubelet."""
        for watch in self._watches:
            await stop_task(watch)
        verdict = Verdict("Terminated", "Pod was terminated in response to imminent node shutdown.")
        for runner in self._runners.values():
            runner.end(STOP_GRACE_SECONDS, verdict)
        if tasks := [runner.task for runner in self._runners.values()]:
            await asyncio.wait(tasks, timeout=STOP_GRACE_SECONDS + STOP_SECONDS)
        await self.crash()  # if statuses could not be written, because the API is away

    async def crash(self) -> None:
        """Lose power: end every process, and neither watch nor write any more."""
        for watch in self._watches:
            await stop_task(watch)
        for runner in self._runners.values():
            await runner.crash()
        await self._server.cleanup()

    def evict(self, namespace: str, name: str) -> None:
        """End a pod as node pressure or a preemption does: DisruptionTarget, phase Failed."""
        if runner := self._runner(namespace, name):
            runner.end(0, Verdict("Evicted", "The pod was evicted from the local node."))

    def overuse(self, namespace: str, name: str, volume: str) -> None:
        """End a pod that has written more into an emptyDir than its limit. Its containers get SIGTERM first."""
        if runner := self._runner(namespace, name):
            message = f'Usage of EmptyDir volume "{volume}" exceeds the limit "1Gi". '
            runner.end(LEAST_GRACE_SECONDS, Verdict("Evicted", message, is_disruption=False))

    async def _register(self, port: int) -> None:
        with contextlib.suppress(AlreadyExists):  # an earlier node process has created it
            await self.cluster.create(NODE, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.name}})
        capacity = {name: f"{number:g}" for name, number in self._capacity.items() if number} | {"pods": "110"}
        conditions: list[Object] = []
        set_condition(conditions, "Ready", "True", "KubeletReady", "the local node runs pods as processes")
        status = {
            "capacity": capacity,
            "allocatable": capacity,
            "conditions": [conditions[0] | {"lastHeartbeatTime": now()}],
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
        }
        await self.cluster.patch(NODE, self.name, None, {"status": status}, subresource="status")

    async def _watch_pods(self) -> None:
        listed: set[str] = set()
        async for event, pod in self.cluster.watch(POD):
            if event == "SYNCED":
                for uid in set(self._runners) - listed:
                    self._forget(uid)
                listed.clear()
            elif event == "DELETED":
                self._forget(pod["metadata"]["uid"])
            else:
                listed.add(pod["metadata"]["uid"])
                await self._take(pod)
            for waiting in list(self._waiting.values()):
                await self._schedule(waiting)

    async def _take(self, pod: Object) -> None:
        meta, runner = pod["metadata"], self._runners.get(pod["metadata"]["uid"])
        if runner:
            runner.heed(pod)
        if pod["spec"].get("nodeName", self.name) != self.name:
            self._waiting.pop(meta["uid"], None)
            return
        if "deletionTimestamp" in meta:
            self._waiting.pop(meta["uid"], None)
            if runner and not runner.reported:
                runner.end(float(meta.get("deletionGracePeriodSeconds", 30)))
            else:
                await remove(self.cluster, pod)
        elif not runner and "nodeName" not in pod["spec"]:
            self._waiting[meta["uid"]] = pod

    def _forget(self, uid: str) -> None:
        """The pod is deleted: end what runs, forget it, and drop its folder with its logs."""
        self._waiting.pop(uid, None)
        if runner := self._runners.pop(uid, None):
            runner.end(0)
            runner.task.add_done_callback(lambda _: shutil.rmtree(runner.sandbox.folder, ignore_errors=True))

    async def _schedule(self, pod: Object) -> None:
        """Bind a pod that fits and start it; write into the status of another pod why it does not fit."""
        meta, requests = pod["metadata"], requests_of(pod)
        # a pod whose end the API knows holds nothing
        held = [requests_of(runner.pod) for runner in self._runners.values() if not runner.reported]
        free = {name: capacity - sum(amounts[name] for amounts in held) for name, capacity in self._capacity.items()}
        if short := next((name for name in free if requests[name] > max(0.0, free[name])), ""):
            why = "preemption: 0/1 nodes are available: 1 No preemption victims found"
            message = f"0/1 nodes are available: 1 Insufficient {short}. {why}."
            conditions = list(pod.get("status", {}).get("conditions") or [])
            if not any(entry["type"] == "PodScheduled" and entry.get("message") == message for entry in conditions):
                set_condition(conditions, "PodScheduled", "False", "Unschedulable", message)
                status = {"status": {"conditions": conditions}}
                await self.cluster.patch(POD, meta["name"], meta["namespace"], status, subresource="status")
                await record(self.cluster, pod, "Warning", "FailedScheduling", message, component="default-scheduler")
            return
        del self._waiting[meta["uid"]]
        target = {"apiVersion": "v1", "kind": "Node", "name": self.name}
        names = {"name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"]}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": names, "target": target}
        try:
            await self.cluster.create(POD, body, subresource="binding")
        except ApiError as error:
            if error.status not in (404, 409):  # somebody has deleted the pod
                raise
            return
        folder = self.folder / f"{meta['namespace']}_{meta['name']}_{meta['uid']}"
        self._runners[meta["uid"]] = PodRunner(
            self.cluster,
            pod,
            Sandbox(self.cluster, pod, folder, own_names=pod_namespace() == "own"),
            image=self._environment,
            backoff=self._backoff,
            status_lag=self._status_lag,
        )

    def _runner(self, namespace: str, name: str) -> PodRunner | None:
        return next((r for r in self._runners.values() if (r.namespace, r.name) == (namespace, name)), None)

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        namespace, name, container = (request.match_info[key] for key in ("namespace", "pod", "container"))
        runner = self._runner(namespace, name)
        source = runner.container(container) if runner else None
        folder = runner.sandbox.logs(container) if runner and source else None
        files = sorted(folder.iterdir(), key=lambda path: int(path.stem)) if folder else []
        previous = request.query.get("previous") == "true"
        if len(files) <= previous:
            problem = "has no previous run" if previous else "is waiting to start: ContainerCreating"
            raise web.HTTPBadRequest(text=f'container "{container}" in pod "{name}" {problem}')
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        await response.prepare(request)
        follow = request.query.get("follow") == "true" and not previous
        tail = int(request.query.get("tailLines", -1))
        async for chunk in _read(files[-2 if previous else -1], tail, source if follow else None):
            await response.write(chunk)
        await response.write_eof()
        return response


async def _read(path: Path, tail: int, follow: Container | None) -> AsyncIterator[bytes]:
    """The last lines of a log (all if negative), and then its new content until the followed container is over."""
    with path.open("rb") as log_file:
        lines = log_file.read().splitlines(keepends=True)
        yield b"".join(lines if tail < 0 else lines[len(lines) - tail :])
        while follow:
            over = follow.over
            if content := log_file.read():
                yield content
            elif over:
                return
            else:
                await asyncio.sleep(FOLLOW_SECONDS)


def requests_of(pod: Object) -> dict[str, float]:
    """GPUs and cores that a pod requests."""

    def container_requests(container: Object) -> dict[str, float]:
        resources = container.get("resources") or {}  # a limit stands for a missing request, as in Kubernetes
        both = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        return {name: quantity(amount) for name, amount in both.items()}

    requests = together(pod["spec"], container_requests)
    return {name: requests.get(name, 0.0) for name in ("cpu", GPU)}
