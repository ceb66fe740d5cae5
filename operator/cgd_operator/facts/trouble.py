"""Why a run does not go on although no stage has failed, and who must act. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from cgd_operator.facts.children import ChildFacts, Fate
from cgd_operator.facts.decide import done_stages
from cgd_operator.facts.gpu_usage import hours
from cgd_operator.facts.pods import LONG_AGO, PodFacts
from cgd_operator.facts.refusals import OTHER, POLICY, explain, judge
from cgd_operator.kube.kinds import POD, ApiError, Kind
from cgd_operator.planning.dag import Child, Run

INSTALL: dict[str, str] = {
    "auto": "the cluster has neither PyTorchJob (kubeflow.org/v1) nor TrainJob (trainer.kubeflow.org/v1alpha1): "
    "install the Kubeflow Training Operator or Kubeflow Trainer; then the run goes on",
    "PyTorchJob": "training.backend is PyTorchJob (kubeflow.org/v1), which the cluster has not: install the Kubeflow "
    "Training Operator; then the run goes on",
    "TrainJob": "training.backend is TrainJob (trainer.kubeflow.org/v1alpha1), which the cluster has not: install "
    "Kubeflow Trainer; then the run goes on",
}
"""What is missing and who must install it, for each `training.backend`."""
NEW_BUDGET = (
    "the pods are stopped, what they stored stays: apply a new run under another name with a larger budget, and it "
    "goes on from there"
)


@dataclass(frozen=True)
class Trouble:
    """Why a run does not go on. `final`: it never will."""

    reason: str
    message: str
    final: bool = False
    since: datetime | None = LONG_AGO
    """Since when a person must mend it; None: it may pass by itself."""


def refused(stage: str, error: ApiError, ready: datetime, kind: Kind | None = None) -> Trouble:
    """The API server refuses a stage's child, or (`kind`) its dry run. A cause outside the run, such as an absent
    ServiceAccount, may be mended soon, so the run is not called stalled at once.

    Args:
        ready: when the stage could have begun.
    """
    verdict, words = judge(error.message), explain(error.message)
    if verdict.passing:
        return Trouble(verdict.reason, f"the child of stage {stage} cannot be made: {words}", since=None)
    message = f"the API server refused the child of stage {stage}: {words}"
    if kind is POD and verdict in (OTHER, POLICY):
        message += (
            "; if it is refused only because the operator tries it as a pod of its own, set rehearsal.pods=false in "
            "the operator's chart"
        )
    final = verdict is OTHER and error.status in (400, 422)
    return Trouble("ChildRefused", message, since=LONG_AGO if final else ready)


def exceeded(
    run: Run, children: tuple[Child, ...], facts: Mapping[str, ChildFacts], gpu_seconds: int, age: timedelta
) -> Trouble | None:
    """The limit of spec.budget that an unfinished run has reached; None if a stage failed before, which stays the
    reason. Computed from usage and time at every reconcile, so such a run never starts again by itself."""
    budget = run.spec.budget
    stages = {stage for child in children for stage in child.stages}
    failed = any(child.fate is Fate.FAILED for child in facts.values())
    if budget is None or failed or done_stages(children, facts) >= stages:
        return None
    if budget.gpu_hours is not None and gpu_seconds >= budget.gpu_hours * 3600:
        used = f"{hours(gpu_seconds)} GPU-hours are used, of {budget.gpu_hours} in spec.budget.gpuHours"
        return Trouble("BudgetExceeded", f"{used}; {NEW_BUDGET}", final=True)
    if budget.deadline_seconds is not None and age.total_seconds() >= budget.deadline_seconds:
        late = f"the run did not end within {budget.deadline_seconds} s of its creation (spec.budget.deadlineSeconds)"
        return Trouble("DeadlineExceeded", f"{late}; {NEW_BUDGET}", final=True)
    return None


def not_changed(stage: str, aim: str, error: ApiError) -> Trouble:
    """The API server refuses a change of a stage's child. `aim`: what it was to be, such as suspended."""
    verdict, words = judge(error.message), explain(error.message)
    reason = verdict.reason if verdict.passing else "ChangeRefused"
    message = f"the child of stage {stage} cannot be {aim}, and stays as it was: {words}"
    return Trouble(reason, message, since=None if verdict.passing else LONG_AGO)


def not_replaced(stage: str, pod: PodFacts, error: ApiError) -> Trouble:
    message = f"pod {pod.name} of stage {stage} is on a lost node and cannot be replaced: {error.message}"
    return Trouble("NodeLost", f"{message}; lostPods.replace=true in the operator's chart gives it the right")
