"""Schemas of kinds, custom and built-in: pruning, defaulting, validation and CEL rules by them.

A schema is the plain dict that a CRD or the published package tells; a reference in it leads to a published definition.

Deviations: formats are not checked, `anyOf` and its sisters are refused with the CRD, what was stored before a schema
became stricter has to follow it at the next write, items of lists have no former selves for `oldSelf`, CEL is what the
package common-expression-language speaks (none of Kubernetes' own functions, no escaped names; `size` counts bytes).
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
"""What a CEL expression raises that compiles and has no value."""
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
    found = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
    if found is None or found is False:
        return None
    return ANYTHING if found is True else resolved(found)


def items(schema: Json) -> Json:
    return resolved(schema.get("items", ANYTHING))


def item_key(schema: Json, item: Json) -> str:
    """What tells the items of a list-map apart, as JSON; a key that is left out has its default."""
    keys = {}
    for name in schema["x-kubernetes-list-map-keys"]:
        keys[name] = item.get(name, (child(items(schema), name) or ANYTHING).get("default"))
    return json.dumps(keys, sort_keys=True, separators=(",", ":"))


def _parts(schema: Json, value: Any, path: str) -> Iterator[tuple[str | int, Json, Any, str]]:
    """The fields and items that the schema knows: name or index, schema, value, path."""
    match value:
        case dict():
            for name, item in value.items():
                if found := child(schema, name):
                    yield name, found, item, f"{path}.{name}".lstrip(".")
        case list():
            for index, item in enumerate(value):
                yield index, items(schema), item, f"{path}[{index}]"


def drop_nulls(value: Any) -> Any:
    """A built-in object as its Go decoder would see it: a null field is an absent one."""
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
    """Fill in the schema's defaults in place, outer ones first so that inner ones see them. A null where none may be
    is a field that is left out."""
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
    """Everything wrong with a value; CEL rules run only on a value whose shape is right, as in the real server. Parts
    that are the former value's own are right."""
    return list(_misshapen(schema, value, old, "")) or list(_broken(schema, value, old, ""))


def _misshapen(schema: Json, value: Any, old: Any, path: str) -> Iterator[Cause]:
    if value is None and schema.get("nullable"):
        return
    if value is old and isinstance(old, dict):
        return
    kind, allowed = _type(value), _types(schema)
    if allowed and kind not in allowed and not (kind == "integer" and "number" in allowed):
        told = f'Invalid value: "{kind}": {path} in body must be of type {" or ".join(sorted(allowed))}: "{kind}"'
        yield Cause(path, "FieldValueTypeInvalid", told)
        return
    yield from _out_of_bounds(schema, value, "number" if kind == "integer" else kind, path)
    for name, part, item, where in _parts(schema, value, path):
        yield from _misshapen(part, item, old.get(name) if isinstance(old, dict) else None, where)


def _type(value: Any) -> str:
    """The name of a value's type; 2.0 is an integer, as far as a float tells integers apart."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return "integer" if whole else _TYPES[type(value)]


def _types(schema: Json) -> set[str]:
    if schema.get("x-kubernetes-int-or-string"):
        return {"integer", "string"}
    named = schema.get("type", [])
    alternatives = [_types(option) for option in schema.get("oneOf", [])]
    return set().union([named] if isinstance(named, str) else named, *alternatives) - {"null"}


def _out_of_bounds(schema: Json, value: Any, kind: str, path: str) -> Iterator[Cause]:
    if "enum" in schema and value not in schema["enum"]:
        supported = ", ".join(map(show, schema["enum"]))
        told = f"Unsupported value: {show(value)}: supported values: {supported}"
        yield Cause(path, "FieldValueNotSupported", told)
    for word, (about, holds, told) in _LIMITS.items():
        if word in schema and about == kind and not holds(value, schema[word]):
            yield wrong(path, value, f"{path} in body {told.format(schema[word])}")
    if kind == "object":
        missing = [name for name in schema.get("required", []) if name not in value]
        yield from (required(f"{path}.{name}".lstrip(".")) for name in missing)
    if kind == "array":
        yield from _repeated(schema, value, path)


def _repeated(schema: Json, value: list[Any], path: str) -> Iterator[Cause]:
    """Items that a set or a list-map already has."""
    sort, seen = schema.get("x-kubernetes-list-type"), set()
    for index, item in enumerate(value if sort in ("set", "map") else []):
        key = item_key(schema, item) if sort == "map" and isinstance(item, dict) else json.dumps(item)
        if key in seen:
            yield Cause(f"{path}[{index}]", "FieldValueDuplicate", f"Duplicate value: {key}")
        seen.add(key)


@cache
def program(expression: str) -> cel.Program:
    """A compiled CEL expression.

    Raises:
        ValueError: with the place of a syntax error.
    """
    return cel.compile(expression)


def schema_causes(schema: Json, path: str) -> Iterator[Cause]:
    """What is wrong with a schema: a structural one names a type everywhere, its rules compile, and its defaults keep
    them as they stand, before the defaults of their parts are filled in."""
    if not (schema.get("type") or schema.get("x-kubernetes-int-or-string") or schema.get(PRESERVE)):
        yield required(f"{path}.type", "must not be empty for specified object fields")
    for word in schema.keys() & {"allOf", "anyOf", "oneOf", "not"}:
        yield wrong(f"{path}.{word}", schema[word], "this server does not know how to check it")
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
    """The CEL rules that a value breaks; a transition rule runs only where a former value is known. What has not
    changed is not judged again, as the real server's ratcheting has it."""
    if old is not None and value == old:
        return
    for rule in schema.get("x-kubernetes-validations", []) if value is not None else []:
        if told := _verdict(rule, value, old):
            where = (path + rule.get("fieldPath", "")).lstrip(".")
            yield wrong(where or "<nil>", value, told)
    for name, part, item, where in _parts(schema, value, path):
        before = old.get(name) if isinstance(old, dict) else None
        yield from _broken(part, item, before, where)


def _verdict(rule: Json, value: Any, old: Any) -> str:
    """Why a rule does not hold, nothing if it does."""
    expression: str = rule["rule"]
    if old is None and "oldSelf" in program(expression).variables():
        return ""
    context = cel.Context(variables={"self": value, "oldSelf": old})
    try:
        held = program(expression).execute(context)
    except EVALUATION_ERRORS as error:
        return f"rule evaluation error: {error}: {expression}"
    return "" if held is True else rule.get("message") or f"failed rule: {expression}"
