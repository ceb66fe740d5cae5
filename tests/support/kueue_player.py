"""Kueue, played by a test against an API server: its rules for `suspend`, without quotas and without its webhook."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from cgd_local.cluster import install
from cgd_local.controllers import now
from cgd_local.kubeflow import definition, struct
from cgd_operator.kube.kinds import WORKLOADS, Kind
from cgd_operator.planning.manifests import KINDS, suspension

QUEUE = {"kueue.x-k8s.io/queue-name": "gpus", "kueue.x-k8s.io/priority-class": "urgent"}
SPEC = struct([], queueName={"type": "string"}, active={"type": "boolean", "default": True})


class Kueue:
    """Kueue's rules for `suspend`: what is not admitted does not run, what is admitted does, an inactive Workload is
    evicted. Quota is what the test says."""

    def __init__(self, world: Any, served: Kind = WORKLOADS[0]) -> None:
        self.world, self.served = world, served
        self.full = ""
        """Why there is no quota; empty: there is enough."""
        self.webhook_down = False
        """What it has admitted cannot be started: the change of `suspend` is refused."""
        self.evicted = 0
        self.stopped = 0
        """How often a child ran without being admitted."""

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator["Kueue"]:
        await install(self.world.client, definition(self.served, SPEC))
        work = asyncio.create_task(self._loop())
        try:
            yield self
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work

    async def _loop(self) -> None:
        while True:
            for child in (await self.world.children()).values():
                ended = any(one["type"] in ("Complete", "Succeeded", "Failed") for one in conditions(child))
                if "kueue.x-k8s.io/queue-name" in child["metadata"]["labels"] and not ended:
                    await self._reconcile(child)
            await asyncio.sleep(0.02)

    async def _reconcile(self, child: dict[str, Any]) -> None:
        meta = child["metadata"]
        name = f"{child['kind'].lower()}-{meta['name']}"
        if await self.world.client.get(self.served, name, "default") is None:
            await self._suspend(child, True)
            await self._create(name, meta)
        found = await self.world.client.get(self.served, name, "default")
        active, admitted = found["spec"]["active"], is_true(found, "Admitted")
        if admitted and (not active or self.full):
            self.evicted += 1
            reason = "Preempted" if active else "Deactivated"
            await self._tell(name, False, self.full or "deactivated", evicted=reason)
        elif not admitted and active:
            await self._tell(name, not self.full, self.full)
        admitted = is_true(await self.world.client.get(self.served, name, "default"), "Admitted")
        if suspended(child) == admitted and not (admitted and self.webhook_down):
            self.stopped += not admitted
            await self._suspend(child, not admitted)

    async def _create(self, name: str, meta: dict[str, Any]) -> None:
        labels = {"kueue.x-k8s.io/job-uid": meta["uid"]}
        body = {
            "apiVersion": self.served.api_version,
            "kind": "Workload",
            "metadata": {"name": name, "namespace": "default", "labels": labels},
            "spec": {"queueName": meta["labels"]["kueue.x-k8s.io/queue-name"]},
        }
        await self.world.client.create(self.served, body)

    async def _tell(self, name: str, admitted: bool, message: str, evicted: str = "") -> None:
        since = {"lastTransitionTime": now()}
        kinds = {"QuotaReserved": admitted, "Admitted": admitted} | ({"Evicted": True} if evicted else {})
        told = [
            {"type": kind, "status": str(true), "reason": evicted or "Pending", "message": message, **since}
            for kind, true in kinds.items()
        ]
        await self.world.client.patch(
            self.served, name, "default", {"status": {"conditions": told}}, subresource="status"
        )

    async def _suspend(self, child: dict[str, Any], suspend: bool) -> None:
        body = {"spec": suspension(child["kind"], suspend)}
        await self.world.client.patch(KINDS[child["kind"]], child["metadata"]["name"], "default", body)


def conditions(one: dict[str, Any]) -> list[dict[str, Any]]:
    return list(one.get("status", {}).get("conditions", []))


def is_true(one: dict[str, Any], kind: str) -> bool:
    return any(told["type"] == kind and told["status"] == "True" for told in conditions(one))


def suspended(child: dict[str, Any]) -> bool:
    return bool(child["spec"].get("runPolicy", child["spec"]).get("suspend", False))
