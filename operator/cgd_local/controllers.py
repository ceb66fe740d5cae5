"""What every controller here shares: a loop that looks again, Events, conditions, owner references.

A controller is an ordinary client of the API. It keeps nothing: a change of an object or of one of its pods puts the
object's key into the queue, and `reconcile` reads everything afresh. That costs a list per look and saves the caches
and "expectations" of the real controllers; at the size of a development cluster the trade is good.
"""

import asyncio
import hashlib
import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import ClassVar

from cgd_operator.cluster import EVENT, POD, AlreadyExists, ApiError, Cluster, Kind, Object

log = logging.getLogger(__name__)

RESYNC_SECONDS = 30.0
SUFFIX_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"

Key = tuple[str, str]  # namespace, name


class Controller(ABC):
    """Reconciles objects of one kind, one at a time, whenever they or the pods they control change."""

    kind: ClassVar[Kind]

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._due: dict[Key, float] = {}
        self._changed = asyncio.Event()

    @abstractmethod
    async def reconcile(self, owner: Object) -> float | None:
        """Bring the world nearer to the spec; return the seconds after which to look again, None for never."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(forever(f"watch of {self.kind.plural}", self._watch_owners))
            group.create_task(forever(f"watch of pods for {self.kind.plural}", self._watch_pods))
            group.create_task(forever(f"{self.kind.kind} controller", self._work))

    async def event(self, about: Object, kind: str, reason: str, message: str) -> None:
        await record(self.cluster, about, kind, reason, message, component=f"{self.kind.kind.lower()}-controller")

    async def _watch_owners(self) -> None:
        async for event, item in self.cluster.watch(self.kind):
            if event in ("ADDED", "MODIFIED"):
                self._look(_key(item))

    async def _watch_pods(self) -> None:
        async for event, pod in self.cluster.watch(POD):
            if event != "SYNCED" and (owner := controller_of(pod)) and owner["kind"] == self.kind.kind:
                self._look((pod["metadata"]["namespace"], owner["name"]))

    def _look(self, key: Key, after: float = 0.0) -> None:
        due = time.monotonic() + after
        self._due[key] = min(due, self._due.get(key, due))
        self._changed.set()

    async def _work(self) -> None:
        while True:
            key = await self._next()
            try:
                owner = await self.cluster.get(self.kind, key[1], key[0])
                again = await self.reconcile(owner) if owner else None
            except Exception:
                log.exception("%s %s/%s could not be reconciled; trying again", self.kind.kind, *key)
                again = 1.0
            if again is not None:
                self._look(key, min(again, RESYNC_SECONDS))

    async def _next(self) -> Key:
        while True:
            self._changed.clear()
            key = min(self._due, key=self._due.__getitem__, default=None)
            wait = self._due[key] - time.monotonic() if key else None
            if key and wait is not None and wait <= 0:
                del self._due[key]
                return key
            try:
                await asyncio.wait_for(self._changed.wait(), wait)
            except TimeoutError:
                continue


async def forever(what: str, work: Callable[[], Awaitable[None]], *, pause: float = 1.0) -> None:
    """Run `work` again whenever it ends or fails: a controller outlives its API server's restarts."""
    while True:
        try:
            await work()
        except ApiError as error:
            log.warning("%s was interrupted; starting it again: %s", what, error)
        except Exception:
            log.exception("%s failed; starting it again", what)
        await asyncio.sleep(pause)


async def record(cluster: Cluster, about: Object, kind: str, reason: str, message: str, *, component: str) -> None:
    """Write an Event (`kind` Normal or Warning); the same one again only raises its count."""
    meta = about["metadata"]
    digest = hashlib.sha256(f"{meta['uid']}/{reason}/{message}".encode()).hexdigest()[:16]
    name, namespace = f"{meta['name'][:200]}.{digest}", meta.get("namespace", "default")
    reference = {
        "apiVersion": about["apiVersion"],
        "kind": about["kind"],
        "name": meta["name"],
        "namespace": meta.get("namespace", ""),
        "uid": meta["uid"],
    }
    body = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": reference,
        "type": kind,
        "reason": reason,
        "message": message[:1024],
        "source": {"component": component},
        "reportingComponent": component,
        "reportingInstance": component,
        "firstTimestamp": now(),
        "lastTimestamp": now(),
        "count": 1,
    }
    try:
        await cluster.create(EVENT, body)
    except AlreadyExists:
        seen = await cluster.get(EVENT, name, namespace) or {}
        again = {"count": int(seen.get("count") or 1) + 1, "lastTimestamp": now()}
        await cluster.patch(EVENT, name, namespace, again)


def set_condition(conditions: list[Object], kind: str, status: str, reason: str, message: str) -> bool:
    """Set one condition in place; the transition time moves only with the status. True when the status changed."""
    found = next((c for c in conditions if c["type"] == kind), None)
    changed = found is None or found["status"] != status
    if found is None:
        found = {"type": kind}
        conditions.append(found)
    found |= {"status": status, "reason": reason, "message": message}
    if changed:
        found["lastTransitionTime"] = now()
    return changed


def condition(conditions: Iterable[Object], kind: str) -> Object | None:
    """The condition of that type when it is True."""
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)


def owner_reference(kind: Kind, owner: Object) -> Object:
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def controller_of(item: Object) -> Object | None:
    references: list[Object] = item["metadata"].get("ownerReferences") or []
    return next((r for r in references if r.get("controller")), None)


def phase(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase") or "Pending")


def is_terminating(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"] and phase(pod) not in ("Succeeded", "Failed")


def is_active(pod: Object) -> bool:
    return "deletionTimestamp" not in pod["metadata"] and phase(pod) not in ("Succeeded", "Failed")


def statuses(pod: Object) -> list[Object]:
    """The statuses of a pod's containers, the init containers last, as failure policies look at them."""
    status = pod.get("status", {})
    return [*(status.get("containerStatuses") or []), *(status.get("initContainerStatuses") or [])]


def finished_at(pod: Object) -> float:
    """When the last container ended, in seconds since the epoch; else when its deletion began, or it last changed."""
    ends = [s["state"]["terminated"]["finishedAt"] for s in statuses(pod) if "terminated" in s.get("state", {})]
    if not ends and "deletionTimestamp" in pod["metadata"]:
        return seconds(pod["metadata"]["deletionTimestamp"]) - float(pod["metadata"]["deletionGracePeriodSeconds"])
    changes = [c["lastTransitionTime"] for c in pod.get("status", {}).get("conditions") or []]
    return max(map(seconds, ends or changes), default=time.time())


def suffix() -> str:
    return "".join(random.choices(SUFFIX_ALPHABET, k=5))  # noqa: S311  a name, not a secret


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


def _key(item: Object) -> Key:
    return item["metadata"]["namespace"], item["metadata"]["name"]
