"""The TrainJob controller: what its pods are told, when the job ends, and when all of it starts anew."""

import pytest
from support.local_world import condition, true

from cgd_operator.kube.kinds import JOB, POD, TRAINJOB

pytestmark = pytest.mark.asyncio(loop_scope="session")

WAIT = "sleep 60"


async def test_pods_are_told_what_torchrun_needs(world):
    script = 'test "$PET_NNODES $PET_NPROC_PER_NODE" = "2 4" && echo $PET_NODE_RANK'
    await world.trainjob(script, nodes=2)
    job = await world.finished("t", TRAINJOB)
    assert condition(job, "Complete")["reason"] == "AllJobsCompleted"
    (entry,) = [
        one for one in (await world.pods())[0]["spec"]["containers"][0]["env"] if one["name"] == "PET_MASTER_ADDR"
    ]
    assert entry["value"] == "t-node-0-0.t"


async def test_a_failed_pod_starts_all_pods_anew(world):
    await world.trainjob(f'[ "$PET_NODE_RANK" = 0 ] && exit 201; {WAIT}', nodes=2, restarts=1)
    job = await world.finished("t", TRAINJOB)
    assert job["status"]["restarts"] == 1
    assert condition(job, "Failed")["reason"] == "ReachedMaxRestarts"
    assert condition(job, "Failed")["message"].endswith("(first failed job: t-node-0)")


async def test_pods_say_which_attempt_they_are(world):
    await world.trainjob("exit 201", restarts=1)
    await world.until(TRAINJOB, "t", lambda job: job.get("status", {}).get("restarts") == 1)
    label = "jobset.sigs.k8s.io/restart-attempt"
    await world.when_pods(lambda pods: [pod["metadata"]["labels"][label] for pod in pods] == ["1"])


async def test_a_permanent_failure_is_final(world):
    await world.trainjob("exit 3", restarts=5)
    job = await world.finished("t", TRAINJOB)
    assert condition(job, "Failed")["reason"] == "FailJobSetFailurePolicyAction"
    assert job["status"]["restarts"] == 0


async def test_suspend_takes_its_pods_and_resume_makes_new_ones(world):
    await world.trainjob(WAIT)
    await world.when_pods(lambda pods: len(pods) == 1)
    await world.client.patch(TRAINJOB, "t", world.namespace, {"spec": {"suspend": True}})
    await world.until(TRAINJOB, "t", lambda job: true(job, "Suspended"))
    await world.when_pods(lambda pods: not pods)
    await world.client.patch(TRAINJOB, "t", world.namespace, {"spec": {"suspend": False}})
    await world.when_pods(lambda pods: len(pods) == 1)
    job = await world.until(TRAINJOB, "t", lambda job: not true(job, "Suspended"))
    assert condition(job, "Suspended")["reason"] == "Resumed"


async def test_deleting_it_takes_its_job_and_pods(world):
    await world.trainjob(WAIT)
    (pod,) = await world.when_pods(lambda pods: len(pods) == 1)
    await world.client.delete(TRAINJOB, "t", world.namespace)
    await world.gone(JOB, "t-node-0")
    await world.gone(POD, pod["metadata"]["name"])


async def test_a_runtime_that_is_not_there_fails_it(world):
    await world.make(TRAINJOB, "t", spec={"runtimeRef": {"kind": "TrainingRuntime", "name": "absent"}})
    job = await world.finished("t", TRAINJOB)
    assert "absent" in condition(job, "Failed")["message"]
