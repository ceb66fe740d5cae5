"""What a training's pods have to store a checkpoint when they must go."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from support.builders import RELEASE, ended, job, manifest, pod, run

from cgd_operator.api.status import CGDRunStatus
from cgd_operator.controller.children import RunObjects
from cgd_operator.controller.view import View
from cgd_operator.facts.progress import Board
from cgd_operator.planning.dag import BACKENDS, Backend, Child, Run, plan
from cgd_operator.planning.manifests import manifest as child_manifest
from cgd_operator.planning.manifests import training_runtime
from cgd_operator.planning.requests import Sizes
from cgd_operator.status.render import STALLED_AFTER

GB = 10**9
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def told(checkpoint_bytes: Any) -> dict[str, Any]:
    """The pod of a prepare that has found a checkpoint to be so large."""
    facts = {"metrics": {"checkpoint_bytes": checkpoint_bytes, "read": 60}}
    words = json.dumps({"outcome": "done", "stages": {"prepare": facts}})
    return pod("prepare", "Succeeded", terminated=ended(0, words))


def seconds(body: dict[str, Any]) -> int:
    """Of the pods of a child, or of a TrainJob's runtime."""
    spec = body["spec"]
    if "pytorchReplicaSpecs" in spec:
        template = spec["pytorchReplicaSpecs"]["Worker"]["template"]
    elif "template" in spec and "replicatedJobs" in spec["template"]["spec"]:
        template = spec["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    else:
        template = spec["template"]
    return int(template["spec"]["terminationGracePeriodSeconds"])


def grace(this: Run, children: tuple[Child, ...]) -> dict[str, int]:
    """By stage, as the pods are told."""
    bodies = {
        child.stage: (training_runtime if child.kind == "TrainJob" else child_manifest)(this, child, RELEASE)
        for child in children
    }
    return {stage: seconds(body) for stage, body in bodies.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("checkpoint_bytes", "expected"), [(0, 120), (3 * GB, 120), (56 * GB, 280), (112 * GB, 560), (500 * GB, 600)]
)
def test_a_training_has_the_time_that_its_checkpoint_takes(
    backend: Backend, checkpoint_bytes: int, expected: int
) -> None:
    this = run()
    found = grace(this, plan(this, backend, Sizes(checkpoint=checkpoint_bytes)))
    assert found.pop("train-cgd") == expected
    assert set(found.values()) == {120}, "what others hold is small"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own", [30, 3600])
def test_the_run_may_say_otherwise(backend: Backend, own: int) -> None:
    this = run({"training.terminationGracePeriodSeconds": own})
    assert grace(this, plan(this, backend, Sizes(checkpoint=56 * GB)))["train-cgd"] == own


def planned(pods: list[dict[str, Any]], status: CGDRunStatus | None = None) -> View:
    body = manifest()
    body["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    body["status"] = (status or CGDRunStatus()).model_dump(by_alias=True, exclude_none=True)
    return View.of(Run.of(body), body, RunObjects([job("prepare", "Complete")], pods, ("PyTorchJob",), []), NOW)


def grace_of(view: View) -> int:
    return next(child.grace_seconds for child in view.children if child.stage == "train-cgd")


def test_what_prepare_has_told_is_known_also_when_its_pod_is_gone() -> None:
    view = planned([told(56e9)])
    assert grace_of(view) == 280
    assert grace_of(planned([], view.status(Board(), None, STALLED_AFTER))) == 280
    assert grace_of(planned([])) == 120


@pytest.mark.parametrize("size", [float("nan"), float("inf"), -1, 1e300])
def test_what_no_checkpoint_can_be_is_not_believed(size: float) -> None:
    assert grace_of(planned([told(size)])) == 120
