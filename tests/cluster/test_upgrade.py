"""A later operator takes over the runs of an earlier build, which were in the midst of every kind of stage."""

from typing import Any

import pytest
from support.earlier_cluster import LIVES, STAGES, child_of, end, restore, stored

from cgd_operator.api.crd import crd
from cgd_operator.kube.kinds import CRD, JOB, POD, RUN
from cgd_operator.planning.manifests import KINDS, RUN_LABEL, STAGE_LABEL, UID_LABEL

pytestmark = pytest.mark.parametrize("world", ["embedded"], indirect=True)

Json = dict[str, Any]

RUNS, OVER = "cgdruns.cgd.dev", ("broken", "through", "emptied")
GOING = tuple(name for name in LIVES if name not in OVER)
CHILDREN = ("jobs.batch", "pytorchjobs.kubeflow.org", "trainjobs.trainer.kubeflow.org")


@pytest.fixture
async def before(world: Any) -> dict[str, list[Json]]:
    """What the earlier operator has left, with the later one's definition."""
    objects = stored()
    restore(world.embedded, objects)
    await world.client.apply(CRD, crd())
    return objects


def runs(objects: dict[str, list[Json]]) -> dict[str, Json]:
    return {run["metadata"]["name"]: run for run in objects[RUNS]}


async def children(world: Any) -> dict[tuple[str, str], Json]:
    """By run and stage; each stage has one."""
    items = [item for kind in KINDS.values() for item in (await world.client.list(kind, "default"))[0]]
    found = {place(item): item for item in items}
    assert len(found) == len(items), "a stage has two children"
    return found


def place(child: Json) -> tuple[str, str]:
    return child["metadata"]["labels"][RUN_LABEL], child["metadata"]["labels"][STAGE_LABEL]


async def play(world: Any) -> bool:
    """The children of the runs that go on end well, as often as this is called; whether all runs have succeeded."""
    states = {name: await world.state(name) for name in GOING}
    for (name, _), child in (await children(world)).items():
        if name in GOING and not child["spec"].get("suspend") and "status" not in child:
            await end(world.client, child)
    return set(states.values()) == {"Succeeded"}


def succeeded(run: Json) -> dict[str, Json]:
    """The stages that had succeeded, by name."""
    return {one["name"]: one for one in run["status"]["stages"] if one["state"] == "Succeeded"}


def lasting(child: Json) -> Json:
    """What nobody may have changed of a child."""
    return {name: value for name, value in child["spec"].items() if name != "suspend"}


@pytest.mark.slow
async def test_every_run_goes_on_where_it_was_and_nothing_that_is_through_begins_anew(
    world: Any, before: dict[str, list[Json]]
) -> None:
    known = {place(child): child for kind in CHILDREN for child in before[kind]}
    async with world.operator():
        await world.client.patch(RUN, "held", "default", {"spec": {"suspend": False}})
        await world.until(lambda: play(world))
    now = await children(world)
    for key, child in known.items():
        assert now[key]["metadata"]["uid"] == child["metadata"]["uid"], key
        assert "deletionTimestamp" not in now[key]["metadata"], key
        assert lasting(now[key]) == lasting(child), key
    through = {(name, stage) for name, run in runs(before).items() for stage in succeeded(run)}
    new = {(name, stage) for name, child in now.keys() - known.keys() for stage in STAGES.get(child, (child,))}
    assert new, "the runs went on"
    assert not new & through
    for name, run in runs(before).items():
        status = (await world.get(name))["status"]
        assert succeeded({"status": status}).items() >= succeeded(run).items(), f"what was told of {name} is lost"
        if name in OVER:
            assert status == run["status"], name
            assert not {key for key in now.keys() - known.keys() if key[0] == name}


async def test_a_stage_that_has_failed_is_tried_again_by_the_later_operator_when_its_job_is_deleted(
    world: Any, before: dict[str, list[Json]]
) -> None:
    uid = runs(before)["broken"]["metadata"]["uid"]
    failed = await child_of(world.client, uid, "teacher")
    assert failed is not None
    async with world.operator():
        await world.client.delete(JOB, failed["metadata"]["name"], "default")

        async def made_again() -> bool:
            child = await child_of(world.client, uid, "teacher")
            return child is not None and child["metadata"]["uid"] != failed["metadata"]["uid"]

        await world.until(made_again)


async def test_a_run_with_the_earlier_finalizer_is_cleaned_and_goes(world: Any, before: dict[str, list[Json]]) -> None:
    uid = runs(before)["evaluating"]["metadata"]["uid"]
    async with world.operator():
        await world.client.delete(RUN, "evaluating", "default")

        async def cleans() -> Json | None:
            """The Job that does it; the pods go with their children, as the garbage collector has it."""
            if not [stage for name, stage in await children(world) if name == "evaluating" and stage != "clean"]:
                for pod in (await world.client.list(POD, "default", labels=f"{UID_LABEL}={uid}"))[0]:
                    await world.client.delete(POD, pod["metadata"]["name"], "default", grace=0)
            return await child_of(world.client, uid, "clean")

        await end(world.client, await world.until(cleans))

        async def is_gone() -> bool:
            return await world.client.get(RUN, "evaluating", "default") is None

        await world.until(is_gone)
