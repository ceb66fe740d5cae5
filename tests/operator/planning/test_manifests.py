"""Manifests: valid against the published schemas, safe, and telling the program all it needs."""

import json
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from support.builders import RELEASE, run
from support.patience import PATIENCE

from cgd_operator.planning.dag import BACKENDS, plan
from cgd_operator.planning.manifests import LISTENS, manifest, progress_secret, secret_name, training_runtime
from cgd_stages import contract

STAGES = [child.stage for child in plan(run())]


def manifests(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    this = run(changes)
    return {child.stage: manifest(this, child, RELEASE) for child in plan(this)}


def pod_spec(body: dict[str, Any]) -> Any:
    holder = body["spec"]["pytorchReplicaSpecs"]["Worker"] if body["kind"] == "PyTorchJob" else body["spec"]
    return holder["template"]["spec"]


def env(body: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_spec(body)["containers"]
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_child_fits_the_published_schema(stage: str) -> None:
    body = manifests()[stage]
    if body["kind"] == "PyTorchJob":  # its pod template is what the schemas know
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod_spec(body)}
    kubernetes_validate.validate(body, "1.37", strict=True)


@pytest.mark.parametrize("stage", STAGES)
def test_no_pod_gets_sigterm_before_its_first_process_has_a_handler(stage: str) -> None:
    (container,) = pod_spec(manifests()[stage])["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"] == LISTENS


@pytest.mark.parametrize(
    ("status", "waits"),
    [
        ("SigBlk:\t0000000000004000\nSigCgt:\t0000000000000002\n", True),
        ("SigCgt:\t0000000180014002\n", False),
        ("SigCgt:\t000000018000c002\n", False),
        ("SigCgt:\t000000018000b002\n", True),
        ("Name:\tpython\n", False),
        (None, False),
    ],
    ids=["none", "SIGTERM", "SIGTERM and others", "others", "no such line", "no such file"],
)
def test_sigterm_waits_only_where_the_first_process_is_known_to_have_no_handler(
    tmp_path: Path, status: str | None, waits: bool
) -> None:
    file = tmp_path / "status"
    if status:
        file.write_text(status)
    command = [part.replace("/proc/1/status", str(file)) for part in LISTENS]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as hook:
        try:
            hook.wait(timeout=0.5 if waits else PATIENCE)
        except subprocess.TimeoutExpired:
            hook.kill()
            assert waits
        else:
            assert not waits


@pytest.mark.parametrize("stage", STAGES)
def test_every_pod_passes_the_restricted_pod_security_standard(stage: str) -> None:
    spec = pod_spec(manifests()[stage])
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False


@pytest.mark.parametrize("stage", STAGES)
def test_a_child_belongs_to_its_run_and_can_be_found(stage: str) -> None:
    meta = manifests()[stage]["metadata"]
    (owner,) = meta["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["controller"]) == ("CGDRun", "demo", True)
    assert meta["labels"]["cgd.dev/stage"] == stage
    assert meta["labels"]["cgd.dev/run-uid"] == run().uid


@pytest.mark.parametrize("stage", STAGES)
def test_the_program_gets_its_task(stage: str) -> None:
    task = contract.StageTask.model_validate_json(env(manifests()[stage])["CGD_TASK"])
    assert task.stage == stage


def ending(rule: Any) -> Any:
    """The exit codes of our container that a rule of a failure policy is for, or the conditions of the pod."""
    codes = rule.get("onExitCodes")
    return (codes["containerName"], codes["operator"], codes["values"]) if codes else rule["onPodConditions"]


def test_a_permanent_error_is_not_retried_and_what_ends_a_program_from_outside_is_free() -> None:
    rules = manifests()["answer"]["spec"]["podFailurePolicy"]["rules"]
    assert [(rule["action"], ending(rule)) for rule in rules] == [
        ("Ignore", [{"type": "DisruptionTarget", "status": "True"}]),
        ("Ignore", ("stage", "In", [143])),
        ("FailIndex", ("stage", "In", [3])),
    ]
    assert pod_spec(manifests()["answer"])["containers"][0]["name"] == "stage"


def test_shards_are_indexes() -> None:
    spec = manifests({"student.shards": 4})["answer"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)


def test_gpus_are_limits_beside_the_users_own_resources() -> None:
    changes = {
        "student.tensorParallel": 2,
        "placement.student": {"resources": {"limits": {"memory": "64Gi"}, "requests": {"cpu": "8"}}},
    }
    resources = pod_spec(manifests(changes)["answer"])["containers"][0]["resources"]
    assert resources == {
        "limits": {"nvidia.com/gpu": "2", "memory": "64Gi"},
        "requests": {"cpu": "8", "ephemeral-storage": "4Gi"},
    }


def test_a_pool_places_its_pods() -> None:
    pool = {"nodeSelector": {"gpu": "a100"}, "tolerations": [{"operator": "Exists"}], "priorityClassName": "high"}
    spec = pod_spec(manifests({"placement.training": pool})["train-cgd"])
    assert spec["nodeSelector"] == {"gpu": "a100"}
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["priorityClassName"] == "high"
    assert "nodeSelector" not in pod_spec(manifests({"placement.training": pool})["answer"])


GANG = {"training.workers": 2, "placement.schedulingPolicy": {"gang": "volcano", "queue": "research"}}


def test_a_pytorchjob_is_scheduled_as_a_gang_of_all_its_pods() -> None:
    made = manifests(GANG | {"placement.training": {"priorityClassName": "high"}})
    policy = made["train-cgd"]["spec"]["runPolicy"]["schedulingPolicy"]
    assert policy == {"minAvailable": 2, "queue": "research", "priorityClass": "high"}
    assert pod_spec(made["train-cgd"])["schedulerName"] == "volcano"
    assert [stage for stage, body in made.items() if "schedulerName" in pod_spec(body)] == ["train-cgd"]


def test_a_runtime_tells_the_trainer_whose_pod_group_to_make() -> None:
    this = run(GANG)
    (child,) = [one for one in plan(this, "TrainJob") if one.kind == "TrainJob"]
    runtime = training_runtime(this, child, RELEASE)
    assert runtime["spec"]["podGroupPolicy"] == {"volcano": {}}
    assert runtime["spec"]["template"]["metadata"] == {"annotations": {"scheduling.volcano.sh/queue-name": "research"}}
    assert node_of(runtime)["template"]["spec"]["template"]["spec"]["schedulerName"] == "volcano"


@pytest.mark.parametrize(("named", "scheduler"), [({}, "scheduler-plugins-scheduler"), ({"schedulerName": "s"}, "s")])
def test_coscheduling_needs_a_scheduler_and_no_queue(named: dict[str, str], scheduler: str) -> None:
    this = run({"placement.schedulingPolicy": {"gang": "coscheduling", **named}})
    old, new = (next(one for one in plan(this, kind) if one.pool == "training") for kind in BACKENDS)
    job, runtime = manifest(this, old, RELEASE), training_runtime(this, new, RELEASE)
    assert job["spec"]["runPolicy"]["schedulingPolicy"] == {"minAvailable": 1}
    assert pod_spec(job)["schedulerName"] == scheduler
    assert runtime["spec"]["podGroupPolicy"] == {"coscheduling": {}}
    assert "metadata" not in runtime["spec"]["template"]


def test_without_a_policy_nothing_is_said_of_gangs(trainjob: Any) -> None:
    policy = manifests()["train-cgd"]["spec"]["runPolicy"]
    assert "schedulingPolicy" not in policy
    assert not {"podGroupPolicy", "metadata"} & {*trainjob[1]["spec"], *trainjob[1]["spec"]["template"]}


def test_the_pods_of_a_training_share_a_topology_beside_the_pools_own_affinity() -> None:
    term = {"topologyKey": "host", "labelSelector": {"matchLabels": {"app": "cache"}}}
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    own = {"nodeAffinity": {}, "podAffinity": {required: [term]}}
    changes = {"training.workers": 2, "placement.topologyKey": "rack", "placement.training": {"affinity": own}}
    affinity = pod_spec(manifests(changes)["train-cgd"])["affinity"]
    selector = {"matchLabels": {"cgd.dev/run-uid": run().uid, "cgd.dev/stage": "train-cgd"}}
    assert affinity == {
        "nodeAffinity": {},
        "podAffinity": {required: [term, {"topologyKey": "rack", "labelSelector": selector}]},
    }
    template = manifests(changes)["train-cgd"]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    assert selector["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert "affinity" not in pod_spec(manifests(changes)["answer"])
    assert pod_spec(manifests(changes | {"training.workers": 1})["train-cgd"])["affinity"] == own
    assert "affinity" not in pod_spec(manifests({"training.workers": 2})["train-cgd"])


@pytest.fixture
def trainjob() -> tuple[dict[str, Any], dict[str, Any]]:
    """A TrainJob of two pods with four processes each, and its runtime."""
    this = run({"training.workers": 2, "training.gpusPerWorker": 4, "retries": 5})
    (child,) = [one for one in plan(this, "TrainJob") if one.kind == "TrainJob"]
    return manifest(this, child, RELEASE), training_runtime(this, child, RELEASE)


def node_of(runtime: dict[str, Any]) -> Any:
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return replicated


def test_a_trainjob_refers_to_a_runtime_of_the_run(trainjob: Any) -> None:
    job, runtime = trainjob
    wanted = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    assert job["spec"]["runtimeRef"] == wanted
    assert runtime["metadata"]["ownerReferences"] == job["metadata"]["ownerReferences"]
    assert runtime["metadata"]["namespace"] == job["metadata"]["namespace"]


def test_a_trainjob_says_how_many_pods_and_processes_there_are(trainjob: Any) -> None:
    job, runtime = trainjob
    assert job["spec"]["trainer"] == {"numNodes": 2, "numProcPerNode": 4}
    assert runtime["spec"]["mlPolicy"] == {"numNodes": 2, "torch": {}}


def test_the_trainer_finds_its_container_by_step_and_name(trainjob: Any) -> None:
    node = node_of(trainjob[1])
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    assert (node["name"], container["name"]) == ("node", "node")
    assert not [one for one in container["env"] if one["name"].startswith("PET_")]


def test_a_runtime_starts_all_pods_anew_except_after_a_permanent_error(trainjob: Any) -> None:
    policy, job = trainjob[1]["spec"]["template"]["spec"]["failurePolicy"], node_of(trainjob[1])["template"]["spec"]
    assert policy["maxRestarts"] == 5
    assert [(one["action"], one["onJobFailureReasons"]) for one in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy", "DeadlineExceeded"])
    ]
    assert job["backoffLimit"] == 0
    disruption, interrupted, permanent = job["podFailurePolicy"]["rules"]
    assert disruption["action"] == "Ignore"
    assert (interrupted["action"], ending(interrupted)) == ("Ignore", ("node", "In", [143]))
    assert (permanent["action"], ending(permanent)) == ("FailJob", ("node", "In", [3]))


def test_a_runtimes_job_fits_the_published_schema(trainjob: Any) -> None:
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "x"},
        "spec": node_of(trainjob[1])["template"]["spec"],
    }
    kubernetes_validate.validate(job, "1.37", strict=True)


def test_pods_are_the_same_for_both_backends_but_for_what_the_controllers_set(trainjob: Any) -> None:
    own = node_of(trainjob[1])["template"]["spec"]["template"]["spec"]
    other = pod_spec(manifests({"training.workers": 2, "training.gpusPerWorker": 4, "retries": 5})["train-cgd"])
    (mine,), (theirs,) = own.pop("containers"), other.pop("containers")
    assert own.pop("restartPolicy") == "Never"
    assert own == other
    assert theirs.pop("ports")
    theirs["env"] = [one for one in theirs["env"] if not one["name"].startswith("PET_")]
    assert mine.pop("name") != theirs.pop("name")
    assert mine == theirs


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_pytorchjob_has_workers_alone(workers: int) -> None:
    replicas = manifests({"training.workers": workers})["train-cgd"]["spec"]["pytorchReplicaSpecs"]
    assert {name: one["replicas"] for name, one in replicas.items()} == {"Worker": workers}
    assert replicas["Worker"]["template"]["spec"]["containers"][0]["name"] == "pytorch"


def test_a_worker_is_told_where_all_meet_and_reads_its_number_from_its_label() -> None:
    body = manifests({"training.workers": 2})["train-cgd"]
    variables = env(body)
    assert variables["PET_MASTER_ADDR"] == f"{body['metadata']['name']}-worker-0"
    [port] = pod_spec(body)["containers"][0]["ports"]
    assert variables["PET_MASTER_PORT"] == str(port["containerPort"])
    assert variables["PET_NODE_RANK"] == {
        "fieldRef": {"fieldPath": "metadata.labels['training.kubeflow.org/replica-index']"}
    }


def test_credentials_are_references_and_never_values() -> None:
    changes = {
        "storage.credentialsSecretRef": {"name": "s3-keys"},
        "teacher.model": None,
        "teacher.endpoint": {"url": "https://t/v1", "model": "m", "apiKeySecretRef": {"name": "teacher", "key": "key"}},
        "hubTokenSecretRef": {"name": "hub", "key": "token"},
    }
    variables = env(manifests(changes)["teacher"])
    assert variables["AWS_ACCESS_KEY_ID"] == {"secretKeyRef": {"name": "s3-keys", "key": "AWS_ACCESS_KEY_ID"}}
    assert variables["CGD_TEACHER_API_KEY"] == {"secretKeyRef": {"name": "teacher", "key": "key"}}
    assert variables["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}


def test_the_teachers_key_is_not_given_to_the_student() -> None:
    changes = {
        "teacher.model": None,
        "teacher.endpoint": {"url": "https://t/v1", "model": "m", "apiKeySecretRef": {"name": "teacher", "key": "key"}},
    }
    assert "CGD_TEACHER_API_KEY" not in env(manifests(changes)["answer"])
    assert "CGD_TEACHER_API_KEY" in env(manifests(changes)["prepare"])


def test_configmaps_are_mounted_where_prepare_looks_for_them() -> None:
    spec = pod_spec(manifests()["prepare"])
    (volume,) = [one for one in spec["volumes"] if one["name"] == "inputs"]
    (source,) = volume["projected"]["sources"]
    paths = {item["path"] for item in source["configMap"]["items"]}
    assert paths == {"problems/train.jsonl", "problems/heldout.jsonl"}
    assert env(manifests()["prepare"])["CGD_INPUTS"] == "/etc/cgd/inputs"
    assert "CGD_INPUTS" not in env(manifests()["answer"])


def test_published_figures_are_mounted_for_those_who_read_them() -> None:
    made = manifests({"evaluation.published": "configmap://paper/figures.json"})
    for stage in ("prepare", "report"):
        (volume,) = [one for one in pod_spec(made[stage])["volumes"] if one["name"] == "inputs"]
        items = [item for source in volume["projected"]["sources"] for item in source["configMap"]["items"]]
        assert {"key": "figures.json", "path": "paper/figures.json"} in items
        assert env(made[stage])["CGD_INPUTS"] == "/etc/cgd/inputs"
    assert "CGD_INPUTS" not in env(made["evaluate-cgd"])
    assert "CGD_INPUTS" not in env(manifests({"evaluation.published": "s3://data/figures.json"})["report"])


def test_images_are_the_releases_unless_the_run_names_its_own() -> None:
    assert pod_spec(manifests()["train-cgd"])["containers"][0]["image"] == RELEASE.train_image
    own = manifests({"images.train": "mine:1"})
    assert pod_spec(own["train-cgd"])["containers"][0]["image"] == "mine:1"
    assert pod_spec(own["answer"])["containers"][0]["image"] == RELEASE.generate_image


def test_users_labels_are_added_but_do_not_displace_ours() -> None:
    changes = {"podMetadata.labels": {"team": "nlp", "cgd.dev/stage": "forged"}}
    labels = manifests(changes)["answer"]["spec"]["template"]["metadata"]["labels"]
    assert labels["team"] == "nlp"
    assert labels["cgd.dev/stage"] == "answer"


def test_the_progress_secret_is_what_the_pods_mount() -> None:
    this = run()
    secret = progress_secret(this, {"answer": "t"}, RELEASE)
    (volume,) = [one for one in pod_spec(manifests()["answer"])["volumes"] if one["name"] == "progress"]
    assert volume["secret"]["secretName"] == secret["metadata"]["name"] == secret_name(this, RELEASE)
    assert volume["secret"]["optional"] is True
    assert volume["secret"]["items"] == [{"key": "answer", "path": "token"}]


def test_no_manifest_holds_anything_that_is_not_json() -> None:
    assert json.loads(json.dumps(manifests())) == manifests()
