"""Whether a run needs a reconcile. Pure. Events, sweeps and reconciles all use this single answer."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Any

from pydantic import ValidationError

from cgd_operator.api.status import CGDRunStatus
from cgd_operator.facts.children import has_ended
from cgd_operator.kube.outside import moment
from cgd_operator.planning.manifests import FINALIZER

Object = dict[str, Any]

GPU_TIME = ("gpuSeconds", "podGpuSeconds")
"""Fields of a stage that grow with time: a change of them alone is no reason to write the status."""
COUNTS = ("rows", "percent", "tokensPerSecond", "etaSeconds", "loss", "progress", "eta")
"""Fields of a status that show progress. Reports cause their writes, at a bounded rate; a sweep never does."""

ENDED = ("Succeeded", "Failed")
"""States of a run or a stage that goes on no more."""


class Due(Enum):
    NOTHING = "nothing"
    """A reconcile would change nothing."""
    CHILDREN = "what its children say"
    """The run itself needs nothing; its children must be read to know more."""
    TELLING = "telling"
    """The run's status must be written, or the run must be deleted."""
    ACTING = "acting"
    """A child can start or must stop. Such runs go before those with only a status to write."""


@dataclass(frozen=True)
class Outlook:
    """What a reconcile would do with a run and its children."""

    acts: bool
    status: CGDRunStatus


def due(manifest: Object, now: datetime, outlook: Outlook | None = None) -> Due:
    """What a run needs; without an `outlook`, as far as the run alone shows it."""
    meta = manifest["metadata"]
    if "deletionTimestamp" in meta:
        return Due.ACTING if FINALIZER in meta.get("finalizers", []) else Due.NOTHING
    generation = meta["generation"]
    if has_succeeded(manifest):
        status = previous_status(manifest)
        # 0: the status cannot be read, and stays as it is
        news = status.observed_generation not in (0, generation) or is_over(manifest, status, now)
    elif outlook:
        if outlook.acts:
            return Due.ACTING
        news = says_more(outlook.status, manifest, without=COUNTS) or is_over(manifest, outlook.status, now)
    else:
        news = manifest.get("status", {}).get("observedGeneration", 0) != generation
        if not news and has_right_finalizer(manifest):
            return Due.CHILDREN
    return Due.TELLING if news or not has_right_finalizer(manifest) else Due.NOTHING


def has_untold_end(manifest: Object, children: Iterable[Object]) -> bool:
    """Whether a child has ended and the status does not say so. It costs less than an outlook and says less: a run
    without such a child may be due as well."""
    if not (ended := {child["metadata"]["name"] for child in children if has_ended(child)}):
        return False
    stages = previous_status(manifest).stages
    told = {stage.child for stage in stages} - {stage.child for stage in stages if stage.state not in ENDED}
    return not ended <= told


def has_succeeded(manifest: Object) -> bool:
    """Whether the run has succeeded. Read from the status, because it holds even after somebody has deleted the
    run's Jobs."""
    conditions = manifest.get("status", {}).get("conditions", [])
    return any(condition["type"] == "Succeeded" and condition["status"] == "True" for condition in conditions)


def wants_finalizer(manifest: Object) -> bool:
    return bool(manifest["spec"].get("deletionPolicy") == "Delete")


def has_right_finalizer(manifest: Object) -> bool:
    """Whether the run has or lacks our finalizer as its deletionPolicy requires."""
    return wants_finalizer(manifest) == (FINALIZER in manifest["metadata"].get("finalizers", []))


_APPLIES = {
    "argocd.argoproj.io/tracking-id": "Argo CD",
    "argocd.argoproj.io/instance": "Argo CD",
    "app.kubernetes.io/instance": "Argo CD or Helm",
    "kustomize.toolkit.fluxcd.io/name": "Flux",
    "helm.toolkit.fluxcd.io/name": "Flux",
    "meta.helm.sh/release-name": "Helm",
}
"""Labels and annotations that a tool puts on what it applies again when it is gone."""


def applied_by(manifest: Object) -> str | None:
    """The tool that would make the run again if it were deleted; None: nobody is known to."""
    meta = manifest["metadata"]
    marks = {**(meta.get("labels") or {}), **(meta.get("annotations") or {})}
    return next((tool for mark, tool in _APPLIES.items() if mark in marks), None)


def is_over(manifest: Object, status: CGDRunStatus, now: datetime) -> bool:
    """Whether the run's TTL asks for something. A run that a tool would make again stays, or it would run for ever: of
    one that has succeeded the children go, once; one that has failed stays whole, because a failed stage is tried again
    when its child is gone."""
    if not expired(ttl(manifest), status, now):
        return False
    return applied_by(manifest) is None or (status.state == "Succeeded" and not status.children_deleted)


def ttl(manifest: Object) -> int | None:
    seconds: int | None = manifest["spec"].get("ttlSecondsAfterFinished")
    return seconds


def expired(ttl: int | None, status: CGDRunStatus, now: datetime) -> bool:
    """Whether the run succeeded or failed more than `ttl` seconds ago."""
    ends = [condition for condition in status.conditions if condition.type == "Succeeded"]
    if ttl is None or not ends or ends[0].status == "Unknown" or status.state == "Refused":
        return False
    end = moment(ends[0].last_transition_time)
    return end is not None and now >= end + timedelta(seconds=ttl)


def previous_status(manifest: Object) -> CGDRunStatus:
    """The status as it was written last, without fields of another version of the operator."""
    try:
        return CGDRunStatus.model_validate(manifest.get("status") or {}, extra="ignore")
    except ValidationError:  # of another version of the operator: GPU seconds of pods that are gone are lost with it
        return CGDRunStatus()


def body_of(status: CGDRunStatus) -> Object:
    """The status as JSON for the API server."""
    return status.model_dump(by_alias=True, exclude_none=True, mode="json")


def says_more(status: CGDRunStatus, manifest: Object, *, without: Collection[str] = ()) -> bool:
    """Whether a status differs from the run's present status in other fields than `without` and GPU time."""
    left_out = (*GPU_TIME, *without)
    return _part(body_of(status), left_out) != _part(manifest.get("status", {}), left_out)


def _part(body: Object, left_out: Collection[str]) -> Object:
    def less(part: Object, *names: str) -> Object:
        return {name: value for name, value in part.items() if name not in (*names, *left_out)}

    stages = [less(stage) for stage in body.get("stages", [])]
    return less(body, "stages", "usage") | {"stages": stages, "tokens": body.get("usage", {}).get("tokens")}
