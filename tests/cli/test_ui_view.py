"""What `cgd ui` says of a run, from the statuses that the operator writes."""

import json
from typing import Any

import pytest
import yaml
from support.builders import Object, ended, job, manifest, pod
from support.status_builders import every_state, finished, render_of, shown

from cgd_cli.view import detail, summary
from cgd_operator.api.spec import parse_spec
from cgd_operator.api.status import CGDRunStatus

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


def test_a_stage_with_rounds_says_in_which_it_is_and_what_it_waits_for() -> None:
    stages = [{"name": "score-gkd", "state": "Running", "round": "3 of 12, waits for rollout-gkd"}]
    run = manifest() | {"status": {"state": "Scoring", "stage": "score-gkd", "stages": stages}}
    [told] = detail(served(run), [])["stages"]
    assert told["message"] == "round 3 of 12, waits for rollout-gkd"


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


def measured(**shares: dict[str, float]) -> Object:
    """A run whose evaluations have said these accuracies, by benchmark."""
    stages = {f"evaluate-{model}": {"metrics": {f"{name}_accuracy": share for name, share in told.items()}}
              for model, told in shares.items()}  # fmt: skip
    pods = tuple(
        pod(stage, "Succeeded", terminated=ended(0, json.dumps({"outcome": "done", "stages": {stage: facts}})))
        for stage, facts in stages.items()
    )
    done = finished("prepare", "answer", "teacher", "check", "train-cgd", *stages)
    return served(shown(render_of(*done, pods=pods)))


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ({}, ""),
        ({"base": {"sums": 0.25, "products": 0.5}}, "base 37.5%"),
        ({"base": {"sums": 0.25}, "cgd": {"sums": 0.5}}, "base 25.0%, CGD 50.0%"),
        ({"cgd": {"sums": 1.0}}, "CGD 100.0%"),
    ],
)
def test_the_result_is_base_and_the_best_trained_model(shares: dict[str, dict[str, float]], told: str) -> None:
    assert summary(measured(**shares))["result"] == told


def test_accuracies_stay_when_the_pods_that_told_them_are_gone() -> None:
    before = measured(base={"sums": 0.25})
    previous = CGDRunStatus.model_validate(before["status"])
    done = finished("prepare", "answer", "teacher", "check", "train-cgd", "evaluate-base")
    assert summary(served(shown(render_of(*done, previous=previous))))["result"] == "base 25.0%"


def test_a_suspended_run_is_counted_apart_from_those_that_wait() -> None:
    groups = {case: summary(served(run))["group"] for case, run in STATES.items()}
    suspended = [case for case, run in STATES.items() if run["status"]["state"] == "Suspended"]
    assert suspended
    assert {groups[case] for case in suspended} == {"suspended"}
    assert groups["half of the answers"] == "at work"
    assert set(groups.values()) <= {"at work", "waiting", "suspended", "failed", "succeeded"}


def test_the_manifest_can_be_applied_again() -> None:
    shown_manifest = yaml.safe_load(detail(served(STATES["half of the answers"]), [])["manifest"])
    assert set(shown_manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert shown_manifest["metadata"] == {"name": "demo", "namespace": "default"}
    assert parse_spec(shown_manifest)
