"""The endpoints for probes, Prometheus and `helm test`: `/healthz`, `/readyz`, `/leaderz` and `/metrics`."""

import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from cgd_operator import metrics
from cgd_operator.http.serving import Listener

log = logging.getLogger(__name__)

STALE_SECONDS = 120.0
"""A sweep comes every 30 s; an operator that missed four of them hangs."""


@dataclass
class Health:
    """Whether this operator is alive, and whether it leads or could. An operator that waits for the Lease is ready: it
    can take over, and it forwards progress reports to the leader."""

    leader_answers: Callable[[], Awaitable[bool]] | None = None
    """Whether a leader answers this operator."""
    ready: bool = False
    leading_since: float | None = None
    """On the monotonic clock."""
    last_sweep: float | None = None
    """The last sweep, on the monotonic clock."""
    port: int = 0
    _listener: Listener | None = field(default=None, repr=False)

    def swept(self) -> None:
        self.last_sweep = time.monotonic()
        metrics.LAST_SWEEP.set_to_current_time()

    def could_lead(self) -> None:
        self.ready = True

    def lead(self) -> None:
        self.ready = True
        self.leading_since = time.monotonic()
        metrics.LEADER.set(1)

    def trouble(self) -> str:
        """Why this operator should be restarted; "" if it is healthy."""
        if self.leading_since is None:
            return ""
        silent = time.monotonic() - max(self.leading_since, self.last_sweep or 0.0)
        return f"no sweep for {silent:.0f} s" if silent > STALE_SECONDS else ""

    async def start(self, host: str, port: int) -> None:
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/leaderz", self._leaderz)
        app.router.add_get("/metrics", self._metrics)
        self._listener = Listener(app, rate=math.inf)  # kubelet waits a second, and then ends the operator
        await self._listener.start(host, port)
        self.port = self._listener.port
        log.info("probes and metrics are on %s:%d", host, self.port)

    async def stop(self) -> None:
        if self._listener:
            await self._listener.stop()

    async def _healthz(self, _: web.Request) -> web.Response:
        trouble = self.trouble()
        return web.Response(text=trouble or "ok", status=503 if trouble else 200)

    async def _readyz(self, _: web.Request) -> web.Response:
        waits = "waits for the Lease" if self.ready else "has not reached the API server"
        text = waits if self.leading_since is None else "leads"
        return web.Response(text=text, status=200 if self.ready else 503)

    async def _leaderz(self, _: web.Request) -> web.Response:
        leads = self.leader_answers is not None and await self.leader_answers()
        return web.Response(text="an operator leads" if leads else "no operator leads", status=200 if leads else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})
