"""`cgd validate` gives the verdict that the API server would give."""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.builders import SPEC, definition
from support.fuzz import mutants
from support.local_world import KUBECTL

from cgd_cli.errors import Wrong
from cgd_cli.manifest import run_of
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_operator import yamls
from cgd_operator.api.spec import InvalidRun
from cgd_operator.kube.client import Cluster

Json = dict[str, Any]
HEAD: Json = {"apiVersion": "cgd.dev/v1alpha1", "kind": "CGDRun"}


@pytest.fixture
async def kubeconfig(tmp_path: Path) -> AsyncIterator[Path]:
    """Of a cluster that knows CGDRuns."""
    server = ApiServer()
    await server.start()
    (tmp_path / "kubeconfig").write_text(server.kubeconfig())
    async with await Cluster.connect(str(tmp_path / "kubeconfig"), manager="test") as cluster:
        await install(cluster, definition())
    yield tmp_path / "kubeconfig"
    await server.stop()


async def taken(kubeconfig: Path, texts: dict[str, str]) -> set[str]:
    """The names of the manifests that `kubectl apply --dry-run=server` takes."""
    folder = kubeconfig.parent / "manifests"
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    process = await asyncio.create_subprocess_exec(
        KUBECTL, "--kubeconfig", str(kubeconfig), "apply", "--dry-run=server", "--filename", str(folder),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    found = set(re.findall(r"cgdrun.cgd.dev/(\S+) created \(server dry run\)", out.decode()))
    assert found | set(re.findall(r"[a-z]+-\d+", err.decode())) >= set(texts), err.decode()
    return found


def valid(text: str, folder: Path) -> bool:
    (folder / "run.yaml").write_text(text)
    faults = ""
    try:
        run_of(folder / "run.yaml")
    except (Wrong, InvalidRun) as error:
        faults = str(error)
    assert all(line.startswith(f"{folder}/run.yaml") for line in faults.splitlines()), faults
    return not faults


async def test_it_takes_what_kubectl_and_the_server_take_and_nothing_else(kubeconfig: Path, tmp_path: Path) -> None:
    texts = {}
    for number, body in enumerate(itertools.islice(mutants(11), 400)):
        texts[f"run-{number}"] = yamls.dump(body | {"metadata": {"name": f"run-{number}", "namespace": "default"}})
    for number, (changes, _) in enumerate(NULLS):
        body = HEAD | {"metadata": {"name": f"null-{number}", "namespace": "default"}, "spec": SPEC | changes}
        texts[f"null-{number}"] = yamls.dump(body)
    accepted = await taken(kubeconfig, texts)
    assert {name for name, text in texts.items() if valid(text, tmp_path)} == accepted
    assert {name for name in accepted if name.startswith("null")} == {
        f"null-{number}" for number, (_, is_valid) in enumerate(NULLS) if is_valid
    }
    assert len(accepted) > 20


NULLS: list[tuple[Json, bool]] = [
    ({"suspend": None}, True),
    ({"training": None}, True),
    ({"student": {"model": "org/s", "maxModelLen": 4096.0}}, True),
    ({"student": {"model": "org/s", "maxModelLen": 4096.5}}, False),
]
"""Changes of a spec, and whether they are valid."""


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({"metadata": {"name": "a", "labels": {"team": "a b"}}}, "metadata.labels.team must have at most 63 letters"),
        ({"metadata": {"name": "a", "labels": {"a/b/c": "x"}}}, "metadata.labels: 'a/b/c' can be no name there"),
        ({"metadata": {"name": "a", "labels": {"-a": "x"}}}, "'-a' can be no name there"),
        ({"metadata": {"name": "a", "labels": {"tries": 3}}}, "metadata.labels.tries must be text: write it in quotes"),
        ({"metadata": {"name": "a", "labels": ["a"]}}, "metadata.labels must hold names and texts"),
        ({"metadata": {"name": "a", "annotations": {"a": True}}}, "metadata.annotations.a must be text"),
        ({"metadata": {"name": "a", "annotations": {"a": "x" * (1 << 18)}}}, "262,145 bytes"),
        ({"metadata": {"name": "a"}, "trainer": {}}, "trainer is no field of a CGDRun"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_stands_outside_the_spec(tmp_path: Path, body: Json, fault: str) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(HEAD | {"spec": SPEC} | body))
    with pytest.raises(Wrong) as error:
        run_of(tmp_path / "run.yaml")
    assert f"{tmp_path}/run.yaml: " in str(error.value)
    assert fault in str(error.value)


def test_names_and_values_that_kubernetes_takes(tmp_path: Path) -> None:
    labels = {"app.kubernetes.io/name": "x", "team": "", "A_b.c-1": "Z9", "argocd.argoproj.io/instance": "a" * 63}
    meta = {"name": "a.b", "labels": labels, "annotations": {"note": "two\nlines \u00e9"}}
    assert valid(yaml.safe_dump(HEAD | {"metadata": meta, "spec": SPEC, "status": {}}), tmp_path)


def test_an_error_of_yaml_says_where(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("kind: CGDRun\nspec:\n  - a\n  b: 1\n")
    with pytest.raises(Wrong, match=r"run\.yaml is not YAML: line 4, column 3: did not find expected '-' indicator"):
        run_of(tmp_path / "run.yaml")


def test_a_null_that_its_field_may_hold_stays(tmp_path: Path) -> None:
    teacher = {"endpoint": {"url": "https://t/v1", "model": "t", "extraBody": {"seed": None}}}
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(HEAD | {"metadata": {"name": "a"}, "spec": SPEC | {"teacher": teacher}})
    )
    endpoint = run_of(tmp_path / "run.yaml").spec.teacher.endpoint
    assert endpoint is not None
    assert endpoint.extra_body == {"seed": None}
