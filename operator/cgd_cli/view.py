"""What the pages of `cgd ui` show of a run, in words: CGDRuns and Events in, values for JSON out. Pure.

Times are ISO texts; how long ago they are is counted in the browser.
"""

import shlex
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from cgd_operator.api.status import CGDRunStatus, Condition, StageStatus
from cgd_operator.kube.client import Object
from cgd_stages.report.page import short_name
from cgd_stages.results.formatting import count, duration

ENDS = {"Succeeded": "good", "Failed": "bad", "Refused": "bad"}
"""How a run looks that has ended."""
STILL = ("Suspended", "Pending", "New")
STAGES = {"Succeeded": "good", "Failed": "bad", "Running": "work", "Waiting": "still", "Suspended": "still"}
"""How a stage looks that is not to come."""
STARTING = ("Starting", "NoPods", "Admitted")
"""Reasons of a stage that waits as every stage does."""


def key(thing: Object) -> str:
    """Namespace and name."""
    return f"{thing['metadata']['namespace']}/{thing['metadata']['name']}"


def page_of(run: Object) -> str:
    """Path of a run's own page."""
    return f"/runs/{quote(key(run))}"


def command(*words: str) -> str:
    """A command of ours as a shell takes it."""
    return shlex.join(("cgd", *words))


def summary(run: Object) -> dict[str, Any]:
    """A run's line in the list."""
    meta = run["metadata"]
    head = {
        "key": key(run),
        "namespace": meta["namespace"],
        "name": meta["name"],
        "created": meta["creationTimestamp"],
        "page": page_of(run),
    }
    try:
        return head | _told(status_of(run))
    except ValidationError as error:
        return head | _told(CGDRunStatus()) | {"state": "Unreadable", "look": "bad", "why": _unreadable(error)}


def detail(run: Object, events: Iterable[Object]) -> dict[str, Any]:
    """All that a run's own page shows."""
    shown = summary(run)
    try:
        status = status_of(run)
    except ValidationError:
        status = CGDRunStatus()
    spec = run["spec"]
    return shown | {
        "who": who(run, status),
        "student": short_name(spec["student"]["model"]),
        "teacher": short_name(teacher(spec)),
        "tokens": count(status.usage.tokens),
        "stages": [_stage(one) for one in status.stages],
        "conditions": [one.model_dump(by_alias=True) for one in status.conditions],
        "events": [_event(one) for one in sorted(events, key=_when, reverse=True)],
        "artifacts": list(_artifacts(run, status)),
    }


def status_of(run: Object) -> CGDRunStatus:
    """The status, parsed. Raises ValidationError for one of another version of the operator."""
    return CGDRunStatus.model_validate(run.get("status") or {})


def teacher(spec: Object) -> str:
    """The teacher's model, wherever it runs."""
    given = spec["teacher"]
    return str(given.get("model") or given["endpoint"]["model"])


def _unreadable(error: ValidationError) -> str:
    where = ".".join(str(part) for part in error.errors()[0]["loc"])
    return (
        f"this cgd cannot read status.{where}: the operator is of another version; install the cgd that belongs to it"
    )


def _told(status: CGDRunStatus) -> dict[str, Any]:
    stage = next((one for one in status.stages if one.name == status.stage), None)
    told = why(status)
    done = sum(100 if one.state == "Succeeded" else one.percent or 0 for one in status.stages)
    return {
        "state": status.state,
        "look": ENDS.get(status.state) or ("still" if told or status.state in STILL else "work"),
        "stage": _place(status, stage),
        "percent": round(done / len(status.stages)) if status.stages else 0,
        **_figures(stage),
        "eta": status.eta or "",
        "gpuHours": status.usage.gpu_hours,
        "why": told,
    }


def _place(status: CGDRunStatus, stage: StageStatus | None) -> str:
    if stage is None:
        return ""
    names = [one.name for one in status.stages]
    return f"{stage.name}, stage {names.index(stage.name) + 1} of {len(names)}"


def _figures(stage: StageStatus | None) -> dict[str, str]:
    rows = stage.rows if stage else None
    return {
        "rows": f"{count(rows.done)} / {count(rows.total)}" if rows and rows.total else "",
        "rejected": count(rows.rejected) if rows and rows.rejected else "",
        "speed": count(stage.tokens_per_second) if stage and stage.tokens_per_second else "",
    }


def why(status: CGDRunStatus) -> str:
    """Why a run waits, stands still or has failed; nothing for one that is at work or has succeeded."""
    conditions = {one.type: one for one in status.conditions}
    told, stalled = conditions.get("Succeeded"), conditions.get("Stalled")
    waits = any(one.state == "Waiting" and one.message for one in status.stages if one.name == status.stage)
    stands = status.state in ("Failed", "Refused", "Suspended") or (stalled is not None and stalled.status == "True")
    return told.message if told and (waits or stands) else ""


def who(run: Object, status: CGDRunStatus) -> str:
    """Who must act for a run to go on, and how."""
    name, namespace = run["metadata"]["name"], run["metadata"]["namespace"]
    stalled = next((one for one in status.conditions if one.type == "Stalled" and one.status == "True"), None)
    stage = next((one for one in status.stages if one.name == status.stage), None)
    match status.state:
        case "Succeeded":
            return ""
        case "Refused":
            return "You: correct the field in the manifest and apply it again."
        case "Failed":
            shown = command("logs", name, stage.name, "-n", namespace) if stage and stage.child else ""
            logs = f"; {shown} prints its logs" if shown else ""
            return f"You: change what the message says{logs}."
        case "Suspended":
            return "You: set spec.suspend to false when it is to go on."
        case "New":
            return "The operator: it has not looked at this run yet. If that lasts, see whether it runs."
        case _ if stalled and (stage is None or stage.reason != stalled.reason):
            return _stalled(stalled)
        case _ if stage and (stage.state in ("Waiting", "Suspended") or stage.reason):
            return _waits(stage)
    return "Nobody: it is at work."


def _stalled(condition: Condition) -> str:
    if condition.reason == "TrainingBackendMissing":
        return "The cluster's administrator: install what the message names."
    return "You or the cluster's administrator: the message says what is missing or not allowed."


def _waits(stage: StageStatus) -> str:
    match stage.reason:
        case None | "Starting" | "NoPods" | "Admitted":
            return "Nobody: its pods are being started."
        case "Retrying":
            return "Nobody yet: it is tried again by itself."
        case "WaitingForQuota" | "WaitingForAdmission":
            return "Nobody, if the queue moves: it starts when there is quota. Else the queue's administrator."
        case "Unschedulable":
            return "The cluster's administrator or autoscaler: no node takes the pod. Or you: ask for less."
        case "NodeLost":
            return "The cluster's administrator: bring the node back, or say that it is off. The message says how."
        case "NotStarted" | "PodsMissing" | "WebhookUnavailable" | "FailedCreatePodSandBox":
            return "The cluster's administrator: see to what the message names."
        case "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName":
            return "The operator's administrator: the image cannot be pulled."
    return "You: do what the message says." if stage.message else "Nobody: its pods are being started."


def _stage(stage: StageStatus) -> dict[str, Any]:
    return {
        "name": stage.name,
        "kind": stage.name.kind,
        "state": stage.state,
        "look": STAGES.get(stage.state, ""),
        "started": stage.state != "Pending",
        "percent": 100 if stage.state == "Succeeded" else stage.percent or 0,
        "start": stage.start_time or "",
        "end": stage.completion_time or "",
        **_figures(stage),
        "eta": duration(stage.eta_seconds) if stage.eta_seconds is not None else "",
        "attempts": str(stage.attempts) if stage.attempts else "",
        "gpuHours": f"{stage.gpu_seconds / 3600:.2f}" if stage.gpu_seconds else "",
        "message": stage.message or ("" if stage.reason in (None, *STARTING) else stage.reason),
    }


def _event(event: Object) -> dict[str, str]:
    fields = ("type", "reason", "message")
    return {"when": _when(event), **{name: str(event.get(name, "")) for name in fields}}


def _when(event: Object) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"])


def _artifacts(run: Object, status: CGDRunStatus) -> Iterable[dict[str, str]]:
    """What the run has made, where, and how to look at it."""
    made, place = status.artifacts, (run["metadata"]["name"], "-n", run["metadata"]["namespace"])
    if made.quadruples:
        yield {"what": "Quadruples", "uri": made.quadruples, "command": command("rows", *place)}
    for objective, uri in made.checkpoints.items():
        example = command("rows", *place, "--mask", objective, "--count", "1")
        yield {"what": f"Model, {objective}", "uri": uri, "command": example}
    if made.report:
        yield {
            "what": "Report",
            "uri": made.report,
            "command": command("report", *place),
            "open": f"{page_of(run)}/report",
        }
