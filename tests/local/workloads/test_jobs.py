"""The Job controller: how often pods are tried, when a Job ends, and what its status says."""

import asyncio
import itertools
import logging
from typing import Any

import pytest
from support.local_world import condition, phase, true
from support.patience import PATIENCE

from cgd_local.controllers import Controller, Decision
from cgd_local.jobs import TRACKED, View, decide
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import JOB, POD

pytestmark = pytest.mark.asyncio(loop_scope="session")

FAIL_INDEX = {"rules": [{"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [3]}}]}


async def test_a_job_runs_its_completions_and_is_complete(world):
    await world.job(completions=3, parallelism=2)
    job = await world.finished()
    status = job["status"]
    assert [c["type"] for c in status["conditions"]] == ["SuccessCriteriaMet", "Complete"]
    assert (status["succeeded"], status["active"], status["failed"]) == (3, 0, 0)
    assert status["startTime"] <= status["completionTime"]
    assert len(await world.pods()) == 3
    assert (await world.event("Completed"))["message"] == "Job completed"


async def test_a_pod_says_whose_it_is(world):
    job = await world.job()
    pods = await world.when_pods(len)
    uid, meta = job["metadata"]["uid"], pods[0]["metadata"]
    assert meta["name"].startswith("j-")
    for prefix in ("", "batch.kubernetes.io/"):
        assert (meta["labels"][f"{prefix}controller-uid"], meta["labels"][f"{prefix}job-name"]) == (uid, "j")
    owner = meta["ownerReferences"][0]
    assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (uid, True, True)
    assert (await world.event("SuccessfulCreate"))["message"] == f"Created pod: {meta['name']}"


async def test_every_index_runs_once_and_knows_its_number(world):
    script = 'echo "$JOB_COMPLETION_INDEX"'
    await world.job(script, completions=3, parallelism=3, completionMode="Indexed")
    job = await world.finished()
    assert job["status"]["completedIndexes"] == "0,1,2"
    pods = await world.pods()
    notes = {pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]: pod for pod in pods}
    assert sorted(notes) == ["0", "1", "2"]
    for index, pod in notes.items():
        assert pod["metadata"]["name"].startswith(f"j-{index}-")
        assert pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] == index
        assert world.log(pod["metadata"]["name"]) == f"{index}\n"


async def test_a_failing_pod_is_tried_again_until_the_backoff_limit(world):
    await world.job("exit 1", backoffLimit=2)
    job = await world.finished()
    assert condition(job, "FailureTarget")["reason"] == condition(job, "Failed")["reason"] == "BackoffLimitExceeded"
    assert condition(job, "Failed")["message"] == "Job has reached the specified backoff limit"
    assert job["status"]["failed"] == 3
    assert (await world.event("BackoffLimitExceeded"))["type"] == "Warning"


async def test_a_failing_index_does_not_stop_the_others(world):
    script = '[ "$JOB_COMPLETION_INDEX" != 1 ]'
    await world.job(script, completions=3, parallelism=1, completionMode="Indexed", backoffLimitPerIndex=1)
    job = await world.finished()
    assert condition(job, "Failed")["reason"] == "FailedIndexes"
    assert (job["status"]["completedIndexes"], job["status"]["failedIndexes"]) == ("0,2", "1")
    pods = await world.pods("batch.kubernetes.io/job-completion-index=1")
    assert len(pods) == 2


async def test_too_many_failed_indexes_end_the_job_at_once(world):
    script = '[ "$JOB_COMPLETION_INDEX" = 2 ] && sleep 60; exit 1'
    spec = {"completions": 3, "parallelism": 3, "completionMode": "Indexed", "backoffLimitPerIndex": 0}
    await world.job(script, maxFailedIndexes=1, **spec)
    job = await world.finished()
    assert condition(job, "Failed")["reason"] == "MaxFailedIndexesExceeded"
    assert job["status"]["active"] == 0


async def test_an_exit_code_that_fails_its_index_is_not_tried_again(world):
    script = '[ "$JOB_COMPLETION_INDEX" = 0 ] || exit 3'
    spec = {"completions": 2, "parallelism": 2, "completionMode": "Indexed", "backoffLimitPerIndex": 5}
    await world.job(script, podFailurePolicy=FAIL_INDEX, **spec)
    job = await world.finished()
    assert (job["status"]["completedIndexes"], job["status"]["failedIndexes"]) == ("0", "1")
    assert len(await world.pods()) == 2


async def test_an_exit_code_can_fail_the_whole_job(world):
    rule = {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "NotIn", "values": [1]}}
    await world.job("exit 42", podFailurePolicy={"rules": [rule]})
    job = await world.finished()
    [pod] = await world.pods()
    assert condition(job, "Failed")["reason"] == "PodFailurePolicy"
    name = f"{world.namespace}/{pod['metadata']['name']}"
    wanted = f"Container main for pod {name} failed with exit code 42 matching FailJob rule at index 0"
    assert condition(job, "Failed")["message"] == wanted


async def test_an_evicted_pod_is_replaced_and_not_counted_where_disruptions_are_ignored(world):
    rule = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    await world.job("sleep 60", backoffLimit=0, podFailurePolicy={"rules": [rule]})
    [pod] = await world.when_pods(lambda pods: [p for p in pods if phase(p) == "Running"])
    world.cluster.node.evict(world.namespace, pod["metadata"]["name"])
    await world.when_pods(lambda pods: len(pods) == 2)
    assert true(await world.until(POD, pod["metadata"]["name"], bool), "DisruptionTarget")
    job = await world.until(JOB, "j", lambda job: job["status"]["active"] == 1)
    assert job["status"]["failed"] == 0


async def test_a_job_that_is_active_for_too_long_fails(world):
    await world.job("sleep 60", activeDeadlineSeconds=1)
    job = await world.finished()
    assert condition(job, "Failed")["reason"] == "DeadlineExceeded"
    assert await world.pods() == []


async def test_suspending_ends_the_pods_and_resuming_starts_them_anew(world):
    await world.job("sleep 60", backoffLimit=0)
    [first] = await world.when_pods(lambda pods: [p for p in pods if phase(p) == "Running"])
    await world.client.patch(JOB, "j", world.namespace, {"spec": {"suspend": True}})
    job = await world.until(JOB, "j", lambda job: true(job, "Suspended") and not job["status"]["terminating"])
    assert job["status"].get("startTime") is None
    assert await world.pods() == []
    await world.client.patch(JOB, "j", world.namespace, {"spec": {"suspend": False}})
    [second] = await world.when_pods(len)
    assert second["metadata"]["uid"] != first["metadata"]["uid"]
    job = await world.until(JOB, "j", lambda job: job["status"].get("startTime"))
    assert [c["reason"] for c in job["status"]["conditions"]] == ["JobResumed"]
    assert job["status"]["failed"] == 0


async def test_a_job_born_suspended_has_no_pod_and_no_start(world):
    await world.job(suspend=True)
    job = await world.until(JOB, "j", lambda job: true(job, "Suspended"))
    assert "startTime" not in job["status"]
    assert await world.pods() == []


async def test_a_finished_job_goes_after_its_time_to_live_and_takes_its_pods_along(world):
    await world.job(ttlSecondsAfterFinished=0)
    await world.gone(JOB, "j")
    assert await world.pods() == []


async def test_a_deleted_pod_is_replaced(world):
    await world.job("sleep 60", backoffLimit=0)
    [pod] = await world.when_pods(lambda pods: [p for p in pods if phase(p) == "Running"])
    await world.client.delete(POD, pod["metadata"]["name"], world.namespace, grace=1)
    await world.when_pods(lambda pods: [p for p in pods if p["metadata"]["uid"] != pod["metadata"]["uid"]])
    assert (await world.until(JOB, "j", bool))["status"]["failed"] == 0


async def test_a_failed_look_is_logged_and_repeated(local_cluster, caplog):
    done = asyncio.Event()
    looks = itertools.count()

    def flaky(job: Object, pods: list[Object], time_now: float) -> Decision:
        if next(looks) == 0:
            raise ZeroDivisionError
        done.set()
        return Decision({})

    async with await Cluster.connect(str(local_cluster.kubeconfig_path), manager="flaky") as client:
        body = {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]}}}
        meta = {"name": "flaky", "namespace": "default"}
        await client.create(JOB, {"metadata": meta, "spec": {**body, "suspend": True}})
        running = asyncio.create_task(Controller(client, JOB, flaky).run())
        with caplog.at_level(logging.ERROR):
            await asyncio.wait_for(done.wait(), PATIENCE)
        running.cancel()
        await asyncio.wait([running])
        await client.delete(JOB, "flaky", "default")
    assert "Job default/flaky could not be reconciled; trying again" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def view(*pods: Object, status: Any = None, **spec: Any) -> View:
    return View(*job_and_pods(*pods, status=status, **spec))


def job_and_pods(*pods: Object, status: Any = None, **spec: Any) -> tuple[Object, list[Object]]:
    body = {"template": {"spec": {"restartPolicy": "Never"}}, "completions": 4, "parallelism": 4} | spec
    job = {"metadata": {"name": "j", "namespace": "n", "uid": "u"}, "spec": body, "status": status or {}}
    return job, list(pods)


def pod(phase: str, *, index: int | None = None, code: int = 1, ended: int = 0, **meta: Any) -> Object:
    notes = {} if index is None else {"batch.kubernetes.io/job-completion-index": str(index)}
    at = f"2026-01-01T00:{ended // 60:02}:{ended % 60:02}Z"
    over = {"name": "main", "state": {"terminated": {"exitCode": code, "finishedAt": at}}}
    status = {"phase": phase, "containerStatuses": [over] if phase in ("Failed", "Succeeded") else []}
    meta = {"name": "p", "namespace": "n", "creationTimestamp": at, "annotations": notes | meta.pop("notes", {})} | meta
    return {"metadata": meta, "status": status}


START = 1767225600.0  # 2026-01-01


async def test_the_wait_before_a_retry_doubles():
    waits = [view(*[pod("Failed") for _ in range(n)]).missing(START, 10)[1] for n in (1, 2, 3, 8)]
    assert waits == [10, 20, 40, 600]


async def test_one_index_backs_off_while_another_starts():
    failed = pod("Failed", index=1)
    missing, wait = view(failed, completionMode="Indexed", backoffLimitPerIndex=3, parallelism=2).missing(START, 10)
    assert (missing, wait) == ([0, 2], 10)


async def test_a_pod_that_leaves_did_not_fail_and_is_replaced_when_it_has_ended():
    leaving = pod("Running", deletionTimestamp="2026-01-01T00:00:30Z")
    seen = view(leaving, completions=1, backoffLimit=0)
    assert (seen.verdict(START), seen.missing(START, 10)) == (None, ([], None))
    ended = pod("Failed", deletionTimestamp="2026-01-01T00:00:30Z")
    seen = view(ended, completions=1, backoffLimit=0)
    assert (seen.verdict(START), seen.missing(START, 10)) == (None, ([None], None))


# --- how often an index has failed

COUNTS = ("batch.kubernetes.io/job-index-failure-count", "batch.kubernetes.io/job-index-ignored-failure-count")
EACH = {"completionMode": "Indexed", "completions": 1, "parallelism": 1, "podReplacementPolicy": "Failed"}
IGNORE_143 = {"rules": [{"action": "Ignore", "onExitCodes": {"operator": "In", "values": [143]}}]}


def counts(made: Object) -> tuple[str | None, str | None]:
    """Of the failures of its index that a pod bears: those that count, and those that are ignored."""
    notes = made["metadata"]["annotations"]
    return notes.get(COUNTS[0]), notes.get(COUNTS[1])


def held(*, failures: int = 0, ignored: int = 0, code: int = 1, **meta: Any) -> Object:
    """A failed pod of index 0 that its Job has not counted out yet."""
    notes = {COUNTS[0]: str(failures), COUNTS[1]: str(ignored)}
    return pod("Failed", index=0, code=code, notes=notes, finalizers=[TRACKED], **meta)


async def test_a_pod_bears_how_often_its_index_has_failed_also_when_the_failed_ones_are_gone(world):
    await world.job("exit 1", backoffLimitPerIndex=2, **EACH)
    for failures in ("0", "1"):
        pods = await world.when_pods(lambda pods, n=failures: (n, None) in map(counts, pods))
        (made,) = [pod for pod in pods if counts(pod) == (failures, None)]
        await world.ended(made["metadata"]["name"])
        await world.client.delete(POD, made["metadata"]["name"], world.namespace)
    job = await world.finished()
    assert (condition(job, "Failed")["reason"], job["status"]["failedIndexes"]) == ("FailedIndexes", "0")
    await world.when_pods(lambda pods: [counts(made) for made in pods] == [("2", None)])


async def test_what_is_ignored_is_counted_apart_and_is_no_try(world):
    script = "trap 'exit 143' TERM; touch $HOME/up; while :; do sleep 0.02; done"
    await world.job(script, backoffLimitPerIndex=0, podFailurePolicy=IGNORE_143, **EACH)
    (first,) = await world.when_pods(len)
    await world.written("up", first["metadata"]["name"])
    await world.client.delete(POD, first["metadata"]["name"], world.namespace)
    (second,) = await world.when_pods(lambda pods: [counts(pod) for pod in pods] == [("0", "1")])
    assert second["metadata"]["uid"] != first["metadata"]["uid"]
    assert (await world.until(JOB, "j", bool))["status"]["failed"] == 0


async def test_a_pod_that_is_killed_when_it_is_deleted_has_failed_where_only_failed_pods_are_replaced():
    deleted = held(code=137, deletionTimestamp="2026-01-01T00:00:30Z")
    seen = view(deleted, backoffLimitPerIndex=1, podFailurePolicy=IGNORE_143, **EACH)
    assert (seen.counted, seen.given_up) == ([deleted], set())
    assert view(held(failures=1, code=137), backoffLimitPerIndex=1, **EACH).given_up == {0}


async def test_the_last_failed_pod_of_an_index_is_held_until_another_takes_its_place():
    older, last = held(), held(failures=1, ended=1)
    release = decide(*job_and_pods(older, last, backoffLimitPerIndex=9, **EACH), START + 1).release
    assert release == [older]
    next_one = pod("Running", index=0, finalizers=[TRACKED])
    release = decide(*job_and_pods(older, last, next_one, backoffLimitPerIndex=9, **EACH), START + 1).release
    assert release == [older, last]
    job, pods = job_and_pods(last, backoffLimitPerIndex=1, **EACH)
    assert decide(job, pods, START + 1).release == [last], "the index is given up"


async def test_the_wait_of_an_index_doubles_with_all_its_failures_also_of_pods_that_are_gone():
    seen = view(held(failures=1, ignored=1), backoffLimitPerIndex=9, **EACH)
    assert seen.missing(START, 10) == ([], 40)


async def test_what_a_job_deletes_itself_has_not_failed(world):
    await world.job("sleep 60", backoffLimitPerIndex=0, **EACH)
    (first,) = await world.when_pods(lambda pods: [p for p in pods if phase(p) == "Running"])
    await world.client.patch(JOB, "j", world.namespace, {"spec": {"suspend": True}})
    await world.gone(POD, first["metadata"]["name"])
    await world.client.patch(JOB, "j", world.namespace, {"spec": {"suspend": False}})
    (second,) = await world.when_pods(len)
    assert counts(second) == ("0", None)
    assert (await world.until(JOB, "j", bool))["status"]["failed"] == 0


async def test_an_index_that_is_done_or_given_up_stays_so_without_its_pod():
    status = {"completedIndexes": "0,2", "failedIndexes": "1", "failed": 1}
    seen = view(status=status, completionMode="Indexed", backoffLimitPerIndex=0)
    assert seen.missing(START, 10) == ([3], None)


async def test_only_what_kubernetes_takes_is_in_the_status():
    plain = decide(*job_and_pods(pod("Failed")), START).status
    assert not {"completedIndexes", "failedIndexes"} & set(plain)
    assert plain["failed"] == 1
    gone = decide(*job_and_pods(status={"failed": 1, "succeeded": 2}), START).status
    assert (gone["failed"], gone["succeeded"]) == (1, 2)  # a real API server refuses counters that fall


async def test_a_rule_for_another_container_does_not_match():
    rule = {"action": "FailJob", "onExitCodes": {"containerName": "sidecar", "operator": "In", "values": [1]}}
    assert view(pod("Failed"), podFailurePolicy={"rules": [rule]}).verdict(START) is None


async def test_a_rule_reads_the_container_that_it_names_beside_a_sidecar():
    rule = {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [1]}}
    both = pod("Failed")
    proxy = {"name": "proxy", "state": {"terminated": {"exitCode": 0, "finishedAt": "2026-01-01T00:00:00Z"}}}
    both["status"]["containerStatuses"].insert(0, proxy)
    seen = view(both, podFailurePolicy={"rules": [rule]})
    assert seen.verdict(START) == (
        "PodFailurePolicy",
        "Container main for pod n/p failed with exit code 1 matching FailJob rule at index 0",
    )


async def test_the_first_matching_rule_wins():
    rules = [{"action": action, "onExitCodes": {"operator": "In", "values": [1]}} for action in ("Ignore", "FailJob")]
    seen = view(pod("Failed"), podFailurePolicy={"rules": rules}, backoffLimit=0)
    assert (seen.verdict(START), seen.counted) == (None, [])


async def test_a_failure_that_was_decided_stays_decided():
    target = {"type": "FailureTarget", "status": "True", "reason": "DeadlineExceeded", "message": "late"}
    assert view(status={"conditions": [target]}, completions=0).verdict(START) == ("DeadlineExceeded", "late")
