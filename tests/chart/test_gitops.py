"""The examples for Argo CD, Flux and Kustomize: built by the real kustomize, held against the chart and the API."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from cgd_operator.api.spec import parse_spec

ROOT = Path(__file__).parents[2]
GITOPS = ROOT / "examples/gitops"
KUBECTL = Path(sys.executable).parent / "kubectl"
OVERLAYS = sorted(one.name for one in (GITOPS / "kustomize/overlays").iterdir())
POOLS = sorted(one.name for one in (GITOPS / "kustomize/pools").iterdir())


def built(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def written(path: str) -> dict[str, dict[str, Any]]:
    """The objects of a file, by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((GITOPS / path).read_text())}


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_is_one_run_that_can_be_run(name: str) -> None:
    (run,) = built(GITOPS / "kustomize/overlays" / name)
    assert run["metadata"]["name"] == name
    assert parse_spec(run).placement.teacher.node_selector


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_places_student_teacher_and_training(tmp_path: Path, pool: str) -> None:
    folder = tmp_path.relative_to("/")
    up = "../" * len(folder.parts)
    here = f"{up}{(GITOPS / 'kustomize').relative_to('/')}"
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": [f"{here}/base"], "components": [f"{here}/pools/{pool}"]})
    )
    (run,) = built(tmp_path)
    placement = parse_spec(run).placement
    for one in (placement.student, placement.teacher, placement.training):
        assert len(one.node_selector) == len(one.tolerations) == 1
    assert not placement.cpu.node_selector


def test_argo_cd_is_given_the_script_that_is_tested() -> None:
    (config,) = built(GITOPS / "argocd")
    assert (config["metadata"]["namespace"], config["metadata"]["name"]) == ("argocd", "argocd-cm")
    script = (GITOPS / "argocd/health.lua").read_text()
    assert config["data"] == {"resource.customizations.health.cgd.dev_CGDRun": script}


def test_argo_cd_and_flux_install_a_chart_that_takes_their_values() -> None:
    source = written("argocd/operator.yaml")["Application"]["spec"]["source"]
    release = written("flux/operator.yaml")["HelmRelease"]["spec"]
    for path, values in (
        (source["path"], source["helm"]["valuesObject"]),
        (release["chart"]["spec"]["chart"], release["values"]),
    ):
        assert helm_python.Chart.load(ROOT / path).render(values, name="cgd", namespace="cgd-system")


def test_argo_cd_and_flux_apply_an_overlay_and_flux_waits_for_its_run() -> None:
    flux = written("flux/runs.yaml")["Kustomization"]["spec"]
    argocd = written("argocd/runs.yaml")["Application"]["spec"]["source"]
    (run,) = built(ROOT / argocd["path"])
    assert built(ROOT / flux["path"]) == [run]
    (check,) = flux["healthChecks"]
    assert check == {
        "apiVersion": run["apiVersion"],
        "kind": run["kind"],
        "name": run["metadata"]["name"],
        "namespace": flux["targetNamespace"],
    }


def test_flux_takes_the_chart_and_the_runs_from_the_repository_that_it_knows() -> None:
    operator, runs = written("flux/operator.yaml"), written("flux/runs.yaml")
    known = {"kind": "GitRepository", "name": operator["GitRepository"]["metadata"]["name"]}
    assert operator["HelmRelease"]["spec"]["chart"]["spec"]["sourceRef"] == known
    assert runs["Kustomization"]["spec"]["sourceRef"] == known


def test_flux_makes_the_namespace_and_every_secret_that_the_run_names() -> None:
    objects = written("flux/namespace.yaml")
    flux, runs = objects["Kustomization"], written("flux/runs.yaml")["Kustomization"]
    assert (
        objects["Namespace"]["metadata"]["name"] == flux["spec"]["targetNamespace"] == runs["spec"]["targetNamespace"]
    )
    assert runs["spec"]["dependsOn"] == [{"name": flux["metadata"]["name"]}]
    made = {one["metadata"]["name"]: set(one["stringData"]) for one in built(ROOT / flux["spec"]["path"])}
    (run,) = built(ROOT / runs["spec"]["path"])
    spec = parse_spec(run)
    assert spec.hub_token_secret_ref is not None
    assert spec.storage.credentials_secret_ref is not None
    assert made == {
        spec.storage.credentials_secret_ref.name: {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
        spec.hub_token_secret_ref.name: {spec.hub_token_secret_ref.key},
    }
