"""What kstatus (Flux, kpt, `argocd` and others) makes of a CGDRun, by its own rules, in every state of a run."""

from typing import Any

import pytest
from support.status_builders import every_state

STATES = every_state()


def kstatus(run: dict[str, Any]) -> str:
    """kstatus' `Compute` for a kind that it has no rules of its own for.

    Source: sigs.k8s.io/cli-utils, pkg/kstatus/status; its older versions do not look at Ready.
    """
    meta, status = run["metadata"], run.get("status", {})
    if "deletionTimestamp" in meta:
        return "Terminating"
    if status.get("observedGeneration", meta["generation"]) != meta["generation"]:
        return "InProgress"
    for condition in status.get("conditions", []):
        match condition:
            case {"type": "Reconciling", "status": "True"}:
                return "InProgress"
            case {"type": "Stalled", "status": "True"}:
                return "Failed"
    ready = [one["status"] for one in status.get("conditions", []) if one["type"] == "Ready"]
    return "InProgress" if ready and ready != ["True"] else "Current"


def expected(name: str) -> str:
    if name in ("succeeded", "suspended after its end"):
        return "Current"
    return "Failed" if name.startswith(("failed", "has failed", "refused", "cannot")) else "InProgress"


@pytest.mark.parametrize("name", STATES)
def test_kstatus_reads_every_state_of_a_run_as_it_is(name: str) -> None:
    assert kstatus(STATES[name]) == expected(name)


@pytest.mark.parametrize("name", STATES)
def test_a_run_that_was_looked_at_has_all_conditions_of_the_generation_seen(name: str) -> None:
    status = STATES[name]["status"]
    there = {one["type"]: one for one in status["conditions"]}
    if name == "not looked at yet":
        assert there == {}
        return
    assert set(there) == {"Accepted", "Reconciling", "Stalled", "Ready", "Succeeded", "Suspended"}
    assert {one["observedGeneration"] for one in there.values()} == {status["observedGeneration"]}


@pytest.mark.parametrize("name", STATES)
def test_conditions_do_not_contradict_each_other(name: str) -> None:
    true = {one["type"] for one in STATES[name]["status"]["conditions"] if one["status"] == "True"}
    assert len(true & {"Reconciling", "Stalled", "Ready", "Suspended"}) <= 1
    assert ("Ready" in true) == ("Succeeded" in true)


def test_a_run_under_way_says_what_it_is_at() -> None:
    told = [one["message"] for one in STATES["running answer"]["status"]["conditions"] if one["type"] == "Reconciling"]
    assert told == ["at stage answer"]
