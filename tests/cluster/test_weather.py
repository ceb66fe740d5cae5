"""Bad answers of the API server, and a little of what `make chaos-operator` does to the operator's process."""

from typing import Any

import pytest
from aiohttp import web
from chaos import weather
from support.builders import CHILDREN

from cgd_operator.controller.reconciler import Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.kube import client as cluster
from cgd_operator.kube.kinds import JOB, RUN, ApiError
from cgd_operator.planning import manifests

embedded_only = pytest.mark.parametrize("world", ["embedded"], indirect=True)


class Busy:
    """Answers the first calls with a refusal."""

    def __init__(self, times: int, status: int = 429, **headers: str) -> None:
        self.left, self.calls, self.status, self.headers = times, 0, status, headers

    def __call__(self, _: web.Request) -> web.Response | None:
        self.calls, self.left = self.calls + 1, self.left - 1
        headers = {name.replace("_", "-"): value for name, value in self.headers.items()}
        return web.json_response({"code": self.status}, status=self.status, headers=headers) if self.left >= 0 else None


@embedded_only
@pytest.mark.parametrize("status", [429, 503, 504])
async def test_a_server_that_is_busy_is_asked_again_when_it_says(world: Any, status: int) -> None:
    world.embedded.fault = busy = Busy(2, status, Retry_After="0")
    await world.client.list(JOB, "default")
    assert busy.calls == 3


@embedded_only
async def test_a_time_to_come_back_is_not_obeyed_for_ever(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "RETRY_AFTER_SECONDS", 0.01)
    world.embedded.fault = busy = Busy(100, Retry_After="3600")
    with pytest.raises(ApiError) as refused:
        await world.client.list(JOB, "default")
    assert (refused.value.status, busy.calls) == (429, cluster.TRIES)


@embedded_only
@pytest.mark.parametrize(
    "busy", [Busy(9), Busy(9, 409, Retry_After="0"), Busy(9, Retry_After="Mon, 23 Nov 2026 18:00:00 GMT")]
)
async def test_other_refusals_are_told_at_once(world: Any, busy: Busy) -> None:
    world.embedded.fault = busy
    with pytest.raises(ApiError):
        await world.client.list(JOB, "default")
    assert busy.calls == 1


@embedded_only
async def test_a_list_from_the_past_is_not_believed(world: Any) -> None:
    async def get(path: str) -> dict[str, Any]:
        return dict(await world.client._call("GET", path))

    old = await get(JOB.path("default"))
    await world.apply()
    await world.client.list(JOB, "default")
    world.embedded.fault = lambda _: web.json_response(old)
    with pytest.raises(ApiError, match="Stale: jobs were listed at version"):
        await world.client.list(JOB, "default")
    world.embedded.fault = None
    await world.client.list(JOB, "default")


@embedded_only
async def test_a_run_from_the_past_is_not_written_to(world: Any) -> None:
    await world.apply()
    old = await world.get()
    reconciler = Reconciler(world.client, manifests.Release("generate", "train"), Board(), b"key")
    await reconciler.reconcile("default", "demo")
    await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
    await reconciler.reconcile("default", "demo")
    before = await world.get()
    path = RUN.path("default", "demo")
    world.embedded.fault = lambda asked: web.json_response(old) if asked.path == path else None
    with pytest.raises(ApiError, match="409 Conflict"):
        await reconciler.reconcile("default", "demo")
    world.embedded.fault = None
    assert await world.get() == before
    assert before["status"]["observedGeneration"] == 2


@pytest.mark.slow
async def test_a_process_that_is_killed_and_loses_its_watches_ends_the_run_as_it_would_have() -> None:
    """One fault after the other, at the ends of several children."""
    names = ["killed", "watches reset", "410 in the watch", "stale list of Jobs", "stale run"]
    faults = {stage: weather.FAULTS[name] for stage, name in zip(CHILDREN[1:], names, strict=False)}
    async with weather.server() as (back, client, folder):
        outcome = await weather.play(back, client, folder, faults)
    assert (outcome.status["state"], outcome.faults, outcome.starts) == ("Succeeded", [], 2)
