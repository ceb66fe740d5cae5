"""The operator under the rights that the chart gives it: a call that they do not allow is answered with 403."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from aiohttp import web
from support.builders import CHILDREN
from support.kueue_player import QUEUE, Kueue
from support.pod_player import ago, in_an_hour, make_pod

from cgd_operator.kube.client import Cluster
from cgd_operator.kube.clock import Clock
from cgd_operator.kube.kinds import NAMESPACE, POD, RUN, WORKLOADS, Kind
from cgd_operator.planning.manifests import KINDS

CHART = Path(__file__).parents[2] / "charts/cgd-operator"
TOKEN = "the-operator"
VERBS = {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}
RBAC = "rbac.authorization.k8s.io/v1"
RIGHTS = {
    "ServiceAccount": Kind("v1", "ServiceAccount", "serviceaccounts"),
    "Role": Kind(RBAC, "Role", "roles"),
    "RoleBinding": Kind(RBAC, "RoleBinding", "rolebindings"),
    "ClusterRole": Kind(RBAC, "ClusterRole", "clusterroles", namespaced=False),
    "ClusterRoleBinding": Kind(RBAC, "ClusterRoleBinding", "clusterrolebindings", namespaced=False),
}


def rendered(namespaces: list[str], pods: bool = True, **more: Any) -> list[dict[str, Any]]:
    """The chart's objects; `pods`: whether the operator may create some as a dry run."""
    images = {"repository": "registry.example/image"}
    values = {
        "image": images,
        "stageImages": {"generate": images, "train": images},
        "watchNamespaces": namespaces,
        "rehearsal": {"pods": pods},
        **more,
    }
    texts = helm_python.Chart.load(CHART).render(values, name="cgd", namespace="cgd-system")
    return [one for path, text in texts.items() if path.endswith(".yaml") for one in yaml.safe_load_all(text) if one]


def environment(objects: list[dict[str, Any]], name: str) -> str:
    (deployment,) = (one for one in objects if one["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return str(next(one["value"] for one in container["env"] if one["name"] == name))


class Account:
    """The chart's ServiceAccount and rights on a real API server, whose audit log lists what it refuses."""

    def __init__(self, log: Path, name: str) -> None:
        self._log, self._name = log, name

    @classmethod
    async def made(cls, client: Cluster, objects: list[dict[str, Any]], log: Path) -> tuple["Account", str]:
        """With a token of the account."""
        for one in objects:
            if kind := RIGHTS.get(one["kind"]):
                await client.create(kind, one)
        (account,) = (one["metadata"] for one in objects if one["kind"] == "ServiceAccount")
        asking = Kind("v1", "TokenRequest", f"serviceaccounts/{account['name']}/token")
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": asking.kind, "spec": {}}
        told = await client.create(asking, body | {"metadata": {"namespace": account["namespace"]}})
        user = f"system:serviceaccount:{account['namespace']}:{account['name']}"
        return cls(log, user), told["status"]["token"]

    @property
    def denied(self) -> list[str]:
        return [f"{verb} {resource} in {namespace}" for verb, resource, namespace, code in self._calls() if code == 403]

    @property
    def allowed(self) -> set[tuple[str, str]]:
        return {(verb, resource) for verb, resource, _, code in self._calls() if code < 400}

    def _calls(self) -> Iterator[tuple[str, str, str, int]]:
        for line in self._log.read_text().splitlines():
            call = json.loads(line)
            if call["user"]["username"] == self._name and call["stage"] == "ResponseComplete" and "objectRef" in call:
                what = call["objectRef"]
                resource = "/".join(filter(None, (what["resource"], what.get("subresource"))))
                yield call["verb"], resource, what.get("namespace", ""), call["responseStatus"]["code"]


class Guard:
    """Authorises what comes with the operator's token, as an API server with RBAC does, and lists what it refuses."""

    def __init__(self, objects: list[dict[str, Any]]) -> None:
        self.rules: dict[str, list[dict[str, Any]]] = {}
        """By namespace; those of the ClusterRole under ""."""
        for one in objects:
            if one["kind"] in {"Role", "ClusterRole"}:
                self.rules.setdefault(one["metadata"].get("namespace", ""), []).extend(one["rules"])
        self.denied: list[str] = []
        self.allowed: set[tuple[str, str]] = set()

    def __call__(self, request: web.Request) -> web.Response | None:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return None
        match request.path.strip("/").split("/"):
            case ["api", _, *rest]:
                group = ""
            case ["apis", group, _, *rest]:
                pass
            case _:
                return None  # discovery is everyone's
        namespace = ""
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            _, namespace, *rest = rest
        if not rest:
            return None
        resource, named = "/".join([rest[0], *rest[2:]]), len(rest) > 1
        reading = "get" if named else "watch" if request.query.get("watch") in {"true", "True", "1"} else "list"
        verb = VERBS.get(request.method, reading)
        self.allowed.add((verb, resource))
        if any(
            verb in rule["verbs"]
            and group in rule["apiGroups"]
            and resource in rule["resources"]
            and rest[1:2] in [[], *([name] for name in rule.get("resourceNames", rest[1:2]))]
            for scope in {"", namespace}
            for rule in self.rules.get(scope, [])
        ):
            return None
        self.denied.append(f"{verb} {group}/{resource} in {namespace or 'all namespaces'}")
        words = {"kind": "Status", "status": "Failure", "code": 403, "reason": "Forbidden", "message": "not allowed"}
        return web.json_response(words, status=403)


async def restricted(world: Any, objects: list[dict[str, Any]]) -> tuple[Guard | Account, str]:
    """Have the server hold a user to the chart's rights: who lists its calls, and its token."""
    if not world.is_embedded:
        return await Account.made(world.client, objects, world.kubeconfig.parent / "audit.jsonl")
    world.embedded.fault = guard = Guard(objects)
    return guard, TOKEN


async def confine(
    world: Any, objects: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Guard | Account:
    """Let the operator be the chart's ServiceAccount."""
    await world.client.create(NAMESPACE, {"metadata": {"name": "cgd-system"}, "apiVersion": "v1", "kind": "Namespace"})
    guard, token = await restricted(world, objects)
    own = yaml.safe_load(world.kubeconfig.read_text())
    own["users"][0]["user"] = {"token": token}
    (folder / "operator.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setenv("KUBECONFIG", str(folder / "operator.yaml"))
    for name in ("CGD_LEASE", "CGD_PROGRESS_KEY_SECRET", "CGD_REHEARSE_PODS", "CGD_STALLED_AFTER_SECONDS"):
        monkeypatch.setenv(name, environment(objects, name))
    return guard


@pytest.mark.parametrize("replace", [True, False])
async def test_pods_of_lost_nodes_are_deleted_only_with_the_right_that_the_chart_leaves_out(
    world: Any, replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cgd_operator.controller.queue.SWEEP_SECONDS", 0.1)
    monkeypatch.setattr(Clock, "now", in_an_hour)
    guard = await confine(world, rendered([], lostPods={"replace": replace}), tmp_path, monkeypatch)

    async def is_gone() -> bool:
        return await world.client.get(POD, "pod", "default") is None

    async def says_what_it_needs() -> bool:
        conditions = (await world.get()).get("status", {}).get("conditions", [])
        return any(one["type"] == "Stalled" and "lostPods.replace=true" in one["message"] for one in conditions)

    async with world.operator():
        run = await world.apply({"replaceLostPodsAfterSeconds": 60})
        await world.end("prepare")
        await make_pod(world, run, phase="Running", startTime=ago(60))
        await world.client.delete(POD, "pod", "default", grace=30)
        await world.until(is_gone if replace else says_what_it_needs)
    assert bool(guard.denied) is not replace
    assert await is_gone() is replace


@pytest.mark.parametrize(
    ("namespaces", "backend", "queue", "pods"),
    [
        ([], "PyTorchJob", QUEUE, True),
        (["default"], "TrainJob", QUEUE, True),
        (["default"], "PyTorchJob", {}, True),
        (["default"], "TrainJob", {}, False),
    ],
)
async def test_no_call_of_a_whole_run_is_denied(
    world: Any,
    namespaces: list[str],
    backend: str,
    queue: dict[str, str],
    pods: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cgd_operator.facts.waiting.QUIET", timedelta(minutes=-1))
    guard = await confine(world, rendered(namespaces, pods), tmp_path, monkeypatch)

    async def queued(stage: str) -> bool:
        child = (await world.children()).get(stage)
        workloads = (await world.client.list(WORKLOADS[0], "default"))[0]
        jobs = [one["metadata"]["labels"]["kueue.x-k8s.io/job-uid"] for one in workloads]
        return child is not None and child["metadata"]["uid"] in jobs

    async def reached(state: str) -> bool:
        return bool(await world.state() == state)

    async def has_asked_why() -> bool:
        return ("list", "events") in guard.allowed

    async def gone() -> bool:
        return await world.client.get(RUN, "demo", "default") is None

    async with Kueue(world).at_work() if queue else nullcontext(), world.operator(tuple(namespaces)):
        await world.apply({"training.backend": backend}, labels=queue)
        await world.until(has_asked_why)
        await world.end("prepare")
        if queue:
            await world.until(lambda: queued("answer"))
            await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
            await world.until(lambda: reached("Suspended"))
            await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": False}})
        await world.play(*CHILDREN[1:])
        await world.until(lambda: reached("Succeeded"))
        away = {"ttlSecondsAfterFinished": 0, "deletionPolicy": "Delete"}
        await world.client.patch(RUN, "demo", "default", {"spec": away})
        await world.end("clean")
        await world.until(gone)
    assert guard.denied == []
    needed = {
        ("create", "events"),
        ("create", "leases"),
        ("patch", "leases"),
        ("create", "secrets"),
        ("patch", "cgdruns/status"),
        ("delete", "cgdruns"),
        ("patch", "cgdruns"),
        ("delete", KINDS[backend].plural),
        ("create", KINDS[backend].plural),
    } | ({("list", "workloads"), ("patch", "workloads")} if queue else set())
    assert needed <= guard.allowed
    assert (("create", "pods") in guard.allowed) == pods
