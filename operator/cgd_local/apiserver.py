"""A Kubernetes API server for one machine: what kopf, the kubernetes client and kubectl need, over plain HTTP.

    server = ApiServer()
    await server.start()
    Path("kubeconfig").write_text(server.kubeconfig())

It plays kube-apiserver and etcd, and nothing else: no garbage collection, no controllers, no kubelet. It listens on
loopback, authenticates nobody, and keeps everything in memory: `stop` and then `start` of one object is a restart. It
speaks only JSON, and each page of a list shows the objects at the time of its request.
"""

from __future__ import annotations

import inspect
import json
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import yaml
from aiohttp import web
from pydantic_core import PydanticSerializationError, to_json

from cgd_local import discovery
from cgd_local.ownership import Write
from cgd_local.patches import json_patch, merge_patch
from cgd_local.registry import Registry
from cgd_local.requests import Target
from cgd_local.schema import drop_nulls
from cgd_local.statuses import ApiError, Json, success
from cgd_local.watches import events

logger = logging.getLogger(__name__)
Fault = Callable[[web.Request], "web.StreamResponse | Awaitable[web.StreamResponse | None] | None"]
Verb = Callable[["ApiServer", Target], Awaitable[web.StreamResponse]]
_LARGEST = 3 * 2**20


class ApiServer:
    """The server.

    Args:
        history: writes per kind with which a watch can catch up; the answer to an older version is 410.
        bookmark_seconds: silence after which a watch that allows bookmarks gets one.
        fault: called with each request before the server handles it; a response that it returns is the answer.
    """

    def __init__(self, *, history: int = 10_000, bookmark_seconds: float = 30, fault: Fault | None = None) -> None:
        self.registry = Registry(history)
        self.requests: deque[tuple[str, str]] = deque(maxlen=10_000)
        self.fault = fault
        self.url = ""
        self._bookmark_seconds = bookmark_seconds
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> None:
        """Listen on loopback; port 0 takes a free port, and `url` names it."""
        app = web.Application(client_max_size=_LARGEST)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", port), backlog=512)
        await web.SockSite(self._runner, listener).start()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        namespaces = self.registry.resources["namespaces"]
        for name in ("default", "kube-system"):
            if ("", name) not in self.registry.shelf(namespaces).objects:
                write = Write(manager="kube-apiserver", api_version="v1")
                self.registry.create(namespaces, "", {"metadata": {"name": name}}, write)

    async def stop(self) -> None:
        """End every watch and close the port; the objects stay for another `start`."""
        self.registry.store.end_watches()
        if self._runner:
            await self._runner.cleanup()
        self._runner = None

    def kubeconfig(self) -> str:
        return kubeconfig_of({"server": self.url}, {})

    # --- one request

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        try:
            fault = self.fault(request) if self.fault else None
            return (await fault if inspect.isawaitable(fault) else fault) or await self._route(request)
        except ApiError as error:
            return _answer(error.status(), error.code)
        except web.HTTPRequestEntityTooLarge:
            return _answer(ApiError(413, f"Request entity too large: limit is {_LARGEST}").status(), 413)
        except ConnectionResetError:
            raise
        except Exception as error:
            logger.exception("%s %s", request.method, request.path_qs)
            return _answer(ApiError(500, f"Internal error occurred: {error!r}").status(), 500)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        served = self.registry.resources.values()
        match request.path.strip("/").split("/"):
            case ["version"]:
                return _answer(discovery.VERSION)
            case ["healthz" | "readyz" | "livez", *_]:
                return web.Response(text="ok")
            case ["api"]:
                return _answer({"kind": "APIVersions", "versions": ["v1"]})
            case ["apis"]:
                return _answer(discovery.group_list(served))
            case ["openapi", "v3"]:
                return _answer(discovery.openapi_index(served))
            case ["openapi", "v3", "api" | "apis", *words]:
                return _answer(discovery.openapi_document("/".join(words), served))
            case ["api", _] | ["apis", _, _] as words:
                return _answer(discovery.resource_list("/".join(words[1:]), served))
            case ["api", _, _, *_] | ["apis", _, _, _, *_] as words:
                target = Target.of(request, self.registry, words)
                verb = _VERBS.get((request.method, target.subresource or ("object" if target.name else "collection")))
                lacks_namespace = target.resource.namespaced and not target.namespace and request.method != "GET"
                if verb is None or lacks_namespace:
                    raise ApiError(405, "the server does not allow this method on the requested resource")
                return await verb(self, target)
        raise ApiError(404, "the server could not find the requested resource")

    # --- verbs

    async def _get(self, target: Target) -> web.StreamResponse:
        obj = self.registry.get(target.resource, target.key)
        return _answer(target.table([obj], obj["metadata"]["resourceVersion"]) or obj)

    async def _list(self, target: Target) -> web.StreamResponse:
        if target.flag("watch"):
            return await self._watch(target)
        version = str(self.registry.store.version)
        objects, more = target.page(target.objects(self.registry.shelf(target.resource)))
        metadata = {"resourceVersion": version, **more}
        kind = {"kind": f"{target.resource.kind}List", "apiVersion": target.resource.api_version}
        rows = target.table(objects, version)
        return _answer(rows | {"metadata": metadata} if rows else kind | {"metadata": metadata, "items": objects})

    async def _watch(self, target: Target) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(target.request)
        try:
            async for event in events(self.registry.store, target, self._bookmark_seconds):
                await response.write(_dumps(event) + b"\n")
        except ApiError as error:  # a watch reports its errors as events
            await response.write(_dumps({"type": "ERROR", "object": error.status()}) + b"\n")
        await response.write_eof()
        return response

    async def _create(self, target: Target) -> web.StreamResponse:
        body = await target.body()
        return _answer(self.registry.create(target.resource, target.namespace, body, target.write()), 201)

    async def _put(self, target: Target) -> web.StreamResponse:
        body = await target.body()
        return self._updated(target, lambda _: body)

    async def _patch(self, target: Target) -> web.StreamResponse:
        patch, resource = await target.body(), target.resource
        match target.request.content_type:
            case "application/merge-patch+json":
                return self._updated(target, lambda live: merge_patch(live, patch))
            case "application/json-patch+json":
                return self._updated(target, lambda live: json_patch(live, patch))
            case "application/strategic-merge-patch+json" if not resource.custom:
                return self._updated(target, lambda live: merge_patch(live, patch, resource.schema))
            case "application/apply-patch+yaml":
                stored, created = self.registry.apply(resource, target.key, patch, target.write("Apply"))
                return _answer(stored, 201 if created else 200)
        raise ApiError(415, "the body of the request was in an unknown format")

    def _updated(self, target: Target, change: Callable[[Json], Json]) -> web.StreamResponse:
        return _answer(self.registry.update(target.resource, target.key, change, target.write()))

    async def _delete(self, target: Target) -> web.StreamResponse:
        options = drop_nulls(await target.body()) if target.request.can_read_body else {}
        parameters = ("propagationPolicy", "gracePeriodSeconds", "dryRun")
        options |= {name: target.text(name) for name in parameters if target.text(name)}
        return _answer(self.registry.delete(target.resource, target.key, options))

    async def _bind(self, target: Target) -> web.StreamResponse:
        """Bind a pod to a node, as the scheduler asks."""
        node = (await target.body())["target"]["name"]

        def change(pod: Json) -> Json:
            if current := pod["spec"].get("nodeName"):
                raise ApiError(409, f'pod {target.name} is already assigned to node "{current}"')
            return pod | {"spec": pod["spec"] | {"nodeName": node}}

        self.registry.update(target.resource, target.key, change, target.write())
        return _answer(success({"name": target.name, "kind": "pods"}), 201)

    async def _log(self, target: Target) -> web.StreamResponse:
        """A pod's log, which the server requests from the kubelet of the pod's node, as the real server does."""
        pod = self.registry.get(target.resource, target.key)
        name = pod["spec"].get("nodeName")
        if name is None:
            return web.Response(text="")
        node = self.registry.get(self.registry.resources["nodes"], ("", name))
        try:
            addresses = node["status"]["addresses"]
            (address,) = [entry["address"] for entry in addresses if entry["type"] == "InternalIP"]
            kubelet = f"http://{address}:{node['status']['daemonEndpoints']['kubeletEndpoint']['Port']}"
        except (KeyError, ValueError) as error:
            raise ApiError(500, f'node "{name}" names no InternalIP address or no kubelet port') from error
        container = target.text("container") or pod["spec"]["containers"][0]["name"]
        url = f"{kubelet}/containerLogs/{target.namespace}/{target.name}/{container}"
        timeout = aiohttp.ClientTimeout(sock_connect=5)
        try:
            async with aiohttp.request("GET", url, params=target.request.query, timeout=timeout) as answer:
                if answer.status >= 400:
                    raise ApiError(answer.status, (await answer.text()).strip())
                response = web.StreamResponse(headers={"Content-Type": "text/plain"})
                await response.prepare(target.request)
                async for data in answer.content.iter_any():
                    await response.write(data)
                await response.write_eof()
                return response
        except aiohttp.ClientConnectorError as error:
            raise ApiError(500, f"Get {url}: {error}") from error


_VERBS: dict[tuple[str, str], Verb] = {
    ("GET", "collection"): ApiServer._list,
    ("POST", "collection"): ApiServer._create,
    ("GET", "object"): ApiServer._get,
    ("PUT", "object"): ApiServer._put,
    ("PATCH", "object"): ApiServer._patch,
    ("DELETE", "object"): ApiServer._delete,
    ("GET", "status"): ApiServer._get,
    ("PUT", "status"): ApiServer._put,
    ("PATCH", "status"): ApiServer._patch,
    ("GET", "log"): ApiServer._log,
    ("POST", "binding"): ApiServer._bind,
}


def kubeconfig_of(cluster: Json, user: Json) -> str:
    """A kubeconfig as YAML, with a single cluster and a single user."""
    parts = {
        "clusters": [{"name": "local", "cluster": cluster}],
        "contexts": [{"name": "local", "context": {"cluster": "local", "user": "local", "namespace": "default"}}],
        "users": [{"name": "local", "user": user}],
    }
    return yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "local", **parts})


def _dumps(body: Any) -> bytes:
    """JSON. Half a character (from a log cut in its middle) must not make the object unreadable for ever."""
    try:
        return to_json(body)
    except PydanticSerializationError:
        return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def _answer(body: Json, status: int = 200) -> web.Response:
    return web.Response(body=_dumps(body), status=status, content_type="application/json")
