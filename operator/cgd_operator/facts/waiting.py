"""Why a child lacks pods, or why its pods do not start: in the words of the controller, the kubelet or the scheduler.
Pure: facts and Events in, a reason out."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from cgd_operator.facts.pods import LONG_AGO, LOST, Object, PodFacts, account
from cgd_operator.facts.refusals import explain, judge
from cgd_operator.kube.outside import moment, with_message
from cgd_stages.contract import Exit

QUIET = timedelta(seconds=10)
"""What a child without its pods, or a pod without its container, may take before its Events are asked why."""
SILENT = timedelta(minutes=1)
"""What a controller may take to make a pod, or to say why it cannot."""
FRESH = timedelta(minutes=20)
"""Controllers try again, and say so, more often than this: an older Event is of another time."""
MUTE_AGAIN = timedelta(minutes=4)
"""The kubelet tries to mount again every two minutes, and says so: later than this it has gone on, mostly to a pull."""
RETRYING = "trying again after "

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
"""Reasons that the kubelet gives in Events of a pod and nowhere else."""
MAKERS = {
    "Job": "kube-controller-manager runs",
    "PyTorchJob": "the Kubeflow Training Operator runs",
    "TrainJob": "Kubeflow Trainer and JobSet run",
}
"""Who makes the pods of each kind."""


@dataclass(frozen=True)
class Why:
    """Why a child is not at work, or not with all of its pods."""

    reason: str = ""
    message: str = ""
    stuck: datetime | None = None
    """Since when it has waited for something that a person must mend; None: it does not."""


@dataclass(frozen=True)
class Notice:
    """An Event in which a controller or the kubelet says what it cannot do."""

    about: str
    """Name of the object."""
    kind: str
    reason: str
    message: str
    first: datetime
    last: datetime

    @classmethod
    def of(cls, event: Object) -> "Notice":
        """From an Event of either form: with first and last time, or with a time and a series."""
        about, series = event["involvedObject"], event.get("series") or {}
        first = event.get("firstTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
        last = series.get("lastObservedTime") or event.get("lastTimestamp") or first
        return cls(
            about=about.get("name", ""),
            kind=about.get("kind", ""),
            reason=event.get("reason", ""),
            message=str(event.get("message", "")),
            first=moment(first) or LONG_AGO,
            last=moment(last) or LONG_AGO,
        )


def questions(child: Object, pods: Collection[PodFacts], now: datetime, *, going: bool) -> Iterator[str]:
    """Field selectors of the Events that may say what nothing else says, when it has lasted some seconds: why a pod
    that has a node has no container, and why a child that is `going` (not stopped) lacks a pod."""
    if any(is_mute(pod) and now - (pod.taken or now) > QUIET for pod in pods):
        for reason in MUTE:
            yield f"involvedObject.kind=Pod,reason={reason}"
    if going and _lacking(child, pods) and now - _since(child, pods) > QUIET:
        for kind in VOICES[child["kind"]]:
            yield f"involvedObject.kind={kind},type=Warning"


def is_mute(pod: PodFacts) -> bool:
    """It has a node and no container, and its status does not say why."""
    return pod.phase == "Pending" and pod.due is None and not pod.trouble and pod.taken is not None


def noticed(pod: PodFacts, notices: Collection[Notice], now: datetime) -> PodFacts:
    """The pod with what the kubelet says in Events alone, such as a volume's missing Secret, as long as it says it. A
    failure from the pod's beginning is over; Events before the pod are about an earlier pod of that name."""
    if not is_mute(pod) or pod.taken is None:
        return pod
    own = [notice for notice in notices if (notice.kind, notice.about) == ("Pod", pod.name)]
    own = [notice for notice in own if notice.last >= pod.taken]
    if not own:
        return pod
    last = max(own, key=lambda notice: notice.last)
    said_for = last.last - max(pod.taken, min(notice.first for notice in own))
    if now - last.last > max(MUTE_AGAIN, said_for / 2):  # what it says for long it says more rarely
        return pod
    return replace(pod, trouble=with_message(last.reason, last.message))


def missing(child: Object, pods: Collection[PodFacts], notices: Collection[Notice], now: datetime) -> Why | None:
    """Why a pod is missing or does not start; None: all is well, or too young to say. What a person must mend first."""
    reasons = []
    for pod in pods:
        if pod.trouble and (pod.phase in ("Running", LOST) or (pod.phase == "Pending" and pod.due is None)):
            reason, _, _ = pod.trouble.partition(":")
            stuck = pod.troubled if reason in MENDED_BY_PEOPLE else None
            reasons.append(Why(reason, f"pod {pod.name}: {pod.trouble}", stuck))
    reasons += _unmade(child, pods, notices, now)
    return next((why for why in reasons if why.stuck), None) or next(iter(reasons), None)


def waiting(pods: Collection[PodFacts], gone: Collection[PodFacts]) -> Why:
    """Why a child without a running pod waits, when nothing is wrong. A failed pod may be gone before its replacement
    exists."""
    if any(pod.phase == "Pending" for pod in pods):
        return Why("Starting", "the pod is being started")
    if failure := retrying(pods):
        return Why("Retrying", failure)
    before = retrying([pod for pod in gone if not pod.disrupted and pod.exit_code not in (None, Exit.INTERRUPTED)])
    return Why("NoPods", "; ".join(filter(None, ["its controller has made no pod yet", before])))


def retrying(pods: Collection[PodFacts]) -> str:
    failed = [pod for pod in pods if pod.phase == "Failed"]
    return RETRYING + account(failed[-1]) if failed else ""


def expected_pods(child: Object, pods: Collection[PodFacts]) -> int:
    """How many pods there should be besides those that have succeeded."""
    spec, status = child.get("spec", {}), child.get("status", {})
    replicas = sum(replica.get("replicas", 1) for replica in spec.get("pytorchReplicaSpecs", {}).values())
    nodes = spec.get("trainer", {}).get("numNodes", 1)
    total = int(replicas or spec.get("completions", nodes))
    done = max(sum(pod.phase == "Succeeded" for pod in pods), int(status.get("succeeded") or 0))
    return min(total - done, int(spec.get("parallelism", total)))


def _lacking(child: Object, pods: Collection[PodFacts]) -> bool:
    """Whether the child has too few pods that run, will run, or are not replaced before they have ended."""
    return sum(pod.phase in ("Pending", "Running", LOST) for pod in pods) < expected_pods(child, pods)


def _since(child: Object, pods: Collection[PodFacts]) -> datetime:
    """Since when the child waits for its pods: it was created, or resumed, or a pod failed. Its controller reports a
    resumption late; the owners of its fields show it at once."""
    status, owners = child.get("status", {}), child["metadata"].get("managedFields", [])
    moments = [moment(child["metadata"].get("creationTimestamp")), moment(status.get("startTime"))]
    moments += [moment(condition.get("lastTransitionTime")) for condition in status.get("conditions", [])]
    moments += [moment(owner.get("time")) for owner in owners if owner.get("subresource") != "status"]
    moments += [pod.end for pod in pods if pod.phase == "Failed"]
    return max(filter(None, moments), default=LONG_AGO)


def _unmade(child: Object, pods: Collection[PodFacts], notices: Collection[Notice], now: datetime) -> Iterator[Why]:
    """Why the child has fewer pods than it should: in its controller's words, or that its controller says nothing."""
    if not _lacking(child, pods):
        return
    name, since = child["metadata"]["name"], _since(child, pods)
    own = [notice for notice in notices if notice.kind in VOICES[child["kind"]]]
    own = [notice for notice in own if notice.about in (name, f"{name}-node-0") and notice.last >= since]
    # FailedCreate, FailedCreatePod, JobCreationFailed, ...; not that a controller restarts something
    own = [notice for notice in own if "FailedCreate" in notice.reason or "CreationFailed" in notice.reason]
    last = max(own, key=lambda notice: notice.last, default=None)
    words = explain(last.message) if last else ""
    # each try names another pod
    first = min((notice.first for notice in own if explain(notice.message) == words), default=now)
    # The pauses between two tries double, up to ten minutes: the next is about as long as all before. A failure that
    # has not come again by then was mended.
    if last and now - last.last < min(FRESH, timedelta(minutes=2) + 2 * (last.last - first)):
        stuck = None if judge(last.message).passing else max(since, first)
        yield Why(last.reason, f"no pod can be made: {words}", stuck)
        return
    # A Job lets up to ten minutes pass before it replaces a failed pod, which may be gone: then only its count remains.
    pauses = child.get("status", {}).get("failed") or any(pod.phase == "Failed" for pod in pods)
    if now - since > SILENT and not pauses:
        quiet = "a pod has been missing for more than a minute, and no Event says why"
        gang = ", and what its PodGroup waits for" if child["spec"].get("runPolicy", {}).get("schedulingPolicy") else ""
        yield Why("PodsMissing", f"{quiet}: check that {MAKERS[child['kind']]}{gang}")
