"""`cgd ui` over a real connection to the API: what it tells, when, and whom it refuses."""

import asyncio
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from support.builders import definition, manifest
from support.kubelet import a_pod_with_a_log, kubelet
from support.patience import PATIENCE
from support.status_builders import every_state

from cgd_cli.board import LOST, Board
from cgd_cli.ui import LINES, _application, serving
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import EVENT, NAMESPACE, RUN, ApiError

STATES = every_state()


class Ui:
    """A served page, and the cluster that it shows."""

    def __init__(self, api: ApiServer, cluster: Cluster, session: aiohttp.ClientSession) -> None:
        self.api, self.cluster, self.session = api, cluster, session

    async def create(self, name: str = "demo", namespace: str = "default", case: str = "just begun") -> Any:
        body = manifest(name=name, namespace=namespace)
        del body["metadata"]["uid"], body["metadata"]["generation"]
        await self.cluster.create(RUN, body)
        return await self.become(case, name, namespace)

    async def become(self, case: str, name: str = "demo", namespace: str = "default") -> Any:
        body = {"status": STATES[case]["status"]}
        return await self.cluster.patch(RUN, name, namespace, body, subresource="status")

    async def note(self, run: Any, reason: str) -> None:
        about = {"kind": RUN.kind, **{key: run["metadata"][key] for key in ("name", "namespace", "uid")}}
        meta = {"name": f"{run['metadata']['name']}.{reason.lower()}", "namespace": run["metadata"]["namespace"]}
        await self.cluster.create(
            EVENT,
            {
                "apiVersion": "v1", "kind": "Event", "metadata": meta, "involvedObject": about, "type": "Normal",
                "reason": reason, "message": "it happened", "lastTimestamp": "2026-01-01T00:00:00Z",
            },
        )  # fmt: skip

    def stream(self, path: str) -> "Stream":
        return Stream(self.session, path)


class Stream:
    """A tab: `next` is what it is told next."""

    def __init__(self, session: aiohttp.ClientSession, path: str) -> None:
        self._asking = session.get(path, timeout=aiohttp.ClientTimeout(total=None, sock_read=20))

    async def __aenter__(self) -> "Stream":
        self.response = await self._asking.__aenter__()
        assert self.response.content_type == "text/event-stream"
        return self

    async def __aexit__(self, *error: Any) -> None:
        self.response.close()

    async def next(self) -> tuple[str, Any]:
        event = ""
        async for line in self.response.content:
            word, _, value = line.decode().rstrip("\n").partition(": ")
            if word == "event":
                event = value
            if word == "data":
                return event, json.loads(value)
        raise EOFError

    async def until(self, wanted: Any) -> Any:
        """The first data of which `wanted` is true."""
        while not wanted(data := (await self.next())[1]):
            pass
        return data


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiServer]:
    api = ApiServer()
    await api.start()
    (tmp_path / "kubeconfig").write_text(api.kubeconfig())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield api
    await api.stop()


@pytest.fixture
async def ui(api: ApiServer) -> AsyncIterator[Ui]:
    """All namespaces, one of which is `other`."""
    async with await Cluster.connect(manager="test") as cluster:
        await install(cluster, definition())
        await cluster.create(NAMESPACE, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other"}})
        async with serving(cluster, None, 0) as address, aiohttp.ClientSession(address) as session:
            yield Ui(api, cluster, session)


# --- what it tells


async def test_a_tab_is_told_of_all_runs_and_then_of_those_that_change(ui: Ui) -> None:
    await ui.create("one")
    await ui.create("two", "other")
    async with ui.stream("/changes") as tab:
        event, _ = await tab.next()
        assert event == "all"
        await ui.become("failed stage", "two", "other")
        told = await tab.until(lambda data: any(run["state"] == "Failed" for run in data["changed"]))
        assert [run["key"] for run in told["changed"]] == ["other/two"]
    async with ui.stream("/changes") as tab:
        _, told = await tab.next()
        assert {run["key"]: run["state"] for run in told["changed"]} == {
            "default/one": "Pending",
            "other/two": "Failed",
        }
        assert (told["gone"], told["trouble"]) == ([], "")


async def test_a_run_that_is_deleted_is_gone_from_every_tab(ui: Ui) -> None:
    await ui.create()
    async with ui.stream("/changes") as tab, ui.stream("/runs/default/demo/changes") as own:
        await own.until(lambda data: data["run"])
        await ui.cluster.delete(RUN, "demo", "default")
        assert (await tab.until(lambda data: data["gone"]))["gone"] == ["default/demo"]
        assert (await own.until(lambda data: data["run"] is None))["trouble"] == ""


async def test_a_runs_own_page_tells_its_events_and_no_other_runs_changes(ui: Ui) -> None:
    run, other = await ui.create(), await ui.create("other")
    async with ui.stream("/runs/default/demo/changes") as tab:
        await tab.until(lambda data: data["run"])
        await ui.note(other, "Elsewhere")
        await ui.become("failed stage", "other")
        await ui.note(run, "StageStarted")
        told = await tab.until(lambda data: data["run"]["events"])
        assert [one["reason"] for one in told["run"]["events"]] == ["StageStarted"]


async def test_all_tabs_share_the_watches(ui: Ui) -> None:
    tabs = [ui.stream("/changes") for _ in range(5)]
    for tab in tabs:
        async with tab:
            await tab.next()

    def watches() -> list[str]:
        return [path for method, path in ui.api.requests if method == "GET" and "watch=true" in path]

    async with asyncio.timeout(PATIENCE):
        while len(watches()) < 2:  # noqa: ASYNC110  that of Events may come after the first tab
            await asyncio.sleep(0.01)
    assert len(watches()) == 2
    assert sum("cgdruns" in path for path in watches()) == 1


async def test_a_namespace_may_be_all_that_is_shown(api: ApiServer, ui: Ui) -> None:
    await ui.create("here")
    await ui.create("there", "other")
    async with serving(ui.cluster, "other", 0) as address, aiohttp.ClientSession(address) as session:
        async with Stream(session, "/changes") as tab:
            _, told = await tab.next()
        assert [run["key"] for run in told["changed"]] == ["other/there"]


async def test_a_lost_api_server_is_told_and_so_is_its_return(ui: Ui) -> None:
    await ui.create()
    port = int(ui.api.url.rpartition(":")[2])
    async with ui.stream("/changes") as tab:
        await tab.next()
        await ui.api.stop()
        assert (await tab.until(lambda data: data["trouble"]))["trouble"] == LOST
        await ui.api.start(port)
        await tab.until(lambda data: not data["trouble"])
        await ui.become("failed stage")
        await tab.until(lambda data: any(run["state"] == "Failed" for run in data["changed"]))


async def test_a_run_that_went_while_nobody_watched_is_gone_too(ui: Ui) -> None:
    await ui.create("stays")
    await ui.create("goes")

    async def too_old(request: web.Request) -> web.Response | None:
        if "watch=true" not in request.path_qs or "cgdruns" not in request.path:
            return None
        ui.api.fault = None
        await ui.cluster.delete(RUN, "goes", "default")
        return web.json_response({"kind": "Status", "code": 410, "reason": "Expired"}, status=410)

    async with ui.stream("/changes") as tab:
        await tab.until(lambda data: "default/goes" in [run["key"] for run in data["changed"]])
        ui.api.fault = too_old
        ui.api.registry.store.end_watches()
        assert "default/goes" in (await tab.until(lambda data: data["gone"]))["gone"]
    async with ui.stream("/changes") as tab:
        _, told = await tab.next()
        assert [run["name"] for run in told["changed"]] == ["stays"]


async def test_a_server_that_refuses_events_is_quoted_and_the_run_is_shown(ui: Ui) -> None:
    await ui.create()

    def forbidden(request: web.Request) -> web.Response | None:
        if not request.path.endswith("/events"):
            return None
        body = {"kind": "Status", "code": 403, "reason": "Forbidden", "message": "events is forbidden"}
        return web.json_response(body, status=403)

    ui.api.fault = forbidden
    async with (
        serving(ui.cluster, None, 0) as address,
        aiohttp.ClientSession(address) as session,
        Stream(session, "/runs/default/demo/changes") as tab,
    ):
        told = await tab.until(lambda data: data["eventless"])
    assert "events is forbidden" in told["eventless"]
    assert (told["run"]["name"], told["trouble"]) == ("demo", "")


async def test_runs_that_change_at_once_are_told_in_few_messages(ui: Ui) -> None:
    names = [f"run-{number}" for number in range(8)]
    await asyncio.gather(*(ui.create(name) for name in names))
    async with ui.stream("/changes") as tab:
        await tab.next()
        await asyncio.gather(*(ui.become("failed stage", name) for name in names))
        failed, messages = set[str](), 0
        while len(failed) < len(names):
            failed |= {run["key"] for run in (await tab.next())[1]["changed"] if run["state"] == "Failed"}
            messages += 1
    assert messages < len(names)


async def test_the_end_of_the_current_stages_log_is_told(ui: Ui) -> None:
    """Control characters of a pod are made visible, as everywhere."""
    asked = list[str]()

    async def log(request: web.Request) -> web.StreamResponse:
        asked.append(request.path_qs)
        return web.Response(text="first\n\x1b[2Jsecond\n")

    run = await ui.create(case="half of the answers")
    async with kubelet(log) as port:
        await a_pod_with_a_log(ui.cluster, run, port)
        async with ui.session.get("/runs/default/demo/log") as answer:
            told = await answer.json()
    assert told == {"of": "demo-answer-1-0", "lines": ["first", "\\x1b[2Jsecond"], "trouble": ""}
    assert asked == [f"/containerLogs/default/demo-answer-1-0/stage?container=stage&tailLines={LINES}"]


async def test_a_log_that_cannot_be_read_says_why(ui: Ui) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        raise web.HTTPBadRequest(text="container is waiting to start")

    run = await ui.create(case="half of the answers")
    async with ui.session.get("/runs/default/demo/log") as answer:
        assert await answer.json() == {
            "of": "",
            "lines": [],
            "trouble": "No pod of answer has begun, or it is deleted.",
        }
    async with kubelet(refuse) as port:
        await a_pod_with_a_log(ui.cluster, run, port)
        async with ui.session.get("/runs/default/demo/log") as answer:
            assert "container is waiting to start" in (await answer.json())["trouble"]
    async with ui.session.get("/runs/default/nobody/log") as answer:
        assert answer.status == 404


@pytest.mark.parametrize("path", ["/changes", "/runs/default/demo/changes"])
async def test_a_tab_that_is_closed_ends_its_stream_without_a_word(
    api: ApiServer, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    states = [STATES[case] for case in ("just begun", "half of the answers")]
    for state in states:
        state["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    board = Board(states[:1])
    async with await Cluster.connect(manager="test") as cluster:
        runner = web.AppRunner(_application(board, cluster, None), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession(address) as session, session.get(path) as tab:
            assert (await tab.content.readline()).startswith(b"event: ")
        async with asyncio.timeout(PATIENCE):
            for state in itertools.cycle(states):
                if not board._readers:
                    break
                board.runs["default/demo"] = state
                board._notify("default/demo")
                await asyncio.sleep(0.05)
        await runner.cleanup()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("aiohttp")] == []


# --- whom it answers


async def test_a_name_that_is_not_this_machines_is_refused(ui: Ui) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::1", ""):
        for path in ("/", "/changes", "/nowhere"):
            async with ui.session.get(path, headers={"Host": host}) as answer:
                assert answer.status == 403, (host, path)


async def test_a_tunnel_to_this_machine_is_answered(ui: Ui) -> None:
    for host in ("localhost:9000", "127.0.0.1", "[::1]:1"):
        async with ui.session.get("/", headers={"Host": host}) as answer:
            assert answer.status == 200, host


async def test_a_page_of_another_site_is_refused(ui: Ui) -> None:
    for site in ("cross-site", "same-site"):
        async with ui.session.get("/changes", headers={"Sec-Fetch-Site": site}) as answer:
            assert answer.status == 403, site


async def test_nothing_but_get_is_answered(ui: Ui) -> None:
    for path in ("/", "/changes", "/runs/default/demo", "/runs/default/demo/log", "/runs/default/demo/report"):
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            async with ui.session.request(method, path) as answer:
                assert answer.status == 405, (method, path)


async def test_it_reads_and_never_writes(ui: Ui) -> None:
    await ui.create()
    ui.api.requests.clear()
    async with ui.stream("/changes") as tab, ui.stream("/runs/default/demo/changes") as own:
        await tab.next()
        await own.next()
    for path in ("/", "/runs/default/demo", "/runs/default/demo/log", "/runs/default/nobody"):
        await ui.session.get(path)
    assert {method for method, _ in ui.api.requests} <= {"GET"}


async def test_every_answer_has_a_strict_policy(ui: Ui) -> None:
    for path in ("/", "/runs/default/demo", "/changes", "/nowhere"):
        async with ui.session.get(path) as answer:
            policy = answer.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'")
            assert "frame-ancestors 'none'" in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cache-Control"] == "no-store"


async def test_a_run_that_is_not_there_has_a_page_that_says_so(ui: Ui) -> None:
    async with ui.session.get("/runs/default/nobody") as answer:
        assert answer.status == 404
        assert "nobody" in await answer.text()
    async with ui.session.get("/runs/default/nobody/report") as answer:
        assert (answer.status, await answer.text()) == (404, "there is no CGDRun nobody in namespace default\n")


async def test_a_name_in_the_address_is_text(ui: Ui) -> None:
    async with ui.session.get("/runs/default/%3Cscript%3Ealert(1)%3C%2Fscript%3E") as answer:
        assert "<script>alert(1)" not in await answer.text()


async def test_a_report_that_cannot_be_fetched_tells_why(ui: Ui) -> None:
    await ui.create()
    async with ui.session.get("/runs/default/demo/report") as answer:
        text = await answer.text()
        assert answer.status == 502
    assert text.startswith("cgd report demo --namespace default")
    assert "Traceback" not in text


# --- the command


async def test_it_needs_a_cluster_from_the_start(api: ApiServer) -> None:
    async with await Cluster.connect(manager="test") as cluster:
        with pytest.raises(ApiError, match="404"):  # the definition is not installed
            async with serving(cluster, None, 0):
                pass


async def cgd(*words: str) -> asyncio.subprocess.Process:
    env = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cgd_cli", *words,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env,
    )  # fmt: skip


async def test_the_command_serves_until_it_is_interrupted(ui: Ui) -> None:
    process = await cgd("ui", "-A", "--port", "0", "--no-browser")
    assert process.stdout
    said = (await process.stdout.readline()).decode()
    assert said.startswith("http://127.0.0.1:")
    async with aiohttp.ClientSession(said.split()[0]) as session, Stream(session, "/changes") as tab:
        await tab.next()
        process.send_signal(signal.SIGINT)
        _, told = await process.communicate()
    assert (process.returncode, told.decode()) == (0, "")


async def test_a_port_that_is_taken_is_told_with_a_way_out(ui: Ui) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await cgd("ui", "--port", str(port), "--no-browser")
        _, told = await process.communicate()
    assert process.returncode == 1
    assert told.decode().startswith(f"cgd: port {port} is in use: try --port {port + 1}")
