"""The texts and values that the pages of `cgd ui` show of a run: from CGDRuns and Events to JSON. Pure.

Times are ISO texts; the browser computes how long ago they are.
"""

import shlex
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from cgd_operator import yamls
from cgd_operator.api.status import CGDRunStatus, StageStatus
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import RUN
from cgd_stages.report.summary import label
from cgd_stages.report.words import short_name
from cgd_stages.results.formatting import count, duration

ENDED = {"Succeeded": "good", "Failed": "bad", "Refused": "bad"}
"""The look of a run that has ended, by its state."""
STILL = ("Suspended", "Pending", "New")
GROUPS = {"work": "at work", "still": "waiting", "bad": "failed", "good": "succeeded"}
"""What a run is counted as, by its look; a suspended one waits for nothing."""
STAGES = {"Succeeded": "good", "Failed": "bad", "Running": "work", "Waiting": "still", "Suspended": "still"}
"""The look of a stage, by its state; a pending stage has none."""
STARTING = ("Starting", "NoPods", "Admitted")
"""Reasons for a wait that every stage goes through."""


def key(item: Object) -> str:
    """Namespace and name."""
    return f"{item['metadata']['namespace']}/{item['metadata']['name']}"


def page_of(run: Object) -> str:
    """The path of a run's own page."""
    return f"/runs/{quote(key(run))}"


def command(*words: str) -> str:
    """A `cgd` command, quoted for a shell."""
    return shell("cgd", *words)


def shell(*words: str) -> str:
    """A command as it can be typed."""
    return shlex.join(words)


def summary(run: Object) -> dict[str, Any]:
    """A run's line in the list."""
    meta, unreadable = run["metadata"], dict[str, str]()
    try:
        status = status_of(run)
    except ValidationError as error:
        status, where = CGDRunStatus(), ".".join(str(part) for part in error.errors()[0]["loc"])
        message = f"this cgd cannot read status.{where}: install the cgd of the operator's version"
        unreadable = {"state": "Unreadable", "look": "bad", "group": GROUPS["bad"], "why": message}
    stage, reason = _current(status), why(status)
    look = ENDED.get(status.state) or ("still" if reason or status.state in STILL else "work")
    names = [entry.name for entry in status.stages]
    done = sum(100 if entry.state == "Succeeded" else entry.percent or 0 for entry in status.stages)
    return {
        "key": key(run),
        "namespace": meta["namespace"],
        "name": meta["name"],
        "created": meta["creationTimestamp"],
        "page": page_of(run),
        "state": status.state,
        "look": look,
        "group": "suspended" if status.state == "Suspended" else GROUPS[look],
        "stage": f"{stage.name}, stage {names.index(stage.name) + 1} of {len(names)}" if stage else "",
        "percent": round(done / len(names)) if names else 0,
        **_figures(stage),
        "eta": status.eta or "",
        "gpuHours": status.usage.gpu_hours,
        "result": _result(status),
        "why": reason,
        **unreadable,
    }


def detail(run: Object, events: Iterable[Object]) -> dict[str, Any]:
    """Everything on a run's own page."""
    try:
        status = status_of(run)
    except ValidationError:
        status = CGDRunStatus()
    spec = run["spec"]
    return summary(run) | {
        "who": who(run, status),
        "student": short_name(spec["student"]["model"]),
        "teacher": short_name(str(spec["teacher"].get("model") or spec["teacher"]["endpoint"]["model"])),
        "tokens": count(status.usage.tokens) if status.usage.tokens else "",
        "manifest": _manifest(run),
        "stages": [_stage(stage) for stage in status.stages],
        "conditions": [condition.model_dump(by_alias=True) for condition in status.conditions],
        "events": [
            {"when": _when(event), **{name: str(event.get(name, "")) for name in ("type", "reason", "message")}}
            for event in sorted(events, key=_when, reverse=True)
        ],
        "artifacts": list(_artifacts(run, status)),
    }


def _result(status: CGDRunStatus) -> str:
    """The untrained student's right answers and the best trained model's, as far as they are known."""
    shares = {stage.name.model: stage.accuracy for stage in status.stages if stage.accuracy}
    base = shares.pop("base", None)
    best = max(shares, key=lambda model: float(shares[model].rstrip("%")), default=None)
    parts = [f"base {base}"] if base else []
    return ", ".join([*parts, f"{label(best)} {shares[best]}"] if best else parts)


def _manifest(run: Object) -> str:
    """The run as its author applied it, with what the API server has filled in."""
    meta = {"name": run["metadata"]["name"], "namespace": run["metadata"]["namespace"]}
    head = {"apiVersion": RUN.api_version, "kind": RUN.kind, "metadata": meta}
    return yamls.dump(head | {"spec": run["spec"]})


def status_of(run: Object) -> CGDRunStatus:
    """The status, parsed. Raises ValidationError for a status of another version of the operator."""
    return CGDRunStatus.model_validate(run.get("status") or {})


def _current(status: CGDRunStatus) -> StageStatus | None:
    return next((stage for stage in status.stages if stage.name == status.stage), None)


def _figures(stage: StageStatus | None) -> dict[str, str]:
    rows = stage.rows if stage else None
    return {
        "rows": f"{count(rows.done)} / {count(rows.total)}" if rows and rows.total else "",
        "rejected": count(rows.rejected) if rows and rows.rejected else "",
        "speed": count(stage.tokens_per_second) if stage and stage.tokens_per_second else "",
    }


def why(status: CGDRunStatus) -> str:
    """Why a run waits, stands still or has failed; empty for a run that works or has succeeded."""
    conditions, stage = {condition.type: condition for condition in status.conditions}, _current(status)
    succeeded, stalled = conditions.get("Succeeded"), conditions.get("Stalled")
    is_waiting = stage is not None and stage.state == "Waiting" and bool(stage.message)
    is_stalled = stalled is not None and stalled.status == "True"
    stands = status.state in ("Failed", "Refused", "Suspended") or is_stalled
    return succeeded.message if succeeded and (is_waiting or stands) else ""


def who(run: Object, status: CGDRunStatus) -> str:
    """Who must act so that the run goes on, and how."""
    name, namespace, stage = run["metadata"]["name"], run["metadata"]["namespace"], _current(status)
    stalled = next((entry for entry in status.conditions if entry.type == "Stalled" and entry.status == "True"), None)
    match status.state:
        case "Succeeded":
            return ""
        case "Refused":
            return "You: correct the field in the manifest and apply it again."
        case "Failed":
            logs = command("logs", name, stage.name, "-n", namespace) if stage and stage.child else ""
            return f"You: change what the message says{f'; {logs} prints its logs' if logs else ''}."
        case "Suspended":
            return "You: set spec.suspend to false to let the run go on."
        case "New":
            return "The operator: it has not looked at this run yet. If that lasts, check that the operator runs."
        case _ if stalled and (stage is None or stage.reason != stalled.reason):
            if stalled.reason == "TrainingBackendMissing":
                return "The cluster's administrator: install what the message names."
            return "You or the cluster's administrator: the message says what is missing or not allowed."
        case _ if stage and (stage.state in ("Waiting", "Suspended") or stage.reason):
            return _who_ends_the_wait(stage)
    return "Nobody: the run is at work."


def _who_ends_the_wait(stage: StageStatus) -> str:
    match stage.reason:
        case None | "Starting" | "NoPods" | "Admitted":
            return "Nobody: its pods are being started."
        case "Retrying":
            return "Nobody yet: the operator tries again by itself."
        case "WaitingForQuota" | "WaitingForAdmission":
            return "Nobody, if the queue moves: the stage starts when there is quota. Else the queue's administrator."
        case "Unschedulable":
            return "The cluster's administrator or autoscaler: no node takes the pod. Or you: ask for less."
        case "NodeLost":
            return "The cluster's administrator: bring the node back, or say that it is off. The message says how."
        case "NotStarted" | "PodsMissing" | "WebhookUnavailable" | "FailedCreatePodSandBox":
            return "The cluster's administrator: repair what the message names."
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
        "loss": stage.loss or "",
        "message": stage.message
        or (f"round {stage.round}" if stage.round else "")
        or ("" if stage.reason in (None, *STARTING) else stage.reason),
    }


def _when(event: Object) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"])


def _artifacts(run: Object, status: CGDRunStatus) -> Iterable[dict[str, str]]:
    """The artifacts of the run, where they are, and the commands that show them."""
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
