"""What the tests of the local cluster's workloads share: a namespace to act in, and how to wait and look."""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cgd_local.cluster import LocalCluster
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import EVENT, JOB, POD, PYTORCHJOB, TRAININGRUNTIME, TRAINJOB, Kind
from support.patience import PATIENCE

FAST = 0.05  # seconds of back-off
KUBECTL = str(Path(sys.executable).with_name("kubectl"))
GRACE = {"terminationGracePeriodSeconds": 1}
"""A shell is PID 1 of its container, and ignores SIGTERM unless it has a trap for it."""
IMAGE = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def container(script: str, name: str = "main", **more: Any) -> Object:
    return {"name": name, "image": "local", "command": ["sh", "-c", script], **more}


def phase(pod: Object) -> str:
    return str(pod["status"].get("phase"))


def condition(item: Object, kind: str) -> Object:
    """The condition of that type, an empty one if there is none."""
    return next((c for c in item.get("status", {}).get("conditions") or [] if c["type"] == kind), {})


def true(item: Object, kind: str) -> bool:
    return condition(item, kind).get("status") == "True"


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def containers_below(folder: Path) -> list[int]:
    """Processes of pods whose folders are there. Their own numbers say little: each container counts from 1."""
    home = f"HOME={folder}".encode()
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if home in _environment(pid) and alive(pid)]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


async def eventually(look: Callable[[], Any], what: str) -> Any:
    """What `look` finds (it may be a coroutine function), as soon as it finds anything."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = look()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"in {PATIENCE:g} seconds there was no {what}")


class World:
    """What a test does to the cluster, in its namespace."""

    def __init__(self, cluster: LocalCluster, namespace: str) -> None:
        self.cluster, self.namespace, self.client = cluster, namespace, cluster.client

    async def make(self, kind: Kind, name: str, **body: Any) -> Object:
        meta = {"name": name, "namespace": self.namespace, **body.pop("metadata", {})}
        body = {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": meta, **body}
        return await self.client.create(kind, body)

    async def pod(self, script: str = "true", name: str = "p", **spec: Any) -> Object:
        meta = spec.pop("metadata", {})
        spec = {"restartPolicy": "Never", "containers": [container(script)]} | GRACE | spec
        return await self.make(POD, name, spec=spec, metadata=meta)

    async def job(self, script: str = "true", name: str = "j", **spec: Any) -> Object:
        policy = spec.pop("restartPolicy", "Never")
        template = {"spec": {"restartPolicy": policy, "containers": [container(script)]} | GRACE}
        return await self.make(JOB, name, spec={"template": template, **spec})

    async def pytorchjob(
        self, script: str, workers: int = 1, master: str | None = None, name: str = "t", **spec: Any
    ) -> Object:
        """A PyTorchJob of Workers, which find their number in NUMBER; with `master`, a Master beside them. What the
        pods have in common is in `pod`."""
        policy, shared = spec.pop("restartPolicy", "ExitCode"), spec.pop("pod", {})
        number = {"fieldRef": {"fieldPath": "metadata.labels['training.kubeflow.org/replica-index']"}}
        shared = {**GRACE, **shared}
        pods = {
            kind: {"spec": {"containers": [container(text, "pytorch", env=[{"name": "NUMBER", "valueFrom": number}])]}}
            for kind, text in {"Master": master, "Worker": script}.items()
            if text is not None
        }
        counts = {"Master": 1, "Worker": workers}
        replicas = {
            kind: {"replicas": counts[kind], "restartPolicy": policy, "template": {"spec": pod["spec"] | shared}}
            for kind, pod in pods.items()
        }
        return await self.make(PYTORCHJOB, name, spec={"pytorchReplicaSpecs": replicas, **spec})

    async def trainjob(self, script: str, nodes: int = 1, restarts: int = 0, name: str = "t", **spec: Any) -> Object:
        """A TrainJob and its runtime: the Job gives up at its first failure, exit code 3 is final."""
        pod = {"restartPolicy": "Never", "containers": [container(script, "node")], **GRACE}
        final = {"action": "FailJob", "onExitCodes": {"containerName": "node", "operator": "In", "values": [3]}}
        job = {"backoffLimit": 0, "completionMode": "Indexed", "podFailurePolicy": {"rules": [final]}}
        replicated = {"name": "node", "template": {"spec": job | {"template": {"spec": pod}}}}
        rule = {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
        jobset = {
            "failurePolicy": {"maxRestarts": restarts, "rules": [rule]},
            "replicatedJobs": [replicated],
        }
        runtime = {"mlPolicy": {"numNodes": 1, "torch": {}}, "template": {"spec": jobset}}
        await self.make(TRAININGRUNTIME, name, spec=runtime)
        trainer = {"numNodes": nodes, "numProcPerNode": 4}
        reference = {"kind": "TrainingRuntime", "name": name}
        return await self.make(TRAINJOB, name, spec={"runtimeRef": reference, "trainer": trainer, **spec})

    async def until(self, kind: Kind, name: str, true: Callable[[Object], Any]) -> Object:
        """The object, once what is asked of it is true."""

        async def look() -> Object | None:
            found = await self.client.get(kind, name, self.namespace)
            return found if found is not None and true(found) else None

        found: Object = await eventually(look, f"{kind.kind} {name} as was asked for")
        return found

    async def gone(self, kind: Kind, name: str) -> None:
        async def look() -> bool:
            return await self.client.get(kind, name, self.namespace) is None

        await eventually(look, f"end of {kind.kind} {name}")

    async def ended(self, name: str = "p") -> Object:
        return await self.until(POD, name, lambda pod: phase(pod) in ("Succeeded", "Failed"))

    async def running(self, name: str = "p") -> Object:
        return await self.until(POD, name, lambda pod: phase(pod) == "Running")

    async def finished(self, name: str = "j", kind: Kind = JOB) -> Object:
        ends = ("Complete", "Failed", "Succeeded")
        return await self.until(kind, name, lambda job: any(true(job, end) for end in ends))

    async def pods(self, labels: str = "") -> list[Object]:
        return (await self.client.list(POD, self.namespace, labels=labels))[0]

    async def when_pods(self, true: Callable[[list[Object]], Any]) -> list[Object]:
        """All pods, once what is asked of them is true."""

        async def look() -> tuple[list[Object]] | None:
            pods = await self.pods()
            return (pods,) if true(pods) else None

        found: tuple[list[Object]] = await eventually(look, "set of pods as was asked for")
        return found[0]

    async def event(self, reason: str) -> Object:
        async def look() -> Object | None:
            events, _ = await self.client.list(EVENT, self.namespace)
            return next((e for e in events if e["reason"] == reason), None)

        found: Object = await eventually(look, f"Event {reason}")
        return found

    def folder(self, name: str = "p") -> Path:
        """A pod's folder on this machine."""
        return next(self.cluster.node.folder.glob(f"{self.namespace}_{name}_*"))

    async def written(self, file: str, name: str = "p") -> Path:
        """The path of a file below a pod's folder, once its program has made it."""
        pattern = f"{self.namespace}_{name}_*/{file}"
        found: list[Path] = await eventually(lambda: list(self.cluster.node.folder.glob(pattern)), pattern)
        return found[0]

    def log(self, name: str = "p") -> str:
        return "".join(path.read_text() for path in sorted(self.folder(name).glob("logs/*/*.log")))
