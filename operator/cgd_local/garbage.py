"""The owner garbage collector: what belongs to something that is gone goes too.

It watches a list of kinds and every custom resource, and keeps a graph of who owns whom (by uid). Nothing is deleted on
the graph's word alone: an owner that the graph does not know is asked for at the API first. Background, foreground
(`foregroundDeletion` finalizer, `blockOwnerDeletion`) and orphan deletion follow the real collector.

Deviation: kinds come from a list plus the CRDs instead of discovery, so only the built-in kinds of `BUILT_IN` are
collected, and an owner of any other kind is taken to be alive.
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from cgd_local.controllers import condition, forever
from cgd_operator.cluster import CONFIGMAP, CRD, JOB, NODE, POD, SECRET, ApiError, Cluster, Kind, Object

log = logging.getLogger(__name__)

BUILT_IN = (POD, JOB, CONFIGMAP, SECRET, NODE)
FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"


@dataclass(frozen=True)
class Item:
    kind: Kind
    body: Object

    @property
    def meta(self) -> Object:
        return dict(self.body["metadata"])

    @property
    def uid(self) -> str:
        return str(self.meta["uid"])

    @property
    def owners(self) -> list[Object]:
        return self.meta.get("ownerReferences") or []

    @property
    def deleting(self) -> bool:
        return "deletionTimestamp" in self.meta

    def awaits(self, finalizer: str) -> bool:
        return self.deleting and finalizer in (self.meta.get("finalizers") or [])

    def blocks(self, owner: str) -> bool:
        return any(ref["uid"] == owner and ref.get("blockOwnerDeletion") for ref in self.owners)


class Fate(Enum):
    """What has become of an owner."""

    ALIVE = auto()
    WAITING = auto()  # deleted in the foreground: it waits for us
    GONE = auto()


class GarbageCollector:
    def __init__(self, cluster: Cluster, kinds: Iterable[Kind] = BUILT_IN) -> None:
        self.cluster = cluster
        self._kinds = {(kind.api_version, kind.kind): kind for kind in kinds}
        self._items: dict[str, Item] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._watches: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for kind in self._kinds.values():
                self._start_watch(group, kind)
            group.create_task(forever("watch of CRDs", lambda: self._watch_definitions(group)))
            group.create_task(forever("garbage collector", self._work))

    def _start_watch(self, group: asyncio.TaskGroup, kind: Kind) -> asyncio.Task[None]:
        return group.create_task(forever(f"garbage collector's watch of {kind.plural}", lambda: self._watch(kind)))

    async def _watch_definitions(self, group: asyncio.TaskGroup) -> None:
        async for event, crd in self.cluster.watch(CRD):
            if event == "SYNCED" or not condition(crd.get("status", {}).get("conditions") or [], "Established"):
                continue
            kind = _kind_of(crd)
            if event == "DELETED":
                self._forget(kind)
            elif crd["metadata"]["name"] not in self._watches:
                self._kinds[kind.api_version, kind.kind] = kind
                self._watches[crd["metadata"]["name"]] = self._start_watch(group, kind)

    def _forget(self, kind: Kind) -> None:
        """The kind is not served any more. It stays known, so that its objects are asked for and found gone."""
        if watch := self._watches.pop(f"{kind.plural}.{kind.api_version.partition('/')[0]}", None):
            watch.cancel()
        for item in [item for item in self._items.values() if item.kind == kind]:
            self._gone(item.uid)

    async def _watch(self, kind: Kind) -> None:
        listed: set[str] = set()
        async for event, body in self.cluster.watch(kind):
            if event == "SYNCED":
                for item in [i for i in self._items.values() if i.kind == kind and i.uid not in listed]:
                    self._gone(item.uid)
                listed.clear()
            elif event == "DELETED":
                self._gone(body["metadata"]["uid"])
            else:
                listed.add(body["metadata"]["uid"])
                self._seen(Item(kind, body))

    def _seen(self, item: Item) -> None:
        self._items[item.uid] = item
        if item.owners or item.deleting:
            self._queue.put_nowait(item.uid)
        if item.awaits(FOREGROUND):
            self._look_at_dependents(item.uid)

    def _gone(self, uid: str) -> None:
        item = self._items.pop(uid, None)
        self._look_at_dependents(uid)
        for owner in item.owners if item else []:
            self._queue.put_nowait(owner["uid"])

    def _look_at_dependents(self, uid: str) -> None:
        for item in self._dependents(uid):
            self._queue.put_nowait(item.uid)

    def _dependents(self, uid: str) -> list[Item]:
        return [item for item in self._items.values() if any(ref["uid"] == uid for ref in item.owners)]

    async def _work(self) -> None:
        while True:
            uid = await self._queue.get()
            item = self._items.get(uid)
            if item is None:
                continue
            try:
                await self._process(item)
            except ApiError as error:
                log.info("garbage collection of %s %s is tried again: %s", item.kind.kind, item.meta["name"], error)
                asyncio.get_running_loop().call_later(1.0, self._queue.put_nowait, uid)

    async def _process(self, item: Item) -> None:
        if item.awaits(ORPHAN):
            for dependent in self._dependents(item.uid):
                await self._drop_owners(dependent, {item.uid})
            await self._drop_finalizer(item, ORPHAN)
        elif item.awaits(FOREGROUND):
            if not any(dependent.blocks(item.uid) for dependent in self._dependents(item.uid)):
                await self._drop_finalizer(item, FOREGROUND)
        elif item.owners and not item.deleting:
            await self._follow_owners(item)

    async def _follow_owners(self, item: Item) -> None:
        fates = {ref["uid"]: await self._fate(item, ref) for ref in item.owners}
        gone = {uid for uid, fate in fates.items() if fate is not Fate.ALIVE}
        if not gone:
            return
        if len(gone) < len(fates):
            await self._drop_owners(item, gone)
            return
        waited_for = Fate.WAITING in fates.values() and bool(self._dependents(item.uid))
        log.debug("deleting %s %s: its owners are gone", item.kind.kind, item.meta["name"])
        await self.cluster.delete(
            item.kind,
            item.meta["name"],
            item.meta.get("namespace"),
            uid=item.uid,
            propagation="Foreground" if waited_for else "Background",
        )

    async def _fate(self, item: Item, reference: Object) -> Fate:
        if owner := self._items.get(reference["uid"]):
            waits = owner.awaits(FOREGROUND) and reference.get("blockOwnerDeletion")
            return Fate.WAITING if waits else Fate.ALIVE
        kind = self._kinds.get((reference["apiVersion"], reference["kind"]))
        if kind is None:
            return Fate.ALIVE
        namespace = item.meta.get("namespace") if kind.namespaced else None
        found = await self.cluster.get(kind, reference["name"], namespace)
        return Fate.ALIVE if found and found["metadata"]["uid"] == reference["uid"] else Fate.GONE

    async def _drop_owners(self, item: Item, uids: set[str]) -> None:
        left = [ref for ref in item.owners if ref["uid"] not in uids]
        await self._patch(item, {"ownerReferences": left})

    async def _drop_finalizer(self, item: Item, finalizer: str) -> None:
        await self._patch(item, {"finalizers": [name for name in item.meta["finalizers"] if name != finalizer]})

    async def _patch(self, item: Item, meta: Object) -> None:
        body = {"metadata": {**meta, "resourceVersion": item.meta["resourceVersion"]}}
        await self.cluster.patch(item.kind, item.meta["name"], item.meta.get("namespace"), body)


def _kind_of(crd: Object) -> Kind:
    spec = crd["spec"]
    version = next(version["name"] for version in spec["versions"] if version["served"])
    names = spec["names"]
    return Kind(f"{spec['group']}/{version}", names["kind"], names["plural"], spec["scope"] == "Namespaced")
