"""All CGDRuns as the API server tells them, for any number of readers: one watch of the runs, one of their Events."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cgd_cli.view import key
from cgd_operator.kube.client import Cluster, Link, Object
from cgd_operator.kube.kinds import EVENT, RUN, ApiError, Kind

PAUSE = 2.0
"""Seconds until a watch that the server refused is tried again."""
LOST = "The API server cannot be reached: what is shown here may be old. Trying again."


class Mirror:
    """The objects of a kind by namespace and name, as the server has them. `trouble` says why they may be old."""

    def __init__(
        self, kind: Kind, fields: str, changed: Callable[[Object | None], None], items: Iterable[Object] = ()
    ) -> None:
        self.items = {key(item): item for item in items}
        self.trouble = ""
        self._kind, self._fields, self._changed = kind, fields, changed
        self._listed = set[str]()

    async def follow(self, cluster: Cluster, namespace: str | None) -> None:
        """For ever. Tells `changed` of every object that has come, changed or gone, and with None of the trouble."""
        while True:
            try:
                async for event, item in cluster.watch(self._kind, namespace, fields=self._fields, link=self._link):
                    self._take(event, item)
            except ApiError as error:
                self._say(
                    LOST if error.status == 0 else f"The API server does not tell of {self._kind.plural}: {error}"
                )
                await asyncio.sleep(PAUSE)

    def _take(self, event: str, item: Object) -> None:
        match event:
            case "SYNCED":
                for gone in set(self.items) - self._listed:
                    self._changed(self.items.pop(gone))
                self._say("")
            case "DELETED":
                self.items.pop(key(item), None)
                self._changed(item)
            case _:
                self.items[key(item)] = item
                self._listed.add(key(item))
                self._changed(item)

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
    """One who looks at the board. What has changed since its last look is a set: a slow reader misses nothing, and a
    run that has changed a hundred times meanwhile is told once."""

    changed: set[str] = field(default_factory=set)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self) -> set[str]:
        """The keys of the runs that have changed, come or gone since the last call."""
        taken, self.changed = self.changed, set()
        self.news.clear()
        return taken


class Board:
    """The runs and their Events, and who reads them. `runs` are those that are known already."""

    def __init__(self, runs: Iterable[Object]) -> None:
        about = f"involvedObject.kind={RUN.kind}"
        self._runs = Mirror(RUN, "", lambda run: self._tell(key(run) if run else None), runs)
        self._events = Mirror(EVENT, about, lambda event: self._tell(_about(event) if event else None))
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
        """Why what is shown may be old; nothing while it is what the server has."""
        return self._runs.trouble

    @property
    def eventless(self) -> str:
        """Why Events may be missing."""
        return self._events.trouble

    def events(self, run: Object) -> list[Object]:
        """What Events tell of a run."""
        uid = run["metadata"]["uid"]
        return [one for one in self._events.items.values() if one["involvedObject"].get("uid") == uid]

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """A new reader, who is told until the end of the block."""
        reader = Reader()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    def close(self) -> None:
        """Let every reader go."""
        self.closed = True
        self._tell(None)

    def _tell(self, run: str | None) -> None:
        for reader in self._readers:
            if run:
                reader.changed.add(run)
            reader.news.set()


def _about(event: Object) -> str:
    about = event["involvedObject"]
    return f"{about.get('namespace')}/{about.get('name')}"
