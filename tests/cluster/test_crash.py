"""A few of the disturbances of `make chaos-operator`: whatever call breaks, the run ends as it would have."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from support import crash


@pytest.fixture
async def kubeconfig() -> AsyncIterator[str]:
    async with crash.apiserver() as path:
        yield path


async def test_whatever_call_breaks_the_run_ends_as_it_would_have(kubeconfig: str) -> None:
    calls, wanted = await crash.undisturbed(kubeconfig)
    assert wanted["state"] == "Succeeded"
    for offset, kind in enumerate(crash.DISTURBANCES):
        for at in range(5 * offset, calls, 37):
            assert await crash.disturbed(kubeconfig, crash.Disturbance(kind, at), wanted) == [], (kind, at)


async def test_an_operator_that_sees_nothing_is_found(kubeconfig: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, wanted = await crash.undisturbed(kubeconfig)
    monkeypatch.setattr("cgd_operator.controller.children.observe", lambda *_: {})
    monkeypatch.setattr(crash, "ROUNDS", 12)
    (found,) = await crash.disturbed(kubeconfig, crash.Disturbance(), wanted)
    assert found.startswith("no end after 12 rounds")


def status(*states: str, generation: int = 1) -> dict[str, Any]:
    stages = [{"name": f"stage-{at}", "state": state} for at, state in enumerate(states)]
    return {"stages": stages, "observedGeneration": generation}


@pytest.mark.parametrize(
    ("statuses", "found"),
    [
        ([status("Pending", "Pending"), status("Running", "Pending"), status("Succeeded", "Running")], []),
        ([status("Running"), status("Waiting")], ["stage-0 went back to Waiting"]),
        ([status("Succeeded"), status("Pending")], ["stage-0 went back to Pending"]),
        ([status("Failed")], ["stage-0 is Failed"]),
        ([status("Running", generation=2), status("Running")], ["observedGeneration fell"]),
    ],
)
def test_a_status_that_goes_backwards_is_found(statuses: list[dict[str, Any]], found: list[str]) -> None:
    assert crash.History(statuses=statuses).faults() == found


def test_a_stage_with_two_children_is_found() -> None:
    assert crash.History(created=["prepare", "answer", "prepare"]).faults() == ["prepare has two children"]
