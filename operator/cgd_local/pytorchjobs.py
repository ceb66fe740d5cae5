"""The PyTorchJob controller (`kubeflow.org/v1`) with the semantics of Training Operator 1.9, and its CRD. Pure.

Pods, labels, environment, conditions and reasons are those of the real operator. Deviations:

- One machine: MASTER_ADDR is the master's pod name as usual, which the node turns into 127.0.0.1; MASTER_PORT is
  derived from the job's uid, whatever port the spec names, so that two jobs do not meet.
- `runPolicy.backoffLimit` counts container restarts and pods created again (`status.restarts` remembers them); the real
  operator loses count of the latter.
- Left out: Services (nothing resolves names here), the workers' init container that waits for the master's name, jobs
  without a master, elasticPolicy, gang scheduling.
"""

from copy import deepcopy

from cgd_local.controllers import (
    Decision,
    condition,
    container_of,
    end_of,
    is_active,
    is_leaving,
    now,
    phase,
    pod_of,
    set_condition,
    with_env,
)
from cgd_local.kubeflow import LOOSE, definition, port, struct
from cgd_operator.cluster import PYTORCHJOB, Object

LABEL = "training.kubeflow.org/"
UNKNOWN_EXIT = 48879  # what the real operator assumes for a pod that failed without an exit code: retryable


class Look:
    """One look at a job: what is there, and the decision as it grows."""

    def __init__(self, job: Object, pods: list[Object]) -> None:
        self.job, self.pods, self.name = job, pods, job["metadata"]["name"]
        self.policy: Object = job["spec"].get("runPolicy") or {}
        self.replicas: dict[str, Object] = job["spec"]["pytorchReplicaSpecs"]
        self.status: Object = {"restarts": 0, "conditions": [], **deepcopy(job.get("status") or {})}
        self.conditions: list[Object] = self.status["conditions"]
        self.decision = Decision(self.status)

    @property
    def ended(self) -> Object | None:
        return condition(self.conditions, "Succeeded") or condition(self.conditions, "Failed")

    def say(self, kind: str, message: str, *, status: str = "True", reason: str = "") -> None:
        """Set a condition with the real operator's reason; an Event goes with each change."""
        reason, message = f"PyTorchJob{reason or kind}", f"PyTorchJob {self.name} {message}"
        other = {"Running": "Restarting", "Restarting": "Running"}.get(kind)
        self.conditions[:] = [c for c in self.conditions if c["type"] != other]
        if kind in ("Succeeded", "Failed", "Suspended") and condition(self.conditions, "Running"):
            set_condition(self.conditions, "Running", "False", reason, message)
        if set_condition(self.conditions, kind, status, reason, message):
            severity = "Warning" if kind in ("Failed", "Restarting") else "Normal"
            self.decision.events.append((severity, reason, message))

    def pods_of(self, kind: str) -> dict[int, Object]:
        mine = [pod for pod in self.pods if pod["metadata"]["labels"][LABEL + "replica-type"] == kind.lower()]
        return {int(pod["metadata"]["labels"][LABEL + "replica-index"]): pod for pod in mine}

    def counts(self, kind: str) -> dict[str, int]:
        phases = [phase(pod) for pod in self.pods_of(kind).values()]
        words = {"active": "Running", "succeeded": "Succeeded", "failed": "Failed"}
        return {name: phases.count(word) for name, word in words.items()}


def decide(job: Object, pods: list[Object], time_now: float) -> Decision:
    """What is to be done for a PyTorchJob."""
    look = Look(job, pods)
    if not look.conditions:
        look.say("Created", "is created.")
    if look.ended:
        if look.policy.get("cleanPodPolicy") == "Running":
            look.decision.delete = [pod for pod in pods if is_active(pod)]
        look.decision.expire(look.ended, look.policy.get("ttlSecondsAfterFinished"), time_now)
    elif look.policy.get("suspend"):
        look.decision.delete = [pod for pod in pods if not is_leaving(pod)]
        look.say("Suspended", "is suspended.")
    else:
        _advance(look)
    look.status["replicaStatuses"] = {kind: look.counts(kind) for kind in look.replicas}
    return look.decision


def _advance(look: Look) -> None:
    if condition(look.conditions, "Suspended"):
        look.say("Suspended", "is resumed.", status="False", reason="Resumed")
        look.status["startTime"] = now()
    look.status.setdefault("startTime", now())
    for kind, spec in look.replicas.items():
        pods, wanted = look.pods_of(kind), range(spec.get("replicas", 1))
        look.decision.create += [_pod(look, kind, index) for index in wanted if index not in pods]
        for pod in pods.values():
            if phase(pod) == "Failed" and not is_leaving(pod):
                _replace(look, kind, pod)
    _conclude(look)


def _replace(look: Look, kind: str, pod: Object) -> None:
    """Delete a failed pod to have it created again, or give the job up, as the restart policy says."""
    code = end_of(container_of(pod)).get("exitCode", UNKNOWN_EXIT)
    policy, name = look.replicas[kind].get("restartPolicy", "OnFailure"), pod["metadata"]["name"]
    look.decision.events.append(("Normal", "ExitedWithCode", f"Pod: {name} exited with code {code}"))
    if policy == "Never" or (policy == "ExitCode" and code < 128):
        look.say("Failed", f"is failed because {look.counts(kind)['failed']} {kind} replica(s) failed.")
    else:
        look.decision.delete.append(pod)
        look.status["restarts"] += 1
        look.say("Restarting", f"is restarting because {kind} replica(s) failed.")


def _conclude(look: Look) -> None:
    limit, master = look.policy.get("backoffLimit"), look.counts("Master")
    restarts = look.status["restarts"] + sum(container_of(pod).get("restartCount", 0) for pod in look.pods)
    if not look.ended and limit is not None and restarts > limit:
        look.say("Failed", "has failed because it has reached the specified backoff limit")
    elif not look.ended and master["succeeded"]:
        look.say("Succeeded", "is successfully completed.")
    elif not look.ended and master["active"] and not look.decision.delete:
        look.say("Running", "is running.")
    if look.ended:
        look.decision.create = []
        look.status["completionTime"] = now()


def _pod(look: Look, kind: str, index: int) -> Object:
    spec = look.replicas[kind]
    policy = spec.get("restartPolicy", "OnFailure")
    template = with_env(spec["template"], _environment(look, kind, index))
    template["spec"]["restartPolicy"] = "Never" if policy == "ExitCode" else policy
    labels = {
        "job-name": look.name,
        "operator-name": "pytorchjob-controller",
        "replica-type": kind.lower(),
        "replica-index": str(index),
    } | ({"job-role": "master"} if kind == "Master" else {})
    labels = {LABEL + key: value for key, value in labels.items()}
    return pod_of(PYTORCHJOB, look.job, template, f"{look.name}-{kind.lower()}-{index}", labels, {})


def _environment(look: Look, kind: str, index: int) -> list[Object]:
    """What Training Operator 1.9 injects. RANK is the rank of the node (pod), WORLD_SIZE counts processes."""
    nodes = sum(spec.get("replicas", 1) for spec in look.replicas.values())
    processes = look.job["spec"].get("nprocPerNode", "auto")
    meeting = port(look.job)
    address, rank = f"{look.name}-master-0", str(index + (kind == "Worker"))
    env = {
        "PYTHONUNBUFFERED": "1",
        "MASTER_PORT": meeting,
        "PET_MASTER_PORT": meeting,
        "MASTER_ADDR": address,
        "PET_MASTER_ADDR": address,
        "WORLD_SIZE": str(nodes * (int(processes) if processes.isdigit() else 1)),
        "RANK": rank,
        "PET_NODE_RANK": rank,
        "PET_NPROC_PER_NODE": processes,
        "PET_NNODES": str(nodes),
    }
    return [{"name": name, "value": value} for name, value in env.items()]


def crd() -> Object:
    """Policies and pod templates are taken as they come, the rest is checked."""
    count, policy = {"type": "integer", "minimum": 0}, {"type": "string", "enum": ["OnFailure", "Never", "ExitCode"]}
    replica = struct(required=["template"], replicas=count, restartPolicy=policy, template=LOOSE)
    replicas = struct(required=["Master"], Master=replica, Worker=replica)
    spec = struct(
        required=["pytorchReplicaSpecs"],
        nprocPerNode={"type": "string"},
        runPolicy=LOOSE,
        pytorchReplicaSpecs=replicas,
    )
    return definition(PYTORCHJOB, spec)
