"""What a run has used: the GPU time of its pods, also of those that are gone. Pure.

A pod holds its GPUs from the moment a node took it until its last container ended, or until its grace period was over
where its node was lost. Nothing in the cluster says later what a deleted pod held, so the status keeps a count for each
pod.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cgd_operator.api.status import CGDRunStatus, StageStatus
from cgd_operator.facts.pods import LOST, PodFacts
from cgd_operator.planning.dag import Child

MOST_LEFT = 200
"""A stage remembers what each of so many deleted pods used: the event of a deletion may come after a list without the
pod, which must not be counted twice."""


@dataclass(frozen=True)
class Used:
    """GPU seconds of a stage: all of them, and those of each pod, by its uid."""

    gpu_seconds: int
    pods: Mapping[str, int]


def count(
    children: Iterable[Child], pods: Mapping[str, tuple[PodFacts, ...]], previous: CGDRunStatus, now: datetime
) -> dict[str, Used]:
    """The GPU seconds by stage; those of a child with several stages count for its first stage. Never less than
    `previous` says.

    Args:
        pods: the pods of each child, by the child's stage.
    """
    before = {stage.name: stage for stage in previous.stages}
    used: dict[str, Used] = {}
    for child in children:
        if not child.gpus:
            continue
        name = child.stages[0]
        old = before.get(name, StageStatus(name=name))
        known = old.pod_gpu_seconds
        held = {pod.uid: max(_held(pod, now) * child.gpus, known.get(pod.uid, 0)) for pod in pods.get(child.stage, ())}
        more = sum(seconds - known.get(uid, 0) for uid, seconds in held.items())
        left = {uid: seconds for uid, seconds in known.items() if uid not in held}
        used[name] = Used(old.gpu_seconds + more, {**held, **(left if len(left) <= MOST_LEFT else {})})
    return used


def total(used: Mapping[str, Used]) -> int:
    """GPU seconds of the run."""
    return sum(stage.gpu_seconds for stage in used.values())


def hours(gpu_seconds: int) -> str:
    return f"{gpu_seconds / 3600:.2f}"


def _held(pod: PodFacts, now: datetime) -> int:
    """The seconds for which a pod held its GPUs; whole minutes while it runs, so that a status does not change every
    second."""
    if pod.taken is None:
        return 0
    if pod.phase in ("Succeeded", "Failed", LOST):
        return round((pod.end - pod.taken).total_seconds()) if pod.end else 0
    if pod.due:
        return int((min(now, pod.due) - pod.taken).total_seconds())
    return int((now - pod.taken).total_seconds()) // 60 * 60
