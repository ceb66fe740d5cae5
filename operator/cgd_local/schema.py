"""Structural schemas: what a kind's fields are, and pruning, defaulting and validation by them.

A `Node` reads one place of a schema once and keeps what it compiled. The same nodes serve custom resources, the
built-in kinds (published schemas from kubernetes-validate), strategic merges (merge keys) and ownership (list types).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from importlib import resources
from typing import Any, Final

import kubernetes_validate

from cgd_local.rules import Rule, to_cel
from cgd_local.statuses import Cause, Json, duplicate, required, show, unsupported, wrong

ABSENT: Final = object()
METADATA = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
}
_FORMATS = {
    "date-time": r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)",
    "date": r"\d{4}-\d\d-\d\d",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:\S+",
    "uuid": r"(?i)[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}",
    "email": r"[^@\s]+@[^@\s]+",
    "duration": r"([+-]?(\d+(\.\d+)?|\.\d+)(ns|us|µs|ms|s|m|h))+|0",
    "byte": r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
}
_INT_BITS = {"int32": 31, "int64": 63}


@cache
def definitions() -> dict[str, Json]:
    """The published schemas of the built-in kinds, newest release; read once, never changed."""
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema"
    text = (folder / f"v{kubernetes_validate.latest_version()}-local" / "_definitions.json").read_text("utf-8")
    found: dict[str, Json] = json.loads(text)["$defs"]
    return found


@cache
def definition(name: str) -> Node:
    """The node of one published definition; those without fields (RawExtension, JSON) accept anything."""
    raw = definitions()[name]
    shapeless = not raw.keys() & {"properties", "additionalProperties", "items"} and raw.get("type") in (None, OBJECT)
    return Node(raw | {"x-kubernetes-preserve-unknown-fields": True} if shapeless and "oneOf" not in raw else raw)


OBJECT = ["object", "null"]


def node_of(raw: Json) -> Node:
    """The node of a raw schema, following a reference into the published definitions."""
    return definition(raw["$ref"].rsplit("/", 1)[-1]) if "$ref" in raw else Node(raw)


def root_node(raw: Json) -> Node:
    """The node of a whole custom resource: its schema, with apiVersion, kind and metadata as every object has them."""
    own = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"$ref": METADATA}}
    return Node(raw | {"type": "object", "properties": raw.get("properties", {}) | own})


class Node:
    """One place of a schema."""

    def __init__(self, raw: Json) -> None:
        self.raw = raw
        self.types = _types_of(raw)
        self.nullable = bool(raw.get("nullable"))
        self.preserve = bool(raw.get("x-kubernetes-preserve-unknown-fields"))
        self.required: list[str] = raw.get("required") or []
        self.list_type: str = raw.get("x-kubernetes-list-type", "atomic")
        self.map_keys: list[str] = raw.get("x-kubernetes-list-map-keys") or []
        self.atomic_map = raw.get("x-kubernetes-map-type") == "atomic"
        self.merge_key: str | None = raw.get("x-kubernetes-patch-merge-key")
        self.merges = "merge" in raw.get("x-kubernetes-patch-strategy", "")
        self.pattern = re.compile(raw["pattern"]) if raw.get("pattern") else None

    @cached_property
    def properties(self) -> dict[str, Node]:
        raw = self.raw.get("properties") or {}
        if self.raw.get("x-kubernetes-embedded-resource"):
            raw = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"$ref": METADATA}} | raw
        return {name: node_of(child) for name, child in raw.items()}

    @cached_property
    def additional(self) -> Node | None:
        raw = self.raw.get("additionalProperties")
        return None if raw in (None, False) else node_of({} if raw is True else raw)

    @cached_property
    def items(self) -> Node:
        return node_of(self.raw.get("items") or {"x-kubernetes-preserve-unknown-fields": True})

    @cached_property
    def rules(self) -> list[Rule]:
        return [Rule(raw) for raw in self.raw.get("x-kubernetes-validations") or []]

    @cached_property
    def branches(self) -> dict[str, list[Node]]:
        words = ["allOf", "anyOf", "oneOf"] if "type" in self.raw or not self.types else ["allOf", "anyOf"]
        return {word: [node_of(raw) for raw in self.raw.get(word) or []] for word in words}

    def child(self, name: str) -> Node | None:
        return self.properties.get(name) or self.additional

    def item_key(self, item: Any) -> tuple[Any, ...]:
        """What tells the items of a list-map apart; a missing protocol means TCP, the only key with a default."""
        return tuple(
            item.get(key, self.items.raw.get("properties", {}).get(key, {}).get("default", _KEY_DEFAULTS.get(key)))
            for key in self.map_keys
        )


_KEY_DEFAULTS = {"protocol": "TCP"}


def _types_of(raw: Json) -> set[str]:
    if raw.get("x-kubernetes-int-or-string"):
        return {"integer", "string"}
    alternatives = raw.get("oneOf") or []
    if "type" not in raw and alternatives and all(set(branch) == {"type"} for branch in alternatives):
        return set().union(*(_types_of(branch) for branch in alternatives))
    named = raw.get("type")
    return {named} if isinstance(named, str) else set(named or ()) - {"null"}


def drop_nulls(value: Any) -> Any:
    """A built-in object as its Go decoder would see it: a null field is an absent one."""
    match value:
        case dict():
            return {key: drop_nulls(item) for key, item in value.items() if item is not None}
        case list():
            return [drop_nulls(item) for item in value]
        case _:
            return value


def prune(node: Node, value: Any, path: str = "") -> list[str]:
    """Remove fields that the schema does not know, in place, and return their paths."""
    unknown: list[str] = []
    match value:
        case dict():
            for name in list(value):
                where = f"{path}.{name}" if path else name
                if child := node.child(name):
                    unknown += prune(child, value[name], where)
                elif not node.preserve:
                    unknown.append(where)
                    del value[name]
        case list():
            for index, item in enumerate(value):
                unknown += prune(node.items, item, f"{path}[{index}]")
    return unknown


def default(node: Node, value: Any) -> None:
    """Fill in the schema's defaults in place, outer ones first so that inner ones see them."""
    match value:
        case dict():
            for name, child in node.properties.items():
                unset = name not in value or (value[name] is None and not child.nullable)
                if unset and "default" in child.raw:
                    value[name] = copy.deepcopy(child.raw["default"])
            for name, item in value.items():
                if inner := node.child(name):
                    default(inner, item)
        case list():
            for item in value:
                default(node.items, item)


def validate(node: Node, value: Any, old: Any = ABSENT, path: str = "") -> list[Cause]:
    """Everything wrong with a value; CEL rules run only on a value whose shape is right, as in the real server."""
    return list(_shape(node, value, old, path)) or list(_rules(node, value, old, path))


def _shape(node: Node, value: Any, old: Any, path: str) -> Iterator[Cause]:
    if value == old:  # ratcheting: what was stored before a schema became stricter stays writable
        return
    if value is None and node.nullable:
        return
    if node.types and not any(_TYPES[name](value) for name in node.types):
        expected = " or ".join(sorted(node.types))
        message = f"Invalid value: {show(_type_name(value))}: {path} in body must be of type {expected}: "
        yield Cause(path, "FieldValueTypeInvalid", message + show(_type_name(value)))
        return
    yield from _scalar(node, value, path)
    match value:
        case dict():
            yield from _object(node, value, old, path)
        case list():
            yield from _array(node, value, old, path)
    yield from _alternatives(node, value, path)


def _type_name(value: Any) -> str:
    return next((name for name, test in _TYPES.items() if test(value)), "null")


def _scalar(node: Node, value: Any, path: str) -> Iterator[Cause]:
    raw = node.raw
    if (allowed := raw.get("enum")) and value not in allowed:
        yield unsupported(path, value, allowed)
    if isinstance(value, str):
        yield from _string(node, value, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from _number(raw, value, path)


def _string(node: Node, value: str, path: str) -> Iterator[Cause]:
    raw = node.raw
    if len(value) > raw.get("maxLength", len(value)):
        message = f"Too long: may not be more than {raw['maxLength']} bytes"
        yield Cause(path, "FieldValueTooLong", message)
    if len(value) < raw.get("minLength", 0):
        yield wrong(path, value, f"{path} in body should be at least {raw['minLength']} chars long")
    if node.pattern and not node.pattern.search(value):
        yield wrong(path, value, f"{path} in body should match '{raw['pattern']}'")
    shape = _FORMATS.get(raw.get("format", ""))
    if shape and not re.fullmatch(shape, value):
        yield wrong(path, value, f"{path} in body must be of type {raw['format']}: {show(value)}")


def _number(raw: Json, value: float, path: str) -> Iterator[Cause]:
    low, high = raw.get("minimum"), raw.get("maximum")
    if low is not None and (value < low or (value == low and raw.get("exclusiveMinimum"))):
        than = "greater than" if raw.get("exclusiveMinimum") else "greater than or equal to"
        yield wrong(path, value, f"{path} in body should be {than} {low}")
    if high is not None and (value > high or (value == high and raw.get("exclusiveMaximum"))):
        than = "less than" if raw.get("exclusiveMaximum") else "less than or equal to"
        yield wrong(path, value, f"{path} in body should be {than} {high}")
    if (step := raw.get("multipleOf")) and value % step:
        yield wrong(path, value, f"{path} in body should be a multiple of {step}")
    bits = _INT_BITS.get(raw.get("format", ""))
    if bits and not -(2**bits) <= value < 2**bits:
        yield wrong(path, value, f"{path} in body must be of type {raw['format']}: {show(value)}")


def _object(node: Node, value: Json, old: Any, path: str) -> Iterator[Cause]:
    for name in node.required:
        if name not in value:
            yield required(f"{path}.{name}" if path else name)
    if len(value) > node.raw.get("maxProperties", len(value)):
        yield wrong(path, value, f"{path} in body should have at most {node.raw['maxProperties']} properties")
    if len(value) < node.raw.get("minProperties", 0):
        yield wrong(path, value, f"{path} in body should have at least {node.raw['minProperties']} properties")
    for name, item in value.items():
        if child := node.child(name):
            before = old.get(name, ABSENT) if isinstance(old, dict) else ABSENT
            yield from _shape(child, item, before, f"{path}.{name}" if path else name)


def _array(node: Node, value: list[Any], old: Any, path: str) -> Iterator[Cause]:
    if len(value) > node.raw.get("maxItems", len(value)):
        message = f"Too many: {len(value)}: must have at most {node.raw['maxItems']} items"
        yield Cause(path, "FieldValueTooMany", message)
    if len(value) < node.raw.get("minItems", 0):
        yield wrong(path, value, f"{path} in body should have at least {node.raw['minItems']} items")
    for index, (item, before) in enumerate(_paired(node, value, old)):
        yield from _shape(node.items, item, before, f"{path}[{index}]")
    yield from _unique(node, value, path)


def _unique(node: Node, value: list[Any], path: str) -> Iterator[Cause]:
    if node.list_type == "atomic":
        return
    seen: set[str] = set()
    for index, item in enumerate(value):
        mapped = node.list_type == "map" and isinstance(item, dict)
        key = dict(zip(node.map_keys, node.item_key(item), strict=True)) if mapped else item
        text = json.dumps(key, sort_keys=True)
        if text in seen:
            yield duplicate(f"{path}[{index}]", text if mapped else key)
        seen.add(text)


def _paired(node: Node, value: list[Any], old: Any) -> Iterator[tuple[Any, Any]]:
    """Each item with its former self; only list-maps can tell which that is."""
    known = isinstance(old, list) and node.list_type == "map"
    before = {node.item_key(item): item for item in old if isinstance(item, dict)} if known else {}
    for item in value:
        yield item, before.get(node.item_key(item), ABSENT) if before and isinstance(item, dict) else ABSENT


def _alternatives(node: Node, value: Any, path: str) -> Iterator[Cause]:
    for part in node.branches["allOf"]:
        yield from _shape(part, value, ABSENT, path)
    if (options := node.branches["anyOf"]) and all(any(_shape(o, value, ABSENT, path)) for o in options):
        yield wrong(path, value, f"{path} in body must validate at least one schema (anyOf)")
    if choices := node.branches.get("oneOf"):
        fitting = sum(not any(_shape(o, value, ABSENT, path)) for o in choices)
        if fitting != 1:
            yield wrong(path, value, f"{path} in body must validate one and only one schema (oneOf)")
    if "not" in node.raw and not any(_shape(Node(node.raw["not"]), value, ABSENT, path)):
        yield wrong(path, value, f"{path} in body must not validate the schema (not)")


def _rules(node: Node, value: Any, old: Any, path: str) -> Iterator[Cause]:
    """CEL rules, deepest last; a transition rule runs only where a former value is known."""
    if value is None:
        return
    if node.rules:
        known = old is not ABSENT and old is not None
        now, before = to_cel(node, value), to_cel(node, old) if known else None
        causes = (rule.check(now, before, known=known, shown=value, path=path) for rule in node.rules)
        yield from filter(None, causes)
    match value:
        case dict():
            for name, item in value.items():
                former = old.get(name, ABSENT) if isinstance(old, dict) else ABSENT
                if child := node.child(name):
                    yield from _rules(child, item, former, f"{path}.{name}" if path else name)
        case list():
            for index, (item, former) in enumerate(_paired(node, value, old)):
                yield from _rules(node.items, item, former, f"{path}[{index}]")
