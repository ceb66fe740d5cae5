"""Tables: the columns that `kubectl get` prints, which the server computes.

Each column is a JSONPath, also of built-in kinds, which have fewer and plainer columns than in the real server.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import Any

from cgd_local.kinds import Resource
from cgd_local.statuses import Json

_STEP = re.compile(r'\.([\w-]+)|\[(-?\d+)\]|\[\?\(@\.(\w+)\s*==\s*"(.*?)"\)\]')


def json_path(obj: Any, path: str) -> Any:
    """The value at a column's JSONPath: fields, indexes and `[?(@.type=="Ready")]`; None if there is no value."""
    for name, index, key, value in _STEP.findall(path):
        if name:
            obj = obj.get(name) if isinstance(obj, dict) else None
        else:
            listed = obj if isinstance(obj, list) else []
            chosen = [item for item in listed if index or (isinstance(item, dict) and item.get(key) == value)]
            obj = next(iter(chosen[int(index or 0) :]), None)
    return obj


def _cell(column: Json, obj: Json) -> Any:
    value = json_path(obj, column["jsonPath"])
    if column["type"] == "date" and value:
        return age(value)
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def age(timestamp: str) -> str:
    """The time since `timestamp`, in the unit that fits best."""
    seconds = int((dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(timestamp)).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{max(seconds, 0)}s"


def table(resource: Resource, objects: list[Json], version: str, *, whole: bool) -> Json:
    """A Table of the objects; each row holds the object (`whole`) or only its metadata."""
    name = {"name": "Name", "type": "string", "format": "name", "jsonPath": ".metadata.name"}
    columns = [name, *resource.columns]
    defaults = {"format": "", "description": "", "priority": 0}
    heads = [defaults | {word: value for word, value in column.items() if word != "jsonPath"} for column in columns]
    partial = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}
    rows = []
    for obj in objects:
        held = obj if whole else partial | {"metadata": obj["metadata"]}
        rows.append({"cells": [_cell(column, obj) for column in columns], "object": held})
    head = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": version}}
    return head | {"columnDefinitions": heads, "rows": rows}
