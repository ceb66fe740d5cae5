"""One HTTP exchange of a stage program. It follows no redirect, because keys would go along, and bounds the answer in
bytes and seconds, whatever the server sends."""

import asyncio
import ssl
from contextlib import suppress
from functools import cache
from typing import Any
from urllib.parse import urljoin

import httpx2

EXCERPT = 2000
"""Bytes that are read of a refusal's body."""


class Status(OSError):
    """The server answered with a status other than success."""

    def __init__(self, code: int, body: bytes, headers: Any, url: str) -> None:
        super().__init__(f"HTTP {code}")
        self.code, self.body, self.headers = code, body, headers
        self.redirect: str | None = headers.get("Location") if 300 <= code < 400 else None
        """The URL to which the server redirects the request."""
        if self.redirect:
            with suppress(ValueError):  # it is no URL, and stays as it is
                self.redirect = urljoin(url, self.redirect)


def exchange(
    url: str,
    body: bytes | None = None,
    *,
    headers: dict[str, str],
    seconds: float,
    most: int,
    context: ssl.SSLContext | None = None,
) -> bytes:
    """The answer's body, of `most` bytes at most. With a `body` of JSON the request is a POST, without one a GET.

    Raises:
        Status: the server refuses, or redirects.
        OSError: the server does not exist, or gives no complete answer of that size within so many seconds.
    """
    return asyncio.run(_exchange(url, body, headers, seconds, most, context or _default_context()))


async def _exchange(
    url: str, body: bytes | None, headers: dict[str, str], seconds: float, most: int, context: ssl.SSLContext
) -> bytes:
    # Raw and without encodings: a small body may unpack to any size.
    all_headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "Connection": "close"} | headers
    answer: httpx2.Response | None = None
    received = bytearray()
    try:
        async with (
            asyncio.timeout(seconds),
            httpx2.AsyncClient(verify=context, timeout=None) as client,
            client.stream("GET" if body is None else "POST", url, content=body, headers=all_headers) as answer,
        ):
            async for piece in answer.aiter_raw():
                received += piece
                if len(received) > (most if answer.is_success else EXCERPT):
                    break
    except (TimeoutError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        if answer is None or answer.is_success:
            raise _broken(error) from error
    assert answer
    if not answer.is_success:  # the status says more than an error in the rest of the answer
        raise Status(answer.status_code, bytes(received[:EXCERPT]), answer.headers, url)
    if len(received) > most:
        raise OSError(f"the answer has more than {most} bytes")
    return bytes(received)


def _broken(error: BaseException) -> OSError:
    if isinstance(error, TimeoutError):
        return TimeoutError("the answer comes too slowly")
    while error.__cause__:  # httpx2's own error does not say that a connection was refused
        error = error.__cause__
    return ConnectionError(f"{type(error).__name__}: {error}")


@cache
def _default_context() -> ssl.SSLContext:
    """Cached, because it reads the authorities that this machine trusts."""
    return ssl.create_default_context()
