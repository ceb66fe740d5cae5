"""Merge patch, strategic merge patch and JSON patch. Server-side apply is in `ownership`."""

from __future__ import annotations

from typing import Any

import jsonpatch

from cgd_local.schema import ANYTHING, child, items
from cgd_local.statuses import ApiError, Json, bad_request


def json_patch(target: Any, operations: Any) -> Any:
    """RFC 6902; the server answers 422 to a patch with a failed `test` or a missing path."""
    try:
        return jsonpatch.apply_patch(target, operations)
    except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException, TypeError) as error:
        reason = f"the server rejected our request due to an error in our request: {error}"
        raise ApiError(422, reason) from error


def merge_patch(target: Any, patch: Any, schema: Json | None = None) -> Any:
    """RFC 7386: null removes, objects merge, everything else replaces.

    Args:
        schema: the schema of a built-in kind, for a strategic merge patch: lists with a merge key merge item by item.
    """
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        part = child(schema, name) or ANYTHING if schema else None
        if part and name.startswith("$"):
            if not name.startswith("$setElementOrder/"):  # the one directive without effect: lists keep no order here
                raise bad_request(f"{name}: this server does not know this directive of strategic merge patches")
        elif value is None:
            merged.pop(name, None)
        elif part and isinstance(value, list) and "merge" in part.get("x-kubernetes-patch-strategy", ""):
            merged[name] = _merged_list(merged.get(name) or [], value, part)
        else:
            merged[name] = merge_patch(merged.get(name), value, part)
    return merged


def _merged_list(target: list[Any], patch: list[Any], schema: Json) -> list[Any]:
    key = schema.get("x-kubernetes-patch-merge-key")
    if key is None:
        return target + [item for item in patch if item not in target]
    merged = {item[key]: item for item in target}
    for item in patch:
        if key not in item:
            raise bad_request(f"map: {item} does not contain declared merge key: {key}")
        if item.get("$patch") == "delete":
            merged.pop(item[key], None)
        else:
            merged[item[key]] = merge_patch(merged.get(item[key]), item, items(schema))
    return list(merged.values())
