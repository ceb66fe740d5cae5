"""The TrainJob controller (`trainer.kubeflow.org/v1alpha1`) with the semantics of Kubeflow Trainer 2, and its CRDs.

A TrainJob becomes a Job from the TrainingRuntime's template, as through a JobSet in a real cluster, and `jobs` runs
that Job's pods. Environment, names, conditions and reasons are those of the Trainer and of JobSet. Deviations:

- There is no JobSet between the two: the TrainJob has the JobSet's `status.restarts`.
- One machine: PET_MASTER_PORT comes from the job's uid, and is not 29500.
- A suspended TrainJob's Job is deleted, not suspended.
- Left out: initializers, patches of the runtime, other policies than `torch`, other jobs than `node`, failure
  rules that look at anything but a Job's reason, ClusterTrainingRuntimes.
"""

from copy import deepcopy
from datetime import UTC, datetime

from cgd_local.controllers import (
    SERVICE,
    Controller,
    Decision,
    condition,
    headless,
    owned,
    set_condition,
    with_env,
)
from cgd_local.jobs import INDEX
from cgd_local.kubeflow import LOOSE, definition, port, struct
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import EVENT, JOB, TRAININGRUNTIME, TRAINJOB, ApiError, Kind

RESTARTS, JOBSET = "jobset.sigs.k8s.io/restart-attempt", "jobset.sigs.k8s.io/jobset-name"


class TrainJobController(Controller):
    """Looks at a TrainJob together with its runtime."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster, TRAINJOB, decide, makes=JOB)

    async def _complete(self, owner: Object) -> Object:
        meta, name = owner["metadata"], owner["spec"]["runtimeRef"]["name"]
        runtime = await self._cluster.get(TRAININGRUNTIME, name, meta["namespace"])
        return owner | {"runtime": runtime}

    async def _act(self, owner: Object, decision: Decision) -> None:
        """Create the Service first: without it there is no Job."""
        if not await self._serve(owner, decision):
            decision.create = []
        decision.services = []
        await super()._act(owner, decision)

    async def _record_refusal(self, owner: Object, error: ApiError, kind: Kind) -> None:
        """Write an Event about the JobSet, in the form of newer recorders: a time and a series, no first and last."""
        meta, moment = owner["metadata"], datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        reason = "HeadlessServiceCreationFailed" if kind is SERVICE else "JobCreationFailed"
        failed = "" if kind is SERVICE else f'job "{meta["name"]}-node-0" creation failed with error: '
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{meta['name']}.", "namespace": meta["namespace"]},
            "involvedObject": {"kind": "JobSet", "name": meta["name"], "namespace": meta["namespace"]},
            "type": "Warning",
            "reason": reason,
            "action": reason,
            "message": failed + error.message,
            "eventTime": moment,
            "series": {"count": 2, "lastObservedTime": moment},
            "reportingComponent": "jobset-controller",
            "reportingInstance": "jobset-controller-0",
        }
        await self._cluster.create(EVENT, body)


def decide(trainjob: Object, jobs: list[Object], _: float) -> Decision:
    """What the Trainer does for a TrainJob, which holds its `runtime` (None if that does not exist)."""
    status: Object = {"restarts": 0, "conditions": [], **deepcopy(trainjob.get("status") or {})}
    decision, conditions = Decision(status), status["conditions"]
    staying = [job for job in jobs if "deletionTimestamp" not in job["metadata"]]
    ends = [job.get("status", {}).get("conditions", []) for job in staying]
    succeeded, failed = (sum(condition(end, kind) is not None for end in ends) for kind in ("Complete", "Failed"))
    counts = {"succeeded": succeeded, "failed": failed, "active": len(staying) - succeeded - failed}
    status["jobsStatus"] = [{"name": "node", **counts}]  # of Jobs, not of pods, as the JobSet counts
    if condition(conditions, "Complete") or condition(conditions, "Failed"):
        return decision
    if trainjob["runtime"] is None:
        name = trainjob["spec"]["runtimeRef"]["name"]
        set_condition(conditions, "Failed", "True", "TrainingRuntimeNotSupported", f"there is no runtime {name}")
    elif trainjob["spec"].get("suspend"):
        decision.delete = staying
        set_condition(conditions, "Suspended", "True", "Suspended", "TrainJob is suspended")
    else:
        if condition(conditions, "Suspended"):
            set_condition(conditions, "Suspended", "False", "Resumed", "TrainJob is resumed")
        name = trainjob["metadata"]["name"]
        service = owned(TRAINJOB, trainjob, name, {})
        decision.services = [headless(service, {JOBSET: name}, publishNotReadyAddresses=True)]
        if not jobs:  # a Job that is still ending holds the pods' names and the port
            decision.create = [_job(trainjob)]
        for job in staying:
            _judge(trainjob, job, decision)
    return decision


def _judge(trainjob: Object, job: Object, decision: Decision) -> None:
    """End the TrainJob with its Job, or delete the Job so that a new one replaces it, as the JobSet's failure policy
    says."""
    status, ends = decision.status, job.get("status", {}).get("conditions", [])
    if condition(ends, "Complete"):
        set_condition(status["conditions"], "Complete", "True", "AllJobsCompleted", "jobset completed successfully")
    if failed := condition(ends, "Failed"):
        policy = _jobset(trainjob).get("failurePolicy") or {}
        final = [rule for rule in policy.get("rules") or [] if failed["reason"] in rule.get("onJobFailureReasons", [])]
        if final and final[0]["action"] == "FailJobSet":
            reason, message = "FailJobSetFailurePolicyAction", "applying FailJobSet failure policy action"
        elif not policy.get("maxRestarts"):
            reason, message = "FailedJobs", "jobset failed due to one or more job failures"
        elif status["restarts"] >= policy["maxRestarts"]:
            reason, message = "ReachedMaxRestarts", "jobset failed due to reaching max number of restarts"
        else:
            status["restarts"] += 1
            decision.delete.append(job)
            return
        message = f"{message} (first failed job: {job['metadata']['name']})"
        set_condition(status["conditions"], "Failed", "True", reason, message)


def _jobset(trainjob: Object) -> Object:
    spec: Object = trainjob["runtime"]["spec"]["template"]["spec"]
    return spec


def _job(trainjob: Object) -> Object:
    meta, trainer = trainjob["metadata"], trainjob["spec"].get("trainer") or {}
    (replicated,) = _jobset(trainjob)["replicatedJobs"]
    nodes = trainer.get("numNodes") or trainjob["runtime"]["spec"]["mlPolicy"].get("numNodes", 1)
    template = replicated["template"]["spec"]
    pods = with_env(template["template"], _environment(trainjob, nodes)) if trainer else template["template"]
    pods_meta = pods.get("metadata") or {}
    jobset = {RESTARTS: str((trainjob.get("status") or {}).get("restarts", 0)), JOBSET: meta["name"]}
    pods = pods | {
        "metadata": pods_meta | {"labels": {**(pods_meta.get("labels") or {}), **jobset}},
        "spec": pods["spec"] | {"subdomain": meta["name"]},
    }
    labels = (replicated["template"].get("metadata") or {}).get("labels", {})
    return {
        "apiVersion": JOB.api_version,
        "kind": JOB.kind,
        "metadata": owned(TRAINJOB, trainjob, f"{meta['name']}-node-0", labels),
        "spec": template | {"completions": nodes, "parallelism": nodes, "template": pods},
    }


def _environment(trainjob: Object, nodes: int) -> list[Object]:
    """The variables that the Trainer's torch plugin injects."""
    name, processes = trainjob["metadata"]["name"], trainjob["spec"]["trainer"].get("numProcPerNode", "auto")
    rank = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
    return [
        {"name": "PET_NNODES", "value": str(nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(processes)},
        {"name": "PET_NODE_RANK", "valueFrom": rank},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": port(trainjob)},
    ]


def crds() -> list[Object]:
    """The CRDs of TrainingRuntime and TrainJob."""
    count, text = {"type": "integer", "minimum": 1}, {"type": "string"}
    reference = struct(required=["name"], name=text, kind=text, apiGroup=text)
    trainer = struct(required=[], numNodes=count, numProcPerNode=count)
    spec = struct(required=["runtimeRef"], runtimeRef=reference, trainer=trainer, suspend={"type": "boolean"})
    jobs = {
        "type": "array",
        "maxItems": 1,
        "minItems": 1,
        "items": struct(["name", "template"], name=text, template=LOOSE),
    }
    jobset = struct(required=["replicatedJobs"], replicatedJobs=jobs, failurePolicy=LOOSE)
    runtime = struct(
        required=["mlPolicy", "template"], mlPolicy=LOOSE, podGroupPolicy=LOOSE, template=struct(["spec"], spec=jobset)
    )
    return [definition(TRAININGRUNTIME, runtime), definition(TRAINJOB, spec)]
