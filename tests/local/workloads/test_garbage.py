"""The garbage collector: what goes with its owner, what stays, and in which order."""

import pytest
from support.local_world import phase

from cgd_local.cluster import install
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import CONFIGMAP, CRD, JOB, POD, SECRET, Kind

pytestmark = pytest.mark.asyncio(loop_scope="session")

THING = Kind("test.cgd.dev/v1", "Thing", "things")


def owned_by(*owners: Object, block: bool = False) -> Object:
    references = [
        {"apiVersion": o["apiVersion"], "kind": o["kind"], "name": o["metadata"]["name"], "uid": o["metadata"]["uid"]}
        | ({"blockOwnerDeletion": True} if block else {})
        for o in owners
    ]
    return {"ownerReferences": references}


async def test_dependents_go_with_their_owner_down_to_grandchildren(world):
    owner = await world.make(CONFIGMAP, "owner")
    child = await world.make(SECRET, "child", metadata=owned_by(owner))
    await world.make(CONFIGMAP, "grandchild", metadata=owned_by(child))
    await world.client.delete(CONFIGMAP, "owner", world.namespace)
    await world.gone(SECRET, "child")
    await world.gone(CONFIGMAP, "grandchild")


async def test_who_has_another_owner_stays_and_forgets_the_first(world):
    first, second = await world.make(CONFIGMAP, "first"), await world.make(CONFIGMAP, "second")
    await world.make(SECRET, "shared", metadata=owned_by(first, second))
    await world.client.delete(CONFIGMAP, "first", world.namespace)
    shared = await world.until(SECRET, "shared", lambda item: len(item["metadata"]["ownerReferences"]) == 1)
    assert shared["metadata"]["ownerReferences"][0]["name"] == "second"


async def test_an_owner_of_the_same_name_but_another_uid_is_no_owner(world):
    owner = await world.make(CONFIGMAP, "owner")
    stale = owned_by(owner)
    stale["ownerReferences"][0]["uid"] = "00000000-0000-0000-0000-000000000000"
    await world.make(SECRET, "orphan", metadata=stale)
    await world.gone(SECRET, "orphan")


async def test_an_owner_of_an_unknown_kind_is_taken_to_be_alive(world):
    reference = {"apiVersion": "nobody.knows/v1", "kind": "What", "name": "x", "uid": "u"}
    await world.make(SECRET, "kept", metadata={"ownerReferences": [reference]})
    owner = await world.make(CONFIGMAP, "owner")
    await world.make(SECRET, "probe", metadata=owned_by(owner))
    await world.client.delete(CONFIGMAP, "owner", world.namespace)
    await world.gone(SECRET, "probe")
    assert await world.client.get(SECRET, "kept", world.namespace)


async def test_in_the_foreground_the_owner_waits_for_those_who_block_it(world):
    owner = await world.make(CONFIGMAP, "owner")
    await world.make(SECRET, "child", metadata=owned_by(owner, block=True) | {"finalizers": ["test/hold"]})
    await world.client.delete(CONFIGMAP, "owner", world.namespace, propagation="Foreground")
    await world.until(SECRET, "child", lambda item: "deletionTimestamp" in item["metadata"])
    assert (await world.client.get(CONFIGMAP, "owner", world.namespace))["metadata"]["finalizers"]
    await world.client.patch(SECRET, "child", world.namespace, {"metadata": {"finalizers": []}})
    await world.gone(SECRET, "child")
    await world.gone(CONFIGMAP, "owner")


async def test_orphans_live_on_without_their_owner(world):
    owner = await world.make(CONFIGMAP, "owner")
    await world.make(SECRET, "child", metadata=owned_by(owner))
    await world.until(SECRET, "child", bool)
    await world.client.delete(CONFIGMAP, "owner", world.namespace, propagation="Orphan")
    await world.gone(CONFIGMAP, "owner")
    assert not (await world.client.get(SECRET, "child", world.namespace))["metadata"].get("ownerReferences")


async def test_a_deleted_job_takes_its_running_pod_along(world):
    await world.job("sleep 60")
    await world.when_pods(lambda pods: [pod for pod in pods if phase(pod) == "Running"])
    await world.client.delete(JOB, "j", world.namespace)
    await world.when_pods(lambda pods: pods == [])


async def test_custom_resources_own_and_are_owned_and_lose_their_children_with_their_definition(world):
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"kind": "Thing", "plural": "things", "singular": "thing", "listKind": "ThingList"}
    spec = {"group": "test.cgd.dev", "scope": "Namespaced", "names": names, "versions": [version]}
    meta = {"name": "things.test.cgd.dev"}
    await install(world.client, {"metadata": meta, "spec": spec})
    one, two = await world.make(THING, "one"), await world.make(THING, "two")
    await world.pod("sleep 60", metadata=owned_by(one))
    await world.make(SECRET, "of-two", metadata=owned_by(two))
    await world.client.delete(THING, "one", world.namespace)
    await world.gone(POD, "p")
    await world.client.delete(CRD, meta["name"])
    await world.gone(SECRET, "of-two")
