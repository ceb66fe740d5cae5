"""The operator's HTTP servers, for untrusted callers: a connection carries one request and has a time limit.

The cost of a flood is bounded before a byte is read: connections are accepted at a bounded rate, and more slowly while
many requests are refused, so that the reconcile loop keeps running.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from aiohttp import web
from aiohttp.http import HttpProcessingError

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SECONDS = 10.0
"""The time limit of a connection, for its request and the answer. Stage programs wait 5 s for an answer."""
MOST = 128
"""The most connections at a time. A further connection ends the oldest: an ordinary caller takes milliseconds."""
AT_ONCE = 20
"""Connections that are accepted without a pause after a quiet time."""
REFUSED = 4
"""A connection whose request is refused counts as this many: floods consist of them."""
LONGEST_PAUSE = 1.0
BODY_LIMIT = 64 * 1024
LINE, HEADERS = 4096, 32
"""The most bytes of a header line, and the most lines: they bound the memory of an incomplete request."""


class _Well(logging.Filter):
    """Drops log records about requests that are not HTTP: the answer is 400, and an admin has nothing to do."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


class Listener:
    """Serves an application. `port` is the port that it listens on.

    Args:
        rate: the connections that are accepted per second; others wait in the kernel.
    """

    def __init__(self, app: web.Application, *, rate: float) -> None:
        self._rate = rate
        app.middlewares.append(_whole)
        app.on_response_prepare.append(self._last)
        logger = logging.getLogger(f"{__name__}.http")
        logger.addFilter(_Well())
        self._runner = web.AppRunner(
            app,
            access_log=None,
            shutdown_timeout=1,
            logger=logger,
            keepalive_timeout=SECONDS,
            lingering_time=0,
            max_line_size=LINE,
            max_field_size=LINE,
            max_headers=HEADERS,
            read_bufsize=BODY_LIMIT,
            auto_decompress=False,
        )
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._open: dict[asyncio.Transport, asyncio.TimerHandle] = {}
        """Open connections, the oldest first."""
        self._paid = float("-inf")
        """Until when the accepted connections use up the rate, on the monotonic clock."""
        self.host, self.port = "", 0

    async def start(self, host: str, port: int) -> None:
        await self._runner.setup()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=1024)
        self._socket.setblocking(False)
        self.host, self.port = host, self._socket.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(self._socket), name=f"accept at {host}:{self.port}")

    async def stop(self) -> None:
        if self._accepting and self._socket:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._socket.close()
        await self._runner.cleanup()
        for transport, timer in self._open.items():
            timer.cancel()
            transport.abort()
        self._open.clear()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                with suppress(ConnectionError):  # the caller has closed the connection
                    taken, _ = await loop.sock_accept(listening)
                    await self._serve(taken)
            except OSError as error:  # for example, too many open files
                log.warning("a connection was not accepted: %s", error)
                await asyncio.sleep(LONGEST_PAUSE)
            self._pay(1)
            await asyncio.sleep(max(0.0, self._paid - time.monotonic()))

    def _pay(self, connections: int) -> None:
        now = time.monotonic()
        self._paid = min(max(self._paid, now - AT_ONCE / self._rate) + connections / self._rate, now + LONGEST_PAUSE)

    async def _serve(self, taken: socket.socket) -> None:
        loop, server = asyncio.get_running_loop(), self._runner.server
        assert server is not None
        for over in [transport for transport in self._open if transport.is_closing()]:
            self._end(over)
        if len(self._open) >= MOST:
            self._end(next(iter(self._open)))
        try:
            transport, _ = await loop.connect_accepted_socket(server, taken)
        except BaseException:
            taken.close()
            raise
        self._open[transport] = loop.call_later(SECONDS, self._end, transport)

    def _end(self, transport: asyncio.Transport) -> None:
        if timer := self._open.pop(transport, None):
            timer.cancel()
            transport.abort()

    async def _last(self, _: web.Request, answer: web.StreamResponse) -> None:
        """Close the connection after its first request, so that every request of a flood counts against the rate. It is
        done here because middlewares do not see the answer to an `Expect` header."""
        if 400 <= answer.status < 500:
            self._pay(REFUSED - 1)
        answer.headers["Connection"] = "close"
        answer.force_close()


@web.middleware
async def _whole(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        try:
            answer = await handler(request)
        except web.HTTPException as error:
            answer = web.json_response({"message": error.reason}, status=error.status)
        # Read the rest of a refused body: a caller that still sends when the connection closes never sees the answer.
        if request.content_length is not None and request.content_length <= BODY_LIMIT:
            while not request.content.at_eof():
                await request.content.readany()
    except (web.RequestPayloadError, ConnectionError) as error:
        answer = web.json_response({"message": f"the request is not whole: {type(error).__name__}"}, status=400)
    return answer
