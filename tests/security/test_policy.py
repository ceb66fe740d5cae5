"""The chart's policy on a real path: rendered by Helm's engine, installed on the API server, asked by clients."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from support.builders import manifest

from cgd_local import pytorchjobs
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_operator.api.crd import crd
from cgd_operator.controller.reconciler import Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import JOB, NAMESPACE, RUN, ApiError, Kind
from cgd_operator.planning.manifests import FINALIZER, Release

CHART = Path(__file__).parents[2] / "charts/cgd-operator"
KUBECTL = Path(sys.executable).with_name("kubectl")
REGISTRATION = "admissionregistration.k8s.io/v1"
KINDS = {
    kind: Kind(REGISTRATION, kind, f"{kind[:-1].lower()}{end}", namespaced=False)
    for kind, end in (("ValidatingAdmissionPolicy", "ies"), ("ValidatingAdmissionPolicyBinding", "gs"))
}
ALLOWED = {
    "images": ["registry.example.com/cgd/", "registry.example.com/one:1"],
    "serviceAccounts": ["trainer"],
    "secrets": ["s3-keys", "hub"],
    "priorityClasses": ["batch"],
    "tolerations": ["nvidia.com/gpu"],
    "podAnnotations": ["sidecar.istio.io/", "cost"],
    "podLabels": ["team"],
    "env": ["HTTPS_PROXY", "TOKEN"],
    "volumes": ["persistentVolumeClaim/models", "hostPath/mnt/"],
}


def policies(values: dict[str, Any], namespaces: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What the chart renders of the policy: itself and its binding, or nothing."""
    image = {"repository": "registry.example.com/image"}
    images = {"image": image, "stageImages": {"generate": image, "train": image}}
    given = {**images, "policy": values, "watchNamespaces": list(namespaces)}
    texts = helm_python.Chart.load(CHART).render(given, name="cgd", namespace="cgd-system")
    return [one for path, text in texts.items() if path.endswith("policy.yaml") for one in read(text)]


def read(text: str) -> Iterator[dict[str, Any]]:
    return (one for one in yaml.safe_load_all(text) if one and one["kind"] in KINDS)


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    server = ApiServer()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def client(server: ApiServer, tmp_path: Path) -> AsyncIterator[Cluster]:
    path = tmp_path / "kubeconfig"
    path.write_text(server.kubeconfig())
    async with await Cluster.connect(str(path), manager="author") as client:
        await install(client, crd())
        yield client


async def enforce(client: Cluster, namespaces: tuple[str, ...] = (), **allowed: list[str]) -> None:
    objects = policies({"enabled": True, **allowed}, namespaces)
    assert [one["kind"] for one in objects] == list(KINDS)
    for one in objects:
        await client.create(KINDS[one["kind"]], one)


def run(changes: dict[str, Any], **meta: str) -> dict[str, Any]:
    body = manifest(changes, **meta)
    del body["metadata"]["uid"], body["metadata"]["generation"]
    return body


async def refusal(client: Cluster, changes: dict[str, Any]) -> str:
    with pytest.raises(ApiError) as error:
        await client.create(RUN, run(changes))
    assert (error.value.status, error.value.reason) == (422, "Invalid")
    prefix = (
        "ValidatingAdmissionPolicy 'cgd-operator.cgd-system' with binding 'cgd-operator.cgd-system' denied request: "
    )
    assert error.value.message.startswith(f'cgdruns.cgd.dev "demo" is forbidden: {prefix}')
    return error.value.message.partition(prefix)[2]


def toleration(**fields: Any) -> list[dict[str, Any]]:
    return [{"key": "nvidia.com/gpu", "operator": "Exists"}, fields]


def volume(**source: Any) -> dict[str, Any]:
    return {"name": "own", "mountPath": "/data/own", **source}


NAME = "priorityClassName"
KEY = {
    "url": "https://teacher.example.com/v1",
    "model": "m",
    "apiKeySecretRef": {"name": "other-app", "key": "password"},
}
MORE: list[tuple[dict[str, Any], str, str, str]] = [
    ({"images.generate": "elsewhere.example/x"}, "spec.images.generate", "elsewhere.example/x", "images"),
    ({"images.train": "registry.example.com/cgd-x/y"}, "spec.images.train", "registry.example.com/cgd-x/y", "images"),
    ({"images.train": "registry.example.com/one:12"}, "spec.images.train", "/one:12", "images"),
    ({"serviceAccountName": "admin"}, "spec.serviceAccountName", "admin", "serviceAccounts"),
    ({"hubTokenSecretRef": {"name": "db", "key": "k"}}, "spec.hubTokenSecretRef.name", "db", "secrets"),
    ({"storage.credentialsSecretRef": {"name": "db"}}, "spec.storage.credentialsSecretRef.name", "db", "secrets"),
    ({"teacher": {"endpoint": KEY}}, "spec.teacher.endpoint.apiKeySecretRef.name", "other-app", "secrets"),
    *(
        ({f"placement.{pool}.{NAME}": "top"}, f"spec.placement.{pool}.{NAME}", "top", "priorityClasses")
        for pool in ("student", "teacher", "training", "cpu")
    ),
    *(
        ({f"placement.{pool}.tolerations": toleration(**one)}, f"spec.placement.{pool}.tolerations", key, "tolerations")
        for pool in ("student", "teacher", "training", "cpu")
        for one, key in (
            ({"key": "control-plane"}, "control-plane"),
            ({"operator": "Exists"}, "''"),
            ({"key": None, "operator": "Exists"}, "''"),
        )
    ),
    ({"podMetadata.annotations": {"cost": "1", "k8s.v1.cni.cncf.io/networks": "n"}}, "spec.podMetadata.annotations",
     "k8s.v1.cni.cncf.io/networks", "podAnnotations"),
    ({"podMetadata.annotations": {"costs": "1"}}, "spec.podMetadata.annotations", "costs", "podAnnotations"),
    ({"podMetadata.labels": {"app": "shop"}}, "spec.podMetadata.labels", "app", "podLabels"),
    ({"pods.env": [{"name": "LD_PRELOAD", "value": "/x.so"}]}, "spec.pods.env", "LD_PRELOAD", "env"),
    ({"pods.env": [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "db", "key": "k"}}}]}, "spec.pods.env",
     "db", "secrets"),
    ({"pods.imagePullSecrets": [{"name": "db"}]}, "spec.pods.imagePullSecrets", "db", "secrets"),
    ({"pods.volumes": [volume(secret={"secretName": "db"})]}, "spec.pods.volumes", "db", "secrets"),
    ({"pods.volumes": [volume(configMap={"name": "code"})]}, "spec.pods.volumes", "configMap/code", "volumes"),
    ({"pods.volumes": [volume(hostPath={"path": "/etc/kubernetes"})]}, "spec.pods.volumes",
     "hostPath/etc/kubernetes", "volumes"),
    ({"modelCache": {"hostPath": {"path": "/mntx"}}}, "spec.modelCache", "hostPath/mntx", "volumes"),
    ({"modelCache": {"persistentVolumeClaim": {"claimName": "db"}}}, "spec.modelCache", "persistentVolumeClaim/db",
     "volumes"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "field", "value", "list_of"), MORE)
async def test_a_run_that_names_more_is_refused_with_field_value_and_what_is_allowed(
    client: Cluster, changes: dict[str, Any], field: str, value: str, list_of: str
) -> None:
    await enforce(client, **ALLOWED)
    told = await refusal(client, changes)
    assert told.startswith(f"{field}: ")
    assert value in told
    assert (
        f"choose from {', '.join(ALLOWED[list_of])}, or ask who installed cgd-operator to add it to policy.{list_of}"
        in told
    )


async def test_what_is_allowed_or_left_out_is_not_refused(client: Cluster) -> None:
    await enforce(client, **ALLOWED)
    await client.create(RUN, run({}, name="plain"))
    await client.create(
        RUN,
        run({
            "images": {"generate": "registry.example.com/cgd/own:1", "train": "registry.example.com/one:1"},
            "serviceAccountName": "trainer",
            "hubTokenSecretRef": {"name": "hub", "key": "token"},
            "storage.credentialsSecretRef": {"name": "s3-keys"},
            "placement.training": {"priorityClassName": "batch", "tolerations": [{"key": "nvidia.com/gpu"}]},
            "podMetadata": {"annotations": {"sidecar.istio.io/inject": "false", "cost": "1"}, "labels": {"team": "a"}},
            "pods.env": [
                {"name": "HTTPS_PROXY", "value": "http://proxy:3128"},
                {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "k"}}},
            ],
            "pods.volumes": [volume(hostPath={"path": "/mnt/data"})],
            "pods.imagePullSecrets": [{"name": "hub"}],
            "modelCache": {"persistentVolumeClaim": {"claimName": "models"}},
        }),
    )  # fmt: skip


@pytest.mark.parametrize("changes", [changes for changes, *_ in MORE])
async def test_an_empty_list_allows_nothing_and_a_star_everything(client: Cluster, changes: dict[str, Any]) -> None:
    await enforce(client)
    assert "leave it out, or ask who installed cgd-operator to add it to policy." in await refusal(client, changes)
    for one in policies({"enabled": True, **{name: ["*"] for name in ALLOWED}})[:1]:
        await client.apply(KINDS[one["kind"]], one)
    await client.create(RUN, run(changes))


async def test_kubectl_prints_the_message_and_creates_nothing(
    client: Cluster, server: ApiServer, tmp_path: Path
) -> None:
    await enforce(client, **ALLOWED)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run({"serviceAccountName": "admin"})))
    command = [KUBECTL, f"--kubeconfig={tmp_path / 'kubeconfig'}", "apply", "-f", tmp_path / "run.yaml"]
    done = await in_a_thread(command, tmp_path)
    assert done.returncode == 1
    assert "spec.serviceAccountName: 'admin' is not allowed; choose from trainer, or ask who" in done.stderr
    assert await client.get(RUN, "demo", "default") is None


async def in_a_thread(command: list[Any], home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HOME": str(home), "KUBECACHEDIR": str(home / "cache")}
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, env=environment, check=False
    )


async def test_a_run_from_before_the_policy_lives_and_dies_as_before(client: Cluster) -> None:
    """Its status, its finalizer, its suspension and its deletion are none of the policy's business."""
    changes = {"serviceAccountName": "default", "images.generate": "elsewhere.example/x", "deletionPolicy": "Delete"}
    await client.create(RUN, run(changes))
    await enforce(client)
    reconciler = Reconciler(client, Release("generate", "train"), Board(), b"key")
    await reconciler.reconcile("default", "demo")
    found = await client.get(RUN, "demo", "default")
    assert found is not None
    assert FINALIZER in found["metadata"]["finalizers"]
    assert found["status"]["state"]
    await client.patch(RUN, "demo", "default", {"spec": {"suspend": True}, "metadata": {"labels": {"a": "b"}}})
    await client.delete(RUN, "demo", "default")
    await reconciler.reconcile("default", "demo")
    (cleaning,) = (one for one in (await client.list(JOB, "default"))[0] if "clean" in one["metadata"]["name"])
    ended = {"status": {"conditions": [{"type": "Complete", "status": "True"}], "succeeded": 1}}
    await client.patch(JOB, cleaning["metadata"]["name"], "default", ended, subresource="status")
    await reconciler.reconcile("default", "demo")
    assert await client.get(RUN, "demo", "default") is None


@pytest.mark.parametrize("changes", [changes for changes, *_ in MORE])
async def test_what_a_policy_looks_at_cannot_be_brought_in_later(client: Cluster, changes: dict[str, Any]) -> None:
    await enforce(client, **ALLOWED)
    await client.create(RUN, run({}))
    with pytest.raises(ApiError, match="cannot change: apply a new CGDRun"):
        await client.patch(RUN, "demo", "default", {"spec": run(changes)["spec"]})


async def test_where_namespaces_are_named_others_are_not_judged(client: Cluster) -> None:
    for name in ("team-a", "team-b"):
        await client.create(NAMESPACE, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    await enforce(client, ("team-a",))
    await client.create(RUN, run({"serviceAccountName": "admin"}, namespace="team-b"))
    with pytest.raises(ApiError, match="denied request"):
        await client.create(RUN, run({"serviceAccountName": "admin"}, namespace="team-a"))


NEVER = ["", "a*", "^a.*", "a b", "a, b", "a//", "/a", 'a"] + ["b', "a\\", "a'b", "$(a)", "{{ a }}", "<a>", "é"]
IMAGES_NEVER = ["registry.example.com/*", "https://registry.example.com/", "registry.example.com/cgd-train",
                "registry.example.com:5000", "registry.example.com/train@sha256:0123", "train"]  # fmt: skip
NAMES_NEVER = ["S3_Keys", "team/", "-a"]


@pytest.mark.parametrize(
    ("list_of", "entries"),
    [(name, NEVER) for name in ALLOWED]
    + [("images", IMAGES_NEVER), ("tolerations", ["nvidia.com/*"])]
    + [(name, NAMES_NEVER) for name in ("serviceAccounts", "secrets", "priorityClasses")],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_an_entry_that_no_run_can_match_is_refused_by_name(list_of: str, entries: list[str], enabled: bool) -> None:
    for entry in entries:
        with pytest.raises(helm_python.HelmError, match=rf"policy[./]{list_of}") as error:
            policies({"enabled": enabled, list_of: [*ALLOWED[list_of], entry]})
        assert not entry or f"'{entry}' is no " in str(error.value)


@pytest.mark.parametrize(
    ("list_of", "entries"),
    [
        ("images", ["team/", "localhost:5000/", "r.example:5000/a/b:1.0", f"r.example/a:1@sha256:{'0' * 64}", "a:1"]),
        ("secrets", ["a", "0a.b-c"]),
        ("tolerations", ["dedicated", "node.kubernetes.io/not-ready", "Pool_A"]),
    ],
)
def test_an_entry_that_a_run_can_match_is_taken(list_of: str, entries: list[str]) -> None:
    assert policies({"enabled": True, list_of: entries})


def test_there_is_no_policy_unless_it_is_asked_for() -> None:
    assert policies({}) == []


@pytest.mark.parametrize("values", [{"image": []}, {"images": "all"}, {"secrets": [""]}, {"enabled": "yes"}])
def test_wrong_values_are_refused_by_the_schema(values: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmError, match="policy"):
        policies(values)


def dangerous(schema: dict[str, Any], path: str) -> Iterator[str]:
    """Fields of a run that name an image, an account, a Secret, a priority, a taint, a volume, a variable, or mark a
    pod."""
    for name, part in schema.get("properties", {}).items():
        here = f"{path}.{name}"
        if name.endswith("SecretRef"):
            yield f"{here}.name"
        if path in ("spec.images", "spec.podMetadata", "spec.pods") or name in (
            "modelCache",
            "serviceAccountName",
            "priorityClassName",
            "tolerations",
        ):
            yield here
        yield from dangerous(part, here)


def test_no_field_of_such_a_kind_is_forgotten() -> None:
    schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    text = yaml.safe_dump(policies({"enabled": True})[0], width=10_000)
    found = list(dangerous(schema, "spec"))
    assert len(found) == 20
    assert [field for field in found if f'"{field}"' not in text] == []


def test_lists_are_of_one_type() -> None:
    """Else the real API server refuses the policy, as cel-go does with its options; the local one checks no types."""
    for variable in policies({"enabled": True})[0]["spec"]["variables"]:
        second = re.findall(r'"spec[\w.]*", (\w+\()', variable["expression"])
        assert second
        assert set(second) <= {"string(", "has("}


async def test_a_policy_of_the_cluster_about_pods_is_told_before_the_run_begins(client: Cluster) -> None:
    """One that the cluster's own admins have made, which the operator meets with its dry runs."""
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    spec = {
        "matchConstraints": {"resourceRules": [rule]},
        "validations": [{"expression": "has(object.metadata.labels.team)", "message": "pods need the label team"}],
    }
    for kind, body in zip(KINDS, (spec, {"policyName": "team", "validationActions": ["Deny"]}), strict=True):
        await client.create(
            KINDS[kind], {"apiVersion": REGISTRATION, "kind": kind, "metadata": {"name": "team"}, "spec": body}
        )
    await install(client, pytorchjobs.crd())
    await client.create(RUN, run({}))
    await Reconciler(client, Release("generate", "train"), Board(), b"key").reconcile("default", "demo")
    found = await client.get(RUN, "demo", "default")
    assert found is not None
    (stalled,) = (one for one in found["status"]["conditions"] if one["type"] == "Stalled")
    assert stalled["reason"] == "ChildRefused"
    assert "pods need the label team; change what the policy names (spec.podMetadata" in stalled["message"]
    assert (await client.list(JOB, "default"))[0] == []
