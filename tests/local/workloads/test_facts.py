"""What the operator reads from pods as the local node plays them."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.builders import job, labels
from support.local_world import World, container

from cgd_operator.facts.children import ChildFacts, Fate, observe
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import POD

pytestmark = pytest.mark.asyncio(loop_scope="session")

SPEAK = """printf '{"outcome": "failed", "message": "no such bucket", "hint": "create it"}' > "$LAST"; exit 3"""
LAST = [{"name": "LAST", "value": "/dev/termination-log"}]
UNTIL_END = 'while [ ! -e "$HOME/end" ]; do sleep 0.02; done'


async def make(world: World, **spec: Any) -> Object:
    """A pod of the stage answer."""
    return await world.pod(metadata={"labels": labels("answer")}, **spec)


def facts(pod: Object, *conditions: str, later: float = 0) -> ChildFacts:
    """Of its child, so many seconds from now."""
    return observe([job("answer", *conditions)], [pod], now=datetime.now(UTC) + timedelta(seconds=later))["answer"]


async def test_a_sidecar_that_has_ended_hides_nothing_of_the_stage(world: World) -> None:
    await make(world, containers=[container("true", "proxy"), container(SPEAK, "stage", env=LAST)])
    told = facts(await world.ended(), "Failed").message
    assert told == "pod p: exit code 3: no such bucket. create it"


async def test_a_sidecar_that_runs_on_is_named(world: World) -> None:
    await make(world, containers=[container(UNTIL_END, "proxy"), container("true", "stage")])
    pod = await world.until(POD, "p", lambda pod: "terminated" in str(pod["status"].get("containerStatuses")))
    told = facts(pod, later=60)
    assert (told.fate, told.reason) == (Fate.RUNNING, "SidecarRuns")
    assert "the stage has ended (exit code 0), but container proxy still runs" in told.message
    (world.folder() / "end").touch()
    assert facts(await world.ended(), later=60).reason != "SidecarRuns"


async def test_a_native_sidecar_is_no_trouble(world: World) -> None:
    sidecar = container("sleep 60 & wait", "proxy", restartPolicy="Always")
    await make(world, initContainers=[sidecar], containers=[container(SPEAK, "stage", env=LAST)])
    assert facts(await world.ended(), "Failed").message == "pod p: exit code 3: no such bucket. create it"
