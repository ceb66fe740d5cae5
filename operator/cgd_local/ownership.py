"""Who owns which field (`managedFields`), and server-side apply, which depends on it.

Ownership is a set of paths. A path is a tuple of FieldsV1 words (`f:spec`, `k:{"type":"Ready"}`, `v:"x"`) that ends at
a value without owned parts. Each write names a manager. A manager that writes a value takes its path from managers that
wrote another value there.

Deviation: items of list-maps have no path of their own (no `.` in FieldsV1); they exist as long as their fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cgd_local.schema import ANYTHING, child, item_key, items
from cgd_local.statuses import ApiError, Cause, Json

Path = tuple[str, ...]

_SERVER_OWNED = {"name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "selfLink"}
_SERVER_OWNED |= {"managedFields", "deletionTimestamp", "deletionGracePeriodSeconds"}


@dataclass(frozen=True, kw_only=True)
class Write:
    """Who writes and where (an entry of managedFields), how strictly, and whether it is a dry run."""

    manager: str
    api_version: str
    subresource: str = ""
    operation: str = "Update"
    strict: bool = False
    dry_run: bool = False
    force: bool = False

    def entry(self, fields: Iterable[Path], now: str) -> Json:
        entry: Json = {"manager": self.manager, "operation": self.operation, "apiVersion": self.api_version}
        entry |= {"time": now, "fieldsType": "FieldsV1", "fieldsV1": encode(fields)}
        return entry | ({"subresource": self.subresource} if self.subresource else {})

    def wrote(self, entry: Json) -> bool:
        writer = (entry["manager"], entry["operation"], entry.get("subresource", ""))
        return writer == (self.manager, self.operation, self.subresource)


def encode(fields: Iterable[Path]) -> Json:
    """Paths as a FieldsV1 tree."""
    tree: Json = {}
    for path in sorted(fields):
        place = tree
        for word in path:
            place = place.setdefault(word, {})
    return tree


def decode(tree: Json, path: Path = ()) -> set[Path]:
    """The paths of a FieldsV1 tree."""
    if not tree:
        return {path} if path else set()
    return set().union(*(decode(below, (*path, word)) for word, below in tree.items()))


# --- the places of a value


def _parts(schema: Json, value: Any) -> dict[str, tuple[Json, Any]]:
    """The parts of a value that have owners of their own: word -> schema and part. An atomic value has none."""
    sort = schema.get("x-kubernetes-list-type")
    if isinstance(value, dict) and schema.get("x-kubernetes-map-type") != "atomic":
        return {f"f:{name}": (child(schema, name) or ANYTHING, item) for name, item in value.items()}
    if isinstance(value, list) and sort == "map":
        return {f"k:{item_key(schema, item)}": (items(schema), item) for item in value}
    if isinstance(value, list) and sort == "set":
        return {f"v:{json.dumps(item)}": (ANYTHING, item) for item in value}
    return {}


def _leaves(schema: Json, value: Any, path: Path = ()) -> dict[Path, Any]:
    """Every path of a value, with the value at its end."""
    parts = _parts(schema, value)
    leaves = {} if parts else {path: value}
    for word, (part_schema, part) in parts.items():
        leaves |= _leaves(part_schema, part, (*path, word))
    return leaves


def _without(body: Json, words: set[str]) -> Json:
    return {word: value for word, value in body.items() if word not in words}


def _owned(schema: Json, body: Json, subresource: str = "") -> dict[Path, Any]:
    """The paths of an object that clients own: not its identity, and for a subresource only the part that it writes."""
    metadata = {key: value for key, value in body["metadata"].items() if key not in _SERVER_OWNED}
    part = {key: value for key, value in body.items() if key not in ("apiVersion", "kind", "metadata")}
    part |= {"metadata": metadata} if metadata else {}
    if subresource:
        part = {subresource: body[subresource]} if subresource in body else {}
    return _leaves(schema, part) if part else {}


def _built(leaves: dict[Path, Any]) -> Json:
    """The object with these values at these paths; of two that exclude each other the later one counts."""
    tree: Json = {}
    for path, value in leaves.items():
        node = tree
        for word in path[:-1]:
            if not isinstance(node.get(word), dict):
                node[word] = {}
            node = node[word]
        if not (isinstance(node.get(path[-1]), dict) and value in ({}, [])):  # an empty container removes no parts
            node[path[-1]] = (value,)
    built: Json = _value(tree)
    return built


def _value(tree: Any) -> Any:
    if isinstance(tree, tuple):
        return tree[0]
    parts = {word: _value(below) for word, below in tree.items()}
    if all(word.startswith("f:") for word in parts):
        return {word[2:]: part for word, part in parts.items()}
    # an item keeps its keys while a manager owns a part of it
    return [json.loads(word[2:]) | part if word.startswith("k:") else part for word, part in parts.items()]


# --- writes


def record_update(schema: Json, old: Json | None, new: Json, write: Write, now: str) -> list[Json]:
    """managedFields after a plain write: the writer owns the fields that it changed, nobody owns removed fields."""
    same = {word for word in new if old and new[word] is old.get(word)}
    after, before = _owned(schema, _without(new, same)), _owned(schema, _without(old, same)) if old else {}
    written = _owned(schema, _without(new, same), write.subresource)
    changed = {path for path, value in written.items() if path not in before or before[path] != value}
    entries = []
    for entry in new["metadata"].get("managedFields", []):
        fields = decode(entry["fieldsV1"])
        left = {path for path in fields if path in after or path[0][2:] in same}
        if write.wrote(entry):
            left, changed = left | changed, set()
        else:
            left -= changed
        if left:
            entries.append(entry if left == fields else entry | {"fieldsV1": encode(left), "time": now})
    return [*entries, write.entry(changed, now)] if changed else entries


def apply_patch(schema: Json, live: Json, config: Json, write: Write, now: str) -> Json:
    """Server-side apply: merge the configuration, drop what this manager no longer applies, refuse conflicts.

    Args:
        live: the stored object, or an object with only its identity if the apply creates it.
        config: the fields that the manager wants. It gives up the fields that it owns and omits here.

    Raises:
        ApiError: 409 with one cause per conflicting field.
    """
    applied = _owned(schema, config, write.subresource)
    entries = live["metadata"].get("managedFields", [])
    former = next((entry for entry in entries if write.wrote(entry)), None)
    owned = decode(former["fieldsV1"]) if former else set()
    others = [(entry, decode(entry["fieldsV1"])) for entry in entries if entry is not former]
    rest = _without(live, {write.subresource}) if write.subresource else {}  # a subresource writes only its own part
    part = _without(live, set(rest))
    before = _leaves(schema, part) if part else {}
    changed = {path for path, value in applied.items() if path in before and before[path] != value}
    taken = [(entry, fields & changed) for entry, fields in others if fields & changed]
    if taken and not write.force:
        raise _conflict(taken)
    lost = set().union(*(paths for _, paths in taken))
    dropped = owned - applied.keys() - set().union(*(fields for _, fields in others))
    merged = _built({path: value for path, value in before.items() if path not in dropped} | applied)
    left = [e | ({"fieldsV1": encode(fields - lost)} if fields & lost else {}) for e, fields in others if fields - lost]
    kept = former if former and owned == applied.keys() else write.entry(applied, now)
    # sorted, so that two managers that apply the same fields in turn change nothing
    owners = sorted([kept, *left], key=lambda entry: (entry["operation"], entry["time"], entry["manager"]))
    merged = rest | merged
    return merged | {"metadata": merged["metadata"] | {"managedFields": owners}}


def _conflict(taken: list[tuple[Json, set[Path]]]) -> ApiError:
    causes = []
    for entry, paths in taken:
        name = json.dumps(entry["manager"])
        if entry.get("subresource"):
            name += f' with subresource "{entry["subresource"]}"'
        if entry["operation"] == "Update":
            name += f" using {entry['apiVersion']} at {entry['time']}"
        causes += [Cause(dotted(path), "FieldManagerConflict", f"conflict with {name}") for path in sorted(paths)]
    lines = [f"{cause.message}: {cause.field}" for cause in causes]
    text = f"1 conflict: {lines[0]}" if len(lines) == 1 else f"{len(lines)} conflicts:\n- " + "\n- ".join(lines)
    return ApiError(409, f"Apply failed with {text}", details={"causes": [cause._asdict() for cause in causes]})


def dotted(path: Path) -> str:
    """A path for people: `.spec.items[{"name":"a"}].size`."""
    return "".join(f".{word[2:]}" if word.startswith("f:") else f"[{word[2:]}]" for word in path)
