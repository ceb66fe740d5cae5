"""The operator as a process: as process 1 of its container it hears SIGTERM whatever it does, and two of them share the
work: both are ready, one leads, and progress reaches it through either."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from support.patience import PATIENCE
from support.ports import free_port

from cgd_operator.http.progress import token
from cgd_operator.kube.kinds import LEASE

embedded_only = pytest.mark.parametrize("world", ["embedded"], indirect=True)
NAME, KEY = "cgd-operator", "key of the test, of 32 bytes and more"
HEARS = 1 << (signal.SIGTERM - 1)
PROGRAM = (sys.executable, "-m", "cgd_operator")


@pytest.fixture(scope="session")
def unshare() -> tuple[str, ...]:
    """Makes a process the first of a pid namespace of its own, as a container's is."""
    command = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    allowed = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    if not allowed:
        message = "unshare --pid --fork is not permitted here: run the tests as root"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return command


def environment(world: Any) -> dict[str, str]:
    return {
        **os.environ,
        "KUBECONFIG": str(world.kubeconfig),
        "CGD_LEASE": f"default/{NAME}",
        "CGD_PROGRESS_BIND": f"127.0.0.1:{free_port()}",
        "CGD_PROGRESS_KEY": KEY,
        "CGD_HEALTH_BIND": f"127.0.0.1:{free_port()}",
    }


async def holder(world: Any) -> str | None:
    found = await world.client.get(LEASE, NAME, "default")
    return found["spec"].get("holderIdentity") if found else None


async def of_another(world: Any) -> None:
    """The Lease is held by an operator that lives."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
    spec = {"holderIdentity": "another", "leaseDurationSeconds": 15, "acquireTime": now, "renewTime": now}
    await world.client.create(LEASE, {"metadata": {"name": NAME, "namespace": "default"}, "spec": spec})


def first_process(unshare: int) -> int:
    """The pid, as seen from here, of what `unshare` has started; 0 before."""
    children = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
    return int(children[0]) if children else 0


def hears(pid: int) -> bool:
    """Whether a process has a handler of SIGTERM."""
    caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) & HEARS)


@embedded_only
@pytest.mark.parametrize("waits", [False, True], ids=["alone", "waits"])
@pytest.mark.parametrize("seconds", [0, 0.3, 0.7, 1.2, 2, 3])
async def test_sigterm_ends_process_1_whatever_it_does_and_leaves_no_lease(
    world: Any, unshare: tuple[str, ...], seconds: float, waits: bool
) -> None:
    if waits:
        await of_another(world)
    process = await asyncio.create_subprocess_exec(*unshare, *PROGRAM, env=environment(world), stderr=subprocess.PIPE)

    async def heard() -> int:
        pid = first_process(process.pid)
        return pid if pid and hears(pid) else 0

    pid = await world.until(heard)
    await asyncio.sleep(seconds)
    os.kill(pid, signal.SIGTERM)
    _, told = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 0, told.decode()
    assert b"Traceback" not in told
    assert await holder(world) == ("another" if waits else None)


@embedded_only
async def test_one_that_is_told_to_go_before_it_hears_that_it_leads_gives_the_lease_back(world: Any) -> None:
    written = asyncio.Event()

    async def late(request: web.Request) -> web.StreamResponse | None:
        if request.method != "POST" or not request.path.endswith("/leases"):
            return None
        answer: web.StreamResponse = await world.embedded._route(request)
        written.set()
        await asyncio.sleep(0.5)
        return answer

    world.embedded.fault = late
    process = await asyncio.create_subprocess_exec(*PROGRAM, env=environment(world), stderr=subprocess.PIPE)
    await asyncio.wait_for(written.wait(), PATIENCE)
    process.terminate()
    _, told = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 0, told.decode()
    assert b" leads" not in told
    assert (await world.client.get(LEASE, NAME, "default"))["spec"].get("holderIdentity") is None


def test_sigterm_is_heard_before_anything_is_imported() -> None:
    program = (
        "import signal, sys, types\n"
        "process = types.ModuleType('cgd_operator.process')\n"
        "process.main = lambda: print(callable(signal.getsignal(signal.SIGTERM)), 'aiohttp' in sys.modules)\n"
        "sys.modules['cgd_operator.process'] = process\n"
        "from cgd_operator.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"]


class Operator:
    """A process, and what it says of itself."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.progress, self.health = (environment[f"CGD_{name}_BIND"] for name in ("PROGRESS", "HEALTH"))
        self._environment = environment

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(*PROGRAM, env=self._environment)

    async def says(self, path: str) -> tuple[int, str]:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"http://{self.health}{path}") as answer:
                return answer.status, await answer.text()
        except aiohttp.ClientConnectionError:
            return 0, ""

    def is_(self, text: str) -> Callable[[], Awaitable[bool]]:
        async def true() -> bool:
            return await self.says("/readyz") == (200, text)

        return true

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()


@asynccontextmanager
async def two_operators(world: Any) -> AsyncIterator[tuple[Operator, Operator]]:
    """The one that leads, and the one that waits."""
    first, second = Operator(environment(world)), Operator(environment(world))
    await first.start()
    try:
        await world.until(first.is_("leads"))
        await second.start()
        try:
            await world.until(second.is_("waits for the Lease"))
            yield first, second
        finally:
            await second.end()
    finally:
        await first.end()


async def has_prepare(world: Any) -> bool:
    return "prepare" in await world.children()


async def test_progress_reaches_the_status_through_the_one_that_waits(world: Any) -> None:
    async def shown() -> bool:
        stages = (await world.get())["status"].get("stages", [{}])
        return bool(stages[0].get("rows", {}).get("done") == 20)

    async with two_operators(world) as (_, waits):
        assert await waits.says("/leaderz") == (200, "an operator leads")
        uid = (await world.apply())["metadata"]["uid"]
        await world.until(lambda: has_prepare(world))
        url = f"http://{waits.progress}/progress/default/demo/{uid}/prepare"
        bearer = {"Authorization": f"Bearer {token(KEY.encode(), 'default', 'demo', uid, 'prepare')}"}
        body = {"trainerStatus": {}, "rows": {"total": 50, "done": 20}}
        async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=bearer) as answer:
            assert answer.status == 200
        await world.until(shown)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
async def test_the_one_that_waits_takes_over(world: Any, number: signal.Signals) -> None:
    """At once from one that stops; from one that dies, when its Lease has run out."""
    async with two_operators(world) as (leads, waits):
        leads.process.send_signal(number)
        await world.until(waits.is_("leads"))
        await world.apply()
        await world.until(lambda: has_prepare(world))
