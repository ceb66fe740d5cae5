"""`cgd ui`: the runs in a browser, live. It never writes.

It listens on loopback only, answers only GET, and only under a name of this machine, so that a page from elsewhere
cannot read it by rebinding its own name (DNS rebinding). Other users of the machine can read what it shows: statuses,
manifests and logs of runs, never a Secret. Each tab keeps one stream of server-sent events: first all runs, then those
that change.
"""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from cgd_cli.board import Board, Reader
from cgd_cli.remote import Remote
from cgd_cli.view import command, detail, summary
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import RUN, ApiError
from cgd_stages.errors import UserError
from cgd_stages.report.page import page
from cgd_stages.text.printable import printable

HERE = Path(__file__).parent
NAMES = ("127.0.0.1", "localhost", "::1")
"""The names by which a browser reaches this machine, also through a tunnel to it."""
QUIET = 15.0
"""Seconds of silence after which a stream sends a sign of life."""
GATHER = 0.2
"""Seconds in which a stream gathers changes before it sends them."""
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
STREAM = {"Content-Type": "text/event-stream"}
BOARD, SCOPE = web.AppKey("board", Board), web.AppKey("scope", str)
CLUSTER = web.AppKey("cluster", Cluster)
LINES = 60
"""Of a log, the last ones that a run's page shows."""


@asynccontextmanager
async def serving(cluster: Cluster, namespace: str | None, port: int) -> AsyncIterator[str]:
    """Serve the runs of a namespace, or of all, until the end of the block; yields the address.

    Raises ApiError when the runs cannot be listed, OSError when the port is taken.
    """
    board = Board((await cluster.list(RUN, namespace))[0])
    runner = web.AppRunner(_application(board, cluster, namespace), access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, NAMES[0], port).start()
        async with asyncio.TaskGroup() as group:  # a watch that fails by a bug of ours ends the server
            following = group.create_task(board.follow(cluster, namespace))
            yield f"http://{NAMES[0]}:{runner.addresses[0][1]}/"
            following.cancel()
    finally:
        await runner.cleanup()


def _application(board: Board, cluster: Cluster, namespace: str | None) -> web.Application:
    async def add_headers(_: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)
        response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")

    async def end_streams(_: web.Application) -> None:
        board.close()

    app = web.Application(middlewares=[_guarded])
    app[BOARD], app[CLUSTER], app[SCOPE] = board, cluster, namespace or ""
    app.on_response_prepare.append(add_headers)
    app.on_shutdown.append(end_streams)
    app.router.add_get("/", _show_runs)
    app.router.add_get("/changes", _stream_runs)
    app.router.add_get("/runs/{namespace}/{name}", _show_run)
    app.router.add_get("/runs/{namespace}/{name}/changes", _stream_run)
    app.router.add_get("/runs/{namespace}/{name}/log", _show_log)
    app.router.add_get("/runs/{namespace}/{name}/report", _open_report)
    return app


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse requests that a page of another site may have sent."""
    try:
        host = urlsplit(f"//{request.host}").hostname
    except ValueError:
        host = None
    if host not in NAMES or request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise web.HTTPForbidden(text=f"cgd ui answers this machine alone, as http://{NAMES[0]} or localhost\n")
    return await handler(request)


# --- pages


async def _show_runs(request: web.Request) -> web.Response:
    scope = request.app[SCOPE]
    return _page(title="CGD runs", run=None, place=f"namespace {scope}" if scope else "all namespaces")


async def _show_run(request: web.Request) -> web.Response:
    name, namespace = request.match_info["name"], request.match_info["namespace"]
    exists = _key(request) in request.app[BOARD].runs
    return _page(200 if exists else 404, title=f"{name} \u00b7 CGD run", run=name, place=f"namespace {namespace}")


def _page(status: int = 200, **values: Any) -> web.Response:
    html, policy = page(HERE / "ui.html.j2", HERE / "ui.js", HERE / "ui.css", connect="'self'", **values)
    headers = {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"}
    return web.Response(status=status, text=html, content_type="text/html", headers=headers)


def _key(request: web.Request) -> str:
    return f"{request.match_info['namespace']}/{request.match_info['name']}"


async def _open_report(request: web.Request) -> web.Response:
    """The run's `report.html`. A process of its own runs `cgd report`, because that puts the keys of the run's store
    into the environment, where the next run must not find them."""
    name, namespace = request.match_info["name"], request.match_info["namespace"]
    if _key(request) not in request.app[BOARD].runs:
        raise web.HTTPNotFound(text=f"there is no CGDRun {name} in namespace {namespace}\n")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "report.html"
        words = ("report", name, "--namespace", namespace, "--output", str(file))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cgd_cli", *words,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, env=os.environ,
        )  # fmt: skip
        _, errors = await process.communicate()
        if process.returncode:
            raise web.HTTPBadGateway(text=f"{command(*words[:4])}\n\n{errors.decode(errors='replace')}")
        html = await asyncio.to_thread(file.read_text)
    # A model has written texts on this page, so it must not reach this server: it gets its own origin and policy.
    headers = {"Content-Security-Policy": "sandbox allow-scripts allow-modals; frame-ancestors 'none'"}
    return web.Response(text=html, content_type="text/html", headers=headers)


async def _show_log(request: web.Request) -> web.Response:
    """The end of the log of the run's current stage: {of: pod, lines: [text], trouble}."""
    board, namespace = request.app[BOARD], request.match_info["namespace"]
    if (run := board.runs.get(_key(request))) is None:
        raise web.HTTPNotFound(text=f"there is no CGDRun {request.match_info['name']} in namespace {namespace}\n")
    remote = Remote(request.app[CLUSTER], namespace)
    try:
        pod, text = await remote.last_lines(run, LINES)
    except (ApiError, UserError) as error:
        return web.json_response({"of": "", "lines": [], "trouble": printable(str(error))})
    lines = [printable(line) for line in text.splitlines()]
    return web.json_response({"of": pod, "lines": lines, "trouble": ""})


# --- streams


async def _stream_runs(request: web.Request) -> web.StreamResponse:
    """Send all runs, then those that change: {changed: [summary], gone: [key], trouble}."""
    board = request.app[BOARD]

    def news(keys: set[str]) -> dict[str, Any]:
        changed = [summary(board.runs[key]) for key in keys if key in board.runs]
        return {"changed": changed, "gone": [key for key in keys if key not in board.runs], "trouble": board.trouble}

    stream = web.StreamResponse(headers=STREAM)
    with board.reader() as reader, _until_closed():
        await stream.prepare(request)
        await _send(stream, "all", news(set(board.runs)))
        async for keys in _changes(board, stream, reader):
            await _send(stream, "some", news(keys))
    return stream


async def _stream_run(request: web.Request) -> web.StreamResponse:
    """Send a run now and after every change: {run: detail or null, trouble, eventless}."""
    board, key = request.app[BOARD], _key(request)

    def news() -> dict[str, Any]:
        run = board.runs.get(key)
        page = detail(run, board.events(run)) if run else None
        return {"run": page, "trouble": board.trouble, "eventless": board.eventless}

    stream = web.StreamResponse(headers=STREAM)
    with board.reader() as reader, _until_closed():
        await stream.prepare(request)
        await _send(stream, "run", sent := news())
        async for _ in _changes(board, stream, reader):
            if (current := news()) != sent:
                await _send(stream, "run", sent := current)
    return stream


def _until_closed() -> suppress:
    """Ends a stream whose tab is closed, which its next message finds out: that is nobody's fault."""
    return suppress(ConnectionResetError)


async def _send(stream: web.StreamResponse, event: str, data: dict[str, Any]) -> None:
    await stream.write(f"event: {event}\ndata: {json.dumps(data)}\n\n".encode())


async def _changes(board: Board, stream: web.StreamResponse, reader: Reader) -> AsyncIterator[set[str]]:
    """The keys of changed runs, gathered, until the board is closed."""
    while not board.closed:
        try:
            await asyncio.wait_for(reader.news.wait(), QUIET)
        except TimeoutError:
            await stream.write(b": here\n\n")
            continue
        await asyncio.sleep(GATHER)
        yield reader.take()
