"""The whole: it starts, it stops, and however it ends no process of a pod is left."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from support.local_world import FAST, IMAGE, World, container, containers_below, eventually, phase
from support.patience import PATIENCE

from cgd_local.background import holder
from cgd_local.cluster import LocalCluster, venv_environment
from cgd_local.controllers import stop_task
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import JOB, POD

STUBBORN = "trap '' TERM INT HUP; setsid sh -c 'trap \"\" TERM; touch up; sleep 60; sleep 60' & wait; sleep 60"


def pod(script: str, name: str = "p") -> Object:
    spec = {"containers": [container(script)], "restartPolicy": "Never"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"}, "spec": spec}


async def container_below(folder: Path) -> None:
    await eventually(lambda: list(folder.rglob("up")), "process")


async def test_stopping_ends_every_process_even_a_stubborn_one(tmp_path, monkeypatch):
    monkeypatch.setattr("cgd_local.node.STOP_GRACE_SECONDS", 0.2)
    async with LocalCluster(tmp_path, backoff=FAST) as cluster:
        await cluster.client.create(POD, pod(STUBBORN))
        await container_below(tmp_path)
        assert containers_below(tmp_path)
    assert not containers_below(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_however_our_process_ends_the_pods_processes_end_too(tmp_path, number):
    program = (
        "import asyncio, json, pathlib, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from cgd_local.cluster import LocalCluster\n"
        "from cgd_operator.kube.client import POD\n"
        "import cgd_local.node\n"
        "cgd_local.node.STOP_GRACE_SECONDS = 0.2\n"
        "async def main():\n"
        "    async with LocalCluster(pathlib.Path(sys.argv[1])) as cluster:\n"
        "        await cluster.client.create(POD, json.loads(sys.argv[2]))\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path), json.dumps(pod(STUBBORN))]
    process = await asyncio.create_subprocess_exec(*words, stderr=asyncio.subprocess.DEVNULL)
    await container_below(tmp_path)
    os.kill(process.pid, number)
    await asyncio.wait_for(process.wait(), PATIENCE)  # it has a cluster to take down, on a busy machine
    await eventually(lambda: not containers_below(tmp_path), "end of the container")


async def test_ctrl_c_ends_the_demo_though_it_was_started_in_the_background(tmp_path):
    """As from a script with `&` or `nohup`: SIGINT is ignored then, and what is ignored is inherited."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cgd_local", "--folder", str(tmp_path)),
        cwd=Path(__file__).parents[3],
        stdout=asyncio.subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert (await asyncio.wait_for(process.stdout.readline(), PATIENCE)).startswith(b"S3 ")
    process.send_signal(signal.SIGINT)
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 130
    assert b"Ending the run's pods, the cluster and S3" in out
    assert b"To go on: " in out
    assert holder(tmp_path) is None
    await eventually(lambda: not containers_below(tmp_path), "end of the processes")


async def test_after_a_restart_of_the_node_its_lost_pods_are_replaced_at_no_cost(tmp_path):
    """The API outlives the node: what `kubeconfig=` is for."""
    async with LocalCluster(tmp_path / "first", environment=IMAGE, backoff=FAST) as first:
        world = World(first, "default")
        await world.job("sleep 60", backoffLimit=0)
        [pod] = await world.when_pods(lambda pods: [pod for pod in pods if phase(pod) == "Running"])
        await first.node.crash()
        async with LocalCluster(tmp_path / "second", kubeconfig=first.kubeconfig_path, backoff=FAST):
            await world.when_pods(lambda pods: [p for p in pods if is_new(p, pod) and phase(p) == "Running"])
            assert (await world.until(JOB, "j", bool))["status"]["failed"] == 0


def is_new(pod: Object, old: Object) -> bool:
    return bool(pod["metadata"]["uid"] != old["metadata"]["uid"])


async def test_containers_find_this_venvs_programs_first():
    assert venv_environment()["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


async def test_a_failed_start_leaves_nothing_running(tmp_path):
    (tmp_path / "nowhere").write_text("not: a kubeconfig")
    with pytest.raises(Exception, match=r"(?i)config"):
        async with LocalCluster(tmp_path, kubeconfig=tmp_path / "nowhere"):
            pass
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_task_that_takes_a_cancellation_for_its_own_time_out_is_cancelled_again():
    async def deaf_once() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    task = asyncio.create_task(deaf_once())
    await asyncio.sleep(0)
    await stop_task(task)
    assert task.cancelled()
