"""One HTTP exchange of a stage program. No redirect is followed, because keys would go along, and an answer is bounded
in bytes and seconds, whatever the server sends."""

import ssl
import time
import urllib.request
from functools import cache
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urljoin

PIECE = 1 << 16
EXCERPT = 2000
"""Bytes that are read of an answer that refuses."""


class Status(OSError):
    """The server answered with a status other than success."""

    def __init__(self, code: int, body: bytes, headers: Any, url: str) -> None:
        super().__init__(f"HTTP {code}")
        self.code, self.body, self.headers = code, body, headers
        location = headers.get("Location") if 300 <= code < 400 else None
        self.redirect: str | None = urljoin(url, location) if location else None
        """The URL where the server would have the request sent instead."""


def exchange(
    request: urllib.request.Request, *, seconds: float, most: int, context: ssl.SSLContext | None = None
) -> bytes:
    """The body of the answer, at most `most` bytes.

    Raises:
        Status: the server refuses, or redirects.
        OSError: there is no such server, or no whole answer of that size within so many seconds.
    """
    deadline = time.monotonic() + seconds
    own = urllib.request.HTTPSHandler(context=context) if context else None
    opener = urllib.request.build_opener(_Stay, own) if own else _default_opener()
    try:
        with opener.open(request, timeout=seconds) as response:
            body = _read(response, most + 1, deadline)
    except HTTPError as error:
        with error:
            excerpt = _read(error, EXCERPT, deadline)
        raise Status(error.code, excerpt, error.headers, request.full_url) from error
    except HTTPException as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
    if len(body) > most:
        raise OSError(f"the answer has more than {most} bytes")
    return body


def _read(response: Any, most: int, deadline: float) -> bytes:
    """The first `most` bytes, or all. Not by `read`, which waits for all of them however slowly they come."""
    told, body = response.length, bytearray()
    while piece := response.read1(min(PIECE, (most if told is None else min(told, most)) - len(body))):
        body += piece
        if time.monotonic() > deadline:
            raise TimeoutError("the answer comes too slowly")
    if told is not None and len(body) < min(told, most):
        raise ConnectionError(f"the answer broke off after {len(body)} of {told} bytes")
    return bytes(body)


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other that is no success."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@cache
def _default_opener() -> urllib.request.OpenerDirector:
    """Made once: it reads the authorities that this machine trusts."""
    return urllib.request.build_opener(_Stay)
