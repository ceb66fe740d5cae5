"""When a run ends because its budget or its time is used up, and when it is deleted. Pure.

Computed from usage and time at every reconcile, so a run that has reached its limit never starts again by itself.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta

from cgd_operator.api.status import CGDRunStatus
from cgd_operator.facts.children import ChildFacts, Fate
from cgd_operator.facts.decide import done_stages
from cgd_operator.facts.gpu_usage import hours
from cgd_operator.facts.trouble import Trouble
from cgd_operator.kube.outside import moment
from cgd_operator.planning.dag import Child, Run

MEND = (
    "the pods are stopped, what they stored stays: apply a new run under another name with a larger budget, and it "
    "goes on from there"
)


def exceeded(
    run: Run, children: tuple[Child, ...], facts: Mapping[str, ChildFacts], gpu_seconds: int, age: timedelta
) -> Trouble | None:
    """The limit that an unfinished run has reached; None if a stage failed before, which stays the reason."""
    budget = run.spec.budget
    stages = {stage for child in children for stage in child.stages}
    failed = any(child.fate is Fate.FAILED for child in facts.values())
    if budget is None or failed or done_stages(children, facts) >= stages:
        return None
    if budget.gpu_hours is not None and gpu_seconds >= budget.gpu_hours * 3600:
        used = f"{hours(gpu_seconds)} GPU-hours are used, of {budget.gpu_hours} in spec.budget.gpuHours"
        return Trouble("BudgetExceeded", f"{used}; {MEND}", final=True)
    if budget.deadline_seconds is not None and age.total_seconds() >= budget.deadline_seconds:
        late = f"the run did not end within {budget.deadline_seconds} s of its creation (spec.budget.deadlineSeconds)"
        return Trouble("DeadlineExceeded", f"{late}; {MEND}", final=True)
    return None


def expired(ttl: int | None, status: CGDRunStatus, now: datetime) -> bool:
    """Whether the run succeeded or failed more than `ttl` seconds ago."""
    ends = [condition for condition in status.conditions if condition.type == "Succeeded"]
    if ttl is None or not ends or ends[0].status == "Unknown" or status.state == "Refused":
        return False
    end = moment(ends[0].last_transition_time)
    return end is not None and now >= end + timedelta(seconds=ttl)
