"""The operator above a node, controllers and quotas as they are; a script plays the stage programs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.builders import CHILDREN, RELEASE
from support.local_world import FAST, IMAGE
from support.patience import PATIENCE

from cgd_local import jobs, pytorchjobs, trainjobs
from cgd_local.controllers import Controller, stop_task
from cgd_local.garbage import GarbageCollector
from cgd_local.node import Node
from cgd_local.nodes import preempt
from cgd_operator.kube.kinds import JOB, POD, PYTORCHJOB, RUN, SECRET, TRAININGRUNTIME, TRAINJOB, Kind
from cgd_operator.planning.dag import Run, plan
from cgd_operator.planning.manifests import STAGE_LABEL, manifest, training_runtime

pytestmark = pytest.mark.parametrize("world", ["embedded"], indirect=True)

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
QUOTA = Kind("v1", "ResourceQuota", "resourcequotas")
PRIORITY = Kind("scheduling.k8s.io/v1", "PriorityClass", "priorityclasses", namespaced=False)
LAG = 1.0
PYTHON = '#!/bin/sh\nprogram="$PROGRAMS/${2#cgd_stages.}"\nif [ -e "$program" ]; then . "$program"; fi\n'
"""`python -m cgd_stages.<stage>` does what the test has written for it, or ends well at once."""
GOES_ON = "trap 'exit 143' TERM; while [ ! -e $PROGRAMS/end ]; do sleep 0.02; done"
WORDS = '{"outcome": "failed", "message": "no such bucket", "hint": "create it"}'
SPEAKS = f"printf '{WORDS}' > $CGD_TERMINATION_LOG; exit 3"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cgd_operator.controller.queue.SWEEP_SECONDS", 0.1)
    monkeypatch.setattr("cgd_local.controllers.REFUSED_SECONDS", 0.1)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Where the test writes what the programs do."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    return folder


@asynccontextmanager
async def cluster(world: Any, programs: Path, *, status_lag: float = 0) -> AsyncIterator[Node]:
    """A node and the controllers of all children, and the operator."""
    environment = {"PATH": f"{programs}:{IMAGE['PATH']}", "PROGRAMS": str(programs)}
    more: Any = {"environment": environment, "gpus": 8, "backoff": FAST, "status_lag": status_lag}
    async with AsyncExitStack() as stack:
        node = Node(world.client, programs.parent / "node", **more)
        await node.start()
        stack.push_async_callback(node.stop)
        for controller in (
            Controller(world.client, JOB, partial(jobs.decide, backoff=FAST), finalizer=jobs.TRACKED),
            Controller(world.client, PYTORCHJOB, pytorchjobs.decide, refusal="FailedCreatePod"),
            trainjobs.TrainJobController(world.client),
            GarbageCollector(world.client),
        ):
            stack.push_async_callback(stop_task, asyncio.create_task(controller.run()))
        await stack.enter_async_context(world.operator())
        yield node


async def make(world: Any, kind: Kind, name: str, **body: Any) -> None:
    meta = {"name": name} | ({"namespace": "default"} if kind.namespaced else {})
    await world.client.create(kind, {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": meta, **body})


async def stage(world: Any, name: str = "answer") -> dict[str, Any]:
    stages: list[dict[str, Any]] = (await world.get()).get("status", {}).get("stages", [])
    return next((one for one in stages if one["name"] == name), {})


async def pod_of(world: Any, name: str, phase: str, *, without: str = "") -> dict[str, Any] | None:
    """A pod of a stage in that phase, if there is one of another uid."""
    pods = (await world.client.list(POD, "default", labels=f"{STAGE_LABEL}={name}"))[0]
    return next((pod for pod in pods if pod["status"]["phase"] == phase and pod["metadata"]["uid"] != without), None)


async def gone(world: Any, uid: str, name: str) -> dict[str, Any]:
    """The last state of a pod that goes."""
    async for event, pod in world.client.watch(POD, "default"):
        if event == "DELETED" and pod["metadata"]["uid"] == uid:
            last: dict[str, Any] = pod
            return last
    raise AssertionError(f"the watch of {name} has ended")


def seconds(first: str, last: str) -> float:
    return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()


async def is_in_state(world: Any, state: str) -> bool:
    return bool(await world.state() == state)


async def test_what_a_late_kubelet_tells_is_counted_as_it_was(world: Any, programs: Path) -> None:
    (programs / "generate").write_text(GOES_ON)
    async with cluster(world, programs, status_lag=LAG):
        await world.apply()
        pod = (await world.until(lambda: pod_of(world, "answer", "Running")))["metadata"]
        watch = asyncio.create_task(gone(world, pod["uid"], pod["name"]))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        last = (await asyncio.wait_for(watch, PATIENCE))["status"]
        assert last["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 143
        await world.until(lambda: is_in_state(world, "Suspended"))
        known = [datetime.now(UTC).isoformat()]
        (programs / "generate").write_text(SPEAKS)
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": False}})
        failed = (await world.until(lambda: pod_of(world, "answer", "Failed")))["status"]
        await world.until(lambda: is_in_state(world, "Failed"))
        known.append(datetime.now(UTC).isoformat())
    told = await stage(world)
    assert told["message"].endswith("exit code 3: no such bucket. create it")
    assert told["attempts"] == 1
    ends = [each["containerStatuses"][0]["state"]["terminated"]["finishedAt"] for each in (last, failed)]
    held, most = (
        sum(seconds(each["startTime"], until) for each, until in zip((last, failed), untils, strict=True))
        for untils in (ends, known)
    )
    assert held <= told["gpuSeconds"] <= most + 1, "what it was thought to hold meanwhile is never taken back"


async def test_a_pod_that_is_deleted_before_it_began_held_its_gpus_until_then(world: Any, programs: Path) -> None:
    (programs / "prepare").write_text(GOES_ON)
    await make(world, SECRET, "keys", stringData=dict.fromkeys(KEYS, "x"))
    async with cluster(world, programs):
        await world.apply({"storage.credentialsSecretRef": {"name": "keys"}})
        await world.until(lambda: pod_of(world, "prepare", "Running"))
        await world.client.delete(SECRET, "keys", "default")
        (programs / "end").touch()
        pod = await world.until(lambda: pod_of(world, "answer", "Pending"))
        await world.until(lambda: is_in_state(world, "Waiting"))
        await asyncio.sleep(3)
        watch = asyncio.create_task(gone(world, pod["metadata"]["uid"], "answer"))
        before = datetime.now(UTC).isoformat()
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": True}})
        last = (await asyncio.wait_for(watch, PATIENCE))["status"]
        least, most = (seconds(last["startTime"], at) for at in (before, datetime.now(UTC).isoformat()))
        assert last["containerStatuses"][0]["state"]["terminated"]["reason"] == "ContainerStatusUnknown"
        await make(world, SECRET, "keys", stringData=dict.fromkeys(KEYS, "x"))
        again = datetime.now(UTC).isoformat()
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": False}})
        await world.until(lambda: ended(world, "answer"))
        most += seconds(again, datetime.now(UTC).isoformat())
    assert least - 1 <= (await stage(world))["gpuSeconds"] <= most + 1, "whole seconds; the next one took a moment"


async def ended(world: Any, name: str) -> bool:
    return bool((await stage(world, name)).get("state") == "Succeeded")


async def test_tries_of_pods_that_are_gone_count_too(world: Any, programs: Path) -> None:
    (programs / "generate").write_text("[ ! -e $PROGRAMS/fails ] || exit 201")
    (programs / "fails").touch()
    uid = ""
    async with cluster(world, programs):
        await world.apply({"retries": 3})
        for _ in range(2):
            failed = (await world.until(lambda uid=uid: pod_of(world, "answer", "Failed", without=uid)))["metadata"]
            uid = failed["uid"]
            await world.client.delete(POD, failed["name"], "default", uid=uid)
        await world.until(lambda: pod_of(world, "answer", "Failed", without=uid))
        (programs / "fails").unlink()
        await world.until(lambda: ended(world, "answer"))
    assert (await stage(world))["attempts"] >= 4


async def test_a_quota_for_a_priority_class_holds_only_the_stages_that_have_it(world: Any, programs: Path) -> None:
    selector = {"scopeName": "PriorityClass", "operator": "In", "values": ["high"]}
    scope = {"hard": {"pods": "0"}, "scopeSelector": {"matchExpressions": [selector]}}
    await make(world, PRIORITY, "high", value=1)
    await make(world, QUOTA, "urgent", spec=scope)
    async with cluster(world, programs):
        await world.apply({"placement.student.priorityClassName": "high"})
        await world.until(lambda: says(world, "exceeded quota: urgent, requested: pods=1, used: pods=0"))
        assert await ended(world, "prepare")
        await world.client.patch(QUOTA, "urgent", "default", {"spec": {"hard": {"pods": "9"}}})
        await world.until(lambda: ended(world, "answer"))


async def test_a_full_quota_of_jobs_is_told_and_the_run_goes_on_when_it_is_raised(world: Any, programs: Path) -> None:
    await make(world, QUOTA, "few", spec={"hard": {"count/jobs.batch": "1"}})
    async with cluster(world, programs):
        await world.apply()
        await world.until(lambda: says(world, "exceeded quota: few, requested: count/jobs.batch=1"))
        conditions = {one["type"]: one["status"] for one in (await world.get())["status"]["conditions"]}
        assert conditions["Stalled"] == "False"
        await world.client.patch(QUOTA, "few", "default", {"spec": {"hard": {"count/jobs.batch": "9"}}})
        await world.until(lambda: ended(world, "answer"))


@pytest.mark.parametrize(
    ("scope", "holds"),
    [("NotTerminating", True), ("NotBestEffort", True), ("BestEffort", False), ("Terminating", False)],
)
async def test_a_quota_with_a_scope_holds_stages_only_if_it_is_for_them(
    world: Any, programs: Path, scope: str, holds: bool
) -> None:
    await make(world, QUOTA, "scoped", spec={"hard": {"pods": "0"}, "scopes": [scope]})
    async with cluster(world, programs):
        await world.apply()
        if holds:
            await world.until(lambda: says(world, "exceeded quota: scoped, requested: pods=1, used: pods=0"))
            await world.client.patch(QUOTA, "scoped", "default", {"spec": {"hard": {"pods": "9"}}})
        await world.until(lambda: ended(world, "prepare"))


async def test_a_preempted_pod_is_told_made_again_and_costs_no_retry(world: Any, programs: Path) -> None:
    stores = "while [ ! -e $PROGRAMS/stored ]; do sleep 0.02; done"
    (programs / "generate").write_text(GOES_ON.replace("exit 143", f"{stores}; exit 143"))
    async with cluster(world, programs):
        await world.apply({"retries": 0})
        pod = await world.until(lambda: pod_of(world, "answer", "Running"))
        await preempt(world.client, pod)
        await world.until(lambda: has_said(world, "answer", "is being deleted (PreemptionByScheduler: default-sched"))
        (programs / "stored").touch()
        uid = pod["metadata"]["uid"]
        await world.until(lambda: pod_of(world, "answer", "Running", without=uid))
        (programs / "end").touch()
        await world.until(lambda: ended(world, "answer"))


async def has_said(world: Any, name: str, words: str) -> bool:
    return words in (await stage(world, name)).get("message", "")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "program"), [("answer", "generate"), ("train-cgd", "train")])
async def test_a_stage_that_fills_its_volume_again_and_again_fails_in_the_kubelets_words(
    world: Any, programs: Path, name: str, program: str
) -> None:
    """It exits with 143 when it is evicted, which a Job, also that of a TrainJob, takes for an interruption, and makes
    its pod again."""
    (programs / program).write_text(GOES_ON)
    async with cluster(world, programs) as node:
        await world.apply({"retries": 1, "training.backend": "TrainJob"})
        uid = ""
        for _ in range(2):
            pod = (await world.until(lambda uid=uid: pod_of(world, name, "Running", without=uid)))["metadata"]
            uid = pod["uid"]
            node.overuse("default", pod["name"], "scratch")
            await world.until(lambda uid=uid: is_over(world, uid))
        await world.until(lambda: is_in_state(world, "Failed"))
    told = await stage(world, name)
    assert told["reason"] == "GivenUp"
    assert "evicted for what they used 2 times, and spec.retries is 1" in told["message"]
    assert 'Usage of EmptyDir volume "scratch" exceeds the limit' in told["message"]
    assert told["state"] == "Failed", "its controller has ended it, and nothing makes another pod"


@pytest.mark.slow
async def test_a_training_of_an_older_operator_that_is_given_up_ends_when_its_restarts_are_used_up(
    world: Any, programs: Path
) -> None:
    """Its runtime lets the JobSet restart a Job that has met the operator's deadline."""
    (programs / "train").write_text(GOES_ON)
    async with cluster(world, programs) as node:
        await world.apply({"retries": 1, "training.backend": "TrainJob", "suspend": True})
        await world.until(lambda: is_in_state(world, "Suspended"))
        run = await world.get()
        (child,) = [one for one in plan(Run.of(run), "TrainJob") if one.kind == "TrainJob"]
        runtime = training_runtime(Run.of(run), child, RELEASE)
        del runtime["spec"]["template"]["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"][1]
        await world.client.create(TRAININGRUNTIME, runtime)
        await world.client.create(TRAINJOB, manifest(Run.of(run), child, RELEASE))
        await world.client.patch(RUN, "demo", "default", {"spec": {"suspend": False}})
        uid = ""
        while not await is_in_state(world, "Failed"):
            pod = await world.until(lambda uid=uid: next_or_end(world, uid))
            if pod is not True:
                uid = pod["metadata"]["uid"]
                node.overuse("default", pod["metadata"]["name"], "scratch")
    told = await stage(world, "train-cgd")
    assert told["reason"] == "GivenUp"
    assert "after its JobSet was restarted once" in told["message"]


async def next_or_end(world: Any, uid: str) -> dict[str, Any] | bool | None:
    """The training's next pod, or that the run has failed."""
    return await is_in_state(world, "Failed") or await pod_of(world, "train-cgd", "Running", without=uid)


async def is_over(world: Any, uid: str) -> bool:
    pods = (await world.client.list(POD, "default"))[0]
    return all(pod["status"]["phase"] == "Failed" for pod in pods if pod["metadata"]["uid"] == uid)


async def says(world: Any, words: str) -> bool:
    return words in str((await world.get()).get("status", {}).get("conditions"))


async def test_a_jobset_that_may_not_have_its_service_is_told(
    world: Any, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cgd_operator.facts.waiting.QUIET", timedelta(0))
    await make(world, QUOTA, "none", spec={"hard": {"services": "0"}})
    async with cluster(world, programs):
        await world.apply({"training.backend": "TrainJob"})
        await world.until(lambda: says(world, "stage train-cgd waits: no pod can be made: exceeded quota: none"))
        await world.client.patch(QUOTA, "none", "default", {"spec": {"hard": {"services": "1"}}})
        await world.until(lambda: ended(world, "train-cgd"))


async def test_a_run_goes_through_all_its_stages_above_a_late_kubelet(world: Any, programs: Path) -> None:
    async with cluster(world, programs, status_lag=0.1):
        await world.apply()
        await world.until(lambda: is_in_state(world, "Succeeded"))
        assert set(await world.children()) == set(CHILDREN)
