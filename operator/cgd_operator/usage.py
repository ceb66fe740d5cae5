"""What a run has used: the GPU time of its pods, also of those that are gone. Pure.

A pod holds its GPUs from the moment a node took it until its container ended. What a deleted pod held can be read from
nothing that is left in the cluster, so the status keeps a count for every pod it has seen.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cgd_operator.api.status import CGDRunStatus, StageStatus
from cgd_operator.observe import ChildFacts, PodFacts
from cgd_operator.plan import Child


@dataclass(frozen=True)
class Used:
    """GPU seconds of a stage: all of them, and those of each pod that is there, by its uid."""

    gpu_seconds: int
    pods: Mapping[str, int]


def count(
    children: Iterable[Child], facts: Mapping[str, ChildFacts], previous: CGDRunStatus, now: datetime
) -> dict[str, Used]:
    """By stage; a child that carries out several is counted on the first. Never less than `previous` says."""
    before = {stage.name: stage for stage in previous.stages}
    first = {child.stages[0]: child for child in children if child.gpus}
    return {
        name: _count(child, facts.get(child.stage), before.get(name, StageStatus(name=name)), now)
        for name, child in first.items()
    }


def total(used: Mapping[str, Used]) -> int:
    """GPU seconds of the run."""
    return sum(stage.gpu_seconds for stage in used.values())


def hours(gpu_seconds: int) -> str:
    return f"{gpu_seconds / 3600:.2f}"


def _count(child: Child, facts: ChildFacts | None, old: StageStatus, now: datetime) -> Used:
    known = old.pod_gpu_seconds
    pods = {pod.uid: _held(pod, now) * child.gpus for pod in (facts.pods if facts else ())}
    pods = {uid: max(seconds, known.get(uid, 0)) for uid, seconds in pods.items()}
    return Used(old.gpu_seconds + sum(seconds - known.get(uid, 0) for uid, seconds in pods.items()), pods)


def _held(pod: PodFacts, now: datetime) -> int:
    """Seconds; whole minutes of a pod that goes on, so that a status does not change every second."""
    if pod.taken is None:
        return 0
    if pod.phase in ("Succeeded", "Failed"):
        return round((pod.end - pod.taken).total_seconds()) if pod.end else 0
    seconds = int((now - pod.taken).total_seconds())
    return seconds if pod.leaving else seconds // 60 * 60
