"""Two operators, one Lease: who acts, what happens when the one that does stops, dies or is cut off."""

import asyncio
import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes.aio.leaderelection import leaderelection as election
from kubernetes.aio.leaderelection.electionconfig import Config
from support.builders import CHILDREN
from support.patience import PATIENCE

from cgd_operator.kube import leader
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import LEASE, RUN, ApiError
from cgd_operator.kube.leader import LeaseLock, LeaseLost, lead

NAMESPACE, NAME = "default", "cgd-operator"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A try a second, and Leases that last: on a busy machine none is lost that should be kept."""
    monkeypatch.setattr(leader, "DURATION", 600)
    monkeypatch.setattr(leader, "RENEW_WITHIN", 400)
    monkeypatch.setattr(leader, "RETRY", 1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, the election's own minima for candidates that begin."""

    def hurry() -> None:
        monkeypatch.setattr(leader, "DURATION", 3)
        monkeypatch.setattr(leader, "RENEW_WITHIN", 2)

    return hurry


class Candidate:
    """Somebody who wants to lead, and notes when it does."""

    def __init__(self, world: Any, name: str) -> None:
        self.lock = LeaseLock(world.client, NAMESPACE, NAME, name)
        self.leads = asyncio.Event()
        self.done = asyncio.Event()
        self.task = asyncio.create_task(lead(self.lock, self._work))

    async def _work(self) -> None:
        self.leads.set()
        try:
            await self.done.wait()
        finally:
            self.leads.clear()

    async def dies(self) -> None:
        """Ends without a word to anyone."""
        self.lock.release = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


async def holder(world: Any) -> str | None:
    found = await world.client.get(LEASE, NAME, NAMESPACE)
    return found["spec"].get("holderIdentity") if found else None


async def test_one_leads_and_the_other_follows_at_once_when_it_stops(world: Any) -> None:
    first = Candidate(world, "first")
    await asyncio.wait_for(first.leads.wait(), PATIENCE)
    second = Candidate(world, "second")
    await asyncio.sleep(1.5)
    assert not second.leads.is_set()
    first.done.set()
    await first.task
    assert await holder(world) is None
    await asyncio.wait_for(second.leads.wait(), PATIENCE)
    assert await holder(world) == "second"
    second.done.set()
    await second.task


async def test_a_leader_that_died_is_followed_when_its_lease_has_run_out(world: Any, quick: Callable[[], None]) -> None:
    first = Candidate(world, "first")
    await asyncio.wait_for(first.leads.wait(), PATIENCE)
    await first.dies()
    quick()
    second = Candidate(world, "second")
    await asyncio.sleep(1.5)
    assert not second.leads.is_set()
    await asyncio.wait_for(second.leads.wait(), PATIENCE)
    second.done.set()
    await second.task


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_lease_is_judged_by_its_changes_and_not_by_the_clock_of_its_holder(
    world: Any, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    clock = [1_000_000.0]
    monkeypatch.setattr(election, "time", SimpleNamespace(time=lambda: clock[0]))
    lock = LeaseLock(world.client, NAMESPACE, NAME, "mine")
    candidate = election.LeaderElection(Config(lock, 15, 10, 2, lambda: None, None))

    async def renew(second: int) -> None:
        moment = datetime(2026, 1, 1, 12 + hours, 0, second, tzinfo=UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": "another", "leaseDurationSeconds": 15, "acquireTime": moment, "renewTime": moment}
        await world.client.apply(LEASE, {"metadata": {"namespace": NAMESPACE, "name": NAME}, "spec": spec})

    for second in range(3):
        await renew(second)
        assert not await candidate.try_acquire_or_renew(), "its holder lives"
        clock[0] += 14
    assert not await candidate.try_acquire_or_renew(), "it was renewed 14 seconds ago"
    clock[0] += 2
    assert await candidate.try_acquire_or_renew()
    assert await holder(world) == "mine"


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_leader_that_cannot_renew_stops_acting(
    world: Any, monkeypatch: pytest.MonkeyPatch, quick: Callable[[], None], hangs: bool
) -> None:
    quick()
    first = Candidate(world, "first")
    await asyncio.wait_for(first.leads.wait(), PATIENCE)

    async def cut_off(*_: Any, **__: Any) -> None:
        if hangs:
            await asyncio.sleep(3600)
        raise ApiError(0, "Unreachable", "the cable is out")

    with monkeypatch.context() as patch:
        patch.setattr(Cluster, "patch", cut_off)
        with pytest.raises(LeaseLost, match="default/cgd-operator was not renewed within 2 s"):
            await asyncio.wait_for(first.task, PATIENCE)
    assert not first.leads.is_set()


async def test_a_lease_that_cannot_be_read_for_a_moment_is_kept(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "ANSWER", 0.2)
    first = Candidate(world, "first")
    await asyncio.wait_for(first.leads.wait(), PATIENCE)
    hung = asyncio.Event()

    async def hangs(*_: Any, **__: Any) -> None:
        hung.set()
        await asyncio.sleep(3600)

    async def renewed() -> str:
        return str((await world.client.get(LEASE, NAME, NAMESPACE))["spec"]["renewTime"])

    async def renewed_again() -> bool:
        return await renewed() > before

    before = await renewed()
    with monkeypatch.context() as patch:
        patch.setattr(Cluster, "get", hangs)
        await asyncio.wait_for(hung.wait(), PATIENCE)
    await world.until(renewed_again)
    assert first.leads.is_set()
    first.done.set()
    await first.task


async def test_one_that_is_told_to_go_while_it_takes_the_lease_gives_it_back(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, writing = Cluster.create, asyncio.Event()

    async def slow(self: Cluster, *args: Any, **options: Any) -> Any:
        writing.set()
        await asyncio.sleep(0.3)
        return await create(self, *args, **options)

    monkeypatch.setattr(Cluster, "create", slow)
    first = Candidate(world, "first")
    await asyncio.wait_for(writing.wait(), PATIENCE)
    first.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first.task
    assert not first.leads.is_set()
    assert (await world.client.get(LEASE, NAME, NAMESPACE))["spec"].get("holderIdentity") is None


async def test_one_that_waits_takes_no_lease_away_when_it_goes(world: Any) -> None:
    first = Candidate(world, "first")
    await asyncio.wait_for(first.leads.wait(), PATIENCE)
    second = Candidate(world, "second")
    await asyncio.sleep(0.3)
    second.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second.task
    assert await holder(world) == "first"
    first.done.set()
    await first.task


async def test_an_error_of_the_work_ends_the_lead_with_it_and_frees_the_lease(world: Any) -> None:
    async def work() -> None:
        raise ApiError(403, "Forbidden", "no")

    with pytest.raises(ApiError, match="Forbidden"):
        await lead(LeaseLock(world.client, NAMESPACE, NAME, "first"), work)
    assert await holder(world) is None


async def test_two_operators_take_a_run_to_its_end_and_only_one_acts(
    world: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CGD_LEASE", f"{NAMESPACE}/{NAME}")

    async def succeeded() -> bool:
        return bool(await world.state() == "Succeeded")

    async def started() -> bool:
        return "check" in await world.children()

    async with world.operator():
        await world.until(lambda: holder(world))
        before = await holder(world)
        async with world.operator():
            await world.apply()
            await world.play(*CHILDREN[:3])
            await world.until(started)
            assert await holder(world) == before
        await world.play(*CHILDREN[3:])
        await world.until(succeeded)
    assert await holder(world) is None
    assert (await world.client.get(RUN, "demo", NAMESPACE))["status"]["state"] == "Succeeded"
