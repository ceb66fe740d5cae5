"""What is stored and applied stays as it is, however the code is arranged: a run of an earlier build must go on.

A change that is meant is written down by `PYTHONPATH=tests python tests/operator/planning/test_unchanged.py`.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from support.builders import RELEASE, UID, manifest

from cgd_operator.api.crd import crd
from cgd_operator.planning.dag import BACKENDS, Run, cleaning, plan
from cgd_operator.planning.manifests import cleaning_job, progress_secret, training_runtime
from cgd_operator.planning.manifests import manifest as child_manifest
from cgd_stages.results.outputs import SCHEMA
from cgd_stages.store.benchmarks import BENCHMARK_SCHEMA
from cgd_stages.store.rows import REJECTION_SCHEMA, digest_of, row_schema
from cgd_stages.train.example_files import EXAMPLES_SCHEMA

ROOT = Path(__file__).parents[3]
KNOWN = Path(__file__).with_name("unchanged.json")
EXAMPLES = ("examples/quickstart.yaml", "examples/replicate/run.yaml", "examples/gitops/kustomize/base/run.yaml")
VARIED: dict[str, dict[str, Any]] = {
    "two engines": {"teacher.fused": False},
    "endpoint": {"teacher": {"endpoint": {"url": "https://teacher.example/v1", "model": "large"}}},
    "every objective": {"training.objectives": ["CGD", "CFT", "DistilledSFT", "SFT", "RefinedSFT"]},
    "variants": {
        "training.variants": [
            {"name": "cgd-bare", "kind": "CGD", "bareShare": "0.25"},
            {"name": "cgd-shuffled-critiques", "kind": "CGD", "critique": {"kind": "shuffled"}},
        ]
    },
    "miscritiques": {
        "training.variants": [
            {"name": "cgd-mis", "kind": "CGD", "critique": {"kind": "miscritique", "rate": "0.5", "target": "refined"}}
        ]
    },
    "many pods": {"training.workers": 2, "training.gpusPerWorker": 8, "student.shards": 3},
    "no evaluation": {"evaluation": None},
}


def state() -> dict[str, Any]:
    """By what it is of: names as they are, and of the rest its hash."""
    runs = dict(_runs())
    return {
        "children": {name: dict(_children(run)) for name, run in sorted(runs.items())},
        "rows": {
            stage: _columns(row_schema(stage))
            for stage in ("prepare", "answer", "critique", "refine", "distill", "miscritique", "misrefine")
        },
        "other rows": {
            "rejected": _columns(REJECTION_SCHEMA),
            "outputs": _columns(SCHEMA),
            "benchmarks": _columns(BENCHMARK_SCHEMA),
            "examples": _columns(EXAMPLES_SCHEMA),
        },
        "digest": digest_of(name="value", numbers=[1, 2.5], text="\u00e9"),
        "definition": _hash(_without_descriptions(crd())),
    }


def _runs() -> Iterator[tuple[str, Run]]:
    for path in EXAMPLES:
        for document in yaml.safe_load_all((ROOT / path).read_text()):
            if document["kind"] == "CGDRun":
                meta = {"namespace": "default", "uid": UID, "generation": 1} | document["metadata"]
                yield path, Run.of(document | {"metadata": meta})
    for name, changes in VARIED.items():
        yield name, Run.of(manifest(changes))


def _children(run: Run) -> Iterator[tuple[str, str]]:
    for backend in BACKENDS:
        for child in plan(run, backend):
            yield f"{backend} {child.name}", _hash(child_manifest(run, child, RELEASE))
            if child.kind == "TrainJob":
                yield f"runtime of {child.name}", _hash(training_runtime(run, child, RELEASE))
    yield "clean", _hash(cleaning_job(run, cleaning(run), RELEASE))
    yield "tokens", _hash(progress_secret(run, {"answer": "token"}, RELEASE))


def _columns(schema: pa.Schema) -> list[str]:
    return [f"{field.name}: {field.type}" for field in schema]


def _without_descriptions(thing: Any) -> Any:
    if isinstance(thing, dict):
        texts = {"description", "message"}
        return {
            key: _without_descriptions(value)
            for key, value in thing.items()
            if not (key in texts and isinstance(value, str))
        }
    return [_without_descriptions(one) for one in thing] if isinstance(thing, list) else thing


def _hash(thing: Any) -> str:
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("part", ["children", "rows", "other rows", "digest", "definition"])
def test_what_is_stored_and_applied_is_unchanged(part: str) -> None:
    assert state()[part] == json.loads(KNOWN.read_text())[part]


if __name__ == "__main__":
    KNOWN.write_text(json.dumps(state(), indent=1) + "\n")
