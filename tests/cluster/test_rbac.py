"""The operator under the rights that the chart gives it: a call that they do not allow is answered with 403."""

from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from aiohttp import web
from builders import CHILDREN

from cgd_operator.cluster import PYTORCHJOB, RUN

pytestmark = pytest.mark.parametrize("world", ["embedded"], indirect=True)

CHART = Path(__file__).parents[2] / "charts/cgd-operator"
TOKEN = "the-operator"
VERBS = {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}


def rules(namespaces: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The chart's rules by namespace; those of the ClusterRole under ""."""
    images = {"repository": "registry.example/image"}
    values = {"image": images, "stageImages": {"generate": images, "train": images}, "watchNamespaces": namespaces}
    texts = helm_python.Chart.load(CHART).render(values, name="cgd", namespace="cgd-system")
    found = [one for text in texts.values() if "Role" in text for one in yaml.safe_load_all(text) if one]
    return {
        one["metadata"].get("namespace", ""): one["rules"] for one in found if one["kind"] in {"Role", "ClusterRole"}
    }


class Guard:
    """Authorises what comes with the operator's token, as an API server with RBAC does, and lists what it refuses."""

    def __init__(self, namespaces: list[str]) -> None:
        self.rules = rules(namespaces)
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
            verb in rule["verbs"] and group in rule["apiGroups"] and resource in rule["resources"]
            for scope in {"", namespace}
            for rule in self.rules.get(scope, [])
        ):
            return None
        self.denied.append(f"{verb} {group}/{resource} in {namespace or 'all namespaces'}")
        words = {"kind": "Status", "status": "Failure", "code": 403, "reason": "Forbidden", "message": "not allowed"}
        return web.json_response(words, status=403)


@pytest.mark.parametrize("namespaces", [[], ["default"]])
async def test_no_call_of_a_whole_run_is_denied(
    world: Any, namespaces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard(namespaces)
    world.embedded.fault = guard
    own = yaml.safe_load(world.kubeconfig.read_text())
    own["users"][0]["user"] = {"token": TOKEN}
    (tmp_path / "operator.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "operator.yaml"))

    async def started(stage: str) -> bool:
        return stage in await world.children()

    async def reached(state: str) -> bool:
        return bool(await world.state() == state)

    async with world.operator(tuple(namespaces)):
        await world.apply()
        await world.end("prepare")
        await world.until(lambda: started("answer"))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(lambda: reached("Suspended"))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": False}})
        await world.play(*CHILDREN[1:])
        await world.until(lambda: reached("Succeeded"))
    assert guard.denied == []
    needed = {("create", "events"), ("patch", "secrets"), ("patch", "cgdruns/status"), ("create", PYTORCHJOB.plural)}
    assert needed <= guard.allowed
