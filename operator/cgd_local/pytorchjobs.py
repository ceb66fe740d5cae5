"""The PyTorchJob controller (`kubeflow.org/v1`) with the semantics of the Training Operator, and its CRD. Pure.

It plays 1.9.4, or on request 1.7 or 1.8; `Release` holds their differences that matter here. Pods, labels, environment,
init container, conditions and reasons are those of the real operator, with its oddities: it replaces a failed pod
without end (`backoffLimit` counts restarts of containers in their pods, and refuses a failed pod only if it is 0), and
1.7 does not end a job for a permanent exit code. Deviations:

- One machine: the port comes from the job's uid, whatever port the spec names, so that two jobs do not share one.
- The init container does not wait for the Master's name, which resolves only where pods have their own namespaces.
- Left out: elasticPolicy, gang scheduling, replicas beyond the requested number.
"""

from copy import deepcopy
from dataclasses import dataclass

from cgd_local.controllers import (
    Decision,
    condition,
    containers_of,
    end_of,
    headless,
    is_active,
    now,
    owned,
    phase,
    pod_of,
    seconds,
    set_condition,
    with_env,
)
from cgd_local.kubeflow import LOOSE, definition, port, struct
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import PYTORCHJOB

LABEL = "training.kubeflow.org/"


@dataclass(frozen=True)
class Release:
    """The differences between releases of the Training Operator."""

    sets_processes: bool = True
    """It sets PET_NPROC_PER_NODE without a Master, too."""
    names_first_worker: bool = True
    """Worker 0 has the role of the master if the job has no Master."""
    ends_for_permanent: bool = True
    """A pod's permanent exit code fails the job."""
    keeps_pods_at_limit: bool = True
    """`cleanPodPolicy` also applies to a job that has met a limit: before 1.9.4 that deletes all its pods."""


V1_9 = Release()
V1_8 = Release(keeps_pods_at_limit=False)
V1_7 = Release(sets_processes=False, names_first_worker=False, ends_for_permanent=False, keeps_pods_at_limit=False)


class Look:
    """One look at a job: its state, and the decision as it grows."""

    def __init__(self, job: Object, pods: list[Object], time_now: float, release: Release) -> None:
        self.job, self.pods, self.name, self.release = job, pods, job["metadata"]["name"], release
        self.time_now = time_now
        self.policy: Object = job["spec"].get("runPolicy") or {}
        self.replicas: dict[str, Object] = job["spec"]["pytorchReplicaSpecs"]
        self.total = sum(count(spec) for spec in self.replicas.values())
        self.status: Object = {"conditions": [], "replicaStatuses": {}, **deepcopy(job.get("status") or {})}
        self.conditions: list[Object] = self.status["conditions"]
        self.decision = Decision(self.status)

    def is_true(self, kind: str) -> bool:
        return condition(self.conditions, kind) is not None

    @property
    def ended(self) -> bool:
        return self.is_true("Succeeded") or self.is_true("Failed")

    def say(self, kind: str, message: str, *, status: str = "True", reason: str = "") -> None:
        """Set a condition with the real operator's reason, and record each change as an Event. A failed job stays
        failed."""
        if self.is_true("Failed"):
            return
        reason = f"PyTorchJob{reason or kind}"
        other = {"Running": "Restarting", "Restarting": "Running"}.get(kind)
        self.conditions[:] = [entry for entry in self.conditions if entry["type"] != other]
        for entry in self.conditions:
            if kind in ("Succeeded", "Failed") and entry["type"] == "Running":
                entry["status"] = "False"
        if set_condition(self.conditions, kind, status, reason, message):
            severity = "Warning" if kind == "Restarting" else "Normal"
            self.decision.events.append((severity, reason, message))
            self.conditions.sort(key=lambda entry: entry["type"] == kind)  # the newest comes last

    def clean(self) -> None:
        """Delete the pods that an ended or suspended job does not keep."""
        policy = self.policy.get("cleanPodPolicy", "None") if self.ended else "All"
        phases = {"All": ("Pending", "Running", "Succeeded", "Failed"), "Running": ("Pending", "Running"), "None": ()}
        staying = (pod for pod in self.pods if "deletionTimestamp" not in pod["metadata"])
        self.decision.delete = [pod for pod in staying if phase(pod) in phases[policy]]
        self.decision.unserved = [pod["metadata"]["name"] for pod in self.decision.delete]


def count(replica: Object) -> int:
    return int(replica.get("replicas", 1))


def decide(job: Object, pods: list[Object], time_now: float, release: Release = V1_9) -> Decision:
    """What the operator does for a PyTorchJob."""
    look = Look(job, pods, time_now, release)
    if not look.conditions:
        look.say("Created", f"PyTorchJob {look.name} is created.")
    if look.ended:
        look.clean()
        if look.is_true("Succeeded"):  # pods that are still active count as succeeded
            for counts in look.status["replicaStatuses"].values():
                counts["succeeded"] += counts.pop("active")
                counts["active"] = 0
        if "completionTime" in look.status:
            ended = {"lastTransitionTime": look.status["completionTime"]}
            look.decision.expire(ended, look.policy.get("ttlSecondsAfterFinished"), time_now)
    elif look.policy.get("suspend"):
        look.clean()
        for counts in look.status["replicaStatuses"].values():
            counts["active"] = 0
        message = f"PyTorchJob {look.name} is suspended."
        if look.is_true("Running"):
            look.say("Running", message, status="False", reason="Suspended")
        look.say("Suspended", message)
    else:
        _advance(look)
    return look.decision


def _advance(look: Look) -> None:
    if look.is_true("Suspended"):
        look.say("Suspended", f"PyTorchJob {look.name} is resumed.", status="False", reason="Resumed")
        look.status["startTime"] = now()
    if message := _limit(look):
        look.status.setdefault("completionTime", now())
        if not look.release.keeps_pods_at_limit:
            look.clean()
        look.say("Failed", message)
        if look.release.keeps_pods_at_limit:
            look.clean()
        return
    for kind in look.replicas:
        _reconcile_pods(look, kind)
    look.status.setdefault("startTime", now())
    for kind in look.replicas:
        _conclude(look, kind)


def _limit(look: Look) -> str:
    """The limit that the job has met, empty if none. A new failure counts only if not all pods are active, and only as
    the job's first failure."""
    failed = sum(phase(pod) == "Failed" for pod in look.pods)
    counted = sum(counts["failed"] for counts in look.status["replicaStatuses"].values())
    active, restarts = sum(is_active(pod) for pod in look.pods), 0
    for status in (pod["status"] for pod in look.pods if phase(pod) == "Running"):
        containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
        restarts += sum(int(container.get("restartCount", 0)) for container in containers)
    backoff, deadline = look.policy.get("backoffLimit"), look.policy.get("activeDeadlineSeconds")
    is_first_failure = failed > counted and active != look.total and backoff == 0
    if backoff is not None and (is_first_failure or restarts >= max(1, int(backoff))):
        return f"Job {look.name} has failed because it has reached the specified backoff limit"
    start = look.status.get("startTime")
    if deadline is not None and start:
        left = seconds(start) + float(deadline) - look.time_now
        if left <= 0:
            return f"Job {look.name} has failed because it was active longer than specified deadline"
        look.decision.again = left
    return ""


def _reconcile_pods(look: Look, kind: str) -> None:
    """Create the missing pods, delete the pods to replace, and count."""
    labelled = [(pod["metadata"]["labels"], pod) for pod in look.pods]
    pods = {
        int(meta[LABEL + "replica-index"]): p for meta, p in labelled if meta[LABEL + "replica-type"] == kind.lower()
    }
    counts = {"active": 0, "succeeded": 0, "failed": 0}
    for index in range(count(look.replicas[kind])):
        look.decision.services.append(_service(look, kind, index))
        pod = pods.get(index)
        if pod is None:
            look.decision.create.append(_pod(look, kind, index))
            continue
        # of the container that the real operator looks at; a pod that failed without an exit code is retryable
        ends = [end_of(container) for container in containers_of(pod) if container["name"] == "pytorch"]
        if code := ends[0].get("exitCode") if ends else None:
            place = f"{pod['metadata']['namespace']}.{pod['metadata']['name']}"
            look.decision.events.append(("Normal", "ExitedWithCode", f"Pod: {place} exited with code {code}"))
        leaving, policy = "deletionTimestamp" in pod["metadata"], look.replicas[kind].get("restartPolicy", "OnFailure")
        if phase(pod) == "Failed":  # delete it, so that the next look replaces it, or fail the job
            if policy in ("OnFailure", "Always") or (policy == "ExitCode" and (code is None or code >= 128)):
                look.decision.delete += [] if leaving else [pod]
                look.say("Restarting", f"job {look.name} is restarting because {kind} replica(s) failed.")
            elif policy == "ExitCode" and look.release.ends_for_permanent:
                look.say("Failed", f'job "{look.name}" is failing because "{kind}" replica(s) failed.')
        words = {"Running": "failed" if leaving else "active", "Succeeded": "succeeded", "Failed": "failed"}
        if phase(pod) in words:
            counts[words[phase(pod)]] += 1
    look.status["replicaStatuses"][kind] = counts


def _conclude(look: Look, kind: str) -> None:
    """Set the job's condition: that of the Master if it has one, else Succeeded when all Workers have succeeded."""
    counts, replica = look.status["replicaStatuses"][kind], look.replicas[kind]
    leads = kind == "Master" or "Master" not in look.replicas
    name = look.name if kind == "Master" else f"{look.job['metadata']['namespace']}/{look.name}"
    if leads and counts["succeeded"] == count(replica):
        look.status.setdefault("completionTime", now())
        end = "is successfully completed." if kind == "Master" else "successfully completed."
        look.say("Succeeded", f"PyTorchJob {name} {end}")
        return
    if leads and counts["active"]:
        look.say("Running", f"PyTorchJob {name} is running.")
    if counts["failed"] and count(replica) > counts["succeeded"] + counts["active"]:
        why = f"because {counts['failed']} {kind} replica(s) failed."
        if replica.get("restartPolicy", "OnFailure") == "Never":
            look.status.setdefault("completionTime", now())
            look.say("Failed", f"PyTorchJob {look.name} is failed {why}")
        else:
            look.say("Restarting", f"PyTorchJob {look.name} is restarting {why}")


def _pod(look: Look, kind: str, index: int) -> Object:
    spec, has_master = look.replicas[kind], "Master" in look.replicas
    policy = spec.get("restartPolicy", "OnFailure")
    template = with_env(_at_own_port(look.job, spec["template"]), _environment(look, kind, index))
    template["spec"]["restartPolicy"] = "Never" if policy == "ExitCode" else policy
    if has_master and kind == "Worker":
        template["spec"]["initContainers"] = [*template["spec"].get("initContainers", []), init_container(look.name)]
    first = kind == "Master" or (not has_master and index == 0 and look.release.names_first_worker)
    labels = _labels(look, kind, index) | ({LABEL + "job-role": "master"} if first else {})
    return pod_of(PYTORCHJOB, look.job, template, f"{look.name}-{kind.lower()}-{index}", labels, {})


def _labels(look: Look, kind: str, index: int) -> dict[str, str]:
    labels = {
        "job-name": look.name,
        "operator-name": "pytorchjob-controller",
        "replica-type": kind.lower(),
        "replica-index": str(index),
    }
    return {LABEL + key: value for key, value in labels.items()}


def _service(look: Look, kind: str, index: int) -> Object:
    """The Service that gives a pod its name while the pod is ready."""
    labels = _labels(look, kind, index)
    ports = [
        {"name": port["name"], "port": port["containerPort"]}
        for container in look.replicas[kind]["template"]["spec"]["containers"]
        for port in container.get("ports", [])
        if container["name"] == "pytorch"
    ]
    ports = ports or [{"name": "pytorchjob-port", "port": 23456}]
    name = f"{look.name}-{kind.lower()}-{index}"
    return headless(owned(PYTORCHJOB, look.job, name, labels), labels, ports=ports)


def init_container(job: str) -> Object:
    """The container that waits in a Worker for the Master's name. It sets no user, so it runs as its image's: root."""
    return {
        "name": "init-pytorch",
        "image": "alpine:3.10",
        "imagePullPolicy": "IfNotPresent",
        "resources": {"limits": {"cpu": "100m", "memory": "20Mi"}, "requests": {"cpu": "50m", "memory": "10Mi"}},
        "command": ["sh", "-c", f"echo {job}-master-0 is this machine"],
    }


def _at_own_port(job: Object, template: Object) -> Object:
    """The template with the job's own port in place of any other: here all jobs run on one machine."""
    containers, value = [], {"value": port(job)}
    for container in template["spec"]["containers"]:
        env = container.get("env", [])
        env = [entry | (value if entry["name"] in ("MASTER_PORT", "PET_MASTER_PORT") else {}) for entry in env]
        containers.append(container | ({"env": env} if env else {}))
    return template | {"spec": template["spec"] | {"containers": containers}}


def _environment(look: Look, kind: str, index: int) -> list[Object]:
    """The variables that the Training Operator adds. RANK is the rank of the node (pod), WORLD_SIZE counts processes.
    Without a Master it sets neither, and no address."""
    processes = look.job["spec"].get("nprocPerNode", "auto")
    env = {"PYTHONUNBUFFERED": "1"}
    if "Master" in look.replicas:
        address, rank = f"{look.name}-master-0", str(index + (kind == "Worker"))
        env |= {
            "MASTER_PORT": port(look.job),
            "PET_MASTER_PORT": port(look.job),
            "MASTER_ADDR": address,
            "PET_MASTER_ADDR": address,
            "WORLD_SIZE": str(look.total * (int(processes) if processes.isdigit() else 1)),
            "RANK": rank,
            "PET_NODE_RANK": rank,
        }
    if "Master" in look.replicas or look.release.sets_processes:
        env["PET_NPROC_PER_NODE"] = processes
    env["PET_NNODES"] = str(look.total)
    return [{"name": name, "value": value} for name, value in env.items()]


def crd() -> Object:
    """The CRD, which checks everything except policies and pod templates."""
    number, policy = {"type": "integer", "minimum": 0}, {"type": "string", "enum": ["OnFailure", "Never", "ExitCode"]}
    replica = struct(required=["template"], replicas=number, restartPolicy=policy, template=LOOSE)
    spec = struct(
        required=["pytorchReplicaSpecs"],
        nprocPerNode={"type": "string"},
        runPolicy=LOOSE,
        pytorchReplicaSpecs=struct(required=[], Master=replica, Worker=replica),
    )
    return definition(PYTORCHJOB, spec)
