"""The state of each pod: objects in, facts out. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from cgd_operator.kube.outside import last_words, moment, number, with_message
from cgd_operator.planning.manifests import CONTAINERS, POOL_LABEL, REPLICA_INDEX, REPLICA_TYPE, STAGE_LABEL
from cgd_stages.contract import LastWords

Object = dict[str, Any]

RESTARTS = "jobset.sigs.k8s.io/restart-attempt"
"""Label of a JobSet's pods."""
FAILURES = ("batch.kubernetes.io/job-index-failure-count", "batch.kubernetes.io/job-index-ignored-failure-count")
"""Annotations with which a Job counts the failures of an index on its next pod."""
LONG_AGO = datetime.min.replace(tzinfo=UTC)
LOST = "Lost"
"""The phase of a pod that its node should have ended by now: the node is lost. Kubernetes still calls it running."""
LOST_AFTER = timedelta(minutes=1)
"""The time that a healthy node may need to end a pod after its grace period."""
KEPT_AFTER = timedelta(seconds=30)
"""The time that other containers of a pod may need to end after ours."""
OURS = frozenset(CONTAINERS.values())
OUT_OF_MEMORY, EVICTED = "OOMKilled", "Evicted"


@dataclass(frozen=True)
class PodFacts:
    name: str
    uid: str
    owner: str
    """The uid of the object that created it."""
    shard: int
    """Its number among the pods of its child."""
    phase: str
    """Kubernetes's, or LOST."""
    restarts: int
    """How often the JobSet had restarted all its pods when it created this pod."""
    failures: int
    """How often its index has failed, by the Job's count, which includes deleted pods."""
    due: datetime | None
    """When its grace period ends, if it is being deleted."""
    disruption: str
    """Why the cluster ends it (preemption, eviction, lost node): no failure of the program. Empty: it does not."""
    evicted: bool
    """Whether its kubelet ended it for what it has used itself, such as more of a volume than its limit. Kubernetes
    calls that no disruption."""
    taken: datetime | None
    """When a node accepted it: from then on it holds its GPUs."""
    start: datetime | None
    end: datetime | None
    exit_code: int | None
    node: str
    trouble: str
    """Why it waits or cannot end, or how it ended: reason and message."""
    troubled: datetime | None
    """Since when."""
    words: LastWords | None
    tail: str
    """A termination message that is not in our format: the last lines of the log."""

    @property
    def disrupted(self) -> bool:
        return bool(self.disruption)

    @property
    def failed(self) -> bool:
        return self.phase == "Failed" or (self.exit_code or 0) > 0


@dataclass(frozen=True)
class Gone:
    """A deleted pod in its last known state."""

    stage: str
    pod: PodFacts


def stage_of(item: Object) -> str:
    """The stage of a child, or of one of its pods."""
    return str(item["metadata"].get("labels", {}).get(STAGE_LABEL, ""))


def owners(pods: Iterable[Object], stage: str) -> list[str]:
    """The names of the Jobs that have made a stage's pods."""
    of_stage = [pod["metadata"] for pod in pods if stage_of(pod) == stage]
    found = [owner for meta in of_stage for owner in meta.get("ownerReferences", []) if owner.get("controller")]
    return sorted({owner["name"] for owner in found if owner["kind"] == "Job"})


def pods_by_stage(pods: Iterable[Object], gone: Iterable[Gone], now: datetime) -> dict[str, tuple[PodFacts, ...]]:
    """All existing and recently deleted pods by stage, also those whose child is gone."""
    stages: dict[str, tuple[PodFacts, ...]] = {}
    for pod in (*(Gone(stage_of(pod), pod_facts(pod, now)) for pod in pods), *gone):
        stages[pod.stage] = (*stages.get(pod.stage, ()), pod.pod)
    return stages


def last_state(pod: Object, now: datetime) -> Gone:
    """The last state of a pod that was just deleted. It ended with its container, or else now or when its grace period
    ended."""
    facts = pod_facts(pod, LONG_AGO)
    end = facts.end or min(filter(None, (now, facts.due)))
    phase = "Succeeded" if facts.phase == "Succeeded" else "Failed"
    return Gone(stage_of(pod), replace(facts, end=end, phase=phase))


def account(pod: PodFacts) -> str:
    """How a pod ended, for people: its name, exit code, last words and hint."""
    code = "" if pod.exit_code is None else f"exit code {pod.exit_code}"
    said = pod.tail.strip().rpartition("\n")[2]
    if pod.words and (message := pod.words.message):
        sentence = message if message.endswith((".", "!", "?", ":")) else f"{message}."
        said = f"{sentence} {pod.words.hint}" if pod.words.hint else sentence
    return ": ".join(filter(None, [f"pod {pod.name}", code, pod.trouble, said]))


def pod_facts(pod: Object, now: datetime) -> PodFacts:
    meta, status = pod["metadata"], pod.get("status", {})
    phase, due = status.get("phase", "Pending"), moment(meta.get("deletionTimestamp"))
    node = str(pod.get("spec", {}).get("nodeName", ""))
    containers = {container["name"]: container.get("state", {}) for container in status.get("containerStatuses", [])}
    ended: Object = next((state.get("terminated", {}) for name, state in containers.items() if name in OURS), {})
    words, since = last_words(ended.get("message", "")), moment(ended.get("finishedAt"))
    if due and node and phase in ("Pending", "Running") and now > due + LOST_AFTER:
        phase, trouble, since = LOST, f"NodeLost: {_lost(node, due)}", due
    else:
        trouble = _kept(containers, ended, now) or _trouble(pod, status, containers, ended)
    return PodFacts(
        name=meta["name"],
        uid=meta["uid"],
        owner=next((owner["uid"] for owner in meta.get("ownerReferences", []) if owner.get("controller")), ""),
        shard=_shard(meta),
        phase=phase,
        due=due,
        restarts=number(meta.get("labels", {}).get(RESTARTS)),
        failures=sum(number(meta.get("annotations", {}).get(name)) for name in FAILURES),
        disruption=_disruption(status),
        evicted=status.get("reason") == EVICTED and not _disruption(status),
        taken=moment(status.get("startTime")),
        start=moment(ended.get("startedAt")) or moment(status.get("startTime")),
        end=_end(phase, status, due),
        exit_code=ended.get("exitCode"),
        node=node,
        trouble=trouble,
        troubled=since or moment(status.get("startTime")),
        words=words,
        tail="" if words or ended.get("reason") == OUT_OF_MEMORY else ended.get("message", ""),
    )


def _shard(meta: Object) -> int:
    labels, notes = meta.get("labels", {}), meta.get("annotations", {})
    if (index := notes.get("batch.kubernetes.io/job-completion-index")) is not None:
        return number(index)
    if labels.get(REPLICA_TYPE) == "master":  # of a PyTorchJob that an older operator has made
        return -1
    return number(labels.get(REPLICA_INDEX))


def _disruption(status: Object) -> str:
    """Reason and message with which the cluster says that it ends a pod; empty if it does not."""
    for condition in status.get("conditions", []):
        if (condition["type"], condition["status"]) == ("DisruptionTarget", "True"):
            return with_message(condition.get("reason") or "DisruptionTarget", condition.get("message"))
    return ""


def _end(phase: str, status: Object, due: datetime | None) -> datetime | None:
    """When the last container of a pod that is over ended. If its status has no such time: when the pod was given up,
    which its node, if it had one, did by the end of the grace period."""
    if phase == LOST:
        return due
    if phase not in ("Succeeded", "Failed"):
        return None
    containers = status.get("containerStatuses", [])
    ends = [moment(container.get("state", {}).get("terminated", {}).get("finishedAt")) for container in containers]
    if any(ends):
        return max(filter(None, ends))
    if due and not _disruption(status):  # deleted before it began: no time in its status is that of its end
        return None
    changes = [moment(condition.get("lastTransitionTime")) for condition in status.get("conditions", [])]
    given_up = max(filter(None, changes), default=None)
    return min(filter(None, (given_up, due)), default=None)


def _lost(node: str, due: datetime) -> str:
    return (
        f"its node {node} should have stopped it by {due:%Y-%m-%dT%H:%M:%SZ} and has not; the stage waits for it. "
        "Bring the node back. If the machine is certainly off, ask an admin to run `kubectl taint nodes "
        f"{node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute` or to delete the Node; or set "
        "spec.replaceLostPodsAfterSeconds in the run"
    )


def _kept(containers: Mapping[str, Object], ended: Object, now: datetime) -> str:
    """Which other container keeps a pod from its end after ours has ended; empty if none does."""
    end = moment(ended.get("finishedAt"))
    others = [name for name, state in containers.items() if "running" in state and name not in OURS]
    if end is None or now - end < KEPT_AFTER or not others:
        return ""
    return (
        f"SidecarRuns: the stage has ended (exit code {ended['exitCode']}), but container {others[0]} still runs, "
        "so the pod cannot end: stop that container. In new runs let its injector add it as a native sidecar (an init "
        "container with restartPolicy: Always), or switch the injection off in spec.podMetadata"
    )


def _ended_by_others(status: Object, ended: Object) -> str:
    """What has made a pod fail if it was not our container: the cluster, a container that must end well before ours, or
    one beside ours."""
    if cause := _disruption(status):
        return cause
    if ended.get("exitCode"):
        return ""
    for sort, group in (("init container", "initContainerStatuses"), ("container", "containerStatuses")):
        for container in status.get(group, []):
            end = container.get("state", {}).get("terminated", {})
            if end.get("exitCode") and container["name"] not in OURS:
                last = end.get("message", "").strip().rpartition("\n")[2]
                why = f"{sort} {container['name']}, which is not the operator's, ended with exit code {end['exitCode']}"
                return f"ContainerFailed: {with_message(why, last)}"
    return ""


def _trouble(pod: Object, status: Object, containers: Mapping[str, Object], ended: Object) -> str:
    """What the pod, a container or the scheduler complains of, or how our container ended."""
    if status.get("reason"):  # Evicted, NodeLost, ...
        return with_message(status["reason"], status.get("message"))
    if status.get("phase") == "Failed" and (others := _ended_by_others(status, ended)):
        return others
    first = [container.get("state", {}) for container in status.get("initContainerStatuses", [])]
    for state in (*first, *containers.values()):
        waiting = state.get("waiting", {})
        if waiting.get("reason", "ContainerCreating") not in ("ContainerCreating", "PodInitializing"):
            return with_message(waiting["reason"], waiting.get("message"))
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return with_message(condition.get("reason", ""), condition.get("message"))
    reason = str(ended.get("reason", ""))
    if reason != OUT_OF_MEMORY:
        return "" if reason in ("Error", "Completed") else reason
    specs = pod["spec"].get("containers", [])
    ours: Object = next((container for container in specs if container["name"] in OURS), {})
    limit = ours.get("resources", {}).get("limits", {}).get("memory")
    where = f"spec.placement.{pod['metadata']['labels'].get(POOL_LABEL, '<pool>')}.resources"
    why = f"its memory reached the limit of {limit}; raise {where}.limits.memory"
    if not limit:
        why = f"the node had no more memory, and the pod has no limit; set {where}.requests.memory to its need"
    return f"{reason}: {why} in a new run, which goes on from what is stored"
