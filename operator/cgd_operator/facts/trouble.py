"""Why a run does not go on although no stage has failed, and who must act. Pure."""

from dataclasses import dataclass
from datetime import datetime

from cgd_operator.facts.pods import LONG_AGO, PodFacts
from cgd_operator.facts.refusals import OTHER, POLICY, explain, judge
from cgd_operator.kube.kinds import POD, ApiError, Kind

INSTALL: dict[str, str] = {
    "auto": "the cluster has neither PyTorchJob (kubeflow.org/v1) nor TrainJob (trainer.kubeflow.org/v1alpha1): "
    "install the Kubeflow Training Operator or Kubeflow Trainer; then the run goes on",
    "PyTorchJob": "training.backend is PyTorchJob (kubeflow.org/v1), which the cluster has not: install the Kubeflow "
    "Training Operator; then the run goes on",
    "TrainJob": "training.backend is TrainJob (trainer.kubeflow.org/v1alpha1), which the cluster has not: install "
    "Kubeflow Trainer; then the run goes on",
}
"""What is missing and who must install it, for each `training.backend`."""


@dataclass(frozen=True)
class Trouble:
    """Why a run does not go on. `final`: it never will."""

    reason: str
    message: str
    final: bool = False
    since: datetime | None = LONG_AGO
    """Since when a person must mend it; None: it may pass by itself."""


def without_backend(backend: str) -> Trouble:
    """The cluster does not serve the training kind that the run asks for."""
    return Trouble("TrainingBackendMissing", INSTALL[backend])


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


def not_replaced(stage: str, pod: PodFacts, error: ApiError) -> Trouble:
    message = f"pod {pod.name} of stage {stage} is on a lost node and cannot be replaced: {error.message}"
    return Trouble("NodeLost", f"{message}; lostPods.replace=true in the operator's chart gives it the right")
