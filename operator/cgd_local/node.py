"""The node: registers itself, binds pods to itself, runs them as processes, serves their logs.

It is kubelet, scheduler and pod garbage collector for one machine. What a container can see and how paths are
rewritten is told in `sandbox`; the life of a pod in `pods`; how processes are kept and ended in `launcher`.

Deviations: there are no images (a container's command runs with the pod's environment plus the constructor's "image
environment"); node affinity, taints and topology are ignored (`nodeSelector`, `nvidia.com/gpu` and `cpu` are honoured);
memory requests are not counted; the Node's heartbeat is not renewed. Logs are served over plain HTTP: a real
kube-apiserver insists on TLS, so `kubectl logs` does not work with one.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from cgd_local.controllers import forever, now, phase, record, set_condition
from cgd_local.pods import Pace, PodRunner, Verdict, remove
from cgd_local.sandbox import Sandbox, quantity
from cgd_operator.cluster import NODE, POD, AlreadyExists, ApiError, Cluster, Kind, Object

GPU = "nvidia.com/gpu"
COUNTED = ("cpu", GPU)
STOP_GRACE_SECONDS = 5.0
FOLLOW_SECONDS = 0.1


class Node:
    """`environment` is what a container image would bring: PATH first of all. `folder` holds the pods' folders."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *,
        environment: dict[str, str],
        name: str = "local",
        labels: dict[str, str] | None = None,
        gpus: int = 0,
        pace: Pace | None = None,
    ) -> None:
        self.cluster, self.folder, self.name = cluster, folder, name
        self._environment, self._pace = environment, pace or Pace()
        self._capacity = {"cpu": os.cpu_count() or 1, GPU: gpus}
        self._labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"} | (labels or {})
        self._runners: dict[str, PodRunner] = {}
        self._waiting: dict[str, Object] = {}
        self._reserved: dict[str, dict[str, float]] = {}
        self._pod_names: set[tuple[str, str]] = set()
        self._server: web.AppRunner | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # Secrets become files below it
        app = web.Application()
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        self._server = web.AppRunner(app, access_log=None)
        await self._server.setup()
        await web.TCPSite(self._server, "127.0.0.1", 0).start()
        await self._fail_leftovers()
        await self._register(self._server.addresses[0][1])
        self._watch = asyncio.create_task(forever("node's watch of pods", self._watch_pods))

    async def stop(self) -> None:
        """End every process; pods report a node shutdown, as with a kubelet."""
        if self._watch:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        verdict = Verdict(
            "Terminated", "Pod was terminated in response to imminent node shutdown.", "TerminationByKubelet"
        )
        running = [runner for runner in self._runners.values() if not runner.task.done()]
        for runner in running:
            runner.end(STOP_GRACE_SECONDS, verdict)
        if running:
            await asyncio.wait([runner.task for runner in running])
        if self._server:
            await self._server.cleanup()

    def evict(self, namespace: str, name: str, *, grace: float = 0, disruption: str = "TerminationByKubelet") -> None:
        """End a pod from outside, as node pressure or a preemption would: DisruptionTarget, phase Failed."""
        verdict = Verdict("Evicted", "The pod was evicted from the local node.", disruption)
        for runner in self._runners.values():
            if (runner.namespace, runner.name) == (namespace, name):
                runner.end(grace, verdict)

    async def _register(self, port: int) -> None:
        body = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": self._labels},
        }
        try:
            await self.cluster.create(NODE, body)
        except AlreadyExists:
            await self.cluster.patch(NODE, self.name, None, {"metadata": {"labels": self._labels}})
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024
        counted = {name: str(number) for name, number in self._capacity.items() if number}
        capacity = {**counted, "memory": f"{memory}Ki", "pods": "110"}
        conditions: list[Object] = []
        set_condition(conditions, "Ready", "True", "KubeletReady", "the local node runs pods as processes")
        conditions[0]["lastHeartbeatTime"] = now()
        addresses = [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": self.name}]
        status = {
            "capacity": capacity,
            "allocatable": capacity,
            "conditions": conditions,
            "addresses": addresses,
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
        }
        await self.cluster.patch(NODE, self.name, None, {"status": status}, subresource="status")

    async def _fail_leftovers(self) -> None:
        """Pods of a former node process have no processes any more: say so, and their controllers replace them."""
        pods, _ = await self.cluster.list(POD)
        self._drop_folders(keep={pod["metadata"]["uid"] for pod in pods})
        for pod in pods:
            meta = pod["metadata"]
            self._pod_names.add((meta["namespace"], meta["name"]))
            if pod["spec"].get("nodeName") != self.name or phase(pod) in ("Succeeded", "Failed"):
                continue
            status = {"status": lost_status(pod)}
            await self.cluster.patch(POD, meta["name"], meta["namespace"], status, subresource="status")
            if "deletionTimestamp" in meta:
                await remove(self.cluster, pod)

    def _drop_folders(self, *, keep: set[str]) -> None:
        for folder in self.folder.iterdir():
            if folder.name.rpartition("_")[2] not in keep:
                shutil.rmtree(folder, ignore_errors=True)

    async def _watch_pods(self) -> None:
        listed: set[str] = set()
        async for event, pod in self.cluster.watch(POD):
            if event == "SYNCED":
                for uid in set(self._runners) - listed:
                    self._gone(uid)
                listed.clear()
            elif event == "DELETED":
                self._gone(pod["metadata"]["uid"])
                await self._schedule_waiting()
            else:
                listed.add(pod["metadata"]["uid"])
                await self._seen(pod)

    async def _seen(self, pod: Object) -> None:
        meta, uid = pod["metadata"], pod["metadata"]["uid"]
        self._pod_names.add((meta["namespace"], meta["name"]))
        bound = pod["spec"].get("nodeName")
        if runner := self._runners.get(uid):
            runner.seen(pod)
            if runner.over:
                await self._over(pod)
        elif bound not in (None, "", self.name):
            return
        elif "deletionTimestamp" in meta:
            self._waiting.pop(uid, None)
            await remove(self.cluster, pod)
        elif phase(pod) in ("Succeeded", "Failed"):
            return
        elif bound:
            self._start(pod)
        elif not pod["spec"].get("schedulingGates"):
            self._waiting[uid] = pod
            await self._schedule(pod)

    async def _over(self, pod: Object) -> None:
        """Nothing of the pod runs any more: its GPUs and cores are free, and a deletion has nothing to wait for."""
        if self._reserved.pop(pod["metadata"]["uid"], None):
            await self._schedule_waiting()
        if "deletionTimestamp" in pod["metadata"]:
            await remove(self.cluster, pod)

    def _start(self, pod: Object) -> None:
        meta = pod["metadata"]
        self._waiting.pop(meta["uid"], None)
        self._reserved[meta["uid"]] = requests_of(pod)
        folder = self.folder / f"{meta['namespace']}_{meta['name']}_{meta['uid']}"
        folder.mkdir(parents=True, exist_ok=True)
        sandbox = Sandbox(self.cluster, pod, folder, lambda name: (meta["namespace"], name) in self._pod_names)
        runner = PodRunner(self.cluster, pod, sandbox, self._environment, self._pace)
        self._runners[meta["uid"]] = runner
        runner.task.add_done_callback(lambda _: self._ended(runner))

    def _ended(self, runner: PodRunner) -> None:
        if runner.uid not in self._runners:
            shutil.rmtree(runner.sandbox.folder, ignore_errors=True)

    def _gone(self, uid: str) -> None:
        """The pod is deleted: end what runs, forget it, and drop its folder with its logs."""
        self._waiting.pop(uid, None)
        self._reserved.pop(uid, None)
        runner = self._runners.pop(uid, None)
        if runner is None:
            return
        if runner.task.done():
            self._ended(runner)
        else:
            runner.end(0)

    async def _schedule_waiting(self) -> None:
        for pod in list(self._waiting.values()):
            await self._schedule(pod)

    async def _schedule(self, pod: Object) -> None:
        meta = pod["metadata"]
        if problem := self._misfit(pod):
            await self._say_unschedulable(pod, problem)
            return
        target = {"apiVersion": "v1", "kind": "Node", "name": self.name}
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"]},
            "target": target,
        }
        self._reserved[meta["uid"]] = requests_of(pod)
        self._waiting.pop(meta["uid"], None)
        try:
            await self.cluster.create(Kind("v1", "Binding", f"pods/{meta['name']}/binding"), binding)
        except ApiError as error:
            self._reserved.pop(meta["uid"], None)
            if error.status not in (404, 409):  # gone, or bound by someone else
                raise
            return
        message = f"Successfully assigned {meta['namespace']}/{meta['name']} to {self.name}"
        await record(self.cluster, pod, "Normal", "Scheduled", message, component="default-scheduler")

    def _misfit(self, pod: Object) -> str:
        selector: dict[str, str] = pod["spec"].get("nodeSelector") or {}
        if any(self._labels.get(key) != value for key, value in selector.items()):
            return "node(s) didn't match Pod's node affinity/selector"
        for name, asked in requests_of(pod).items():
            free = self._capacity[name] - sum(reserved[name] for reserved in self._reserved.values())
            if asked > max(0, free):
                return f"Insufficient {name}"
        return ""

    async def _say_unschedulable(self, pod: Object, problem: str) -> None:
        helpless = "Preemption is not helpful for scheduling" if "match" in problem else "No preemption victims found"
        message = f"0/1 nodes are available: 1 {problem}. preemption: 0/1 nodes are available: 1 {helpless}."
        meta, conditions = pod["metadata"], list(pod.get("status", {}).get("conditions") or [])
        if not any(c["type"] == "PodScheduled" and c.get("message") == message for c in conditions):
            set_condition(conditions, "PodScheduled", "False", "Unschedulable", message)
            body = {"status": {"conditions": conditions}}
            await self.cluster.patch(POD, meta["name"], meta["namespace"], body, subresource="status")
            await record(self.cluster, pod, "Warning", "FailedScheduling", message, component="default-scheduler")

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        namespace, name, container = (request.match_info[key] for key in ("namespace", "pod", "container"))
        files = sorted(
            self.folder.glob(f"{namespace}_{name}_*/containers/{container}/*.log"),
            key=lambda path: (path.stat().st_mtime, int(path.stem)),
        )
        back = 2 if request.query.get("previous") in ("true", "1") else 1
        if len(files) < back:
            what = "previous terminated container" if back == 2 else "container"
            problem = (
                f'{what} "{container}" in pod "{name}" not found'
                if back == 2
                else (f'container "{container}" in pod "{name}" is waiting to start: ContainerCreating')
            )
            raise web.HTTPBadRequest(text=problem)
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        await response.prepare(request)
        follow = request.query.get("follow") in ("true", "1") and back == 1
        tail = request.query.get("tailLines")
        async for chunk in self._read(files[-back], int(tail) if tail else None, follow=follow):
            await response.write(chunk)
        await response.write_eof()
        return response

    async def _read(self, path: Path, tail: int | None, *, follow: bool) -> AsyncIterator[bytes]:
        """A log's content, and what is added to it until its container has ended."""
        with path.open("rb") as log_file:
            content = log_file.read()
            yield b"".join(content.splitlines(keepends=True)[-tail:] if tail else [content] if tail is None else [])
            while follow:
                live = self._is_live(path)
                if content := log_file.read():
                    yield content
                elif not live:
                    return
                else:
                    await asyncio.sleep(FOLLOW_SECONDS)

    def _is_live(self, path: Path) -> bool:
        uid = path.parents[2].name.rpartition("_")[2]
        runner = self._runners.get(uid)
        container = runner.container(path.parent.name) if runner else None
        return container is not None and container.process is not None and str(container.restarts) == path.stem


def requests_of(pod: Object) -> dict[str, float]:
    """GPUs and cores a pod asks for; a limit stands for a request that is not there, as in Kubernetes."""
    total = dict.fromkeys(COUNTED, 0.0)
    for container in pod["spec"]["containers"]:
        resources = container.get("resources") or {}
        for name in COUNTED:
            asked = (resources.get("requests") or {}).get(name) or (resources.get("limits") or {}).get(name) or "0"
            total[name] += quantity(str(asked))
    return total


def lost_status(pod: Object) -> Object:
    """What is known of a pod whose node process died: that its containers are gone, not how they ended."""
    conditions = [dict(c) for c in pod.get("status", {}).get("conditions") or []]
    message = "PodGC: node no longer exists"
    set_condition(conditions, "DisruptionTarget", "True", "DeletionByPodGC", message)
    for kind in ("ContainersReady", "Ready"):
        set_condition(conditions, kind, "False", "PodFailed", message)
    lost = {
        "exitCode": 137,
        "reason": "ContainerStatusUnknown",
        "message": "The container could not be located when the pod was terminated",
        "startedAt": pod.get("status", {}).get("startTime") or now(),
        "finishedAt": now(),
    }
    containers = [
        status | {"ready": False, "started": False, "state": {"terminated": lost}}
        for status in pod.get("status", {}).get("containerStatuses") or []
    ]
    status: Object = {"phase": "Failed", "reason": "NodeLost", "message": message, "conditions": conditions}
    return status | ({"containerStatuses": containers} if containers else {})
