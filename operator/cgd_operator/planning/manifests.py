"""A child as a Kubernetes manifest: Job, PyTorchJob or TrainJob. Pure.

Every pod passes the `restricted` Pod Security Standard, has no API token, and can write to `/scratch` and `/tmp` only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cgd_operator.api.placement import Pool
from cgd_operator.kube.kinds import (
    JOB,
    POD,
    PYTORCHJOB,
    QUEUE_LABEL,
    QUEUE_LABELS,
    RUN,
    TRAININGRUNTIME,
    TRAINJOB,
    Kind,
)
from cgd_operator.planning.dag import Child, Run
from cgd_operator.planning.requests import requests
from cgd_stages import contract

Object = dict[str, Any]

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "cgd-operator"
RUN_LABEL, UID_LABEL, STAGE_LABEL = "cgd.dev/run", "cgd.dev/run-uid", "cgd.dev/stage"
POOL_LABEL = "cgd.dev/pool"
"""On pods: the part of spec.placement that they have their resources from."""
FINALIZER = "cgd.dev/clean"
"""On a run with `deletionPolicy: Delete`: it stays until what it stored is deleted."""
TTL = "ttlSecondsAfterFinished"
GIVEN_UP = "cgd.dev/given-up"
"""On a Job or a PyTorchJob that the operator has ended: why."""

SCRATCH, TMP, INPUTS, PROGRESS, CA = "/scratch", "/tmp", "/etc/cgd/inputs", "/etc/cgd/progress", "/etc/cgd/ca"  # noqa: S108
MODELS = "/models"
"""Where the cluster's cache of models is mounted."""
LOADS = (
    contract.Fetch,
    contract.Generate,
    contract.Rollout,
    contract.Score,
    contract.Train,
    contract.Evaluate,
    contract.Harness,
)
"""The work that needs the weights of a model; only Fetch may write them."""
TERMINATION_LOG = "/dev/termination-log"

REPLICA_TYPE, REPLICA_INDEX = "training.kubeflow.org/replica-type", "training.kubeflow.org/replica-index"
"""Labels with which the Training Operator numbers the pods of a PyTorchJob."""
MEETING_PORT = 23456
"""Where the processes of a PyTorchJob meet, on its first worker."""
TRAINER = "trainer.kubeflow.org"
VOLCANO_QUEUE = "scheduling.volcano.sh/queue-name"
"""Annotation of a TrainingRuntime's template that Kubeflow Trainer reads."""
SCHEDULERS = {"volcano": "volcano", "coscheduling": "scheduler-plugins-scheduler"}
"""Names under which the gang schedulers' own charts install them."""
KINDS: dict[str, Kind] = {"Job": JOB, "PyTorchJob": PYTORCHJOB, "TrainJob": TRAINJOB}
CONTAINERS = {"Job": "stage", "PyTorchJob": "pytorch", "TrainJob": "node"}
"""What our container is called in the pods of each kind; others were put beside it by somebody else."""


@dataclass(frozen=True)
class Release:
    """What every manifest takes from the operator's own configuration."""

    generate_image: str
    train_image: str
    progress_url: str = ""
    """Base URL of the progress server as pods reach it; empty: no progress is reported."""
    scratch_size_limit: str = ""
    """Of /scratch and of /tmp each, a quantity; empty: none."""
    key_id: str = ""
    """Names the key that signs the progress tokens."""


def manifest(run: Run, child: Child, release: Release) -> Object:
    """The manifest that creates the child."""
    match child.kind:
        case "Job":
            return _job(run, child, release)
        case "PyTorchJob":
            return _pytorchjob(run, child, release)
        case "TrainJob":
            return _trainjob(run, child)


def cleaning_job(run: Run, child: Child, release: Release) -> Object:
    """The Job that deletes what a run has stored. The run does not own it: the Job must outlive a foreground deletion,
    which deletes everything that the run owns."""
    job = _job(run, child, release)
    del job["metadata"]["ownerReferences"]
    return job


def secret_name(run: Run, release: Release) -> str:
    """The name of the Secret with the tokens. Each signing key has its own Secret: no Secret is ever changed."""
    name = f"{run.name[:40].rstrip('-.')}-progress-{run.uid[:6]}".replace(".", "-")
    return f"{name}-{release.key_id}" if release.key_id else name


def has_secret(child: Object, name: str) -> bool:
    """Whether a Job that exists mounts the Secret."""
    volumes = child["spec"].get("template", {}).get("spec", {}).get("volumes", [])
    return any(volume.get("secret", {}).get("secretName") == name for volume in volumes)


def progress_secret(run: Run, tokens: dict[str, str], release: Release) -> Object:
    """The Secret with a progress token for every child, each under its stage's name."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _meta(run, secret_name(run, release)),
        "stringData": tokens,
        "type": "Opaque",
    }


def training_runtime(run: Run, child: Child, release: Release) -> Object:
    """The TrainingRuntime that a TrainJob refers to: the pod template, and what happens when a pod fails.

    The Job gives up at its first failure, and then the JobSet starts all pods anew, `spec.retries` times: the pods of a
    training need each other. A permanent error ends the JobSet at once.
    """
    job = {
        "backoffLimit": 0,
        "completionMode": "Indexed",
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": _pod_failure_policy(child, "FailJob"),
        "template": _template(run, child, release, restart="Never"),
    }
    node = {"metadata": {"labels": {f"{TRAINER}/trainjob-ancestor-step": "trainer"}}, "spec": job}
    gang = run.spec.placement.scheduling_policy
    queue = {VOLCANO_QUEUE: gang.queue} if gang and gang.queue else {}
    permanent = {"name": "permanent", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    meta = _meta(run, child.name, child.stage)
    return {
        "apiVersion": TRAININGRUNTIME.api_version,
        "kind": TRAININGRUNTIME.kind,
        "metadata": {**meta, "labels": {**meta["labels"], f"{TRAINER}/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": child.pods, "torch": {}},
            **({"podGroupPolicy": {gang.gang: {}}} if gang else {}),
            "template": {
                **({"metadata": {"annotations": queue}} if queue else {}),
                "spec": {
                    "failurePolicy": {"maxRestarts": run.spec.retries, "rules": [permanent]},
                    "replicatedJobs": [{"name": "node", "template": node}],
                },
            },
        },
    }


def rehearsals(run: Run, child: Child, release: Release, *, pods: bool) -> Iterator[tuple[Kind, Object]]:
    """The objects that the API server judges as dry runs before a run begins, for a child: its pod as a Pod, which
    admission judges; a Job, which checks the pod's fields; and the training. A TrainJob is refused without its
    TrainingRuntime, so it is the runtime."""
    template = _template(run, child, release, restart="Never")
    meta = _meta(run, child.name, child.stage)
    if pods:
        labelled = {"labels": template["metadata"]["labels"], "annotations": template["metadata"]["annotations"]}
        yield POD, {"apiVersion": "v1", "kind": "Pod", "metadata": {**meta, **labelled}, "spec": template["spec"]}
    yield JOB, _job(run, child, release)
    if child.kind == "PyTorchJob":
        yield PYTORCHJOB, _pytorchjob(run, child, release)
    if child.kind == "TrainJob":
        yield TRAININGRUNTIME, training_runtime(run, child, release)


def suspension(kind: str, suspend: bool) -> Object:
    """The part of a child's spec that suspends or resumes it."""
    return _policy(kind, suspend=suspend)


def giving_up(kind: str, why: str) -> Object:
    """The patch that ends a Job or a PyTorchJob: a deadline that is over, for which its controller fails it."""
    return {"metadata": {"annotations": {GIVEN_UP: why}}, "spec": _policy(kind, activeDeadlineSeconds=1)}


def keeping(kind: str) -> Object:
    """The patch after which a child that has ended is not deleted by its controller."""
    return {"spec": _policy(kind, **{TTL: None})}


def expires(child: Object) -> bool:
    """Whether a child's controller deletes it some time after its end. We never ask for that, but policies add it."""
    spec = child.get("spec", {})
    return spec.get("runPolicy", spec).get(TTL) is not None


def _policy(kind: str, **fields: Any) -> Object:
    """Fields of a child's spec that say how long it may run and stay."""
    return {"runPolicy": fields} if kind == "PyTorchJob" else fields


def disruption(pod: Object, now: datetime) -> Object:
    """The patch of a pod's status after which it has failed with its node, by no fault of its own. The uid keeps the
    patch from another pod that has taken the name."""
    condition = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "NodeLost",
        "message": "its node has not ended it in time (spec.replaceLostPodsAfterSeconds)",
        "lastTransitionTime": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    others = [other for other in pod["status"].get("conditions", []) if other["type"] != condition["type"]]
    status = {"phase": "Failed", "conditions": [*others, condition]}
    return {"metadata": {"uid": pod["metadata"]["uid"]}, "status": status}


def _job(run: Run, child: Child, release: Release) -> Object:
    return {
        "apiVersion": JOB.api_version,
        "kind": "Job",
        "metadata": _child_meta(run, child),
        "spec": {
            "completionMode": "Indexed",
            "completions": child.pods,
            "parallelism": child.pods,
            "backoffLimitPerIndex": run.spec.retries,
            "maxFailedIndexes": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": _pod_failure_policy(child, "FailIndex"),
            "template": _template(run, child, release, restart="Never"),
        },
    }


def _pod_failure_policy(child: Child, action: str) -> Object:
    """An end from outside is no failure: a disruption, or the deletion of the pod (which sets no such condition). A
    permanent error takes the action at once."""

    def ended_with(code: contract.Exit) -> Object:
        return {"containerName": CONTAINERS[child.kind], "operator": "In", "values": [int(code)]}

    disruption = {"type": "DisruptionTarget", "status": "True"}
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [disruption]},
            {"action": "Ignore", "onExitCodes": ended_with(contract.Exit.INTERRUPTED)},
            {"action": action, "onExitCodes": ended_with(contract.Exit.PERMANENT)},
        ]
    }


def _pytorchjob(run: Run, child: Child, release: Release) -> Object:
    """It has only Workers: beside a Master the Training Operator gives every Worker an init container that runs as
    root, which our pods and namespaces that enforce `restricted` refuse. The job succeeds when all Workers have.

    It has no `backoffLimit`, which counts restarts of containers in their pods, a sidecar's too, and never the pods
    that are made again, see `retries`.
    """
    worker = {"replicas": child.pods, "restartPolicy": "ExitCode", "template": _template(run, child, release)}
    policy: Object = {"cleanPodPolicy": "Running"}
    if gang := run.spec.placement.scheduling_policy:  # the PodGroup that the Training Operator makes
        names = {"queue": gang.queue, "priorityClass": run.spec.placement.training.priority_class_name}
        given = {field: name for field, name in names.items() if name}
        policy["schedulingPolicy"] = {"minAvailable": child.pods, **given}
    return {
        "apiVersion": PYTORCHJOB.api_version,
        "kind": "PyTorchJob",
        "metadata": _child_meta(run, child),
        "spec": {
            "nprocPerNode": str(run.spec.training.gpus_per_worker),
            "pytorchReplicaSpecs": {"Worker": worker},
            "runPolicy": policy,
        },
    }


def _trainjob(run: Run, child: Child) -> Object:
    """The Trainer adds PET_* to the runtime's container only if the TrainJob has `trainer`."""
    return {
        "apiVersion": TRAINJOB.api_version,
        "kind": TRAINJOB.kind,
        "metadata": _child_meta(run, child),
        "spec": {
            "runtimeRef": {"apiGroup": TRAINER, "kind": TRAININGRUNTIME.kind, "name": child.name},
            "trainer": {"numNodes": child.pods, "numProcPerNode": run.spec.training.gpus_per_worker},
        },
    }


def _child_meta(run: Run, child: Child) -> Object:
    """Kueue reads queue and priority from the object that it suspends; its pods and their Jobs follow their owner."""
    meta = _meta(run, child.name, child.stage)
    queue = {label: run.labels[label] for label in QUEUE_LABELS if label in run.labels}
    return {**meta, "labels": {**queue, **meta["labels"]}}


def _meta(run: Run, name: str, stage: str = "") -> Object:
    return {
        "name": name,
        "namespace": run.namespace,
        "labels": _labels(run, stage),
        "ownerReferences": [
            {
                "apiVersion": RUN.api_version,
                "kind": RUN.kind,
                "name": run.name,
                "uid": run.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def _labels(run: Run, stage: str) -> dict[str, str]:
    labels = {MANAGED_BY: MANAGER, RUN_LABEL: run.name, UID_LABEL: run.uid}
    return {**labels, STAGE_LABEL: stage} if stage else labels


def _template(run: Run, child: Child, release: Release, restart: str | None = None) -> Object:
    pool: Pool = getattr(run.spec.placement, child.pool)
    metadata, gang = run.spec.pod_metadata, run.spec.placement.scheduling_policy
    scheduler = (gang.scheduler_name or SCHEDULERS[gang.gang]) if gang and child.pool == "training" else None
    spec = {
        "restartPolicy": restart,
        "serviceAccountName": run.spec.service_account_name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": child.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "nodeSelector": pool.node_selector,
        "tolerations": pool.tolerations,
        "affinity": _affinity(run, child, pool),
        "schedulerName": scheduler,
        "priorityClassName": pool.priority_class_name,
        "imagePullSecrets": [{"name": secret.name} for secret in run.spec.pods.image_pull_secrets],
        "containers": [_container(run, child, release, pool)],
        "volumes": list(_volumes(run, child, release)),
    }
    return {
        "metadata": {
            "labels": {**metadata.labels, **_labels(run, child.stage), POOL_LABEL: child.pool},
            "annotations": dict(metadata.annotations),
        },
        "spec": {key: value for key, value in spec.items() if value not in (None, {}, [])},
    }


def _affinity(run: Run, child: Child, pool: Pool) -> Object:
    """The pool's own affinity; a training's pods also have to be near each other, wherever the first of them runs."""
    key = run.spec.placement.topology_key
    if key is None or child.pool != "training" or child.pods == 1:
        return pool.affinity
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    together = {
        "topologyKey": key,
        "labelSelector": {"matchLabels": {UID_LABEL: run.uid, STAGE_LABEL: child.stage}},
    }
    own = pool.affinity.get("podAffinity", {})
    return {**pool.affinity, "podAffinity": {**own, required: [*own.get(required, []), together]}}


LISTENS = ["sh", "-c", "while grep -qE '^SigCgt:.*[0-38-9ab][0-9a-f]{3}$' /proc/1/status; do sleep 0.05; done"]
"""Lasts while PID 1 has no handler for SIGTERM (bit 14 of those it catches): while Python starts, the kernel would drop
the only SIGTERM that a pod gets. Where /proc does not say (gVisor has no such line, /proc may be hidden) it ends at
once, because waiting would take the whole grace period from the program."""


def _container(run: Run, child: Child, release: Release, pool: Pool) -> Object:
    resources: Object = pool.resources.model_dump(exclude_defaults=True)
    if QUEUE_LABEL not in run.labels:
        resources["requests"] = requests(child.load, pool.resources)
    if child.gpus:
        resources["limits"] = {run.spec.placement.accelerator: str(child.gpus), **resources.get("limits", {})}
    container: Object = {
        "name": CONTAINERS[child.kind],
        "image": getattr(run.spec.images, child.image) or getattr(release, f"{child.image}_image"),
        "command": [_as_it_is(word) for word in ("python", "-m", f"cgd_stages.{child.task.work.kind}")],
        "env": list(_env(run, child, release)),
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "lifecycle": {"preStop": {"exec": {"command": LISTENS}}},
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": list(_mounts(run, child, release)),
    }
    if child.kind == "PyTorchJob":
        container["ports"] = [{"name": "pytorchjob-port", "containerPort": MEETING_PORT}]
    return container


def _env(run: Run, child: Child, release: Release) -> Iterator[Object]:
    yield _variable(contract.TASK, child.task.to_json())
    yield _variable(contract.SCRATCH, SCRATCH)
    yield _variable("HOME", SCRATCH)
    yield _variable("TMPDIR", TMP)
    yield _variable(contract.TERMINATION_LOG, TERMINATION_LOG)
    if run.spec.model_cache and isinstance(child.task.work, LOADS):
        yield _variable(contract.MODEL_CACHE, MODELS)
    if configmaps(child.task):
        yield _variable(contract.INPUTS, INPUTS)
    if release.progress_url:
        url = f"{release.progress_url.rstrip('/')}/progress/{run.namespace}/{run.name}/{run.uid}/{child.stage}"
        yield _variable(contract.PROGRESS_URL, url)
        yield _variable(contract.PROGRESS_TOKEN, f"{PROGRESS}/token")
    if child.kind == "PyTorchJob":  # which pod this is and where they meet; the Training Operator adds their number
        yield {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{REPLICA_INDEX}']"}}}
        yield _variable("PET_MASTER_ADDR", f"{child.name}-worker-0")  # each worker has a Service of its pod's name
        yield _variable("PET_MASTER_PORT", str(MEETING_PORT))
    yield from _credentials(run, child)
    for own in run.spec.pods.env:
        if own.value is None:
            yield own.model_dump(by_alias=True, exclude_none=True)
        else:
            yield _variable(own.name, own.value)


def _variable(name: str, value: str) -> Object:
    return {"name": name, "value": _as_it_is(value)}


def _as_it_is(text: str) -> str:
    """A value, or a word of a command, written so that the kubelet gives it to the container unchanged: the kubelet
    turns `$$` into a dollar sign, and `$(NAME)` into that variable, but not in commands of a `lifecycle`."""
    return text.replace("$", "$$")


def _credentials(run: Run, child: Child) -> Iterator[Object]:
    storage = run.spec.storage
    if storage.credentials_secret_ref:
        secret = storage.credentials_secret_ref.name
        yield _from_secret("AWS_ACCESS_KEY_ID", secret, "AWS_ACCESS_KEY_ID")
        yield _from_secret("AWS_SECRET_ACCESS_KEY", secret, "AWS_SECRET_ACCESS_KEY")
        yield _from_secret("AWS_SESSION_TOKEN", secret, "AWS_SESSION_TOKEN", optional=True)
    endpoint = run.spec.teacher.endpoint
    if endpoint and endpoint.api_key_secret_ref and child.pool == "cpu":
        ref = endpoint.api_key_secret_ref
        yield _from_secret(contract.TEACHER_API_KEY, ref.name, ref.key)
    if token := run.spec.hub_token_secret_ref:
        yield _from_secret("HF_TOKEN", token.name, token.key)


def _from_secret(variable: str, secret: str, key: str, *, optional: bool = False) -> Object:
    reference: Object = {"name": secret, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}


def _mounts(run: Run, child: Child, release: Release) -> Iterator[Object]:
    fills = isinstance(child.task.work, contract.Fetch)
    own = {_own(volume.name): volume for volume in run.spec.pods.volumes}
    for name in (volume["name"] for volume in _volumes(run, child, release)):
        if name in own:
            place, read_only = own[name].mount_path, own[name].read_only
        else:
            place, read_only = _MOUNTS[name], name in _READ_ONLY and not (fills and name == "models")
        yield {"name": name, "mountPath": place, **({"readOnly": True} if read_only else {})}


def _own(name: str) -> str:
    """A volume of the user's, under a name that is none of ours."""
    return f"own-{name}"


_MOUNTS = {
    "scratch": SCRATCH,
    "tmp": TMP,
    "shm": "/dev/shm",  # noqa: S108
    "inputs": INPUTS,
    "progress": PROGRESS,
    "ca": CA,
    "models": MODELS,
}
_READ_ONLY = {"inputs", "progress", "ca", "models"}


def _volumes(run: Run, child: Child, release: Release) -> Iterator[Object]:
    limit = {"sizeLimit": release.scratch_size_limit} if release.scratch_size_limit else {}
    yield {"name": "scratch", "emptyDir": limit}
    yield {"name": "tmp", "emptyDir": limit}
    if child.gpus:  # NCCL and vLLM share memory between the processes of a pod
        yield {"name": "shm", "emptyDir": {"medium": "Memory"}}
    if names := configmaps(child.task):  # optional: prepare says plainly which is missing, and its pod starts
        sources = []
        for name, keys in names.items():
            items = [{"key": key, "path": f"{name}/{key}"} for key in sorted(keys)]
            sources.append({"configMap": {"name": name, "items": items, "optional": True}})
        yield {"name": "inputs", "projected": {"sources": sources}}
    token = {"key": child.stage, "path": "token"}
    yield {"name": "progress", "secret": {"secretName": secret_name(run, release), "items": [token], "optional": True}}
    if ca := run.spec.storage.ca_bundle_config_map_ref:
        yield {"name": "ca", "configMap": {"name": ca.name, "items": [{"key": ca.key, "path": "ca.crt"}]}}
    if run.spec.model_cache and isinstance(child.task.work, LOADS):
        yield {"name": "models", **run.spec.model_cache.source()}
    for own in run.spec.pods.volumes:
        yield {"name": _own(own.name), **own.source()}


def configmaps(task: contract.StageTask) -> dict[str, set[str]]:
    """Names and keys of the ConfigMaps that the task reads: only prepare reads sources and files of templates."""
    work = task.work
    uris: list[str] = []
    if isinstance(work, contract.Prepare):
        uris += [source.source for source in (work.prompts, *work.benchmarks)]
        uris += [chat.template_uri or "" for chat in (work.student_chat, work.teacher_chat)]
        uris += work.instructions.given.values() if work.instructions else []
    if isinstance(work, contract.Prepare | contract.Report) and work.published:
        uris.append(work.published.uri)
    found: dict[str, set[str]] = {}
    for uri in uris:
        if uri.startswith(contract.CONFIG_MAP):
            name, _, key = uri.removeprefix(contract.CONFIG_MAP).partition("/")
            found.setdefault(name, set()).add(key)
    return found
