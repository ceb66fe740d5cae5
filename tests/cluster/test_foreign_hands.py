"""What others do to the objects of a run: administrators, policies, other controllers, the user at odd moments."""

import json
from datetime import timedelta
from typing import Any

import pytest
from support.builders import ended_job
from support.pod_player import ago, in_an_hour, make_pod, tell_pod

from cgd_operator.controller.reconciler import Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.kube.clock import Clock
from cgd_operator.kube.kinds import JOB, POD, RUN
from cgd_operator.planning.manifests import STAGE_LABEL, UID_LABEL, Release

DELETE = {"deletionPolicy": "Delete"}
KEEP = "backup.example.org/keep"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens without any event is seen in the sweep, every 30 s on a cluster."""
    monkeypatch.setattr("cgd_operator.controller.queue.SWEEP_SECONDS", 0.1)
    monkeypatch.setattr("cgd_operator.facts.children.STARTING", timedelta(0))


async def child(world: Any, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = (await world.children()).get(stage, {})
    return found


async def has_child(world: Any, stage: str) -> bool:
    return bool(await child(world, stage))


async def is_suspended(world: Any, stage: str, suspended: bool) -> bool:
    return bool((await child(world, stage))["spec"].get("suspend", False)) is suspended


async def change(world: Any, stage: str, body: dict[str, Any]) -> None:
    name = (await child(world, stage))["metadata"]["name"]
    await world.client.patch(JOB, name, "default", body)


async def state_is(world: Any, state: str) -> bool:
    return bool(await world.state() == state)


async def says(world: Any, words: str) -> bool:
    return words in json.dumps((await world.get()).get("status", {}).get("conditions", []), ensure_ascii=False)


async def is_gone(world: Any) -> bool:
    return await world.client.get(RUN, "demo", "default") is None


async def notes(world: Any) -> dict[str, str]:
    return {one["reason"]: one["message"] for one in await world.events()}


async def test_a_job_that_an_administrator_suspends_is_told_and_stays_the_administrators(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.play("prepare")
        await world.until(lambda: has_child(world, "answer"))
        await change(world, "answer", {"spec": {"suspend": True}})
        await world.until(lambda: says(world, "stage answer waits: somebody has suspended its Job, not the operator"))
        assert await world.state() == "Waiting"
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(lambda: state_is(world, "Suspended"))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": False}})
        await world.until(lambda: state_is(world, "Waiting"))
        assert await is_suspended(world, "answer", True)
        await change(world, "answer", {"spec": {"suspend": False}})
        await world.until(lambda: state_is(world, "Answering"))


async def test_a_child_of_a_suspended_run_that_somebody_resumes_is_held_again(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.until(lambda: has_child(world, "prepare"))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(lambda: state_is(world, "Suspended"))
        await change(world, "prepare", {"spec": {"suspend": False}})
        await world.until(lambda: is_suspended(world, "prepare", True))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": False}})
        await world.until(lambda: is_suspended(world, "prepare", False))


async def test_a_child_that_is_deleted_while_it_runs_is_made_again_when_nothing_keeps_the_old_one(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.until(lambda: has_child(world, "prepare"))
        old = (await child(world, "prepare"))["metadata"]
        await change(world, "prepare", {"metadata": {"finalizers": [KEEP]}})
        await world.client.delete(JOB, old["name"], "default")
        await world.until(lambda: says(world, f"it stays until these finalizers are removed: {KEEP}"))
        assert (await child(world, "prepare"))["metadata"]["uid"] == old["uid"]
        await change(world, "prepare", {"metadata": {"finalizers": []}})

        async def is_another() -> bool:
            return bool((await child(world, "prepare")).get("metadata", old)["uid"] != old["uid"])

        await world.until(is_another)
        await world.play("prepare")
        await world.until(lambda: has_child(world, "answer"))


async def test_a_child_whose_labels_somebody_has_removed_has_them_again_and_the_run_goes_on(world: Any) -> None:
    """The operator finds children by their labels alone: without them it would wait for its end for ever."""
    async with world.operator():
        await world.apply()
        await world.until(lambda: has_child(world, "prepare"))
        meta = (await child(world, "prepare"))["metadata"]
        await world.client.patch(JOB, meta["name"], "default", {"metadata": {"labels": None}})

        async def has_labels() -> bool:
            found = await world.client.get(JOB, meta["name"], "default")
            return bool(found["metadata"].get("labels") == meta["labels"])

        await world.until(has_labels)
        await world.play("prepare")
        await world.until(lambda: has_child(world, "answer"))


async def test_an_object_of_a_childs_name_that_is_not_the_runs_is_left_as_it_is(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.operator():
        await world.apply()
        await world.until(lambda: has_child(world, "prepare"))
        meta = (await child(world, "prepare"))["metadata"]
        foreign = {"metadata": {"labels": None, "ownerReferences": None}}
        await world.client.patch(JOB, meta["name"], "default", foreign)

        async def is_said() -> bool:
            return f"the Job {meta['name']} is not the run's" in caplog.text

        await world.until(is_said)
    found = await world.client.get(JOB, meta["name"], "default")
    assert "labels" not in found["metadata"]


async def jobs_of(world: Any, uid: str) -> list[str]:
    jobs = (await world.client.list(JOB, "default", labels=f"{UID_LABEL}={uid}"))[0]
    return [job["metadata"]["labels"][STAGE_LABEL] for job in jobs]


async def test_a_run_that_is_made_again_at_once_under_its_name_has_nothing_of_the_old_one(world: Any) -> None:
    async with world.operator():
        first = (await world.apply())["metadata"]["uid"]
        await world.until(lambda: jobs_of(world, first))
        await world.client.delete(RUN, "demo", "default")
        second = (await world.apply())["metadata"]["uid"]
        await world.until(lambda: jobs_of(world, second))
        (old,) = (await world.client.list(JOB, "default", labels=f"{UID_LABEL}={first}"))[0]
        ended = {"status": ended_job("Complete")}  # it is still there, and ends well
        await world.client.patch(JOB, old["metadata"]["name"], "default", ended, subresource="status")
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(lambda: state_is(world, "Suspended"))
    assert await jobs_of(world, second) == ["prepare"]
    assert (await world.get())["status"]["stages"][0]["child"] != old["metadata"]["name"]


async def test_a_user_who_keeps_the_data_of_a_run_that_is_being_deleted_keeps_them(world: Any) -> None:
    async with world.operator():
        await world.apply(DELETE)
        await world.until(lambda: has_child(world, "prepare"))
        await world.client.delete(RUN, "demo", "default")
        await world.until(lambda: has_child(world, "clean"))
        await world.client.patch(RUN, "demo", "default", {"spec": {"deletionPolicy": "Retain"}})
        await world.until(lambda: is_gone(world))
    assert await world.children() == {}, "what deletes them is stopped"
    told = (await notes(world))["NotCleaned"]
    assert "spec.deletionPolicy was changed to Retain" in told
    assert "a part may be gone" in told


async def test_data_that_are_kept_before_their_deletion_begins_are_all_there(world: Any) -> None:
    reconciler = Reconciler(world.client, Release("generate", "train"), Board(), b"key")
    await world.apply(DELETE)
    await reconciler.reconcile("default", "demo")
    await world.client.delete(RUN, "demo", "default")
    await world.client.patch(RUN, "demo", "default", {"spec": {"deletionPolicy": "Retain"}})
    await reconciler.reconcile("default", "demo")
    assert await is_gone(world)
    assert "clean" not in await world.children()
    assert (await notes(world))["NotCleaned"].endswith("was changed to Retain after the run was deleted")


async def test_a_run_that_others_keep_from_going_starts_nothing_more(world: Any) -> None:
    reconciler = Reconciler(world.client, Release("generate", "train"), Board(), b"key")
    await world.apply()
    await reconciler.reconcile("default", "demo")
    await world.client.patch(RUN, "demo", "default", {"metadata": {"finalizers": [KEEP]}})
    await world.client.delete(RUN, "demo", "default")
    await world.play("prepare")
    await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
    assert await reconciler.reconcile("default", "demo") is None
    assert list(await world.children()) == ["prepare"]
    assert (await world.get())["metadata"]["finalizers"] == [KEEP]


async def test_a_policy_that_has_jobs_deleted_after_their_end_makes_no_failed_stage_begin_again(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.until(lambda: has_child(world, "prepare"))
        await change(world, "prepare", {"spec": {"ttlSecondsAfterFinished": 3600}})
        await world.end("prepare", "Failed")

        async def is_kept() -> bool:
            return "ttlSecondsAfterFinished" not in (await child(world, "prepare"))["spec"]

        await world.until(is_kept)
        await world.until(lambda: state_is(world, "Failed"))


async def test_a_node_that_was_lost_and_comes_back_ends_its_pod_and_the_stage_is_no_more_told_to_wait(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def reason() -> str:
        stages = (await world.get()).get("status", {}).get("stages", [])
        return next((str(one.get("reason")) for one in stages if one["name"] == "answer"), "")

    async def is_lost() -> bool:
        return await reason() == "NodeLost"

    async def tries_again() -> bool:
        return await reason() == "Retrying"

    monkeypatch.setattr(Clock, "now", in_an_hour)
    async with world.operator():
        run = await world.apply()
        await world.end("prepare")
        await world.until(lambda: has_child(world, "answer"))
        await make_pod(world, run, "example.org/held", phase="Running", startTime=ago(60), state={"running": {}})
        await world.client.delete(POD, "pod", "default", grace=30)
        await world.until(is_lost)
        end = {"exitCode": 143, "startedAt": ago(60), "finishedAt": ago(0)}
        disrupted = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "DeletionByTaintManager",
            "message": "taint",
        }
        await tell_pod(world, phase="Failed", startTime=ago(60), conditions=[disrupted], state={"terminated": end})
        await world.until(tries_again)
        assert await says(world, "DeletionByTaintManager: taint")
