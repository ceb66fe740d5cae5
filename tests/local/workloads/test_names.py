"""DNS of headless Services: which names pods find, and when."""

from typing import Any

import pytest
from support.local_world import World, container, phase, true

from cgd_local.controllers import SERVICE
from cgd_local.names import found_in
from cgd_local.pods import pod_namespace
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import CONFIGMAP, POD, PYTORCHJOB, TRAINJOB

pytestmark = pytest.mark.asyncio(loop_scope="session")
as_root = pytest.mark.skipif(pod_namespace() != "own", reason="only root can give pods names of their own")

BEHIND = {"app": "x"}
WAIT = "sleep 60"


def service(name: str = "s", namespace: str = "n", **spec: Any) -> Object:
    spec = {"clusterIP": "None", "selector": BEHIND} | spec
    return {"metadata": {"name": name, "namespace": namespace}, "spec": spec}


def pod(*, ready: bool = True, phase: str = "Running", namespace: str = "n", labels: Any = None, **spec: Any) -> Object:
    meta = {"name": "p", "namespace": namespace, "labels": BEHIND if labels is None else labels}
    conditions = [{"type": "Ready", "status": str(ready)}]
    return {"metadata": meta, "spec": spec, "status": {"phase": phase, "podIP": "127.0.0.1", "conditions": conditions}}


async def test_a_service_is_found_by_its_short_and_long_names_and_from_elsewhere_by_the_long_ones() -> None:
    long = ["s.n", "s.n.svc", "s.n.svc.cluster.local"]
    assert found_in("n", [service()], [pod()]) == ["s", *long]
    assert found_in("other", [service()], [pod()]) == long


@pytest.mark.parametrize(
    "behind",
    [
        None,
        pod(labels={"app": "y"}),
        pod(namespace="other"),
        pod(ready=False),
        pod(phase="Succeeded"),
        {**pod(), "status": {"phase": "Pending"}},
        {**pod(), "metadata": pod()["metadata"] | {"deletionTimestamp": "2026-01-01T00:00:00Z"}},
    ],
    ids=["no pod", "another label", "another namespace", "not ready", "over", "no address", "leaving"],
)
async def test_there_must_be_a_ready_pod_behind_it(behind: Object | None) -> None:
    assert found_in("n", [service()], [behind] if behind else []) == []


async def test_a_pod_need_not_be_ready_where_the_service_says_so_but_must_have_an_address() -> None:
    lenient = service(publishNotReadyAddresses=True)
    assert "s" in found_in("n", [lenient], [pod(ready=False)])
    assert found_in("n", [lenient], [pod(phase="Failed")]) == []
    assert found_in("n", [lenient], [{**pod(), "status": {"phase": "Pending"}}]) == []


async def test_a_pod_below_its_subdomain_has_a_name_of_its_own() -> None:
    assert "h.s.n.svc" in found_in("n", [service()], [pod(hostname="h", subdomain="s")])
    assert "h.s" not in found_in("n", [service()], [pod(hostname="h", subdomain="another")])


@pytest.mark.parametrize("spec", [{"clusterIP": "10.0.0.1"}, {"selector": None}])
async def test_other_services_are_not_found(spec: dict[str, Any]) -> None:
    assert found_in("n", [service(**spec)], [pod()]) == []


@as_root
async def test_a_pod_finds_a_service_as_long_as_a_ready_pod_is_behind_it(world: World) -> None:
    look = "until getent hosts s; do sleep 0.02; done; touch $HOME/found; while getent hosts s; do sleep 0.02; done"
    await world.pod(look, "seeker")
    await world.running("seeker")
    await world.make(SERVICE, "s", spec={"clusterIP": "None", "selector": BEHIND})
    await world.pod(WAIT, "other")
    await world.running("other")
    assert not (world.folder("seeker") / "found").exists()
    await world.client.patch(POD, "other", world.namespace, {"metadata": {"labels": BEHIND}})
    await world.written("found", "seeker")
    await world.client.delete(SERVICE, "s", world.namespace)
    assert phase(await world.ended("seeker")) == "Succeeded"
    assert set(world.log("seeker").split()) == {"127.0.0.1", "s"}


@as_root
async def test_the_machine_finds_itself_in_every_pod(world: World) -> None:
    await world.pod("getent hosts localhost")
    assert phase(await world.ended()) == "Succeeded"


FIND = (
    "import sys\n"
    "from types import SimpleNamespace\n"
    "from cgd_stages.train import launch\n"
    "launch.LOOK_SECONDS = 0.1\n"
    "launch.find_first_pod(SimpleNamespace(node=launch.Node(1, 2, 1, sys.argv[1], '1')))"
)


@as_root
async def test_a_training_waits_until_the_first_worker_has_a_name(world: World) -> None:
    """Worker 0 waits for its volume, so its Service has no name yet."""
    late = {"volumes": [{"name": "v", "configMap": {"name": "late"}}]}
    find = container("", "main") | {"command": ["python3", "-c", FIND, "t-worker-0"]}
    await world.pod(name="second", containers=[find])
    await world.pytorchjob(WAIT, 1, pod=late)
    await world.until(SERVICE, "t-worker-0", bool)
    await world.event("FailedMount")
    assert phase(await world.running("second")) == "Running"
    await world.make(CONFIGMAP, "late", data={})
    assert phase(await world.ended("second")) == "Succeeded"


async def test_each_replica_has_a_service_that_goes_with_its_pod(world: World) -> None:
    await world.pytorchjob(WAIT, 2)
    made = await world.until(SERVICE, "t-worker-1", bool)
    assert (made["spec"]["clusterIP"], made["spec"]["ports"][0]["port"]) == ("None", 23456)
    assert "publishNotReadyAddresses" not in made["spec"]
    pod = await world.until(POD, "t-worker-1", bool)
    assert made["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    await world.client.patch(PYTORCHJOB, "t", world.namespace, {"spec": {"runPolicy": {"suspend": True}}})
    for index in range(2):
        await world.gone(SERVICE, f"t-worker-{index}")
    await world.client.patch(PYTORCHJOB, "t", world.namespace, {"spec": {"runPolicy": {"suspend": False}}})
    await world.until(SERVICE, "t-worker-1", bool)
    await world.client.delete(PYTORCHJOB, "t", world.namespace)
    await world.gone(SERVICE, "t-worker-1")


@as_root
async def test_the_pods_of_a_trainjob_find_the_first_one_before_it_is_ready(world: World) -> None:
    await world.trainjob('until getent hosts "$PET_MASTER_ADDR"; do sleep 0.02; done', nodes=2)
    assert true(await world.finished("t", TRAINJOB), "Complete")
    made = await world.client.get(SERVICE, "t", world.namespace)
    assert made is not None
    assert made["spec"]["publishNotReadyAddresses"] is True
