"""Events on transitions: what changed between two statuses, as Kubernetes Events. Pure."""

import hashlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from cgd_operator.api.status import CGDRunStatus, StageStatus
from cgd_operator.facts.pods import PodFacts
from cgd_operator.facts.waiting import BEGINNING
from cgd_operator.kube.kinds import RUN
from cgd_operator.planning.dag import Run
from cgd_operator.planning.manifests import MANAGER
from cgd_operator.status.render import duration, seconds_between

MAKERS = ("answer", "critique", "refine", "distill", "miscritique", "misrefine", "train")
"""Kinds of stages that make rows or a model. The success of other stages is in the status, and starts the next."""


def transitions(run: Run, old: CGDRunStatus, new: CGDRunStatus, now: datetime) -> Iterator[dict[str, Any]]:
    """The Events of a change of the status: stages that have made rows or a model (in a single Event, as a pod or a
    reconcile may end several stages), a stage that failed, a stage that waits and why, a run that a person must look
    after, and the end of the run, which also names its last stages."""
    before = {stage.name: stage for stage in old.stages}
    news = [stage for stage in new.stages if _state(stage) != _state(before.get(stage.name, StageStatus(name="")))]
    over = new.state != old.state and new.state in ("Succeeded", "Failed", "Suspended")
    good = [stage for stage in news if stage.state == "Succeeded" and (over or stage.name.kind in MAKERS)]
    ended = ", ".join(_ended(stage) for stage in good)
    if ended and not (over and new.state == "Succeeded"):
        yield _event(run, "StageSucceeded", ended, now)
    for stage in news:
        if stage.state == "Failed":
            yield _event(run, "StageFailed", _trouble(stage), now, warning=True)
        elif stage.state in ("Waiting", "Running") and stage.reason and stage.reason not in BEGINNING:
            yield _event(run, "StageWaiting", _trouble(stage), now)
    if not over and (stalled := _stalled(new)) and not _stalled(old):
        yield _event(run, "RunStalled", stalled, now, warning=True)
    if over:
        message = next((end.message for end in new.conditions if end.type == "Succeeded"), "") or new.state
        last = f"{ended}; " if ended and new.state == "Succeeded" else ""
        yield _event(run, f"Run{new.state}", last + message, now, warning=new.state == "Failed")


def _stalled(status: CGDRunStatus) -> str:
    """Why a run is stalled; empty: it is not."""
    true = {condition.type: condition.message for condition in status.conditions if condition.status == "True"}
    return true.get("Stalled", "")


def refusal(run: dict[str, Any], message: str, now: datetime) -> dict[str, Any]:
    """The Event of a run whose spec cannot be run."""
    return _event_of(run["metadata"], "Refused", message, warning=True, now=now)


def expiry(run: dict[str, Any], ttl: int, now: datetime, tool: str | None = None) -> dict[str, Any]:
    """The Event of a run that is deleted because it ended so long ago; with a `tool` that would make it again, of the
    deletion of its children."""
    if tool:
        message = (
            f"its Jobs and pods are deleted {ttl} s after it ended (spec.ttlSecondsAfterFinished); the run stays, as "
            f"{tool} would make it again: delete it there"
        )
        return _event_of(run["metadata"], "Expired", message, warning=False, now=now)
    fate = "goes with it" if run["spec"].get("deletionPolicy") == "Delete" else "stays"
    message = f"deleted {ttl} s after it ended (spec.ttlSecondsAfterFinished); what it stored {fate}"
    return _event_of(run["metadata"], "Expired", message, warning=False, now=now)


def replaced(run: Run, stage: str, pod: PodFacts, now: datetime) -> dict[str, Any]:
    """The Event of a pod that is made again because its node is lost."""
    message = f"stage {stage}: pod {pod.name} is made again, its node {pod.node} is lost (replaceLostPodsAfterSeconds)"
    return _event(run, "PodReplaced", message, now, warning=True)


def cleaned(run: dict[str, Any], trouble: str, now: datetime) -> dict[str, Any]:
    """The Event of a run whose stored data were deleted, or not: then `trouble` says why."""
    meta, storage = run["metadata"], run["spec"].get("storage")
    uri = storage.get("uri", "its storage") if isinstance(storage, dict) else "its storage"
    if trouble:
        message = f"what the run stored below {uri}/{meta['namespace']} was not deleted: {trouble}"
        return _event_of(meta, "NotCleaned", message, warning=True, now=now)
    message = f"what the run stored below {uri}/{meta['namespace']} and no other run claims is deleted"
    return _event_of(meta, "Cleaned", message, warning=False, now=now)


def _state(stage: StageStatus) -> tuple[str, str | None]:
    return stage.state, stage.reason


def _ended(stage: StageStatus) -> str:
    """`answer (290 rows, 10 rejected, 1h02m)`"""
    facts = [f"{stage.rows.done} rows, {stage.rows.rejected} rejected"] if stage.rows and stage.rows.total else []
    if stage.start_time and stage.completion_time:
        facts.append(duration(round(seconds_between(stage.start_time, stage.completion_time))))
    return f"{stage.name} ({', '.join(facts)})" if facts else stage.name


def _trouble(stage: StageStatus) -> str:
    text = f"stage {stage.name} ({stage.child})"
    return f"{text}: {stage.message}" if stage.message else text


def _event(run: Run, reason: str, message: str, now: datetime, *, warning: bool = False) -> dict[str, Any]:
    meta = {"name": run.name, "namespace": run.namespace, "uid": run.uid}
    return _event_of(meta, reason, message, warning=warning, now=now)


def _event_of(meta: dict[str, Any], reason: str, message: str, *, warning: bool, now: datetime) -> dict[str, Any]:
    """An Event. Its name derives from its text, so that posting a transition twice makes a single Event."""
    said = f"{meta['uid']}/{reason}/{message}".encode(errors="surrogatepass")
    digest = hashlib.sha256(said).hexdigest()[:16]
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
