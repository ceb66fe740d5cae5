"""The published schemas of the built-in kinds (package kubernetes-validate), with rules that a real server has in code.

Here those defaults, bounds and fixed fields are schema, so that built-in and custom objects take the same way. The list
holds only what clients and controllers here can notice.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

import kubernetes_validate

from cgd_local.statuses import Json

METADATA = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
PRESERVE = "x-kubernetes-preserve-unknown-fields"
_WORD = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_LABEL = {"type": "string", "maxLength": 63, "pattern": "^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"}
_FIELDS: dict[str, dict[str, Json]] = {
    METADATA: {
        "name": {"maxLength": 253, "pattern": rf"^{_WORD}([.:]{_WORD})*$"},  # the colon is for roles
        "labels": {"additionalProperties": _LABEL},
    },
    "io.k8s.api.core.v1.PodSpec": {
        "restartPolicy": {"default": "Always", "enum": ["Always", "OnFailure", "Never"]},
        "terminationGracePeriodSeconds": {"default": 30},
    },
    "io.k8s.api.core.v1.Container": {
        "terminationMessagePath": {"default": "/dev/termination-log"},
        "terminationMessagePolicy": {"default": "File"},
    },
    "io.k8s.api.core.v1.Secret": {"type": {"default": "Opaque"}},
    "io.k8s.api.batch.v1.JobSpec": {
        "backoffLimit": {"default": 6},
        "parallelism": {"default": 1, "minimum": 0},
        "completionMode": {"default": "NonIndexed"},
        "suspend": {"default": False},
    },
    "io.k8s.api.admissionregistration.v1.ValidatingAdmissionPolicySpec": {"failurePolicy": {"default": "Fail"}},
    "io.k8s.api.admissionregistration.v1.MatchResources": {
        "matchPolicy": {"default": "Equivalent"},
        "namespaceSelector": {"default": {}},
        "objectSelector": {"default": {}},
    },
    "io.k8s.api.admissionregistration.v1.NamedRuleWithOperations": {"scope": {"default": "*"}},
    "io.k8s.api.admissionregistration.v1.Validation": {
        "reason": {"enum": ["Unauthorized", "Forbidden", "Invalid", "RequestEntityTooLarge"]},
    },
}
_RULES: dict[str, list[Json]] = {
    "io.k8s.api.batch.v1.JobSpec": [
        {
            "rule": "self.template.spec.restartPolicy != 'Always'",
            "message": 'valid values: "OnFailure", "Never"',
            "fieldPath": ".template.spec.restartPolicy",
        },
        {"rule": "self.template == oldSelf.template", "message": "field is immutable", "fieldPath": ".template"},
        {"rule": "self.completionMode == oldSelf.completionMode", "message": "completionMode is immutable"},
    ],
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition": [
        {
            "rule": "self.metadata.name == self.spec.names.plural + '.' + self.spec.group",
            "message": 'must be spec.names.plural+"."+spec.group',
            "fieldPath": ".metadata.name",
        },
        {"rule": "self.spec.versions.size() == 1", "message": "this server knows definitions of one version only"},
        {
            "rule": "self.spec.versions.all(v, has(v.schema) && has(v.schema.openAPIV3Schema))",
            "message": "schemas are required",
            "fieldPath": ".spec.versions",
        },
    ],
}


@cache
def definitions() -> dict[str, Json]:
    """The schemas of the newest release, by name. A schema without fields (RawExtension) accepts everything."""
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema"
    text = (folder / f"v{kubernetes_validate.latest_version()}-local" / "_definitions.json").read_text("utf-8")
    schemas: dict[str, Json] = json.loads(text)["$defs"]
    for raw in schemas.values():
        shaped = raw.keys() & {"properties", "additionalProperties", "items", "oneOf"}
        if not shaped and raw.get("type") in (None, ["object", "null"]):
            raw[PRESERVE] = True
    for name, fields in _FIELDS.items():
        for field, added in fields.items():
            schemas[name]["properties"][field] |= added
    for name, rules in _RULES.items():
        schemas[name]["x-kubernetes-validations"] = rules
    return schemas
