"""The operator's own client: lists in pages, watches that go on."""

import asyncio
import json
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.config import incluster_config
from support.builders import manifest
from support.patience import PATIENCE

from cgd_operator.kube.client import PAGE, Cluster
from cgd_operator.kube.kinds import CONFIGMAP, RUN, ApiError

embedded_only = pytest.mark.parametrize("world", ["embedded"], indirect=True)


async def create(client: Cluster, name: str, data: str = "") -> None:
    await client.create(CONFIGMAP, {"metadata": {"name": name, "namespace": "default"}, "data": {"text": data}})


class Listener:
    """Somebody who watches, and reads one event after the other."""

    def __init__(self, client: Cluster, *, listing: bool = True) -> None:
        self._events: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self._task = asyncio.create_task(self._listen(client, listing))

    async def _listen(self, client: Cluster, listing: bool) -> None:
        async for event, item in client.watch(CONFIGMAP, "default", listing=listing):
            self._events.put_nowait((event, item.get("metadata", {}).get("name", "")))

    async def read(self, count: int) -> list[tuple[str, str]]:
        async with asyncio.timeout(PATIENCE):
            return [await self._events.get() for _ in range(count)]


Listen = Callable[..., Listener]


@pytest.fixture
async def listener(world: Any) -> AsyncIterator[Listen]:
    listeners: list[Listener] = []

    def listen(*, listing: bool = True) -> Listener:
        listeners.append(Listener(world.client, listing=listing))
        return listeners[-1]

    yield listen
    for one in listeners:
        one._task.cancel()


async def test_pages_hold_every_object_once_and_no_page_more_than_its_size(world: Any) -> None:
    names = sorted(f"c{number:03}" for number in range(2 * PAGE + 7))
    for name in names:
        await create(world.client, name)
    pages = [items async for items, _ in world.client.pages(CONFIGMAP, "default")]
    own = [item["metadata"]["name"] for items in pages for item in items if item["metadata"]["name"] in names]
    assert own == names
    assert max(len(items) for items in pages) == PAGE
    assert {item["kind"] for items in pages for item in items} == {"ConfigMap"}


async def test_a_watch_lists_then_tells_changes(world: Any, listener: Listen) -> None:
    await create(world.client, "here")
    mine = listener()
    assert await mine.read(2) == [("LISTED", "here"), ("SYNCED", "")]
    await create(world.client, "new")
    assert await mine.read(1) == [("ADDED", "new")]


async def test_a_watch_that_lists_nothing_tells_what_happens_from_now_on(world: Any, listener: Listen) -> None:
    await create(world.client, "here")
    mine = listener(listing=False)
    assert await mine.read(1) == [("SYNCED", "")]
    await create(world.client, "new")
    assert await mine.read(1) == [("ADDED", "new")]


async def test_watches_of_many_namespaces_leave_room_for_other_requests(world: Any, listener: Listen) -> None:
    for one in [listener(listing=False) for _ in range(101)]:
        assert await one.read(1) == [("SYNCED", "")]
    async with asyncio.timeout(PATIENCE):
        await world.client.list(CONFIGMAP, "default")


async def test_an_object_of_hundreds_of_kilobytes_is_one_event(world: Any, listener: Listen) -> None:
    mine = listener()
    await mine.read(1)
    await create(world.client, "large", "x" * 700_000)
    assert await mine.read(1) == [("ADDED", "large")]


@embedded_only
async def test_a_run_with_deeply_nested_values_hides_no_other(world: Any) -> None:
    """A field without a schema takes whatever a user writes; the run is refused when it is read."""
    value: Any = 1
    for _ in range(250):
        value = {"a": value}
    for name, values in {"plain": {}, "deep": {"teacher.chat.templateKwargs": {"v": value}}}.items():
        await world.client.create(RUN, manifest(values, name=name))
    runs, _ = await world.client.list(RUN, "default")
    assert {"plain", "deep"} <= {run["metadata"]["name"] for run in runs}


@embedded_only
async def test_a_watch_that_is_told_its_version_is_gone_lists_again_and_tells_nothing_as_new(
    world: Any, listener: Callable[[], Listener]
) -> None:
    await create(world.client, "here")
    refused = []

    def once(request: web.Request) -> web.Response | None:
        if refused or "watch=true" not in request.query_string:
            return None
        refused.append(request.path_qs)
        return web.json_response({"code": 410, "reason": "Expired", "message": "too old"}, status=410)

    world.embedded.fault = once
    seen = await listener().read(4)
    assert seen[:4] == [("LISTED", "here"), ("SYNCED", ""), ("LISTED", "here"), ("SYNCED", "")]


@embedded_only
async def test_a_watch_that_is_ended_at_once_is_opened_ever_more_rarely_and_told_of_once(
    world: Any, listener: Callable[[], Listener], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "cgd_operator.kube.client")
    monkeypatch.setattr("cgd_operator.kube.client.STEADY_SECONDS", PATIENCE)
    opened: list[float] = []

    def ended(request: web.Request) -> web.Response | None:
        if "watch=true" not in request.query_string:
            return None
        opened.append(time.monotonic())
        return web.Response()

    async def often() -> bool:
        return len(opened) >= 4

    world.embedded.fault = ended
    mine = listener()
    assert await mine.read(1) == [("SYNCED", "")]
    await world.until(often)
    pauses = [after - before for before, after in pairwise(opened)]
    assert all(pause >= least for pause, least in zip(pauses[:3], (0.2, 0.4, 0.8), strict=True)), pauses
    assert len([line for line in caplog.messages if "interrupted" in line]) == 1
    world.embedded.fault = lambda _: None
    await create(world.client, "after")
    assert await mine.read(1) == [("ADDED", "after")]


@embedded_only
async def test_a_list_whose_token_is_gone_starts_over(world: Any, listener: Listen) -> None:
    for number in range(PAGE + 1):
        await create(world.client, f"c{number:03}")
    refused = []

    def once(request: web.Request) -> web.Response | None:
        if refused or "continue" not in request.query:
            return None
        refused.append(request.path_qs)
        return web.json_response({"code": 410, "reason": "Expired", "message": "token too old"}, status=410)

    world.embedded.fault = once
    seen = await listener().read(2 * PAGE + 2)
    assert seen.count(("SYNCED", "")) == 1
    assert seen.count(("LISTED", "c000")) == 2
    assert seen.count(("LISTED", f"c{PAGE:03}")) == 1


@embedded_only
async def test_a_watch_whose_connection_is_cut_goes_on_where_it_was(
    world: Any, listener: Callable[[], Listener]
) -> None:
    mine = listener()
    assert await mine.read(1) == [("SYNCED", "")]
    world.embedded.registry.store.end_watches()
    await create(world.client, "meanwhile")
    assert await mine.read(1) == [("ADDED", "meanwhile")]


@embedded_only
async def test_a_watch_goes_on_from_its_last_bookmark_when_its_connection_is_cut(world: Any, listener: Listen) -> None:
    """Nothing of its own kind happens for long; without bookmarks its version would be too old by then."""
    world.embedded._bookmark_seconds = 0.05
    mine = listener()
    assert await mine.read(1) == [("SYNCED", "")]
    await world.apply()
    now = world.embedded.registry.store.version

    async def goes_on() -> bool:
        world.embedded.registry.store.end_watches()
        await asyncio.sleep(0.2)
        opened = [path for _, path in list(world.embedded.requests) if "/configmaps?watch=true" in path]
        return f"resourceVersion={now}&" in opened[-1]

    await world.until(goes_on)
    await create(world.client, "after")
    assert await mine.read(1) == [("ADDED", "after")]


@embedded_only
@pytest.mark.parametrize("line", [b"<html>please log in</html>", b'{"type": "ADDED", "obj'])
async def test_a_watch_with_a_line_that_is_no_json_goes_on_where_it_was(
    world: Any, listener: Listen, line: bytes
) -> None:
    told: list[str] = []

    async def once(request: web.Request) -> web.StreamResponse | None:
        if told or "watch=true" not in request.query_string:
            return None
        told.append(request.path_qs)
        return web.Response(body=line + b"\n")

    world.embedded.fault = once
    mine = listener()
    assert await mine.read(1) == [("SYNCED", "")]
    await create(world.client, "after")
    assert await mine.read(1) == [("ADDED", "after")]
    assert told


def make_certificate(folder: Path) -> tuple[Path, Path]:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    making = f"req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2 -subj /CN=127.0.0.1"
    subprocess.run(["openssl", *making.split()], check=True, capture_output=True)
    return key, certificate


async def test_a_pod_uses_its_service_account_without_a_word_about_kubeconfigs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning would fail the test."""
    _, certificate = make_certificate(tmp_path)
    (tmp_path / "token").write_text("secret")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(certificate))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    async with await Cluster.connect(manager="test") as client:
        assert client._client.configuration.host == "https://10.0.0.1:443"


async def test_a_watch_that_is_let_go_leaves_no_connection_to_a_server_that_says_no_goodbye(tmp_path: Path) -> None:
    key, certificate = make_certificate(tmp_path)
    config = tmp_path / "kubeconfig"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    served: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(writer)
        for said in (b'{"items": [], "metadata": {"resourceVersion": "1"}}', b""):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(
                b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: %d\r\n" % len(said) if said else b"") + b"\r\n" + said
            )
        event = {"type": "ADDED", "object": {"metadata": {"resourceVersion": "2"}}}
        writer.write(json.dumps(event).encode() + b"\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    parts = {
        "clusters": [{"name": "c", "cluster": {"server": url, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    }
    config.write_text(json.dumps({"current-context": "x", **parts}))
    async with await Cluster.connect(str(config), manager="test") as client:
        mine = Listener(client)
        assert await mine.read(2) == [("SYNCED", ""), ("ADDED", "")]
        (transport,) = client._connections().connector._transports  # type: ignore[union-attr]
        socket = transport.get_extra_info("socket")
        mine._task.cancel()
        await asyncio.wait([mine._task])
    await asyncio.sleep(0)
    assert socket.fileno() == -1
    served[0].transport.abort()
    server.close()


async def test_the_proxy_that_the_environment_names_is_asked_but_not_for_what_it_excepts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        asked.append(request.headers["Host"])
        return web.json_response({"metadata": {"name": "a"}})

    proxy = await asyncio.get_running_loop().create_server(web.Server(answer), "127.0.0.1", 0)
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
    parts = {
        "clusters": [{"name": "c", "cluster": {"server": "http://behind.example"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    }
    (path := tmp_path / "kubeconfig").write_text(json.dumps({"current-context": "x", **parts}))
    async with proxy, await Cluster.connect(str(path), manager="test") as client:
        assert await client.get(CONFIGMAP, "a", "default") == {"metadata": {"name": "a"}}
        assert asked == ["behind.example"]
        monkeypatch.setenv("NO_PROXY", ".example")
        async with await Cluster.connect(str(path), manager="test") as direct:
            with pytest.raises(ApiError, match=r"behind\.example"):
                await direct.get(CONFIGMAP, "a", "default")
    assert asked == ["behind.example"]
