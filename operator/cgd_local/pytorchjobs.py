"""The PyTorchJob controller (`kubeflow.org/v1`) with the semantics of Training Operator 1.9, and its CRD.

Pods, labels, environment, conditions and reasons are those of the real operator. Deviations:

- One machine: MASTER_ADDR is the master's pod name as usual, which the node turns into 127.0.0.1; MASTER_PORT is a free
  port instead of the default 23456, so that two jobs do not meet. A container port other than 23456 is kept.
- `runPolicy.backoffLimit` counts container restarts and pods created again (the annotation `cgd.dev/restarts` of the
  job remembers them); the real operator loses count of the latter.
- Left out: Services (nothing resolves names here), the workers' init container that waits for the master's name,
  elasticPolicy, gang scheduling.
"""

import hashlib
import socket
import time
from copy import deepcopy
from dataclasses import dataclass, field

from cgd_local.controllers import (
    RESYNC_SECONDS,
    Controller,
    condition,
    controller_of,
    is_active,
    now,
    owner_reference,
    phase,
    seconds,
    set_condition,
    statuses,
)
from cgd_operator.cluster import POD, PYTORCHJOB, AlreadyExists, Object

LABEL = "training.kubeflow.org/"
RESTARTS = "cgd.dev/restarts"
DEFAULT_PORT, PORT_NAME, CONTAINER = 23456, "pytorchjob-port", "pytorch"
LOCAL_PORTS = range(27000, 32000)  # below what Linux hands out to clients, above those of `s3`
UNKNOWN_EXIT = 48879  # what the real operator assumes for a pod that failed without an exit code: retryable

Conditions = list[Object]


@dataclass
class Look:
    """One look at a job: what is there, and what the look decides to do, delete and say."""

    job: Object
    pods: list[Object]
    conditions: Conditions
    events: list[tuple[str, str, str]] = field(default_factory=list)
    doomed: list[Object] = field(default_factory=list)
    missing: list[Object] = field(default_factory=list)
    restarts: int = 0

    @property
    def name(self) -> str:
        return str(self.job["metadata"]["name"])

    @property
    def replicas(self) -> dict[str, Object]:
        """The replica specs, the master first: workers must find its name."""
        specs: dict[str, Object] = self.job["spec"]["pytorchReplicaSpecs"]
        return {kind: specs[kind] for kind in ("Master", "Worker") if kind in specs}

    @property
    def policy(self) -> Object:
        return self.job["spec"].get("runPolicy") or {}

    @property
    def status(self) -> Object:
        return self.job.get("status") or {}

    @property
    def finished(self) -> Object | None:
        return condition(self.conditions, "Succeeded") or condition(self.conditions, "Failed")

    def say(self, kind: str, status: str, message: str, *, reason: str = "") -> None:
        """Set a condition with the real operator's reason; an Event goes with each change."""
        reason = f"PyTorchJob{reason or kind}"
        if kind in ("Running", "Restarting") and status == "True":
            other = "Restarting" if kind == "Running" else "Running"
            self.conditions[:] = [c for c in self.conditions if c["type"] != other]
        if kind in ("Succeeded", "Failed") and condition(self.conditions, "Running"):
            set_condition(self.conditions, "Running", "False", reason, message)
        if set_condition(self.conditions, kind, status, reason, message):
            self.events.append(("Warning" if kind in ("Failed", "Restarting") else "Normal", reason, message))

    def replica_pods(self, kind: str) -> dict[int, Object]:
        mine = [pod for pod in self.pods if pod["metadata"]["labels"].get(LABEL + "replica-type") == kind.lower()]
        return {int(pod["metadata"]["labels"][LABEL + "replica-index"]): pod for pod in mine}

    def counts(self, kind: str) -> dict[str, int]:
        phases = [phase(pod) for pod in self.replica_pods(kind).values()]
        counts = {name: phases.count(name.capitalize()) for name in ("succeeded", "failed")}
        return {"active": phases.count("Running"), **counts}


class PyTorchJobController(Controller):
    kind = PYTORCHJOB

    async def reconcile(self, owner: Object) -> float | None:
        if "deletionTimestamp" in owner["metadata"]:
            return None
        meta = owner["metadata"]
        pods, _ = await self.cluster.list(POD, meta["namespace"], labels=f"{LABEL}job-name={meta['name']}")
        mine = [pod for pod in pods if (controller_of(pod) or {}).get("uid") == meta["uid"]]
        look = Look(owner, mine, [dict(c) for c in owner.get("status", {}).get("conditions") or []])
        status, again = decide(look, time.time())
        await self._act(look, status)
        if look.finished and not look.doomed:
            return await self._expire(look)
        return RESYNC_SECONDS if again is None else again

    async def _act(self, look: Look, status: Object) -> None:
        meta = look.job["metadata"]
        if look.restarts:
            total = str(restarts_of(look.job) + look.restarts)
            await self.cluster.patch(
                PYTORCHJOB, meta["name"], meta["namespace"], {"metadata": {"annotations": {RESTARTS: total}}}
            )
        for pod in look.doomed:
            name = pod["metadata"]["name"]
            await self.cluster.delete(POD, name, meta["namespace"], uid=pod["metadata"]["uid"])
            look.events.append(("Normal", "SuccessfulDeletePod", f"Deleted pod: {name}"))
        for pod in look.missing:
            try:
                await self.cluster.create(POD, pod)
            except AlreadyExists:  # its predecessor is still ending; the deletion brings us back
                continue
            look.events.append(("Normal", "SuccessfulCreatePod", f"Created pod: {pod['metadata']['name']}"))
        if any(look.status.get(name) != value for name, value in status.items()):
            body = {"status": status}
            await self.cluster.patch(PYTORCHJOB, meta["name"], meta["namespace"], body, subresource="status")
        for kind, reason, message in look.events:
            await self.event(look.job, kind, reason, message)

    async def _expire(self, look: Look) -> float | None:
        ttl, ended = look.policy.get("ttlSecondsAfterFinished"), look.finished
        if ttl is None or ended is None:
            return None
        left = seconds(ended["lastTransitionTime"]) + float(ttl) - time.time()
        if left <= 0:
            meta = look.job["metadata"]
            await self.cluster.delete(PYTORCHJOB, meta["name"], meta["namespace"], uid=meta["uid"])
        return max(left, 0.1)


def decide(look: Look, time_now: float) -> tuple[Object, float | None]:
    """Fill the look's deletions, creations and conditions; return the status to write and when to look again."""
    if not look.conditions:
        look.say("Created", "True", f"PyTorchJob {look.name} is created.")
    if look.finished:
        return _clean_up(look), None
    if look.policy.get("suspend"):
        return _suspend(look), None
    start = look.status.get("startTime") or now()
    if condition(look.conditions, "Suspended"):
        look.say("Suspended", "False", f"PyTorchJob {look.name} is resumed.", reason="Resumed")
        start = now()
    status: Object = {"startTime": start, "conditions": look.conditions}
    deadline = look.policy.get("activeDeadlineSeconds")
    left = None if deadline is None else seconds(start) + float(deadline) - time_now
    if left is not None and left <= 0:
        _fail(look, f"Job {look.name} has failed because it was active longer than specified deadline")
        look.doomed = [pod for pod in look.pods if "deletionTimestamp" not in pod["metadata"]]
    else:
        _replace(look)
        _conclude(look)
    if look.finished:
        look.missing = []
        status["completionTime"] = now()
    return status | {"replicaStatuses": {kind: look.counts(kind) for kind in look.replicas}}, left


def _replace(look: Look) -> None:
    """Delete what failed and may be tried again, create what is missing, give up when the limit is reached."""
    for kind, spec in look.replicas.items():
        pods = look.replica_pods(kind)
        look.doomed += [pod for index, pod in pods.items() if index >= replicas_of(spec) and is_active(pod)]
        look.missing += [pod_of(look, kind, index) for index in range(replicas_of(spec)) if index not in pods]
        for pod in pods.values():
            if phase(pod) == "Failed" and "deletionTimestamp" not in pod["metadata"]:
                _failed(look, kind, spec, pod)
    limit = look.policy.get("backoffLimit")
    if limit is not None and restarts_of(look.job) + look.restarts + _container_restarts(look) > limit:
        _fail(look, f"Job {look.name} has failed because it has reached the specified backoff limit")
        look.doomed = [pod for pod in look.pods if is_active(pod)]


def _failed(look: Look, kind: str, spec: Object, pod: Object) -> None:
    code, policy = exit_code(pod), spec.get("restartPolicy", "OnFailure")
    name = pod["metadata"]["name"]
    look.events.append(
        ("Normal", "ExitedWithCode", f"Pod: {look.job['metadata']['namespace']}.{name} exited with code {code}")
    )
    if policy == "Never" or (policy == "ExitCode" and code < 128):
        failed = look.counts(kind)["failed"]
        _fail(look, f"PyTorchJob {look.name} is failed because {failed} {kind} replica(s) failed.")
        return
    look.doomed.append(pod)
    look.restarts += 1
    look.say("Restarting", "True", f"PyTorchJob {look.name} is restarting because {kind} replica(s) failed.")


def _conclude(look: Look) -> None:
    leader = "Master" if "Master" in look.replicas else "Worker"
    counts, wanted = look.counts(leader), replicas_of(look.replicas[leader])
    if look.finished:
        return
    if counts["succeeded"] >= wanted:
        look.say("Succeeded", "True", f"PyTorchJob {look.name} is successfully completed.")
    elif counts["active"] and not look.restarts:
        look.say("Running", "True", f"PyTorchJob {look.name} is running.")


def _fail(look: Look, message: str) -> None:
    if not look.finished:
        look.say("Failed", "True", message)


def _suspend(look: Look) -> Object:
    message = f"PyTorchJob {look.name} is suspended."
    look.doomed = [pod for pod in look.pods if "deletionTimestamp" not in pod["metadata"]]
    if condition(look.conditions, "Running"):
        set_condition(look.conditions, "Running", "False", "PyTorchJobSuspended", message)
    look.say("Suspended", "True", message)
    idle = {kind: look.counts(kind) | {"active": 0} for kind in look.replicas}
    return {"conditions": look.conditions, "replicaStatuses": idle}


def _clean_up(look: Look) -> Object:
    """After the end: what `cleanPodPolicy` says (default None: nothing), and no replica is active any more."""
    policy = look.policy.get("cleanPodPolicy", "None")
    standing = [pod for pod in look.pods if "deletionTimestamp" not in pod["metadata"]]
    if policy == "All":
        look.doomed = standing
    elif policy == "Running":
        look.doomed = [pod for pod in standing if is_active(pod)]
    if condition(look.conditions, "Failed"):
        return {}
    done: dict[str, Object] = deepcopy(look.status.get("replicaStatuses") or {})
    for counts in done.values():
        counts["succeeded"] = int(counts.get("succeeded", 0)) + int(counts.get("active", 0))
        counts["active"] = 0
    return {"replicaStatuses": done}


def pod_of(look: Look, kind: str, index: int) -> Object:
    meta, spec = look.job["metadata"], look.replicas[kind]
    template = deepcopy(spec["template"])
    labels = dict(template.get("metadata", {}).get("labels") or {}) | {
        LABEL + "job-name": look.name,
        LABEL + "operator-name": "pytorchjob-controller",
        LABEL + "replica-type": kind.lower(),
        LABEL + "replica-index": str(index),
    }
    if kind == "Master":
        labels[LABEL + "job-role"] = "master"
    policy = spec.get("restartPolicy", "OnFailure")
    body = template["spec"] | {"restartPolicy": "Never" if policy == "ExitCode" else policy}
    for container in body["containers"]:
        container["env"] = [*(container.get("env") or []), *environment(look, kind, index)]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{look.name}-{kind.lower()}-{index}",
            "namespace": meta["namespace"],
            "labels": labels,
            "annotations": dict(template.get("metadata", {}).get("annotations") or {}),
            "ownerReferences": [owner_reference(PYTORCHJOB, look.job)],
        },
        "spec": body,
    }


def environment(look: Look, kind: str, index: int) -> list[Object]:
    """What Training Operator 1.9 injects. RANK is the rank of the node (pod), WORLD_SIZE counts processes."""
    nodes, processes = sum(map(replicas_of, look.replicas.values())), str(look.job["spec"].get("nprocPerNode", "auto"))
    env = {"PYTHONUNBUFFERED": "1"}
    if "Master" in look.replicas:
        address, port = f"{look.name}-master-0", str(master_port(look))
        rank = str(index + (kind == "Worker"))
        env |= {"MASTER_PORT": port, "PET_MASTER_PORT": port, "MASTER_ADDR": address, "PET_MASTER_ADDR": address}
        env["WORLD_SIZE"] = str(nodes * (int(processes) if processes.isdigit() else 1))
        env |= {"RANK": rank, "PET_NODE_RANK": rank}
    env |= {"PET_NPROC_PER_NODE": processes, "PET_NNODES": str(nodes)}
    return [{"name": name, "value": value} for name, value in env.items()]


def master_port(look: Look) -> int:
    """The port the job's pods use already; else the one its spec names; else a free one, tried from the uid's hash."""
    for pod in look.pods:
        for entry in pod["spec"]["containers"][0].get("env") or []:
            if entry["name"] == "MASTER_PORT":
                return int(entry["value"])
    containers = look.replicas["Master"]["template"]["spec"]["containers"]
    ports = [port for container in containers for port in container.get("ports") or []]
    named = next((int(port["containerPort"]) for port in ports if port.get("name") == PORT_NAME), DEFAULT_PORT)
    if named != DEFAULT_PORT:
        return named
    first = int.from_bytes(hashlib.sha256(look.job["metadata"]["uid"].encode()).digest()[:4])
    return next(
        port for step in range(len(LOCAL_PORTS)) if is_free(port := LOCAL_PORTS[(first + step) % len(LOCAL_PORTS)])
    )


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def replicas_of(spec: Object) -> int:
    return int(spec.get("replicas", 1))


def restarts_of(job: Object) -> int:
    return int((job["metadata"].get("annotations") or {}).get(RESTARTS, 0))


def _container_restarts(look: Look) -> int:
    return sum(int(status.get("restartCount", 0)) for pod in look.pods for status in statuses(pod))


def exit_code(pod: Object) -> int:
    for status in statuses(pod):
        if status["name"] == CONTAINER and "terminated" in status.get("state", {}):
            return int(status["state"]["terminated"]["exitCode"])
    return UNKNOWN_EXIT


def crd() -> Object:
    """A small structural schema: pod templates are taken as they come, the rest is checked."""
    loose = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    count, text = {"type": "integer", "format": "int32", "minimum": 0}, {"type": "string"}
    replica = {
        "type": "object",
        "required": ["template"],
        "properties": {
            "replicas": count,
            "restartPolicy": text | {"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
            "template": loose,
        },
    }
    policy = {
        "type": "object",
        "properties": {
            "cleanPodPolicy": text | {"enum": ["None", "Running", "All"]},
            "backoffLimit": count,
            "activeDeadlineSeconds": count | {"format": "int64"},
            "ttlSecondsAfterFinished": count,
            "suspend": {"type": "boolean"},
            "managedBy": text,
            "schedulingPolicy": loose,
        },
    }
    spec = {
        "type": "object",
        "required": ["pytorchReplicaSpecs"],
        "properties": {
            "nprocPerNode": text,
            "elasticPolicy": loose,
            "runPolicy": policy,
            "pytorchReplicaSpecs": {"type": "object", "properties": {"Master": replica, "Worker": replica}},
        },
    }
    schema = {"type": "object", "properties": {"spec": spec, "status": loose}}
    columns = [
        {"name": "State", "type": "string", "jsonPath": ".status.conditions[-1].type"},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    ]
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
    }
    names = {"kind": "PyTorchJob", "listKind": "PyTorchJobList", "plural": "pytorchjobs", "singular": "pytorchjob"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "pytorchjobs.kubeflow.org"},
        "spec": {"group": "kubeflow.org", "scope": "Namespaced", "names": names, "versions": [version]},
    }
