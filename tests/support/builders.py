"""Builders of the objects that tests of the control plane read: runs, Jobs, pods, as the API server returns them."""

import copy
from functools import cache
from typing import Any

from cgd_operator.api.crd import crd
from cgd_operator.planning.dag import Run
from cgd_operator.planning.manifests import MANAGED_BY, MANAGER, RUN_LABEL, STAGE_LABEL, UID_LABEL, Release

Object = dict[str, Any]

UID = "7d1b2c3e-0000-4000-8000-000000000001"
RELEASE = Release("registry.example/cgd-generate:1", "registry.example/cgd-train:1", "http://operator:8080")

definition = cache(crd)
"""The CGDRun's definition: to make it takes longer than to start an API server."""

CHILDREN = ["prepare", "answer", "teacher", "check", "train-cgd", "evaluate-base", "evaluate-cgd", "report"]
"""The stages' children of such a run, in the order in which they start."""

SPEC: Object = {
    "student": {"model": "s3://data/models/student"},
    "teacher": {"model": "s3://data/models/teacher"},
    "prompts": {"source": "configmap://problems/train.jsonl", "fields": {"prompt": "question", "reference": "answer"}},
    "evaluation": {
        "benchmarks": [
            {
                "name": "arithmetic",
                "source": "configmap://problems/heldout.jsonl",
                "fields": {"prompt": "question", "reference": "answer"},
            }
        ]
    },
    "storage": {"uri": "s3://data/runs"},
}


def manifest(changes: Object | None = None, *, name: str = "demo", namespace: str = "default") -> Object:
    """A CGDRun; `changes` are dotted paths below `spec` and their values, None to remove."""
    spec = copy.deepcopy(SPEC)
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        place = spec
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return {
        "apiVersion": "cgd.dev/v1alpha1",
        "kind": "CGDRun",
        "metadata": {"name": name, "namespace": namespace, "uid": UID, "generation": 1},
        "spec": spec,
    }


def run(changes: Object | None = None, **meta: str) -> Run:
    return Run.of(manifest(changes, **meta))


def labels(stage: str) -> dict[str, str]:
    return {MANAGED_BY: MANAGER, RUN_LABEL: "demo", UID_LABEL: UID, STAGE_LABEL: stage}


def job(stage: str, *conditions: str, kind: str = "Job", suspend: bool = False, held: bool = False) -> Object:
    """A child; `conditions` are the types that are true."""
    return {
        "kind": kind,
        "metadata": {
            "name": f"demo-{stage}",
            "namespace": "default",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": labels(stage),
            "annotations": {"cgd.dev/suspended-by-run": "true"} if held else {},
        },
        "spec": {"suspend": suspend},
        "status": {"conditions": [{"type": one, "status": "True", "reason": f"{one}Reason"} for one in conditions]},
    }


def pod(stage: str, phase: str = "Running", *, shard: int = 0, name: str = "", **state: Any) -> Object:
    """A pod of a child; `state` is the state of its container, such as terminated={...}."""
    return {
        "kind": "Pod",
        "metadata": {
            "name": name or f"demo-{stage}-{shard}",
            "uid": f"uid-of-{name or f'demo-{stage}-{shard}'}",
            "labels": labels(stage),
            "annotations": {"batch.kubernetes.io/job-completion-index": str(shard)},
        },
        "spec": {"nodeName": "gpu-7", "containers": [{"name": "stage"}]},
        "status": {
            "phase": phase,
            "startTime": "2026-01-01T00:00:00Z",
            "containerStatuses": [{"name": "stage", "state": state}],
        },
    }


def ended(exit_code: int, message: str = "", end: str = "2026-01-01T00:01:40Z") -> Object:
    return {
        "exitCode": exit_code,
        "reason": "Completed" if exit_code == 0 else "Error",
        "startedAt": "2026-01-01T00:00:00Z",
        "finishedAt": end,
        "message": message,
    }


ENDED = "2026-01-01T00:00:00Z"


def ended_job(condition: str) -> Object:
    """The status of a finished Job, with all that a real API server insists on."""
    interim = {"Complete": "SuccessCriteriaMet", "Failed": "FailureTarget"}[condition]
    status: Object = {"startTime": ENDED, "conditions": [true(interim), true(condition)]}
    return status | ({"completionTime": ENDED} if condition == "Complete" else {})


def ended_pytorchjob(condition: str) -> Object:
    return {"conditions": [true("Succeeded" if condition == "Complete" else condition)]}


def ended_trainjob(condition: str) -> Object:
    return {"conditions": [true(condition)]}


ENDS = {"Job": ended_job, "PyTorchJob": ended_pytorchjob, "TrainJob": ended_trainjob}


def true(kind: str) -> Object:
    return {"type": kind, "status": "True", "reason": "Played", "lastTransitionTime": ENDED}
