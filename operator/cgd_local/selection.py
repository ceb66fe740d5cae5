"""Label and field selectors: text in, a test of objects out."""

from __future__ import annotations

import re
from collections.abc import Callable

from cgd_local.kinds import Resource, field_value, selectable_fields
from cgd_local.statuses import Json, bad_request

Test = Callable[[Json], bool]
_REQUIREMENT = re.compile(
    r"\s*(?:(?P<key>[\w./-]+)\s+(?P<set>in|notin)\s*\((?P<values>[^)]*)\)"
    r"|(?P<left>[\w./-]+)\s*(?P<sign>==|!=|=)\s*(?P<right>[\w.-]*)"
    r"|(?P<absent>!)?\s*(?P<exists>[\w./-]+))\s*(?:,|$)"
)


def selection(resource: Resource, labels: str, fields: str) -> Test:
    """Both selectors at once; an empty one lets everything pass.

    Raises:
        ApiError: 400 for a selector that cannot be read or names a field that is not selectable.
    """
    tests = [*_label_tests(labels), *_field_tests(resource, fields)]
    return lambda obj: all(test(obj) for test in tests)


def _label_tests(text: str) -> list[Test]:
    tests: list[Test] = []
    at = 0
    while at < len(text.rstrip()):
        found = _REQUIREMENT.match(text, at)
        if not found or found.end() == at:
            raise bad_request(f"unable to parse requirement: found '{text[at:]}', expected: identifier, '!', 'in', '='")
        tests.append(_label_test(found))
        at = found.end()
    return tests


def _label_test(found: re.Match[str]) -> Test:
    key = found["key"] or found["left"] or found["exists"]
    if found["exists"]:
        return lambda obj: (key in _labels(obj)) != bool(found["absent"])
    values = {value.strip() for value in found["values"].split(",")} if found["key"] else {found["right"]}
    negated = found["set"] == "notin" or found["sign"] == "!="
    return lambda obj: (_labels(obj).get(key) in values) != negated


def _labels(obj: Json) -> dict[str, str]:
    return obj["metadata"].get("labels") or {}


def _field_tests(resource: Resource, text: str) -> list[Test]:
    tests: list[Test] = []
    for part in filter(None, re.split(r"(?<!\\),", text)):
        found = re.fullmatch(r"([^=!]+)(==|!=|=)(.*)", part)
        if not found:
            raise bad_request(f"invalid field selector: {part}")
        path, sign, wanted = found[1], found[2], re.sub(r"\\([,=\\])", r"\1", found[3])
        if path not in selectable_fields(resource):
            known = 'known field selectors are "metadata.name", "metadata.namespace"'
            raise bad_request(f"field label not supported: {path} ({known} and what the kind's documentation lists)")
        tests.append(_field_test(path, wanted, negated=sign == "!="))
    return tests


def _field_test(path: str, wanted: str, *, negated: bool) -> Test:
    return lambda obj: (field_value(obj, path) == wanted) != negated
