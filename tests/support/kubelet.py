"""A pod with a log that a played kubelet serves."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import NODE, POD
from cgd_operator.planning.manifests import STAGE_LABEL, UID_LABEL

Logs = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def kubelet(logs: Logs) -> AsyncIterator[int]:
    """A server that answers requests for logs; yields its port."""
    app = web.Application()
    app.router.add_get("/containerLogs/{ns}/{pod}/{container}", logs)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def a_pod_with_a_log(client: Cluster, run: Any, port: int) -> None:
    """A running pod of the stage `answer`, on a node whose kubelet listens on a port."""
    await client.create(NODE, {"metadata": {"name": "n"}})
    status = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
    }
    await client.patch(NODE, "n", None, {"status": status}, subresource="status")
    labels = {UID_LABEL: run["metadata"]["uid"], STAGE_LABEL: "answer"}
    meta = {"name": "demo-answer-1-0", "namespace": "default", "labels": labels}
    containers = [{"name": name, "image": "i"} for name in ("istio-proxy", "stage")]
    await client.create(POD, {"metadata": meta, "spec": {"nodeName": "n", "containers": containers}})
    await client.patch(POD, meta["name"], "default", {"status": {"phase": "Running"}}, subresource="status")
