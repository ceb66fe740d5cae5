"""When runs are looked at: at once, soon, or by the sweep; and how little a cluster in which nothing happens costs."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from support.builders import CHILDREN, ENDS, RELEASE, labels, manifest, pod
from support.patience import PATIENCE

from cgd_operator.controller.children import ChildReader
from cgd_operator.controller.queue import Loop
from cgd_operator.controller.reconciler import Reading, Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.http.progress import ProgressServer, token
from cgd_operator.kube.client import PAGE
from cgd_operator.kube.kinds import JOB, POD, RUN, ApiError
from cgd_operator.process import operate
from cgd_stages.contract import Progress, Rows, TrainerStatus

embedded_only = pytest.mark.parametrize("world", ["embedded"], indirect=True)
"""For what counts the server's requests."""


class Looked(Reconciler):
    """Writes down which runs it was asked to look at."""

    seen: list[str]
    readings: list[Reading | None]
    answer: float | None = None

    async def reconcile(self, namespace: str, name: str, reading: Reading | None = None) -> float | None:
        self.readings.append(reading)
        self.seen.append(name)
        return self.answer


@pytest.fixture
def loop(world: Any) -> Loop:
    reconciler = Looked(world.client, RELEASE, Board(), b"key")
    reconciler.seen, reconciler.readings = [], []
    return Loop(reconciler)


async def settle(loop: Loop) -> list[str]:
    """What was looked at until nothing is left to do at once."""
    while loop._tasks or loop._first or loop._waiting:  # noqa: ASYNC110  the loop keeps no event for a test
        await asyncio.sleep(0.01)
    seen: list[str] = loop.reconciler.seen  # type: ignore[attr-defined]
    told, seen[:] = list(seen), []
    return told


def requests(world: Any, since: int) -> list[str]:
    return [f"{method} {path}" for method, path in list(world.embedded.requests)[since:]]


async def quiet(world: Any, seconds: float) -> None:
    """Wait for a time in which nothing is asked for but watches."""

    async def nothing() -> bool:
        since = len(world.embedded.requests)
        await asyncio.sleep(seconds)
        return not [one for one in requests(world, since) if "watch=true" not in one]

    await world.until(nothing)


@pytest.fixture
def rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sweep but the first comes while a test counts requests, however long that takes."""
    monkeypatch.setattr("cgd_operator.controller.queue.SWEEP_SECONDS", 3600)


async def test_pokes_that_come_together_are_one_look_and_one_that_comes_during_it_another(loop: Loop) -> None:
    for _ in range(5):
        loop.poke("default", "a")
    assert await settle(loop) == ["a"]


async def test_a_run_whose_child_has_ended_is_looked_at_before_those_that_wait(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cgd_operator.controller.queue.AT_ONCE", 1)
    for name in "abcd":
        loop.poke("default", name)
    loop.poke("default", "e", first=True)
    loop.poke("default", "c", first=True)
    loop.poke("default", "e")
    assert await settle(loop) == ["a", "e", "c", "b", "d"]


async def test_a_run_is_looked_at_once_at_a_time_and_others_do_not_wait_for_it(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cgd_operator.controller.queue.AT_ONCE", 2)
    held = asyncio.Event()
    real = loop.reconciler.reconcile

    async def slow(namespace: str, name: str, reading: Reading | None) -> float | None:
        await real(namespace, name, reading)
        if name == "a":
            await held.wait()
        return None

    monkeypatch.setattr(loop.reconciler, "reconcile", slow)
    for name in "abca":
        loop.poke("default", name)
    await asyncio.sleep(0.05)
    seen: list[str] = loop.reconciler.seen  # type: ignore[attr-defined]
    assert sorted(seen) == ["a", "b", "c"]
    loop.poke("default", "a", first=True)
    held.set()
    assert sorted(await settle(loop)) == ["a", "a", "b", "c"]


async def test_a_later_look_is_made_once_and_by_the_earliest_time(loop: Loop) -> None:
    loop.later("default", "a", 60)
    loop.later("default", "a", 0.05)
    loop.later("default", "a", 30)
    await asyncio.sleep(0.1)
    assert await settle(loop) == ["a"]
    await asyncio.sleep(0.1)
    assert await settle(loop) == []


async def test_an_earlier_look_serves_those_that_were_to_come(loop: Loop) -> None:
    loop.later("default", "a", 0.05)
    loop.poke("default", "a")
    await asyncio.sleep(0.2)
    assert await settle(loop) == ["a"]


async def test_what_is_told_to_a_loop_that_was_stopped_makes_no_look(loop: Loop) -> None:
    await loop.stop()
    loop.later("default", "a", 0.01)
    loop.poke("default", "b")
    await asyncio.sleep(0.2)
    assert loop.reconciler.seen == []  # type: ignore[attr-defined]


async def test_a_look_may_ask_for_the_next(loop: Loop) -> None:
    loop.reconciler.answer = 0.01  # type: ignore[attr-defined]
    loop.poke("default", "a")
    await asyncio.sleep(0.4)
    loop.reconciler.answer = None  # type: ignore[attr-defined]
    assert len(await settle(loop)) >= 2
    await asyncio.sleep(0.2)
    await settle(loop)
    await asyncio.sleep(0.1)
    assert await settle(loop) == []


async def create_runs(world: Any, count: int, since: int = 0) -> None:
    for number in range(since, count):
        body = manifest(name=f"run-{number}")
        del body["metadata"]["uid"], body["metadata"]["generation"]
        await world.client.create(RUN, body)


@embedded_only
async def test_a_sweep_asks_for_the_children_of_many_runs_at_once(world: Any, loop: Loop) -> None:
    await create_runs(world, PAGE + 5)
    since = len(world.embedded.requests)
    await loop._sweep()
    calls = requests(world, since)
    assert len(calls) == 2 * 5  # runs, Jobs, pods, PyTorchJobs and TrainJobs: of 50 runs and of 5
    assert len(await settle(loop)) == PAGE + 5


async def test_a_sweep_looks_only_at_runs_that_are_behind(world: Any, loop: Loop) -> None:
    await create_runs(world, 3)
    real = Reconciler(world.client, RELEASE, Board(), b"key")
    for name in ("run-0", "run-1", "run-2"):
        await real.reconcile("default", name)
    await loop._sweep()
    assert await settle(loop) == []
    run = await world.client.get(RUN, "run-1", "default")
    (child,) = (await world.client.list(JOB, "default", labels=f"cgd.dev/run-uid={run['metadata']['uid']}"))[0]
    await world.client.delete(JOB, child["metadata"]["name"], "default")
    await loop._sweep()
    assert await settle(loop) == ["run-1"]


@embedded_only
async def test_what_a_sweep_has_read_is_not_read_again(world: Any) -> None:
    loop = Loop(Reconciler(world.client, RELEASE, Board(), b"key"))
    await create_runs(world, 1)
    await loop.reconciler.reconcile("default", "run-0")
    await world.end("prepare")
    since = len(world.embedded.requests)
    await loop._sweep()
    while loop._tasks:  # noqa: ASYNC110  the loop keeps no event for a test
        await asyncio.sleep(0.01)
    read = [call for call in requests(world, since) if call.startswith("GET")]
    assert len(read) == 5  # runs, Jobs, pods, PyTorchJobs, TrainJobs
    assert "answer" in await world.children()


async def test_what_a_sweep_has_read_is_not_used_when_something_has_happened_meanwhile(
    world: Any, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Reading | None] = loop.reconciler.readings  # type: ignore[attr-defined]
    read = ChildReader.read

    async def busy(self: ChildReader, namespace: str | None, homes: dict[str, str]) -> Any:
        loop.soon("default", "run-0")
        return await read(self, namespace, homes)

    await create_runs(world, 2)
    monkeypatch.setattr(ChildReader, "read", busy)
    await loop._sweep()
    assert await settle(loop) == ["run-0", "run-1"]
    assert [bool(one) for one in looked] == [False, True]
    monkeypatch.setattr(ChildReader, "read", read)
    monkeypatch.setattr("cgd_operator.controller.queue.READING_SECONDS", 0)
    await loop._sweep()
    await settle(loop)
    assert [bool(one) for one in looked] == [False, True, False, False]


async def test_how_far_a_stage_is_makes_no_sweep_look(world: Any, loop: Loop) -> None:
    await create_runs(world, 1)
    board = loop.reconciler.board
    real = Reconciler(world.client, RELEASE, board, b"key")
    await real.reconcile("default", "run-0")
    uid = (await world.client.get(RUN, "run-0", "default"))["metadata"]["uid"]
    board.put(uid, "prepare", Progress(trainer_status=TrainerStatus(), rows=Rows(total=9, done=3), tokens_per_second=5))
    await loop._sweep()
    assert await settle(loop) == []
    await real.reconcile("default", "run-0")
    assert (await world.client.get(RUN, "run-0", "default"))["status"]["stages"][0]["rows"]["done"] == 3


async def test_what_is_known_of_a_run_that_was_deleted_is_forgotten(world: Any, loop: Loop) -> None:
    await world.apply()
    there = (await world.get())["metadata"]["uid"]
    for uid in (there, "deleted"):
        left = pod("answer")
        left["metadata"]["labels"]["cgd.dev/run-uid"] = uid
        loop.reconciler.board.put(uid, "answer", _report())
        loop.reconciler.departed.add(left, datetime.now(UTC))
    await loop._sweep()
    assert loop.reconciler.known() == {there}
    assert loop.reconciler.departed.of("deleted") == ()


async def test_a_sweep_that_nobody_asked_for_takes_its_time_until_somebody_asks(world: Any, loop: Loop) -> None:
    await create_runs(world, 2)
    sweep = asyncio.create_task(loop._sweep(pause=3600))
    assert await asyncio.wait({sweep}, timeout=0.5) == (set(), {sweep})
    loop.sweep_soon()
    async with asyncio.timeout(PATIENCE):
        await sweep
    assert len(await settle(loop)) == 2


async def begun(world: Any, count: int) -> None:
    """Create runs and start the first child of each."""
    await create_runs(world, count)
    real = Reconciler(world.client, RELEASE, Board(), b"key")
    for number in range(count):
        await real.reconcile("default", f"run-{number}")


async def end_prepare(world: Any, *names: str) -> None:
    for name in names:
        (child,) = (await world.client.list(JOB, "default", labels=f"cgd.dev/run={name}"))[0]
        body = {"status": ENDS["Job"]("Complete")}
        await world.client.patch(JOB, child["metadata"]["name"], "default", body, subresource="status")


async def test_runs_whose_child_has_ended_unseen_are_looked_at_before_a_sweep_decides_for_all(
    world: Any, loop: Loop
) -> None:
    await begun(world, 2)
    await create_runs(world, 4, since=2)  # none of these has a child yet
    await end_prepare(world, "run-1")
    loop.start()
    async with asyncio.timeout(PATIENCE):
        await loop.caught_up()
    seen: list[str] = loop.reconciler.seen  # type: ignore[attr-defined]
    assert seen == ["run-1"]
    assert loop.reconciler.readings[0] is not None  # type: ignore[attr-defined]

    async def all_seen() -> bool:
        return set(seen) == {"run-1", "run-2", "run-3"}

    await world.until(all_seen)
    await loop.stop()


async def test_what_a_catch_up_has_read_is_not_used_when_something_has_happened_meanwhile(
    world: Any, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ChildReader.read

    async def busy(self: ChildReader, namespace: str | None, homes: dict[str, str]) -> Any:
        loop.soon("default", "run-0")
        return await read(self, namespace, homes)

    await begun(world, 2)
    await end_prepare(world, "run-0", "run-1")
    monkeypatch.setattr(ChildReader, "read", busy)
    await loop._catch_up()
    assert await settle(loop) == ["run-0", "run-1"]
    assert [bool(one) for one in loop.reconciler.readings] == [False, True]  # type: ignore[attr-defined]


async def test_a_catch_up_is_over_when_no_run_waits_to_be_looked_at_first(
    world: Any, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cgd_operator.controller.queue.AT_ONCE", 1)
    held, real = asyncio.Event(), loop.reconciler.reconcile

    async def slow(namespace: str, name: str, reading: Reading | None) -> float | None:
        await held.wait()
        return await real(namespace, name, reading)

    await begun(world, 2)
    await end_prepare(world, "run-0", "run-1")
    monkeypatch.setattr(loop.reconciler, "reconcile", slow)
    catch_up = asyncio.create_task(loop._catch_up())
    assert await asyncio.wait({catch_up}, timeout=0.5) == (set(), {catch_up})
    held.set()
    async with asyncio.timeout(PATIENCE):
        await catch_up
    assert not loop._first
    assert await settle(loop) == ["run-0", "run-1"]
    assert all(loop.reconciler.readings)  # type: ignore[attr-defined]


@embedded_only
async def test_a_catch_up_reads_no_pods_of_runs_without_such_a_child(world: Any, loop: Loop) -> None:
    await begun(world, PAGE + 1)
    since = len(world.embedded.requests)
    await loop._catch_up()
    assert await settle(loop) == []
    assert len(requests(world, since)) == 2 * 4  # runs, Jobs, PyTorchJobs and TrainJobs: of 50 runs and of 1


async def test_a_catch_up_that_fails_holds_up_nothing(world: Any, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unable(*_: Any) -> Any:
        raise ApiError(500, "InternalError", "as the test wants it")

    able = ChildReader.children
    await create_runs(world, 1)
    monkeypatch.setattr(ChildReader, "children", unable)
    loop.start()
    async with asyncio.timeout(PATIENCE):
        await loop.caught_up()
    monkeypatch.setattr(ChildReader, "children", able)
    loop.sweep_soon()

    async def seen() -> bool:
        return bool(loop.reconciler.seen == ["run-0"])  # type: ignore[attr-defined]

    await world.until(seen)
    await loop.stop()


async def test_a_sweep_leaves_a_status_to_a_look_that_is_to_come_soon(
    world: Any, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begun(world, 2)
    monkeypatch.setattr("cgd_operator.controller.reconciler.SETTLE_SECONDS", 600)
    for name in ("run-0", "run-1"):
        run = await world.client.get(RUN, name, "default")
        stages = [one | {"message": "old"} for one in run["status"]["stages"]]
        await world.client.patch(RUN, name, "default", {"status": {"stages": stages}}, subresource="status")
    loop.later("default", "run-0", 300)
    loop.later("default", "run-1", 3600)
    await loop._sweep()
    assert await settle(loop) == ["run-1"]
    await loop.stop()


@embedded_only
async def test_an_operator_that_starts_goes_on_with_runs_before_kopf_reads_them_all(world: Any) -> None:
    await begun(world, 2)
    await end_prepare(world, "run-1")
    since = len(world.embedded.requests)
    async with world.operator():
        pass  # it ends no sooner than Kopf has begun
    calls = requests(world, since)
    started = calls.index("POST /apis/batch/v1/namespaces/default/jobs?fieldManager=cgd-operator")
    watched = next(place for place, call in enumerate(calls) if "/cgdruns?" in call and "watch=true" in call)
    assert started < watched


async def test_an_operator_that_is_ended_while_it_catches_up_has_stopped_its_loop(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it gives the Lease back: another operator may act then."""
    begun: asyncio.Future[Loop] = asyncio.get_running_loop().create_future()

    async def endless(self: Loop) -> None:
        begun.set_result(self)
        await asyncio.Event().wait()

    monkeypatch.setattr(Loop, "_catch_up", endless)
    operator = asyncio.create_task(operate())
    async with asyncio.timeout(PATIENCE):
        loop = await begun
        operator.cancel()
        await asyncio.wait({operator})
    assert loop._stopped


@embedded_only
@pytest.mark.usefixtures("rarely")
async def test_an_operator_that_starts_reads_every_child_twice_and_every_pod_once(world: Any) -> None:
    """For the children that have ended, and for everything; not for the watches."""
    await begun(world, 1)
    since = len(world.embedded.requests)

    def lists(path: str) -> int:
        calls = (one for one in requests(world, since) if "limit=1" not in one and "watch=true" not in one)
        return sum(one.startswith(f"GET {path}") for one in calls)

    async def swept() -> bool:
        return lists("/api/v1/pods") > 0 and lists("/apis/batch/v1/jobs") > 1

    async with world.operator():
        await world.until(swept)
        await quiet(world, 1)
    assert lists("/apis/batch/v1/jobs") == 2
    assert lists("/api/v1/pods") == 1


async def test_a_run_that_cannot_be_looked_over_holds_up_no_other(
    world: Any, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create_runs(world, 3)
    whole = Reconciler.due

    def broken(self: Reconciler, manifest: Any, objects: Any) -> Any:
        if manifest["metadata"]["name"] == "run-1":
            raise RuntimeError("a bug")
        return whole(self, manifest, objects)

    monkeypatch.setattr(Reconciler, "due", broken)
    await loop._sweep()
    assert sorted(await settle(loop)) == ["run-0", "run-1", "run-2"]


async def test_gpu_time_alone_is_no_reason_to_write(world: Any) -> None:
    """A pod that holds a GPU costs no write a minute."""
    await create_runs(world, 1)
    real = Reconciler(world.client, RELEASE, Board(), b"key")
    await real.reconcile("default", "run-0")
    await world.play("prepare")
    await real.reconcile("default", "run-0")
    run = await world.client.get(RUN, "run-0", "default")
    own = labels("answer") | {"cgd.dev/run": "run-0", "cgd.dev/run-uid": run["metadata"]["uid"]}
    made = {
        "metadata": {"name": "pod", "namespace": "default", "labels": own},
        "spec": {"nodeName": "node", "containers": [{"name": "stage", "image": "x"}]},
    }
    await world.client.create(POD, made)
    (job,) = (one for one in (await world.client.list(JOB, "default"))[0] if "conditions" not in one.get("status", {}))
    begun = {"status": {"active": 1, "startTime": "2026-01-01T00:00:00Z"}}
    await world.client.patch(JOB, job["metadata"]["name"], "default", begun, subresource="status")
    status = {"phase": "Running", "startTime": "2026-01-01T00:00:00Z"}
    await world.client.patch(POD, "pod", "default", {"status": status}, subresource="status")
    await real.reconcile("default", "run-0")
    told = await world.client.get(RUN, "run-0", "default")
    assert float(told["status"]["usage"]["gpuHours"]) > 1000
    status["startTime"] = "2025-01-01T00:00:00Z"
    await world.client.patch(POD, "pod", "default", {"status": status}, subresource="status")
    await real.reconcile("default", "run-0")
    after = await world.client.get(RUN, "run-0", "default")
    assert after["metadata"]["resourceVersion"] == told["metadata"]["resourceVersion"]


@embedded_only
@pytest.mark.usefixtures("rarely")
async def test_a_whole_run_costs_few_writes_and_nothing_while_it_stands_still(world: Any) -> None:
    """Children end as soon as they are there."""
    async with world.operator():
        since = len(world.embedded.requests)
        await world.apply()
        await world.play(*CHILDREN[:-1])
        await world.until(lambda: is_told(world, "report"))
        await quiet(world, 1.5)
        await world.play("report")
        await world.until(lambda: has_ended(world))
        writes = [one for one in requests(world, since) if "fieldManager=cgd-operator" in one and "dryRun" not in one]
    children = sum("/jobs?" in one or "/pytorchjobs?" in one for one in writes)
    events, statuses = (sum(word in one for one in writes) for word in ("/events?", "/status?"))
    assert children == len(CHILDREN)
    assert events <= len(["answer", "critique and refine", "train-cgd", "the run"])
    assert statuses <= 2 * len(CHILDREN)
    assert len(writes) == children + events + statuses + 1  # the Secret with the tokens


async def has_ended(world: Any) -> bool:
    return bool(await world.state() == "Succeeded")


async def is_told(world: Any, stage: str) -> bool:
    stages = (await world.get())["status"].get("stages", [])
    return any(one["name"] == stage and one["state"] == "Waiting" for one in stages)


@embedded_only
@pytest.mark.usefixtures("rarely")
async def test_the_operators_own_status_is_no_news(world: Any) -> None:
    """After a status is written, nobody asks for the run's children again."""
    async with world.operator():
        await world.apply()
        await world.until(lambda: is_told(world, "prepare"))
        await quiet(world, 0.5)
        since = len(world.embedded.requests)
        run = await world.get()
        patch = {"status": {"progress": "1%"}}
        await world.client.patch(RUN, "demo", "default", patch, subresource="status")
        await asyncio.sleep(0.5)
        calls = [one for one in requests(world, since) if "run-uid" in one and "watch" not in one]
    assert calls == []
    assert run["status"]["observedGeneration"] == 1


def test_the_first_reports_are_shown_at_once_and_those_of_a_long_stage_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    board = Board()
    report = _report()
    board.put("uid", "answer", report)
    assert board.patience("uid", "answer") == 2
    clock[0] += 1000
    assert board.patience("uid", "answer") == 10
    clock[0] += 100_000
    assert board.patience("uid", "answer") == 30


def test_where_many_runs_report_each_is_shown_more_rarely() -> None:
    board = Board()
    for number in range(500):
        board.put(f"uid-{number}", "answer", _report())
    assert board.patience("uid-7", "answer") == 50
    for number in range(490):
        board.forget(f"uid-{number}")
    assert board.patience("uid-495", "answer") == 2


def _report() -> Any:
    return Progress(trainer_status=TrainerStatus())


async def test_a_report_reaches_the_status_of_its_run(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key = b"key of the test, of 32 bytes and more"
    monkeypatch.setenv("CGD_PROGRESS_KEY", key.decode())
    monkeypatch.setattr("cgd_operator.facts.progress.LEAST_PATIENCE", 0.1)
    ports: list[int] = []
    start = ProgressServer.start

    async def noted(self: ProgressServer, host: str, port: int) -> None:
        await start(self, host, port)
        ports.append(self.port)

    monkeypatch.setattr(ProgressServer, "start", noted)
    async with world.operator():
        await world.apply()
        await world.until(lambda: is_told(world, "prepare"))
        run = await world.get()
        uid = run["metadata"]["uid"]
        url = f"http://127.0.0.1:{ports[0]}/progress/default/demo/{uid}/prepare"
        bearer = {"Authorization": f"Bearer {token(key, 'default', 'demo', uid, 'prepare')}"}
        body = {"trainerStatus": {}, "rows": {"total": 50, "done": 20}}
        async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=bearer) as answer:
            assert answer.status == 200

        async def shown() -> bool:
            stages = (await world.get())["status"]["stages"]
            return stages[0].get("rows", {}).get("done") == 20

        await world.until(shown)


async def test_a_retry_is_made_by_itself(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cgd_operator.controller.queue.RETRY_SECONDS", 0.05)
    await create_runs(world, 1)
    failing = Failing(world.client, RELEASE, Board(), b"key")
    failing.left = 3
    loop = Loop(failing)
    loop.there(("default", "run-0"), "its uid")
    loop.poke("default", "run-0")

    async def made() -> bool:
        return bool((await world.client.list(JOB, "default"))[0])

    await world.until(made)
    assert failing.left == 0
    await loop.stop()


class Failing(Reconciler):
    left: int

    async def reconcile(self, namespace: str, name: str, reading: Reading | None = None) -> float | None:
        if self.left:
            self.left -= 1
            raise ApiError(500, "InternalError", "as the test wants it")
        return await super().reconcile(namespace, name, reading)


async def test_a_watch_that_breaks_begins_anew(world: Any, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cgd_operator.controller.queue.RETRY_SECONDS", 0.05)
    seen: list[str] = []
    begun: list[str] = []
    opened = Loop._opened

    def broken_once(self: Loop, kind: Any, event: str, item: Any) -> None:
        seen.append(item["metadata"]["name"])
        if len(seen) == 1:
            raise RuntimeError("a bug")

    def noted(self: Loop, kind: Any, namespace: str | None) -> None:
        begun.append(kind.plural)
        opened(self, kind, namespace)

    monkeypatch.setattr(Loop, "_happened", broken_once)
    monkeypatch.setattr(Loop, "_opened", noted)
    await create_runs(world, 1)
    loop.start()
    child = {"metadata": {"namespace": "default", "labels": labels("answer")}, "spec": {"containers": [POD_OF_NOTHING]}}
    for number, name in enumerate(("first", "second"), 1):
        async with asyncio.timeout(PATIENCE):
            while begun.count("pods") < number:  # noqa: ASYNC110  the loop keeps no event for a test
                await asyncio.sleep(0.01)
            await world.client.create(POD, {**child, "metadata": {**child["metadata"], "name": name}})
            while len(seen) < number:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    await loop.stop()
    assert seen == ["first", "second"]


POD_OF_NOTHING = {"name": "stage", "image": "x"}
