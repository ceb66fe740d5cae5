"""What the Training Operator, in its releases, makes of the PyTorchJob that a training becomes. Played by
`cgd_local.pytorchjobs`."""

from typing import Any

import pytest
from support.builders import RELEASE, run

from cgd_local.pytorchjobs import V1_7, V1_8, V1_9, Release, decide
from cgd_operator.planning.dag import plan
from cgd_operator.planning.manifests import manifest

Object = dict[str, Any]

RELEASES = pytest.mark.parametrize("release", [V1_7, V1_8, V1_9], ids=["1.7", "1.8", "1.9"])
PLACE = {"PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_NNODES"}


class Played:
    """A PyTorchJob of so many workers, its controller, and its pods, whose phases the test says."""

    def __init__(self, release: Release, workers: int = 2) -> None:
        this = run({"training.workers": workers, "retries": 3})
        (child,) = [one for one in plan(this) if one.kind == "PyTorchJob"]
        self.job = manifest(this, child, RELEASE)
        self.job["metadata"]["uid"] = "u"
        self.release, self.pods, self.deleted, self.time = release, {}, 0, 0.0
        self.look()

    def with_master(self) -> None:
        """The shape that older operators made: a Master, and the rest of the workers."""
        replicas = self.job["spec"]["pytorchReplicaSpecs"]
        replicas["Master"] = {**replicas["Worker"], "replicas": 1}
        replicas["Worker"] = {**replicas["Worker"], "replicas": replicas["Worker"]["replicas"] - 1}
        self.pods = {}
        self.look()

    def look(self) -> None:
        decision = decide(self.job, list(self.pods.values()), self.time, self.release)
        for pod in decision.delete:
            del self.pods[pod["metadata"]["name"]]
        self.deleted += len(decision.delete)
        self.pods |= {pod["metadata"]["name"]: pod for pod in decision.create}
        self.job["status"] = decision.status

    def ends(self, index: int, code: int) -> None:
        """The container of a worker ends with a code, and the controller looks."""
        pod = self.pods[f"{self.job['metadata']['name']}-worker-{index}"]
        end = {"name": "pytorch", "state": {"terminated": {"exitCode": code}}}
        pod["status"] = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [end]}
        self.look()

    def runs(self) -> None:
        for pod in self.pods.values():
            pod.setdefault("status", {"phase": "Running"})
        self.look()

    @property
    def true(self) -> set[str]:
        return {one["type"] for one in self.job["status"]["conditions"] if one["status"] == "True"}


@RELEASES
def test_no_init_container_is_added_and_no_container_may_run_as_root(release: Release) -> None:
    for pod in Played(release).pods.values():
        assert "initContainers" not in pod["spec"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True


@RELEASES
def test_beside_a_master_one_is_added_that_says_nothing_of_its_user(release: Release) -> None:
    played = Played(release)
    played.with_master()
    name = played.job["metadata"]["name"]
    assert "initContainers" not in played.pods[f"{name}-master-0"]["spec"]
    [init] = played.pods[f"{name}-worker-0"]["spec"]["initContainers"]
    assert (init["name"], init["image"], "securityContext" in init) == ("init-pytorch", "alpine:3.10", False)


@RELEASES
def test_each_worker_knows_its_place_and_is_told_everything_once(release: Release) -> None:
    for pod in Played(release).pods.values():
        names = [one["name"] for one in pod["spec"]["containers"][0]["env"]]
        assert len(names) == len(set(names))
        assert set(names) >= PLACE
        assert "training.kubeflow.org/replica-index" in pod["metadata"]["labels"]


@RELEASES
def test_they_meet_at_the_first_worker_whose_service_has_its_pods_name(release: Release) -> None:
    pods = Played(release, workers=3).pods
    for pod in pods.values():
        [address] = [one for one in pod["spec"]["containers"][0]["env"] if one["name"] == "PET_MASTER_ADDR"]
        assert pods[address["value"]]["metadata"]["labels"]["training.kubeflow.org/replica-index"] == "0"


@RELEASES
@pytest.mark.parametrize("first", [0, 1])
def test_it_succeeds_when_all_workers_have_and_cuts_none_off(release: Release, first: int) -> None:
    played = Played(release)
    played.runs()
    played.ends(first, 0)
    assert played.true == {"Created", "Running"}
    assert len(played.pods) == 2
    played.ends(1 - first, 0)
    assert played.true == {"Created", "Succeeded"}
    assert played.deleted == 0


@RELEASES
def test_one_worker_is_no_other_case(release: Release) -> None:
    played = Played(release, workers=1)
    played.runs()
    played.ends(0, 0)
    assert played.true == {"Created", "Succeeded"}


@RELEASES
def test_a_pod_that_may_go_better_next_time_is_made_again_without_end(release: Release) -> None:
    played = Played(release)
    for _ in range(8):
        played.runs()
        played.ends(1, 201)
        played.look()
    assert played.deleted == 8
    assert len(played.pods) == 2
    assert "Failed" not in played.true


@RELEASES
def test_a_worker_that_has_ended_well_is_never_made_again(release: Release) -> None:
    played = Played(release)
    played.runs()
    played.ends(1, 0)
    ended = played.pods[f"{played.job['metadata']['name']}-worker-1"]
    played.ends(0, 201)
    played.look()
    assert played.pods[ended["metadata"]["name"]] is ended


@RELEASES
def test_a_permanent_error_ends_the_job_but_in_1_7(release: Release) -> None:
    played = Played(release)
    played.runs()
    played.ends(0, 3)
    assert ("Failed" in played.true) == (release is not V1_7)
    if release is V1_7:
        assert played.true == {"Created", "Restarting"}


@RELEASES
def test_a_deadline_that_is_over_ends_the_job_in_every_release(release: Release) -> None:
    played = Played(release)
    played.runs()
    played.job["spec"]["runPolicy"]["activeDeadlineSeconds"] = 1
    played.time = 4e9
    played.look()
    assert "Failed" in played.true
    assert played.pods == {}
