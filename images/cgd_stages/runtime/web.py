"""One HTTP exchange of a stage program. No redirect is followed, because keys would go along, and an answer is bounded
in bytes and seconds, whatever the server sends."""

import asyncio
import ssl
from functools import cache
from typing import Any
from urllib.parse import urljoin

import httpx2

EXCERPT = 2000
"""Bytes that are read of an answer that refuses."""


class Status(OSError):
    """The server answered with a status other than success."""

    def __init__(self, code: int, body: bytes, headers: Any, url: str) -> None:
        super().__init__(f"HTTP {code}")
        self.code, self.body, self.headers = code, body, headers
        location = headers.get("Location") if 300 <= code < 400 else None
        self.redirect: str | None = _joined(url, location) if location else None
        """The URL where the server would have the request sent instead."""


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:  # it is none
        return location


def exchange(
    url: str,
    body: bytes | None = None,
    *,
    headers: dict[str, str],
    seconds: float,
    most: int,
    context: ssl.SSLContext | None = None,
) -> bytes:
    """The body of the answer, at most `most` bytes, to a body of JSON that is posted, or to no body.

    Raises:
        Status: the server refuses, or redirects.
        OSError: there is no such server, or no whole answer of that size, head and body, within so many seconds.
    """
    return asyncio.run(_exchange(url, body, headers, seconds, most, context or _default_context()))


async def _exchange(
    url: str, body: bytes | None, headers: dict[str, str], seconds: float, most: int, context: ssl.SSLContext
) -> bytes:
    # Raw and without encodings: a small body that is unpacked has no bound.
    sent = {"Content-Type": "application/json", "Accept-Encoding": "identity", "Connection": "close"} | headers
    answer: httpx2.Response | None = None
    received = bytearray()
    try:
        async with (
            asyncio.timeout(seconds),
            httpx2.AsyncClient(verify=context, timeout=None) as client,
            client.stream("GET" if body is None else "POST", url, content=body, headers=sent) as answer,
        ):
            async for piece in answer.aiter_raw():
                received += piece
                if len(received) > (most if answer.is_success else EXCERPT):
                    break
    except (TimeoutError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        if answer is None or answer.is_success:
            raise _broken(error) from error
    assert answer
    if not answer.is_success:  # which tells the most, however the rest has ended
        raise Status(answer.status_code, bytes(received[:EXCERPT]), answer.headers, url)
    if len(received) > most:
        raise OSError(f"the answer has more than {most} bytes")
    return bytes(received)


def _broken(error: BaseException) -> OSError:
    if isinstance(error, TimeoutError):
        return TimeoutError("the answer comes too slowly")
    while error.__cause__:  # httpx2 has no words for a connection that is refused
        error = error.__cause__
    return ConnectionError(f"{type(error).__name__}: {error}")


@cache
def _default_context() -> ssl.SSLContext:
    """Made once: it reads the authorities that this machine trusts."""
    return ssl.create_default_context()
