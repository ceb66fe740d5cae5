"""What the server serves, told in the three languages clients ask for: API lists, aggregated discovery, OpenAPI v3."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from cgd_local.kinds import VERBS, Resource
from cgd_local.schema import METADATA, definitions
from cgd_local.statuses import Json

VERSION = {"major": "1", "minor": "37", "gitVersion": "v1.37.0", "platform": "local", "compiler": "cgd-local"}
AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
_REVIEW = {"name": "selfsubjectaccessreviews", "kind": "SelfSubjectAccessReview", "group": "authorization.k8s.io"}
_SUBRESOURCES: dict[str, tuple[str, list[str]]] = {
    "status": ("", ["get", "patch", "update"]),
    "log": ("", ["get"]),
    "binding": ("Binding", ["create"]),
}


def by_group(resources: Iterable[Resource]) -> dict[str, dict[str, list[Resource]]]:
    """Resources by group and version, newest version first, the core group first."""
    groups: dict[str, dict[str, list[Resource]]] = {}
    for resource in resources:
        groups.setdefault(resource.group, {}).setdefault(resource.version, []).append(resource)
    return {name: dict(sorted(groups[name].items(), key=_maturity, reverse=True)) for name in sorted(groups)}


def _maturity(version: tuple[str, Any]) -> tuple[int, int, int]:
    """v2 before v1 before v1beta1 before v1alpha1."""
    found = re.fullmatch(r"v(\d+)(?:(alpha|beta)(\d+))?", version[0])
    if not found:
        return (-1, 0, 0)
    return ({None: 2, "beta": 1, "alpha": 0}[found[2]], int(found[1]), int(found[3] or 0))


def group_list(resources: Iterable[Resource]) -> Json:
    groups = [group_entry(name, list(versions)) for name, versions in by_group(resources).items() if name]
    groups.append(group_entry("authorization.k8s.io", ["v1"]))
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def group_entry(name: str, versions: list[str]) -> Json:
    listed = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def resource_list(group_version: str, resources: Iterable[Resource]) -> Json:
    """The classic list of one group and version."""
    listed = []
    for resource in resources:
        one = {"name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced}
        one |= {"kind": resource.kind, "verbs": VERBS, "shortNames": list(resource.short)}
        listed.append(one | {"categories": list(resource.categories)})
        for part in resource.subresources:
            kind, verbs = _SUBRESOURCES[part]
            sub = {"name": f"{resource.plural}/{part}", "singularName": "", "namespaced": resource.namespaced}
            listed.append(sub | {"kind": kind or resource.kind, "verbs": verbs})
    if group_version == "authorization.k8s.io/v1":
        review = {"name": _REVIEW["name"], "singularName": "", "namespaced": False}
        listed.append(review | {"kind": _REVIEW["kind"], "verbs": ["create"]})
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": listed}


def aggregated(resources: Iterable[Resource], *, core: bool) -> Json:
    """Everything under /api or /apis in one answer, the form that kubectl prefers."""
    groups = {name: versions for name, versions in by_group(resources).items() if (name == "") == core}
    items = [
        {
            "metadata": {"name": name, "creationTimestamp": None},
            "versions": [
                {"version": version, "resources": [_discovered(r) for r in listed], "freshness": "Current"}
                for version, listed in versions.items()
            ],
        }
        for name, versions in groups.items()
    ]
    head = {"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}}
    return head | {"items": items}


def _discovered(resource: Resource) -> Json:
    kind = {"group": resource.group, "version": resource.version, "kind": resource.kind}
    parts = [
        {"subresource": part, "responseKind": kind | ({"kind": other} if other else {}), "verbs": verbs}
        for part in resource.subresources
        for other, verbs in [_SUBRESOURCES[part]]
    ]
    return {
        "resource": resource.plural,
        "responseKind": kind,
        "scope": "Namespaced" if resource.namespaced else "Cluster",
        "singularResource": resource.singular,
        "verbs": VERBS,
        "shortNames": list(resource.short),
        "categories": list(resource.categories),
        "subresources": parts,
    }


# --- OpenAPI v3


def openapi_index(resources: Iterable[Resource]) -> Json:
    """One document per group and version; kubectl caches them by this hash."""
    paths = {}
    for group, versions in by_group(resources).items():
        for version, listed in versions.items():
            path = f"apis/{group}/{version}" if group else f"api/{version}"
            told = json.dumps([[r.plural, r.schema] for r in listed], sort_keys=True)
            digest = hashlib.sha256(told.encode()).hexdigest()[:32]
            paths[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash={digest}"}
    return {"paths": paths}


def openapi_document(resources: Iterable[Resource]) -> Json:
    """Schemas and the paths of one group and version: as much as kubectl reads for apply, explain and validation."""
    schemas: Json = {}
    paths: Json = {}
    for resource in resources:
        name = _schema_name(resource)
        gvk = {"group": resource.group, "version": resource.version, "kind": resource.kind}
        raw = _custom_schema(resource) if resource.custom else definitions()[name]
        schemas[name] = _v3(raw) | {"x-kubernetes-group-version-kind": [gvk]}
        for reference in sorted(_reached(raw)):
            schemas[reference] = schemas.get(reference) or _v3(definitions()[reference])
        paths |= _paths(resource, name, gvk)
    info = {"title": "Kubernetes", "version": VERSION["gitVersion"]}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def _schema_name(resource: Resource) -> str:
    if not resource.custom:
        return str(resource.schema["$ref"]).rsplit("/", 1)[1]
    return ".".join([*reversed(resource.group.split(".")), resource.version, resource.kind])


def _custom_schema(resource: Resource) -> Json:
    own = {word: {"type": "string", "description": f"The {word} of the object."} for word in ("apiVersion", "kind")}
    own |= {"metadata": {"$ref": f"#/$defs/{METADATA}"}}
    return resource.schema | {"type": "object", "properties": own | resource.schema.get("properties", {}) | own}


def _paths(resource: Resource, name: str, gvk: Json) -> Json:
    root = f"/apis/{resource.group}/{resource.version}" if resource.group else f"/api/{resource.version}"
    scope = "/namespaces/{namespace}" if resource.namespaced else ""
    body = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
    operation = {"x-kubernetes-group-version-kind": gvk, "responses": {"200": body | {"description": "OK"}}}
    strict = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
    writing = operation | {"parameters": [strict, strict | {"name": "dryRun"}]}
    get, listing = operation | {"x-kubernetes-action": "get"}, operation | {"x-kubernetes-action": "list"}
    patch, post = writing | {"x-kubernetes-action": "patch"}, writing | {"x-kubernetes-action": "post"}
    collection = f"{root}{scope}/{resource.plural}"
    return {collection: {"get": listing, "post": post}, f"{collection}/{{name}}": {"get": get, "patch": patch}}


@cache
def _reach_of(name: str) -> frozenset[str]:
    found = {name}
    todo = [name]
    while todo:
        fresh = _references(definitions()[todo.pop()]) - found
        found |= fresh
        todo += fresh
    return frozenset(found)


def _reached(raw: Json) -> set[str]:
    return set().union(*(_reach_of(name) for name in _references(raw)))


def _references(raw: Any) -> set[str]:
    match raw:
        case dict():
            here = {raw["$ref"].rsplit("/", 1)[1]} if isinstance(raw.get("$ref"), str) else set()
            return here.union(*(_references(value) for value in raw.values()))
        case list():
            return set().union(*(_references(value) for value in raw))
        case _:
            return set()


def _v3(raw: Any) -> Any:
    """A published JSON schema in OpenAPI's words: one type, references to components wrapped beside a description."""
    match raw:
        case {"$ref": str(reference)}:
            link = {"$ref": "#/components/schemas/" + reference.rsplit("/", 1)[1]}
            rest = {key: value for key, value in raw.items() if key != "$ref"}
            return {"allOf": [link], "default": {}} | rest if rest else link
        case dict():
            told = {key: _v3(value) for key, value in raw.items()}
            if isinstance(raw.get("type"), list):
                told["type"] = next(name for name in raw["type"] if name != "null")
            return told
        case list():
            return [_v3(item) for item in raw]
        case _:
            return raw
