"""A request as the API server reads it: the object or collection that its path names, the options in its query, its
body, and the table that it may ask for.

A body of an apply is read as by Go's YAML reader (go.yaml.in/yaml/v2 2.4), every other body as by Go's JSON reader. The
YAML reader, as played here, refuses some JSON: escapes of half a character, even two halves in a row, and control
characters that are not escaped. The JSON reader turns half a character into U+FFFD.

Each column of a table is a JSONPath, also of built-in kinds, which have fewer and plainer columns than in the real
server.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import re
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from cgd_local.kinds import Resource
from cgd_local.ownership import Write
from cgd_local.registry import Registry
from cgd_local.selection import Test, required_labels, selection
from cgd_local.statuses import ApiError, Json, bad_request
from cgd_local.store import Key, Shelf

_NOT_AS_IT_IS = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""The real reader does not refuse U+0085, U+2028 and U+2029: it takes them for line breaks and loses them."""
_NO_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\(?:/|u[dD][89a-fA-F])")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_STEP = re.compile(r'\.([\w-]+)|\[(-?\d+)\]|\[\?\(@\.(\w+)\s*==\s*"(.*?)"\)\]')


@dataclass(frozen=True)
class Target:
    """A request with its parsed path."""

    request: web.Request
    resource: Resource
    namespace: str
    name: str
    subresource: str

    @classmethod
    def of(cls, request: web.Request, registry: Registry, words: list[str]) -> Target:
        """The target of a path below /api or /apis.

        Raises:
            ApiError: 404 for a path that the server does not serve.
        """
        depth = 2 if words[0] == "api" else 3
        api_version, rest, namespace = "/".join(words[1:depth]), words[depth:], ""
        if rest[0] == "namespaces" and len(rest) > 2 and rest[2] != "status":
            namespace, rest = rest[1], rest[2:]
        plural, name, subresource = (*rest, "", "")[:3]
        resource = registry.resources.get(".".join([plural, *api_version.split("/")[:-1]]))
        if resource is None or resource.api_version != api_version or len(rest) > 3:
            raise ApiError(404, "the server could not find the requested resource")
        if (subresource and subresource not in resource.subresources) or (namespace and not resource.namespaced):
            raise ApiError(404, "the server could not find the requested resource")
        return cls(request, resource, namespace, name, subresource)

    @property
    def key(self) -> Key:
        return (self.namespace, self.name)

    def text(self, name: str) -> str:
        return self.request.query.get(name, "")

    def flag(self, name: str) -> bool:
        return self.text(name).lower() in ("true", "1")

    def number(self, name: str) -> int:
        if not (text := self.text(name) or "0").isdecimal():
            raise bad_request(f'{name}: Invalid value: "{text}": must be a number')
        return int(text)

    def page(self, objects: list[Json]) -> tuple[list[Json], Json]:
        """The requested part of a list, and the metadata about the rest.

        Raises:
            ApiError: 400 for a token that the server did not make.
        """
        size = self.number("limit")
        if token := self.text("continue"):
            try:
                after = tuple(json.loads(base64.urlsafe_b64decode(token)))
            except ValueError as error:
                raise bad_request("continue key is not valid") from error
            objects = [obj for obj in objects if _place(obj) > after]
        if not size or len(objects) <= size:
            return objects, {}
        last = base64.urlsafe_b64encode(json.dumps(_place(objects[size - 1])).encode()).decode()
        return objects[:size], {"continue": last, "remainingItemCount": len(objects) - size}

    def chosen(self) -> Test:
        return selection(self.text("labelSelector"), self.text("fieldSelector"))

    def objects(self, shelf: Shelf) -> list[Json]:
        """The objects that the selectors choose."""
        chosen = self.chosen()
        return [obj for obj in shelf.within(self.namespace, required_labels(self.text("labelSelector"))) if chosen(obj)]

    def table(self, objects: list[Json], version: str) -> Json | None:
        """The objects as rows to print, if the client accepts a Table."""
        if "as=Table" not in self.request.headers.get("Accept", "").split(",")[0]:
            return None
        return table(self.resource, objects, version, whole=self.text("includeObject") == "Object")

    def write(self, operation: str = "Update") -> Write:
        agent = self.request.headers.get("User-Agent", "unknown").split("/")[0]
        part = "" if self.subresource == "binding" else self.subresource
        return Write(
            manager=self.text("fieldManager") or agent,
            api_version=self.resource.api_version,
            subresource=part,
            operation=operation,
            strict=self.text("fieldValidation") == "Strict",
            dry_run=self.text("dryRun") == "All",
            force=self.flag("force"),
        )

    async def body(self) -> Any:
        """The body, which must be JSON.

        Raises:
            ApiError: 400 if it is not JSON, or the real server would not read it.
        """
        if self.request.content_type == "application/vnd.kubernetes.protobuf":
            raise ApiError(415, "this server does not speak protobuf: use a file and `kubectl apply -f`")
        try:
            text = (await self.request.read()).decode()
        except UnicodeDecodeError as error:
            raise bad_request(f"error decoding the body: {error}") from error
        applies = self.request.content_type == "application/apply-patch+yaml"
        return read_apply(text) if applies else read_json(text)


def _place(obj: Json) -> Key:
    """The position of an object in a list."""
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


# --- bodies


def read_json(text: str) -> Any:
    """The body of a request.

    Raises:
        ApiError: 400 if it is not JSON.
    """
    body = _loads(text)
    if _HALF.search(text):
        halves = json.dumps(body, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
        body = _loads(halves.decode("utf-16-le", "replace"))
    return body


def read_apply(text: str) -> Any:
    """The body of an apply, which must be JSON as well.

    Raises:
        ApiError: 400 if it is not JSON, or the YAML reader refuses it.
    """
    if not text.isascii() or "\x7f" in text:
        _refuse(_NOT_AS_IT_IS.search(text), "control characters are not allowed")
    if "\\" in text:
        _refuse(_NO_ESCAPE.search(text), "found invalid Unicode character escape code")
    return _loads(text)


def _refuse(offence: re.Match[str] | None, why: str) -> None:
    if offence:
        raise bad_request(f"error decoding YAML: error converting YAML to JSON: yaml: {why}: {offence[0]!a}")


def _loads(text: str) -> Any:
    def integer(digits: str) -> int | float:
        """A number beyond 64 bits is a float, even without a point."""
        number = int(digits)
        return number if -(2**63) <= number < 2**63 else float(number)

    try:
        return json.loads(text, parse_int=integer)
    except ValueError as error:
        raise bad_request(f"error decoding the body: {error}") from error


# --- tables


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
        cells = []
        for column in columns:
            value = json_path(obj, column["jsonPath"])
            if column["type"] == "date" and value:
                value = age(value)
            cells.append(json.dumps(value) if isinstance(value, (dict, list)) else value)
        rows.append({"cells": cells, "object": obj if whole else partial | {"metadata": obj["metadata"]}})
    head = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": version}}
    return head | {"columnDefinitions": heads, "rows": rows}
