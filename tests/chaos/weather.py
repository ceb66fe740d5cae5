"""The operator's process in bad weather: the second half of `make chaos-operator`, a little of it in tests/cluster.

    PYTHONPATH=tests python -m chaos.weather

A real `python -m cgd_operator` goes through a run; whatever ends its process, it is started anew at once. In the middle
of the run a child ends, and at that moment something breaks: the process, its watches, or the API server's answers.
The run must end as an undisturbed one does, with no child created twice and no stage that goes backwards. What was done
is read from the server's history, not from what the operator says. The table tells the seconds from the child's end to
the next child, the fault's own time included.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web
from rich.console import Console
from rich.progress import track
from rich.table import Table
from support import crash
from support.builders import CHILDREN, ENDS, manifest

from cgd_local import pytorchjobs, trainjobs
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_local.statuses import ApiError as Refusal
from cgd_operator.api.crd import crd
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import JOB, RUN, Kind
from cgd_operator.planning.manifests import KINDS, STAGE_LABEL

Json = dict[str, Any]
Answer = web.StreamResponse | None
Choose = Callable[[web.Request], Awaitable[Answer]]

AWAY_SECONDS = 10.0
"""Longer than the operator waits before it looks again, shorter than Kopf's patience."""
QUIET_SECONDS = 1.0
"""The operator has nothing left to do when the weather breaks: no look of an earlier event may help it."""
END_SECONDS = 240.0
PLACE = "answer"
"""The child at whose end the weather breaks; others are before it and after it."""


async def fair(_: web.Request) -> Answer:
    return None


def refused(request: web.Request, status: int, headers: dict[str, str] | None = None) -> web.Response:
    body = Refusal(status, "as the test wants it").status()
    return web.json_response(body, status=status, headers=headers)


def watches(request: web.Request) -> bool:
    return request.query.get("watch") == "true"


async def told(request: web.Request, code: int) -> web.StreamResponse:
    """A watch that says one word, which is an error."""
    answer = web.StreamResponse(headers={"Content-Type": "application/json"})
    await answer.prepare(request)
    event = {"type": "ERROR", "object": Refusal(code, "as the test wants it").status()}
    await answer.write(json.dumps(event).encode() + b"\n")
    await answer.write_eof()
    return answer


def reset(request: web.Request) -> None:
    if request.transport:
        request.transport.abort()


@dataclass
class Weather:
    """Two doors of one API server: the operator comes by the one that can break, the test by the other."""

    back: ApiServer
    folder: Path
    choose: Choose = fair
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    calls: int = 0
    versions: list[Json] = field(default_factory=list)
    """What the server held before each end of a child: bodies by path."""
    _watching: list[web.Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.front = ApiServer(bookmark_seconds=3600, fault=self._pass)
        self.front.registry = self.back.registry

    async def _pass(self, request: web.Request) -> Answer:
        self.calls += 1
        if answer := await self.choose(request):
            return answer
        if watches(request):
            self._watching.append(request)
        return None

    def drop_watches(self) -> None:
        """Reset the connections of all watches that are open."""
        for request in self._watching:
            reset(request)
        self._watching.clear()

    def silence_watches(self) -> None:
        """Watches that are open stay so, and never hear of anything again."""
        for resource in self.back.registry.resources.values():
            self.back.registry.shelf(resource).feeds.clear()

    def kill(self) -> None:
        """Without a word, as a node's end does it."""
        if self.process and self.process.returncode is None:
            self.process.kill()

    def remember(self) -> None:
        """Keep what the server holds now, for reads that are told the past."""
        version = {"resourceVersion": str(self.back.registry.store.version)}
        jobs = {"kind": "JobList", "apiVersion": "batch/v1", "metadata": version, "items": held(self.back, JOB)}
        (run,) = held(self.back, RUN)
        self.versions.append({JOB.path("default"): jobs, RUN.path("default", "demo"): run})

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[None]:
        """The operator, and a kubelet that starts it anew."""
        await self.front.start()
        (path := self.folder / "kubeconfig").write_text(self.front.kubeconfig())
        environment = os.environ | {"KUBECONFIG": str(path), "CGD_PROGRESS_BIND": "127.0.0.1:0"}
        keeper = asyncio.create_task(self._keep(environment))
        try:
            yield
        finally:
            keeper.cancel()
            await asyncio.wait([keeper])
            self.kill()
            if self.process:
                await self.process.wait()
            await self.front.stop()

    async def _keep(self, environment: dict[str, str]) -> None:
        with (self.folder / "operator.log").open("ab") as log:
            while True:
                self.starts += 1
                command = (sys.executable, "-m", "cgd_operator")
                self.process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=log, stderr=log)
                await self.process.wait()


Fault = Callable[[Weather], Awaitable[None]]


async def nothing(_: Weather) -> None:
    pass


async def killed(weather: Weather) -> None:
    weather.kill()


async def killed_often(weather: Weather) -> None:
    """At ten random calls from now on."""
    dice = random.Random(0)
    at = [weather.calls + 10 * nth + dice.randrange(10) for nth in range(1, 11)]

    async def choose(_: web.Request) -> Answer:
        if at and weather.calls >= at[0]:
            at.pop(0)
            weather.kill()
        return None

    weather.choose = choose


async def watches_reset(weather: Weather) -> None:
    weather.drop_watches()


async def watches_frozen(weather: Weather) -> None:
    weather.silence_watches()


async def _answer_watches(weather: Weather, answer: Callable[[web.Request], Awaitable[Answer]]) -> None:
    """Every watch is broken, and gets the answer once when it comes back."""
    had: set[str] = set()

    async def choose(request: web.Request) -> Answer:
        if not watches(request) or request.path in had:
            return None
        had.add(request.path)
        return await answer(request)

    weather.choose = choose
    weather.drop_watches()


async def gone_event(weather: Weather) -> None:
    await _answer_watches(weather, lambda request: told(request, 410))


async def gone_answer(weather: Weather) -> None:
    async def answer(request: web.Request) -> Answer:
        return refused(request, 410)

    await _answer_watches(weather, answer)


async def watch_error(weather: Weather) -> None:
    await _answer_watches(weather, lambda request: told(request, 500))


async def watches_accepted_and_silent(weather: Weather) -> None:
    async def answer(request: web.Request) -> Answer:
        await web.StreamResponse().prepare(request)
        await asyncio.sleep(3600)
        return None

    await _answer_watches(weather, answer)


def stale(path: str) -> Fault:
    async def begin(weather: Weather) -> None:
        """The next read is told what was before the last child had ended."""
        past = [weather.versions[-2][path]]

        async def choose(request: web.Request) -> Answer:
            if past and request.method == "GET" and request.path == path and not watches(request):
                return web.json_response(past.pop())
            return None

        weather.choose = choose

    return begin


def _for_a_while(weather: Weather, choose: Choose) -> None:
    async def until_over(request: web.Request) -> Answer:
        return await choose(request) if time.monotonic() < over else None

    over = time.monotonic() + AWAY_SECONDS
    weather.choose = until_over


def refusing(status: int, headers: dict[str, str] | None = None) -> Fault:
    async def begin(weather: Weather) -> None:
        """All requests, for `AWAY_SECONDS`."""

        async def choose(request: web.Request) -> Answer:
            return refused(request, status, headers)

        _for_a_while(weather, choose)
        weather.drop_watches()

    return begin


async def away(weather: Weather) -> None:
    """Nobody listens, for `AWAY_SECONDS`."""
    port = int(weather.front.url.rpartition(":")[2])
    weather.drop_watches()
    await weather.front.stop()
    await asyncio.sleep(AWAY_SECONDS)
    await weather.front.start(port)


async def silent_calls(weather: Weather) -> None:
    """The next three calls are taken and never answered."""
    left = [1, 2, 3]

    async def choose(request: web.Request) -> Answer:
        if left and not watches(request):
            left.pop()
            await asyncio.sleep(3600)
        return None

    weather.choose = choose


async def flaky(weather: Weather) -> None:
    """From now on every fifth call or so is reset, half of them after the server has acted."""
    dice = random.Random(0)

    async def choose(request: web.Request) -> Answer:
        if watches(request) or dice.random() > 0.2:
            return None
        if dice.random() < 0.5:
            await weather.front._route(request)  # the answer is lost on its way
        reset(request)
        return web.Response()

    weather.choose = choose


FAULTS: dict[str, Fault] = {
    "nothing": nothing,
    "killed": killed,
    "killed at ten calls": killed_often,
    "watches reset": watches_reset,
    "watches frozen": watches_frozen,
    "watches accepted and silent": watches_accepted_and_silent,
    "410 in the watch": gone_event,
    "410 for the watch": gone_answer,
    "500 in the watch": watch_error,
    "stale list of Jobs": stale(JOB.path("default")),
    "stale run": stale(RUN.path("default", "demo")),
    "429, Retry-After": refusing(429, {"Retry-After": "3"}),
    "429": refusing(429),
    "500": refusing(500),
    "API server away": away,
    "calls without an answer": silent_calls,
    "a fifth of the calls reset": flaky,
}


@dataclass
class Outcome:
    """Of one run. `recovery`: seconds from a child's end to the next child, by the child that ended."""

    status: Json
    faults: list[str]
    recovery: dict[str, float]
    starts: int
    calls: int


async def play(back: ApiServer, client: Cluster, folder: Path, faults: dict[str, Fault]) -> Outcome:
    """A run from its creation to its end; `faults` begin at the ends of the children that they are named for.

    Raises:
        TimeoutError: the run does not end, or a child does not come.
    """
    weather, since = Weather(back, folder), back.registry.store.version
    recovery: dict[str, float] = {}
    body = manifest()
    del body["metadata"]["uid"], body["metadata"]["generation"]
    async with weather.operator(), asyncio.timeout(END_SECONDS):
        await client.create(RUN, body)
        try:
            before, ended = "", 0.0
            for stage in CHILDREN:
                child = await _until(partial(_child, back, stage))
                recovery[before] = time.monotonic() - ended
                await _until(partial(_told, back, child))
                weather.remember()
                await asyncio.sleep(QUIET_SECONDS if stage in faults else 0)
                breaking = asyncio.create_task(faults.get(stage, nothing)(weather))
                await asyncio.sleep(0)
                kind, status = KINDS[child["kind"]], ENDS[child["kind"]]("Complete")
                name = child["metadata"]["name"]
                await client.patch(kind, name, "default", {"status": status}, subresource="status")
                before, ended = stage, time.monotonic()
                await breaking
            run = await _until(partial(_ended, back))
        finally:
            history = _history(back, since)
            await _remove_all(back, client)
    del recovery[""]
    text = (folder / "operator.log").read_text()
    bugs = ["the log tells of a bug"] * ("this is a bug" in text)
    return Outcome(run["status"], history.faults() + bugs, recovery, weather.starts, weather.calls)


async def _until(ask: Callable[[], Json | None]) -> Json:
    while (answer := ask()) is None:  # noqa: ASYNC110 (many things are waited for, and none of them tells)
        await asyncio.sleep(0.01)
    return answer


def held(back: ApiServer, kind: Kind) -> list[Json]:
    """What the server holds, without asking it: to ask all the time would be weather, too."""
    (resource,) = [one for one in back.registry.resources.values() if one.kind == kind.kind]
    return back.registry.shelf(resource).within("default")


def _child(back: ApiServer, stage: str) -> Json | None:
    children = [child for kind in KINDS.values() for child in held(back, kind)]
    return next((one for one in children if one["metadata"]["labels"][STAGE_LABEL] == stage), None)


def _told(back: ApiServer, child: Json) -> Json | None:
    """The run, when its status tells of a child."""
    (run,) = held(back, RUN)
    told = [stage.get("child") for stage in run.get("status", {}).get("stages", [])]
    return run if child["metadata"]["name"] in told else None


def _ended(back: ApiServer) -> Json | None:
    (run,) = held(back, RUN)
    return run if run["status"]["state"] in ("Succeeded", "Failed", "Refused") else None


async def _remove_all(back: ApiServer, client: Cluster) -> None:
    for kind in (RUN, *KINDS.values()):
        for one in held(back, kind):
            await client.delete(kind, one["metadata"]["name"], "default")


def _history(back: ApiServer, since: int) -> crash.History:
    """Every child and every status since a version, from what the server has written down."""
    history = crash.History()
    for resource in back.registry.resources.values():
        for change in back.registry.shelf(resource).history:
            if change.version <= since or change.deleted:
                continue
            if resource.kind in KINDS and change.old is None:
                history.created.append(change.new["metadata"]["labels"][STAGE_LABEL])
            if resource.kind == RUN.kind and "stages" in change.new.get("status", {}):
                history.statuses.append(change.new["status"])
    return history


@asynccontextmanager
async def server() -> AsyncIterator[tuple[ApiServer, Cluster, Path]]:
    """The API server with the project's definitions, a client of its good door, and a folder."""
    back = ApiServer()
    await back.start()
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "test").write_text(back.kubeconfig())
        async with await Cluster.connect(str(path), manager="test") as client:
            for definition in (crd(), pytorchjobs.crd(), *trainjobs.crds()):
                await install(client, definition)
            yield back, client, Path(folder)
    await back.stop()


async def main(chosen: list[str]) -> int:
    console, table = Console(highlight=False), Table("fault", "recovered in s", "starts", "calls", "ended otherwise")
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # it mourns the connections that are cut
    wanted: Json = {}
    wrong: list[str] = []
    for name in track(["nothing", *chosen], description="faults", transient=True):
        async with server() as (back, client, folder):
            try:
                outcome = await play(back, client, folder, {PLACE: FAULTS[name]})
            except TimeoutError:
                found = [f"no end after {END_SECONDS:.0f} s"]
                row = ("", "", "")
            else:
                wanted = wanted or crash.outline(outcome.status)
                other = [] if crash.outline(outcome.status) == wanted else [f"{crash.outline(outcome.status)}"]
                found = outcome.faults + other
                row = (f"{outcome.recovery[PLACE]:.1f}", str(outcome.starts), str(outcome.calls))
            if found:
                console.print((folder / "operator.log").read_text()[-3000:], markup=False)
        table.add_row(name, *row, str(len(found)))
        wrong += [f"{name}: {one}" for one in found]
    console.print(table)
    for one in wrong[:20]:
        console.print(one, markup=False)
    return len(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fault", action="append", choices=FAULTS, help="this one only (repeatable)")
    raise SystemExit(min(1, asyncio.run(main(parser.parse_args().fault or list(FAULTS)[1:]))))
