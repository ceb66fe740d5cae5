"""The chart, rendered by Helm's own engine: what is in it, what its values refuse, and what Kubernetes says of it."""

import asyncio
import functools
import json
import re
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from prometheus_client import generate_latest

from cgd_operator import metrics
from cgd_operator.api.spec import parse_spec
from cgd_operator.facts.progress import Board
from cgd_operator.http.health import Health
from cgd_operator.http.progress import Desk, ProgressServer
from cgd_operator.planning.manifests import LISTENS
from cgd_operator.status.render import STALLED_AFTER

CHART = Path(__file__).parents[2] / "charts/cgd-operator"
IMAGES: dict[str, Any] = {
    "image": {"repository": "registry.example/cgd-operator"},
    "stageImages": {
        "generate": {"repository": "registry.example/cgd-generate"},
        "train": {"repository": "registry.example/cgd-train", "digest": f"sha256:{'0' * 64}"},
    },
}


def rendered(
    values: dict[str, Any] | None = None, release: str = "cgd", namespace: str = "cgd-system"
) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The chart's objects by kind, namespace and name."""
    texts = helm_python.Chart.load(CHART).render(IMAGES | (values or {}), name=release, namespace=namespace)
    found = [one for path, text in texts.items() if path.endswith(".yaml") for one in yaml.safe_load_all(text) if one]
    objects = {(one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]): one for one in found}
    assert len(objects) == len(found)
    return objects


def only(kind: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    (found,) = (one for (its, _, _), one in rendered(values).items() if its == kind)
    return found


def pod_of(kind: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    """The pod's spec of the Deployment, or of the Pod that `helm test` runs."""
    spec = only(kind, values)["spec"]
    found: dict[str, Any] = spec["template"]["spec"] if kind == "Deployment" else spec
    return found


def container(values: dict[str, Any] | None = None, kind: str = "Deployment") -> dict[str, Any]:
    (found,) = pod_of(kind, values)["containers"]
    assert isinstance(found, dict)
    return found


def test_sigterm_waits_until_the_operator_can_hear_it() -> None:
    assert container()["lifecycle"] == {"preStop": {"exec": {"command": LISTENS}}}


def test_helm_finds_nothing_to_complain_about() -> None:
    told = helm_python.lint(CHART, values=IMAGES)
    assert not [one for one in told["messages"] if one["severity"] > 1], told


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"replicas": 2, "grafana": {"dashboard": {"enabled": True}}},
        {"watchNamespaces": ["team-a", "team-b"], "networkPolicy": {"enabled": False}, "policy": {"enabled": True}},
    ],
)
def test_every_object_is_one_that_kubernetes_takes(values: dict[str, Any]) -> None:
    for (kind, _, _), one in rendered(values).items():
        if kind != "CustomResourceDefinition":
            kubernetes_validate.validate(one, "1.34", strict=True)


def test_what_is_installed() -> None:
    kinds = sorted(kind for kind, _, _ in rendered())
    assert kinds == sorted([
        "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Deployment", "NetworkPolicy", "Pod", "Role",
        "RoleBinding", "Service", "ServiceAccount",
    ])  # fmt: skip


def test_the_crd_is_the_generated_one_and_stays() -> None:
    ours = yaml.safe_load((CHART.parents[1] / "crds/cgdruns.yaml").read_text())
    assert only("CustomResourceDefinition") == ours
    assert ours["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "CustomResourceDefinition" not in {kind for kind, _, _ in rendered({"crds": {"enabled": False}})}


@pytest.mark.parametrize("kind", ["Deployment", "Pod"])
def test_every_pod_passes_the_restricted_standard(kind: str) -> None:
    pod = pod_of(kind)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(kind=kind)["securityContext"] == {
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
        ("Role", "cgd-system"), ("Role", "team-a"), ("Role", "team-b"),
    }  # fmt: skip
    assert not [kind for kind, _, _ in objects if kind == "ClusterRoleBinding"]
    assert container({"watchNamespaces": ["team-a", "team-b"]})["args"] == ["--namespace=team-a", "--namespace=team-b"]


def test_no_rule_has_a_wildcard_and_no_secret_can_be_read() -> None:
    rules = only("ClusterRole")["rules"]
    assert not [rule for rule in rules if "*" in rule["verbs"] + rule["resources"] + rule["apiGroups"]]
    (secrets,) = (rule for rule in rules if "secrets" in rule["resources"])
    assert secrets["verbs"] == ["create"]


@pytest.mark.parametrize(("pods", "verbs"), [(True, {"list", "watch", "create"}), (False, {"list", "watch"})])
def test_pods_are_created_as_a_dry_run_or_not_at_all(pods: bool, verbs: set[str]) -> None:
    values = {"rehearsal": {"pods": pods}}
    (rule,) = (rule for rule in only("ClusterRole", values)["rules"] if "pods" in rule["resources"])
    assert set(rule["verbs"]) == verbs
    env = {one["name"]: one.get("value") for one in container(values)["env"]}
    assert env["CGD_REHEARSE_PODS"] == str(pods).lower()


def test_the_time_that_people_have_is_the_values() -> None:
    env = {one["name"]: one.get("value") for one in container({"stalledAfterSeconds": 3_000_000})["env"]}
    assert env["CGD_STALLED_AFTER_SECONDS"] == "3000000"
    env = {one["name"]: one.get("value") for one in container()["env"]}
    assert env["CGD_STALLED_AFTER_SECONDS"] == f"{STALLED_AFTER.total_seconds():.0f}", "the chart's default is ours"


def test_two_replicas_have_a_budget_that_lets_one_go_and_reach_each_other() -> None:
    assert only("PodDisruptionBudget", {"replicas": 2})["spec"]["maxUnavailable"] == 1
    assert only("Deployment", {"replicas": 2})["spec"]["replicas"] == 2
    policy, selector = only("NetworkPolicy")["spec"], only("Service")["spec"]["selector"]
    operators, port = {"podSelector": {"matchLabels": selector}}, [{"port": "progress"}]
    assert any(operators in rule.get("from", []) and rule["ports"] == port for rule in policy["ingress"])
    assert {"to": [operators], "ports": port} in policy["egress"]


@pytest.mark.parametrize(
    ("release", "values", "name"),
    [
        ("cgd", {}, "cgd-operator"),
        ("cgd-operator", {}, "cgd-operator"),
        ("our-cgd-operator", {}, "our-cgd-operator"),
        ("rat", {}, "rat-cgd-operator"),
        ("team-a", {"nameOverride": "distiller"}, "team-a-distiller"),
        ("cgd", {"fullnameOverride": "distiller"}, "distiller"),
        ("7cgd", {"fullnameOverride": "distiller"}, "distiller"),
    ],
)
def test_what_is_installed_is_named_as_helm_users_expect(release: str, values: dict[str, Any], name: str) -> None:
    names = {kind: its for kind, _, its in rendered(values, release)}
    assert (names["Deployment"], names["Service"], names["Role"]) == (name, name, f"{name}-lease")


def test_releases_of_one_name_in_two_namespaces_share_nothing_but_the_definition() -> None:
    first, second = (set(rendered(namespace=namespace)) for namespace in ("team-a", "team-b"))
    assert first & second == {("CustomResourceDefinition", "", "cgdruns.cgd.dev")}


def test_the_operator_may_own_children_that_block_the_deletion_of_their_run() -> None:
    """OwnerReferencesPermissionEnforcement, on in OpenShift, asks for this right at each child's creation."""
    (role,) = (one for key, one in rendered().items() if key[0] == "ClusterRole")
    assert {"apiGroups": ["cgd.dev"], "resources": ["cgdruns/finalizers"], "verbs": ["update"]} in role["rules"]


def test_a_new_version_waits_for_the_lease_while_the_old_one_works() -> None:
    spec = only("Deployment")["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    assert {"name": "CGD_POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}} in container()["env"]


def test_every_alert_has_a_severity_and_a_page_that_exists() -> None:
    monitoring = {"monitoring": {"rules": True, "serviceMonitor": True, "labels": {"release": "prometheus"}}}
    rules = only("PrometheusRule", monitoring)
    runbook = (CHART.parents[1] / "docs/runbook.md").read_text()
    (group,) = rules["spec"]["groups"]
    for alert in group["rules"]:
        assert alert["labels"]["severity"] in {"info", "warning", "critical"}
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"
        assert f"\n## {alert['alert']}\n" in runbook
    assert rules["metadata"]["labels"]["release"] == "prometheus"
    assert only("ServiceMonitor", monitoring)["spec"]["endpoints"][0]["port"] == "health"


def test_every_metric_of_alerts_and_dashboard_is_one_that_the_operator_has() -> None:
    (group,) = only("PrometheusRule", {"monitoring": {"rules": True}})["spec"]["groups"]
    expressions = [alert["expr"] for alert in group["rules"]]
    expressions += [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    expressions += [one["definition"] for one in dashboard()["templating"]["list"] if one["type"] == "query"]
    named = {name for one in expressions for name in re.findall(r"cgd_\w+", one)}
    page = generate_latest(metrics.REGISTRY).decode()
    offered = {name for kind in re.findall(r"^# TYPE (\w+) (\w+)$", page, re.MULTILINE) for name in series(*kind)}
    assert named <= offered
    shown = {name for panel in dashboard()["panels"] for one in panel["targets"] for name in series_of(one["expr"])}
    assert {base(name) for name in shown} == {base(name) for name in offered if not name.endswith("_created")}


def series(name: str, kind: str) -> list[str]:
    """The names under which a metric of `/metrics` can be asked for."""
    return [f"{name}_{end}" for end in ("bucket", "sum", "count")] if kind == "histogram" else [name]


def series_of(expression: str) -> list[str]:
    return re.findall(r"cgd_\w+", expression)


def base(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)


def dashboard() -> dict[str, Any]:
    """The dashboard that the chart installs when asked to."""
    values = {"grafana": {"dashboard": {"enabled": True, "annotations": {"grafana_folder": "ML"}}}}
    config = only("ConfigMap", values)
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config["metadata"]["annotations"] == {"grafana_folder": "ML"}
    found: dict[str, Any] = json.loads(config["data"]["cgd-operator.json"])
    return found


def test_the_panels_of_the_dashboard_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


async def test_helm_test_asks_the_service_whether_an_operator_leads() -> None:
    asked = only("Service")
    (port,) = (one["port"] for one in asked["spec"]["ports"] if one["name"] == "health")
    python, option, program, url = container(kind="Pod")["command"]
    assert (python, option) == ("python", "-c")
    assert url == f"http://{asked['metadata']['name']}.{asked['metadata']['namespace']}.svc:{port}/leaderz"
    server = ProgressServer()
    health = Health(server.leader_answers)
    await health.start("127.0.0.1", 0)
    codes = []
    for _ in range(2):
        here = f"http://127.0.0.1:{health.port}/leaderz"
        process = await asyncio.create_subprocess_exec(sys.executable, option, program, here, stderr=DEVNULL)
        codes.append(await process.wait())
        server.lead(Desk(Board(), b"key", lambda *_: None))
    await health.stop()
    assert codes == [1, 0]


def test_the_pod_of_helm_test_is_not_taken_for_the_operator() -> None:
    labels = only("Pod")["metadata"]["labels"]
    for selector in (only("Service")["spec"]["selector"], only("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]):
        assert not selector.items() <= labels.items()
    assert only("Pod")["metadata"]["annotations"]["helm.sh/hook"] == "test"


def test_pods_of_the_operator_go_where_the_values_say() -> None:
    place = {
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "dedicated", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
    }
    for kind in ("Deployment", "Pod"):
        assert place.items() <= pod_of(kind, place).items()


def test_what_artifact_hub_shows_is_true() -> None:
    notes = yaml.safe_load((CHART / "Chart.yaml").read_text())["annotations"]
    (kind,) = yaml.safe_load(notes["artifacthub.io/crds"])
    names = only("CustomResourceDefinition")["spec"]
    assert (kind["kind"], kind["name"]) == (
        names["names"]["kind"],
        only("CustomResourceDefinition")["metadata"]["name"],
    )
    assert kind["version"] == names["versions"][0]["name"]
    for example in yaml.safe_load(notes["artifacthub.io/crdsExamples"]):
        assert parse_spec(example)
    for change in yaml.safe_load(notes["artifacthub.io/changes"]):
        assert change["kind"] in {"added", "changed", "deprecated", "removed", "fixed", "security"}


@pytest.mark.parametrize("own", ["", "theirs"])
def test_the_key_of_progress_tokens_is_in_a_secret_that_the_operator_makes_or_somebody_names(own: str) -> None:
    values = {"progress": {"keySecretName": own}, "watchNamespaces": ["team-a"]}
    env = {variable["name"]: variable for variable in container(values)["env"]}
    reference = env["CGD_PROGRESS_KEY"]["valueFrom"]["secretKeyRef"]
    role = rendered(values)["Role", "cgd-system", "cgd-operator-lease"]
    secrets = [rule["verbs"] for rule in role["rules"] if "secrets" in rule["resources"]]
    if own:
        assert reference == {"name": own, "key": "key"}
        assert "CGD_PROGRESS_KEY_SECRET" not in env
        assert secrets == []
    else:
        assert reference == {"name": "cgd-operator-progress-key", "key": "key", "optional": True}
        assert env["CGD_PROGRESS_KEY_SECRET"]["value"] == f"cgd-system/{reference['name']}"
        assert secrets == [["create"]]


@pytest.mark.parametrize("name", ["null", "true", "1234", "1e3", "0x10"])
def test_a_name_that_yaml_takes_for_something_else_stays_a_name(name: str) -> None:
    """A Role whose namespace is null is made in the release's."""
    values: dict[str, Any] = {
        "watchNamespaces": [name],
        "networkPolicy": {"stages": {"enabled": True}},
        "serviceAccount": {"name": name},
        "progress": {"keySecretName": name},
        "priorityClassName": name,
    }
    kinds = ("Role", "RoleBinding", "NetworkPolicy")
    assert {kind for kind, namespace, _ in rendered(values) if namespace == name} == set(kinds)
    spec = pod_of("Deployment", values)
    assert (spec["serviceAccountName"], spec["priorityClassName"]) == (name, name)
    (key,) = (one for one in container(values)["env"] if one["name"] == "CGD_PROGRESS_KEY")
    assert key["valueFrom"] == {"secretKeyRef": {"name": name, "key": "key"}}
    assert container(values)["args"] == [f"--namespace={name}"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"image": {"repository": ""}}, "image.repository is needed"),
        ({"image": {"repository": "x", "digest": "latest"}}, "digest"),
        ({"replicas": 9}, "replicas"),
        ({"watchNamespaces": ["Team A"]}, "watchNamespaces"),
        ({"progress": {"port": 0}}, "port"),
        ({"rehearsal": {"pods": "no"}}, "pods"),
        ({"stalledAfterSeconds": -1}, "stalledAfterSeconds"),
        ({"image": {"repository": "https://r.example/x"}}, "image.repository: 'https://r.example/x' is no repository"),
        ({"image": {"repository": "r.example/x:1.0"}}, "image.repository: .* its tag goes into image.tag"),
        ({"image": {"repository": "r.example/x@sha256:00"}}, "image.repository: .* its digest into image.digest"),
        ({"image": {"repository": "r.example"}}, "image.repository: 'r.example' is no repository"),
        ({"image": {"repository": "x", "tag": ":1.0"}}, "/image/tag"),
        (
            {"stageImages": IMAGES["stageImages"] | {"train": {"repository": "x:1"}}},
            "stageImages.train.repository: 'x:1' is no repository: .* its tag goes into stageImages.train.tag",
        ),
        ({"progress": {"port": 8081}}, "progress.port and health.port are both 8081"),
        ({"progress": {"keySecretName": "Key"}}, "progress.keySecretName: 'Key' is no name"),
        ({"priorityClassName": "high_priority"}, "priorityClassName: 'high_priority' is no name"),
        ({"serviceAccount": {"name": "a/b"}}, "serviceAccount.name: 'a/b' is no name"),
        ({"serviceAccount": {"create": False}}, "serviceAccount.create is false: set serviceAccount.name"),
        ({"imagePullSecrets": [{"name": "Key"}]}, "imagePullSecrets: 'Key' is no name"),
        ({"imagePullSecrets": [{"nam": "key"}]}, "imagePullSecrets/0"),
        ({"policy": {"images": ["registry.example/\nx"]}}, "images"),
        ({"policy": {"secrets": [""]}}, "secrets"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], told: str) -> None:
    with pytest.raises(helm_python.HelmError, match=told):
        rendered(values)


@pytest.mark.parametrize("release", ["7cgd", "our.cgd"])
def test_a_release_whose_name_no_service_can_have_is_refused(release: str) -> None:
    with pytest.raises(helm_python.HelmError, match=f"release name: '{release}-cgd-operator' .* set fullnameOverride"):
        rendered(release=release)


def paths(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Of every value that has a name of its own; keys of labels and the like are the user's."""
    for name, value in values.items():
        yield (name,)
        if isinstance(value, dict) and name not in {"labels", "resources"}:
            yield from ((name, *rest) for rest in paths(value))


def refusal_of_null(above: tuple[str, ...], name: str) -> str:
    """What Helm says when this value is null, or nothing."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for image in (values["image"], *values["stageImages"].values()):
        image["repository"] = "registry.example/image"
    functools.reduce(dict.__getitem__, above, values)[name] = None
    try:
        rendered(values)
    except helm_python.HelmError as error:
        return str(error)
    return ""


def test_null_clears_what_has_free_keys_and_is_refused_by_name_elsewhere() -> None:
    cleared = set()
    for path in paths(yaml.safe_load((CHART / "values.yaml").read_text())):
        above, name = path[:-1], path[-1]
        if told := refusal_of_null(above, name):
            assert f"at '{''.join(f'/{one}' for one in above)}': missing property '{name}'" in told
        else:
            cleared.add(name)
    free = {"labels", "annotations", "resources", "nodeSelector", "affinity", "podAnnotations", "podLabels"}
    assert cleared == free | {"pullPolicy"}


def test_alerts_lead_to_where_the_runbook_is_published() -> None:
    monitoring = {"rules": True, "runbook": "https://docs.example/runbook/"}
    (group,) = only("PrometheusRule", {"monitoring": monitoring})["spec"]["groups"]
    assert group["rules"][0]["annotations"]["runbook_url"] == "https://docs.example/runbook/#cgdoperatorabsent"


def test_what_a_platform_adds_reaches_the_operators_pod_and_nothing_else() -> None:
    spread = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    own = {"labelSelector": {"matchLabels": {"team": "a"}}}
    values = {
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
        "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ca", "readOnly": True}],
        "topologySpreadConstraints": [spread, spread | own],
        "logFormat": "json",
    }
    kubernetes_validate.validate(only("Deployment", values), "1.34", strict=True)
    env = {one["name"]: one.get("value") for one in container(values)["env"]}
    assert (env["HTTPS_PROXY"], env["CGD_LOG_FORMAT"]) == ("http://proxy:3128", "json")
    assert container(values)["volumeMounts"][-1]["mountPath"] == "/etc/ca"
    pod = pod_of("Deployment", values)
    assert [volume["name"] for volume in pod["volumes"]] == ["tmp", "ca"]
    labels = only("Deployment")["spec"]["selector"]["matchLabels"]
    assert pod["topologySpreadConstraints"] == [spread | {"labelSelector": {"matchLabels": labels}}, spread | own]
    assert "CGD_LOG_FORMAT" not in {one["name"] for one in container()["env"]}


@pytest.mark.parametrize(
    "values",
    [
        {"extraEnv": [{"name": "CGD_LEASE", "value": "x"}]},
        {"extraVolumes": [{"name": "tmp", "emptyDir": {}}]},
        {"topologySpreadConstraints": [{"maxSkew": 1}]},
        {"logFormat": "xml"},
        {"monitoring": {"runbook": "https://docs.example/runbook#x"}},
    ],
)
def test_what_would_break_the_operator_is_refused(values: dict[str, Any]) -> None:
    (field,) = values
    with pytest.raises(helm_python.HelmError, match=field):
        rendered(values)


def test_the_charts_readme_names_every_value() -> None:
    readme = (CHART / "README.md").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    listed = set(re.findall(r"^\| `(\w+)`", readme, re.MULTILINE))
    assert listed == set(values)


def test_an_upgrade_to_two_replicas_changes_their_number_and_adds_a_budget() -> None:
    one, two = rendered(), rendered({"replicas": 2})
    assert two.keys() - one.keys() == {("PodDisruptionBudget", "cgd-system", "cgd-operator")}
    assert not one.keys() - two.keys(), (
        "nothing is renamed: an upgrade would delete the old names after the new are there"
    )
    (changed,) = (key for key in one if one[key] != two[key])
    assert changed[0] == "Deployment"
    two[changed]["spec"]["replicas"] = one[changed]["spec"]["replicas"]
    assert one[changed] == two[changed], "the selector of a Deployment cannot change"


def test_the_webhook_comes_from_the_values_or_from_a_secret_and_may_be_reached() -> None:
    def told(webhook: dict[str, Any]) -> dict[str, Any]:
        env = {one["name"]: one.get("value", one.get("valueFrom")) for one in container({"webhook": webhook})["env"]}
        return {name: value for name, value in env.items() if "WEBHOOK" in name}

    assert told({}) == {}
    assert told({"url": "https://hooks.example/x"}) == {"CGD_WEBHOOK_URL": "https://hooks.example/x"}
    keys = told({"secretName": "hook"})
    assert keys["CGD_WEBHOOK_URL"] == {"secretKeyRef": {"name": "hook", "key": "url"}}
    assert keys["CGD_WEBHOOK_AUTHORIZATION"]["secretKeyRef"]["optional"] is True
    policies = [only("NetworkPolicy", {"webhook": webhook}) for webhook in ({}, {"secretName": "hook", "port": 8443})]
    without, with_it = ([rule["ports"] for rule in one["spec"]["egress"]] for one in policies)
    assert with_it == [*without, [{"port": 8443}]]
    with pytest.raises(helm_python.HelmError, match="webhook"):
        rendered({"webhook": {"url": "hooks.example"}})
