"""The events of a watch: on request the existing objects, then every change, and bookmarks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from cgd_local.requests import Target
from cgd_local.selection import Test
from cgd_local.statuses import ApiError, Json
from cgd_local.store import Change, Feed, Store


async def events(store: Store, target: Target, bookmark_seconds: float) -> AsyncIterator[Json]:
    """The events of one watch, until its time is over or its kind is deleted.

    Raises:
        ApiError: 410 for a version that is too old, 504 for a version that does not exist yet.
    """
    shelf, current, chosen = store.shelf(target.resource.full_name), store.version, target.chosen()
    since, initial = target.number("resourceVersion"), target.flag("sendInitialEvents")
    if since > current:
        raise ApiError(504, f"Too large resource version: {since}, current: {current}")
    present = target.objects(shelf) if initial or not since else []
    with shelf.changes(current if initial or not since else since) as feed:
        for obj in present:
            yield _event(target, "ADDED", obj)
        if initial:
            yield _bookmark(target, current, {"k8s.io/initial-events-end": "true"})
        pause = bookmark_seconds if target.flag("allowWatchBookmarks") else None
        async for change in _changes(feed, target.number("timeoutSeconds") or 3600, pause):
            if change is None:
                yield _bookmark(target, store.version, {})
            elif event := _change_event(target, chosen, change):
                yield event


async def _changes(feed: Feed, seconds: float, pause: float | None) -> AsyncIterator[Change | None]:
    """Changes as they come; None when a bookmark is due after a silence."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + seconds
    while (left := deadline - clock()) > 0:
        try:
            change = await asyncio.wait_for(feed.get(), min(left, pause or left))
        except TimeoutError:
            if pause:
                yield None
            continue
        if change is None:
            return
        yield change


def _change_event(target: Target, chosen: Test, change: Change) -> Json | None:
    """The event of a change: ADDED if the object enters the selection, DELETED if it leaves it."""
    if target.namespace not in ("", change.new["metadata"].get("namespace")):
        return None
    before = change.old if change.old and chosen(change.old) else None
    if not change.deleted and chosen(change.new):
        return _event(target, "MODIFIED" if before else "ADDED", change.new)
    if before is None:
        return None
    left = before | {"metadata": before["metadata"] | {"resourceVersion": str(change.version)}}
    return _event(target, "DELETED", change.new if change.deleted else left)


def _event(target: Target, kind: str, obj: Json) -> Json:
    return {"type": kind, "object": target.table([obj], obj["metadata"]["resourceVersion"]) or obj}


def _bookmark(target: Target, version: int, annotations: Json) -> Json:
    metadata = {"resourceVersion": str(version), "creationTimestamp": None, "annotations": annotations}
    obj = {"kind": target.resource.kind, "apiVersion": target.resource.api_version, "metadata": metadata}
    return {"type": "BOOKMARK", "object": target.table([], str(version)) or obj}
