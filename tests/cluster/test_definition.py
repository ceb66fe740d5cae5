"""The definition of CGDRuns is upgraded under runs that exist."""

import copy
from typing import Any

from support.builders import CHILDREN

from cgd_operator.api.crd import crd
from cgd_operator.kube.kinds import CRD, RUN

NEW = ("pods", "modelCache")


def older() -> dict[str, Any]:
    """The definition before it had some of its fields."""
    made = copy.deepcopy(crd())
    spec = made["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for name in NEW:
        del spec["properties"][name]
    rules = spec["x-kubernetes-validations"]
    spec["x-kubernetes-validations"] = [one for one in rules if one.get("fieldPath", ".").strip(".") not in NEW]
    return made


async def state_is(world: Any, state: str) -> bool:
    return bool(await world.state() == state)


async def test_a_run_goes_on_when_its_definition_is_upgraded_in_the_middle(world: Any) -> None:
    await world.client.apply(CRD, older())
    async with world.operator():
        run = await world.apply()
        assert not set(NEW) & set(run["spec"])
        await world.end("prepare")
        await world.client.apply(CRD, crd())
        await world.play(*CHILDREN[1:])
        await world.until(lambda: state_is(world, "Succeeded"))
    found = await world.get()
    assert found["metadata"]["uid"] == run["metadata"]["uid"]
    made = await world.client.create(
        RUN,
        {
            **{name: run[name] for name in ("apiVersion", "kind")},
            "metadata": {"name": "newer", "namespace": "default"},
            "spec": run["spec"] | {"modelCache": {"persistentVolumeClaim": {"claimName": "models"}}},
        },
    )
    assert made["spec"]["modelCache"]
