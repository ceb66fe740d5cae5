"""How often the pods of a PyTorchJob were made, and when that is enough: from one look to the next."""

from typing import Any

from support.builders import ended, job, pod
from support.status_builders import NOW

from cgd_operator.api.status import CGDRunStatus, StageStatus
from cgd_operator.facts.children import ChildFacts, observe
from cgd_operator.facts.pods import RESTARTS, last_state
from cgd_operator.facts.retries import attempts, enough
from cgd_operator.planning.manifests import GIVEN_UP, REPLICA_INDEX, REPLICA_TYPE

Object = dict[str, Any]

STAGE = "train-cgd"


def worker(index: int, uid: str, phase: str = "Running", **state: Any) -> Object:
    made = pod(STAGE, phase, name=f"t-worker-{index}", **state)
    made["metadata"] |= {"uid": uid, "annotations": {}}
    made["metadata"]["labels"] |= {REPLICA_TYPE: "worker", REPLICA_INDEX: str(index)}
    return made


def disrupted(made: Object) -> Object:
    made["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
    return made


def facts(*pods: Object, suspend: bool = False, kind: str = "PyTorchJob", condition: str = "Running") -> ChildFacts:
    child = job(STAGE, condition, kind=kind)
    child["spec"] = {"runPolicy": {"suspend": suspend}}
    return observe([child], pods)[STAGE]


def looks(*seen: ChildFacts) -> StageStatus:
    """What the status remembers after these looks."""
    status = StageStatus(name=STAGE)
    for one in seen:
        status = StageStatus(name=STAGE, message=one.message, pod_attempts=attempts(one, status))
    return status


def counted(*seen: ChildFacts) -> dict[str, int]:
    return {one.name: one.attempts for one in looks(*seen).pod_attempts}


def verdict(retries: int, *seen: ChildFacts) -> str | None:
    return enough(seen[-1:], CGDRunStatus(stages=(looks(*seen[:-1]),)), retries).get(STAGE)


def test_a_pod_that_is_made_again_under_its_name_is_another_attempt() -> None:
    both = facts(worker(0, "a"), worker(1, "b"))
    assert counted(both, both) == {"t-worker-0": 1, "t-worker-1": 1}
    assert counted(both, facts(worker(0, "c"), worker(1, "b")), facts(worker(0, "d"), worker(1, "e"))) == {
        "t-worker-0": 3,
        "t-worker-1": 2,
    }


def test_a_pod_that_is_missing_for_a_moment_is_not_forgotten() -> None:
    assert counted(facts(worker(0, "a")), facts(), facts(worker(0, "b"))) == {"t-worker-0": 2}


def test_pods_that_follow_a_suspension_are_no_new_attempt() -> None:
    held = facts(suspend=True)
    leaving = facts(worker(0, "b"), suspend=True)
    seen = (facts(worker(0, "a")), facts(worker(0, "b")), leaving, held, facts(worker(0, "c")))
    assert counted(*seen) == {"t-worker-0": 2}


def test_a_pod_that_follows_a_preempted_one_is_no_new_attempt() -> None:
    seen = (facts(worker(0, "a")), facts(disrupted(worker(0, "a"))), facts(worker(0, "b")))
    assert counted(*seen) == {"t-worker-0": 1}


def test_the_peers_of_a_preempted_pod_are_no_new_attempt_either() -> None:
    """All processes store a checkpoint at the same step and leave."""
    both = facts(disrupted(worker(0, "a")), worker(1, "b", "Failed", terminated=ended(143)))
    seen = (facts(worker(0, "a"), worker(1, "b")), both, both, facts(worker(0, "c"), worker(1, "d")))
    assert counted(*seen) == {"t-worker-0": 1, "t-worker-1": 1}


def test_a_pod_that_waits_in_vain_for_one_without_a_place_has_not_had_its_try() -> None:
    waiting = worker(0, "a", "Pending")
    seen = [facts(waiting, worker(1, str(number), "Failed", terminated=ended(201))) for number in range(9)]
    assert counted(*seen, facts(waiting, worker(1, "9"))) == {"t-worker-0": 1, "t-worker-1": 1}


def test_a_pod_that_failed_counts_while_the_next_of_its_name_has_no_place_yet() -> None:
    made = job(STAGE, "Running", kind="PyTorchJob")
    gone = last_state(worker(0, "a", "Failed", terminated=ended(201)), NOW)
    follows = observe([made], [worker(0, "b", "Pending")], gone=[gone])[STAGE]
    assert counted(facts(worker(0, "a")), follows) == {"t-worker-0": 2}


def test_a_pod_that_failed_counts_where_its_peers_follow_it() -> None:
    failed = facts(worker(0, "a", "Failed", terminated=ended(201)), worker(1, "b"))
    follows = facts(worker(0, "c", "Pending"), worker(1, "b", "Failed", terminated=ended(201)))
    seen = (facts(worker(0, "a"), worker(1, "b")), failed, follows, facts(worker(0, "c"), worker(1, "d")))
    assert counted(*seen) == {"t-worker-0": 2, "t-worker-1": 1}


def test_pods_that_fail_because_a_peer_was_preempted_are_no_new_attempt_however_often() -> None:
    seen = []
    for n in range(9):
        taken = disrupted(worker(1, f"b{n}", "Failed", terminated=ended(143)))
        seen += [facts(worker(0, f"a{n}"), worker(1, f"b{n}")), facts(worker(0, f"a{n}"), taken)]
        seen += [facts(worker(0, f"a{n}", "Failed", terminated=ended(201)), worker(1, f"b{n + 1}"))]
    last = facts(worker(0, "a9"), worker(1, "b9"))
    assert counted(*seen, last) == {"t-worker-0": 1, "t-worker-1": 1}
    assert verdict(0, *seen, last) is None


def test_an_attempt_that_failed_by_itself_counts_whatever_was_preempted_before() -> None:
    taken = disrupted(worker(1, "b", "Failed", terminated=ended(143)))
    first = (facts(worker(0, "a"), worker(1, "b")), facts(worker(0, "a"), taken), facts(worker(0, "c"), worker(1, "d")))
    assert counted(*first, facts(worker(0, "e"), worker(1, "f"))) == {"t-worker-0": 2, "t-worker-1": 2}


def test_a_pod_that_still_leaves_from_a_deleted_job_is_no_attempt_of_the_new_one() -> None:
    leaving = worker(0, "a")
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:02:00Z"
    assert counted(facts(leaving)) == {}
    assert counted(facts(leaving), facts(worker(0, "b"))) == {"t-worker-0": 1}


def made_by(child: str, *pods: Object, now: str = "") -> ChildFacts:
    """A look at a PyTorchJob (of this uid, or of `now`) and the pods that the first has made."""
    for one in pods:
        one["metadata"]["ownerReferences"] = [{"uid": child, "controller": True}]
    made = job(STAGE, "Running", kind="PyTorchJob")
    made["metadata"]["uid"] = now or child
    return observe([made], pods)[STAGE]


def test_a_job_that_was_deleted_and_made_again_has_all_of_its_tries() -> None:
    first = (made_by("one", worker(0, "a")), made_by("one", worker(0, "b")))
    leaving = made_by("one", worker(0, "b"), now="two")
    assert verdict(1, *first, leaving, made_by("two", worker(0, "c"))) is None
    assert counted(*first, leaving, made_by("two", worker(0, "c"))) == {"t-worker-0": 1}
    assert verdict(0, *first, made_by("two")) is None
    told = verdict(
        1, *first, made_by("two", worker(0, "c")), made_by("two", worker(0, "d")), made_by("two", worker(0, "e"))
    )
    assert told is not None


def test_of_a_job_that_has_ended_and_of_other_kinds_nothing_is_remembered() -> None:
    assert counted(facts(worker(0, "a")), facts(worker(0, "a"), condition="Failed")) == {}
    assert counted(facts(worker(0, "a"), kind="TrainJob")) == {}


def test_a_pod_has_as_many_tries_as_retries_allow_and_the_last_words_are_kept() -> None:
    tries = [facts(worker(0, str(number))) for number in range(4)]
    assert verdict(3, *tries) is None
    again = facts(worker(0, "0"), worker(1, "x", "Failed", terminated=ended(201, "no peer")))
    told = verdict(2, *tries[:-1], again, facts(worker(0, "9")))
    assert told is not None
    assert told.startswith("pod t-worker-0 was tried 4 times, and spec.retries is 2; ")
    assert told.endswith("pod t-worker-1: exit code 201: no peer")


def test_no_retries_mean_one_try() -> None:
    assert verdict(0, facts(worker(0, "a"))) is None
    told = verdict(0, facts(worker(0, "a")), facts(worker(0, "b")))
    assert (
        told == "pod t-worker-0 was tried once, and spec.retries is 0; its log and the PyTorchJob's Events may tell why"
    )


def test_a_permanent_exit_code_is_enough_at_once() -> None:
    assert verdict(3, facts(worker(0, "a", "Failed", terminated=ended(3, "no rows")))) == (
        "pod t-worker-0: exit code 3: no rows"
    )
    assert verdict(3, facts(worker(0, "a", "Failed", terminated=ended(143)))) is None


def test_a_child_is_given_up_once() -> None:
    child = job(STAGE, kind="PyTorchJob")
    child["metadata"]["annotations"] = {"cgd.dev/given-up": "enough"}
    gone = observe([child], [worker(0, "a", "Failed", terminated=ended(3))])
    assert enough(gone.values(), CGDRunStatus(), 3) == {}


def evicted(made: Object, *, reason: str = "Evicted") -> Object:
    made["status"] |= {"reason": reason, "message": 'Usage of EmptyDir volume "scratch" exceeds the limit "1Gi". '}
    return made


def shards(*pods: Object) -> ChildFacts:
    return observe([job("answer")], pods)["answer"]


def filled(name: str, shard: int = 0) -> Object:
    """A pod of a Job that exited with 143 because its kubelet evicted it for what it had used."""
    return evicted(pod("answer", "Failed", name=name, shard=shard, terminated=ended(143)))


def test_a_job_whose_pods_are_evicted_again_and_again_for_what_they_use_is_given_up() -> None:
    """Its failure policy ignores an exit with 143, so the Job would make them without end."""
    twice, thrice = (shards(*(filled(f"p{number}") for number in range(count))) for count in (2, 3))
    assert enough([twice], CGDRunStatus(), 2) == {}
    why = enough([thrice], CGDRunStatus(), 2)["answer"]
    assert why.startswith("pods were evicted for what they used 3 times, and spec.retries is 2; pod p2: exit code 143")
    assert 'volume "scratch" exceeds the limit' in why


def test_evictions_count_by_shard_and_those_by_the_cluster_count_not() -> None:
    assert enough([shards(filled("a", 0), filled("b", 1))], CGDRunStatus(), 1) == {}
    pressed = [disrupted(filled(f"p{number}")) for number in range(5)]
    stopped = [evicted(filled(f"q{number}"), reason="Terminated") for number in range(5)]
    assert enough([shards(*pressed, *stopped)], CGDRunStatus(), 1) == {}


def restarted(made: Object, restarts: int) -> Object:
    made["metadata"]["labels"][RESTARTS] = str(restarts)
    return made


def trainjob(*pods: Object, given_up: str = "") -> ChildFacts:
    made = job("answer", kind="TrainJob")
    made["metadata"]["annotations"] = {GIVEN_UP: given_up} if given_up else {}
    return observe([made], pods)["answer"]


def test_evictions_of_a_trainjob_count_beside_the_restarts_of_its_jobset() -> None:
    first, second = filled("a"), restarted(filled("b"), 1)
    assert enough([trainjob(first)], CGDRunStatus(), 1) == {}
    assert enough([trainjob(restarted(pod("answer", "Running"), 1), first)], CGDRunStatus(), 1) == {}
    why = enough([trainjob(second)], CGDRunStatus(), 1)["answer"]
    assert why.startswith(
        "pods were evicted for what they used once, after its JobSet was restarted once, and spec.retries is 1; pod b"
    )


def test_a_trainjob_that_was_given_up_and_goes_on_is_given_up_again() -> None:
    """The JobSet of an older operator makes its Job again, without the deadline."""
    assert enough([trainjob(filled("a"), given_up="enough")], CGDRunStatus(), 0)
    made = job("answer")
    made["metadata"]["annotations"] = {GIVEN_UP: "enough"}
    assert enough(observe([made], [filled("a")]).values(), CGDRunStatus(), 0) == {}


def test_a_training_that_fills_its_disk_uses_up_its_retries() -> None:
    def full(uid: str) -> ChildFacts:
        return facts(evicted(worker(0, uid, "Failed", terminated=ended(143))))

    assert verdict(1, full("a"), full("b"), full("c")) is not None
    interrupted = [facts(worker(0, uid, "Failed", terminated=ended(143))) for uid in "abc"]
    assert verdict(1, *interrupted) is None
