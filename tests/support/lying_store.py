"""The S3 server of the tests behind one that does not keep what S3 promises, as some compatible stores do not.

    with lying(s3, Lie.LOOKS_FIRST) as endpoint:
        Bucket(Storage(uri="s3://data/x", endpoint=endpoint, path_style=True)).probe()

It answers requests with a client of its own, because a signature would not fit what is sent on.
"""

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from botocore.exceptions import ClientError

from cgd_local.s3 import SeaweedFS

PAGE = 3
"""Objects on a page of a list."""
LOOK_SECONDS = 0.1
"""Between a look at an object and its write, in a store that does both one after the other."""


class Lie(Enum):
    """What does not hold."""

    NONE = "all of it holds"
    NO_CONDITION = "If-None-Match is ignored"
    LOOKS_FIRST = "If-None-Match holds for writes one after the other, and not for two at once"
    NO_WINNER = "of two writes at once, both are told that the other was first, and neither is stored"
    WRONG_WINNER = "of two writes at once, the one that is refused is stored"
    LONGER_NAME = "If-None-Match takes an object with a longer name for the one that is asked about"
    SHUFFLED = "lists have an order of their own, over pages that overlap"


@contextmanager
def lying(s3: SeaweedFS, lie: Lie, seed: int = 0) -> Iterator[str]:
    """The endpoint of a server in front of the store."""
    handler = partial(_Handler, _Store(s3.client(), lie, seed))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class _Store:
    client: Any
    lie: Lie
    seed: int
    begun: Counter[str] = field(default_factory=Counter)
    """Conditional writes of new objects, by key."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, store: _Store, *request: Any) -> None:
        self._client, self._lie, self._seed, self._begun = store.client, store.lie, store.seed, store.begun
        super().__init__(*request)

    def do_GET(self) -> None:
        bucket, key, query = self._asked()
        try:
            if not key:
                return self._answer(200, self._list(bucket, query))
            part = {"Range": self.headers["Range"]} if "Range" in self.headers else {}
            found = self._client.get_object(Bucket=bucket, Key=key, **part)
            self._answer(206 if part else 200, found["Body"].read(), ETag=found["ETag"])
        except ClientError as error:
            self._refuse(error)

    def do_HEAD(self) -> None:
        bucket, key, _ = self._asked()
        try:
            found = self._client.head_object(Bucket=bucket, Key=key)
            self._answer(200, length=found["ContentLength"], ETag=found["ETag"])
        except ClientError as error:
            self._refuse(error)

    def do_DELETE(self) -> None:
        bucket, key, _ = self._asked()
        self._client.delete_object(Bucket=bucket, Key=key)
        self._answer(204)

    def do_PUT(self) -> None:
        bucket, key, _ = self._asked()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        write = partial(self._client.put_object, Bucket=bucket, Key=key, Body=body)
        conditional = self.headers.get("If-None-Match") == "*"
        try:
            if conditional and self._lie is not Lie.NONE:
                self._write(write, bucket, key)
            else:
                write(**({"IfNoneMatch": "*"} if conditional else {}))
                self._answer(200)
        except ClientError as error:
            self._refuse(error)

    def _write(self, write: Any, bucket: str, key: str) -> None:
        """A conditional write, as the lie has it."""
        stored, answered = self._fate(bucket, key)
        if stored:
            write()
        self._answer(answered, _error("PreconditionFailed") if answered == 412 else b"")

    def _fate(self, bucket: str, key: str) -> tuple[bool, int]:
        """Whether the write is stored, and the status of its answer."""
        names = [found["Key"] for found in self._found(bucket, key)]
        taken = bool(names) if self._lie is Lie.LONGER_NAME else key in names
        if taken and self._lie is not Lie.NO_CONDITION:
            return False, 412
        self._begun[key] += 1
        first = self._begun[key] == 1
        if self._lie in (Lie.LOOKS_FIRST, Lie.NO_WINNER, Lie.WRONG_WINNER):
            time.sleep(LOOK_SECONDS)
        if self._begun[key] == 1 or self._lie in (Lie.LOOKS_FIRST, Lie.NO_CONDITION):
            return True, 200
        if self._lie is Lie.WRONG_WINNER:
            return not first, 200 if first else 412
        return False, 412

    def _found(self, bucket: str, prefix: str) -> list[dict[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [found for page in pages for found in page.get("Contents", [])]

    def _list(self, bucket: str, query: dict[str, str]) -> bytes:
        """A page of a list; the last object of a page is the first one of the next."""
        found = self._found(bucket, query.get("prefix", ""))
        if self._lie is Lie.SHUFFLED:
            random.Random(self._seed).shuffle(found)
        begin = int(query.get("continuation-token", 0))
        rest = len(found) > begin + PAGE
        items = "".join(
            f"<Contents><Key>{escape(one['Key'])}</Key><Size>{one['Size']}</Size><ETag>{escape(one['ETag'])}</ETag>"
            "</Contents>"
            for one in found[begin : begin + PAGE]
        )
        token = f"<NextContinuationToken>{begin + PAGE - 1}</NextContinuationToken>" if rest else ""
        return (
            f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>{str(rest).lower()}</IsTruncated>{items}{token}"
            "</ListBucketResult>"
        ).encode()

    def _asked(self) -> tuple[str, str, dict[str, str]]:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        return bucket, key, {name: values[0] for name, values in parse_qs(parts.query).items()}

    def _refuse(self, error: ClientError) -> None:
        self._answer(error.response["ResponseMetadata"]["HTTPStatusCode"], _error(error.response["Error"]["Code"]))

    def _answer(self, status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Silence."""


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>by order</Message></Error>".encode()
