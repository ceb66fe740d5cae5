"""What the server serves, in the two forms that clients request: lists of groups and kinds, and OpenAPI v3."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from cgd_local.kinds import Resource
from cgd_local.published import definitions
from cgd_local.statuses import ApiError, Json

VERSION = {"major": "1", "minor": "37", "gitVersion": "v1.37.0", "platform": "local", "compiler": "cgd-local"}
_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
_PARTS = {"status": ["get", "patch", "update"], "log": ["get"], "binding": ["create"]}


def _by_api_version(resources: Iterable[Resource]) -> dict[str, list[Resource]]:
    grouped: dict[str, list[Resource]] = {}
    for resource in resources:
        grouped.setdefault(resource.api_version, []).append(resource)
    return grouped


def group_list(resources: Iterable[Resource]) -> Json:
    """The answer to /apis."""
    groups: dict[str, list[Json]] = {}
    for api_version in _by_api_version(resources):
        group, _, version = api_version.rpartition("/")
        groups.setdefault(group, []).append({"groupVersion": api_version, "version": version})
    listed = [
        {"name": name, "versions": versions, "preferredVersion": versions[0]}
        for name, versions in groups.items()
        if name
    ]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}


def resource_list(api_version: str, resources: Iterable[Resource]) -> Json:
    """The kinds of one group and version.

    Raises:
        ApiError: 404 if there are none.
    """
    listed: list[Json] = []
    for resource in _by_api_version(resources).get(api_version, []):
        common = {"namespaced": resource.namespaced, "kind": resource.kind}
        names = {"name": resource.plural, "singularName": resource.singular, "shortNames": resource.short}
        listed.append(common | names | {"verbs": _VERBS, "categories": resource.categories})
        listed += [
            common | {"name": f"{resource.plural}/{part}", "singularName": "", "verbs": _PARTS[part]}
            for part in resource.subresources
        ]
    if not listed:
        raise ApiError(404, "the server could not find the requested resource")
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": listed}


# --- OpenAPI v3


def _root(api_version: str) -> str:
    return f"apis/{api_version}" if "/" in api_version else f"api/{api_version}"


def openapi_index(resources: Iterable[Resource]) -> Json:
    """One document per group and version."""
    roots = [_root(api_version) for api_version in _by_api_version(resources)]
    return {"paths": {root: {"serverRelativeURL": f"/openapi/v3/{root}"} for root in roots}}


def openapi_document(api_version: str, resources: Iterable[Resource]) -> Json:
    """Schemas and paths of one group and version: as much as kubectl reads for apply, explain and validation."""
    listed = _by_api_version(resources).get(api_version, [])
    schemas = {resource.schema_name: resource.schema for resource in listed}
    todo: list[Json] = list(schemas.values())
    while todo:
        for name in set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(todo.pop()))) - schemas.keys():
            schemas[name] = definitions()[name]
            todo.append(schemas[name])
    parameters = [{"name": name, "in": "query"} for name in ("fieldValidation", "dryRun")]
    paths: Json = {}
    for resource in listed:
        (gvk,) = resource.schema["x-kubernetes-group-version-kind"]
        operation = {"x-kubernetes-group-version-kind": gvk, "parameters": parameters}
        verbs = dict.fromkeys(("get", "post", "patch"), operation)
        scope = "/namespaces/{namespace}" if resource.namespaced else ""
        collection = f"/{_root(resource.api_version)}{scope}/{resource.plural}"
        paths |= {collection: verbs, f"{collection}/{{name}}": verbs}
    info = {"title": "Kubernetes", "version": VERSION["gitVersion"]}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": _v3(schemas)}}


def _v3(raw: Any) -> Any:
    """A published JSON schema in OpenAPI's form: one type; a reference beside a description is wrapped."""
    match raw:
        case {"$ref": str(reference), **rest}:
            link = {"$ref": reference.replace("#/$defs/", "#/components/schemas/")}
            return {"allOf": [link], **rest} if rest else link
        case {"type": [str(name), *_], **rest}:
            return _v3(rest) | {"type": name}
        case dict():
            return {key: _v3(value) for key, value in raw.items()}
        case list():
            return [_v3(item) for item in raw]
        case _:
            return raw
