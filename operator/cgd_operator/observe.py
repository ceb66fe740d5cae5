"""What has become of each child, read from Jobs, PyTorchJobs, TrainJobs and their pods. Pure: objects in, facts out."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from pydantic import ValidationError

from cgd_operator.manifests import GIVEN_UP, REPLICA_INDEX, REPLICA_TYPE, STAGE_LABEL
from cgd_operator.queues import JOB_UID_LABEL, QUEUE_LABEL, SUSPENDED_BY_RUN, Workload, workload
from cgd_stages.contract import LastWords

Object = dict[str, Any]

RESTARTS = "jobset.sigs.k8s.io/restart-attempt"
"""Label of a JobSet's pods."""


class Fate(Enum):
    ABSENT = "absent"
    WAITING = "waiting"
    """It exists, but no pod of it runs."""
    RUNNING = "running"
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LEAVING = "leaving"
    """It is being deleted."""


@dataclass(frozen=True)
class PodFacts:
    name: str
    uid: str
    shard: int
    """Which of its child's pods it is: its number."""
    phase: str
    restarts: int
    """How often a JobSet had begun all of its pods anew when it made this one."""
    leaving: bool
    """It is being deleted."""
    disrupted: bool
    """The cluster wanted its place, or lost it: no failure of its own."""
    taken: datetime | None
    """When a node took it: from then on its GPUs are its own."""
    start: datetime | None
    end: datetime | None
    exit_code: int | None
    trouble: str
    """Why it waits, or how it ended: the kubelet's reason and message."""
    words: LastWords | None
    tail: str
    """The termination message when it is not ours: the last lines of the log."""


@dataclass(frozen=True)
class ChildFacts:
    name: str
    stage: str
    kind: str
    fate: Fate
    reason: str = ""
    message: str = ""
    suspended: bool = False
    held: bool = False
    """Suspended by the operator, not by a queue."""
    given_up: str = ""
    """Why the operator has ended it."""
    start: datetime | None = None
    end: datetime | None = None
    attempts: int = 0
    pods: tuple[PodFacts, ...] = ()
    workload: Workload | None = None
    """What Kueue has for it; None: Kueue has no part in it."""


def queued(children: Iterable[Object]) -> tuple[str, ...]:
    """The uids of the children that Kueue may have a Workload for: not ended, and in a queue or suspended by somebody
    else (Kueue may queue what names no queue)."""
    return tuple(child["metadata"]["uid"] for child in children if _may_be_queued(child))


def _may_be_queued(child: Object) -> bool:
    facts = _child(child, (), None)
    stopped_by_others = facts.fate is Fate.SUSPENDED and not facts.held
    named = QUEUE_LABEL in child["metadata"].get("labels", {})
    return stopped_by_others or (named and facts.fate in (Fate.SUSPENDED, Fate.WAITING))


ENDS = frozenset({"Complete", "Succeeded", "Failed"})
"""Types of the conditions with which Jobs, PyTorchJobs and TrainJobs end."""


def has_ended(child: Mapping[str, Any]) -> bool:
    conditions = child.get("status", {}).get("conditions", [])
    return any(one["type"] in ENDS and one["status"] == "True" for one in conditions)


def observe(
    children: Iterable[Object], pods: Iterable[Object], workloads: Iterable[Object] = ()
) -> dict[str, ChildFacts]:
    """The facts of every child there is, by its stage. Of two children of one stage the one that stays counts."""
    by_owner = {one["metadata"]["labels"][JOB_UID_LABEL]: workload(one) for one in workloads}
    by_stage: dict[str, list[PodFacts]] = {}
    for pod in pods:
        by_stage.setdefault(_stage(pod), []).append(_pod(pod))
    facts: dict[str, ChildFacts] = {}
    for child in sorted(children, key=lambda one: "deletionTimestamp" not in one["metadata"]):
        own = sorted(by_stage.get(_stage(child), []), key=_age)
        facts[_stage(child)] = _child(child, tuple(own), by_owner.get(child["metadata"].get("uid", "")))
    return facts


def _stage(thing: Object) -> str:
    return str(thing["metadata"].get("labels", {}).get(STAGE_LABEL, ""))


def _age(pod: PodFacts) -> tuple[float, str]:
    return (pod.start.timestamp() if pod.start else float("inf"), pod.name)


def _child(child: Object, pods: tuple[PodFacts, ...], queue: Workload | None) -> ChildFacts:
    meta, spec, status = child["metadata"], child.get("spec", {}), child.get("status", {})
    fate, reason, message = _fate(meta, spec, status, pods, queue)
    notes = meta.get("annotations", {})
    return ChildFacts(
        name=meta["name"],
        stage=_stage(child),
        kind=child["kind"],
        fate=fate,
        reason=reason,
        message=message,
        suspended=_is_suspended(spec),
        held=SUSPENDED_BY_RUN in notes,
        given_up=notes.get(GIVEN_UP, ""),
        start=_time(status.get("startTime")) or min((pod.start for pod in pods if pod.start), default=None),
        end=_end(status, pods) if fate in (Fate.SUCCEEDED, Fate.FAILED) else None,
        attempts=_attempts(pods),
        pods=pods,
        workload=queue,
    )


def _fate(
    meta: Object, spec: Object, status: Object, pods: tuple[PodFacts, ...], queue: Workload | None
) -> tuple[Fate, str, str]:
    true = {one["type"]: one for one in status.get("conditions", []) if one["status"] == "True"}
    if "deletionTimestamp" in meta:
        return Fate.LEAVING, "Deleted", "is being deleted"
    if "Complete" in true or "Succeeded" in true:
        return Fate.SUCCEEDED, "", ""
    if "Failed" in true:
        if why := meta.get("annotations", {}).get(GIVEN_UP):
            return Fate.FAILED, "GivenUp", why
        return Fate.FAILED, *_failure(true["Failed"], pods)
    if _is_suspended(spec):
        return _suspended(meta, queue)
    if any(pod.phase == "Running" for pod in pods):
        return Fate.RUNNING, "", _retrying(pods)
    return Fate.WAITING, *_waiting(pods)


def _is_suspended(spec: Object) -> bool:
    return bool(spec.get("suspend") or spec.get("runPolicy", {}).get("suspend"))


def _suspended(meta: Object, queue: Workload | None) -> tuple[Fate, str, str]:
    if queue is None or queue.held or SUSPENDED_BY_RUN in meta.get("annotations", {}):
        return Fate.SUSPENDED, "Suspended", ""
    return Fate.WAITING if queue.active else Fate.SUSPENDED, queue.reason, queue.message


def _failure(condition: Object, pods: tuple[PodFacts, ...]) -> tuple[str, str]:
    failed = [pod for pod in pods if pod.phase == "Failed" or (pod.exit_code or 0) > 0]
    reason = str(condition.get("reason") or "Failed")
    if not failed:
        return reason, str(condition.get("message") or "failed; its pods are gone")
    permanent = [pod for pod in failed if pod.words and pod.words.outcome == "failed" and pod.exit_code == 3]
    telling = [pod for pod in failed if pod.words or pod.tail]
    return reason, account((permanent or telling or failed)[-1])


def account(pod: PodFacts) -> str:
    """How a pod ended, for people: where, exit code, what it said and what to change."""
    parts = [f"pod {pod.name}"]
    if pod.exit_code is not None:
        parts.append(f"exit code {pod.exit_code}")
    if pod.words and pod.words.message:
        parts.append(" ".join(filter(None, [_sentence(pod.words.message), pod.words.hint])))
    else:
        parts.extend(filter(None, [pod.trouble, pod.tail.strip().rpartition("\n")[2]]))
    return ": ".join(parts)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", ":")) else text + "."


def _retrying(pods: tuple[PodFacts, ...]) -> str:
    failed = [pod for pod in pods if pod.phase == "Failed"]
    return f"trying again after {account(failed[-1])}" if failed else ""


def _waiting(pods: tuple[PodFacts, ...]) -> tuple[str, str]:
    for pod in pods:
        if pod.phase == "Pending" and pod.trouble:
            reason, _, _ = pod.trouble.partition(":")
            return reason, f"pod {pod.name}: {pod.trouble}"
    if any(pod.phase == "Pending" for pod in pods):
        return "Starting", "the pod is being started"
    if trouble := _retrying(pods):
        return "Retrying", trouble
    return "NoPods", "its controller has made no pod yet"


def _attempts(pods: tuple[PodFacts, ...]) -> int:
    begun = Counter((pod.shard, pod.restarts) for pod in pods)
    return max((restarts + count for (_, restarts), count in begun.items()), default=0)


def _end(status: Object, pods: tuple[PodFacts, ...]) -> datetime | None:
    ends = [pod.end for pod in pods if pod.end]
    conditions = [_time(one.get("lastTransitionTime")) for one in status.get("conditions", [])]
    return _time(status.get("completionTime")) or max(ends, default=None) or max(filter(None, conditions), default=None)


def _pod(pod: Object) -> PodFacts:
    meta, status = pod["metadata"], pod.get("status", {})
    states = [one.get("state", {}) for one in status.get("containerStatuses", [])]
    conditions = status.get("conditions", [])
    ended: Object = next((state["terminated"] for state in states if "terminated" in state), {})
    words = _words(ended.get("message", ""))
    return PodFacts(
        name=meta["name"],
        uid=meta["uid"],
        shard=_shard(meta),
        phase=status.get("phase", "Pending"),
        restarts=int(meta.get("labels", {}).get(RESTARTS, 0)),
        leaving="deletionTimestamp" in meta,
        disrupted=any(one["type"] == "DisruptionTarget" and one["status"] == "True" for one in conditions),
        taken=_time(status.get("startTime")),
        start=_time(ended.get("startedAt")) or _time(status.get("startTime")),
        end=_time(ended.get("finishedAt")) or _given_up(status),
        exit_code=ended.get("exitCode"),
        trouble=_trouble(status, states, ended),
        words=words,
        tail="" if words else ended.get("message", ""),
    )


def _given_up(status: Object) -> datetime | None:
    """When a pod ended that has no word of its container: evicted, or on a node that was lost."""
    if status.get("phase") not in ("Succeeded", "Failed"):
        return None
    moments = [_time(one.get("lastTransitionTime")) for one in status.get("conditions", [])]
    return max(filter(None, moments), default=None)


def _shard(meta: Object) -> int:
    labels, notes = meta.get("labels", {}), meta.get("annotations", {})
    if (index := notes.get("batch.kubernetes.io/job-completion-index")) is not None:
        return int(index)
    if labels.get(REPLICA_TYPE) == "master":  # of a PyTorchJob that an older operator has made
        return -1
    return int(labels.get(REPLICA_INDEX, 0))


def _trouble(status: Object, states: list[Object], ended: Object) -> str:
    if status.get("reason"):  # Evicted, NodeLost, ...
        return _colon(status["reason"], status.get("message"))
    for state in states:
        waiting = state.get("waiting", {})
        if waiting.get("reason", "ContainerCreating") not in ("ContainerCreating", "PodInitializing"):
            return _colon(waiting["reason"], waiting.get("message"))
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _colon(condition.get("reason", ""), condition.get("message"))
    reason = ended.get("reason", "")
    return "" if reason in ("Error", "Completed") else str(reason)


def _colon(reason: str, message: str | None) -> str:
    return f"{reason}: {message}" if message else reason


def _words(message: str) -> LastWords | None:
    if not message.startswith("{"):
        return None
    try:
        return LastWords.model_validate_json(message)
    except ValidationError:  # a log line that looks like JSON: shown as it is
        return None


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text).astimezone(UTC) if text else None
