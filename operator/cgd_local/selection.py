"""Label and field selectors: text in, a test of objects out.

Deviation: a field selector may name any field of any kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from cgd_local.statuses import Json, bad_request

Test = Callable[[Json], bool]
_REQUIREMENT = re.compile(
    r"(?P<absent>!)?\s*(?P<key>[\w./-]+)\s*"
    r"(?:(?P<sign>==|!=|=)\s*(?P<value>.*)|(?P<set>(?<=\s)in|notin)\s*\((?P<values>.*)\))?"
)


def selection(labels: str, fields: str) -> Test:
    """Both selectors at once; an empty one lets everything pass.

    Raises:
        ApiError: 400 for a selector that cannot be read.
    """
    tests = [_test(part, _label) for part in _split(labels)] + [_test(part, _field) for part in _split(fields)]
    return lambda obj: all(test(obj) for test in tests)


def wanted(labels: str) -> dict[str, set[str]]:
    """The labels that a selector asks to have one of some values; an object without is never chosen.

    Raises:
        ApiError: 400 for a selector that cannot be read.
    """
    found = [_read(part) for part in _split(labels)]
    return {one["key"]: _values(one) for one in found if one["sign"] in ("=", "==") or one["set"] == "in"}


def chooses(selector: Json, labels: Json) -> bool:
    """Whether a selector that is part of an object, with `matchLabels` and `matchExpressions`, chooses such labels."""
    wanted = [
        {"key": key, "operator": "In", "values": [value]} for key, value in selector.get("matchLabels", {}).items()
    ]
    return all(_holds(one, labels) for one in [*wanted, *selector.get("matchExpressions", [])])


def _holds(requirement: Json, labels: Json) -> bool:
    key, operator = requirement["key"], requirement["operator"]
    if operator in ("Exists", "DoesNotExist"):
        return bool((key in labels) == (operator == "Exists"))
    return bool((labels.get(key) in requirement["values"]) == (operator == "In"))


def _split(text: str) -> list[str]:
    """The requirements of a selector, at commas outside brackets."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _read(part: str) -> re.Match[str]:
    if found := _REQUIREMENT.fullmatch(part):
        return found
    raise bad_request(f"unable to parse requirement: found '{part}', expected: identifier, '!', 'in', '='")


def _values(found: re.Match[str]) -> set[str]:
    return {found["value"]} if found["sign"] else {value.strip() for value in found["values"].split(",")}


def _test(part: str, read: Callable[[Json, str], str | None]) -> Test:
    found = _read(part)
    key, sign = found["key"], found["sign"] or found["set"]
    if not sign:
        return lambda obj: (read(obj, key) is None) == bool(found["absent"])
    values = _values(found)
    return lambda obj: (read(obj, key) in values) != (sign in ("!=", "notin"))


def _label(obj: Json, key: str) -> str | None:
    found: str | None = obj["metadata"].get("labels", {}).get(key)
    return found


def _field(obj: Json, path: str) -> str:
    value: Any = obj
    for word in path.split("."):
        value = value.get(word, "") if isinstance(value, dict) else ""
    return str(value)
