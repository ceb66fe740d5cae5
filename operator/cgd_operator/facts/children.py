"""What has become of each child, read from Jobs, PyTorchJobs, TrainJobs and their pods. Pure: objects in, facts out."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

from cgd_operator.facts.refusals import explain, judge
from cgd_operator.kube.kueue import JOB_UID_LABEL, QUEUE_LABEL, SUSPENDED_BY_RUN, Workload, workload
from cgd_operator.kube.outside import last_words, moment, number
from cgd_operator.planning.manifests import CONTAINERS, GIVEN_UP, POOL_LABEL, REPLICA_INDEX, REPLICA_TYPE, STAGE_LABEL
from cgd_stages.contract import CHECKPOINT_BYTES, MOST, Exit, LastWords

Object = dict[str, Any]

RESTARTS = "jobset.sigs.k8s.io/restart-attempt"
"""Label of a JobSet's pods."""
FAILURES = ("batch.kubernetes.io/job-index-failure-count", "batch.kubernetes.io/job-index-ignored-failure-count")
"""Annotations with which a Job counts the failures of an index on its next pod."""
LONG_AGO = datetime.min.replace(tzinfo=UTC)
LOST = "Lost"
"""Phase of a pod that its node should have taken down by now: the node is gone. To Kubernetes it still runs."""
LOST_AFTER = timedelta(minutes=1)
"""What a node that is well may take for that after the grace period."""
KEPT_AFTER = timedelta(seconds=30)
"""What others in a pod may take to end after our container."""
RETRYING = "trying again after "
QUIET = timedelta(seconds=10)
"""What a child without its pods, or a pod without its container, may take before its Events are asked why."""
SILENT = timedelta(minutes=1)
"""What a controller may take to make a pod, or to say why it cannot."""
FRESH = timedelta(minutes=20)
"""Controllers try again, and say so, more often than this: an older Event is of another time."""
MUTE_AGAIN = timedelta(minutes=4)
"""The kubelet tries to mount again every two minutes, and says so: later than this it has gone on, mostly to a pull."""

BEGINNING = ("NoPods", "Starting")
"""Reasons to wait that every stage has for some seconds."""
MENDED_BY_PEOPLE = frozenset({
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "SignatureValidationFailed",
    "CreateContainerConfigError", "CreateContainerError", "RunContainerError", "FailedMount", "NodeLost", "SidecarRuns",
})  # fmt: skip
"""The kubelet's reasons, and ours, that nothing but a person ends."""
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
    owner: str
    """The uid of the object that has made it."""
    shard: int
    """Which of its child's pods it is: its number."""
    phase: str
    """Kubernetes's, or LOST."""
    restarts: int
    """How often a JobSet had begun all of its pods anew when it made this one."""
    failures: int
    """How often its Job had made it before, as the Job counts: pods that are gone are among them."""
    due: datetime | None
    """It is being deleted, and its grace period ends then."""
    disrupted: bool
    """The cluster wanted its place, or lost it: no failure of its own."""
    taken: datetime | None
    """When a node took it: from then on its GPUs are its own."""
    start: datetime | None
    end: datetime | None
    exit_code: int | None
    node: str
    trouble: str
    """Why it waits, is kept, or how it ended: reason and message."""
    troubled: datetime | None
    """Since when."""
    words: LastWords | None
    tail: str
    """The termination message when it is not ours: the last lines of the log."""

    @property
    def failed(self) -> bool:
        return self.phase == "Failed" or (self.exit_code or 0) > 0


@dataclass(frozen=True)
class ChildFacts:
    name: str
    stage: str
    kind: str
    fate: Fate
    uid: str = ""
    reason: str = ""
    message: str = ""
    stuck: datetime | None = None
    """Since when it has waited for something that a person must mend; None: it does not."""
    suspended: bool = False
    held: bool = False
    """Suspended by the operator, not by a queue."""
    given_up: str = ""
    """Why the operator has ended it."""
    start: datetime | None = None
    end: datetime | None = None
    attempts: int = 0
    pods: tuple[PodFacts, ...] = ()
    gone: tuple[PodFacts, ...] = ()
    """Pods that were deleted, as they were last, until the status has it."""
    workload: Workload | None = None
    """What Kueue has for it; None: Kueue has no part in it."""


@dataclass(frozen=True)
class Gone:
    """A pod that was deleted, as it was last."""

    stage: str
    pod: PodFacts


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
    facts = _child(child, (), (), None, (), LONG_AGO)
    stopped_by_others = facts.fate is Fate.SUSPENDED and not facts.held
    named = QUEUE_LABEL in child["metadata"].get("labels", {})
    return stopped_by_others or (named and facts.fate in (Fate.SUSPENDED, Fate.WAITING))


OURS = frozenset(CONTAINERS.values())
OUT_OF_MEMORY = "OOMKilled"
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
    gone: Iterable[Gone] = (),
) -> dict[str, ChildFacts]:
    """The facts of every child there is, by its stage. Of two children of one stage the one that stays counts.

    `events` are Warnings about the children, what their controllers make of them, and their pods. By `now` is judged
    what takes too long; without it nothing does. `gone` are pods that were deleted lately.
    """
    by_owner = {one["metadata"]["labels"][JOB_UID_LABEL]: workload(one, now) for one in workloads}
    notices = tuple(_notice(one) for one in events)
    by_stage: dict[str, list[PodFacts]] = {}
    for pod in pods:
        by_stage.setdefault(_stage(pod), []).append(_noticed(_pod(pod, now), notices, now))
    facts: dict[str, ChildFacts] = {}
    for child in sorted(children, key=lambda one: "deletionTimestamp" not in one["metadata"]):
        own = tuple(sorted(by_stage.get(_stage(child), []), key=_age))
        left = tuple(one.pod for one in gone if one.stage == _stage(child))
        queue = by_owner.get(child["metadata"].get("uid", ""))
        facts[_stage(child)] = _child(child, own, left, queue, notices, now)
    return facts


def last_state(pod: Object, now: datetime) -> Gone:
    """Of a pod that was deleted, just now: it ended when its container did, or else by now, when it had to go."""
    facts = _pod(pod, LONG_AGO)
    end = facts.end or min(filter(None, (now, facts.due)))
    return Gone(_stage(pod), replace(facts, end=end, phase="Succeeded" if facts.phase == "Succeeded" else "Failed"))


def checkpoint_bytes(facts: Mapping[str, ChildFacts]) -> int:
    """What prepare has told of the trainings' checkpoints; 0: nothing."""
    prepare = facts.get("prepare")
    for pod in (*prepare.pods, *prepare.gone) if prepare else ():
        told = pod.words.stages.get("prepare") if pod.words else None
        if told and 0 < (size := told.metrics.get(CHECKPOINT_BYTES, 0)) <= MOST:
            return int(size)
    return 0


def pods_by_stage(pods: Iterable[Object], gone: Iterable[Gone], now: datetime) -> dict[str, tuple[PodFacts, ...]]:
    """All pods that there are or were lately, whether or not their child is there."""
    every = [*(Gone(_stage(pod), _pod(pod, now)) for pod in pods), *gone]
    return {stage: tuple(one.pod for one in every if one.stage == stage) for stage in {one.stage for one in every}}


def unexplained(children: Iterable[Object], pods: Collection[Object], now: datetime) -> Iterator[tuple[str, str]]:
    """Where Events may say what nothing else says, as namespace and field selector: why a child lacks a pod, and why
    one that has a node has no container, when that has lasted some seconds."""
    for child in children:
        if has_ended(child):
            continue
        namespace = child["metadata"]["namespace"]
        own = tuple(_pod(pod, now) for pod in pods if _stage(pod) == _stage(child))
        if any(_is_mute(pod) and now - (pod.taken or now) > QUIET for pod in own):
            for reason in MUTE:
                yield namespace, f"involvedObject.kind=Pod,reason={reason}"
        going = _child(child, own, (), None, (), LONG_AGO).fate in (Fate.WAITING, Fate.RUNNING)
        if going and _live(own) < _due(child, own) and now - _since(child, own) > QUIET:
            for kind in VOICES[child["kind"]]:
                yield namespace, f"involvedObject.kind={kind},type=Warning"


def _notice(event: Object) -> Notice:
    """From an Event of either kind of recorder: one tells first and last time, the other a time and a series."""
    about, series = event["involvedObject"], event.get("series") or {}
    first = event.get("firstTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
    last = series.get("lastObservedTime") or event.get("lastTimestamp") or first
    message = str(event.get("message", ""))
    moments = (moment(first) or LONG_AGO, moment(last) or LONG_AGO)
    return Notice(about.get("name", ""), about.get("kind", ""), event.get("reason", ""), message, *moments)


def _is_mute(pod: PodFacts) -> bool:
    """It has a node and no container, and its status does not say why."""
    return pod.phase == "Pending" and pod.due is None and not pod.trouble and pod.taken is not None


def _noticed(pod: PodFacts, notices: tuple[Notice, ...], now: datetime) -> PodFacts:
    """With what the kubelet tells in Events alone, such as a volume's missing Secret, as long as it tells it. What
    failed once as the pod began is over, and what was said of an earlier pod of that name is of another one."""
    if not _is_mute(pod) or pod.taken is None:
        return pod
    own = [one for one in notices if (one.kind, one.about) == ("Pod", pod.name) and one.last >= pod.taken]
    if not own:
        return pod
    last = max(own, key=lambda one: one.last)
    told_for = last.last - max(pod.taken, min(one.first for one in own))
    if now - last.last > max(MUTE_AGAIN, told_for / 2):  # what it says for long it says more rarely
        return pod
    return replace(pod, trouble=_colon(last.reason, last.message))


def _stage(thing: Object) -> str:
    return str(thing["metadata"].get("labels", {}).get(STAGE_LABEL, ""))


def _age(pod: PodFacts) -> tuple[float, str]:
    return (pod.start.timestamp() if pod.start else float("inf"), pod.name)


def _child(
    child: Object,
    pods: tuple[PodFacts, ...],
    gone: tuple[PodFacts, ...],
    queue: Workload | None,
    notices: tuple[Notice, ...],
    now: datetime,
) -> ChildFacts:
    meta, status = child["metadata"], child.get("status", {})
    fate, why = _fate(child, pods, gone, queue, notices, now)
    notes = meta.get("annotations", {})
    return ChildFacts(
        name=meta["name"],
        stage=_stage(child),
        kind=child["kind"],
        fate=fate,
        uid=meta.get("uid", ""),
        reason=why.reason,
        message=why.message,
        stuck=why.stuck,
        suspended=_is_suspended(child.get("spec", {})),
        held=SUSPENDED_BY_RUN in notes,
        given_up=notes.get(GIVEN_UP, ""),
        start=moment(status.get("startTime")) or min((pod.start for pod in pods if pod.start), default=None),
        end=_end(status, pods) if fate in (Fate.SUCCEEDED, Fate.FAILED) else None,
        attempts=_attempts(pods),
        pods=pods,
        gone=gone,
        workload=queue,
    )


def _fate(
    child: Object,
    pods: tuple[PodFacts, ...],
    gone: tuple[PodFacts, ...],
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
        if given_up := meta.get("annotations", {}).get(GIVEN_UP):
            return Fate.FAILED, Why("GivenUp", given_up)
        return Fate.FAILED, Why(*_failure(true["Failed"], gone + pods))
    if _is_suspended(spec):
        return _suspended(meta, pods, queue)
    why = _incomplete(child, pods, notices, now)
    if running := [pod for pod in pods if pod.phase == "Running"]:
        if why is None:
            return Fate.RUNNING, Why(message=_retrying(pods) or _leaving(pods))
        due = _due(child, pods)
        share = f"{len(running)} of {due} pods run; " if len(running) < due else ""
        return Fate.RUNNING, replace(why, message=share + why.message)
    return Fate.WAITING, why or _waiting(pods, gone)


def _is_suspended(spec: Object) -> bool:
    return bool(spec.get("suspend") or spec.get("runPolicy", {}).get("suspend"))


def _suspended(meta: Object, pods: tuple[PodFacts, ...], queue: Workload | None) -> tuple[Fate, Why]:
    if queue is None or queue.held or SUSPENDED_BY_RUN in meta.get("annotations", {}):
        ending = sum(pod.phase == "Running" for pod in pods)
        return Fate.SUSPENDED, Why(
            "Suspended", f"pods that still run until they have stored what is finished: {ending}" if ending else ""
        )
    return Fate.WAITING if queue.active else Fate.SUSPENDED, Why(queue.reason, queue.message)


def _incomplete(child: Object, pods: tuple[PodFacts, ...], notices: tuple[Notice, ...], now: datetime) -> Why | None:
    """Why a pod is missing or does not start; None: all is well, or too young to say. What a person must mend first."""
    found = [*_troubled(pods), *_unmade(child, pods, notices, now)]
    return next((one for one in found if one.stuck), None) or next(iter(found), None)


def _leaving(pods: tuple[PodFacts, ...]) -> str:
    leaving = next((pod for pod in pods if pod.phase == "Running" and pod.due), None)
    return f"pod {leaving.name} is being deleted, and is made again when it has ended" if leaving else ""


def _troubled(pods: tuple[PodFacts, ...]) -> Iterator[Why]:
    for pod in pods:
        if pod.trouble and (pod.phase in ("Running", LOST) or (pod.phase == "Pending" and pod.due is None)):
            reason, _, _ = pod.trouble.partition(":")
            stuck = pod.troubled if reason in MENDED_BY_PEOPLE else None
            yield Why(reason, f"pod {pod.name}: {pod.trouble}", stuck)


def _unmade(child: Object, pods: tuple[PodFacts, ...], notices: tuple[Notice, ...], now: datetime) -> Iterator[Why]:
    """Why the child has fewer pods than it should: in its controller's words, or that it has none."""
    if _live(pods) >= _due(child, pods):
        return
    name, since = child["metadata"]["name"], _since(child, pods)
    own = [one for one in notices if one.kind in VOICES[child["kind"]] and one.about in (name, f"{name}-node-0")]
    own = [one for one in own if one.tells_of_creation and one.last >= since]
    last = max(own, key=lambda one: one.last, default=None)
    words = explain(last.message) if last else ""
    first = min((one.first for one in own if explain(one.message) == words), default=now)  # each try names another pod
    if last and _is_tried_still(first, last.last, now):
        stuck = None if judge(last.message).passing else max(since, first)
        yield Why(last.reason, f"no pod can be made: {words}", stuck)
    elif now - since > SILENT and not _pauses(child, pods):
        quiet = "a pod has been missing for more than a minute, and no Event says why"
        gang = ", and what its PodGroup waits for" if child["spec"].get("runPolicy", {}).get("schedulingPolicy") else ""
        yield Why("PodsMissing", f"{quiet}: check that {MAKERS[child['kind']]}{gang}")


def _is_tried_still(first: datetime, last: datetime, now: datetime) -> bool:
    """Whether a failure that was met from `first` to `last` would have been met again by now: the pauses between two
    tries double, up to ten minutes, so that the next is about as long as all before. Else it was mended."""
    return now - last < min(FRESH, timedelta(minutes=2) + 2 * (last - first))


def _pauses(child: Object, pods: tuple[PodFacts, ...]) -> bool:
    """Its controller may let time pass before it makes a failed pod again: a Job up to ten minutes, also when the pod
    is gone and only its count tells of it."""
    return bool(child.get("status", {}).get("failed")) or any(pod.phase == "Failed" for pod in pods)


def _live(pods: tuple[PodFacts, ...]) -> int:
    """Pods that run, will run, or are on their way out and not replaced before."""
    return sum(pod.phase in ("Pending", "Running", LOST) for pod in pods)


def _due(child: Object, pods: tuple[PodFacts, ...]) -> int:
    """Pods that there should be besides those that have succeeded."""
    spec, status = child.get("spec", {}), child.get("status", {})
    replicas = [one.get("replicas", 1) for one in spec.get("pytorchReplicaSpecs", {}).values()]
    nodes = spec.get("trainer", {}).get("numNodes", 1)
    wanted = int(sum(replicas) or spec.get("completions", nodes))
    done = max(sum(pod.phase == "Succeeded" for pod in pods), int(status.get("succeeded") or 0))
    return min(wanted - done, int(spec.get("parallelism", wanted)))


def _since(child: Object, pods: tuple[PodFacts, ...]) -> datetime:
    """When its pods were last begun to be waited for: it was made, or resumed, or one of them failed. Its controller
    tells the resumption late; whoever wrote it is in the fields' owners at once."""
    status, owners = child.get("status", {}), child["metadata"].get("managedFields", [])
    moments = [moment(child["metadata"].get("creationTimestamp")), moment(status.get("startTime"))]
    moments += [moment(one.get("lastTransitionTime")) for one in status.get("conditions", [])]
    moments += [moment(one.get("time")) for one in owners if one.get("subresource") != "status"]
    moments += [pod.end for pod in pods if pod.phase == "Failed"]
    return max(filter(None, moments), default=LONG_AGO)


def _failure(condition: Object, pods: tuple[PodFacts, ...]) -> tuple[str, str]:
    failed = [pod for pod in pods if pod.failed]
    reason = str(condition.get("reason") or "Failed")
    if not failed:
        return reason, str(condition.get("message") or "failed; its pods are gone")
    permanent = [pod for pod in failed if pod.words and pod.words.outcome == "failed" and pod.exit_code == 3]
    telling = [pod for pod in failed if pod.words or pod.tail]
    return reason, account((permanent or telling or failed)[-1])


def account(pod: PodFacts) -> str:
    """How a pod ended, for people: where, exit code, what it said and what to change."""
    code = "" if pod.exit_code is None else f"exit code {pod.exit_code}"
    said = pod.tail.strip().rpartition("\n")[2]
    if pod.words and pod.words.message:
        said = " ".join(filter(None, [_sentence(pod.words.message), pod.words.hint]))
    return ": ".join(filter(None, [f"pod {pod.name}", code, pod.trouble, said]))


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", ":")) else text + "."


def _retrying(pods: tuple[PodFacts, ...]) -> str:
    failed = [pod for pod in pods if pod.phase == "Failed"]
    return RETRYING + account(failed[-1]) if failed else ""


def _waiting(pods: tuple[PodFacts, ...], gone: tuple[PodFacts, ...]) -> Why:
    """Of a child whose pods do not run. A pod that has failed may be gone before the next one is made."""
    if any(pod.phase == "Pending" for pod in pods):
        return Why("Starting", "the pod is being started")
    if trouble := _retrying(pods):
        return Why("Retrying", trouble)
    own = tuple(pod for pod in gone if not pod.disrupted and pod.exit_code not in (None, Exit.INTERRUPTED))
    trouble = _retrying(own)
    return Why("NoPods", "its controller has made no pod yet" + (f"; {trouble}" if trouble else ""))


def _attempts(pods: tuple[PodFacts, ...]) -> int:
    begun = Counter((pod.shard, pod.restarts) for pod in pods)
    return max((pod.restarts + max(begun[pod.shard, pod.restarts], pod.failures + 1) for pod in pods), default=0)


def _end(status: Object, pods: tuple[PodFacts, ...]) -> datetime | None:
    ends = [pod.end for pod in pods if pod.end]
    conditions = [moment(one.get("lastTransitionTime")) for one in status.get("conditions", [])]
    return (
        moment(status.get("completionTime")) or max(ends, default=None) or max(filter(None, conditions), default=None)
    )


def _pod(pod: Object, now: datetime) -> PodFacts:
    meta, status = pod["metadata"], pod.get("status", {})
    phase, due = status.get("phase", "Pending"), moment(meta.get("deletionTimestamp"))
    states = {one["name"]: one.get("state", {}) for one in status.get("containerStatuses", [])}
    ended: Object = next((one.get("terminated", {}) for name, one in states.items() if name in OURS), {})
    words = last_words(ended.get("message", ""))
    since = moment(ended.get("finishedAt")) or moment(status.get("startTime"))
    node = pod.get("spec", {}).get("nodeName", "")
    if due and node and phase in ("Pending", "Running") and now > due + LOST_AFTER:
        phase, trouble, since = LOST, f"NodeLost: {_lost(node, due)}", due
    else:
        trouble = _kept(states, ended, now) or _trouble(pod, status, list(states.values()), ended)
    return PodFacts(
        name=meta["name"],
        uid=meta["uid"],
        owner=next((one["uid"] for one in meta.get("ownerReferences", []) if one.get("controller")), ""),
        shard=_shard(meta),
        phase=phase,
        due=due,
        restarts=number(meta.get("labels", {}).get(RESTARTS)),
        failures=sum(number(meta.get("annotations", {}).get(name)) for name in FAILURES),
        disrupted=_is_disrupted(status),
        taken=moment(status.get("startTime")),
        start=moment(ended.get("startedAt")) or moment(status.get("startTime")),
        end=_pod_end(phase, status, due),
        exit_code=ended.get("exitCode"),
        node=node,
        trouble=trouble,
        troubled=since,
        words=words,
        tail="" if words or ended.get("reason") == OUT_OF_MEMORY else ended.get("message", ""),
    )


def _pod_end(phase: str, status: Object, due: datetime | None) -> datetime | None:
    """When the last container of a pod that is over ended. Of one that has no word of them, when it was given up, which
    its node did by the end of the grace period, if it was there."""
    if phase == LOST:
        return due
    if phase not in ("Succeeded", "Failed"):
        return None
    ended = [one.get("state", {}).get("terminated", {}) for one in status.get("containerStatuses", [])]
    if ends := [end for one in ended if (end := moment(one.get("finishedAt")))]:
        return max(ends)
    if due and not _is_disrupted(status):  # it was deleted before it began: nothing in its status is of its end
        return None
    moments = [moment(one.get("lastTransitionTime")) for one in status.get("conditions", [])]
    given_up = max(filter(None, moments), default=None)
    return min(filter(None, (given_up, due)), default=None)


def _lost(node: str, due: datetime) -> str:
    return (
        f"its node {node} should have stopped it by {due:%Y-%m-%dT%H:%M:%SZ} and has not; the stage waits for it. "
        "Bring the node back. If the machine is certainly off, ask an admin to run `kubectl taint nodes "
        f"{node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute` or to delete the Node; or set "
        "spec.replaceLostPodsAfterSeconds in the run"
    )


def _kept(states: Mapping[str, Object], ended: Object, now: datetime) -> str:
    """That others keep a pod, if they do: our container has ended, and one that somebody has put beside it has not."""
    end = moment(ended.get("finishedAt"))
    others = [name for name, state in states.items() if "running" in state and name not in OURS]
    if end is None or now - end < KEPT_AFTER or not others:
        return ""
    return (
        f"SidecarRuns: the stage has ended (exit code {ended['exitCode']}), but container {others[0]} still runs, "
        "so the pod cannot end: stop that container. In new runs let its injector add it as a native sidecar (an init "
        "container with restartPolicy: Always), or switch the injection off in spec.podMetadata"
    )


def _is_disrupted(status: Object) -> bool:
    return any(one["type"] == "DisruptionTarget" and one["status"] == "True" for one in status.get("conditions", []))


def _shard(meta: Object) -> int:
    labels, notes = meta.get("labels", {}), meta.get("annotations", {})
    if (index := notes.get("batch.kubernetes.io/job-completion-index")) is not None:
        return number(index)
    if labels.get(REPLICA_TYPE) == "master":  # of a PyTorchJob that an older operator has made
        return -1
    return number(labels.get(REPLICA_INDEX))


def _trouble(pod: Object, status: Object, states: list[Object], ended: Object) -> str:
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
    if reason == OUT_OF_MEMORY:
        return f"{reason}: {_out_of_memory(pod)}"
    return "" if reason in ("Error", "Completed") else str(reason)


def _out_of_memory(pod: Object) -> str:
    """What to raise: the pool's limit, or what it asks for where it has none and the node had too little."""
    ours: Object = next((one for one in pod["spec"].get("containers", []) if one["name"] in OURS), {})
    limit = ours.get("resources", {}).get("limits", {}).get("memory")
    where = f"spec.placement.{pod['metadata']['labels'].get(POOL_LABEL, '<pool>')}.resources"
    mend = "in a new run, which goes on from what is stored"
    if limit:
        return f"its memory reached the limit of {limit}; raise {where}.limits.memory {mend}"
    return f"the node had no more memory, and the pod has no limit; set {where}.requests.memory to its need {mend}"


def _colon(reason: str, message: str | None) -> str:
    return f"{reason}: {message}" if message else reason
