"""The target of a request: the object or collection that its path names, and the options in its query."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from cgd_local.bodies import read_apply, read_json
from cgd_local.kinds import Resource
from cgd_local.ownership import Write
from cgd_local.registry import Registry
from cgd_local.selection import Test, required_labels, selection
from cgd_local.statuses import ApiError, Json, bad_request
from cgd_local.store import Key, Shelf
from cgd_local.tables import table


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
