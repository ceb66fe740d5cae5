"""The chart, rendered by Helm's own engine: what is in it, what its values refuse, and what Kubernetes says of it."""

import re
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from cgd_operator import metrics

CHART = Path(__file__).parents[2] / "charts/cgd-operator"
IMAGES: dict[str, Any] = {
    "image": {"repository": "registry.example/cgd-operator"},
    "stageImages": {
        "generate": {"repository": "registry.example/cgd-generate"},
        "train": {"repository": "registry.example/cgd-train", "digest": f"sha256:{'0' * 64}"},
    },
}


def rendered(values: dict[str, Any] | None = None) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The chart's objects by kind, namespace and name, as release `cgd` in namespace `cgd-system`."""
    texts = helm_python.Chart.load(CHART).render(IMAGES | (values or {}), name="cgd", namespace="cgd-system")
    found = [one for path, text in texts.items() if path.endswith(".yaml") for one in yaml.safe_load_all(text) if one]
    objects = {(one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]): one for one in found}
    assert len(objects) == len(found)
    return objects


def only(kind: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    (found,) = (one for (its, _, _), one in rendered(values).items() if its == kind)
    return found


def container(values: dict[str, Any] | None = None) -> dict[str, Any]:
    (found,) = only("Deployment", values)["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def test_helm_finds_nothing_to_complain_about() -> None:
    told = helm_python.lint(CHART, values=IMAGES)
    assert not [one for one in told["messages"] if one["severity"] > 1], told


@pytest.mark.parametrize(
    "values", [{}, {"replicas": 2}, {"watchNamespaces": ["team-a", "team-b"], "networkPolicy": {"enabled": False}}]
)
def test_every_object_is_one_that_kubernetes_takes(values: dict[str, Any]) -> None:
    for (kind, _, _), one in rendered(values).items():
        if kind != "CustomResourceDefinition":
            kubernetes_validate.validate(one, "1.34", strict=True)


def test_what_is_installed() -> None:
    kinds = sorted(kind for kind, _, _ in rendered())
    assert kinds == sorted([
        "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Deployment", "NetworkPolicy", "Role",
        "RoleBinding", "Service", "ServiceAccount",
    ])  # fmt: skip


def test_the_crd_is_the_generated_one_and_stays() -> None:
    ours = yaml.safe_load((CHART.parents[1] / "crds/cgdruns.yaml").read_text())
    assert only("CustomResourceDefinition") == ours
    assert ours["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "CustomResourceDefinition" not in {kind for kind, _, _ in rendered({"crds": {"enabled": False}})}


def test_the_pod_passes_the_restricted_standard() -> None:
    pod = only("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not pod.get("hostNetwork")


def test_images_are_taken_by_digest_where_there_is_one() -> None:
    env = {one["name"]: one.get("value") for one in container()["env"]}
    assert container()["image"] == "registry.example/cgd-operator:0.1.0"
    assert env["CGD_GENERATE_IMAGE"] == "registry.example/cgd-generate:0.1.0"
    assert env["CGD_TRAIN_IMAGE"] == f"registry.example/cgd-train@sha256:{'0' * 64}"


def test_stage_pods_reach_the_progress_server_through_the_service() -> None:
    values = {"progress": {"port": 9000}}
    env = {one["name"]: one.get("value") for one in container(values)["env"]}
    service = only("Service", values)
    assert env["CGD_PROGRESS_URL"] == f"http://{service['metadata']['name']}.cgd-system.svc:9000"
    assert env["CGD_PROGRESS_BIND"] == "0.0.0.0:9000"
    labels = only("Deployment", values)["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_chosen_namespaces_need_no_rights_on_others() -> None:
    objects = rendered({"watchNamespaces": ["team-a", "team-b"]})
    roles = {key: one["rules"] for key, one in objects.items() if key[0] in {"Role", "ClusterRole"}}
    assert {(kind, namespace) for kind, namespace, _ in roles} == {
        ("ClusterRole", ""), ("Role", "cgd-system"), ("Role", "team-a"), ("Role", "team-b"),
    }  # fmt: skip
    wide = next(rules for (kind, _, _), rules in roles.items() if kind == "ClusterRole")
    assert {verb for rule in wide for verb in rule["verbs"]} == {"list", "watch"}
    assert container({"watchNamespaces": ["team-a", "team-b"]})["args"] == ["--namespace=team-a", "--namespace=team-b"]


def test_no_rule_has_a_wildcard_and_no_secret_can_be_read() -> None:
    rules = only("ClusterRole")["rules"]
    assert not [rule for rule in rules if "*" in rule["verbs"] + rule["resources"] + rule["apiGroups"]]
    (secrets,) = (rule for rule in rules if "secrets" in rule["resources"])
    assert set(secrets["verbs"]) == {"create", "patch"}


def test_two_replicas_have_a_budget_that_lets_one_go() -> None:
    assert only("PodDisruptionBudget", {"replicas": 2})["spec"]["maxUnavailable"] == 1
    assert only("Deployment", {"replicas": 2})["spec"]["replicas"] == 2


def test_every_alert_has_a_severity_and_a_page_that_exists() -> None:
    monitoring = {"monitoring": {"rules": True, "serviceMonitor": True, "labels": {"release": "prometheus"}}}
    rules = only("PrometheusRule", monitoring)
    runbook = (CHART.parents[1] / "docs/runbook.md").read_text()
    (group,) = rules["spec"]["groups"]
    for alert in group["rules"]:
        assert alert["labels"]["severity"] in {"info", "warning", "critical"}
        assert alert["annotations"]["runbook"] == f"docs/runbook.md#{alert['alert'].lower()}"
        assert f"\n## {alert['alert']}\n" in runbook
    assert rules["metadata"]["labels"]["release"] == "prometheus"
    assert only("ServiceMonitor", monitoring)["spec"]["endpoints"][0]["port"] == "health"


def test_every_metric_of_an_alert_is_one_that_the_operator_has() -> None:
    (group,) = only("PrometheusRule", {"monitoring": {"rules": True}})["spec"]["groups"]
    known = {metric.name for metric in metrics.REGISTRY.collect()}
    for alert in group["rules"]:
        for name in re.findall(r"cgd_\w+", alert["expr"]):
            assert name.removesuffix("_total") in known


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"image": {"repository": ""}}, "image.repository is needed"),
        ({"image": {"repository": "x", "digest": "latest"}}, "digest"),
        ({"replicas": 9}, "replicas"),
        ({"watchNamespaces": ["Team A"]}, "watchNamespaces"),
        ({"progress": {"port": 0}}, "port"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], told: str) -> None:
    with pytest.raises(helm_python.HelmError, match=told):
        rendered(values)
