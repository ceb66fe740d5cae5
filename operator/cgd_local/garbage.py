"""The garbage collector: it deletes objects whose owners no longer exist.

After a relevant change it lists all objects and settles each of them. Before it deletes an object it requests the
owners that the list lacks from the API. Background, foreground (`foregroundDeletion` finalizer, `blockOwnerDeletion`)
and orphan deletion follow the real collector.

Deviation: kinds come from `BUILT_IN` and the CRDs, not from discovery; owners of other kinds count as existing.
"""

import asyncio
from functools import partial

from cgd_local.controllers import SERVICE, condition, forever
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import CONFIGMAP, CRD, JOB, NODE, POD, SECRET, Kind

BUILT_IN = (POD, JOB, SERVICE, CONFIGMAP, SECRET, NODE, CRD)
FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"


class GarbageCollector:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._known: dict[tuple[str, str], Kind] = {}
        """Every kind that the server has ever served: an owner of a kind that it has dropped no longer exists."""
        self._watches: dict[Kind, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    async def run(self) -> None:
        async def work() -> None:
            while True:
                await self._sweep(group)
                await self._changed.wait()
                self._changed.clear()

        async with asyncio.TaskGroup() as group:
            await forever("garbage collector", work)

    async def _sweep(self, group: asyncio.TaskGroup) -> None:
        async def follow(kind: Kind) -> None:
            async for event, body in self._cluster.watch(kind):
                if event in ("SYNCED", "DELETED") or kind == CRD or _owners(body) or _leaves(body):
                    self._changed.set()

        crds, _ = await self._cluster.list(CRD)
        established = [crd for crd in crds if condition(crd.get("status", {}).get("conditions") or [], "Established")]
        served = {*BUILT_IN}
        for spec in (crd["spec"] for crd in established):
            version = next(version["name"] for version in spec["versions"] if version["served"])
            names, namespaced = spec["names"], spec["scope"] == "Namespaced"
            served.add(Kind(f"{spec['group']}/{version}", names["kind"], names["plural"], namespaced))
        self._known |= {(kind.api_version, kind.kind): kind for kind in served}
        for kind in served - set(self._watches):
            watch = forever(f"garbage collector's watch of {kind.plural}", partial(follow, kind))
            self._watches[kind] = group.create_task(watch)
        for kind in set(self._watches) - served:
            self._watches.pop(kind).cancel()
        first = await self._list(served)
        items = await self._list(served)  # the second list lacks no dependent of an owner that waits in the first
        for item in first.values():
            await self._settle(item, items)

    async def _list(self, kinds: set[Kind]) -> dict[str, Object]:
        items = [item for kind in kinds for item in (await self._cluster.list(kind))[0]]
        return {item["metadata"]["uid"]: item for item in items}

    async def _settle(self, item: Object, items: dict[str, Object]) -> None:
        uid = item["metadata"]["uid"]
        dependents = [other for other in items.values() if any(ref["uid"] == uid for ref in _owners(other))]
        if _awaits(item, ORPHAN):
            for dependent in dependents:
                await self._drop_owners(dependent, {uid})
            await self._drop_finalizer(item, ORPHAN)
        elif _awaits(item, FOREGROUND):
            references = (ref for other in dependents for ref in _owners(other) if ref["uid"] == uid)
            if not any(ref.get("blockOwnerDeletion") for ref in references):
                await self._drop_finalizer(item, FOREGROUND)
        elif _owners(item) and not _leaves(item):
            await self._follow_owners(item, items, "Foreground" if dependents else "Background")

    async def _follow_owners(self, item: Object, items: dict[str, Object], propagation: str) -> None:
        """Drop the owners that no longer exist, or delete the object if it has no other owner. An owner that waits for
        the end of this object counts as deleted."""
        owners = _owners(item)
        blocked = (ref["uid"] for ref in owners if ref.get("blockOwnerDeletion"))
        waits = {uid for uid in blocked if _awaits(items.get(uid), FOREGROUND)}
        deleted = {r["uid"] for r in owners if r["uid"] not in items and await self._is_deleted(item, r)} | waits
        if deleted and len(deleted) < len(owners):
            await self._drop_owners(item, deleted)
        elif deleted:
            meta, kind = item["metadata"], self._known[item["apiVersion"], item["kind"]]
            how = propagation if waits else "Background"
            await self._cluster.delete(kind, meta["name"], meta.get("namespace"), uid=meta["uid"], propagation=how)

    async def _is_deleted(self, item: Object, reference: Object) -> bool:
        kind = self._known.get((reference["apiVersion"], reference["kind"]))
        if kind is None:
            return False
        namespace = item["metadata"].get("namespace") if kind.namespaced else None
        owner = await self._cluster.get(kind, reference["name"], namespace)
        return owner is None or owner["metadata"]["uid"] != reference["uid"]

    async def _drop_owners(self, item: Object, uids: set[str]) -> None:
        await self._patch(item, {"ownerReferences": [ref for ref in _owners(item) if ref["uid"] not in uids]})

    async def _drop_finalizer(self, item: Object, finalizer: str) -> None:
        left = [name for name in item["metadata"]["finalizers"] if name != finalizer]
        await self._patch(item, {"finalizers": left})

    async def _patch(self, item: Object, change: Object) -> None:
        meta, kind = item["metadata"], self._known[item["apiVersion"], item["kind"]]
        body = {"metadata": {**change, "resourceVersion": meta["resourceVersion"]}}
        await self._cluster.patch(kind, meta["name"], meta.get("namespace"), body)


def _owners(item: Object) -> list[Object]:
    return item["metadata"].get("ownerReferences") or []


def _leaves(item: Object) -> bool:
    return "deletionTimestamp" in item["metadata"]


def _awaits(item: Object | None, finalizer: str) -> bool:
    return item is not None and _leaves(item) and finalizer in (item["metadata"].get("finalizers") or [])
