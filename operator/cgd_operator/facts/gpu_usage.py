"""What a run has used: the GPU time of its pods, also of those that are gone. Pure.

A pod holds its GPUs from the moment a node took it until its last container ended, or until its grace period was over
where its node was lost. What a deleted pod held can be read from nothing that is left in the cluster: the last thing to
be seen of it is its deletion, and the status keeps a count for every pod.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cgd_operator.api.status import CGDRunStatus, StageStatus
from cgd_operator.facts.pods import LOST, PodFacts
from cgd_operator.planning.dag import Child

MOST_LEFT = 200
"""Of so many pods that are gone a stage remembers what each has used: the news that one was deleted may come after a
list without it, and it must not be counted twice."""


@dataclass(frozen=True)
class Used:
    """GPU seconds of a stage: all of them, and those of each pod, by its uid."""

    gpu_seconds: int
    pods: Mapping[str, int]


def count(
    children: Iterable[Child], pods: Mapping[str, tuple[PodFacts, ...]], previous: CGDRunStatus, now: datetime
) -> dict[str, Used]:
    """By stage, from the pods of each child, by its stage; a child that carries out several is counted on the first.
    Never less than `previous` says."""
    before = {stage.name: stage for stage in previous.stages}
    first = {child.stages[0]: child for child in children if child.gpus}
    return {
        name: _count(child, pods.get(child.stage, ()), before.get(name, StageStatus(name=name)), now)
        for name, child in first.items()
    }


def total(used: Mapping[str, Used]) -> int:
    """GPU seconds of the run."""
    return sum(stage.gpu_seconds for stage in used.values())


def hours(gpu_seconds: int) -> str:
    return f"{gpu_seconds / 3600:.2f}"


def _count(child: Child, pods: tuple[PodFacts, ...], old: StageStatus, now: datetime) -> Used:
    known = old.pod_gpu_seconds
    held = {pod.uid: max(_held(pod, now) * child.gpus, known.get(pod.uid, 0)) for pod in pods}
    more = sum(seconds - known.get(uid, 0) for uid, seconds in held.items())
    left = {uid: seconds for uid, seconds in known.items() if uid not in held}
    return Used(old.gpu_seconds + more, {**held, **(left if len(left) <= MOST_LEFT else {})})


def _held(pod: PodFacts, now: datetime) -> int:
    """Seconds; whole minutes of a pod that goes on, so that a status does not change every second."""
    if pod.taken is None:
        return 0
    if pod.phase in ("Succeeded", "Failed", LOST):
        return round((pod.end - pod.taken).total_seconds()) if pod.end else 0
    if pod.due:
        return int((min(now, pod.due) - pod.taken).total_seconds())
    return int((now - pod.taken).total_seconds()) // 60 * 60
