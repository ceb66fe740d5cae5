"""All CGDRuns of the API server, for any number of readers: one watch follows the runs, one follows their Events."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cgd_cli.view import key
from cgd_operator.kube.client import Cluster, Link, Object
from cgd_operator.kube.kinds import EVENT, RUN, ApiError, Kind

PAUSE = 2.0
"""Seconds before a new try, after the server has refused a watch."""
LOST = "The API server cannot be reached: this page may be old. cgd ui tries again."


class Mirror:
    """A copy of the server's objects of one kind, by namespace and name. `trouble` says why the copy may be old."""

    def __init__(
        self, kind: Kind, fields: str, changed: Callable[[Object | None], None], items: Iterable[Object] = ()
    ) -> None:
        self.items = {key(item): item for item in items}
        self.trouble = ""
        self._kind, self._fields, self._changed = kind, fields, changed
        self._listed = set[str]()

    async def follow(self, cluster: Cluster, namespace: str | None) -> None:
        """Follow the server for ever. Calls `changed` with every object that is new, changed or deleted, and with None
        when `trouble` changes."""
        while True:
            try:
                async for event, item in cluster.watch(self._kind, namespace, fields=self._fields, link=self._link):
                    match event:
                        case "SYNCED":
                            for deleted in set(self.items) - self._listed:
                                self._changed(self.items.pop(deleted))
                            self._say("")
                        case "DELETED":
                            self.items.pop(key(item), None)
                            self._changed(item)
                        case _:
                            self.items[key(item)] = item
                            self._listed.add(key(item))
                            self._changed(item)
            except ApiError as error:
                refused = f"The API server refuses a watch of {self._kind.plural}: {error}"
                self._say(LOST if error.status == 0 else refused)
                await asyncio.sleep(PAUSE)

    def _link(self, link: Link) -> None:
        match link:
            case "listing":
                self._listed.clear()
            case "linked":
                self._say("")
            case "lost":
                self._say(LOST)

    def _say(self, trouble: str) -> None:
        if trouble != self.trouble:
            self.trouble = trouble
            self._changed(None)


@dataclass(eq=False)
class Reader:
    """A reader of the board. `changed` is a set of the runs that have changed since the reader last took it: a slow
    reader misses no run, and gets a run that has changed a hundred times once."""

    changed: set[str] = field(default_factory=set)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self) -> set[str]:
        """The keys of the runs that are new, changed or deleted since the last call."""
        taken, self.changed = self.changed, set()
        self.news.clear()
        return taken


class Board:
    """The runs, their Events, and the readers of both. `runs`: a first list of the runs."""

    def __init__(self, runs: Iterable[Object]) -> None:
        def notify_event(event: Object | None) -> None:
            run = event["involvedObject"] if event else {}
            self._notify(f"{run.get('namespace')}/{run.get('name')}" if event else None)

        self._runs = Mirror(RUN, "", lambda run: self._notify(key(run) if run else None), runs)
        self._events = Mirror(EVENT, f"involvedObject.kind={RUN.kind}", notify_event)
        self._readers = set[Reader]()
        self.closed = False

    async def follow(self, cluster: Cluster, namespace: str | None) -> None:
        """Follow the cluster for ever."""
        async with asyncio.TaskGroup() as group:
            for mirror in (self._runs, self._events):
                group.create_task(mirror.follow(cluster, namespace))

    @property
    def runs(self) -> dict[str, Object]:
        return self._runs.items

    @property
    def trouble(self) -> str:
        """Why the runs may be old; empty while they are up to date."""
        return self._runs.trouble

    @property
    def eventless(self) -> str:
        """Why Events may be missing."""
        return self._events.trouble

    def events(self, run: Object) -> list[Object]:
        """The Events of a run."""
        uid = run["metadata"]["uid"]
        return [event for event in self._events.items.values() if event["involvedObject"].get("uid") == uid]

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """A new reader, which gets the changes until the end of the block."""
        reader = Reader()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    def close(self) -> None:
        """Wake every reader, which then finds `closed`."""
        self.closed = True
        self._notify(None)

    def _notify(self, run: str | None) -> None:
        for reader in self._readers:
            if run:
                reader.changed.add(run)
            reader.news.set()
