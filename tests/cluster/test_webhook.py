"""The end of a run, told to a server of our own: once it has ended, at least once, and without holding up the run."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from support.builders import CHILDREN

from cgd_operator.controller.reconciler import Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.http import webhook
from cgd_operator.http.webhook import Webhook
from cgd_operator.planning.manifests import Release

KEY = "Bearer a-key"


@dataclass
class Receiver:
    """Answers with these codes, then with 204; remembers what came."""

    url: str = ""
    codes: list[int] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        self.events.append(json.loads(await request.text()))
        self.headers.append(dict(request.headers))
        return web.Response(status=self.codes.pop(0) if self.codes else 204, headers={"Location": "/elsewhere"})


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Receiver]:
    given = Receiver()
    app = web.Application()
    app.router.add_post("/hook", given.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    given.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    monkeypatch.setattr(webhook, "PAUSES", (0.0, 0.0))
    yield given
    await runner.cleanup()


async def state_is(world: Any, state: str) -> bool:
    return bool(await world.state() == state)


async def test_a_run_that_has_succeeded_is_told_with_its_places_and_without_keys(
    world: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CGD_WEBHOOK_URL", receiver.url)
    monkeypatch.setenv("CGD_WEBHOOK_AUTHORIZATION", KEY)
    async with world.operator():
        run = await world.apply({"storage.credentialsSecretRef": {"name": "s3-keys"}})
        await world.play(*CHILDREN)
        await world.until(lambda: state_is(world, "Succeeded"))
    (event,) = receiver.events
    assert (event["specversion"], event["type"]) == ("1.0", "cgd.dev.run.succeeded")
    assert event["id"] == f"{run['metadata']['uid']}-succeeded"
    assert event["source"] == "/apis/cgd.dev/v1alpha1/namespaces/default/cgdruns/demo"
    data = event["data"]
    assert (data["namespace"], data["name"], data["state"]) == ("default", "demo", "Succeeded")
    assert data["usage"] == (await world.get())["status"]["usage"]
    assert receiver.headers[0]["Content-Type"] == "application/cloudevents+json; charset=utf-8"
    assert receiver.headers[0]["Authorization"] == KEY
    assert KEY not in json.dumps(event)
    assert "s3-keys" not in json.dumps(event)


async def test_a_run_that_fails_is_told_before_its_status_says_so_and_again_by_the_next_operator(
    world: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.apply()
    release, told = Release("generate", "train"), Webhook(receiver.url)

    async def look() -> None:
        await Reconciler(world.client, release, Board(), b"key", webhook=told).reconcile("default", "demo")

    await look()
    await look()
    await world.end("prepare", "Failed")
    with monkeypatch.context() as patch:
        patch.setattr("cgd_operator.controller.telling.Teller.tell", dies)
        with pytest.raises(RuntimeError, match="killed"):
            await look()
    assert await world.state() != "Failed"
    await look()
    await look()
    assert await world.state() == "Failed"
    assert [event["type"] for event in receiver.events] == ["cgd.dev.run.failed"] * 2
    assert len({event["id"] for event in receiver.events}) == 1


async def dies(*_: Any) -> None:
    raise RuntimeError("killed")


EVENT = {"id": "uid-succeeded"}


@pytest.mark.parametrize(
    ("codes", "tries", "taken"),
    [([], 1, True), ([503, 429], 3, True), ([500, 500, 500], 3, False), ([404], 1, False), ([302], 1, False)],
)
async def test_what_may_pass_is_tried_again_a_few_times(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, codes: list[int], tries: int, taken: bool
) -> None:
    receiver.codes = list(codes)
    assert await Webhook(receiver.url, KEY).send(EVENT) is taken
    assert len(receiver.events) == tries
    assert (
        (f"the webhook was not told of uid-succeeded: HTTP {codes[-1]}" in caplog.text) is not taken if codes else True
    )
    assert KEY not in caplog.text
    assert receiver.url not in caplog.text


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/hook?key=secret", "nonsense", "http://[secret/"])
async def test_a_server_that_is_not_there_stops_nothing_and_its_address_is_not_told(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "PAUSES", (0.0, 0.0))
    assert await Webhook(url).send(EVENT) is False
    assert "secret" not in caplog.text
