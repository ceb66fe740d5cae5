"""The life of a run that nothing fails in: what ends it, and that it stays ended."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.builders import CHILDREN, RELEASE, ended, labels

from cgd_operator.api.spec import CGDRunSpec, parse_spec
from cgd_operator.controller.queue import Loop
from cgd_operator.controller.reconciler import Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import CRD, JOB, POD, RUN, ApiError, Kind
from cgd_operator.planning import manifests


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens without any event is seen in the sweep, every 30 s on a cluster."""
    monkeypatch.setattr("cgd_operator.controller.queue.SWEEP_SECONDS", 0.1)


NOW = datetime(2026, 1, 1, tzinfo=UTC)


def told(run: dict[str, Any], kind: str = "Succeeded") -> dict[str, Any]:
    return next(one for one in run["status"]["conditions"] if one["type"] == kind)


async def state_is(world: Any, state: str) -> bool:
    return bool(await world.state() == state)


async def add_pod(world: Any, run: dict[str, Any], stage: str, name: str, hours: int) -> None:
    """A pod of a stage that has ended after so many hours."""
    meta = {
        "name": name,
        "namespace": "default",
        "labels": labels(stage) | {manifests.UID_LABEL: run["metadata"]["uid"]},
    }
    spec = {"containers": [{"name": "stage", "image": "image"}]}
    await world.client.create(POD, {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    terminated = ended(143, end=f"2026-01-01T{hours:02d}:00:00Z")
    container = {"name": "stage", "image": "image", "imageID": "", "ready": False, "restartCount": 0}
    status = {
        "phase": "Failed",
        "startTime": "2026-01-01T00:00:00Z",
        "containerStatuses": [{**container, "state": {"terminated": terminated}}],
    }
    await world.client.patch(POD, name, "default", {"status": status}, subresource="status")


async def gpu_hours_are(world: Any, hours: str) -> bool:
    return bool((await world.get()).get("status", {}).get("usage", {}).get("gpuHours") == hours)


async def running(world: Any, stage: str) -> bool:
    child = (await world.children()).get(stage)
    return child is not None and not child["spec"].get("suspend")


async def held(world: Any, stage: str) -> bool:
    return not await running(world, stage)


async def test_a_used_up_budget_stops_the_run_and_it_stays_stopped_when_its_pods_and_the_operator_are_gone(
    world: Any,
) -> None:
    async with world.operator():
        run = await world.apply({"budget": {"gpuHours": "3"}})
        await world.end("prepare")
        await world.until(lambda: running(world, "answer"))
        await add_pod(world, run, "answer", "first", 2)
        await world.until(lambda: gpu_hours_are(world, "2.00"))
        await world.client.delete(POD, "first", "default", grace=0)
        assert await running(world, "answer")
        await add_pod(world, run, "answer", "second", 1)
        await world.until(lambda: state_is(world, "Failed"))
    assert await held(world, "answer")
    assert told(await world.get())["reason"] == told(await world.get(), "Stalled")["reason"] == "BudgetExceeded"
    assert "3.00 GPU-hours are used, of 3 in spec.budget.gpuHours" in told(await world.get())["message"]
    await world.client.delete(POD, "second", "default", grace=0)
    before = (await world.get())["status"]
    async with world.operator():
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(lambda: generation_is(world, 2))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": False}})
        await world.until(lambda: generation_is(world, 3))
    assert await held(world, "answer")
    assert (await world.get())["status"]["usage"] == before["usage"]
    assert await world.state() == "Failed"
    events = await world.events()
    assert [one["message"] for one in events if one["reason"] == "RunFailed"] == [told(await world.get())["message"]]


async def generation_is(world: Any, generation: int) -> bool:
    return bool((await world.get())["status"]["observedGeneration"] == generation)


async def test_a_deadline_is_noticed_without_an_event_and_nothing_starts_after_it(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.operator():
        await world.apply({"budget": {"deadlineSeconds": 3600}})
        await world.until(lambda: running(world, "prepare"))
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        monkeypatch.setattr("cgd_operator.controller.view._created", lambda _: hour_ago)
        await world.until(lambda: state_is(world, "Failed"))
        assert told(await world.get())["reason"] == "DeadlineExceeded"
        assert await held(world, "prepare")
        name = (await world.children())["prepare"]["metadata"]["name"]
        await world.client.delete(JOB, name, "default")
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(lambda: generation_is(world, 2))
    assert await world.children() == {}


async def gone(world: Any) -> bool:
    return await world.client.get(RUN, "demo", "default") is None


async def test_a_run_is_deleted_after_its_time_and_its_end_is_told_before(world: Any) -> None:
    async with world.operator():
        await world.apply({"ttlSecondsAfterFinished": 0})
        await world.play(*CHILDREN)
        await world.until(lambda: gone(world))
    reasons = [one["reason"] for one in await world.events()]
    assert {"RunSucceeded", "Expired"} <= set(reasons)


MARKS = [
    {"annotations": {"argocd.argoproj.io/tracking-id": "runs:cgd.dev/CGDRun:default/demo"}},
    {"labels": {"kustomize.toolkit.fluxcd.io/name": "runs"}},
]


async def no_children(world: Any) -> bool:
    return not await world.children()


@pytest.mark.parametrize("marks", MARKS, ids=["Argo CD", "Flux"])
async def test_a_run_that_heals_itself_runs_once(world: Any, marks: dict[str, Any]) -> None:
    """Played selfHeal: whenever the run is gone, what Git has is applied again."""
    made = []

    async def heal() -> None:
        if await gone(world):
            made.append(await world.apply({"ttlSecondsAfterFinished": 0}))
            await world.client.patch(RUN, "demo", "default", {"metadata": marks, "spec": {}})

    await heal()
    async with world.operator():
        await world.play(*CHILDREN)
        await world.until(lambda: no_children(world))
        await world.until(lambda: has_told(world, "Expired"))
        await heal()
        # a change of the run is looked at, and nothing begins anew
        await world.client.patch(RUN, "demo", "default", {"spec": {"ttlSecondsAfterFinished": 1}})
        await world.until(lambda: generation_is(world, 2))
        await heal()
        assert (len(made), await world.children()) == (1, {})
    assert await world.state() == "Succeeded"
    assert [one["reason"] for one in await world.events()].count("Expired") == 1


async def has_told(world: Any, reason: str) -> bool:
    return reason in [one["reason"] for one in await world.events()]


@pytest.mark.parametrize("state", ["Succeeded", "Failed"])
async def test_a_time_to_live_that_is_not_over_is_waited_for_without_an_event(world: Any, state: str) -> None:
    async with world.operator():
        await world.apply({"ttlSecondsAfterFinished": 2})
        if state == "Failed":
            await world.end("prepare", "Failed")
        else:
            await world.play(*CHILDREN)
        await world.until(lambda: gone(world))
    reasons = [one["reason"] for one in await world.events()]
    assert {f"Run{state}", "Expired"} <= set(reasons)


async def test_a_finished_run_takes_a_time_to_live_and_says_that_it_has_seen_it(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.play(*CHILDREN)
        await world.until(lambda: state_is(world, "Succeeded"))
        await world.client.patch(RUN, "demo", "default", {"spec": {"ttlSecondsAfterFinished": 10**6}})
        await world.until(lambda: generation_is(world, 2))
        assert await world.state() == "Succeeded"
        await world.client.patch(RUN, "demo", "default", {"spec": {"ttlSecondsAfterFinished": 0}})
        await world.until(lambda: gone(world))


async def test_a_finished_run_whose_status_cannot_be_read_is_left_as_it_is(world: Any) -> None:
    definition = await world.client.get(CRD, "cgdruns.cgd.dev")
    loose = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"] = loose
    await world.client.patch(CRD, "cgdruns.cgd.dev", None, {"spec": definition["spec"]})
    await world.apply()
    other = {"stages": "of another kind", "conditions": [{"type": "Succeeded", "status": "True"}]}
    await world.client.patch(RUN, "demo", "default", {"status": other}, subresource="status")
    release = manifests.Release("generate", "train")
    await Reconciler(world.client, release, Board(), b"key").reconcile("default", "demo")
    assert (await world.get())["status"] == other
    assert await world.children() == {}


DELETE = {"deletionPolicy": "Delete"}


async def has_finalizer(world: Any) -> bool:
    return manifests.FINALIZER in (await world.get())["metadata"].get("finalizers", [])


async def cleaning(world: Any) -> bool:
    """Whether the Job that cleans is the only child."""
    return list(await world.children()) == ["clean"]


async def notes(world: Any) -> dict[str, str]:
    return {one["reason"]: one["message"] for one in await world.events()}


async def test_a_deleted_run_takes_what_it_stored_with_it(world: Any) -> None:
    async with world.operator():
        run = await world.apply(DELETE)
        await world.play("prepare")
        await world.until(lambda: running(world, "answer"))
        assert await has_finalizer(world)
        await add_pod(world, run, "answer", "leaving", 1)
        await world.client.delete(RUN, "demo", "default")
        await world.until(lambda: without_children(world))
        assert await world.client.get(RUN, "demo", "default")
        await world.client.delete(POD, "leaving", "default", grace=0)
        await world.until(lambda: cleaning(world))
        job = (await world.children())["clean"]
        assert "ownerReferences" not in job["metadata"]
        assert job["metadata"]["labels"][manifests.UID_LABEL] == run["metadata"]["uid"]
        await world.end("clean")
        await world.until(lambda: gone(world))
        await world.until(lambda: without_children(world))
    told_of = await notes(world)
    assert "is deleted" in told_of["Cleaned"]
    assert "NotCleaned" not in told_of


async def test_a_job_that_only_has_the_label_of_a_run_does_not_keep_it_from_going(world: Any) -> None:
    async with world.operator():
        run = await world.apply(DELETE)
        await world.until(lambda: running(world, "prepare"))
        pod = {"restartPolicy": "Never", "containers": [{"name": "x", "image": "image"}]}
        meta = {"name": "odd", "namespace": "default", "labels": {manifests.UID_LABEL: run["metadata"]["uid"]}}
        odd = {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": {"template": {"spec": pod}}}
        await world.client.create(JOB, odd)
        await world.client.delete(RUN, "demo", "default")
        await world.until(lambda: is_gone(world, "odd"))
        await world.until(lambda: cleaning(world))
        await world.end("clean")
        await world.until(lambda: gone(world))


async def is_gone(world: Any, job: str) -> bool:
    return await world.client.get(JOB, job, "default") is None


async def without_children(world: Any) -> bool:
    return await world.children() == {}


async def test_a_run_whose_cleaning_fails_goes_nevertheless_and_says_what_stays(world: Any) -> None:
    async with world.operator():
        await world.apply(DELETE)
        await world.until(lambda: running(world, "prepare"))
        await world.client.delete(RUN, "demo", "default")
        await world.until(lambda: cleaning(world))
        await world.end("clean", "Failed")
        await world.until(lambda: gone(world))
    assert "was not deleted" in (await notes(world))["NotCleaned"]
    assert "Cleaned" not in await notes(world)


@pytest.mark.parametrize("seconds", [-1, 1])  # over before the first look, and while the Job that cleans is there
async def test_a_run_that_cannot_be_cleaned_in_time_goes_nevertheless(
    world: Any, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    monkeypatch.setattr("cgd_operator.controller.deletion.CLEAN_SECONDS", seconds)
    async with world.operator():
        await world.apply(DELETE)
        await world.until(lambda: running(world, "prepare"))
        await world.client.delete(RUN, "demo", "default")
        await world.until(lambda: gone(world))
        await world.until(lambda: without_children(world))
    assert f"it took more than {seconds} s" in (await notes(world))["NotCleaned"]


async def test_a_run_in_a_namespace_that_takes_no_job_any_more_goes(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Cluster.create

    async def refuse(self: Cluster, kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
        if body["metadata"].get("labels", {}).get(manifests.STAGE_LABEL) == "clean":
            raise ApiError(403, "Forbidden", "namespace default is being terminated")
        return await create(self, kind, body)

    async with world.operator():
        await world.apply(DELETE)
        await world.until(lambda: running(world, "prepare"))
        monkeypatch.setattr(Cluster, "create", refuse)
        await world.client.delete(RUN, "demo", "default")
        await world.until(lambda: gone(world))
    assert "being terminated" in (await notes(world))["NotCleaned"]


@pytest.mark.parametrize("change", [DELETE, {"ttlSecondsAfterFinished": 3600}])
async def test_a_change_of_a_run_that_is_through_is_seen_by_an_operator_that_was_away(
    world: Any, change: dict[str, Any]
) -> None:
    async with world.operator():
        await world.apply()
        await world.play(*CHILDREN)
        await world.until(lambda: state_is(world, "Succeeded"))
    await world.client.patch(RUN, "demo", "default", {"spec": change})
    loop = Loop(Reconciler(world.client, RELEASE, Board(), b"key" * 16))
    await loop._sweep()  # without any event

    async def known() -> bool:
        run = await world.get()
        return bool(run["status"]["observedGeneration"] == run["metadata"]["generation"])

    await world.until(known)
    assert await has_finalizer(world) == (change == DELETE)
    await loop.stop()


def newer(run: dict[str, Any]) -> CGDRunSpec:
    """A spec as a newer operator reads it, which knows one more field."""
    return parse_spec(run | {"spec": {name: value for name, value in run["spec"].items() if name != "fromLater"}})


async def refused_by_now(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that a newer operator has begun."""
    definition = await world.client.get(CRD, "cgdruns.cgd.dev")
    spec = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    spec["x-kubernetes-preserve-unknown-fields"] = True
    await world.client.patch(CRD, "cgdruns.cgd.dev", None, {"spec": definition["spec"]})
    with monkeypatch.context() as patched:
        patched.setattr("cgd_operator.planning.dag.parse_spec", newer)
        async with world.operator():
            await world.apply({**DELETE, "fromLater": True})
            await world.until(lambda: running(world, "prepare"))


async def test_what_a_run_stored_that_this_operator_does_not_accept_is_deleted(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await refused_by_now(world, monkeypatch)
    async with world.operator():
        await world.until(lambda: state_is(world, "Refused"))
        stages = (await world.get())["status"]["stages"]
        assert stages[0]["name"] == "prepare", "what is known of its stages stays"
        await world.client.delete(RUN, "demo", "default")
        await world.until(lambda: cleaning(world))
        await world.end("clean")
        await world.until(lambda: gone(world))
    assert "is deleted" in (await notes(world))["Cleaned"]


async def test_what_a_run_stored_in_a_place_that_this_operator_cannot_read_is_told_to_stay(world: Any) -> None:
    async with world.operator():
        await world.apply(DELETE)
        await world.until(lambda: running(world, "prepare"))
    run = await world.get()
    run["spec"]["storage"] = {"container": "data"}
    run["status"]["stages"][0]["outputURI"] = "abfs://data/prepare/d1"
    real = Reconciler(world.client, RELEASE, Board(), b"key" * 16)
    await real._deletion.clean(run | {"metadata": run["metadata"] | {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, NOW)
    message = (await notes(world))["NotCleaned"]
    assert "was not deleted: this version of the operator cannot read its spec.storage, delete it by hand" in message
    assert "what stays: abfs://data/prepare/d1" in message
    assert "spec.storage.container: there is no such field" in message
    assert not await has_finalizer(world)


async def test_a_run_that_was_never_accepted_has_stored_nothing(world: Any) -> None:
    await world.apply(DELETE)
    run = await world.get()
    run["spec"]["fromLater"] = True
    real = Reconciler(world.client, RELEASE, Board(), b"key" * 16)
    await real._deletion.finalize(run, wanted=True)
    await real._deletion.clean(run | {"metadata": run["metadata"] | {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, NOW)
    assert not await has_finalizer(world)
    assert await world.children() == {}
    assert await notes(world) == {}


@pytest.mark.parametrize("finished", [False, True])
async def test_the_policy_may_change_at_any_time_and_other_finalizers_stay(world: Any, finished: bool) -> None:
    async with world.operator():
        run = await world.apply()
        meta = {"finalizers": ["example.org/other"]}
        await world.client.patch(RUN, "demo", "default", {"metadata": meta})
        await world.play(*CHILDREN if finished else CHILDREN[:1])
        await world.client.patch(RUN, "demo", "default", {"spec": DELETE})
        await world.until(lambda: has_finalizer(world))
        await world.client.patch(RUN, "demo", "default", {"spec": {"deletionPolicy": "Retain"}})
        await world.until(lambda: let_go(world))
        await world.client.delete(RUN, "demo", "default", uid=run["metadata"]["uid"])
        assert (await world.get())["metadata"]["finalizers"] == ["example.org/other"]
    assert "clean" not in await world.children()


async def let_go(world: Any) -> bool:
    return not await has_finalizer(world)
