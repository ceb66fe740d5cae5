"""What every pod of a run gets: requests by the size of its model, variables, volumes, and the cluster's models."""

from typing import Any

import kubernetes_validate
import pytest
from support.builders import RELEASE, manifest, run

from cgd_operator.api.placement import Resources
from cgd_operator.api.spec import InvalidRun, parse_spec
from cgd_operator.planning.dag import Run, plan
from cgd_operator.planning.manifests import manifest as child_manifest
from cgd_operator.planning.requests import GI, Load, Sizes, requests
from cgd_stages import contract

SIZES = Sizes(checkpoint=56 * GI, student=16 * GI, teacher=140 * GI)
CACHE = {"modelCache": {"persistentVolumeClaim": {"claimName": "models"}}}
LOADING = {"answer", "teacher", "train-cgd", "evaluate-base", "evaluate-cgd"}


def pods(this: Run, sizes: Sizes = SIZES) -> dict[str, Any]:
    """The pod of each child, by stage."""
    specs = {}
    for child in plan(this, "PyTorchJob", sizes):
        body = child_manifest(this, child, RELEASE)
        holder = body["spec"]["pytorchReplicaSpecs"]["Worker"] if body["kind"] == "PyTorchJob" else body["spec"]
        specs[str(child.stage)] = holder["template"]["spec"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": specs[child.stage]}
        kubernetes_validate.validate(pod, "1.37", strict=True)
    return specs


def asked(this: Run, stage: str, sizes: Sizes = SIZES) -> Any:
    return pods(this, sizes)[stage]["containers"][0]["resources"]["requests"]


def test_a_pod_asks_for_what_its_model_needs() -> None:
    this = run({"teacher.tensorParallel": 8, "training.gpusPerWorker": 8})
    assert asked(this, "prepare") == {"cpu": "1", "memory": "4Gi", "ephemeral-storage": "4Gi"}
    assert asked(this, "answer") == {"cpu": "2", "memory": "20Gi", "ephemeral-storage": "20Gi"}
    assert asked(this, "teacher") == {"cpu": "16", "memory": "172Gi", "ephemeral-storage": "144Gi"}
    assert asked(this, "train-cgd") == {"cpu": "16", "memory": "48Gi", "ephemeral-storage": "132Gi"}


SAMPLING = {"training.objectives": [], "training.variants": [{"name": "gkd", "kind": "GKD"}]}


def test_what_samples_has_disk_for_the_weights_of_a_round_besides() -> None:
    this = run(SAMPLING)
    assert asked(this, "answer")["ephemeral-storage"] == "20Gi"
    assert asked(this, "rollout-gkd")["ephemeral-storage"] == "36Gi"
    assert asked(this, "score-gkd")["ephemeral-storage"] == "144Gi"
    kept = run({**SAMPLING, **CACHE})
    assert asked(kept, "rollout-gkd")["ephemeral-storage"] == "20Gi", "the cache has no weights of a round"


def test_whoever_loads_a_model_reads_it_from_the_cache() -> None:
    for stage, pod in pods(run({**SAMPLING, **CACHE})).items():
        mounted = "models" in {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}
        assert mounted is (stage not in ("prepare", "check", "report")), stage


def test_before_prepare_has_told_sizes_a_pod_asks_for_the_least() -> None:
    assert asked(run(), "answer", Sizes()) == {"cpu": "2", "memory": "4Gi", "ephemeral-storage": "4Gi"}


def test_what_a_training_offloads_is_asked_for_in_parts() -> None:
    this = run({"training.offload": "optimizer", "training.zeroStage": 3, "training.workers": 2})
    assert asked(this, "train-cgd")["memory"] == f"{4 * 8 + 16 + 12 * 8 // 2}Gi"


def test_the_users_own_requests_and_limits_stay() -> None:
    given = Resources(limits={"memory": "2Gi"}, requests={"cpu": "500m", "example.com/nic": 1})
    assert requests(Load(gpus=8), given) == {"cpu": "500m", "example.com/nic": 1, "ephemeral-storage": "4Gi"}


def test_a_queue_is_asked_for_nothing_that_it_may_not_count() -> None:
    queued = manifest()
    queued["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpus"}
    for spec in pods(Run.of(queued)).values():
        assert "requests" not in spec["containers"][0]["resources"]


def test_a_cpu_child_fills_the_cache_and_the_children_with_gpus_read_it() -> None:
    this = run({**CACHE, "teacher.speculative": {"model": "s3://data/models/drafts", "numSpeculativeTokens": 4}})
    children = {child.stage: child for child in plan(this)}
    fetch = children["fetch"]
    assert (fetch.pool, fetch.gpus, fetch.after, children["answer"].after) == ("cpu", 0, ("prepare",), ("fetch",))
    assert isinstance(fetch.task.work, contract.Fetch)
    names = [model.name for model in fetch.task.work.models]
    assert names == ["s3://data/models/student", "s3://data/models/teacher", "s3://data/models/drafts"]
    report = children["report"].task.work
    assert isinstance(report, contract.Report)
    assert "fetch" not in report.stages

    source = {"name": "models", "persistentVolumeClaim": {"claimName": "models"}}
    for stage, spec in pods(this).items():
        (container,) = spec["containers"]
        mounts = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/models"]
        told = [one["value"] for one in container["env"] if one["name"] == contract.MODEL_CACHE]
        mounted = stage in {"fetch", *LOADING}
        assert (source in spec["volumes"], told) == (mounted, ["/models"] if mounted else []), stage
        assert [mount.get("readOnly", False) for mount in mounts] == ([stage != "fetch"] if mounted else []), stage


def test_with_a_cache_no_pod_needs_disk_for_weights() -> None:
    assert asked(run(CACHE), "answer")["ephemeral-storage"] == "4Gi"


def test_without_a_cache_there_is_no_such_child() -> None:
    assert "fetch" not in [child.stage for child in plan(run())]


def test_an_endpoints_model_is_not_kept() -> None:
    this = run({**CACHE, "teacher": {"endpoint": {"url": "https://teacher.example/v1", "model": "large"}}})
    (fetch,) = (child.task.work for child in plan(this) if child.stage == "fetch")
    assert isinstance(fetch, contract.Fetch)
    assert [model.name for model in fetch.models] == ["s3://data/models/student"]


def test_every_pod_gets_variables_volumes_and_pull_secrets() -> None:
    secret = {"secretKeyRef": {"name": "proxy", "key": "url"}}
    changes = {
        "pods.env": [{"name": "NCCL_SOCKET_IFNAME", "value": "eth$0"}, {"name": "HTTPS_PROXY", "valueFrom": secret}],
        "pods.volumes": [
            {"name": "tmp", "mountPath": "/data/nfs", "persistentVolumeClaim": {"claimName": "nfs"}},
            {"name": "out", "mountPath": "/data/out", "readOnly": False, "hostPath": {"path": "/mnt/out"}},
            {"name": "ca", "mountPath": "/data/ca", "secret": {"secretName": "ca"}},
            {"name": "more", "mountPath": "/data/more", "configMap": {"name": "more"}},
        ],
        "pods.imagePullSecrets": [{"name": "registry"}],
    }
    for stage, spec in pods(run(changes)).items():
        (container,) = spec["containers"]
        assert container["env"][-2:] == [
            {"name": "NCCL_SOCKET_IFNAME", "value": "eth$$0"},
            {"name": "HTTPS_PROXY", "valueFrom": secret},
        ], stage
        assert [volume["name"] for volume in spec["volumes"]][-4:] == ["own-tmp", "own-out", "own-ca", "own-more"]
        assert len({volume["name"] for volume in spec["volumes"]}) == len(spec["volumes"])
        mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
        assert [mounts[f"/data/{name}"] for name in ("nfs", "out", "ca", "more")] == [True, False, True, True]
        assert spec["imagePullSecrets"] == [{"name": "registry"}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pods.env": [{"name": "HF_TOKEN", "value": "x"}]}, "spec.pods.env.0.name: the run sets this variable itself"),
        ({"pods.env": [{"name": "CGD_TASK", "value": "x"}]}, "the run sets this variable itself"),
        ({"pods.env": [{"name": "A"}]}, "set exactly one of value and valueFrom"),
        ({"pods.env": [{"name": "A", "valueFrom": {}}]}, "set exactly one of secretKeyRef and configMapKeyRef"),
        ({"pods.env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "env: name each of them once"),
        ({"pods.volumes": [{"name": "a", "mountPath": "/data"}]}, "set exactly one of persistentVolumeClaim"),
        (
            {"pods.volumes": [{"name": "a", "mountPath": "/scratch/x", "configMap": {"name": "a"}}]},
            "the image or the run has something there",
        ),
        ({"pods.volumes": [{"name": "a", "mountPath": "/", "configMap": {"name": "a"}}]}, "has something there"),
        ({"modelCache": {}}, "spec.modelCache: set exactly one of persistentVolumeClaim, hostPath"),
        ({"modelCache": {"hostPath": {"path": "/mnt/../etc"}}}, "take //, . and .. out of the path"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_change(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRun) as error:
        parse_spec(manifest(changes))
    assert words in str(error.value)


@pytest.mark.parametrize("path", ["/data", "/data/x", "/mnt", "/modelsx", "/home/user"])
def test_other_places_are_free(path: str) -> None:
    volume = {"name": "a", "mountPath": path, "configMap": {"name": "a"}}
    assert parse_spec(manifest({"pods.volumes": [volume]})).pods.volumes[0].mount_path == path


def test_the_teachers_own_words_reach_prepare_and_the_teacher_alone() -> None:
    this = run({
        "generation.critique": {"instruction": "configmap://words/critique.txt"},
        "generation.refine": {"instruction": "Improve it."},
        "training.objectives": ["CGD", "DistilledSFT"],
    })  # fmt: skip
    given = contract.Instructions(critique="configmap://words/critique.txt", refine="Improve it.")
    works = {child.stage: child.task.work for child in plan(this)}
    told = {stage: getattr(work, "instructions", None) for stage, work in works.items()}
    assert {stage for stage, own in told.items() if own == given} == {"prepare", "teacher", "distill"}
    (inputs,) = (volume for volume in pods(this)["prepare"]["volumes"] if volume["name"] == "inputs")
    assert "words" in [source["configMap"]["name"] for source in inputs["projected"]["sources"]]


@pytest.mark.parametrize("place", ["s3://bucket", "configmap://words", "configmap://words/a/b", "s3://bucket//a"])
def test_a_place_that_no_file_can_have_is_refused(place: str) -> None:
    with pytest.raises(InvalidRun, match=r"spec\.generation\.refine\.instruction: (write the text itself|take empty)"):
        parse_spec(manifest({"generation.refine": {"instruction": place}}))
