"""What etcd and the watch cache are to a real API server: objects, one version counter, a bounded history per kind.

Stored objects are never changed, only replaced: a reader may keep and send one without copying it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from cgd_local.statuses import ApiError, Json

Key = tuple[str, str]  # namespace ("" for cluster-scoped objects), name
Wanted = Mapping[str, Collection[str]]  # labels, and the values of which each must have one


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
    labelled: dict[tuple[str, str], set[Key]] = field(default_factory=lambda: defaultdict(set))  # by label and value

    def replace(self, key: Key, new: Json | None) -> Json | None:
        """Put an object in the place of another, or (None) take that away; the other."""
        old = self.objects.pop(key, None) if new is None else self.objects.get(key)
        for label in _labels(old):
            self.labelled[label].discard(key)
        if new is not None:
            self.objects[key] = new
        for label in _labels(new):
            self.labelled[label].add(key)
        return old

    def record(self, change: Change) -> None:
        if len(self.history) == self.history.maxlen:
            self.forgotten = self.history[0].version
        self.history.append(change)
        for feed in self.feeds:
            feed.put_nowait(change)

    def within(self, namespace: str, wanted: Wanted | None = None) -> list[Json]:
        """The objects of a namespace ("" for all) with such labels, in the order of their names, as etcd lists them."""
        keys: Collection[Key] = self.objects
        for name, values in (wanted or {}).items():
            named = set().union(*(self.labelled.get((name, value), ()) for value in values))
            keys = named if keys is self.objects else named.intersection(keys)
        return [self.objects[key] for key in sorted(keys) if not namespace or key[0] == namespace]

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
        new = self._stamped(obj)
        old = shelf.replace(key, new)
        shelf.record(Change(self.version, new, old, deleted=False))
        return new

    def remove(self, shelf: Shelf, key: Key, last: Json) -> Json:
        """Take an object away; `last` is its state at the end, which its deletion event carries."""
        last = self._stamped(last)
        old = shelf.replace(key, None)
        shelf.record(Change(self.version, last, old, deleted=True))
        return last

    def _stamped(self, obj: Json) -> Json:
        self.version += 1
        return obj | {"metadata": obj["metadata"] | {"resourceVersion": str(self.version)}}

    def end_watches(self) -> None:
        for shelf in self._shelves.values():
            shelf.end()


def _labels(obj: Json | None) -> Collection[tuple[str, str]]:
    labels: Json = (obj or {"metadata": {}})["metadata"].get("labels", {})
    return labels.items()
