"""The PyTorchJob controller: what its pods are told, when the job ends, and what is left of it."""

import asyncio

import pytest
from support.local_world import KUBECTL, condition, eventually, phase, true

from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import POD, PYTORCHJOB, ApiError

pytestmark = pytest.mark.asyncio(loop_scope="session")

WAIT = "sleep 60"
END = 'while [ ! -e "$HOME/end" ]; do sleep 0.02; done'
NONROOT = {"securityContext": {"runAsNonRoot": True}}


def env_of(pod: Object) -> dict[str, str]:
    return {entry["name"]: entry.get("value") for entry in pod["spec"]["containers"][0]["env"]}


def labels_of(pod: Object) -> dict[str, str]:
    return {key.rpartition("/")[2]: value for key, value in pod["metadata"]["labels"].items()}


def waits(pod: Object) -> Object:
    """Why the init container of a pod waits."""
    [init] = pod.get("status", {}).get("initContainerStatuses") or [{}]
    waiting: Object = init.get("state", {}).get("waiting", {})
    return waiting


async def test_workers_alone_are_told_how_many_they_are_and_by_their_label_who(world):
    await world.pytorchjob(f"echo $NUMBER; {WAIT}", 2, nprocPerNode="4")
    pods = {p["metadata"]["name"]: p for p in await world.when_pods(lambda pods: len(pods) == 2)}
    assert sorted(pods) == ["t-worker-0", "t-worker-1"]
    for index, pod in enumerate(pods.values()):
        told = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PYTHONUNBUFFERED": "1"}
        assert env_of(pod) == told | {"NUMBER": None}
        assert "initContainers" not in pod["spec"]
        await world.running(f"t-worker-{index}")
    shared = {"job-name": "t", "operator-name": "pytorchjob-controller", "replica-type": "worker"}
    assert labels_of(pods["t-worker-0"]) == shared | {"replica-index": "0", "job-role": "master"}
    assert labels_of(pods["t-worker-1"]) == shared | {"replica-index": "1"}


async def test_a_worker_beside_a_master_gets_an_init_container_that_runs_as_root(world):
    await world.pytorchjob(WAIT, master=WAIT, pod=NONROOT)
    await world.running("t-master-0")
    worker = await world.until(POD, "t-worker-0", lambda pod: waits(pod).get("reason") == "CreateContainerConfigError")
    assert "runAsNonRoot" in waits(worker)["message"]
    assert phase(worker) == "Pending"


async def test_workers_alone_start_where_pods_forbid_root(world):
    await world.pytorchjob("true", 2, pod=NONROOT)
    assert true(await world.finished("t", PYTORCHJOB), "Succeeded")


async def test_where_root_is_not_forbidden_a_worker_reaches_its_master(world):
    listen = "import os, socket; s = socket.create_server(('127.0.0.1', int(os.environ['MASTER_PORT']))); s.accept()"
    connect = (
        "import os, socket, time\n"
        "address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])\n"
        "def reaches():\n"
        "    try: return not socket.socket().connect_ex(address)\n"
        "    except socket.gaierror: return False\n"
        "while not reaches(): time.sleep(0.02)"
    )
    await world.pytorchjob(f'python3 -c "{connect}"', master=f'python3 -c "{listen}"', nprocPerNode="4")
    assert true(await world.finished("t", PYTORCHJOB), "Succeeded")
    env = env_of(await world.until(POD, "t-worker-0", bool))
    assert env["MASTER_ADDR"] == env["PET_MASTER_ADDR"] == "t-master-0"
    assert (env["RANK"], env["PET_NODE_RANK"], env["WORLD_SIZE"]) == ("1", "1", "8")


async def test_it_succeeds_with_its_master_and_by_default_leaves_a_running_worker(world):
    await world.pytorchjob(WAIT, master=END)
    job = await world.until(PYTORCHJOB, "t", lambda job: true(job, "Running"))
    assert condition(job, "Created")["reason"] == "PyTorchJobCreated"
    await world.running("t-worker-0")
    (world.folder("t-master-0") / "end").touch()
    job = await world.until(PYTORCHJOB, "t", lambda job: true(job, "Succeeded"))
    assert condition(job, "Running")["status"] == "False"
    assert job["status"]["completionTime"] >= job["status"]["startTime"]
    assert job["status"]["replicaStatuses"]["Master"] == {"active": 0, "succeeded": 1, "failed": 0}
    assert (await world.running("t-worker-0"))["metadata"].get("deletionTimestamp") is None


async def test_without_a_master_it_succeeds_only_when_all_workers_have(world):
    await world.pytorchjob(f'[ "$NUMBER" = 0 ] || {END}', 2, runPolicy={"cleanPodPolicy": "Running"})
    await world.ended("t-worker-0")
    counts = {"active": 1, "succeeded": 1, "failed": 0}
    job = await world.until(
        PYTORCHJOB, "t", lambda job: job.get("status", {}).get("replicaStatuses", {}).get("Worker") == counts
    )
    assert not true(job, "Succeeded")
    (world.folder("t-worker-1") / "end").touch()
    assert condition(await world.finished("t", PYTORCHJOB), "Succeeded")["reason"] == "PyTorchJobSucceeded"
    assert [phase(pod) for pod in await world.pods()] == ["Succeeded", "Succeeded"]


async def test_clean_up_removes_a_running_worker_if_asked_to(world):
    await world.pytorchjob(WAIT, master="true", runPolicy={"cleanPodPolicy": "Running"})
    await world.finished("t", PYTORCHJOB)
    await world.when_pods(lambda pods: [pod["metadata"]["name"] for pod in pods] == ["t-master-0"])


async def test_a_permanent_exit_code_fails_the_job(world):
    await world.pytorchjob(f'[ "$NUMBER" = 0 ] && exit 3; {WAIT}', 2, runPolicy={"cleanPodPolicy": "Running"})
    job = await world.finished("t", PYTORCHJOB)
    assert condition(job, "Failed")["reason"] == "PyTorchJobFailed"
    assert condition(job, "Failed")["message"] == 'job "t" is failing because "Worker" replica(s) failed.'
    assert job["status"]["replicaStatuses"]["Worker"]["failed"] == 1
    assert (await world.event("ExitedWithCode"))["message"].endswith(".t-worker-0 exited with code 3")
    await world.when_pods(lambda pods: [pod["metadata"]["name"] for pod in pods] == ["t-worker-0"])


async def test_a_retryable_exit_code_starts_the_pod_again_as_it_was(world):
    again = world.cluster.folder / "again"
    once = f'[ "$NUMBER" = 0 ] || [ -e {again} ] || {{ touch {again}; exit 143; }}; {WAIT}'
    await world.pytorchjob(once, 2)
    first = await world.until(POD, "t-worker-1", bool)
    await world.event("PyTorchJobRestarting")
    second = await world.until(POD, "t-worker-1", lambda pod: pod["metadata"]["uid"] != first["metadata"]["uid"])
    assert second["spec"]["containers"] == first["spec"]["containers"]
    job = await world.until(PYTORCHJOB, "t", lambda job: true(job, "Running"))
    assert [c["type"] for c in job["status"]["conditions"]] == ["Created", "Running"]


async def test_a_pod_that_fails_is_made_again_whatever_the_backoff_limit(world):
    tries = world.cluster.folder / "tries"
    await world.pytorchjob(f"echo >> {tries}; exit 201", runPolicy={"backoffLimit": 1})
    await eventually(lambda: tries.exists() and len(tries.read_text().splitlines()) > 3, "fourth try")
    assert not true(await world.until(PYTORCHJOB, "t", bool), "Failed")


async def test_a_backoff_limit_of_none_at_all_ends_a_job_at_its_first_failure(world):
    await world.pytorchjob("exit 201", runPolicy={"backoffLimit": 0})
    job = await world.finished("t", PYTORCHJOB)
    assert condition(job, "Failed")["message"] == "Job t has failed because it has reached the specified backoff limit"


async def test_restarts_of_containers_in_their_pods_end_at_the_backoff_limit(world):
    await world.pytorchjob(f"[ -e $HOME/c ] && {WAIT}; [ -e $HOME/b ] && touch $HOME/c; touch $HOME/b; exit 1",
                           restartPolicy="OnFailure", runPolicy={"backoffLimit": 2})  # fmt: skip
    assert true(await world.finished("t", PYTORCHJOB), "Failed")


async def test_a_deadline_that_is_over_ends_a_job(world):
    await world.pytorchjob(WAIT, 2, runPolicy={"cleanPodPolicy": "Running"})
    await world.until(PYTORCHJOB, "t", lambda job: true(job, "Running"))
    deadline = {"spec": {"runPolicy": {"activeDeadlineSeconds": 1}}}
    await world.client.patch(PYTORCHJOB, "t", world.namespace, deadline)
    job = await world.finished("t", PYTORCHJOB)
    assert (
        condition(job, "Failed")["message"] == "Job t has failed because it was active longer than specified deadline"
    )
    await world.when_pods(lambda pods: pods == [])


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
    first = await world.running("t-worker-0")
    world.cluster.node.evict(world.namespace, "t-worker-0")
    await world.until(
        POD,
        "t-worker-0",
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
    await world.pytorchjob(WAIT, 1, WAIT, name="a")
    await world.pytorchjob(WAIT, 1, WAIT, name="b")
    pods = await world.when_pods(lambda pods: len(pods) == 4)
    assert len({env_of(pod)["MASTER_PORT"] for pod in pods}) == 2


async def test_the_crd_refuses_a_replica_without_a_template(world):
    spec = {"pytorchReplicaSpecs": {"Worker": {"replicas": 1}}}
    with pytest.raises(ApiError, match="template"):
        await world.make(PYTORCHJOB, "bad", spec=spec)


async def test_kubectl_waits_for_the_end_and_shows_the_state(world):
    await world.pytorchjob("true", 2)
    words = ["--kubeconfig", str(world.cluster.kubeconfig_path), "-n", world.namespace]
    waiting = ["wait", "--for=condition=Succeeded", "--timeout=150s", "pytorchjob/t"]
    wait = await asyncio.create_subprocess_exec(KUBECTL, *words, *waiting, stdout=asyncio.subprocess.DEVNULL)
    assert await wait.wait() == 0
    kubectl = await asyncio.create_subprocess_exec(KUBECTL, *words, "get", "pytorchjob", stdout=asyncio.subprocess.PIPE)
    output, _ = await kubectl.communicate()
    assert output.decode().splitlines()[1].split()[:2] == ["t", "Succeeded"]
