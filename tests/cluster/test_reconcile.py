"""The operator process against an API server; the controllers are played by the test."""

import asyncio
import json
import random
from typing import Any, ClassVar

import pytest
from aiohttp import web
from support.builders import CHILDREN

from cgd_operator.controller.reconciler import Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import CRD, JOB, RUN, SECRET, TRAININGRUNTIME
from cgd_operator.planning import manifests

RELEASE = manifests.Release("generate", "train")

embedded_only = pytest.mark.parametrize("world", ["embedded"], indirect=True)
"""For what only the embedded API server can do: fail when told to, and list the requests it has had."""


def conditions(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["type"]: one for one in run["status"].get("conditions", [])}


async def test_a_run_goes_through_all_its_stages(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.play(*CHILDREN)
        await world.until(lambda: succeeded(world))
    run = await world.get()
    assert [stage["state"] for stage in run["status"]["stages"]] == ["Succeeded"] * 9
    assert conditions(run)["Ready"]["status"] == "True"
    assert run["status"]["observedGeneration"] == 1
    assert set(await world.children()) == set(CHILDREN)


async def succeeded(world: Any) -> bool:
    return bool(await world.state() == "Succeeded")


async def test_a_child_appears_only_when_what_it_needs_is_there(world: Any) -> None:
    async with world.operator():
        await world.apply()
        seen = []
        for stage in CHILDREN[:4]:
            await world.until(lambda stage=stage: has_child(world, stage))
            seen.append(sorted(await world.children()))
            await world.end(stage)
    assert seen == [sorted(CHILDREN[: count + 1]) for count in range(4)]


async def has_child(world: Any, stage: str) -> bool:
    return stage in await world.children()


async def test_the_operator_leaves_no_finalizer_and_no_annotation(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.until(lambda: has_child(world, "prepare"))
    meta = (await world.get())["metadata"]
    assert "finalizers" not in meta
    assert "annotations" not in meta


async def test_events_tell_the_story(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.end("prepare")
        await world.end("answer")
        await world.end("teacher", "Failed")
        await world.until(lambda: state_is(world, "Failed"))
        await world.until(lambda: has_event(world, "RunFailed"))
    reasons = [event["reason"] for event in await world.events()]
    assert sorted(reasons) == ["RunFailed", "StageFailed", "StageFailed", "StageSucceeded"]  # a teacher is two stages


async def has_event(world: Any, reason: str) -> bool:
    return any(event["reason"] == reason for event in await world.events())


async def state_is(world: Any, state: str) -> bool:
    return bool(await world.state() == state)


async def test_a_spec_that_slipped_past_the_schema_is_refused_in_the_status(world: Any) -> None:
    definition = await world.client.get(CRD, "cgdruns.cgd.dev")
    loose = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] = loose
    await world.client.patch(CRD, "cgdruns.cgd.dev", None, {"spec": definition["spec"]})
    async with world.operator():
        await world.apply({"storage": None, "typo": 1})
        await world.until(lambda: state_is(world, "Refused"))
        await world.until(lambda: has_event(world, "Refused"))
    told = conditions(await world.get())["Accepted"]
    assert told["status"] == "False"
    assert told["message"].splitlines() == [
        "spec.storage: is required",
        "spec.typo: there is no such field; `kubectl explain cgdrun.spec` lists those there are",
    ]
    assert await world.children() == {}


@pytest.mark.parametrize(
    ("backend", "missing", "told"),
    [
        ("auto", ["pytorchjobs.kubeflow.org", "trainjobs.trainer.kubeflow.org"], "neither PyTorchJob"),
        ("PyTorchJob", ["pytorchjobs.kubeflow.org"], "install the Kubeflow Training Operator"),
        ("TrainJob", ["trainjobs.trainer.kubeflow.org"], "install Kubeflow Trainer"),
    ],
)
async def test_without_a_backend_a_run_waits_says_why_and_goes_on_by_itself(
    world: Any, backend: str, missing: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not served is asked for again after 30 s on a cluster, and a sweep looks twice a minute."""
    monkeypatch.setattr("cgd_operator.controller.children.ABSENT_SECONDS", 0.2)
    monkeypatch.setattr("cgd_operator.controller.queue.SWEEP_SECONDS", 0.2)
    definitions = [await world.client.get(CRD, name) for name in missing]
    for name in missing:
        await world.client.delete(CRD, name)
    async with world.operator():
        await world.apply({"training.backend": backend})
        await world.until(lambda: is_stalled(world))
        stalled = conditions(await world.get())["Stalled"]
        assert stalled["reason"] == "TrainingBackendMissing"
        assert told in stalled["message"]
        assert (await world.client.list(JOB, "default"))[0] == []
        for name, definition in zip(missing, definitions, strict=True):
            fresh = {key: definition[key] for key in ("apiVersion", "kind", "spec")}
            await world.client.create(CRD, {**fresh, "metadata": {"name": name}})
        await world.until(lambda: has_child(world, "prepare"))


@pytest.mark.parametrize("backend", ["PyTorchJob", "TrainJob"])
async def test_a_training_runs_as_what_the_run_asks_for(world: Any, backend: str) -> None:
    async with world.operator():
        await world.apply({"training.backend": backend})
        await world.play(*CHILDREN)
        await world.until(lambda: succeeded(world))
    trained = (await world.children())["train-cgd"]
    assert trained["kind"] == backend
    runtimes, _ = await world.client.list(TRAININGRUNTIME, "default")
    names = [one["metadata"]["name"] for one in runtimes]
    assert names == ([trained["spec"]["runtimeRef"]["name"]] if backend == "TrainJob" else [])


async def test_auto_takes_what_is_served_and_a_run_that_trains_stays_with_it(world: Any) -> None:
    definition = await world.client.get(CRD, "pytorchjobs.kubeflow.org")
    await world.client.delete(CRD, "pytorchjobs.kubeflow.org")
    async with world.operator():
        await world.apply({"training.objectives": ["CGD", "SFT"]})
        await world.play(*CHILDREN[: CHILDREN.index("train-cgd")])
        await world.until(lambda: has_child(world, "train-cgd"))
        fresh = {key: definition[key] for key in ("apiVersion", "kind", "spec")}
        await world.client.create(CRD, {**fresh, "metadata": {"name": "pytorchjobs.kubeflow.org"}})
        await world.play("train-cgd")
        await world.until(lambda: has_child(world, "train-sft"))
    children = await world.children()
    assert [children[stage]["kind"] for stage in ("train-cgd", "train-sft")] == ["TrainJob", "TrainJob"]


async def is_stalled(world: Any) -> bool:
    stalled = conditions(await world.get()).get("Stalled")
    return stalled is not None and bool(stalled["status"] == "True")


@embedded_only
async def test_a_refused_child_is_told_and_tried_again(world: Any) -> None:
    refuse = True

    def fault(request: web.Request) -> web.Response | None:
        if refuse and request.method == "POST" and request.path.endswith("/jobs"):
            body = {"kind": "Status", "code": 403, "reason": "Forbidden", "message": "jobs are not allowed here"}
            return web.json_response(body, status=403)
        return None

    world.embedded.fault = fault
    async with world.operator():
        await world.apply()
        await world.until(lambda: is_refused(world))
        assert "jobs are not allowed here" in conditions(await world.get())["Stalled"]["message"]
        refuse = False
        await world.client.patch(RUN, "demo", "default", {"metadata": {"labels": {"touched": "yes"}}})
        await world.until(lambda: has_child(world, "prepare"))


async def is_refused(world: Any) -> bool:
    return conditions(await world.get()).get("Stalled", {}).get("reason") == "ChildRefused"


async def test_suspend_holds_the_child_and_resume_lets_it_go(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.end("prepare")
        await world.until(lambda: has_child(world, "answer"))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(lambda: is_held(world, "answer", True))
        await world.until(lambda: state_is(world, "Suspended"))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": False}})
        await world.until(lambda: is_held(world, "answer", False))
        await world.play("answer", "teacher", "check")
        await world.until(lambda: has_child(world, "train-cgd"))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        await world.until(lambda: is_held(world, "train-cgd", True))


async def is_held(world: Any, stage: str, held: bool) -> bool:
    child = (await world.children())[stage]
    policy = child["spec"].get("runPolicy", child["spec"])
    return bool(policy.get("suspend", False)) is held


async def test_a_run_that_was_born_suspended_starts_nothing(world: Any) -> None:
    async with world.operator():
        await world.apply({"suspend": True})
        await world.until(lambda: state_is(world, "Suspended"))
    assert await world.children() == {}


async def test_a_failed_job_that_is_deleted_is_tried_again(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.end("prepare", "Failed")
        await world.until(lambda: state_is(world, "Failed"))
        name = (await world.children())["prepare"]["metadata"]["name"]
        await world.client.delete(JOB, name, "default")
        await world.play(*CHILDREN)
        await world.until(lambda: succeeded(world))


async def test_a_finished_run_stays_finished_when_its_jobs_are_cleaned_up(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.play(*CHILDREN)
        await world.until(lambda: succeeded(world))
        for child in (await world.children()).values():
            await world.client.delete(manifests.KINDS[child["kind"]], child["metadata"]["name"], "default")
        await world.client.patch(RUN, "demo", "default", {"metadata": {"labels": {"touched": "yes"}}})
        await asyncio.sleep(0.5)
    assert await world.children() == {}
    assert await world.state() == "Succeeded"


async def test_a_status_that_was_wiped_comes_back(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.play("prepare", "answer")
        await world.until(lambda: has_child(world, "teacher"))
        await world.until(lambda: stage_is(world, "critique"))
        before = (await world.get())["status"]
        await world.client.patch(RUN, "demo", "default", {"status": None}, subresource="status")
        await world.until(lambda: stage_is(world, "critique"))
        after = (await world.get())["status"]
    assert [(one["name"], one["state"]) for one in after["stages"]] == [
        (one["name"], one["state"]) for one in before["stages"]
    ]


async def stage_is(world: Any, stage: str) -> bool:
    return bool((await world.get()).get("status", {}).get("stage") == stage)


async def test_a_run_is_not_observed_until_the_operator_has_looked(world: Any) -> None:
    await world.apply({"suspend": True})
    status = (await world.get())["status"]
    assert (status["observedGeneration"], status["state"]) == (0, "New")
    assert not {"conditions", "stages"} & status.keys()  # kubectl waits for what is missing, and fails on an empty list
    async with world.operator():
        await world.until(lambda: state_is(world, "Suspended"))
    assert (await world.get())["status"]["observedGeneration"] == 1


async def test_a_change_of_a_run_that_has_ended_is_observed_and_starts_nothing(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.play(*CHILDREN)
        await world.until(lambda: succeeded(world))
        before = await world.get()
        for name, child in (await world.children()).items():
            if name != "report":
                await world.client.delete(manifests.KINDS[child["kind"]], child["metadata"]["name"], "default")
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        after = await world.until(lambda: observed(world, 2))
    assert {name: one["status"] for name, one in conditions(after).items()} == {
        name: one["status"] for name, one in conditions(before).items()
    }
    assert set(await world.children()) == {"report"}


async def observed(world: Any, generation: int) -> Any:
    run = await world.get()
    return run if run["status"]["observedGeneration"] == generation else None


async def test_two_runs_do_not_disturb_each_other(world: Any) -> None:
    async with world.operator():
        await world.apply(name="one")
        await world.apply(name="two")
        await world.until(lambda: both(world))
    jobs = (await world.client.list(JOB, "default"))[0]
    owners = {job["metadata"]["ownerReferences"][0]["name"] for job in jobs}
    assert owners == {"one", "two"}


async def both(world: Any) -> bool:
    return len((await world.client.list(JOB, "default"))[0]) == 2


async def test_a_run_that_is_applied_again_after_deletion_gets_children_of_its_own(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.until(lambda: has_child(world, "prepare"))
        old = (await world.children())["prepare"]
        await world.client.delete(RUN, "demo", "default")
        await world.apply()
        await world.until(lambda: both(world))
    names = {job["metadata"]["name"] for job in (await world.client.list(JOB, "default"))[0]}
    assert len(names) == 2
    assert old["metadata"]["name"] in names


@embedded_only
async def test_at_rest_nothing_is_written(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.end("prepare")
        await world.until(lambda: stage_is(world, "answer"))
    await world.apply({"suspend": True}, name="resting")
    reconciler = Reconciler(world.client, RELEASE, Board(), b"key")
    for name in ("demo", "resting"):
        await reconciler.reconcile("default", name)
    before = len([one for one in world.embedded.requests if one[0] != "GET"])
    for _ in range(5):
        for name in ("demo", "resting"):
            await reconciler.reconcile("default", name)
    assert len([one for one in world.embedded.requests if one[0] != "GET"]) == before


class Killed(BaseException):
    """The operator's end, right after a write has reached the API server."""


class Mortal(Cluster):
    """A connection whose owner dies after every write, once for each."""

    survived: ClassVar[set[str]] = set()

    async def _call(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        answer = await super()._call(method, path, body, **options)
        write = f"{method} {path} {json.dumps(body)}"
        if method != "GET" and write not in self.survived:
            self.survived.add(write)
            raise Killed
        return answer


async def test_an_operator_that_dies_after_every_write_brings_the_run_to_the_same_end(world: Any) -> None:
    run = await world.apply()
    states, deaths = [], 0
    async with await Mortal.connect(str(world.kubeconfig), manager="cgd-operator") as mortal:
        while (state := await world.state()) != "Succeeded":
            states.append(state)
            try:
                await Reconciler(mortal, RELEASE, Board(), b"key").reconcile("default", "demo")
                waiting = [stage for stage, child in (await world.children()).items() if not child.get("status")]
                await world.end(waiting[0])
            except Killed:
                deaths += 1
            assert deaths < 200
    assert deaths > 20
    assert set(await world.children()) == set(CHILDREN)
    assert {child["metadata"]["ownerReferences"][0]["uid"] for child in (await world.children()).values()} == {
        run["metadata"]["uid"]
    }
    order = [
        "New",
        "Pending",
        "Preparing",
        "Answering",
        "Critiquing",
        "Checking",
        "Training",
        "Evaluating",
        "Reporting",
    ]
    assert [order.index(state) for state in states] == sorted(order.index(state) for state in states)


@embedded_only
@pytest.mark.parametrize("code", [409, 429, 500, 503])
async def test_api_faults_are_waited_out(world: Any, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cgd_operator.controller.queue.RETRY_SECONDS", 0.05)
    dice = random.Random(5)

    def a_third(request: web.Request) -> web.Response | None:
        if "fieldManager=cgd-operator" not in request.path_qs or dice.random() > 1 / 3:
            return None
        return web.json_response({"code": code, "reason": "Fault", "message": "injected"}, status=code)

    world.embedded.fault = a_third
    async with world.operator():
        await world.apply()
        await world.play(*CHILDREN)
        await world.until(lambda: succeeded(world))
    assert set(await world.children()) == set(CHILDREN)


async def test_the_progress_tokens_are_in_a_secret_that_belongs_to_the_run(world: Any) -> None:
    async with world.operator():
        run = await world.apply()
        await world.until(lambda: has_child(world, "prepare"))
    (secret,) = (await world.client.list(SECRET, "default"))[0]
    assert secret["metadata"]["ownerReferences"][0]["uid"] == run["metadata"]["uid"]
    assert set(secret["data"]) == set(CHILDREN)


def tried_secrets(world: Any, since: int) -> int:
    return sum(method == "POST" and "/secrets?" in path for method, path in list(world.embedded.requests)[since:])


@embedded_only
async def test_the_secret_that_a_child_has_is_not_created_again_after_a_restart(world: Any) -> None:
    async def goes_on(key: bytes) -> int:
        since = len(world.embedded.requests)
        await Reconciler(world.client, RELEASE, Board(), key).reconcile("default", "demo")
        return tried_secrets(world, since)

    await world.apply()
    assert await goes_on(b"key") == 1
    await world.end("prepare")
    assert await goes_on(b"key") == 0
    await world.end("answer")
    assert await goes_on(b"another key") == 1
    assert {"prepare", "answer", "teacher"} == set(await world.children())


@embedded_only
async def test_a_secret_that_was_refused_is_tried_again_with_the_next_child(world: Any) -> None:
    def refuses(request: web.Request) -> web.Response | None:
        if request.method != "POST" or not request.path.endswith("/secrets"):
            return None
        return web.json_response({"code": 403, "reason": "Forbidden", "message": "exceeded quota"}, status=403)

    reconciler = Reconciler(world.client, RELEASE, Board(), b"key")
    world.embedded.fault = refuses
    await world.apply()
    await reconciler.reconcile("default", "demo")
    world.embedded.fault = None
    await world.end("prepare")
    await reconciler.reconcile("default", "demo")
    assert len((await world.client.list(SECRET, "default"))[0]) == 1
