"""What etcd and the watch cache are to a real API server: objects, one version counter, a bounded history per kind.

Stored objects are never changed, only replaced: a reader may keep and send one without copying it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from cgd_local.statuses import ApiError, Json

Key = tuple[str, str]  # namespace ("" for cluster-scoped objects), name


class Change(NamedTuple):
    """One write. `old` is None for a creation; a deletion carries the last state under a new version."""

    version: int
    new: Json
    old: Json | None
    deleted: bool


Feed = asyncio.Queue[Change | None]  # None: this watch is over


@dataclass
class Shelf:
    """All objects of one kind."""

    history: deque[Change]
    objects: dict[Key, Json] = field(default_factory=dict)
    feeds: set[Feed] = field(default_factory=set)
    forgotten: int = 0  # the newest version that the history no longer tells

    def record(self, change: Change) -> None:
        if len(self.history) == self.history.maxlen:
            self.forgotten = self.history[0].version
        self.history.append(change)
        for feed in self.feeds:
            feed.put_nowait(change)

    def within(self, namespace: str) -> list[Json]:
        """The objects of a namespace ("" for all), in the order of their names, as etcd lists them."""
        keys = (key for key in self.objects if key[0] == namespace) if namespace else self.objects
        return [self.objects[key] for key in sorted(keys)]

    def end(self) -> None:
        for feed in self.feeds:
            feed.put_nowait(None)

    @contextmanager
    def changes(self, since: int) -> Iterator[Feed]:
        """A feed of the writes after a version, forgotten when its reader leaves.

        Raises:
            ApiError: 410 if not all of them are known any more; the client has to list again.
        """
        if since < self.forgotten:
            raise ApiError(410, f"too old resource version: {since} ({self.forgotten})")
        feed: Feed = asyncio.Queue()
        for change in self.history:
            if change.version > since:
                feed.put_nowait(change)
        self.feeds.add(feed)
        try:
            yield feed
        finally:
            self.feeds.discard(feed)


class Store:
    """Shelves by the full names of kinds, under one counter."""

    def __init__(self, history: int) -> None:
        self.version = 0
        self._history = history
        self._shelves: dict[str, Shelf] = {}

    def shelf(self, kind: str) -> Shelf:
        return self._shelves.setdefault(kind, Shelf(deque(maxlen=self._history)))

    def put(self, shelf: Shelf, key: Key, obj: Json) -> Json:
        """Store an object under the next version, which it then carries."""
        old, new = shelf.objects.get(key), self._stamped(obj)
        shelf.objects[key] = new
        shelf.record(Change(self.version, new, old, deleted=False))
        return new

    def remove(self, shelf: Shelf, key: Key, last: Json) -> Json:
        """Take an object away; `last` is its state at the end, which its deletion event carries."""
        old, last = shelf.objects.pop(key), self._stamped(last)
        shelf.record(Change(self.version, last, old, deleted=True))
        return last

    def _stamped(self, obj: Json) -> Json:
        self.version += 1
        return obj | {"metadata": obj["metadata"] | {"resourceVersion": str(self.version)}}

    def end_watches(self) -> None:
        for shelf in self._shelves.values():
            shelf.end()
