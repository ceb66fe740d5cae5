"""What all controllers here share: the loop that looks, decides and acts; Events, conditions, owner references.

A controller is an ordinary client of the API and keeps no state: when an object or one of its pods changes, it reads
both again and calls `decide`, a pure function of them and the time. Each look costs a list, and needs none of the
caches and "expectations" of the real controllers: a good trade at the size of a development cluster.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import EVENT, POD, AlreadyExists, ApiError, Kind

log = logging.getLogger(__name__)

BACKOFF_SECONDS = 10.0
"""The default wait before a failed pod or container runs again."""
REFUSED_SECONDS = 1.0
"""The wait before a new try, after the API server has refused to create an object."""
SERVICE = Kind("v1", "Service", "services")
Key = tuple[str, str]  # namespace, name


@dataclass
class Decision:
    """What a controller does after one look at an owner and the objects that it controls."""

    status: Object
    create: list[Object] = field(default_factory=list)
    delete: list[Object] = field(default_factory=list)
    release: list[Object] = field(default_factory=list)
    """Objects that lose the controller's finalizer."""
    services: list[Object] = field(default_factory=list)
    """Services that must exist."""
    unserved: list[str] = field(default_factory=list)
    """Names of Services to delete."""
    events: list[tuple[str, str, str]] = field(default_factory=list)
    """Type (Normal or Warning), reason and message."""
    again: float | None = None
    """Seconds after which to look again even if nothing changes."""
    expired: bool = False
    """Whether to delete the owner itself."""

    def expire(self, ended: Object, ttl: int | None, time_now: float) -> None:
        """Delete the owner when its time to live after the condition `ended` is over."""
        if ttl is not None:
            left = seconds(ended["lastTransitionTime"]) + ttl - time_now
            self.expired, self.again = left <= 0, max(left, 1.0)


class Controller:
    """Looks at objects of one kind, one at a time, when they or the objects that they control (`makes`) change."""

    def __init__(
        self,
        cluster: Cluster,
        kind: Kind,
        decide: Callable[[Object, list[Object], float], Decision],
        makes: Kind = POD,
        finalizer: str = "",
        refusal: str = "FailedCreate",
    ) -> None:
        self._cluster, self._kind, self._decide, self._makes = cluster, kind, decide, makes
        self._finalizer = finalizer
        """The finalizer with which it holds the objects that it makes."""
        self._refusal = refusal
        """The reason of the Event about a refused creation."""
        self._name = f"{kind.kind.lower()}-controller"
        self._queue: asyncio.Queue[Key] = asyncio.Queue()
        self._queued: set[Key] = set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for work in (self._watch, self._watch_made, self._work):
                group.create_task(forever(self._name, work))

    async def _watch(self) -> None:
        async for event, item in self._cluster.watch(self._kind):
            if event != "SYNCED":
                self._look((item["metadata"]["namespace"], item["metadata"]["name"]))

    async def _watch_made(self) -> None:
        async for event, item in self._cluster.watch(self._makes):
            owner = controller_of(item) if event != "SYNCED" else {}
            if owner.get("kind") == self._kind.kind:
                self._look((item["metadata"]["namespace"], owner["name"]))

    def _look(self, key: Key) -> None:
        if key not in self._queued:
            self._queued.add(key)
            self._queue.put_nowait(key)

    async def _work(self) -> None:
        while True:
            key = await self._queue.get()
            self._queued.discard(key)
            try:
                again = await self._reconcile(*key)
            except Exception:
                log.exception("%s %s/%s could not be reconciled; trying again", self._kind.kind, *key)
                again = 1.0
            if again is not None:
                asyncio.get_running_loop().call_later(again, self._look, key)

    async def _reconcile(self, namespace: str, name: str) -> float | None:
        owner = await self._cluster.get(self._kind, name, namespace)
        made, _ = await self._cluster.list(self._makes, namespace)
        if owner is None or "deletionTimestamp" in owner["metadata"]:
            for item in made:
                controller = controller_of(item)
                if (controller.get("kind"), controller.get("name")) == (self._kind.kind, name):
                    await self._release([item])
            return None
        controlled = [item for item in made if controller_of(item).get("uid") == owner["metadata"]["uid"]]
        decision = self._decide(await self._complete(owner), controlled, time.time())
        await self._act(owner, decision)
        return decision.again

    async def _complete(self, owner: Object) -> Object:
        """The owner with everything else that `decide` needs."""
        return owner

    async def _act(self, owner: Object, decision: Decision) -> None:
        meta = owner["metadata"]
        name, namespace, uid = meta["name"], meta["namespace"], meta["uid"]
        what, propagation = self._makes.kind.lower(), "Background" if self._makes is POD else "Foreground"
        await self._release(decision.delete)  # a pod that the controller deletes has not failed
        for item in decision.delete:
            made, made_uid = item["metadata"]["name"], item["metadata"]["uid"]
            await self._cluster.delete(self._makes, made, namespace, uid=made_uid, propagation=propagation)
            decision.events.append(("Normal", "SuccessfulDelete", f"Deleted {what}: {made}"))
        await self._release(decision.release)
        await self._create(owner, decision)
        for service in decision.unserved:
            await self._cluster.delete(SERVICE, service, namespace)
        await self._serve(owner, decision)
        before = owner.get("status") or {}
        if any(before.get(key) != value for key, value in decision.status.items()):
            await self._cluster.patch(self._kind, name, namespace, {"status": decision.status}, subresource="status")
        for event in decision.events:
            await record(self._cluster, owner, *event, component=self._name)
        if decision.expired:
            await self._cluster.delete(self._kind, name, namespace, uid=uid, propagation="Foreground")

    async def _create(self, owner: Object, decision: Decision) -> None:
        """Create the objects until the server refuses one; the next look tries again."""
        for count, item in enumerate(decision.create):
            try:
                await self._cluster.create(self._makes, item)
            except AlreadyExists:  # another object of this name is still ending; its end triggers the next look
                continue
            except ApiError as error:
                if error.status not in (400, 403, 422):
                    raise
                await self._record_refusal(owner, error, self._makes)
                decision.again = min(decision.again or REFUSED_SECONDS, REFUSED_SECONDS)
                if "active" in decision.status:
                    decision.status["active"] -= len(decision.create) - count
                break
            decision.events.append(
                ("Normal", "SuccessfulCreate", f"Created {self._makes.kind.lower()}: {item['metadata']['name']}")
            )

    async def _serve(self, owner: Object, decision: Decision) -> bool:
        """Create the missing Services. True when all exist."""
        namespace = owner["metadata"]["namespace"]
        existing = (await self._cluster.list(SERVICE, namespace))[0] if decision.services else []
        names = {service["metadata"]["name"] for service in existing}
        for service in decision.services:
            if service["metadata"]["name"] in names:
                continue
            try:
                await self._cluster.create(SERVICE, service)
            except ApiError as error:
                if error.status not in (400, 403, 422):
                    raise
                await self._record_refusal(owner, error, SERVICE)
                decision.again = REFUSED_SECONDS
                return False
            name = service["metadata"]["name"]
            decision.events.append(("Normal", "SuccessfulCreateService", f"Created service: {name}"))
        return True

    async def _release(self, items: Iterable[Object]) -> None:
        for item in items:
            meta = item["metadata"]
            if self._finalizer and self._finalizer in (meta.get("finalizers") or []):
                left = [finalizer for finalizer in meta["finalizers"] if finalizer != self._finalizer]
                body = {"metadata": {"resourceVersion": meta["resourceVersion"], "finalizers": left}}
                await self._cluster.patch(self._makes, meta["name"], meta["namespace"], body)

    async def _record_refusal(self, owner: Object, error: ApiError, kind: Kind) -> None:
        reason = "FailedCreateService" if kind is SERVICE else self._refusal
        message = f"Error creating: {error.message}"
        await record(self._cluster, owner, "Warning", reason, message, component=self._name)


async def forever(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` again whenever it ends or fails: a controller outlives its API server's restarts."""
    while True:
        try:
            await work()
        except ApiError as error:
            log.warning("%s was interrupted; starting it again: %s", what, error)
        except Exception:
            log.exception("%s failed; starting it again", what)
        await asyncio.sleep(1.0)


async def stop_task(task: asyncio.Task[None]) -> None:
    """Cancel a task until it has ended: a client whose time-out expires at that moment takes the first cancellation for
    its own time-out, and continues."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=1.0)


async def record(cluster: Cluster, about: Object, kind: str, reason: str, message: str, *, component: str) -> None:
    """Write an Event (`kind` Normal or Warning), or the time at which it happened again. Nothing fails without it."""
    meta = about["metadata"]
    digest = hashlib.sha256(f"{meta['uid']}/{reason}/{message}".encode()).hexdigest()[:16]
    name, reference = f"{meta['name'][:200]}.{digest}", {name: about[name] for name in ("apiVersion", "kind")}
    reference |= {name: meta[name] for name in ("name", "namespace", "uid")}
    body = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": meta["namespace"]},
        "involvedObject": reference,
        "type": kind,
        "reason": reason,
        "message": message[:1024],
        "source": {"component": component},
        "firstTimestamp": now(),
        "lastTimestamp": now(),
        "count": 1,
    }
    try:
        await cluster.create(EVENT, body)
    except AlreadyExists:
        await cluster.patch(EVENT, name, meta["namespace"], {"lastTimestamp": now()})
    except ApiError as error:
        log.warning("could not write the event %s for %s: %s", reason, meta["name"], error)


def set_condition(conditions: list[Object], kind: str, status: str, reason: str, message: str) -> bool:
    """Set a condition in place. The transition time changes only with the status. True when the status changed."""
    entry = next((entry for entry in conditions if entry["type"] == kind), None)
    changed = entry is None or entry["status"] != status
    if entry is None:
        entry = {"type": kind}
        conditions.append(entry)
    entry |= {"status": status, "reason": reason, "message": message}
    if changed:
        entry["lastTransitionTime"] = now()
    return changed


def condition(conditions: Iterable[Object], kind: str) -> Object | None:
    """The condition of that type, if it is True."""
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)


def owned(kind: Kind, owner: Object, name: str, labels: Object) -> Object:
    """The metadata of an object that a controller makes for an owner."""
    meta = owner["metadata"]
    reference = {"apiVersion": kind.api_version, "kind": kind.kind, "name": meta["name"], "uid": meta["uid"]}
    references = [reference | {"controller": True, "blockOwnerDeletion": True}]
    return {"name": name, "namespace": meta["namespace"], "labels": labels, "ownerReferences": references}


def headless(metadata: Object, selector: Object, **spec: Any) -> Object:
    """A Service that gives pods a name and has no address."""
    spec = {"clusterIP": "None", "selector": selector, **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def pod_of(kind: Kind, owner: Object, template: Object, name: str, labels: Object, annotations: Object) -> Object:
    """A pod of an owner, from the owner's template and the controller's labels and annotations."""
    meta = template.get("metadata") or {}
    metadata = {
        **owned(kind, owner, name, {**(meta.get("labels") or {}), **labels}),
        "annotations": {**(meta.get("annotations") or {}), **annotations},
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def with_env(template: Object, entries: list[Object]) -> Object:
    """The template, with these variables added to its containers."""
    containers = [c | {"env": [*(c.get("env") or []), *entries]} for c in template["spec"]["containers"]]
    return template | {"spec": template["spec"] | {"containers": containers}}


def controller_of(item: Object) -> Object:
    """The owner reference of the object's controller; empty without a controller."""
    references: list[Object] = item["metadata"].get("ownerReferences") or []
    return next((reference for reference in references if reference.get("controller")), {})


def phase(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase") or "Pending")


def is_over(pod: Object) -> bool:
    return phase(pod) in ("Succeeded", "Failed")


def is_active(pod: Object) -> bool:
    return "deletionTimestamp" not in pod["metadata"] and not is_over(pod)


def containers_of(pod: Object) -> list[Object]:
    """The statuses of the pod's containers; empty until the node has written them."""
    return pod.get("status", {}).get("containerStatuses") or []


def end_of(container: Object) -> Object:
    """How a container ended, by its status; empty if it has not ended, or never started."""
    end: Object = container.get("state", {}).get("terminated", {})
    return end


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()
