"""The PyTorchJob controller: what its pods are told, when the job ends, and what is left of it."""

import asyncio

import pytest
from local_world import KUBECTL, condition, phase, true

from cgd_operator.cluster import POD, PYTORCHJOB, ApiError, Object

pytestmark = pytest.mark.asyncio(loop_scope="session")

WAIT = "sleep 60"


def env_of(pod: Object) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in pod["spec"]["containers"][0]["env"]}


async def test_pods_are_told_what_torchrun_needs(world):
    await world.pytorchjob(WAIT, WAIT, nprocPerNode="4")
    pods = {p["metadata"]["name"]: p for p in await world.when_pods(lambda pods: len(pods) == 2)}
    assert sorted(pods) == ["t-master-0", "t-worker-0"]
    master, worker = env_of(pods["t-master-0"]), env_of(pods["t-worker-0"])
    shared = {"WORLD_SIZE": "8", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PYTHONUNBUFFERED": "1"}
    shared |= {"MASTER_ADDR": "t-master-0", "PET_MASTER_ADDR": "t-master-0"}
    for env, rank in ((master, "0"), (worker, "1")):
        assert env | shared == env
        assert (env["RANK"], env["PET_NODE_RANK"]) == (rank, rank)
        assert env["MASTER_PORT"] == env["PET_MASTER_PORT"] == master["MASTER_PORT"]
    labels = pods["t-master-0"]["metadata"]["labels"]
    wanted = {"job-name": "t", "replica-type": "master", "replica-index": "0", "job-role": "master"}
    assert {key.rpartition("/")[2]: value for key, value in labels.items()} == wanted | {
        "operator-name": "pytorchjob-controller"
    }


async def test_the_worker_reaches_the_master(world):
    listen = "import os, socket; s = socket.create_server(('127.0.0.1', int(os.environ['MASTER_PORT']))); s.accept()"
    connect = (
        "import os, socket, time\n"
        "address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])\n"
        "while socket.socket().connect_ex(address): time.sleep(0.02)"
    )
    await world.pytorchjob(f'python3 -c "{listen}"', f'python3 -c "{connect}"')
    assert true(await world.finished("t", PYTORCHJOB), "Succeeded")


async def test_it_succeeds_with_its_master_and_by_default_leaves_a_running_worker(world):
    await world.pytorchjob('while [ ! -e "$HOME/end" ]; do sleep 0.02; done', WAIT)
    job = await world.until(PYTORCHJOB, "t", lambda job: true(job, "Running"))
    assert condition(job, "Created")["reason"] == "PyTorchJobCreated"
    await world.running("t-worker-0")
    (world.folder("t-master-0") / "end").touch()
    job = await world.until(PYTORCHJOB, "t", lambda job: true(job, "Succeeded"))
    assert condition(job, "Running")["status"] == "False"
    assert job["status"]["completionTime"] >= job["status"]["startTime"]
    assert job["status"]["replicaStatuses"]["Master"] == {"active": 0, "succeeded": 1, "failed": 0}
    assert (await world.running("t-worker-0"))["metadata"].get("deletionTimestamp") is None


async def test_clean_up_removes_a_running_worker_if_asked_to(world):
    await world.pytorchjob("true", WAIT, runPolicy={"cleanPodPolicy": "Running"})
    await world.finished("t", PYTORCHJOB)
    await world.when_pods(lambda pods: [pod["metadata"]["name"] for pod in pods] == ["t-master-0"])


async def test_a_permanent_exit_code_fails_the_job(world):
    await world.pytorchjob(WAIT, "exit 3")
    job = await world.finished("t", PYTORCHJOB)
    assert condition(job, "Failed")["reason"] == "PyTorchJobFailed"
    assert condition(job, "Failed")["message"] == "PyTorchJob t is failed because 1 Worker replica(s) failed."
    assert job["status"]["replicaStatuses"]["Worker"]["failed"] == 1
    assert (await world.event("ExitedWithCode"))["message"].endswith("t-worker-0 exited with code 3")


async def test_a_retryable_exit_code_starts_the_pod_again_at_the_same_port(world):
    again = world.cluster.folder / "again"
    listen = "import os, socket, time; s = socket.create_server(('', int(os.environ['MASTER_PORT']))); time.sleep(60)"
    connect = "import os, socket; exit(socket.socket().connect_ex(('127.0.0.1', int(os.environ['MASTER_PORT']))))"
    reach = f'until python3 -c "{connect}"; do sleep 0.02; done'
    once = f"{reach}; [ -e {again} ] || {{ touch {again}; exit 143; }}; sleep 60"
    await world.pytorchjob(f'python3 -c "{listen}"', once)
    first = await world.until(POD, "t-worker-0", bool)
    await world.event("PyTorchJobRestarting")
    second = await world.until(POD, "t-worker-0", lambda pod: pod["metadata"]["uid"] != first["metadata"]["uid"])
    assert env_of(second) == env_of(first)
    job = await world.until(PYTORCHJOB, "t", lambda job: true(job, "Running"))
    assert [c["type"] for c in job["status"]["conditions"]] == ["Created", "Running"]


async def test_restarts_end_at_the_backoff_limit(world):
    await world.pytorchjob("exit 130", runPolicy={"backoffLimit": 2})
    job = await world.finished("t", PYTORCHJOB)
    assert condition(job, "Failed")["message"] == (
        "PyTorchJob t has failed because it has reached the specified backoff limit"
    )
    assert job["status"]["restarts"] == 3


async def test_never_means_never(world):
    await world.pytorchjob("exit 143", restartPolicy="Never")
    assert true(await world.finished("t", PYTORCHJOB), "Failed")


async def test_on_failure_restarts_the_container_in_its_pod(world):
    await world.pytorchjob('[ -e "$HOME/again" ] || { touch "$HOME/again"; exit 1; }', restartPolicy="OnFailure")
    assert true(await world.finished("t", PYTORCHJOB), "Succeeded")
    [pod] = await world.pods()
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 1


async def test_an_evicted_replica_is_started_again(world):
    await world.pytorchjob(WAIT)
    first = await world.running("t-master-0")
    world.cluster.node.evict(world.namespace, "t-master-0")
    await world.until(
        POD,
        "t-master-0",
        lambda pod: pod["metadata"]["uid"] != first["metadata"]["uid"] and phase(pod) == "Running",
    )


async def test_suspension_ends_the_pods_and_is_told(world):
    await world.pytorchjob(WAIT)
    await world.until(PYTORCHJOB, "t", lambda job: true(job, "Running"))
    await world.client.patch(PYTORCHJOB, "t", world.namespace, {"spec": {"runPolicy": {"suspend": True}}})
    job = await world.until(PYTORCHJOB, "t", lambda job: true(job, "Suspended"))
    assert condition(job, "Running")["reason"] == "PyTorchJobSuspended"
    await world.when_pods(lambda pods: pods == [])
    await world.client.patch(PYTORCHJOB, "t", world.namespace, {"spec": {"runPolicy": {"suspend": False}}})
    job = await world.until(PYTORCHJOB, "t", lambda job: true(job, "Running"))
    assert condition(job, "Suspended")["reason"] == "PyTorchJobResumed"


async def test_a_finished_job_goes_after_its_time_to_live(world):
    await world.pytorchjob("true", runPolicy={"ttlSecondsAfterFinished": 0})
    await world.gone(PYTORCHJOB, "t")
    await world.when_pods(lambda pods: pods == [])


async def test_two_jobs_do_not_share_a_port(world):
    await world.pytorchjob(WAIT, name="a")
    await world.pytorchjob(WAIT, name="b")
    one, other = await world.when_pods(lambda pods: len(pods) == 2)
    assert env_of(one)["MASTER_PORT"] != env_of(other)["MASTER_PORT"]


async def test_the_crd_refuses_a_replica_without_a_template(world):
    spec = {"pytorchReplicaSpecs": {"Master": {"replicas": 1}}}
    with pytest.raises(ApiError, match="template"):
        await world.make(PYTORCHJOB, "bad", spec=spec)


async def test_kubectl_shows_the_state(world):
    await world.pytorchjob("true")
    await world.finished("t", PYTORCHJOB)
    words = ["--kubeconfig", str(world.cluster.kubeconfig_path), "-n", world.namespace, "get", "pytorchjob"]
    kubectl = await asyncio.create_subprocess_exec(KUBECTL, *words, stdout=asyncio.subprocess.PIPE)
    output, _ = await kubectl.communicate()
    assert output.decode().splitlines()[1].split()[:2] == ["t", "Succeeded"]
