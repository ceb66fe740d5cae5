"""Who owns which field (`managedFields`), and server-side apply, which goes by it.

Ownership is a set of paths. A path is a tuple of FieldsV1 words (`f:spec`, `k:{"type":"Ready"}`, `v:"x"`) that ends at
a value without owned parts. Every write names a manager; writing a value takes its path from managers that wrote
another value there.

Deviation: items of list-maps have no place of their own (no `.` in FieldsV1); they last as long as their fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cgd_local.schema import ANYTHING, child, item_key, items
from cgd_local.statuses import ApiError, Cause, Json

Path = tuple[str, ...]
Taken = list[tuple[Json, set[Path]]]
_SERVER_OWNED = {"name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "selfLink"}
_SERVER_OWNED |= {"managedFields", "deletionTimestamp", "deletionGracePeriodSeconds"}


@dataclass(frozen=True, kw_only=True)
class Write:
    """How a write is meant: by whom and where (an entry of managedFields), how strictly, for real or as a dry run."""

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
        mine = (self.manager, self.operation, self.subresource)
        return mine == (entry["manager"], entry["operation"], entry.get("subresource", ""))


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
    """The parts of a value that are owned one by one: word -> schema and part. An atomic value has none."""
    sort = schema.get("x-kubernetes-list-type")
    if isinstance(value, dict) and schema.get("x-kubernetes-map-type") != "atomic":
        return {f"f:{name}": (child(schema, name) or ANYTHING, item) for name, item in value.items()}
    if isinstance(value, list) and sort == "map":
        return {f"k:{item_key(schema, item)}": (items(schema), item) for item in value}
    if isinstance(value, list) and sort == "set":
        return {f"v:{json.dumps(item)}": (ANYTHING, item) for item in value}
    return {}


def _leaves(schema: Json, value: Any, path: Path = ()) -> dict[Path, Any]:
    """Every place of a value, with what is there."""
    parts = _parts(schema, value)
    found = {} if parts else {path: value}
    for word, (part_schema, part) in parts.items():
        found |= _leaves(part_schema, part, (*path, word))
    return found


def _without(body: Json, words: set[str]) -> Json:
    return {word: value for word, value in body.items() if word not in words}


def _owned(schema: Json, body: Json, subresource: str = "") -> dict[Path, Any]:
    """The places of an object that clients own: no identity, and a subresource writes its own part only."""
    metadata = {key: value for key, value in body["metadata"].items() if key not in _SERVER_OWNED}
    part = {key: value for key, value in body.items() if key not in ("apiVersion", "kind", "metadata")}
    part |= {"metadata": metadata} if metadata else {}
    if subresource:
        part = {subresource: body[subresource]} if subresource in body else {}
    return _leaves(schema, part) if part else {}


def _built(places: dict[Path, Any]) -> Json:
    """The object that has these values at these places; of two that exclude each other the later one counts."""
    tree: Json = {}
    for path, value in places.items():
        node = tree
        for word in path[:-1]:
            if not isinstance(node.get(word), dict):
                node[word] = {}
            node = node[word]
        if not (isinstance(node.get(path[-1]), dict) and value in ({}, [])):  # an empty container empties no other's
            node[path[-1]] = (value,)
    built: Json = _value(tree)
    return built


def _value(tree: Any) -> Any:
    if isinstance(tree, tuple):
        return tree[0]
    parts = {word: _value(below) for word, below in tree.items()}
    if all(word.startswith("f:") for word in parts):
        return {word[2:]: part for word, part in parts.items()}
    # an item keeps its keys while anybody owns a part of it
    return [json.loads(word[2:]) | part if word.startswith("k:") else part for word, part in parts.items()]


# --- writes


def record_update(schema: Json, old: Json | None, new: Json, write: Write, now: str) -> list[Json]:
    """managedFields after a plain write: the writer owns what it changed, nobody owns what is gone."""
    same = {word for word in new if old and new[word] is old.get(word)}
    there, before = _owned(schema, _without(new, same)), _owned(schema, _without(old, same)) if old else {}
    mine = _owned(schema, _without(new, same), write.subresource)
    changed = {path for path, value in mine.items() if path not in before or before[path] != value}
    entries = []
    for entry in new["metadata"].get("managedFields", []):
        fields = decode(entry["fieldsV1"])
        left = {path for path in fields if path in there or path[0][2:] in same}
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
        live: the stored object, or an object without anything but identity when it is about to be created.
        config: what the manager wants; also says by omission what it no longer wants.

    Raises:
        ApiError: 409 with one cause per conflicting field.
    """
    applied = _owned(schema, config, write.subresource)
    entries = live["metadata"].get("managedFields", [])
    own = next((entry for entry in entries if write.wrote(entry)), None)
    mine = decode(own["fieldsV1"]) if own else set()
    others = [(entry, decode(entry["fieldsV1"])) for entry in entries if entry is not own]
    part, rest = _at(live, write.subresource)
    before = _leaves(schema, part) if part else {}
    taken = _taken(before, applied, others)
    if taken and not write.force:
        raise _conflict(taken)
    lost = set().union(*(paths for _, paths in taken))
    dropped = mine - applied.keys() - set().union(*(fields for _, fields in others))
    merged = _built({path: value for path, value in before.items() if path not in dropped} | applied)
    left = [e | ({"fieldsV1": encode(fields - lost)} if fields & lost else {}) for e, fields in others if fields - lost]
    kept = own if own and mine == applied.keys() else write.entry(applied, now)
    # in an order of their own: two managers that apply the same in turn change nothing
    owners = sorted([kept, *left], key=lambda one: (one["operation"], one["time"], one["manager"]))
    merged = rest | merged
    return merged | {"metadata": merged["metadata"] | {"managedFields": owners}}


def _at(live: Json, subresource: str) -> tuple[Json, Json]:
    """The part of an object that a subresource writes, and the rest."""
    if not subresource:
        return live, {}
    rest = _without(live, {subresource})
    return _without(live, set(rest)), rest


def _taken(before: dict[Path, Any], applied: dict[Path, Any], others: Iterable[tuple[Json, set[Path]]]) -> Taken:
    """What the application would take from others: places they own, where the value changes."""
    changed = {path for path, value in applied.items() if path in before and before[path] != value}
    return [(entry, fields & changed) for entry, fields in others if fields & changed]


def _conflict(taken: Taken) -> ApiError:
    causes = [
        Cause(dotted(path), "FieldManagerConflict", f"conflict with {_named(entry)}")
        for entry, paths in taken
        for path in sorted(paths)
    ]
    lines = [f"{cause.message}: {cause.field}" for cause in causes]
    told = f"1 conflict: {lines[0]}" if len(lines) == 1 else f"{len(lines)} conflicts:\n- " + "\n- ".join(lines)
    return ApiError(409, f"Apply failed with {told}", details={"causes": [cause._asdict() for cause in causes]})


def _named(entry: Json) -> str:
    name = json.dumps(entry["manager"])
    if entry.get("subresource"):
        name += f' with subresource "{entry["subresource"]}"'
    return name + (f" using {entry['apiVersion']} at {entry['time']}" if entry["operation"] == "Update" else "")


def dotted(path: Path) -> str:
    """A path for people: `.spec.items[{"name":"a"}].size`."""
    return "".join(f".{word[2:]}" if word.startswith("f:") else f"[{word[2:]}]" for word in path)
