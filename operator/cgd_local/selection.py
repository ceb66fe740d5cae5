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
    """A test by both selectors; an empty selector chooses every object.

    Raises:
        ApiError: 400 for a selector that cannot be read.
    """

    def label(obj: Json, key: str) -> str | None:
        value: str | None = obj["metadata"].get("labels", {}).get(key)
        return value

    def field(obj: Json, path: str) -> str:
        value: Any = obj
        for word in path.split("."):
            value = value.get(word, "") if isinstance(value, dict) else ""
        return str(value)

    tests = [_test(part, label) for part in _split(labels)] + [_test(part, field) for part in _split(fields)]
    return lambda obj: all(test(obj) for test in tests)


def required_labels(labels: str) -> dict[str, set[str]]:
    """The labels that a selector requires, each with its possible values; no object without them is chosen.

    Raises:
        ApiError: 400 for a selector that cannot be read.
    """
    parts = [_read(part) for part in _split(labels)]
    return {part["key"]: _values(part) for part in parts if part["sign"] in ("=", "==") or part["set"] == "in"}


def chooses(selector: Json, labels: Json) -> bool:
    """Whether a selector in an object, with `matchLabels` and `matchExpressions`, chooses these labels."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for requirement in selector.get("matchExpressions", []):
        key, operator = requirement["key"], requirement["operator"]
        if operator in ("Exists", "DoesNotExist"):
            holds = (key in labels) == (operator == "Exists")
        else:
            holds = (labels.get(key) in requirement["values"]) == (operator == "In")
        if not holds:
            return False
    return True


def _split(text: str) -> list[str]:
    """The requirements of a selector, at commas outside brackets."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _read(part: str) -> re.Match[str]:
    if requirement := _REQUIREMENT.fullmatch(part):
        return requirement
    raise bad_request(f"unable to parse requirement: found '{part}', expected: identifier, '!', 'in', '='")


def _values(requirement: re.Match[str]) -> set[str]:
    if requirement["sign"]:
        return {requirement["value"]}
    return {value.strip() for value in requirement["values"].split(",")}


def _test(part: str, read: Callable[[Json, str], str | None]) -> Test:
    requirement = _read(part)
    key, sign = requirement["key"], requirement["sign"] or requirement["set"]
    if not sign:
        return lambda obj: (read(obj, key) is None) == bool(requirement["absent"])
    values = _values(requirement)
    return lambda obj: (read(obj, key) in values) != (sign in ("!=", "notin"))
