"""The four kinds of patch, and who owns which field afterwards (`managedFields`).

Ownership is a map from field paths to values. A path is a tuple of FieldsV1 words: `f:spec`, `k:{"type":"Ready"}`,
`v:"x"`. Every write names a manager; writing a value takes its path from managers that wrote another value there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cgd_local.schema import Node, node_of
from cgd_local.statuses import ApiError, Cause, Json, bad_request

Path = tuple[str, ...]
ITEM = object()  # the value of a path that stands for an item of a list-map itself
ANYTHING = node_of({"x-kubernetes-preserve-unknown-fields": True})
_SERVER_OWNED = {"name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "selfLink"}
_SERVER_OWNED |= {"managedFields", "deletionTimestamp", "deletionGracePeriodSeconds"}


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386: null removes, objects merge, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


# --- JSON patch (RFC 6902)


def json_patch(target: Any, operations: Any) -> Any:
    """Apply the operations to a copy; a failed `test` or a missing path refuses the whole patch with 422."""
    document = {"": copy.deepcopy(target)}
    if not isinstance(operations, list):
        raise bad_request("error decoding patch: a JSON patch is a list of operations")
    for operation in operations:
        try:
            _OPERATIONS[operation["op"]](document, operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            reason = f"the server rejected our request due to an error in our request: {operation}: {error!r}"
            raise ApiError(422, reason) from error
    return document[""]


def _place(document: Any, pointer: str) -> tuple[Any, Any]:
    """The container of a JSON pointer and its key in there."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")]
    for part in parents:
        document = document[int(part)] if isinstance(document, list) else document[part]
    if isinstance(document, list):
        return document, len(document) if last == "-" else int(last)
    return document, last


def _look(document: Any, pointer: str) -> Any:
    container, key = _place(document, pointer)
    return container[key]


def _add(document: Any, operation: Json) -> None:
    container, key = _place(document, operation["path"])
    if isinstance(container, list):
        if not 0 <= key <= len(container):
            raise IndexError(operation["path"])
        container.insert(key, operation["value"])
    else:
        container[key] = operation["value"]


def _remove(document: Any, operation: Json) -> None:
    container, key = _place(document, operation["path"])
    del container[key]


def _replace(document: Any, operation: Json) -> None:
    container, key = _place(document, operation["path"])
    container[key]  # must exist already
    container[key] = operation["value"]


def _move(document: Any, operation: Json) -> None:
    value = _look(document, operation["from"])
    _remove(document, {"path": operation["from"]})
    _add(document, {"path": operation["path"], "value": value})


def _copy(document: Any, operation: Json) -> None:
    _add(document, {"path": operation["path"], "value": copy.deepcopy(_look(document, operation["from"]))})


def _test(document: Any, operation: Json) -> None:
    found = _look(document, operation["path"])
    if found != operation["value"]:
        raise ValueError(f"testing value {operation['path']} failed")


_OPERATIONS: dict[str, Callable[[Any, Json], None]] = {
    "add": _add,
    "remove": _remove,
    "replace": _replace,
    "move": _move,
    "copy": _copy,
    "test": _test,
}


# --- strategic merge patch


def strategic_patch(target: Any, patch: Any, node: Node = ANYTHING) -> Any:
    """Merge as kubectl does for built-in kinds: lists with a merge key merge item by item."""
    if not isinstance(patch, dict):
        return patch
    if patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    merged = dict(target) if isinstance(target, dict) else {}
    _directives(merged, patch)
    for key, value in patch.items():
        if key.startswith("$"):
            continue
        child = node.child(key) or ANYTHING
        if value is None or (isinstance(value, dict) and value.get("$patch") == "delete"):
            merged.pop(key, None)
        elif isinstance(value, list) and child.merges:
            order = patch.get(f"$setElementOrder/{key}")
            merged[key] = _ordered(_strategic_list(merged.get(key) or [], value, child), order, child)
        else:
            merged[key] = strategic_patch(merged.get(key), value, child)
    return merged


def _directives(merged: Json, patch: Json) -> None:
    for key, value in patch.items():
        if key == "$retainKeys":
            for name in set(merged) - set(value):
                del merged[name]
        elif key.startswith("$deleteFromPrimitiveList/"):
            name = key.split("/", 1)[1]
            merged[name] = [item for item in merged.get(name) or [] if item not in value]


def _strategic_list(target: list[Any], patch: list[Any], node: Node) -> list[Any]:
    key = node.merge_key
    if key is None:
        return target + [item for item in patch if item not in target]
    if any(item.get("$patch") == "replace" and len(item) == 1 for item in patch):
        return [item for item in patch if "$patch" not in item]
    merged = list(target)
    for item in patch:
        if key not in item:
            raise bad_request(f"map: {item} does not contain declared merge key: {key}")
        at = next((i for i, old in enumerate(merged) if old.get(key) == item[key]), None)
        if item.get("$patch") == "delete":
            merged = [old for old in merged if old.get(key) != item[key]]
        elif at is None:
            merged.append(strategic_patch({}, item, node.items))
        else:
            merged[at] = strategic_patch(merged[at], item, node.items)
    return merged


def _ordered(items: list[Any], order: list[Any] | None, node: Node) -> list[Any]:
    if not order:
        return items
    key = node.merge_key
    ranks = {(entry[key] if key else entry): rank for rank, entry in enumerate(order)}
    return sorted(items, key=lambda item: ranks.get(item.get(key) if key else item, len(ranks)))


# --- field ownership and server-side apply


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Who writes: one entry of managedFields."""

    manager: str
    api_version: str
    subresource: str = ""
    operation: str = "Update"

    def entry(self, fields: Iterable[Path], time: str) -> Json:
        entry: Json = {"manager": self.manager, "operation": self.operation, "apiVersion": self.api_version}
        entry |= {"time": time}
        entry |= {"fieldsType": "FieldsV1", "fieldsV1": encode(fields)}
        return entry | ({"subresource": self.subresource} if self.subresource else {})

    def wrote(self, entry: Json) -> bool:
        """The version is not compared: a manager stays itself when it moves to a new version of the API."""
        mine = (self.manager, self.operation, self.subresource)
        return mine == (entry.get("manager"), entry.get("operation"), entry.get("subresource", ""))


def leaves(node: Node, value: Any, path: Path = ()) -> dict[Path, Any]:
    """Every owned place of a value. Atomic lists and maps are one place; items of list-maps are places themselves."""
    found: dict[Path, Any] = {}
    if isinstance(value, dict) and value and not node.atomic_map:
        for name, item in value.items():
            found |= leaves(node.child(name) or ANYTHING, item, (*path, f"f:{name}"))
    elif isinstance(value, list) and value and node.list_type == "map":
        for item in value:
            place = (*path, _key_word(node, item))
            found |= {place: ITEM} | leaves(node.items, item, place)
    elif isinstance(value, list) and value and node.list_type == "set":
        found = {(*path, "v:" + json.dumps(item)): item for item in value}
    else:
        found[path] = value
    return found


def owned_places(node: Node, body: Json, subresource: str) -> dict[Path, Any]:
    """The places of an object that clients own: no identity, and a subresource writes its own part only."""
    part = {"status": body["status"]} if subresource == "status" and "status" in body else {}
    if not subresource:
        part = {key: value for key, value in body.items() if key not in ("apiVersion", "kind")}
        metadata = {key: value for key, value in body.get("metadata", {}).items() if key not in _SERVER_OWNED}
        part = {key: value for key, value in part.items() if key != "metadata"} | (
            {"metadata": metadata} if metadata else {}
        )
    return leaves(node, part) if part else {}


def _key_word(node: Node, item: Any) -> str:
    keys = dict(zip(node.map_keys, node.item_key(item), strict=True))
    return "k:" + json.dumps(keys, sort_keys=True, separators=(",", ":"))


def encode(fields: Iterable[Path]) -> Json:
    """Paths as a FieldsV1 tree; a path that has others below it is marked with a dot."""
    tree: Json = {}
    for path in sorted(fields):
        place = tree
        for word in path:
            place = place.setdefault(word, {})
        place["."] = {}
    return _undotted(tree)


def _undotted(tree: Json) -> Json:
    return {word: {} if set(below) == {"."} else _undotted(below) for word, below in tree.items()}


def decode(tree: Json, path: Path = ()) -> set[Path]:
    """The paths of a FieldsV1 tree."""
    if not tree:
        return {path} if path else set()
    found: set[Path] = set()
    for word, below in tree.items():
        found |= {path} if word == "." else decode(below, (*path, word))
    return found


def record_update(node: Node, old: Json | None, new: Json, writer: Writer, now: str) -> list[Json]:
    """managedFields after a plain write: the writer owns what it changed, nobody owns what is gone."""
    places = leaves(node, _owned_part(new))
    before = leaves(node, _owned_part(old)) if old else {}
    mine = owned_places(node, new, writer.subresource)
    changed = {path for path, value in mine.items() if path not in before or before[path] != value}
    entries = []
    for entry in new["metadata"].get("managedFields") or []:
        fields = decode(entry.get("fieldsV1") or {})
        left = fields & places.keys()
        left = left | changed if writer.wrote(entry) else left - changed
        changed = changed - left if writer.wrote(entry) else changed
        if left == fields:
            entries.append(entry)
        elif left:
            entries.append(entry | {"fieldsV1": encode(left), "time": now})
    return [*entries, writer.entry(changed, now)] if changed else entries


def _owned_part(body: Json) -> Json:
    metadata = {key: value for key, value in body.get("metadata", {}).items() if key not in _SERVER_OWNED}
    return {key: value for key, value in body.items() if key not in ("apiVersion", "kind", "metadata")} | {
        "metadata": metadata
    }


def apply_patch(node: Node, live: Json, config: Json, writer: Writer, *, force: bool, now: str) -> Json:
    """Server-side apply: merge the configuration, drop what this manager no longer applies, refuse conflicts.

    Args:
        live: the stored object, or an object without anything but identity when it is about to be created.
        config: what the manager wants; also says by omission what it no longer wants.

    Raises:
        ApiError: 409 with one cause per conflicting field.
    """
    applied = owned_places(node, config, writer.subresource)
    part = {"status": config.get("status", {})} if writer.subresource else config
    merged: Json = _merged(node, live, part)
    entries = live["metadata"].get("managedFields") or []
    mine = next((decode(entry["fieldsV1"]) for entry in entries if writer.wrote(entry)), set())
    others = [(entry, decode(entry["fieldsV1"])) for entry in entries if not writer.wrote(entry)]
    taken = _taken(leaves(node, _owned_part(live)), applied, others)
    if taken and not force:
        raise _conflict(taken)
    lost = set().union(*(paths for _, paths in taken))
    shared = set().union(*(fields for _, fields in others))
    dropped = mine - applied.keys() - shared
    for path in sorted(dropped, key=len):  # an item goes whole, before its key fields would
        _drop(node, merged, path)
    kept = [(entry, fields, fields - lost) for entry, fields in others]
    left = [e if f == k else e | {"fieldsV1": encode(k)} for e, f, k in kept if k]
    own = next((entry for entry in entries if writer.wrote(entry)), None)
    same = own is not None and mine == applied.keys() and own["apiVersion"] == writer.api_version
    merged["metadata"]["managedFields"] = [own if same else writer.entry(applied, now), *left]
    return merged


def _merged(node: Node, live: Any, config: Any) -> Any:
    if isinstance(config, dict) and isinstance(live, dict) and not node.atomic_map:
        merged = dict(live)
        for name, value in config.items():
            merged[name] = _merged(node.child(name) or ANYTHING, live.get(name), value)
        return merged
    if isinstance(config, list) and isinstance(live, list) and node.list_type == "set":
        return live + [item for item in config if item not in live]
    if isinstance(config, list) and isinstance(live, list) and node.list_type == "map":
        wanted = {node.item_key(item): item for item in config}
        have = {node.item_key(item) for item in live}
        kept = [_merged(node.items, item, wanted.get(node.item_key(item), {})) for item in live]
        return kept + [item for item in config if node.item_key(item) not in have]
    return copy.deepcopy(config)


Taken = list[tuple[Json, set[Path]]]


def _taken(before: dict[Path, Any], applied: dict[Path, Any], others: Iterable[tuple[Json, set[Path]]]) -> Taken:
    """What the application would take from others: places they own, where the value changes."""
    changed = {path for path, value in applied.items() if path in before and before[path] != value}
    found = [(entry, fields & changed) for entry, fields in others]
    return [(entry, paths) for entry, paths in found if paths]


def _conflict(taken: Taken) -> ApiError:
    causes = [
        Cause(dotted(path), "FieldManagerConflict", f"conflict with {_named(entry)}")
        for entry, paths in taken
        for path in sorted(paths)
    ]
    if len(causes) == 1:
        told = f"1 conflict: {causes[0].message}: {causes[0].field}"
    elif len(taken) == 1:
        fields = "".join(f"\n- {cause.field}" for cause in causes)
        told = f"{len(causes)} conflicts: conflicts with {_named(taken[0][0])}:{fields}"
    else:
        groups = [f"\nconflicts with {_named(e)}:" + "".join(f"\n- {dotted(p)}" for p in sorted(ps)) for e, ps in taken]
        told = f"{len(causes)} conflicts:" + "".join(groups)
    listed = [{"reason": cause.reason, "message": cause.message, "field": cause.field} for cause in causes]
    return ApiError(409, f"Apply failed with {told}", details={"causes": listed})


def _named(entry: Json) -> str:
    name = json.dumps(entry["manager"])
    if entry.get("subresource"):
        name += f' with subresource "{entry["subresource"]}"'
    if entry["operation"] == "Update":
        name += f" using {entry['apiVersion']}" + (f" at {entry['time']}" if entry.get("time") else "")
    return name


def dotted(path: Path) -> str:
    """A path for people: `.spec.items[name="a"].size`."""
    text = ""
    for word in path:
        sort, _, rest = word.partition(":")
        if sort == "f":
            text += f".{rest}"
        elif sort == "k":
            text += "[" + ",".join(f"{key}={json.dumps(value)}" for key, value in json.loads(rest).items()) + "]"
        else:
            text += f"[={rest}]"
    return text


def _drop(node: Node, value: Any, path: Path) -> None:
    """Remove one place, and containers that this empties; what is gone already is no matter."""
    word, rest = path[0], path[1:]
    if word.startswith("f:") and isinstance(value, dict):
        _drop_field(node, value, word[2:], rest)
    elif word.startswith("v:") and isinstance(value, list):
        value[:] = [item for item in value if item != json.loads(word[2:])]
    elif word.startswith("k:") and isinstance(value, list):
        for item in [item for item in value if _key_word(node, item) == word]:
            if rest:
                _drop(node.items, item, rest)
            else:
                value.remove(item)


def _drop_field(node: Node, value: Json, name: str, rest: Path) -> None:
    if name not in value:
        return
    if rest:
        value[name] = copy.copy(value[name])
        _drop(node.child(name) or ANYTHING, value[name], rest)
    if not rest or value[name] in ({}, []):
        del value[name]
