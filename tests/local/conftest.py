"""A server of its own for every test, and the three clients that use it in earnest."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import yaml
from support.patience import PATIENCE

from cgd_local.apiserver import ApiServer

Json = dict[str, Any]
WIDGETS = "/apis/demo.example.com/v1/namespaces/default/widgets"
KUBECTL = str(Path(sys.executable).parent / "kubectl")


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    server = ApiServer(history=200, bookmark_seconds=0.2)
    await server.start()
    yield server
    await server.stop()


class Client:
    """Plain HTTP: what a test says is what the server gets."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def ask(self, method: str, path: str, body: Any = None, *, code: int | None = None, **more: Any) -> Any:
        """The answer's JSON; `code` is the status the test expects, any success if none is given."""
        kind = more.pop("kind", "application/json")
        headers = {"Content-Type": kind} | more.pop("headers", {})
        async with self.session.request(method, self.url + path, json=body, headers=headers, **more) as answer:
            text = await answer.text()
            assert answer.status == code if code else answer.status < 300, f"{answer.status}: {text}"
            return json.loads(text)

    async def get(self, path: str, **more: Any) -> Any:
        return await self.ask("GET", path, **more)

    async def post(self, path: str, body: Any, **more: Any) -> Any:
        return await self.ask("POST", path, body, **more)

    async def put(self, path: str, body: Any, **more: Any) -> Any:
        return await self.ask("PUT", path, body, **more)

    async def patch(self, path: str, body: Any, sort: str = "merge-patch+json", **more: Any) -> Any:
        return await self.ask("PATCH", path, body, kind=f"application/{sort}", **more)

    async def apply(self, path: str, body: Any, manager: str = "me", *, force: bool = False, **more: Any) -> Any:
        query = f"?fieldManager={manager}" + ("&force=true" if force else "")
        return await self.patch(path + query, body, "apply-patch+yaml", **more)

    async def delete(self, path: str, body: Any = None, **more: Any) -> Any:
        return await self.ask("DELETE", path, body, **more)

    async def watch(self, path: str, count: int, **query: Any) -> list[Json]:
        """The first events of a watch."""
        events: list[Json] = []
        async with self.session.get(self.url + path, params={"watch": "1", **query}) as answer:
            async for line in answer.content:
                events.append(json.loads(line))
                if len(events) == count:
                    break
        return events


@pytest.fixture
async def client(server: ApiServer) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session, server.url)


Kubectl = Callable[..., Awaitable[str]]


@pytest.fixture
async def kubectl(server: ApiServer, tmp_path: Path) -> Kubectl:
    """Run the real kubectl: `await kubectl("apply", "-f", "-", stdin=object_or_text)`; `fails=True` wants a failure,
    `lines` ends a kubectl that goes on when it has printed so many."""
    config = tmp_path / "kubeconfig"
    config.write_text(server.kubeconfig())
    env = os.environ | {"KUBECONFIG": str(config), "KUBECACHEDIR": str(tmp_path / "cache"), "HOME": str(tmp_path)}

    async def run(*words: str, stdin: Any = None, fails: bool = False, lines: int = 0) -> str:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            KUBECTL, *words, env=env, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT
        )
        if lines:
            assert process.stdout
            async with asyncio.timeout(PATIENCE):
                printed = [await process.stdout.readline() for _ in range(lines)]
            process.kill()
            await process.communicate()
            return b"".join(printed).decode()
        text = stdin if isinstance(stdin, str) else yaml.safe_dump(stdin) if stdin else ""
        out, _ = await asyncio.wait_for(process.communicate(text.encode()), PATIENCE)
        assert bool(process.returncode) == fails, out.decode()
        return out.decode()

    return run


def crd(*, rules: Sequence[Json] = (), **fields: Json) -> Json:
    """A widget: every feature of a definition in one kind, and more rules and fields of its spec."""
    condition = {
        "type": "object",
        "required": ["type", "status"],
        "properties": {
            "type": {"type": "string"},
            "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
            "reason": {"type": "string"},
            "lastTransitionTime": {"type": "string", "format": "date-time"},
        },
    }
    keyed = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
    part = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string"}, "count": {"type": "integer", "default": 1}},
    }
    spec = {
        "type": "object",
        "required": ["size"],
        "properties": {
            "size": {"type": "integer", "format": "int32", "minimum": 1, "maximum": 100, "description": "How big."},
            "color": {"type": "string", "enum": ["red", "green"], "default": "red"},
            "model": {"type": "string", "minLength": 1, "maxLength": 20, "pattern": "^[a-z]+$"},
            "port": {"x-kubernetes-int-or-string": True},
            "note": {"type": "string", "nullable": True},
            "until": {"type": "string", "format": "date-time"},
            "extra": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "tags": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set", "minItems": 1},
            "parts": {"type": "array", "items": part, "maxItems": 5} | keyed,
            "plain": {"type": "array", "items": {"type": "integer"}},
            "train": {
                "type": "object",
                "default": {},
                "properties": {"epochs": {"type": "integer", "default": 3}, "max-steps": {"type": "integer"}},
            },
            **fields,
        },
        "x-kubernetes-validations": [
            {"rule": "self.size >= 2 || self.color == 'red'", "message": "a small widget is red"},
            {
                "rule": "!has(oldSelf.model) || (has(self.model) && self.model == oldSelf.model)",
                "message": "model is fixed",
            },
            *rules,
        ],
    }
    listed = {"type": "array", "items": condition} | keyed | {"x-kubernetes-list-map-keys": ["type"]}
    status = {
        "type": "object",
        "properties": {"state": {"type": "string"}, "observedGeneration": {"type": "integer"}, "conditions": listed},
    }
    schema = {"type": "object", "required": ["spec"], "properties": {"spec": spec, "status": status}}
    columns = [
        {"name": "Size", "type": "integer", "jsonPath": ".spec.size"},
        {"name": "Ready", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Ready")].status'},
        {"name": "Model", "type": "string", "jsonPath": ".spec.model", "priority": 1},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    ]
    version = {"name": "v1", "served": True, "storage": True, "subresources": {"status": {}}}
    version |= {"schema": {"openAPIV3Schema": schema}, "additionalPrinterColumns": columns}
    names = {"plural": "widgets", "singular": "widget", "kind": "Widget", "shortNames": ["wd"], "categories": ["all"]}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.demo.example.com"},
        "spec": {"group": "demo.example.com", "names": names, "scope": "Namespaced", "versions": [version]},
    }


def widget(name: str = "w", **spec: Any) -> Json:
    return {
        "apiVersion": "demo.example.com/v1",
        "kind": "Widget",
        "metadata": {"name": name},
        "spec": {"size": 3} | spec,
    }


def job(name: str = "j", **spec: Any) -> Json:
    container = {"name": "c", "image": "local", "command": ["true"]}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {"template": template} | spec}


def pod(name: str = "p", **spec: Any) -> Json:
    container = {"name": "c", "image": "local"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"containers": [container]} | spec}


@pytest.fixture
async def widgets(client: Client) -> Client:
    """A client of a server that knows widgets."""
    await client.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd())
    return client


@pytest.fixture
def eventually() -> Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]:
    """Ask again until the answer is true, and return it: `await eventually(lambda: client.get(path))`."""

    async def ask(question: Callable[[], Awaitable[Any]]) -> Any:
        async with asyncio.timeout(PATIENCE):
            while not (answer := await question()):  # noqa: ASYNC110  the answer is another process's
                await asyncio.sleep(0.02)
        return answer

    return ask


@pytest.fixture
def watched(server: ApiServer, eventually: Any) -> Callable[[], Awaitable[Any]]:
    """Wait until somebody watches widgets: `await watched()`."""

    async def feeds() -> Any:
        return server.registry.store.shelf("widgets.demo.example.com").feeds

    return lambda: eventually(feeds)


@pytest.fixture
def make() -> SimpleNamespace:
    """Builders of objects: `make.widget("w", size=2)`."""
    return SimpleNamespace(crd=crd, widget=widget, job=job, pod=pod)
