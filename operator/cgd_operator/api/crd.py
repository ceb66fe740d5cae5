"""The CustomResourceDefinition, generated from the models of `api`.

    python -m cgd_operator.api.crd > crds/cgdruns.yaml

Pydantic's JSON schema is not a structural schema: references are inlined, `anyOf` with null becomes an optional field,
and a default has no nulls. Defaults of objects are whole: the API server judges each by the rules of its schema, before
it fills in anything, and refuses a CRD with one that breaks them.
"""

import sys
from typing import Any

from pydantic.alias_generators import to_camel
from pydantic.json_schema import GenerateJsonSchema

from cgd_operator import yamls
from cgd_operator.api import GROUP, VERSION
from cgd_operator.api.fields import rules
from cgd_operator.api.spec import CGDRunSpec
from cgd_operator.api.status import CGDRunStatus
from cgd_stages.contract import MANIFEST, Contract, text_of

Schema = dict[str, Any]

COLUMNS = (
    ("State", ".status.state", "string"),
    ("Stage", ".status.stage", "string"),
    ("Progress", ".status.progress", "string"),
    ("ETA", ".status.eta", "string"),
    ("GPU-Hours", ".status.usage.gpuHours", "string"),
    ("Age", ".metadata.creationTimestamp", "date"),
)
WIDE = (("Reason", "reason"), ("Message", "message"))
"""Why a run has not succeeded, in `kubectl get cgd -o wide`: columns and what they show of the condition."""
NAME_RULE = ("self.metadata.name.size() <= 63", "the name of a CGDRun becomes a label: at most 63 characters")


def crd() -> Schema:
    """The whole CRD, ready for `kubectl apply`."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        # Helm leaves it when a release is uninstalled: with it would go every run.
        "metadata": {"name": f"cgdruns.{GROUP}", "annotations": {"helm.sh/resource-policy": "keep"}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": "CGDRun",
                "listKind": "CGDRunList",
                "plural": "cgdruns",
                "singular": "cgdrun",
                "shortNames": ["cgd"],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": _columns(),
                    "schema": {"openAPIV3Schema": _root()},
                }
            ],
        },
    }


def _columns() -> list[Schema]:
    why = '.status.conditions[?(@.type=="Succeeded")].'
    wide = [{"name": name, "jsonPath": why + part, "type": "string", "priority": 1} for name, part in WIDE]
    return [*({"name": name, "jsonPath": path, "type": kind} for name, path, kind in COLUMNS), *wide]


def _root() -> Schema:
    spec = structural(CGDRunSpec)
    mutable = {to_camel(name) for name in CGDRunSpec.MUTABLE}
    frozen = [_immutable(name) for name in spec["properties"] if name not in mutable]
    spec["x-kubernetes-validations"] = [*spec["x-kubernetes-validations"], *frozen]
    return {
        "type": "object",
        "description": "One run of Critique-Guided Distillation: prompts in; quadruples, a student and a report out.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": _status(),
        },
        **rules(NAME_RULE),
    }


def _status() -> Schema:
    """With a default, so that observedGeneration is there from birth: kstatus takes a run without one for current. Its
    lists have none: `kubectl wait` on their first item waits while they are missing, and fails where they are empty."""
    schema = structural(CGDRunStatus)
    for field in schema["properties"].values():
        if field.get("type") == "array":
            del field["default"]
    return schema | {"default": {}}


def _immutable(name: str) -> dict[str, str]:
    same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})"
    message = f"{name} cannot change: apply a new CGDRun under another name; it reuses the rows that are stored"
    return {"rule": same, "message": message, "fieldPath": f".{name}"}


class _AsManifest(GenerateJsonSchema):
    """Defaults as a manifest has them: numbers are texts."""

    def encode_default(self, default: Any) -> Any:
        if isinstance(default, Contract):
            return default.model_dump(by_alias=True, mode="json", context=MANIFEST)
        return text_of(default) if isinstance(default, float) else super().encode_default(default)


def structural(model: type[Contract]) -> Schema:
    """The structural schema of a model."""
    schema = model.model_json_schema(by_alias=True, schema_generator=_AsManifest)
    shaped: Schema = _shape(schema, schema.get("$defs", {}))
    return shaped


def _shape(node: Any, refs: Schema) -> Any:
    if isinstance(node, list):
        return [_shape(item, refs) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = refs[node["$ref"].rsplit("/", 1)[1]]
        return _shape({**target, **{key: value for key, value in node.items() if key != "$ref"}}, refs)
    if "anyOf" in node:
        (some,) = [option for option in node["anyOf"] if option.get("type") != "null"]
        rest = {key: value for key, value in node.items() if key not in ("anyOf", "default")}
        return _shape({**some, **rest}, refs)
    return _fields(node, refs)


def _fields(node: Schema, refs: Schema) -> Schema:
    shaped: Schema = {}
    for key, value in node.items():
        match key:
            case "title" | "$defs":
                continue
            case "properties":
                shaped[key] = {name: _shape(field, refs) for name, field in value.items()}
            case "additionalProperties" if value is True:
                shaped["x-kubernetes-preserve-unknown-fields"] = True
            case "additionalProperties" if value is not False:
                shaped[key] = _shape(value, refs)
            case "additionalProperties":
                continue
            case "const":
                shaped["enum"] = [value]
            case "default" | "enum" | "required" | "x-kubernetes-validations":
                shaped[key] = _present(value)
            case _:
                shaped[key] = _shape(value, refs)
    if isinstance(shaped.get("description"), str):
        shaped["description"] = " ".join(shaped["description"].split())
    return shaped


def _present(value: Any) -> Any:
    """Without what is null: such a field is one that is not there."""
    if isinstance(value, list):
        return [_present(item) for item in value]
    if isinstance(value, dict):
        return {name: _present(item) for name, item in value.items() if item is not None}
    return value


def to_yaml() -> str:
    """The text of `crds/cgdruns.yaml`."""
    head = "# Generated by `make crds` from operator/cgd_operator/api/.\n"
    return head + yamls.dump(crd())


if __name__ == "__main__":
    sys.stdout.write(to_yaml())
