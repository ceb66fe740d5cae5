"""The Kubernetes API as the reconcile loop needs it: plain objects in, plain objects out.

The official client (`kubernetes.aio`) carries configuration, TLS and credentials; its generated models are not
imported, because custom resources have none and importing them all costs most of an operator's memory.

Its `DynamicClient` would cost 3 MB more than `Cluster`, which is no reason against it. These are: it writes bodies that
an apply refuses (see `encoded`), puts names into paths unchecked, obeys no Retry-After, and takes lists that are older
than what was read before; its watches ask for no bookmarks, and ask again at once when a server ends them.
"""

import asyncio
import json
import logging
import os
import random
import re
import time
import urllib.request
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlencode, urlsplit

import aiohttp
from aiohttp.connector import Connection
from kubernetes.aio import config as kubeconfigs
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from pydantic_core import from_json

from cgd_operator import metrics
from cgd_operator.kube.clock import Clock
from cgd_operator.kube.kinds import POD, AlreadyExists, ApiError, Gone, Kind

log = logging.getLogger(__name__)

Object = dict[str, Any]

READ_TIMEOUT = aiohttp.ClientTimeout(total=30, sock_connect=5)
WRITE_TIMEOUT = aiohttp.ClientTimeout(total=40, sock_connect=5)
"""Longer than a webhook may take, 30 s at most: then the API server says which webhook it waited for."""
PAGE = 50
"""Objects per page of a long list."""
WATCH_SECONDS = 240
WATCH_TIMEOUT = aiohttp.ClientTimeout(total=WATCH_SECONDS + 60, sock_connect=5, sock_read=90)
LOG_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5)
"""Of a log that is followed: a program may write nothing for hours."""
Link = Literal["listing", "linked", "lost"]
"""The states of a watch: it reads the list, it is connected, it has lost the connection."""
STEADY_SECONDS, LONGEST_PAUSE = 10.0, 5.0
"""A watch that ends sooner than this is opened again after growing pauses, so that an unreachable server, or a proxy
that ends all watches, is not flooded with requests."""
TRIES = 4
RETRY_AFTER_SECONDS = 10.0
"""The longest Retry-After that is obeyed."""
MERGE, APPLY, JSON = "application/merge-patch+json", "application/apply-patch+yaml", "application/json"


class Cluster:
    """One connection to one API server. `manager` is the field manager of every write."""

    def __init__(self, configuration: Configuration, *, manager: str) -> None:
        self._client = ApiClient(configuration)
        self._session: aiohttp.ClientSession | None = None
        self._manager = manager
        self._versions: dict[Kind, int] = {}
        """The newest resource version of a list, by kind."""
        self.clock = Clock()

    @classmethod
    async def connect(cls, kubeconfig: str | None = None, *, manager: str) -> Self:
        """Connect with a kubeconfig file; without one, with `$KUBECONFIG` (which the client reads at import only),
        ~/.kube/config, or the pod's service account."""
        configuration = Configuration()
        usual = Path.home() / ".kube/config"
        if path := kubeconfig or os.environ.get("KUBECONFIG") or (usual.exists() and str(usual)):
            await kubeconfigs.load_kube_config(path, client_configuration=configuration)
        else:
            kubeconfigs.load_incluster_config(client_configuration=configuration)
        if not configuration.proxy:  # by HTTPS_PROXY, HTTP_PROXY and NO_PROXY
            server = urlsplit(configuration.host)
            bypass = urllib.request.proxy_bypass(server.netloc)
            configuration.proxy = None if bypass else urllib.request.getproxies().get(server.scheme)
        return cls(configuration, manager=manager)

    async def close(self) -> None:
        if self._session:
            await self._session.close()
        await self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def get(self, kind: Kind, name: str, namespace: str | None = None) -> Object | None:
        return await self._call("GET", kind.path(namespace, name), absent_is_none=True)

    async def list(
        self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> tuple[list[Object], str]:
        """All objects of a kind (their `kind` and `apiVersion` filled in) and the version the list was read at.

        Raises:
            ApiError: for example, the list is older than a list that was read before this request, as from a server
                that lags behind.
        """
        query, newest = _query(labelSelector=labels, fieldSelector=fields), self._versions.get(kind, 0)
        body = await self._call("GET", kind.path(namespace) + query)
        assert body is not None
        version = int(body["metadata"]["resourceVersion"])
        if version < newest:
            raise ApiError(0, "Stale", f"{kind.plural} were listed at version {version}, after {newest} was seen")
        self._versions[kind] = max(version, self._versions.get(kind, 0))
        items = [{"apiVersion": kind.api_version, "kind": kind.kind, **item} for item in body["items"]]
        return items, body["metadata"]["resourceVersion"]

    async def pages(
        self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> AsyncIterator[tuple[Sequence[Object], str]]:
        """All objects of a kind, `PAGE` at a time to bound memory, and the version of each page.

        Raises:
            Gone: between two pages, if the first page is too old: start over.
        """
        token = ""
        while True:
            query = {"labelSelector": labels, "fieldSelector": fields, "limit": str(PAGE), "continue": token}
            body = await self._call("GET", kind.path(namespace) + _query(**query))
            assert body is not None
            items = [{"apiVersion": kind.api_version, "kind": kind.kind, **item} for item in body["items"]]
            yield items, body["metadata"]["resourceVersion"]
            if not (token := body["metadata"].get("continue", "")):
                return

    async def version(self, kind: Kind, namespace: str | None) -> str:
        """The current resource version of a kind, from which a watch can start. Reads at most one object."""
        body = await self._call("GET", kind.path(namespace) + _query(limit="1"))
        assert body is not None
        return str(body["metadata"]["resourceVersion"])

    async def create(self, kind: Kind, body: Object, *, subresource: str = "", dry_run: bool = False) -> Object:
        """Create an object, or with `subresource` a part of the object with the body's name. A dry run is admitted and
        validated, but not stored."""
        query = _query(fieldManager=self._manager, dryRun="All" if dry_run else "")
        name = body["metadata"]["name"] if subresource else None
        path = kind.path(body["metadata"].get("namespace"), name, subresource) + query
        created = await self._call("POST", path, body)
        assert created is not None
        return created

    async def apply(self, kind: Kind, body: Object, *, subresource: str = "") -> Object:
        """Server-side apply with force: takes over fields of other managers."""
        body = {"apiVersion": kind.api_version, "kind": kind.kind, **body}
        meta = body["metadata"]
        path = kind.path(meta.get("namespace"), meta["name"], subresource) + _query(
            fieldManager=self._manager, force="true"
        )
        applied = await self._call("PATCH", path, body, content_type=APPLY)
        assert applied is not None
        return applied

    async def patch(
        self, kind: Kind, name: str, namespace: str | None, body: Object, *, subresource: str = ""
    ) -> Object | None:
        """Merge patch; None if the object does not exist."""
        path = kind.path(namespace, name, subresource) + _query(fieldManager=self._manager)
        return await self._call("PATCH", path, body, content_type=MERGE, absent_is_none=True)

    async def delete(
        self,
        kind: Kind,
        name: str,
        namespace: str | None = None,
        *,
        uid: str | None = None,
        version: str | None = None,
        propagation: str = "Background",
        grace: int | None = None,
    ) -> None:
        """Delete an object if it exists. An object with another uid or version is refused as a conflict."""
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if conditions := {key: text for key, text in (("uid", uid), ("resourceVersion", version)) if text is not None}:
            options["preconditions"] = conditions
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        await self._call("DELETE", kind.path(namespace, name), options, absent_is_none=True)

    async def log(self, pod: str, namespace: str, *, container: str = "", last: int | None = None) -> str:
        """The log so far of a pod's container, or of its only one; of it the `last` lines."""
        path = POD.path(namespace, pod, "log") + _query(
            container=container, tailLines="" if last is None else str(last)
        )
        try:
            async with await self._request("GET", path, None, JSON, READ_TIMEOUT) as response:
                if response.status >= 300:
                    raise _error(await _body(response))
                return await response.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ApiError(0, "Unreachable", f"GET {path}: {error or type(error).__name__}") from error

    async def follow_log(self, pod: str, namespace: str, *, container: str) -> AsyncIterator[str]:
        """Each line of a container's log as it is written, until the container ends."""
        path = POD.path(namespace, pod, "log") + _query(container=container, follow="true")
        try:
            async with await self._request("GET", path, None, JSON, LOG_TIMEOUT) as response:
                if response.status >= 300:
                    raise _error(await _body(response))
                rest = b""
                async for data in response.content.iter_any():
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        yield line.decode(errors="replace")
                if rest:  # the last line may have no end
                    yield rest.decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ApiError(0, "Unreachable", f"GET {path}: {error or type(error).__name__}") from error

    async def watch(
        self,
        kind: Kind,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        listing: bool = True,
        link: Callable[[Link], None] = lambda _: None,
    ) -> AsyncIterator[tuple[str, Object]]:
        """Every existing object as LISTED (unless `listing` is false), then ("SYNCED", {}), then changes, without end.

        After a lost connection the watch continues from the last version seen. If that version is too old (410), it
        starts over: the consumer sees LISTED and SYNCED again, and must read again what it keeps. `link` is called
        when the state of the connection changes.
        """
        while True:
            link("listing")
            try:
                since = "" if listing else await self.version(kind, namespace)
                if listing:
                    async for items, version in self.pages(kind, namespace, labels=labels, fields=fields):
                        since = since or version
                        for item in items:
                            yield "LISTED", item
                yield "SYNCED", {}
                async for event, item in self._changes(kind, namespace, labels, fields, since, link):
                    yield event, item
            except Gone:
                log.info("watch of %s is too old; listing again", kind.plural)

    async def _changes(
        self,
        kind: Kind,
        namespace: str | None,
        labels: str,
        fields: str,
        version: str,
        link: Callable[[Link], None],
    ) -> AsyncIterator[tuple[str, Object]]:
        short = 0
        while True:
            begun = time.monotonic()
            query = _query(
                watch="true",
                resourceVersion=version,
                allowWatchBookmarks="true",
                timeoutSeconds=str(WATCH_SECONDS),
                labelSelector=labels,
                fieldSelector=fields,
            )
            try:
                async for line in self._lines(kind.path(namespace) + query, link):
                    event = _decoded(line)
                    if event["type"] == "ERROR":
                        raise _error(event["object"])
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        yield event["type"], event["object"]
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # the last: a line that is no JSON
                link("lost")
                why = type(error).__name__
            else:
                why = "it was ended"
            short = short + 1 if time.monotonic() - begun < STEADY_SECONDS else 0
            if short == 1:  # logged once, however long the interruption lasts
                log.info("watch of %s was interrupted (%s); going on", kind.plural, why)
            await asyncio.sleep(random.uniform(0.5, 1) * min(LONGEST_PAUSE, 0.2 * 2**short))  # noqa: S311

    async def _lines(self, path: str, link: Callable[[Link], None]) -> AsyncIterator[bytes]:
        response = await self._request("GET", path, None, JSON, WATCH_TIMEOUT)
        async with response:
            if response.status >= 300:
                raise _error(await _body(response))
            link("linked")
            rest = b""
            async for data in response.content.iter_any():
                *lines, rest = (rest + data).split(b"\n")
                for line in filter(None, lines):
                    yield line

    async def _call(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        *,
        content_type: str = JSON,
        absent_is_none: bool = False,
    ) -> Object | None:
        """The answer's body. If the answer has a Retry-After (as with 429), the request is repeated, `TRIES` times in
        all: every write has a name or a version, so that repeating it is harmless."""
        timeout = READ_TIMEOUT if method == "GET" else WRITE_TIMEOUT
        for left in reversed(range(TRIES)):
            try:
                response = await self._request(method, path, body, content_type, timeout)
                async with response:
                    answer = await _body(response)
            except (aiohttp.ClientError, TimeoutError) as error:
                raise ApiError(0, "Unreachable", f"{method} {path}: {error or type(error).__name__}") from error
            pause = response.headers.get("Retry-After", "")
            if not left or not pause.isdecimal() or (response.status != 429 and response.status < 500):
                break
            await asyncio.sleep(min(float(pause), RETRY_AFTER_SECONDS))
        if response.status == 404 and absent_is_none:
            return None
        if response.status >= 300:
            raise _error(answer)
        return answer

    async def _request(
        self, method: str, path: str, body: Object | None, content_type: str, timeout: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": JSON, "Content-Type": content_type}
        configuration = self._client.configuration
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        sent = self.clock.local()
        response = await self._connections().request(
            method,
            configuration.host + path,
            headers=headers,
            data=None if body is None else encoded(body),
            timeout=timeout,
            proxy=configuration.proxy,
            proxy_headers=configuration.proxy_headers,
            server_hostname=configuration.tls_server_name,
        )
        self.clock.heard(response.headers.get("Date", ""), sent)
        metrics.API_REQUESTS.labels(method, str(response.status)).inc()
        return response

    def _connections(self) -> aiohttp.ClientSession:
        """A session with the client's TLS settings. The client's own session writes bodies in ASCII, which an apply
        does not accept, and reads the environment and ~/.netrc before every request. Its limit of 100 connections is
        not used either: each namespace has four watches with a connection each, and other requests would wait for
        ever."""
        if self._session is None:
            connector = Connector(limit=0, ssl=self._client.rest_client.ssl_context)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False, read_bufsize=2**21)
        return self._session


class Connector(aiohttp.TCPConnector):
    """Closes every connection. aiohttp's own connector forgets connections that were released in the middle of an
    answer, as those of watches are: with TLS they would wait for the server's close, in a loop that may have ended."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._transports: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()

    async def connect(self, *request: Any, **options: Any) -> Connection:
        connection = await super().connect(*request, **options)
        if connection.transport:
            self._transports.add(connection.transport)
        return connection

    async def close(self, *, abort_ssl: bool = False) -> None:
        await super().close(abort_ssl=abort_ssl)
        for transport in self._transports:
            transport.abort()


_NOT_AS_IT_IS = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def encoded(body: Object) -> bytes:
    """A request's body: JSON that the API server's YAML reader, which parses applied bodies, reads in the same way.

    The YAML reader refuses JSON's surrogate pairs of escapes for characters above U+FFFF, and raw control characters
    (C0, C1 and a few more), some of which it takes for line breaks. A lone surrogate becomes U+FFFD.
    """
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    whole = _SURROGATE.sub("\ufffd", text)
    return _NOT_AS_IT_IS.sub(lambda match: f"\\u{ord(match[0]):04x}", whole).encode()


def _query(**parameters: str) -> str:
    filled = {name: value for name, value in parameters.items() if value}
    return "?" + urlencode(filled) if filled else ""


def _decoded(raw: bytes) -> Any:
    """JSON. pydantic's reader is fast, but refuses values that are nested more than 200 deep, and half characters. A
    user can write such values into fields without a schema, and they must not hide the objects listed beside them.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return from_json(raw)
    except ValueError:
        return json.loads(raw)


async def _body(response: aiohttp.ClientResponse) -> Object:
    raw = await response.read()
    try:
        body = _decoded(raw)
    except ValueError:
        body = None
    if isinstance(body, dict):
        return body
    if response.status < 300:
        raise ApiError(0, "Unreadable", f"{response.method} {response.url.path}: the answer is no JSON object")
    return {"code": response.status, "reason": response.reason, "message": raw.decode(errors="replace").strip()[:500]}


def _error(status: Object) -> ApiError:
    code, reason = int(status.get("code") or 500), str(status.get("reason") or "Unknown")
    message = str(status.get("message") or "")
    if reason == "AlreadyExists":
        return AlreadyExists(code, reason, message)
    if code == 410:
        return Gone(code, reason, message)
    return ApiError(code, reason, message)
