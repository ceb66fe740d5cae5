"""DNS for headless Services: which names a pod can resolve, and when.

The name of a Service resolves while the Service selects a pod that has an address and is ready, or any pod with an
address under `publishNotReadyAddresses`. A pod has its own name below the Service that is its `subdomain`. The short
form works in the Service's namespace. Every pod's address is 127.0.0.1. The names are in each pod's /etc/hosts, which
follows the Services and pods of the cluster.

Deviations: no EndpointSlices; no cache, so names appear and disappear at once; a Service with an address of its own has
no name.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from cgd_local.controllers import SERVICE, condition, forever, is_over
from cgd_local.sandbox import Sandbox
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import POD, Kind


class Names:
    """Keeps the names that pods can resolve up to date."""

    def __init__(self, cluster: Cluster, sandboxes: Callable[[], Iterable[Sandbox]]) -> None:
        self._cluster, self._sandboxes = cluster, sandboxes
        self._changed = asyncio.Event()

    async def run(self) -> None:
        await asyncio.gather(
            forever("DNS's watch of pods", partial(self._watch, POD)),
            forever("DNS's watch of Services", partial(self._watch, SERVICE)),
            forever("DNS", self._follow),
        )

    async def _watch(self, kind: Kind) -> None:
        async for _ in self._cluster.watch(kind):
            self._changed.set()

    async def _follow(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            services, _ = await self._cluster.list(SERVICE)
            pods = (await self._cluster.list(POD))[0] if services else []
            for sandbox in self._sandboxes():
                sandbox.know(found_in(sandbox.namespace, services, pods))


def found_in(namespace: str, services: list[Object], pods: list[Object]) -> list[str]:
    """The names that a pod of a namespace can resolve."""
    names: set[str] = set()
    for service in services:
        home = service["metadata"]["namespace"]
        for name in _names_of(service, pods):
            names |= {f"{name}.{home}{rest}" for rest in ("", ".svc", ".svc.cluster.local")}
            names |= {name} if home == namespace else set()
    return sorted(names)


def _names_of(service: Object, pods: list[Object]) -> Iterator[str]:
    meta, spec = service["metadata"], service["spec"]
    selector: Object = spec.get("selector") or {}
    if spec.get("clusterIP") != "None" or not selector:
        return
    for pod in pods:
        labels = pod["metadata"].get("labels") or {}
        is_selected = pod["metadata"]["namespace"] == meta["namespace"] and selector.items() <= labels.items()
        status = pod.get("status", {})
        is_ready = condition(status.get("conditions") or [], "Ready") and "deletionTimestamp" not in pod["metadata"]
        is_published = "podIP" in status and not is_over(pod) and (is_ready or spec.get("publishNotReadyAddresses"))
        if is_selected and is_published:
            yield meta["name"]
            if pod["spec"].get("subdomain") == meta["name"] and "hostname" in pod["spec"]:
                yield f"{pod['spec']['hostname']}.{meta['name']}"
