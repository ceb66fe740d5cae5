"""What has become of each child, read from Jobs, PyTorchJobs, TrainJobs and their pods. Pure: objects in, facts out."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

from pydantic import ValidationError

from cgd_operator.manifests import STAGE_LABEL
from cgd_operator.queues import JOB_UID_LABEL, QUEUE_LABEL, SUSPENDED_BY_RUN, Workload, workload
from cgd_operator.refusals import explain, judge
from cgd_stages.contract import LastWords

Object = dict[str, Any]

LONG_AGO = datetime.min.replace(tzinfo=UTC)
QUIET = timedelta(seconds=10)
"""What a child without its pods, or a pod without its container, may take before its Events are asked why."""
SILENT = timedelta(minutes=1)
"""What a controller may take to make a pod, or to say why it cannot."""
FRESH = timedelta(minutes=20)
"""Controllers try again, and say so, more often than this: an older Event is of another time."""

BEGINNING = ("NoPods", "Starting")
"""Reasons to wait that every stage has for some seconds."""
MENDED_BY_PEOPLE = frozenset({
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "SignatureValidationFailed",
    "CreateContainerConfigError", "CreateContainerError", "RunContainerError", "FailedMount",
})  # fmt: skip
"""The kubelet's reasons that nothing but a person ends."""
VOICES = {"Job": ("Job",), "PyTorchJob": ("PyTorchJob",), "TrainJob": ("TrainJob", "JobSet", "Job")}
"""By a child's kind, the kinds on which a controller says why there is no pod. A TrainJob's JobSet has its name, the
JobSet's Job that name and `-node-0`."""
MUTE = ("FailedMount", "FailedCreatePodSandBox")
"""What the kubelet tells in Events of a pod and nowhere else."""
MAKERS = {
    "Job": "kube-controller-manager runs",
    "PyTorchJob": "the Kubeflow Training Operator runs",
    "TrainJob": "Kubeflow Trainer and JobSet run",
}
"""Who makes the pods of each kind."""


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
    phase: str
    leaving: bool
    """It is being deleted."""
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
    stuck: datetime | None = None
    """Since when it has waited for something that a person must mend; None: it does not."""
    held: bool = False
    """Suspended by the operator, not by a queue."""
    start: datetime | None = None
    end: datetime | None = None
    attempts: int = 0
    pods: tuple[PodFacts, ...] = ()
    workload: Workload | None = None
    """What Kueue has for it; None: Kueue has no part in it."""


@dataclass(frozen=True)
class Notice:
    """What a controller or the kubelet has said in an Event of something that it cannot do."""

    about: str
    """Name of the object."""
    kind: str
    reason: str
    message: str
    first: datetime
    last: datetime

    @property
    def tells_of_creation(self) -> bool:
        """`FailedCreate`, `FailedCreatePod`, `JobCreationFailed`, ...; not that a controller restarts something."""
        return "FailedCreate" in self.reason or "CreationFailed" in self.reason


@dataclass(frozen=True)
class Why:
    """Why a child is not at work, or not with all of its pods."""

    reason: str = ""
    message: str = ""
    stuck: datetime | None = None


def queued(children: Iterable[Object]) -> tuple[str, ...]:
    """The uids of the children that Kueue may have a Workload for: not ended, and in a queue or suspended by somebody
    else (Kueue may queue what names no queue)."""
    return tuple(child["metadata"]["uid"] for child in children if _may_be_queued(child))


def _may_be_queued(child: Object) -> bool:
    facts = _child(child, (), None, (), LONG_AGO)
    stopped_by_others = facts.fate is Fate.SUSPENDED and not facts.held
    named = QUEUE_LABEL in child["metadata"].get("labels", {})
    return stopped_by_others or (named and facts.fate in (Fate.SUSPENDED, Fate.WAITING))


ENDS = frozenset({"Complete", "Succeeded", "Failed"})
"""Types of the conditions with which Jobs, PyTorchJobs and TrainJobs end."""


def has_ended(child: Mapping[str, Any]) -> bool:
    conditions = child.get("status", {}).get("conditions", [])
    return any(one["type"] in ENDS and one["status"] == "True" for one in conditions)


def observe(
    children: Iterable[Object],
    pods: Iterable[Object],
    workloads: Iterable[Object] = (),
    events: Iterable[Object] = (),
    now: datetime = LONG_AGO,
) -> dict[str, ChildFacts]:
    """The facts of every child there is, by its stage. Of two children of one stage the one that stays counts.

    `events` are Warnings about the children, what their controllers make of them, and their pods. By `now` is judged
    what takes too long; without it nothing does.
    """
    by_owner = {one["metadata"]["labels"][JOB_UID_LABEL]: workload(one, now) for one in workloads}
    notices = tuple(_notice(one) for one in events)
    by_stage: dict[str, list[PodFacts]] = {}
    for pod in pods:
        by_stage.setdefault(_stage(pod), []).append(_noticed(_pod(pod), notices))
    facts: dict[str, ChildFacts] = {}
    for child in sorted(children, key=lambda one: "deletionTimestamp" not in one["metadata"]):
        own = sorted(by_stage.get(_stage(child), []), key=_age)
        queue = by_owner.get(child["metadata"].get("uid", ""))
        facts[_stage(child)] = _child(child, tuple(own), queue, notices, now)
    return facts


def unexplained(children: Iterable[Object], pods: Collection[Object], now: datetime) -> Iterator[tuple[str, str]]:
    """Where Events may say what nothing else says, as namespace and field selector: why a child lacks a pod, and why
    one that has a node has no container, when that has lasted some seconds."""
    for child in children:
        if has_ended(child):
            continue
        namespace = child["metadata"]["namespace"]
        own = tuple(_pod(pod) for pod in pods if _stage(pod) == _stage(child))
        if any(_is_mute(pod) and now - (pod.taken or now) > QUIET for pod in own):
            for reason in MUTE:
                yield namespace, f"involvedObject.kind=Pod,reason={reason}"
        going = _child(child, own, None, (), LONG_AGO).fate in (Fate.WAITING, Fate.RUNNING)
        if going and _live(own) < _due(child, own) and now - _since(child, own) > QUIET:
            for kind in VOICES[child["kind"]]:
                yield namespace, f"involvedObject.kind={kind},type=Warning"


def _notice(event: Object) -> Notice:
    """From an Event of either kind of recorder: one tells first and last time, the other a time and a series."""
    about, series = event["involvedObject"], event.get("series") or {}
    first = event.get("firstTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
    last = series.get("lastObservedTime") or event.get("lastTimestamp") or first
    message = str(event.get("message", ""))
    moments = [one for one in (_time(first), _time(last)) if one]
    return Notice(about.get("name", ""), about.get("kind", ""), event.get("reason", ""), message, *moments)


def _is_mute(pod: PodFacts) -> bool:
    """It has a node and no container, and its status does not say why."""
    return pod.phase == "Pending" and not pod.leaving and not pod.trouble and pod.taken is not None


def _noticed(pod: PodFacts, notices: tuple[Notice, ...]) -> PodFacts:
    """With what the kubelet tells in Events alone, such as a volume's missing Secret."""
    own = [one for one in notices if (one.kind, one.about) == ("Pod", pod.name)]
    if not own or not _is_mute(pod):
        return pod
    last = max(own, key=lambda one: one.last)
    return replace(pod, trouble=_colon(last.reason, last.message))


def _stage(thing: Object) -> str:
    return str(thing["metadata"].get("labels", {}).get(STAGE_LABEL, ""))


def _age(pod: PodFacts) -> tuple[float, str]:
    return (pod.start.timestamp() if pod.start else float("inf"), pod.name)


def _child(
    child: Object,
    pods: tuple[PodFacts, ...],
    queue: Workload | None,
    notices: tuple[Notice, ...],
    now: datetime,
) -> ChildFacts:
    meta, status = child["metadata"], child.get("status", {})
    fate, why = _fate(child, pods, queue, notices, now)
    return ChildFacts(
        name=meta["name"],
        stage=_stage(child),
        kind=child["kind"],
        fate=fate,
        reason=why.reason,
        message=why.message,
        stuck=why.stuck,
        held=SUSPENDED_BY_RUN in meta.get("annotations", {}),
        start=_time(status.get("startTime")) or min((pod.start for pod in pods if pod.start), default=None),
        end=_end(status, pods) if fate in (Fate.SUCCEEDED, Fate.FAILED) else None,
        attempts=_attempts(pods),
        pods=pods,
        workload=queue,
    )


def _fate(
    child: Object,
    pods: tuple[PodFacts, ...],
    queue: Workload | None,
    notices: tuple[Notice, ...],
    now: datetime,
) -> tuple[Fate, Why]:
    meta, spec, status = child["metadata"], child.get("spec", {}), child.get("status", {})
    true = {one["type"]: one for one in status.get("conditions", []) if one["status"] == "True"}
    if "deletionTimestamp" in meta:
        return Fate.LEAVING, Why("Deleted", "is being deleted")
    if "Complete" in true or "Succeeded" in true:
        return Fate.SUCCEEDED, Why()
    if "Failed" in true:
        return Fate.FAILED, Why(*_failure(true["Failed"], pods))
    if spec.get("suspend") or spec.get("runPolicy", {}).get("suspend"):
        return _suspended(meta, queue)
    why = _incomplete(child, pods, notices, now)
    if running := [pod for pod in pods if pod.phase == "Running"]:
        if why is None:
            return Fate.RUNNING, Why(message=_retrying(pods))
        share = f"{len(running)} of {_due(child, pods)} pods run"
        return Fate.RUNNING, replace(why, message=f"{share}; {why.message}")
    return Fate.WAITING, why or _waiting(pods)


def _suspended(meta: Object, queue: Workload | None) -> tuple[Fate, Why]:
    if queue is None or queue.held or SUSPENDED_BY_RUN in meta.get("annotations", {}):
        return Fate.SUSPENDED, Why("Suspended")
    return Fate.WAITING if queue.active else Fate.SUSPENDED, Why(queue.reason, queue.message)


def _incomplete(child: Object, pods: tuple[PodFacts, ...], notices: tuple[Notice, ...], now: datetime) -> Why | None:
    """Why a pod is missing or does not start; None: all is well, or too young to say. What a person must mend first."""
    found = [*_troubled(pods), *_unmade(child, pods, notices, now)]
    return next((one for one in found if one.stuck), None) or next(iter(found), None)


def _troubled(pods: tuple[PodFacts, ...]) -> Iterator[Why]:
    for pod in pods:
        if pod.phase == "Pending" and pod.trouble and not pod.leaving:
            reason, _, _ = pod.trouble.partition(":")
            stuck = pod.taken if reason in MENDED_BY_PEOPLE else None
            yield Why(reason, f"pod {pod.name}: {pod.trouble}", stuck)


def _unmade(child: Object, pods: tuple[PodFacts, ...], notices: tuple[Notice, ...], now: datetime) -> Iterator[Why]:
    """Why the child has fewer pods than it should: in its controller's words, or that it has none."""
    if _live(pods) >= _due(child, pods):
        return
    name, since = child["metadata"]["name"], _since(child, pods)
    own = [one for one in notices if one.kind in VOICES[child["kind"]] and one.about in (name, f"{name}-node-0")]
    own = [one for one in own if one.tells_of_creation and one.last >= since and now - one.last < FRESH]
    if own:
        last = max(own, key=lambda one: one.last)
        words = explain(last.message)
        first = min(one.first for one in own if explain(one.message) == words)  # each try names another pod
        stuck = None if judge(last.message).passing else max(since, first)
        yield Why(last.reason, f"no pod can be made: {words}", stuck)
    elif now - since > SILENT and not any(pod.phase == "Failed" for pod in pods):
        quiet = "a pod is missing for more than a minute, and no Event says why"
        gang = ", and what its PodGroup waits for" if child["spec"].get("runPolicy", {}).get("schedulingPolicy") else ""
        yield Why("PodsMissing", f"{quiet}: see whether {MAKERS[child['kind']]}{gang}")


def _live(pods: tuple[PodFacts, ...]) -> int:
    """Pods that run, will run, or are on their way out and not replaced before."""
    return sum(pod.phase in ("Pending", "Running") for pod in pods)


def _due(child: Object, pods: tuple[PodFacts, ...]) -> int:
    """Pods that there should be besides those that have succeeded."""
    spec, status = child.get("spec", {}), child.get("status", {})
    replicas = [one.get("replicas", 1) for one in spec.get("pytorchReplicaSpecs", {}).values()]
    nodes = spec.get("trainer", {}).get("numNodes", 1)
    wanted = int(sum(replicas) or spec.get("completions", nodes))
    done = max(sum(pod.phase == "Succeeded" for pod in pods), int(status.get("succeeded") or 0))
    return min(wanted - done, int(spec.get("parallelism", wanted)))


def _since(child: Object, pods: tuple[PodFacts, ...]) -> datetime:
    """When its pods were last begun to be waited for: it was made, or resumed, or one of them failed."""
    status = child.get("status", {})
    moments = [_time(child["metadata"].get("creationTimestamp")), _time(status.get("startTime"))]
    moments += [_time(one.get("lastTransitionTime")) for one in status.get("conditions", [])]
    moments += [pod.end for pod in pods if pod.phase == "Failed"]
    return max(filter(None, moments), default=LONG_AGO)


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


def _waiting(pods: tuple[PodFacts, ...]) -> Why:
    if any(pod.phase == "Pending" for pod in pods):
        return Why("Starting", "the pod is being started")
    if trouble := _retrying(pods):
        return Why("Retrying", trouble)
    return Why("NoPods", "its controller has made no pod yet")


def _attempts(pods: tuple[PodFacts, ...]) -> int:
    by_shard: dict[int, int] = {}
    for pod in pods:
        by_shard[pod.shard] = by_shard.get(pod.shard, 0) + 1
    return max(by_shard.values(), default=0)


def _end(status: Object, pods: tuple[PodFacts, ...]) -> datetime | None:
    ends = [pod.end for pod in pods if pod.end]
    conditions = [_time(one.get("lastTransitionTime")) for one in status.get("conditions", [])]
    return _time(status.get("completionTime")) or max(ends, default=None) or max(filter(None, conditions), default=None)


def _pod(pod: Object) -> PodFacts:
    meta, status = pod["metadata"], pod.get("status", {})
    states = [one.get("state", {}) for one in status.get("containerStatuses", [])]
    ended: Object = next((state["terminated"] for state in states if "terminated" in state), {})
    words = _words(ended.get("message", ""))
    return PodFacts(
        name=meta["name"],
        uid=meta["uid"],
        shard=_shard(meta),
        phase=status.get("phase", "Pending"),
        leaving="deletionTimestamp" in meta,
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
    if labels.get("training.kubeflow.org/replica-type") == "worker":
        return 1 + int(labels.get("training.kubeflow.org/replica-index", 0))
    return 0


def _trouble(status: Object, states: list[Object], ended: Object) -> str:
    if status.get("reason"):  # Evicted, NodeLost, ...
        return _colon(status["reason"], status.get("message"))
    first = [one.get("state", {}) for one in status.get("initContainerStatuses", [])]
    for state in (*first, *states):
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
