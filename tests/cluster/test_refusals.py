"""A run with a child that the API server will not have is told so before its first child is made."""

from typing import Any

import pytest

from cgd_operator.cluster import ApiError, Cluster, Kind


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"placement.student.tolerations": [{"operator": {"is": "Exists"}}]}, "answer"),
        ({"placement.teacher.affinity": {"nodeAffinity": "gpu"}}, "teacher"),
        ({"placement.cpu.affinity": {"podAffinity": []}}, "prepare"),
    ],
)
async def test_a_child_that_would_be_refused_is_told_before_anything_is_started(
    world: Any, changes: dict[str, Any], stage: str
) -> None:
    async with world.operator():
        await world.apply(changes)
        await world.until(lambda: is_refused(world))
    assert f"refused the child of stage {stage}: " in (await stalled(world))["message"]
    assert await world.children() == {}


async def stalled(world: Any) -> dict[str, Any]:
    found: list[dict[str, Any]] = (await world.get()).get("status", {}).get("conditions", [])
    return next((one for one in found if one["type"] == "Stalled"), {})


async def is_refused(world: Any) -> bool:
    return (await stalled(world)).get("reason") == "ChildRefused"


async def test_a_quota_that_is_used_up_at_the_start_refuses_nothing_for_good(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Cluster.create

    async def refuse(self: Cluster, kind: Kind, body: dict[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        if dry_run:
            raise ApiError(403, "Forbidden", "exceeded quota")
        return await create(self, kind, body)

    monkeypatch.setattr(Cluster, "create", refuse)
    async with world.operator():
        await world.apply()
        await world.play("prepare")
        await world.play("answer")
