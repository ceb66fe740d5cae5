"""What every controller here shares: the loop that looks, decides and acts; Events, conditions, owner references.

A controller is an ordinary client of the API. It keeps nothing: a change of an object or of one of its pods makes it
read both afresh and ask `decide`, a pure function of them and the time. That costs a list per look and saves the caches
and "expectations" of the real controllers; at the size of a development cluster the trade is good.
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
"""The default wait before what has failed is tried again."""
REFUSED_SECONDS = 1.0
"""The wait before what the API server has refused is tried again."""
SERVICE = Kind("v1", "Service", "services")
Key = tuple[str, str]  # namespace, name


@dataclass
class Decision:
    """What one look at an owner and what it controls leads to."""

    status: Object
    create: list[Object] = field(default_factory=list)
    delete: list[Object] = field(default_factory=list)
    release: list[Object] = field(default_factory=list)
    """What has the controller's finalizer and need not have it any more."""
    services: list[Object] = field(default_factory=list)
    """Services that there are to be."""
    unserved: list[str] = field(default_factory=list)
    """Names of Services that are to go."""
    events: list[tuple[str, str, str]] = field(default_factory=list)
    """Type (Normal or Warning), reason and message."""
    again: float | None = None
    """Seconds after which to look again even if nothing changes."""
    expired: bool = False
    """The owner itself is to go."""

    def refused(self, count: int) -> None:
        """So many of `create` could not be made: they are tried again."""
        self.again = min(self.again or REFUSED_SECONDS, REFUSED_SECONDS)
        if "active" in self.status:
            self.status["active"] -= count

    def expire(self, ended: Object, ttl: int | None, time_now: float) -> None:
        """Let the owner go when its time to live after the condition `ended` is over."""
        if ttl is not None:
            left = seconds(ended["lastTransitionTime"]) + ttl - time_now
            self.expired, self.again = left <= 0, max(left, 1.0)


class Controller:
    """Looks at objects of one kind, one at a time, whenever they or what they control (`makes`) change."""

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
        """With which it holds what it makes."""
        self._refusal = refusal
        """Reason of the Event that tells a refused creation."""
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
            named = (self._kind.kind, name)
            await self._release(one for one in made if _controller_name(one) == named)
            return None
        mine = [item for item in made if controller_of(item).get("uid") == owner["metadata"]["uid"]]
        decision = self._decide(await self._complete(owner), mine, time.time())
        await self._act(owner, decision)
        return decision.again

    async def _complete(self, owner: Object) -> Object:
        """The owner with whatever else is needed to decide."""
        return owner

    async def _act(self, owner: Object, decision: Decision) -> None:
        meta = owner["metadata"]
        name, namespace, uid = meta["name"], meta["namespace"], meta["uid"]
        what, propagation = self._makes.kind.lower(), "Background" if self._makes is POD else "Foreground"
        await self._release(decision.delete)  # what it deletes itself has not failed
        for item in decision.delete:
            made, made_uid = item["metadata"]["name"], item["metadata"]["uid"]
            await self._cluster.delete(self._makes, made, namespace, uid=made_uid, propagation=propagation)
            decision.events.append(("Normal", "SuccessfulDelete", f"Deleted {what}: {made}"))
        await self._release(decision.release)
        for count, item in enumerate(decision.create):
            try:
                await self._cluster.create(self._makes, item)
            except AlreadyExists:  # a namesake is still leaving; its end brings us back
                continue
            except ApiError as error:
                if error.status not in (400, 403, 422):
                    raise
                await self._tell_refusal(owner, error, self._makes)
                decision.refused(len(decision.create) - count)
                break
            decision.events.append(("Normal", "SuccessfulCreate", f"Created {what}: {item['metadata']['name']}"))
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

    async def _serve(self, owner: Object, decision: Decision) -> bool:
        """Make the Services that are missing; whether all are there now."""
        namespace = owner["metadata"]["namespace"]
        known = (await self._cluster.list(SERVICE, namespace))[0] if decision.services else []
        names = {service["metadata"]["name"] for service in known}
        for service in decision.services:
            if service["metadata"]["name"] in names:
                continue
            try:
                await self._cluster.create(SERVICE, service)
            except ApiError as error:
                if error.status not in (400, 403, 422):
                    raise
                await self._tell_refusal(owner, error, SERVICE)
                decision.again = REFUSED_SECONDS
                return False
            name = service["metadata"]["name"]
            decision.events.append(("Normal", "SuccessfulCreateService", f"Created service: {name}"))
        return True

    async def _release(self, items: Iterable[Object]) -> None:
        for item in items:
            meta = item["metadata"]
            if self._finalizer and self._finalizer in (meta.get("finalizers") or []):
                left = [one for one in meta["finalizers"] if one != self._finalizer]
                body = {"metadata": {"resourceVersion": meta["resourceVersion"], "finalizers": left}}
                await self._cluster.patch(self._makes, meta["name"], meta["namespace"], body)

    async def _tell_refusal(self, owner: Object, error: ApiError, kind: Kind) -> None:
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
    """Cancel a task until it has ended: a client whose time-out is over at that moment takes the first cancellation for
    its own, and goes on."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=1.0)


async def record(cluster: Cluster, about: Object, kind: str, reason: str, message: str, *, component: str) -> None:
    """Write an Event (`kind` Normal or Warning), or that it was seen again. A courtesy: nothing fails without it."""
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
        log.warning("no event %s for %s: %s", reason, meta["name"], error)


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


def owned(kind: Kind, owner: Object, name: str, labels: Object) -> Object:
    """The metadata of what a controller makes for an owner."""
    meta = owner["metadata"]
    reference = {"apiVersion": kind.api_version, "kind": kind.kind, "name": meta["name"], "uid": meta["uid"]}
    references = [reference | {"controller": True, "blockOwnerDeletion": True}]
    return {"name": name, "namespace": meta["namespace"], "labels": labels, "ownerReferences": references}


def headless(metadata: Object, selector: Object, **spec: Any) -> Object:
    """A Service that is a name for pods and has no address of its own."""
    spec = {"clusterIP": "None", "selector": selector, **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def pod_of(kind: Kind, owner: Object, template: Object, name: str, labels: Object, annotations: Object) -> Object:
    """A pod of an owner: its template, and what the controller adds."""
    given = template.get("metadata") or {}
    metadata = {
        **owned(kind, owner, name, {**(given.get("labels") or {}), **labels}),
        "annotations": {**(given.get("annotations") or {}), **annotations},
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def with_env(template: Object, entries: list[Object]) -> Object:
    """A template whose containers have these variables, too."""
    containers = [c | {"env": [*(c.get("env") or []), *entries]} for c in template["spec"]["containers"]]
    return template | {"spec": template["spec"] | {"containers": containers}}


def controller_of(item: Object) -> Object:
    """The owner reference of the controller; empty when there is none."""
    references: list[Object] = item["metadata"].get("ownerReferences") or []
    return next((r for r in references if r.get("controller")), {})


def _controller_name(item: Object) -> tuple[str, str]:
    owner = controller_of(item)
    return owner.get("kind", ""), owner.get("name", "")


def phase(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase") or "Pending")


def is_over(pod: Object) -> bool:
    return phase(pod) in ("Succeeded", "Failed")


def is_leaving(pod: Object) -> bool:
    """It is being deleted, and has not ended yet."""
    return "deletionTimestamp" in pod["metadata"] and not is_over(pod)


def is_active(pod: Object) -> bool:
    return "deletionTimestamp" not in pod["metadata"] and not is_over(pod)


def containers_of(pod: Object) -> list[Object]:
    """The statuses of its containers; none before there is any."""
    return pod.get("status", {}).get("containerStatuses") or []


def end_of(container: Object) -> Object:
    """How a container ended, by its status; empty when it did not, or never began."""
    end: Object = container.get("state", {}).get("terminated", {})
    return end


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()
