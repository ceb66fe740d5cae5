"""Probes and metrics: what they say of an operator that waits, leads, or hangs."""

from collections.abc import AsyncIterator

import aiohttp
import pytest

from cgd_operator import metrics
from cgd_operator.http import health
from cgd_operator.http.health import Health


@pytest.fixture
async def served() -> AsyncIterator[Health]:
    it = Health()
    await it.start("127.0.0.1", 0)
    yield it
    await it.stop()


async def ask(it: Health, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{it.port}{path}") as answer:
        return answer.status, await answer.text()


async def test_one_that_has_seen_no_api_server_lives_and_is_not_ready(served: Health) -> None:
    assert await ask(served, "/healthz") == (200, "ok")
    assert await ask(served, "/readyz") == (503, "has not reached the API server")


async def test_one_that_waits_lives_and_is_ready(served: Health) -> None:
    served.could_lead()
    assert await ask(served, "/healthz") == (200, "ok")
    assert await ask(served, "/readyz") == (200, "waits for the Lease")


@pytest.mark.parametrize(("leads", "told"), [(True, (200, "an operator leads")), (False, (503, "no operator leads"))])
async def test_one_that_waits_says_whether_another_leads(served: Health, leads: bool, told: tuple[int, str]) -> None:
    async def answers() -> bool:
        return leads

    served.leader_answers = answers
    served.could_lead()
    assert await ask(served, "/leaderz") == told


async def test_one_that_leads_is_ready(served: Health) -> None:
    served.lead()
    served.swept()
    assert await ask(served, "/healthz") == (200, "ok")
    assert await ask(served, "/readyz") == (200, "leads")


@pytest.mark.parametrize("swept", [False, True])
async def test_one_that_leads_and_does_not_sweep_is_to_be_started_anew(
    served: Health, swept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.lead()
    if swept:
        served.swept()
    monkeypatch.setattr(health, "STALE_SECONDS", -1.0)
    status, text = await ask(served, "/healthz")
    assert status == 503
    assert text.startswith("no sweep for")


async def test_metrics_are_in_the_form_that_prometheus_reads(served: Health) -> None:
    metrics.API_REQUESTS.labels("GET", "200").inc()
    status, text = await ask(served, "/metrics")
    assert status == 200
    assert 'cgd_api_requests_total{code="200",method="GET"}' in text
    assert "# TYPE cgd_reconcile_seconds histogram" in text


def test_no_label_grows_with_the_number_of_runs() -> None:
    names = {name for metric in metrics.REGISTRY.collect() for sample in metric.samples for name in sample.labels}
    assert names <= {"state", "stage", "kind", "method", "code", "le"}
