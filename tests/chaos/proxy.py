"""A proxy between the programs and the S3 server: it breaks what it is told to break, and tells of every write.

S3's signatures cover the Host header, so it goes through as it came.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from enum import Enum

import aiohttp
from aiohttp import web
from yarl import URL

STALL_SECONDS = 3.0
"""Longer than a pod of this suite waits for an answer."""
_POD = re.compile(r"exec-env/(\S+)")
_NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "expect"}


class Fault(Enum):
    """What can happen to one request."""

    ERROR = "500"
    SLOW_DOWN = "503 SlowDown"
    NO_XML = "502 of a load balancer"
    STALL = "time-out"
    RESET = "reset before the store"
    LOST_ANSWER = "reset after the store"
    TRUNCATED = "truncated body"


_BEFORE = {Fault.ERROR, Fault.SLOW_DOWN, Fault.NO_XML, Fault.STALL, Fault.RESET}


class Moment(Enum):
    BEFORE = "before the store has it"
    AFTER = "stored, not answered"


Choose = Callable[[web.Request], Fault | None]
Watch = Callable[[str, Moment], Awaitable[bool]]
"""False: the write never comes to the store."""


def no_fault(request: web.Request) -> None:
    return None


async def no_watch(pod: str, moment: Moment) -> bool:
    return True


class Proxy:
    """`choose` decides on the fault of a request; `at_write` is awaited around every write, with the pod's name."""

    def __init__(self, target: Callable[[], str]) -> None:
        self._target = target
        self.choose: Choose = no_fault
        self.at_write: Watch = no_watch
        self.faults: Counter[Fault] = Counter()
        self.writes: Counter[str] = Counter()
        """By pod: writes that reached the store."""
        self.port = 0
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=30))
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()
        if self._session:
            await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        pod = _pod(request)
        fault = self.choose(request)
        if fault is Fault.TRUNCATED and request.method != "GET":
            fault = Fault.LOST_ANSWER
        if fault:
            self.faults[fault] += 1
        if fault in _BEFORE:
            return await _broken(fault, request)
        writes = request.method == "PUT"
        if writes and not await self.at_write(pod, Moment.BEFORE):
            return _reset(request)
        try:
            status, headers, data = await self._forward(request, body)
        except aiohttp.ClientError:
            return _reset(request)
        if writes:
            self.writes[pod] += 1
            await self.at_write(pod, Moment.AFTER)
        match fault:
            case Fault.LOST_ANSWER:
                return _reset(request)
            case Fault.TRUNCATED:
                return await _truncated(request, status, headers, data)
        return web.Response(status=status, headers=headers, body=data)

    async def _forward(self, request: web.Request, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        assert self._session
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _NOT_PASSED_ON]
        async with self._session.request(
            request.method,
            URL(self._target() + request.raw_path, encoded=True),
            headers=headers,
            data=body if body or request.method == "PUT" else None,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            allow_redirects=False,
        ) as answer:
            data = await answer.read()
            kept = [(k, v) for k, v in answer.headers.items() if k.lower() not in _NOT_PASSED_ON | {"content-length"}]
            return answer.status, kept, data


def _pod(request: web.Request) -> str:
    """Who asks: a pod's name is in its environment, and the SDK tells it in the User-Agent."""
    found = _POD.search(request.headers.get("User-Agent", ""))
    return found[1] if found else ""


async def _broken(fault: Fault | None, request: web.Request) -> web.Response:
    """The answer to a request that never comes to the store."""
    match fault:
        case Fault.ERROR:
            return _refusal(500, "InternalError")
        case Fault.SLOW_DOWN:
            return _refusal(503, "SlowDown")
        case Fault.NO_XML:
            return web.Response(status=502, text="upstream connect error or disconnect before headers")
        case Fault.STALL:
            await asyncio.sleep(STALL_SECONDS)
    return _reset(request)


def _refusal(status: int, code: str) -> web.Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>by order</Message></Error>'
    return web.Response(status=status, text=text, content_type="application/xml")


def _reset(request: web.Request) -> web.Response:
    if request.transport:
        request.transport.abort()
    return web.Response()


async def _truncated(
    request: web.Request, status: int, headers: list[tuple[str, str]], data: bytes
) -> web.StreamResponse:
    """All headers, half of the body, and the end."""
    answer = web.StreamResponse(status=status, headers=headers)
    answer.content_length = len(data)
    await answer.prepare(request)
    await answer.write(data[: len(data) // 2])
    await asyncio.sleep(0.01)
    return _reset(request)
