"""How often the pods of a child were tried, where its controller does not count it, and when that is enough. Pure.

The Training Operator recreates a failed pod without limit, under its old name, and no object records how often: the
status keeps a count by pod name. Its release 1.7 does not end a job after a permanent exit code either. So the operator
itself fails such a child; for other kinds their controllers count `spec.retries`.

A Job ignores pods that exit with 143, which are interrupted from outside. One that its kubelet evicts for what it has
used itself (of a volume with a limit) may do so too, and would be made again for ever, also by the Job of a TrainJob:
the operator counts those pods, which stay until their Job goes, and the restarts of the JobSet, with which it goes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from cgd_operator.api.status import CGDRunStatus, PodAttempts, StageStatus
from cgd_operator.facts.children import ChildFacts, Fate
from cgd_operator.facts.pods import account
from cgd_stages.contract import Exit


def attempts(facts: ChildFacts, old: StageStatus) -> tuple[PodAttempts, ...]:
    """How often each pod was made, by name, for this PyTorchJob and not for a deleted one of the same name. A pod after
    a suspension is no new attempt; nor is a pod after one that failed by no fault of its own."""
    if facts.kind != "PyTorchJob" or facts.fate in (Fate.SUCCEEDED, Fate.FAILED):
        return ()
    counted = [pod for pod in old.pod_attempts if pod.owner in ("", facts.uid)]
    if facts.suspended:
        return tuple(pod.model_copy(update={"uid": "", "excused": False}) for pod in counted)
    excused = _excused(facts, {pod.uid for pod in counted})
    known = {pod.name: pod.model_copy(update={"excused": pod.excused or pod.uid in excused}) for pod in counted}
    for pod in facts.pods:
        before = known.get(pod.name, PodAttempts(name=pod.name, attempts=1))
        late = not before.uid and (pod.due is not None or pod.uid in excused)  # made before the pod that comes next
        if pod.owner in ("", facts.uid) and pod.uid != before.uid and not late:
            made = before.attempts + bool(before.uid and not before.excused)
            known[pod.name] = PodAttempts(
                name=pod.name, uid=pod.uid, owner=facts.uid, excused=pod.uid in excused, attempts=made
            )
    return tuple(known[name] for name in sorted(known))


def _excused(facts: ChildFacts, counted: set[str]) -> set[str]:
    """The uids of pods whose failure does not count: disrupted pods and all their peers, which miss them; interrupted
    pods, as all are when a pod is asked to end; and pods that failed while they waited for a pending pod."""
    pods = (*facts.gone, *facts.pods)
    pending = {pod.name for pod in facts.pods if pod.phase == "Pending"}
    disrupted = {pod.uid for pod in pods if pod.disrupted}
    peers = counted if disrupted & counted else set[str]()
    stopped = {pod.uid for pod in pods if pod.exit_code == Exit.INTERRUPTED and not pod.evicted}
    failed = stopped | {pod.uid for pod in pods if pod.failed and pending - {pod.name}}
    return disrupted | peers | failed


def enough(facts: Iterable[ChildFacts], previous: CGDRunStatus, retries: int) -> Mapping[str, str]:
    """The stages whose child is to be given up, and why."""
    before: dict[str, StageStatus] = {stage.name: stage for stage in previous.stages}
    reasons: dict[str, str] = {}
    for child in facts:
        again = child.kind == "TrainJob"  # a JobSet that an older operator has made restarts its Job after the deadline
        if child.kind != "PyTorchJob" and (again or not child.given_up) and (why := _evicted(child, retries)):
            reasons[child.stage] = why
        if child.kind != "PyTorchJob" or child.given_up:
            continue
        if permanent := [pod for pod in child.pods if pod.phase == "Failed" and 0 < (pod.exit_code or 0) < 128]:
            reasons[child.stage] = account(permanent[-1])
            continue
        old = before.get(child.stage, StageStatus(name=child.stage))
        most = max(attempts(child, old), key=lambda pod: pod.attempts, default=None)
        if most and most.attempts > retries + 1:
            failed = [pod for pod in (*child.gone, *child.pods) if pod.failed]
            why = account(failed[-1]) if failed else old.message or "its log and the PyTorchJob's Events may tell why"
            tried = _times(most.attempts - 1)
            reasons[child.stage] = f"pod {most.name} was tried {tried}, and spec.retries is {retries}; {why}"
    return reasons


def _evicted(child: ChildFacts, retries: int) -> str:
    """Why a child whose pods are evicted for what they use is to be given up; empty if it is not."""
    restarts = max((pod.restarts for pod in child.pods), default=0)
    evicted = [pod for pod in child.pods if pod.evicted and pod.phase == "Failed" and pod.restarts == restarts]
    most = max(Counter(pod.shard for pod in evicted).values(), default=0)
    if not evicted or most + restarts <= retries:
        return ""
    after = f", after its JobSet was restarted {_times(restarts)}" if restarts else ""
    why = f"pods were evicted for what they used {_times(most)}{after}, and spec.retries is {retries}"
    return f"{why}; {account(evicted[-1])}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
