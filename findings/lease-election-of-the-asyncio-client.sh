#!/usr/bin/env bash
# The leader election of Kubernetes' official asyncio client, with the LeaseLock that it ships:
# 1. It cannot make the Lease. The lock asks for it with pretty=True, which the generated API refuses, as its own argument
#    is a string: run() ends with pydantic's ValidationError. It works only where the Lease is there already.
# 2. Its docstring says that the leader's coroutine is cancelled when the Lease is lost. It is, when the API server answers
#    an error until the deadline. When the server cannot be reached, the lock raises what aiohttp raises (it translates
#    ApiException alone): run() ends at the first failure, long before the deadline, without onstopped_leading, and the
#    leader's coroutine runs on, though nobody renews the Lease.
# Exits 0 while both are so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check kubernetes==37.0.1 aiohttp==3.14.5 pydantic==2.14.3 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import importlib.metadata
import time

import aiohttp
from aiohttp import web
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock
from pydantic import ValidationError

DEADLINE = 6
lease: dict = {}
says: list[str] = []


async def read(_: web.Request) -> web.Response:
    if not lease:
        return web.json_response({"kind": "Status", "code": 404, "reason": "NotFound"}, status=404)
    return web.json_response(lease)


async def write(request: web.Request) -> web.Response:
    lease.clear()
    lease.update(await request.json())
    return web.json_response(lease, status=201 if request.method == "POST" else 200)


async def work() -> None:
    try:
        while True:
            says.append("acts")
            await asyncio.sleep(0.1)
    except asyncio.CancelledError:
        says.append("is cancelled")
        raise


async def stopped() -> None:
    says.append("on_stopped_leading")


async def main() -> None:
    app = web.Application()
    base = "/apis/coordination.k8s.io/v1/namespaces/default/leases"
    app.router.add_get(base + "/lock", read)
    app.router.add_post(base, write)
    app.router.add_put(base + "/lock", write)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with asyncio.timeout(30), ApiClient(Configuration(host=host)) as client:
        lock = LeaseLock("lock", "default", "me", client)
        election = Config(lock, 10, DEADLINE, 1, work, stopped)
        try:
            await LeaderElection(election).run()
        except ValidationError as error:
            print("no Lease:", str(error).replace("\n", " ")[:160])
        assert not lease and not says, "the lock makes the Lease now"

        lease.update({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "lock"}, "spec": {}})
        running = asyncio.create_task(LeaderElection(election).run())
        while "acts" not in says:
            assert not running.done()
            await asyncio.sleep(0.05)
        await runner.cleanup()  # the API server goes away
        gone = time.monotonic()
        try:
            await running
        except aiohttp.ClientError as error:
            seconds = time.monotonic() - gone
            print(f"run() raised {type(error).__name__} after {seconds:.1f} s; the deadline is {DEADLINE} s")
            assert seconds < DEADLINE / 2
        else:
            raise SystemExit("run() ends without an error now")
        before = len(says)
        await asyncio.sleep(1)
        print("afterwards the leader's coroutine", says[-1], len(says) - before, "times in a second; ever said:", set(says))
        assert set(says) == {"acts"} and len(says) > before


print("kubernetes", importlib.metadata.version("kubernetes"))
asyncio.run(main())
PYTHON
