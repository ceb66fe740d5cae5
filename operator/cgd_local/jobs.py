"""The Job controller of `batch/v1`, as far as the operator's Jobs need it. Pure: `controllers` acts.

The decisions (which pods count as failed, which indexes are done, whether the Job is over) are those of the real
controller; so are the names of conditions, reasons, labels and annotations.

A pod is held (`TRACKED`) until it has succeeded or failed: one that is deleted by force and never says so stays, where
the Job's `podReplacementPolicy` is Failed.

Deviations: a pod that is deleted never counts as failed, and is replaced once it is gone; ranges of indexes are not
abbreviated. Left out: work queues (no `completions`),
restarts in the pod, `successPolicy`, `managedBy`, a change of `parallelism` downwards.
"""

import uuid

from cgd_local.controllers import (
    BACKOFF_SECONDS,
    Decision,
    condition,
    containers_of,
    end_of,
    is_active,
    is_leaving,
    now,
    phase,
    pod_of,
    seconds,
    set_condition,
    with_env,
)
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import JOB

PREFIX = "batch.kubernetes.io/"
INDEX, TRACKED = PREFIX + "job-completion-index", PREFIX + "job-tracking"
BACKOFF_LIMIT_SECONDS = 600.0

COMPLETE = "CompletionsReached"
MESSAGES = {
    "BackoffLimitExceeded": "Job has reached the specified backoff limit",
    "DeadlineExceeded": "Job was active longer than specified deadline",
    "MaxFailedIndexesExceeded": "Job has exceeded the specified maximal number of failed indexes",
    "FailedIndexes": "Job has failed indexes",
    COMPLETE: "Reached expected number of succeeded pods",
}

Index = int | None  # None: a pod of a Job without indexes


class View:
    """A Job and its pods as they are now, and what follows from them."""

    def __init__(self, job: Object, pods: list[Object]) -> None:
        self.job, self.spec, self.status = job, job["spec"], job.get("status") or {}
        self.completions = int(self.spec.get("completions", 1))
        self.indexed = self.spec.get("completionMode") == "Indexed"
        self.active = [pod for pod in pods if is_active(pod)]
        self.leaving = [pod for pod in pods if is_leaving(pod)]
        succeeded = [index_of(pod) for pod in pods if phase(pod) == "Succeeded"]
        self.done = {*succeeded, *parse_indexes(self.status.get("completedIndexes"))}
        self.succeeded = len(self.done) if self.indexed else max(len(succeeded), self.status.get("succeeded") or 0)
        failed = [pod for pod in pods if phase(pod) == "Failed" and not is_leaving(pod)]
        self.failed = sorted(failed, key=finished_at)
        self.counted = [pod for pod in self.failed if self.rule(pod)[0] != "Ignore"]
        self.given_up = {index for index in map(index_of, self.counted) if self._is_spent(index)}
        self.given_up |= parse_indexes(self.status.get("failedIndexes"))

        self.counted_out = [pod for pod in pods if self._is_counted_out(pod)]

    def _is_counted_out(self, pod: Object) -> bool:
        """Nothing more will be learned from a pod."""
        unheard = "deletionTimestamp" in pod["metadata"] and self.spec.get("podReplacementPolicy") != "Failed"
        return unheard or phase(pod) in ("Succeeded", "Failed")

    def rule(self, pod: Object) -> tuple[str, str]:
        """The action of the first matching rule of the failure policy (Count when none does), and why it matches."""
        for number, rule in enumerate(self.spec.get("podFailurePolicy", {}).get("rules") or []):
            if why := _matches(rule, pod):
                return rule["action"], f"{why} matching {rule['action']} rule at index {number}"
        return "Count", ""

    def _is_spent(self, index: Index) -> bool:
        """An index is not tried again after too many failures or a final one, but only with a limit per index."""
        limit = self.spec.get("backoffLimitPerIndex")
        actions = [self.rule(pod)[0] for pod in self.counted if index_of(pod) == index]
        return limit is not None and ("FailIndex" in actions or len(actions) > limit)

    def verdict(self, time_now: float) -> tuple[str, str] | None:
        """Reason and message of the Job's end, None while it goes on. What was decided once is kept to."""
        conditions = self.status.get("conditions") or []
        if found := condition(conditions, "FailureTarget") or condition(conditions, "SuccessCriteriaMet"):
            return found["reason"], found["message"]
        for action, message in map(self.rule, self.failed):
            if action == "FailJob":
                return "PodFailurePolicy", message
        reason = self._reason(time_now)
        return (reason, MESSAGES[reason]) if reason else None

    def _reason(self, time_now: float) -> str:
        per_index, given_up = "backoffLimitPerIndex" in self.spec, len(self.given_up)
        if len(self.counted) > self.spec.get("backoffLimit", len(self.counted) if per_index else 6):
            return "BackoffLimitExceeded"
        if self.time_left(time_now) == 0:
            return "DeadlineExceeded"
        if given_up > self.spec.get("maxFailedIndexes", given_up):
            return "MaxFailedIndexesExceeded"
        if given_up and given_up + self.succeeded >= self.completions:
            return "FailedIndexes"
        return COMPLETE if self.succeeded >= self.completions else ""

    def time_left(self, time_now: float) -> float | None:
        deadline, start = self.spec.get("activeDeadlineSeconds"), self.status.get("startTime")
        if deadline is None or start is None or self.spec.get("suspend"):
            return None
        return max(0.0, seconds(start) + float(deadline) - time_now)

    def missing(self, time_now: float, backoff: float) -> tuple[list[Index], float | None]:
        """The pods to create now, by index, and the seconds until the next back-off is over."""
        held = self.active + self.leaving
        room = max(0, int(self.spec.get("parallelism", 1)) - len(held))
        wanted: list[Index] = [None] * (self.completions - self.succeeded - len(held))
        if self.indexed:
            taken = self.done | self.given_up | {index_of(pod) for pod in held}
            wanted = [index for index in range(self.completions) if index not in taken]
        waits = {index: self._wait(index, time_now, backoff) for index in wanted}
        ready = [index for index in wanted if waits[index] <= 0]
        return ready[:room], min((wait for wait in waits.values() if wait > 0), default=None)

    def _wait(self, index: Index, time_now: float, backoff: float) -> float:
        """Seconds until an index may be tried again; the back-off doubles with every failure."""
        failures = [pod for pod in self.failed if index_of(pod) == index]
        if not failures:
            return 0.0
        delay = min(backoff * 2.0 ** (len(failures) - 1), BACKOFF_LIMIT_SECONDS)
        return finished_at(failures[-1]) + delay - time_now


def _matches(rule: Object, pod: Object) -> str:
    """Why a rule matches a failed pod; empty when it does not."""
    name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    wanted = rule.get("onExitCodes") or {"operator": "In", "values": []}
    for container in containers_of(pod) + (pod.get("status", {}).get("initContainerStatuses") or []):
        code, called = end_of(container).get("exitCode"), container["name"]
        meant = code and wanted.get("containerName") in (None, called)
        if meant and (code in wanted["values"]) == (wanted["operator"] == "In"):
            return f"Container {called} for pod {name} failed with exit code {code}"
    for pattern in rule.get("onPodConditions") or []:
        if condition(pod["status"].get("conditions") or [], pattern["type"]):
            return f"Pod {name} has condition {pattern['type']}"
    return ""


def decide(job: Object, pods: list[Object], time_now: float, backoff: float = BACKOFF_SECONDS) -> Decision:
    """What is to be done for a Job; `backoff` is the wait before an index's first retry."""
    view = View(job, pods)
    conditions = [dict(c) for c in view.status.get("conditions") or []]
    decision = Decision({"conditions": conditions}, release=view.counted_out)
    if ended := condition(conditions, "Complete") or condition(conditions, "Failed"):
        decision.release = pods
        decision.expire(ended, view.spec.get("ttlSecondsAfterFinished"), time_now)
        return decision
    verdict = view.verdict(time_now)
    if verdict or view.spec.get("suspend"):
        decision.delete = view.active
    else:
        missing, wait = view.missing(time_now, backoff)
        decision.create = [_pod(view, index) for index in missing]
        decision.again = min((one for one in (wait, view.time_left(time_now)) if one is not None), default=None)
    decision.status |= _counts(view, decision)
    if verdict:
        _conclude(decision, *verdict)
    else:
        _tell_suspension(view, decision)
    return decision


def _counts(view: View, decision: Decision) -> Object:
    left = [pod for pod in view.active if pod not in decision.delete]
    counts: Object = {
        "startTime": None if view.spec.get("suspend") else view.status.get("startTime") or now(),
        "active": len(left) + len(decision.create),
        "ready": sum(condition(pod.get("status", {}).get("conditions") or [], "Ready") is not None for pod in left),
        "terminating": len(view.leaving) + len(decision.delete),
        "succeeded": view.succeeded,
        "failed": max(len(view.counted), view.status.get("failed") or 0),
    }
    if view.indexed:
        counts["completedIndexes"] = format_indexes(view.done)
    if "backoffLimitPerIndex" in view.spec:
        counts["failedIndexes"] = format_indexes(view.given_up)
    return counts


def _conclude(decision: Decision, reason: str, message: str) -> None:
    """An interim condition tells the end at once, the final one when no pod is left."""
    conditions = decision.status["conditions"]
    interim, final = ("SuccessCriteriaMet", "Complete") if reason == COMPLETE else ("FailureTarget", "Failed")
    set_condition(conditions, interim, "True", reason, message)
    if decision.status["active"] or decision.status["terminating"]:
        return
    set_condition(conditions, final, "True", reason, message)
    if reason == COMPLETE:
        decision.status["completionTime"] = now()
        decision.events.append(("Normal", "Completed", "Job completed"))
    else:
        decision.events.append(("Warning", reason, message))


def _tell_suspension(view: View, decision: Decision) -> None:
    conditions = decision.status["conditions"]
    if view.spec.get("suspend"):
        if set_condition(conditions, "Suspended", "True", "JobSuspended", "Job suspended"):
            decision.events.append(("Normal", "Suspended", "Job suspended"))
    elif condition(conditions, "Suspended"):
        set_condition(conditions, "Suspended", "False", "JobResumed", "Job resumed")
        decision.events.append(("Normal", "Resumed", "Job resumed"))


def _pod(view: View, index: Index) -> Object:
    meta, template = view.job["metadata"], view.spec["template"]
    name, notes = meta["name"][:50], {}
    labels = {f"{prefix}controller-uid": meta["uid"] for prefix in ("", PREFIX)}
    labels |= {f"{prefix}job-name": meta["name"] for prefix in ("", PREFIX)}
    if index is not None:
        name, labels[INDEX], notes[INDEX] = f"{name}-{index}", str(index), str(index)
        source = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
        template = with_env(template, [{"name": "JOB_COMPLETION_INDEX", "valueFrom": source}])
    pod = pod_of(JOB, view.job, template, f"{name}-{uuid.uuid4().hex[:5]}", labels, notes)
    pod["metadata"]["finalizers"] = [TRACKED]
    return pod


def finished_at(pod: Object) -> float:
    """When its last container ended; one that was evicted before it had any counts from its creation."""
    ends = [end_of(container)["finishedAt"] for container in containers_of(pod) if end_of(container)]
    return seconds(max(ends, default=pod["metadata"]["creationTimestamp"]))


def index_of(pod: Object) -> Index:
    index = (pod["metadata"].get("annotations") or {}).get(INDEX)
    return None if index is None else int(index)


def parse_indexes(text: str | None) -> set[Index]:
    return {int(index) for index in (text or "").split(",") if index}


def format_indexes(indexes: set[Index]) -> str:
    return ",".join(str(index) for index in sorted(index for index in indexes if index is not None))
