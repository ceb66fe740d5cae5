"""The part of etcd and of the watch cache: objects, one version counter, and a bounded history for each kind.

Stored objects never change, they are only replaced: a reader may keep and send an object without a copy.
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


class Change(NamedTuple):
    """One write. `old` is None for a creation; a deletion has the last state under a new version."""

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
    forgotten: int = 0  # the newest version that the history no longer holds
    labelled: dict[tuple[str, str], set[Key]] = field(default_factory=lambda: defaultdict(set))  # by label and value

    def replace(self, key: Key, new: Json | None) -> Json | None:
        """Replace the object of a key, or (None) remove it; returns the old object."""
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

    def within(self, namespace: str, labels: Mapping[str, Collection[str]] | None = None) -> list[Json]:
        """The objects of a namespace ("" for all) in the order of their names, as etcd lists them. `labels`: those that
        an object must have, each with its possible values."""
        keys: Collection[Key] = self.objects
        for name, values in (labels or {}).items():
            labelled = set().union(*(self.labelled.get((name, value), ()) for value in values))
            keys = labelled if keys is self.objects else labelled.intersection(keys)
        return [self.objects[key] for key in sorted(keys) if not namespace or key[0] == namespace]

    def end(self) -> None:
        for feed in self.feeds:
            feed.put_nowait(None)

    @contextmanager
    def changes(self, since: int) -> Iterator[Feed]:
        """A feed of the writes after a version, until the end of the block.

        Raises:
            ApiError: 410 if the history no longer holds all of them; the client has to list again.
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
        """Store an object under the next version; returns it with that version."""
        new = self._stamped(obj)
        old = shelf.replace(key, new)
        shelf.record(Change(self.version, new, old, deleted=False))
        return new

    def remove(self, shelf: Shelf, key: Key, last: Json) -> Json:
        """Remove an object; `last` is its final state, for the event of its deletion."""
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
