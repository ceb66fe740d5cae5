"""What `cgd ui` says of a run, from the statuses that the operator writes."""

import json
from typing import Any

import pytest
from support.builders import Object, ended, job, manifest, pod
from support.status_builders import every_state, finished, render_of, shown

from cgd_cli.view import detail, summary

STATES = every_state()


def served(run: Object) -> Object:
    """As the API server gives it."""
    run["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    return run


@pytest.mark.parametrize("case", STATES)
def test_a_run_in_every_state_can_be_shown(case: str) -> None:
    told = detail(served(STATES[case]), [])
    assert json.loads(json.dumps(told)) == told
    assert 0 <= told["percent"] <= 100


def test_a_run_without_any_status_is_new() -> None:
    told = detail(served(manifest()), [])
    assert (told["state"], told["percent"], told["stages"]) == ("New", 0, [])
    assert told["who"].startswith("The operator")


def test_a_run_at_work_tells_its_stage_and_figures() -> None:
    told = summary(served(STATES["half of the answers"]))
    assert (told["state"], told["look"], told["why"]) == ("Answering", "work", "")
    assert told["stage"] == "answer, stage 2 of 9"
    assert (told["rows"], told["rejected"], told["speed"], told["eta"]) == ("30 / 48", "2", "812", "2m10s")
    assert told["percent"] == round((100 + 66) / 9)


@pytest.mark.parametrize(
    ("case", "look", "why", "who"),
    [
        ("pod without a node", "still", "0/3 nodes are available", "The cluster's administrator or autoscaler"),
        ("suspended later", "still", "set spec.suspend to false", "You: set spec.suspend to false"),
        ("cannot start", "still", "install it", "The cluster's administrator"),
        (
            "failed stage",
            "bad",
            "no such bucket. create it",
            "You: change what the message says; cgd logs demo prepare",
        ),
        ("has failed for good", "bad", "raise it", "You: change what the message says."),
        ("refused", "bad", "spec.storage: is required", "You: correct the field"),
        ("succeeded", "good", "", ""),
        ("running answer", "work", "", "Nobody"),
    ],
)
def test_who_must_act_and_why_is_told(case: str, look: str, why: str, who: str) -> None:
    told = detail(served(STATES[case]), [])
    assert told["look"] == look
    assert why in told["why"] if why else told["why"] == ""
    assert told["who"].startswith(who) if who else told["who"] == ""


def test_a_pod_that_is_being_started_is_no_trouble_of_anybody() -> None:
    told = detail(served(shown(render_of(job("prepare"), pods=(pod("prepare", "Pending"),)))), [])
    assert told["who"] == "Nobody: its pods are being started."


def test_a_lost_node_is_the_administrators_and_a_sidecar_that_runs_on_is_yours() -> None:
    lost = pod("prepare")
    lost["metadata"]["deletionTimestamp"] = "2026-01-01T00:05:00Z"
    assert detail(served(shown(render_of(job("prepare"), pods=(lost,)))), [])["who"].startswith("The cluster's admin")
    kept = pod("prepare", terminated=ended(0))
    kept["status"]["containerStatuses"].append({"name": "proxy", "state": {"running": {}}})
    assert detail(served(shown(render_of(job("prepare"), pods=(kept,)))), [])["who"] == "You: do what the message says."


def test_what_is_stored_comes_with_the_command_that_shows_it() -> None:
    artifacts = {one["what"]: one for one in detail(served(STATES["succeeded"]), [])["artifacts"]}
    assert artifacts["Quadruples"]["command"] == "cgd rows demo -n default"
    assert artifacts["Model, CGD"]["command"] == "cgd rows demo -n default --mask CGD --count 1"
    assert artifacts["Report"]["command"] == "cgd report demo -n default"
    assert artifacts["Report"]["open"] == "/runs/default/demo/report"
    before = shown(render_of(*finished("prepare"), job("answer")))
    assert detail(served(before), [])["artifacts"] == []


def event(name: str, **fields: Any) -> Object:
    return {"metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"}, "reason": name, **fields}


def test_events_are_told_from_the_last_one_back_whichever_field_has_their_time() -> None:
    events = [
        event("created"),
        event("last", lastTimestamp="2026-01-01T00:02:00Z", eventTime=None),
        event("between", lastTimestamp=None, eventTime="2026-01-01T00:01:00.000000Z"),
    ]
    told = detail(served(manifest()), events)["events"]
    assert [one["reason"] for one in told] == ["last", "between", "created"]


def test_a_status_of_another_version_is_named_and_does_not_hide_the_run() -> None:
    run = served(manifest()) | {"status": {"state": "Dreaming", "stages": [{"name": "x", "dreams": 3}]}}
    told = detail(run, [])
    assert (told["state"], told["name"]) == ("Unreadable", "demo")
    assert "status.stages.0.dreams" in told["why"]
    assert "install the cgd of the operator's version" in told["why"]
