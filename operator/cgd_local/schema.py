"""Schemas of custom and built-in kinds: pruning, defaults, validation and CEL rules.

A schema is the plain dict from a CRD or the published package; its references lead to published definitions.

Deviations: formats are not checked; the server refuses a CRD with `anyOf`, `allOf`, `oneOf` or `not`; an object that
was stored before its schema became stricter must follow it at the next write; items of lists have no `oldSelf`; CEL is
that of the package common-expression-language (none of Kubernetes' own functions, no escaped names; `size` counts
bytes).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import cel

from cgd_local.published import PRESERVE, definitions
from cgd_local.statuses import Cause, Json, required, show, wrong

ANYTHING: Json = {PRESERVE: True}
EVALUATION_ERRORS = (KeyError, TypeError, ValueError, RuntimeError, IndexError, ArithmeticError)
"""The errors of a CEL expression that compiles and has no value."""
_TYPES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}
_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool], str]] = {
    "minimum": ("number", lambda value, limit: value >= limit, "should be greater than or equal to {}"),
    "maximum": ("number", lambda value, limit: value <= limit, "should be less than or equal to {}"),
    "minLength": ("string", lambda value, limit: len(value) >= limit, "should be at least {} chars long"),
    "maxLength": ("string", lambda value, limit: len(value) <= limit, "should be at most {} chars long"),
    "pattern": ("string", lambda value, limit: bool(re.search(limit, value)), "should match '{}'"),
    "minItems": ("array", lambda value, limit: len(value) >= limit, "should have at least {} items"),
    "maxItems": ("array", lambda value, limit: len(value) <= limit, "should have at most {} items"),
    "minProperties": ("object", lambda value, limit: len(value) >= limit, "should have at least {} properties"),
    "maxProperties": ("object", lambda value, limit: len(value) <= limit, "should have at most {} properties"),
}


def resolved(schema: Json) -> Json:
    return definitions()[schema["$ref"].rsplit("/", 1)[-1]] if "$ref" in schema else schema


def child(schema: Json, name: str) -> Json | None:
    """The schema of a field, None for a field that the schema does not know."""
    field = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
    if field is None or field is False:
        return None
    return ANYTHING if field is True else resolved(field)


def items(schema: Json) -> Json:
    return resolved(schema.get("items", ANYTHING))


def item_key(schema: Json, item: Json) -> str:
    """The keys of an item of a list-map, as JSON; a missing key has its default."""
    keys = {}
    for name in schema["x-kubernetes-list-map-keys"]:
        keys[name] = item.get(name, (child(items(schema), name) or ANYTHING).get("default"))
    return json.dumps(keys, sort_keys=True, separators=(",", ":"))


def _parts(schema: Json, value: Any, path: str) -> Iterator[tuple[str | int, Json, Any, str]]:
    """The fields and items that the schema knows: name or index, schema, value, path."""
    match value:
        case dict():
            for name, item in value.items():
                if field := child(schema, name):
                    yield name, field, item, f"{path}.{name}".lstrip(".")
        case list():
            for index, item in enumerate(value):
                yield index, items(schema), item, f"{path}[{index}]"


def drop_nulls(value: Any) -> Any:
    """A built-in object as its Go decoder sees it: a null field counts as missing."""
    match value:
        case dict():
            return {key: drop_nulls(item) for key, item in value.items() if item is not None}
        case list():
            return [drop_nulls(item) for item in value]
        case _:
            return value


def prune(schema: Json, value: Any, path: str = "") -> list[str]:
    """Remove fields that the schema does not know, in place, and return their paths."""
    unknown = []
    if isinstance(value, dict) and not schema.get(PRESERVE):
        for name in [name for name in value if child(schema, name) is None]:
            unknown.append(f"{path}.{name}".lstrip("."))
            del value[name]
    for _, part, item, where in _parts(schema, value, path):
        unknown += prune(part, item, where)
    return unknown


def default(schema: Json, value: Any) -> None:
    """Set the schema's defaults in place, outer before inner. A null in a field that is not nullable counts as
    missing."""
    if isinstance(value, dict):
        for name in [name for name, item in value.items() if item is None]:
            if not (child(schema, name) or {"nullable": True}).get("nullable"):
                del value[name]
        for name, raw in schema.get("properties", {}).items():
            if name not in value and "default" in raw:
                value[name] = copy.deepcopy(raw["default"])
    for _, part, item, _ in _parts(schema, value, ""):
        default(part, item)


def validate(schema: Json, value: Any, old: Any = None) -> list[Cause]:
    """All errors in a value. CEL rules run only on a value of the right shape, as in the real server. Parts that are
    the same objects as in the old value are not checked."""
    return list(_misshapen(schema, value, old, "")) or list(_broken(schema, _readable(value), _readable(old), ""))


def _readable(value: Any) -> Any:
    """An object as rules read it: of its metadata the names alone, as in the real server."""
    if not isinstance(value, dict) or not isinstance(metadata := value.get("metadata"), dict):
        return value
    return value | {"metadata": {word: metadata[word] for word in ("name", "generateName") if word in metadata}}


def _misshapen(schema: Json, value: Any, old: Any, path: str) -> Iterator[Cause]:
    if value is None and schema.get("nullable"):
        return
    if value is old and isinstance(old, dict):
        return
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53  # 2.0 is an integer
    kind = "integer" if is_whole else _TYPES[type(value)]
    allowed = {kind} if kind == schema.get("type") else _types(schema)
    if allowed and kind not in allowed and not (kind == "integer" and "number" in allowed):
        message = f'Invalid value: "{kind}": {path} in body must be of type {" or ".join(sorted(allowed))}: "{kind}"'
        yield Cause(path, "FieldValueTypeInvalid", message)
        return
    yield from _out_of_bounds(schema, value, "number" if kind == "integer" else kind, path)
    for name, part, item, where in _parts(schema, value, path):
        yield from _misshapen(part, item, old.get(name) if isinstance(old, dict) else None, where)


def _types(schema: Json) -> set[str]:
    if schema.get("x-kubernetes-int-or-string"):
        return {"integer", "string"}
    named = schema.get("type", [])
    alternatives = [_types(option) for option in schema.get("oneOf", [])]
    return set().union([named] if isinstance(named, str) else named, *alternatives) - {"null"}


def _out_of_bounds(schema: Json, value: Any, kind: str, path: str) -> Iterator[Cause]:
    if "enum" in schema and value not in schema["enum"]:
        supported = ", ".join(map(show, schema["enum"]))
        yield Cause(path, "FieldValueNotSupported", f"Unsupported value: {show(value)}: supported values: {supported}")
    for word, (limited_kind, holds, message) in () if _LIMITS.keys().isdisjoint(schema) else _LIMITS.items():
        if word in schema and limited_kind == kind and not holds(value, schema[word]):
            yield wrong(path, value, f"{path} in body {message.format(schema[word])}")
    if kind == "object":
        missing = [name for name in schema.get("required", []) if name not in value]
        yield from (required(f"{path}.{name}".lstrip(".")) for name in missing)
    sort, seen = schema.get("x-kubernetes-list-type"), set()
    for index, item in enumerate(value if kind == "array" and sort in ("set", "map") else []):
        key = item_key(schema, item) if sort == "map" and isinstance(item, dict) else json.dumps(item)
        if key in seen:
            yield Cause(f"{path}[{index}]", "FieldValueDuplicate", f"Duplicate value: {key}")
        seen.add(key)


@cache
def program(expression: str) -> cel.Program:
    """A compiled CEL expression.

    Raises:
        ValueError: with the position of a syntax error.
    """
    return cel.compile(expression)


def schema_causes(schema: Json, path: str) -> Iterator[Cause]:
    """The errors in a schema: a structural schema sets a type everywhere, its rules compile, and its defaults are valid
    even before their parts get defaults."""
    if not (schema.get("type") or schema.get("x-kubernetes-int-or-string") or schema.get(PRESERVE)):
        yield required(f"{path}.type", "must not be empty for specified object fields")
    for word in schema.keys() & {"allOf", "anyOf", "oneOf", "not"}:
        yield wrong(f"{path}.{word}", schema[word], "this server cannot check it")
    for index, rule in enumerate(schema.get("x-kubernetes-validations", [])):
        try:
            program(rule["rule"])
        except ValueError as error:
            where = f"{path}.x-kubernetes-validations[{index}].rule"
            yield wrong(where, rule["rule"], f"compilation failed: {error}")
    if "default" in schema:
        for cause in validate(schema, schema["default"]):
            yield cause._replace(field=f"{path}.default")
    parts = {f"properties[{name}]": part for name, part in schema.get("properties", {}).items()}
    parts |= {word: schema.get(word) for word in ("items", "additionalProperties")}
    for word, part in parts.items():
        if isinstance(part, dict):
            yield from schema_causes(part, f"{path}.{word}")


def _broken(schema: Json, value: Any, old: Any, path: str) -> Iterator[Cause]:
    """The CEL rules that a value breaks. A transition rule runs only if there is an old value; unchanged parts are not
    judged again, as in the real server's ratcheting."""
    if old is not None and value == old:
        return
    rules = schema.get("x-kubernetes-validations", []) if value is not None else []
    moves = [rule for rule in rules if "oldSelf" in program(rule["rule"]).variables()]
    if old is None:
        rules = [rule for rule in rules if rule not in moves]
    if rules:
        # A context converts its values, which takes longer than a rule: one for all rules, with no more than they read.
        context = cel.Context(variables={"self": value, "oldSelf": old} if moves else {"self": value})
        for rule in rules:
            if message := _verdict(rule, context):
                where = (path + rule.get("fieldPath", "")).lstrip(".")
                yield wrong(where or "<nil>", value, message)
    for name, part, item, where in _parts(schema, value, path):
        before = old.get(name) if isinstance(old, dict) else None
        yield from _broken(part, item, before, where)


def _verdict(rule: Json, context: cel.Context) -> str:
    """Why a rule does not hold; empty if it holds."""
    expression: str = rule["rule"]
    try:
        result = program(expression).execute(context)
    except EVALUATION_ERRORS as error:
        return f"rule evaluation error: {error}: {expression}"
    return "" if result is True else rule.get("message") or f"failed rule: {expression}"
