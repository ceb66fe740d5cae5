"""Tables: the columns that `kubectl get` prints, computed by the server as the real one does."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable
from typing import Any

from cgd_local.kinds import Resource, field_value
from cgd_local.statuses import Json

_STEP = re.compile(r"""\.([\w-]+|\*)|\['((?:\\.|[^'])+)'\]|\[\?\((.+?)\)\]|\[(-?\d+|\*)\]""")
_FILTER = re.compile(r"""@\.([\w.-]+)\s*(==|!=)\s*(?:"([^"]*)"|'([^']*)'|(\S+))""")


def json_path(obj: Any, path: str) -> list[Any]:
    """The values of a JSONPath as printer columns use it: fields, indexes, `[*]` and `[?(@.type=="Ready")]`."""
    found = [obj]
    for name, quoted, condition, index in _STEP.findall(path.replace("\\.", "\x00")):
        field = (name or quoted).replace("\x00", ".").replace("\\", "")
        if field and field != "*":
            found = [item[field] for item in found if isinstance(item, dict) and field in item]
        elif index and index != "*":
            at = int(index)
            found = [item[at] for item in found if isinstance(item, list) and -len(item) <= at < len(item)]
        else:
            found = [value for item in found for value in (item.values() if isinstance(item, dict) else item or [])]
            found = [value for value in found if _holds(value, condition)] if condition else found
    return found


def _holds(item: Any, condition: str) -> bool:
    parsed = _FILTER.fullmatch(condition.strip())
    if not parsed or not isinstance(item, dict):
        return False
    path, operator, *texts = parsed.groups()
    wanted = next((text for text in texts if text is not None), "")
    return (field_value(item, path) == wanted) == (operator == "==")


def age(text: object) -> str:
    """The time since a timestamp, in the two units that kubectl shows."""
    try:
        seconds = int((dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(str(text))).total_seconds())
    except (TypeError, ValueError):
        return "<unknown>"
    return duration(max(seconds, 0))


def duration(seconds: int) -> str:
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if minutes < 2:
        return f"{seconds}s"
    if minutes < 10:
        return f"{minutes}m" + (f"{seconds % 60}s" if seconds % 60 else "")
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h" + (f"{minutes % 60}m" if minutes % 60 else "")
    if days < 2:
        return f"{hours}h"
    if days < 8:
        return f"{days}d" + (f"{hours % 24}h" if hours % 24 else "")
    return f"{days}d" if days < 730 else f"{days // 365}y"


def _created(obj: Json) -> str:
    return age(obj["metadata"].get("creationTimestamp"))


def _ready_containers(pod: Json) -> str:
    states = pod.get("status", {}).get("containerStatuses", [])
    return f"{sum(bool(s.get('ready')) for s in states)}/{len(pod['spec']['containers'])}"


def _pod_status(pod: Json) -> str:
    status = pod.get("status", {})
    shown = status.get("reason") or status.get("phase", "Unknown")
    for container in status.get("containerStatuses", []):
        state = container.get("state", {})
        waiting, ended = state.get("waiting", {}), state.get("terminated")
        if waiting.get("reason"):
            shown = waiting["reason"]
        elif ended:
            shown = ended.get("reason") or f"ExitCode:{ended.get('exitCode')}"
    return "Terminating" if pod["metadata"].get("deletionTimestamp") else shown


def _restarts(pod: Json) -> str:
    return str(sum(s.get("restartCount", 0) for s in pod.get("status", {}).get("containerStatuses", [])))


def _job_status(job: Json) -> str:
    conditions = job.get("status", {}).get("conditions", [])
    held = {condition["type"] for condition in conditions if condition["status"] == "True"}
    words = ["Complete", "Failed", "Suspended", "FailureTarget", "SuccessCriteriaMet"]
    if job["metadata"].get("deletionTimestamp"):
        return "Terminating"
    return next((word for word in words if word in held), "Running")


def _job_duration(job: Json) -> str:
    status = job.get("status", {})
    if "startTime" not in status:
        return ""
    start = dt.datetime.fromisoformat(status["startTime"])
    ended = status.get("completionTime")
    end = dt.datetime.fromisoformat(ended) if ended else dt.datetime.now(dt.UTC)
    return duration(int((end - start).total_seconds()))


def _involved(event: Json) -> str:
    about = event.get("involvedObject", {})
    return f"{about.get('kind', '').lower()}/{about.get('name', '')}"


def _last_seen(event: Json) -> str:
    return age(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp"))


def _node_status(node: Json) -> str:
    ready = json_path(node, '.status.conditions[?(@.type=="Ready")].status')
    return "Ready" if ready == ["True"] else "NotReady"


def _at(path: str, empty: object = "<none>") -> Callable[[Json], Any]:
    def read(obj: Json) -> Any:
        found = json_path(obj, path)
        return found[0] if found else empty

    return read


def _count(field: str) -> Callable[[Json], int]:
    return lambda obj: len(obj.get(field) or {})


Column = tuple[str, Callable[[Json], Any]]
_NAME: Column = ("Name", lambda obj: obj["metadata"]["name"])
_AGE: Column = ("Age", _created)
_READY: Column = ("Ready", lambda o: f"{o.get('status', {}).get('readyReplicas', 0)}/{o['spec'].get('replicas', 1)}")
_COLUMNS: dict[str, list[Column]] = {
    "pods": [
        ("Ready", _ready_containers),
        ("Status", _pod_status),
        ("Restarts", _restarts),
        _AGE,
        ("IP*", _at(".status.podIP")),
        ("Node*", _at(".spec.nodeName")),
    ],
    "jobs": [
        ("Status", _job_status),
        ("Completions", lambda o: f"{o.get('status', {}).get('succeeded', 0)}/{o['spec'].get('completions', 1)}"),
        ("Duration", _job_duration),
        _AGE,
        ("Containers*", lambda o: ",".join(c["name"] for c in o["spec"]["template"]["spec"]["containers"])),
        ("Images*", lambda o: ",".join(c["image"] for c in o["spec"]["template"]["spec"]["containers"])),
    ],
    "deployments": [_READY, ("Available", _at(".status.availableReplicas", 0)), _AGE],
    "statefulsets": [_READY, _AGE],
    "replicasets": [("Desired", _at(".spec.replicas", 0)), ("Current", _at(".status.replicas", 0)), _AGE],
    "services": [("Type", _at(".spec.type")), ("Cluster-IP", _at(".spec.clusterIP")), _AGE],
    "configmaps": [("Data", _count("data")), _AGE],
    "secrets": [("Type", _at(".type")), ("Data", _count("data")), _AGE],
    "namespaces": [("Status", _at(".status.phase")), _AGE],
    "nodes": [("Status", _node_status), _AGE, ("Version", _at(".status.nodeInfo.kubeletVersion"))],
    "leases": [("Holder", _at(".spec.holderIdentity", "")), _AGE],
    "customresourcedefinitions": [("Created At", _at(".metadata.creationTimestamp"))],
}
_EVENT_COLUMNS: list[Column] = [
    ("Last Seen", _last_seen),
    ("Type", _at(".type", "")),
    ("Reason", _at(".reason", "")),
    ("Object", _involved),
    ("Message", _at(".message", "")),
]


def table(resource: Resource, objects: list[Json], metadata: Json, include: str) -> Json:
    """A Table of the objects; each row carries the object's metadata unless the client wants all of it or nothing."""
    definitions, readers = _custom(resource) if resource.custom else _builtin(resource)
    rows = [{"cells": [read(obj) for read in readers], "object": _row_object(obj, include)} for obj in objects]
    head = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}
    return head | {"columnDefinitions": definitions, "rows": rows}


def _row_object(obj: Json, include: str) -> Json | None:
    if include == "Object":
        return obj
    partial = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}
    return None if include == "None" else partial


def _definition(name: str, kind: str = "string", priority: int = 0, **more: str) -> Json:
    format_ = "name" if name == "Name" else ""
    return {"name": name, "type": kind, "format": format_, "description": "", "priority": priority} | more


def _builtin(resource: Resource) -> tuple[list[Json], list[Callable[[Json], Any]]]:
    columns = _EVENT_COLUMNS if resource.plural == "events" else [_NAME, *_COLUMNS.get(resource.plural, [_AGE])]
    heads = [_definition(name.rstrip("*"), priority=int(name.endswith("*"))) for name, _ in columns]
    return heads, [read for _, read in columns]


def _custom(resource: Resource) -> tuple[list[Json], list[Callable[[Json], Any]]]:
    columns = list(resource.columns) or [{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}]
    heads = [_definition("Name")]
    heads += [_definition(c["name"], c["type"], c.get("priority", 0)) for c in columns]
    return heads, [_NAME[1], *(_cell(column) for column in columns)]


def _cell(column: Json) -> Callable[[Json], Any]:
    path, kind = column["jsonPath"], column["type"]

    def read(obj: Json) -> Any:
        found = json_path(obj, path)
        if not found:
            return None
        if kind == "date":
            return age(found[0])
        if kind == "string":
            return ",".join(item if isinstance(item, str) else json.dumps(item) for item in found)
        return found[0]

    return read
