"""Tables: the columns that `kubectl get` prints, computed by the server as the real one does.

Every column is a JSONPath, also those of the built-in kinds: they are fewer and plainer than the real ones.
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
    """The value of a JSONPath as columns use it: fields, indexes and `[?(@.type=="Ready")]`; None if there is none."""
    for name, index, key, wanted in _STEP.findall(path):
        if name:
            obj = obj.get(name) if isinstance(obj, dict) else None
        else:
            listed = obj if isinstance(obj, list) else []
            chosen = [item for item in listed if index or (isinstance(item, dict) and item.get(key) == wanted)]
            obj = next(iter(chosen[int(index or 0) :]), None)
    return obj


def _cell(column: Json, obj: Json) -> Any:
    found = json_path(obj, column["jsonPath"])
    if column["type"] == "date" and found:
        return age(found)
    return json.dumps(found) if isinstance(found, (dict, list)) else found


def age(timestamp: str) -> str:
    """The time since then, in the one unit that fits best."""
    seconds = int((dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(timestamp)).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{max(seconds, 0)}s"


def table(resource: Resource, objects: list[Json], version: str, *, whole: bool) -> Json:
    """A Table of the objects; each row carries the object, or its metadata only."""
    name = {"name": "Name", "type": "string", "format": "name", "jsonPath": ".metadata.name"}
    columns = [name, *resource.columns]
    plain = {"format": "", "description": "", "priority": 0}
    heads = [plain | {word: value for word, value in c.items() if word != "jsonPath"} for c in columns]
    rows = [
        {"cells": [_cell(column, obj) for column in columns], "object": obj if whole else _partial(obj)}
        for obj in objects
    ]
    head = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": version}}
    return head | {"columnDefinitions": heads, "rows": rows}


def _partial(obj: Json) -> Json:
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}
