"""A Kubernetes API server for one machine: what kopf, the kubernetes client and kubectl need, over plain HTTP.

    server = ApiServer()
    await server.start()
    Path("kubeconfig").write_text(server.kubeconfig())

It is kube-apiserver and etcd and nothing else: no garbage collection, no controllers, no kubelet. It listens on
loopback, asks nobody who they are, and keeps everything in memory: `stop` and `start` of one object is a restart.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import logging
import re
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from cgd_local import discovery
from cgd_local.kinds import Resource
from cgd_local.patches import Writer, json_patch, merge_patch, strategic_patch
from cgd_local.registry import Registry, Write, missing, seen_as
from cgd_local.selection import Test, selection
from cgd_local.statuses import ApiError, Json, bad_request, success
from cgd_local.store import Change, Feed, Key
from cgd_local.tables import table

logger = logging.getLogger(__name__)
Fault = Callable[[web.Request], "web.StreamResponse | Awaitable[web.StreamResponse | None] | None"]
_MERGES = {
    "application/merge-patch+json": "merge",
    "application/json-patch+json": "json",
    "application/strategic-merge-patch+json": "strategic",
    "application/apply-patch+yaml": "apply",
    "application/apply-patch+json": "apply",
}
_LARGEST = 3 * 2**20
_ALIVE = ("healthz", "readyz", "livez")


class _Loader(yaml.CSafeLoader):
    """YAML as Kubernetes reads it: a date stays the text it is."""

    yaml_implicit_resolvers = {  # noqa: RUF012  the base class declares it so
        letter: [(tag, test) for tag, test in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for letter, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
    }


@dataclass(frozen=True)
class Target:
    """What a path names."""

    resource: Resource
    namespace: str
    name: str
    subresource: str

    @property
    def key(self) -> Key:
        return (self.namespace, self.name)


class ApiServer:
    """The server.

    Args:
        history: how many writes per kind a watch can catch up with; older versions are answered with 410.
        bookmark_seconds: how often a watch that allows bookmarks gets one.
        fault: called with every request before it is served; a response that it returns is the answer.
    """

    def __init__(self, *, history: int = 10_000, bookmark_seconds: float = 30, fault: Fault | None = None) -> None:
        self.registry = Registry(history)
        self.requests: deque[tuple[str, str]] = deque(maxlen=10_000)
        self.fault = fault
        self.url = ""
        self._bookmark_seconds = bookmark_seconds
        self._runner: web.AppRunner | None = None
        self._kubelets: aiohttp.ClientSession | None = None

    async def start(self, port: int = 0) -> None:
        """Listen on loopback; port 0 takes a free one, `url` says which."""
        app = web.Application(client_max_size=_LARGEST)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._kubelets = aiohttp.ClientSession()
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", port), backlog=512)
        await web.SockSite(self._runner, listener).start()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for name in ("default", "kube-system"):
            self._ensure_namespace(name)

    def _ensure_namespace(self, name: str) -> None:
        namespaces = self.registry.resource("", "v1", "namespaces")
        if ("", name) not in self.registry.shelf(namespaces).objects:
            writer = Writer(manager="kube-apiserver", api_version="v1")
            self.registry.create(namespaces, "", {"metadata": {"name": name}}, Write(writer=writer))

    async def stop(self) -> None:
        """End every watch and close the port; the objects stay for another `start`."""
        self.registry.store.end_watches()
        if self._runner:
            await self._runner.cleanup()
        if self._kubelets:
            await self._kubelets.close()
        self._runner = self._kubelets = None

    def kubeconfig(self) -> str:
        """YAML for kubectl, the kubernetes client and kopf."""
        context = {"cluster": "local", "user": "local", "namespace": "default"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "local",
            "clusters": [{"name": "local", "cluster": {"server": self.url}}],
            "contexts": [{"name": "local", "context": context}],
            "users": [{"name": "local", "user": {}}],
        }
        return yaml.safe_dump(config)

    # --- one request

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        try:
            return await self._faulty(request) or await self._route(request)
        except ApiError as error:
            return _json(error.status(), status=error.code)
        except web.HTTPRequestEntityTooLarge:
            too_large = f"Request entity too large: limit is {_LARGEST}"
            return _json(ApiError(413, too_large, reason="RequestEntityTooLarge").status(), status=413)
        except ConnectionResetError:
            raise
        except Exception as error:
            logger.exception("%s %s", request.method, request.path_qs)
            return _json(ApiError(500, f"Internal error occurred: {error!r}").status(), status=500)

    async def _faulty(self, request: web.Request) -> web.StreamResponse | None:
        answer = self.fault(request) if self.fault else None
        return await answer if inspect.isawaitable(answer) else answer

    async def _route(self, request: web.Request) -> web.StreamResponse:
        match request.path.strip("/").split("/"):
            case ["version"]:
                return _json(discovery.VERSION)
            case [word, *_] if word in _ALIVE:
                return web.Response(text="ok")
            case ["api" | "apis" as root]:
                return _json(self._groups(request, core=root == "api"), content_type=_discovery_type(request))
            case ["openapi", "v3", *rest]:
                return _json(self._openapi(rest))
            case ["apis", "authorization.k8s.io", "v1", "selfsubjectaccessreviews"]:
                return _json(await _body(request) | {"status": {"allowed": True}}, status=201)
            case ["api", version, *rest]:
                return await self._serve(request, "", version, rest)
            case ["apis", group, version, *rest]:
                return await self._serve(request, group, version, rest)
        raise ApiError(404, "the server could not find the requested resource")

    # --- discovery

    def _groups(self, request: web.Request, *, core: bool) -> Json:
        resources = self.registry.resources.values()
        if _discovery_type(request) == discovery.AGGREGATED:
            return discovery.aggregated(resources, core=core)
        addresses = [{"clientCIDR": "0.0.0.0/0", "serverAddress": self.url.removeprefix("http://")}]
        versions = {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": addresses}
        return versions if core else discovery.group_list(resources)

    def _openapi(self, rest: list[str]) -> Json:
        resources = list(self.registry.resources.values())
        if not rest:
            return discovery.openapi_index(resources)
        group, version = ("", rest[1]) if rest[0] == "api" else (rest[1], rest[2])
        return discovery.openapi_document(r for r in resources if (r.group, r.version) == (group, version))

    # --- resources

    async def _serve(self, request: web.Request, group: str, version: str, rest: list[str]) -> web.StreamResponse:
        if not rest:
            served = [r for r in self.registry.resources.values() if (r.group, r.version) == (group, version)]
            if not served and group != "authorization.k8s.io":
                raise ApiError(404, "the server could not find the requested resource")
            return _json(discovery.resource_list(f"{group}/{version}" if group else version, served))
        target = self._target(group, version, rest)
        verb = self._verb(request, target)
        return await verb(request, target)

    def _target(self, group: str, version: str, rest: list[str]) -> Target:
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
            namespace, rest = rest[1], rest[2:]
        plural, name, subresource = (*rest, "", "")[:3]
        resource = self.registry.resource(group, version, plural)
        known = not subresource or subresource in resource.subresources
        if len(rest) > 3 or not known or (namespace and not resource.namespaced):
            raise ApiError(404, "the server could not find the requested resource")
        return Target(resource, namespace, name, subresource)

    def _verb(self, request: web.Request, target: Target) -> Callable[..., Awaitable[web.StreamResponse]]:
        verbs: dict[tuple[str, str], Callable[..., Awaitable[web.StreamResponse]]] = {
            ("GET", "collection"): self._list,
            ("POST", "collection"): self._create,
            ("DELETE", "collection"): self._delete_collection,
            ("GET", "object"): self._get,
            ("GET", "status"): self._get,
            ("PUT", "object"): self._put,
            ("PUT", "status"): self._put,
            ("PATCH", "object"): self._patch,
            ("PATCH", "status"): self._patch,
            ("DELETE", "object"): self._delete,
            ("GET", "log"): self._log,
            ("POST", "binding"): self._bind,
        }
        place = target.subresource or ("object" if target.name else "collection")
        all_namespaces = target.resource.namespaced and not target.namespace and request.method != "GET"
        verb = verbs.get((request.method, place))
        if verb is None or all_namespaces:
            raise ApiError(405, "the server does not allow this method on the requested resource")
        return verb

    async def _get(self, request: web.Request, target: Target) -> web.StreamResponse:
        obj = self.registry.get(target.resource, target.key)
        if include := _table_wanted(request):
            metadata = {"resourceVersion": obj["metadata"]["resourceVersion"]}
            return _json(table(target.resource, [obj], metadata, include))
        return _json(obj)

    async def _list(self, request: web.Request, target: Target) -> web.StreamResponse:
        query = request.query
        chosen = selection(target.resource, query.get("labelSelector", ""), query.get("fieldSelector", ""))
        if query.get("watch", "").lower() in ("true", "1"):
            return await self._watch(request, target, chosen)
        version, start = self._list_start(target, query)
        found = self.registry.shelf(target.resource).selected(target.namespace)
        pairs = [(key, obj) for key, obj in found if (start is None or key > start) and chosen(obj)]
        limit = _number(query, "limit") or len(pairs)
        metadata: Json = {"resourceVersion": str(version)}
        if len(pairs) > limit:
            token = json.dumps([version, pairs[limit - 1][0]]).encode()
            metadata |= {"continue": base64.urlsafe_b64encode(token).decode(), "remainingItemCount": len(pairs) - limit}
        objects = [seen_as(target.resource, obj) for _, obj in pairs[:limit]]
        if include := _table_wanted(request):
            return _json(table(target.resource, objects, metadata, include))
        kind = {"kind": f"{target.resource.kind}List", "apiVersion": target.resource.api_version}
        return _json(kind | {"metadata": metadata, "items": objects})

    def _list_start(self, target: Target, query: Mapping[str, str]) -> tuple[int, Key | None]:
        """The version a list is told at, and the key after which it goes on."""
        current, shelf = self.registry.store.version, self.registry.shelf(target.resource)
        if token := query.get("continue"):
            try:
                version, start = json.loads(base64.urlsafe_b64decode(token))
            except ValueError as error:
                raise bad_request(f"continue key is not valid: {error}") from error
            shelf.require(version)
            return version, (start[0], start[1])
        wanted = _number(query, "resourceVersion")
        if wanted > current:
            raise ApiError(504, f"Too large resource version: {wanted}, current: {current}")
        return current, None

    async def _create(self, request: web.Request, target: Target) -> web.StreamResponse:
        write = _write(request, target)
        made = self.registry.create(target.resource, target.namespace, await _body(request), write)
        return _json(made, status=201, warnings=write.warnings)

    async def _put(self, request: web.Request, target: Target) -> web.StreamResponse:
        write, body = _write(request, target), await _body(request)
        done = self.registry.update(target.resource, target.key, lambda _: body, write)
        return _json(done, warnings=write.warnings)

    async def _patch(self, request: web.Request, target: Target) -> web.StreamResponse:
        sort = _MERGES.get(request.content_type)
        if sort is None or (sort == "strategic" and target.resource.custom):
            accepted = ", ".join(word for word in _MERGES if not target.resource.custom or "strategic" not in word)
            told = "the body of the request was in an unknown format - accepted media types include: "
            raise ApiError(415, told + accepted)
        patch = await _body(request)
        write = _write(request, target, operation="Apply" if sort == "apply" else "Update")
        if sort == "apply":
            done, created = self.registry.apply(target.resource, target.key, patch, write)
            return _json(done, status=201 if created else 200, warnings=write.warnings)
        node = target.resource.node
        changes: dict[str, Callable[[Json], Json]] = {
            "merge": lambda live: merge_patch(live, patch),
            "json": lambda live: json_patch(live, patch),
            "strategic": lambda live: strategic_patch(live, patch, node),
        }
        return _json(self.registry.update(target.resource, target.key, changes[sort], write), warnings=write.warnings)

    async def _delete(self, request: web.Request, target: Target) -> web.StreamResponse:
        options = await _delete_options(request)
        dry_run = bool(request.query.get("dryRun") or options.get("dryRun"))
        return _json(self.registry.delete(target.resource, target.key, options, dry_run=dry_run))

    async def _delete_collection(self, request: web.Request, target: Target) -> web.StreamResponse:
        options, query = await _delete_options(request), request.query
        chosen = selection(target.resource, query.get("labelSelector", ""), query.get("fieldSelector", ""))
        found = [(k, o) for k, o in self.registry.shelf(target.resource).selected(target.namespace) if chosen(o)]
        for key, _ in found:
            self.registry.delete(target.resource, key, options)
        kind = {"kind": f"{target.resource.kind}List", "apiVersion": target.resource.api_version}
        return _json(kind | {"metadata": {}, "items": [obj for _, obj in found]})

    async def _bind(self, request: web.Request, target: Target) -> web.StreamResponse:
        """The scheduler's word: this pod runs on that node."""
        node = (await _body(request))["target"]["name"]

        def change(pod: Json) -> Json:
            if pod["spec"].get("nodeName"):
                taken = f'pod {target.name} is already assigned to node "{pod["spec"]["nodeName"]}"'
                raise ApiError(409, taken, details={"name": target.name, "kind": "pods/binding"})
            pod["spec"]["nodeName"] = node
            return pod

        self.registry.update(target.resource, target.key, change, _write(request, target, subresource=""))
        return _json(success({"name": target.name, "kind": "pods"}), status=201)

    # --- watching

    async def _watch(self, request: web.Request, target: Target, chosen: Test) -> web.StreamResponse:
        view = View(target, chosen, _table_wanted(request))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        try:
            async for event in self._events(request.query, view):
                await response.write(_dumps(event) + b"\n")
        except ApiError as error:  # a watch tells its errors as events
            await response.write(_dumps({"type": "ERROR", "object": error.status()}) + b"\n")
        await response.write_eof()
        return response

    async def _events(self, query: Mapping[str, str], view: View) -> AsyncIterator[Json]:
        """The events of one watch: what there is (if asked for), then what changes, until its time is over."""
        shelf, current = self.registry.shelf(view.target.resource), self.registry.store.version
        since = _number(query, "resourceVersion")
        if since > current:
            raise ApiError(504, f"Too large resource version: {since}, current: {current}")
        first = query.get("sendInitialEvents") == "true"
        present = shelf.selected(view.target.namespace) if first or not since else []
        with shelf.changes(current if first or not since else since) as feed:
            for _, obj in present:
                if view.chosen(obj):
                    yield view.event("ADDED", obj)
            if first:
                yield view.bookmark(current, last_initial=True)
            async for event in self._news(query, view, feed):
                yield event

    async def _news(self, query: Mapping[str, str], view: View, feed: Feed) -> AsyncIterator[Json]:
        clock = asyncio.get_running_loop().time
        deadline = clock() + (_number(query, "timeoutSeconds") or 3600)
        bookmarks = query.get("allowWatchBookmarks", "").lower() in ("true", "1")
        due = clock() + self._bookmark_seconds
        while (left := min(deadline, due) - clock()) > 0 or clock() < deadline:
            if left <= 0 and feed.empty():
                due = clock() + self._bookmark_seconds
                if bookmarks:
                    yield view.bookmark(self.registry.store.version)
                continue
            try:
                change = await asyncio.wait_for(feed.get(), left) if feed.empty() else feed.get_nowait()
            except TimeoutError:
                continue
            if change is None:
                return
            if event := view.change(change):
                yield event

    # --- logs

    async def _log(self, request: web.Request, target: Target) -> web.StreamResponse:
        """A pod's log, asked from the kubelet of its node as the real server does."""
        assert self._kubelets is not None
        pod = self.registry.get(target.resource, target.key)
        container = _container(pod, request.query.get("container", ""))
        node = pod["spec"].get("nodeName")
        if not node:
            return web.Response(text="")
        query = {key: value for key, value in request.query.items() if key != "container"}
        url = f"{self._kubelet(node)}/containerLogs/{target.namespace}/{target.name}/{container}"
        try:
            async with self._kubelets.get(url, params=query, timeout=aiohttp.ClientTimeout(sock_connect=5)) as answer:
                if answer.status >= 400:
                    raise ApiError(answer.status, (await answer.text()).strip())
                response = web.StreamResponse(headers={"Content-Type": "text/plain"})
                await response.prepare(request)
                async for data in answer.content.iter_any():
                    await response.write(data)
                await response.write_eof()
                return response
        except aiohttp.ClientConnectorError as error:
            raise ApiError(500, f"Get {url}: {error}") from error

    def _kubelet(self, name: str) -> str:
        nodes = self.registry.resource("", "v1", "nodes")
        node = self.registry.shelf(nodes).objects.get(("", name))
        if node is None:
            raise missing(nodes, name)
        status = node.get("status", {})
        port = status.get("daemonEndpoints", {}).get("kubeletEndpoint", {}).get("Port")
        addresses = [a["address"] for a in status.get("addresses", []) if a["type"] == "InternalIP"]
        if not port or not addresses:
            raise ApiError(500, f'node "{name}" tells no InternalIP address or no kubelet port')
        return f"http://{addresses[0]}:{port}"


@dataclass(frozen=True)
class View:
    """What one watch sees of the changes of a kind."""

    target: Target
    chosen: Test
    include: str | None

    def change(self, change: Change) -> Json | None:
        """An object that comes into the selection is ADDED, one that leaves it is DELETED."""
        if self.target.namespace not in ("", change.new["metadata"].get("namespace", "")):
            return None
        before = change.old is not None and self.chosen(change.old)
        after = not change.deleted and self.chosen(change.new)
        if after:
            return self.event("MODIFIED" if before else "ADDED", change.new)
        if not before or change.old is None:
            return None
        version = {"resourceVersion": str(change.version)}
        last = change.new if change.deleted else change.old | {"metadata": change.old["metadata"] | version}
        return self.event("DELETED", last)

    def event(self, kind: str, obj: Json) -> Json:
        obj = seen_as(self.target.resource, obj)
        if self.include:
            metadata = {"resourceVersion": obj["metadata"]["resourceVersion"]}
            obj = table(self.target.resource, [obj], metadata, self.include)
        return {"type": kind, "object": obj}

    def bookmark(self, version: int, *, last_initial: bool = False) -> Json:
        metadata: Json = {"resourceVersion": str(version), "creationTimestamp": None}
        if last_initial:
            metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
        resource = self.target.resource
        obj = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}
        if self.include:
            obj = table(resource, [], metadata, self.include)
        return {"type": "BOOKMARK", "object": obj}


# --- requests and answers


def _dumps(body: Any) -> bytes:
    """JSON; half a character (a log cut in the middle) must not make the object unreadable for ever."""
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def _json(
    body: Json, *, status: int = 200, warnings: list[str] | None = None, content_type: str = "application/json"
) -> web.Response:
    response = web.Response(body=_dumps(body), status=status, headers={"Content-Type": content_type})
    for warning in warnings or []:
        quoted = warning.replace("\\", "\\\\").replace('"', '\\"')
        response.headers.add("Warning", f'299 - "{quoted}"')
    return response


async def _body(request: web.Request) -> Any:
    """The request's body; JSON is tried first because a YAML parser is a hundred times slower."""
    if request.content_type == "application/vnd.kubernetes.protobuf":
        told = "the body of the request was in an unknown format - accepted media types include: application/json"
        raise ApiError(415, told + " (protobuf is not spoken here: use a file and `kubectl apply -f`)")
    text = await request.text()
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.load(text, _Loader)  # noqa: S506  a safe loader of our own
    except yaml.YAMLError as error:
        raise bad_request(f"error decoding the body: {error}") from error


async def _delete_options(request: web.Request) -> Json:
    """Deletion options from the body, or from the query where a client puts them there."""
    options: Json = (await _body(request) or {}) if request.can_read_body else {}
    query = request.query
    if "propagationPolicy" in query:
        options["propagationPolicy"] = query["propagationPolicy"]
    if "gracePeriodSeconds" in query:
        options["gracePeriodSeconds"] = _number(query, "gracePeriodSeconds")
    if "orphanDependents" in query:
        options["orphanDependents"] = query["orphanDependents"] == "true"
    return options


def _write(request: web.Request, target: Target, operation: str = "Update", subresource: str | None = None) -> Write:
    query = request.query
    manager = query.get("fieldManager") or request.headers.get("User-Agent", "unknown").split("/")[0]
    if operation == "Apply" and "fieldManager" not in query:
        raise bad_request(
            "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value: is required for apply patch"
        )
    part = target.subresource if subresource is None else subresource
    return Write(
        writer=Writer(manager=manager, api_version=target.resource.api_version, subresource=part, operation=operation),
        validation=query.get("fieldValidation", "Warn"),
        dry_run=query.get("dryRun") == "All",
        force=query.get("force") == "true",
    )


def _number(query: Mapping[str, str], name: str) -> int:
    text = query.get(name, "")
    if not re.fullmatch(r"\d*", text):
        raise bad_request(f'{name}: Invalid value: "{text}": must be a number')
    return int(text or 0)


def _table_wanted(request: web.Request) -> str | None:
    """What each row of a Table should carry, None if no Table is asked for."""
    first = request.headers.get("Accept", "").split(",")[0]
    return request.query.get("includeObject", "Metadata") if "as=Table" in first else None


def _discovery_type(request: web.Request) -> str:
    accepted = request.headers.get("Accept", "").replace(" ", "").split(",")
    return discovery.AGGREGATED if discovery.AGGREGATED in accepted else "application/json"


def _container(pod: Json, wanted: str) -> str:
    names: list[str] = [c["name"] for c in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]]
    name = pod["metadata"]["name"]
    if not wanted and len(pod["spec"]["containers"]) > 1:
        raise bad_request(f"a container name must be specified for pod {name}, choose one of: [{' '.join(names)}]")
    if wanted and wanted not in names:
        raise bad_request(f"container {wanted} is not valid for pod {name}")
    return wanted or str(pod["spec"]["containers"][0]["name"])
