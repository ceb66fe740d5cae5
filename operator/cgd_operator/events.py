"""Events on transitions: what changed between two statuses, as Kubernetes Events. Pure."""

import hashlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from cgd_operator.api.status import CGDRunStatus, StageStatus
from cgd_operator.cluster import RUN
from cgd_operator.manifests import MANAGER
from cgd_operator.plan import Run

TOLD = {"Running": "StageStarted", "Succeeded": "StageSucceeded", "Failed": "StageFailed", "Waiting": "StageWaiting"}


def transitions(run: Run, old: CGDRunStatus, new: CGDRunStatus, now: datetime) -> Iterator[dict[str, Any]]:
    """One Event for every stage whose state changed, and one for the end of the run."""
    before = {stage.name: stage for stage in old.stages}
    for stage in new.stages:
        was = before.get(stage.name, StageStatus(name=stage.name))
        if stage.state == was.state and stage.reason == was.reason:
            continue
        if stage.state in TOLD and not (stage.state == "Waiting" and stage.reason in ("NoPods", "Starting")):
            yield _event(run, TOLD[stage.state], _stage_text(stage), stage.state == "Failed", now)
    if new.state != old.state and new.state in ("Succeeded", "Failed", "Suspended"):
        message = next((one.message for one in new.conditions if one.type == "Succeeded"), "")
        yield _event(run, f"Run{new.state}", message or new.state, new.state == "Failed", now)


def refusal(run: dict[str, Any], message: str, now: datetime) -> dict[str, Any]:
    """The Event of a run whose spec cannot be run."""
    return _event_of(run["metadata"], "Refused", message, warning=True, now=now)


def expiry(run: dict[str, Any], ttl: int, now: datetime) -> dict[str, Any]:
    """The Event of a run that is deleted because it ended so long ago."""
    fate = "goes with it" if run["spec"].get("deletionPolicy") == "Delete" else "stays"
    message = f"deleted {ttl} s after it ended (spec.ttlSecondsAfterFinished); what it stored {fate}"
    return _event_of(run["metadata"], "Expired", message, warning=False, now=now)


def cleaned(run: dict[str, Any], trouble: str, now: datetime) -> dict[str, Any]:
    """The Event of a run whose stored data were deleted, or not: then `trouble` says why."""
    meta, uri = run["metadata"], run["spec"]["storage"]["uri"]
    if trouble:
        message = f"what the run stored below {uri}/{meta['namespace']} was not deleted: {trouble}"
        return _event_of(meta, "NotCleaned", message, warning=True, now=now)
    message = f"what the run stored below {uri}/{meta['namespace']} and no other run claims is deleted"
    return _event_of(meta, "Cleaned", message, warning=False, now=now)


def _stage_text(stage: StageStatus) -> str:
    text = f"stage {stage.name} ({stage.child})"
    if stage.state == "Succeeded" and stage.rows:
        text += f": {stage.rows.done} rows, {stage.rows.rejected} rejected"
    return f"{text}: {stage.message}" if stage.message else text


def _event(run: Run, reason: str, message: str, warning: bool, now: datetime) -> dict[str, Any]:
    meta = {"name": run.name, "namespace": run.namespace, "uid": run.uid}
    return _event_of(meta, reason, message, warning=warning, now=now)


def _event_of(meta: dict[str, Any], reason: str, message: str, *, warning: bool, now: datetime) -> dict[str, Any]:
    """Its name derives from what it says, so that a transition told twice is one Event."""
    digest = hashlib.sha256(f"{meta['uid']}/{reason}/{message}".encode()).hexdigest()[:16]
    moment = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{meta['name']}.{digest}", "namespace": meta["namespace"]},
        "involvedObject": {
            "apiVersion": RUN.api_version,
            "kind": RUN.kind,
            "name": meta["name"],
            "namespace": meta["namespace"],
            "uid": meta["uid"],
        },
        "type": "Warning" if warning else "Normal",
        "reason": reason,
        "message": message[:1000],
        "source": {"component": MANAGER},
        "firstTimestamp": moment,
        "lastTimestamp": moment,
        "count": 1,
    }
