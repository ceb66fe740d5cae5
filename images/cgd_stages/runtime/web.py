"""One HTTP exchange of a stage program. No redirect is followed, because keys would go along, and an answer is bounded
in bytes and seconds, whatever the server sends."""

import io
import socket
import ssl
import time
import urllib.request
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
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
        self.redirect: str | None = _joined(url, location) if location else None
        """The URL where the server would have the request sent instead."""


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:  # it is none
        return location


def exchange(
    request: urllib.request.Request, *, seconds: float, most: int, context: ssl.SSLContext | None = None
) -> bytes:
    """The body of the answer, at most `most` bytes.

    Raises:
        Status: the server refuses, or redirects.
        OSError: there is no such server, or no whole answer of that size, head and body, within so many seconds.
    """
    opener = _build(context) if context else _default_opener()
    try:
        with opener.open(request, timeout=seconds) as response:
            body = _read(response, most + 1)
    except HTTPError as error:
        with error:
            raise Status(error.code, _excerpt(error), error.headers, request.full_url) from error
    except HTTPException as error:
        raise _broken(error) from error
    if len(body) > most:
        raise OSError(f"the answer has more than {most} bytes")
    return body


def _excerpt(response: Any) -> bytes:
    """What can be read of an answer that refuses; its status tells the most."""
    try:
        return _read(response, EXCERPT)
    except OSError:
        return b""


def _read(response: Any, most: int) -> bytes:
    """The first `most` bytes, or all. Not by `read`, which keeps to no bound where the answer comes in chunks."""
    told, body = response.length, bytearray()
    try:
        while piece := response.read1(min(PIECE, (most if told is None else min(told, most)) - len(body))):
            body += piece
    except HTTPException as error:
        raise _broken(error) from error
    if told is not None and len(body) < min(told, most):
        raise ConnectionError(f"the answer broke off after {len(body)} of {told} bytes")
    return bytes(body)


def _broken(error: HTTPException) -> ConnectionError:
    return ConnectionError(f"{type(error).__name__}: {error}")


class _InTime(io.RawIOBase):
    """What a socket receives within its time-out as a whole, though each byte may come in time: head and body."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw, self._sock = raw, sock
        seconds = sock.gettimeout()
        assert seconds
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        try:
            if left > 0:
                self._sock.settimeout(left)
                return self._raw.readinto(buffer)
        except TimeoutError:
            pass
        raise TimeoutError("the answer comes too slowly")

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, sock: socket.socket, *given: Any, **named: Any) -> None:
        super().__init__(sock, *given, **named)
        buffered: Any = self.fp
        self.fp = io.BufferedReader(_InTime(buffered.detach(), sock))


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(context=context)
        self._trusted = context

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, req, context=self._trusted)


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other that is no success."""

    def _stay(self, *_: Any) -> None:
        return None

    http_error_301: Any = _stay
    http_error_302: Any = _stay
    http_error_303: Any = _stay
    http_error_307: Any = _stay
    http_error_308: Any = _stay


def _build(context: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Stay, _Http, _Https(context))


@cache
def _default_opener() -> urllib.request.OpenerDirector:
    """Made once: it reads the authorities that this machine trusts."""
    return _build(ssl.create_default_context())
