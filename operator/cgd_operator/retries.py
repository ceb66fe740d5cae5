"""How often the pods of a PyTorchJob were made, and when that is enough. Pure.

The Training Operator makes a failed pod again without end, under its old name, and nothing that is left tells how
often: the status keeps a count for every name. Its release 1.7 does not end a job for a permanent exit code either. So
the operator gives such a child up; of other kinds `spec.retries` is their controllers' to count.
"""

from collections.abc import Iterable, Mapping

from cgd_operator.api.status import CGDRunStatus, PodAttempts, StageStatus
from cgd_operator.observe import ChildFacts, Fate, account


def attempts(facts: ChildFacts, old: StageStatus) -> tuple[PodAttempts, ...]:
    """By the name of a pod, how often it was made. One that follows a suspension or a disruption is no new attempt."""
    if facts.kind != "PyTorchJob" or facts.fate in (Fate.SUCCEEDED, Fate.FAILED):
        return ()
    known = {one.name: one for one in old.pod_attempts}
    if facts.suspended:
        return tuple(one.model_copy(update={"uid": ""}) for one in known.values())
    for pod in facts.pods:
        if pod.leaving and pod.name not in known:  # of a job that was deleted and made again
            continue
        before = known.get(pod.name, PodAttempts(name=pod.name, attempts=1))
        again = before.uid not in ("", pod.uid)
        uid = "" if pod.disrupted else pod.uid
        known[pod.name] = PodAttempts(name=pod.name, uid=uid, attempts=before.attempts + again)
    return tuple(known[name] for name in sorted(known))


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
    told = facts.message or old.message or "its log and the PyTorchJob's Events may tell why"
    return f"pod {most.name} was tried {most.attempts - 1} times, and spec.retries is {retries}: {told}"
