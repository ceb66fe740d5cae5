"""How often the pods of a PyTorchJob were made, and when that is enough. Pure.

The Training Operator makes a failed pod again without end, under its old name, and nothing that is left tells how
often: the status keeps a count for every name. Its release 1.7 does not end a job for a permanent exit code either. So
the operator gives such a child up; of other kinds `spec.retries` is their controllers' to count.
"""

from collections.abc import Iterable, Mapping

from cgd_operator.api.status import CGDRunStatus, PodAttempts, StageStatus
from cgd_operator.observe import ChildFacts, Fate, account


def attempts(facts: ChildFacts, old: StageStatus) -> tuple[PodAttempts, ...]:
    """By the name of a pod, how often it was made: by this PyTorchJob, not by one of its name that was deleted."""
    if facts.kind != "PyTorchJob" or facts.fate in (Fate.SUCCEEDED, Fate.FAILED):
        return ()
    counted = [one for one in old.pod_attempts if one.owner in ("", facts.uid)]
    if facts.suspended:
        return tuple(_without_pod(one) for one in counted)
    disrupted = {pod.uid for pod in (*facts.gone, *facts.pods) if pod.disrupted}
    if any(one.uid in disrupted for one in counted):
        counted = [_without_pod(one) if one.uid in disrupted else _excused(one) for one in counted]
    known = {one.name: one for one in counted}
    for pod in facts.pods:
        if pod.owner not in ("", facts.uid):
            continue
        before = known.get(pod.name, PodAttempts(name=pod.name, attempts=1))
        if before.uid or not (pod.due or pod.disrupted):  # else it is not the one that comes next
            made = before.attempts + (before.uid not in ("", pod.uid))
            known[pod.name] = PodAttempts(name=pod.name, uid=pod.uid, owner=facts.uid, attempts=made)
    return tuple(known[name] for name in sorted(known))


def _without_pod(counted: PodAttempts) -> PodAttempts:
    """So that the next pod is no new attempt."""
    return counted.model_copy(update={"uid": ""})


def _excused(counted: PodAttempts) -> PodAttempts:
    """A peer of a pod that the cluster took: it fails for want of it, and is made again, which is no attempt either."""
    return counted.model_copy(update={"attempts": max(0, counted.attempts - 1)}) if counted.uid else counted


def enough(facts: Iterable[ChildFacts], previous: CGDRunStatus, retries: int) -> Mapping[str, str]:
    """The stages whose child is to be given up, and why."""
    before = {stage.name: stage for stage in previous.stages}
    reasons = {one.stage: _enough(one, before.get(one.stage, StageStatus(name=one.stage)), retries) for one in facts}
    return {stage: reason for stage, reason in reasons.items() if reason}


def _enough(facts: ChildFacts, old: StageStatus, retries: int) -> str:
    if facts.kind != "PyTorchJob" or facts.given_up:
        return ""
    if permanent := [pod for pod in facts.pods if pod.phase == "Failed" and 0 < (pod.exit_code or 0) < 128]:
        return account(permanent[-1])
    most = max(attempts(facts, old), key=lambda one: one.attempts, default=None)
    if most is None or most.attempts <= retries + 1:
        return ""
    failed = [pod for pod in (*facts.gone, *facts.pods) if pod.failed]
    told = account(failed[-1]) if failed else old.message or "its log and the PyTorchJob's Events may tell why"
    tried = "once" if most.attempts == 2 else f"{most.attempts - 1} times"
    return f"pod {most.name} was tried {tried}, and spec.retries is {retries}; {told}"
