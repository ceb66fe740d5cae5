"""From a CustomResourceDefinition to served resources: its checks, its status, one resource per version."""

from __future__ import annotations

import re

from cgd_local.kinds import Resource
from cgd_local.rules import compile_errors
from cgd_local.schema import root_node
from cgd_local.statuses import Cause, Json, required, wrong


def crd_causes(crd: Json) -> list[Cause]:
    """What is wrong with a definition beyond its fields."""
    spec, name = crd["spec"], crd["metadata"]["name"]
    expected = f"{spec['names']['plural']}.{spec['group']}"
    causes = [] if name == expected else [wrong("metadata.name", name, 'must be spec.names.plural+"."+spec.group')]
    if sum(version["storage"] for version in spec["versions"]) != 1:
        causes.append(
            wrong("spec.versions", spec["versions"], "must have exactly one version marked as storage version")
        )
    for index, version in enumerate(spec["versions"]):
        path = f"spec.versions[{index}].schema.openAPIV3Schema"
        schema = version.get("schema", {}).get("openAPIV3Schema")
        causes += [required(path, "schemas are required")] if schema is None else _schema_causes(schema, path)
    return causes


def _schema_causes(schema: Json, path: str) -> list[Cause]:
    causes = _structural(schema, path)
    return causes or compile_errors(schema, path)


def _structural(schema: Json, path: str) -> list[Cause]:
    """A structural schema names a type everywhere and uses only patterns that compile."""
    causes: list[Cause] = []
    free = schema.get("x-kubernetes-int-or-string") or schema.get("x-kubernetes-preserve-unknown-fields")
    if not schema.get("type") and not free:
        causes.append(required(f"{path}.type", "must not be empty for specified object fields"))
    if schema.get("x-kubernetes-list-type") == "map" and not schema.get("x-kubernetes-list-map-keys"):
        causes.append(required(f"{path}.x-kubernetes-list-map-keys", "must not be empty if list type is map"))
    try:
        re.compile(schema.get("pattern", ""))
    except re.error as error:
        causes.append(wrong(f"{path}.pattern", schema["pattern"], f"must be a valid regular expression: {error}"))
    for name, child in schema.get("properties", {}).items():
        causes += _structural(child, f"{path}.properties[{name}]") if name != "metadata" else []
    for word in ("items", "additionalProperties"):
        if isinstance(schema.get(word), dict):
            causes += _structural(schema[word], f"{path}.{word}")
    return causes


def crd_status(crd: Json, now: str) -> Json:
    """The status that the real server's own controllers would write a moment later."""
    spec, status = crd["spec"], dict(crd.get("status") or {})
    storage = next(version["name"] for version in spec["versions"] if version["storage"])
    stored = status.get("storedVersions") or []
    told = {
        "NamesAccepted": ("NoConflicts", "no conflicts found"),
        "Established": ("InitialNamesAccepted", "the initial names have been accepted"),
    }
    status["conditions"] = status.get("conditions") or [
        {"type": kind, "status": "True", "lastTransitionTime": now, "reason": reason, "message": message}
        for kind, (reason, message) in told.items()
    ]
    return status | {
        "acceptedNames": _names(spec),
        "storedVersions": stored if storage in stored else [*stored, storage],
    }


def _names(spec: Json) -> Json:
    names: Json = spec["names"]
    return {"singular": names["kind"].lower(), "listKind": f"{names['kind']}List"} | names


def resources_of(crd: Json) -> list[Resource]:
    """One resource per served version."""
    spec = crd["spec"]
    names = _names(spec)
    return [
        Resource(
            group=spec["group"],
            version=version["name"],
            plural=names["plural"],
            singular=names["singular"],
            kind=names["kind"],
            namespaced=spec["scope"] == "Namespaced",
            short=tuple(names.get("shortNames", ())),
            categories=tuple(names.get("categories", ())),
            subresources=("status",) if "status" in version.get("subresources", {}) else (),
            custom=True,
            node=root_node(version["schema"]["openAPIV3Schema"]),
            schema=version["schema"]["openAPIV3Schema"],
            columns=tuple(version.get("additionalPrinterColumns", ())),
        )
        for version in spec["versions"]
        if version["served"]
    ]
