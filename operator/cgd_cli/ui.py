"""`cgd ui`: the runs in a browser, live. It shows and never writes.

It listens on loopback alone, answers GET alone, and only under a name of this machine, so that a page from elsewhere
cannot read it by rebinding its own name (DNS rebinding). Other users of the machine can read what it shows: statuses
and manifests of runs, never a Secret. Each tab keeps one stream of server-sent events: all that there is first, and
then what has changed.
"""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from cgd_cli.board import Board, Reader
from cgd_cli.view import command, detail, summary
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import RUN
from cgd_stages.report.page import page

HERE = Path(__file__).parent
NAMES = ("127.0.0.1", "localhost", "::1")
"""What a browser on this machine calls it, also through a tunnel to it."""
QUIET = 15.0
"""Seconds of silence after which a tab is told that the server is there."""
GATHER = 0.2
"""Seconds in which changes are gathered before a tab is told of them."""
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
BOARD, SCOPE = web.AppKey("board", Board), web.AppKey("scope", str)


@asynccontextmanager
async def serving(cluster: Cluster, namespace: str | None, port: int) -> AsyncIterator[str]:
    """Serve the runs of a namespace, or of all, until the end of the block; its value is the address.

    Raises ApiError when the runs cannot be listed, OSError when the port is taken.
    """
    board = Board((await cluster.list(RUN, namespace))[0])
    runner = web.AppRunner(_application(board, namespace), access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, NAMES[0], port).start()
        async with asyncio.TaskGroup() as group:  # a watch that broke by a fault of ours ends all of it
            following = group.create_task(board.follow(cluster, namespace))
            yield f"http://{NAMES[0]}:{runner.addresses[0][1]}/"
            following.cancel()
    finally:
        await runner.cleanup()


def _application(board: Board, namespace: str | None) -> web.Application:
    app = web.Application(middlewares=[_guarded])
    app[BOARD], app[SCOPE] = board, namespace or ""
    app.on_response_prepare.append(_add_headers)
    app.on_shutdown.append(_end_streams)
    app.router.add_get("/", _show_runs)
    app.router.add_get("/changes", _tell_runs)
    app.router.add_get("/runs/{namespace}/{name}", _show_run)
    app.router.add_get("/runs/{namespace}/{name}/changes", _tell_run)
    app.router.add_get("/runs/{namespace}/{name}/report", _open_report)
    return app


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what a page of another site may have sent."""
    try:
        host = urlsplit(f"//{request.host}").hostname
    except ValueError:
        host = None
    if host not in NAMES or request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise web.HTTPForbidden(text=f"cgd ui answers this machine alone, as http://{NAMES[0]} or localhost\n")
    return await handler(request)


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
    response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")


async def _end_streams(app: web.Application) -> None:
    app[BOARD].close()


# --- pages


async def _show_runs(request: web.Request) -> web.Response:
    scope = request.app[SCOPE]
    return _page(title="CGD runs", run=None, place=f"namespace {scope}" if scope else "all namespaces")


async def _show_run(request: web.Request) -> web.Response:
    name, namespace = request.match_info["name"], request.match_info["namespace"]
    known = _key(request) in request.app[BOARD].runs
    return _page(200 if known else 404, title=f"{name} \u00b7 CGD run", run=name, place=f"namespace {namespace}")


def _page(status: int = 200, **values: Any) -> web.Response:
    html, policy = page(HERE / "ui.html.j2", HERE / "ui.js", HERE / "ui.css", connect="'self'", **values)
    headers = {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"}
    return web.Response(status=status, text=html, content_type="text/html", headers=headers)


def _key(request: web.Request) -> str:
    return f"{request.match_info['namespace']}/{request.match_info['name']}"


async def _open_report(request: web.Request) -> web.Response:
    """The run's `report.html`, as `cgd report` fetches it: in a process of its own, because the keys of a run's store
    go into the environment, where the next run must not find them."""
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
        _, told = await process.communicate()
        if process.returncode:
            raise web.HTTPBadGateway(text=f"{command(*words[:4])}\n\n{told.decode(errors='replace')}")
        html = await asyncio.to_thread(file.read_text)
    # What a model has written must not reach this server: the page has an origin of its own, and its own policy.
    headers = {"Content-Security-Policy": "sandbox allow-scripts allow-modals; frame-ancestors 'none'"}
    return web.Response(text=html, content_type="text/html", headers=headers)


# --- streams


async def _tell_runs(request: web.Request) -> web.StreamResponse:
    """All runs, then those that change: {changed: [summary], gone: [key], trouble}."""
    board = request.app[BOARD]

    def news(changed: set[str]) -> dict[str, Any]:
        there = [summary(board.runs[one]) for one in changed if one in board.runs]
        return {"changed": there, "gone": [one for one in changed if one not in board.runs], "trouble": board.trouble}

    with board.reader() as reader:
        stream = await _stream(request)
        await _send(stream, "all", news(set(board.runs)))
        async for changed in _changes(board, stream, reader):
            await _send(stream, "some", news(changed))
    return stream


async def _tell_run(request: web.Request) -> web.StreamResponse:
    """A run, again after every change: {run: detail or null, trouble, eventless}."""
    board, wanted = request.app[BOARD], _key(request)

    def news() -> dict[str, Any]:
        run = board.runs.get(wanted)
        shown = detail(run, board.events(run)) if run else None
        return {"run": shown, "trouble": board.trouble, "eventless": board.eventless}

    with board.reader() as reader:
        stream = await _stream(request)
        await _send(stream, "run", told := news())
        async for _ in _changes(board, stream, reader):
            if (now := news()) != told:
                await _send(stream, "run", told := now)
    return stream


async def _stream(request: web.Request) -> web.StreamResponse:
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await stream.prepare(request)
    return stream


async def _send(stream: web.StreamResponse, event: str, data: dict[str, Any]) -> None:
    await stream.write(f"event: {event}\ndata: {json.dumps(data)}\n\n".encode())


async def _changes(board: Board, stream: web.StreamResponse, reader: Reader) -> AsyncIterator[set[str]]:
    """What has changed, gathered, until the board is closed."""
    while not board.closed:
        try:
            await asyncio.wait_for(reader.news.wait(), QUIET)
        except TimeoutError:
            await stream.write(b": here\n\n")
            continue
        await asyncio.sleep(GATHER)
        yield reader.take()
