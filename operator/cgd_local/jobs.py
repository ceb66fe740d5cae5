"""The Job controller of `batch/v1`, as far as the operator's Jobs need it. Pure: `controllers` acts.

The decisions (which pods count as failed, which indexes are done, whether the Job is over) are those of the real
controller; so are the names of conditions, reasons, labels and annotations.

A finalizer (`TRACKED`) holds each pod until it has succeeded or failed. If the Job's `podReplacementPolicy` is Failed,
a pod that somebody deletes counts as failed when it ends so, and a pod deleted by force that never ends stays. The Job
first releases pods that it deletes itself, when it is suspended or over: they do not count. With a limit per index, the
finalizer holds the last failed pod of an index until another pod replaces it. The new pod carries how often the index
has failed (`FAILURES`) and how many failures the failure policy ignored: these counts outlive the pods.

Deviations: with another `podReplacementPolicy` a deleted pod never counts as failed, and the Job replaces it after its
end; ranges of indexes are not abbreviated; `status.failed` counts failures at once, and drops those of deleted pods
when new failures come. Left out: work queues (no `completions`), restarts in the pod, `successPolicy`, `managedBy`, a
reduction of `parallelism`.
"""

import uuid

from cgd_local.controllers import (
    BACKOFF_SECONDS,
    Decision,
    condition,
    containers_of,
    end_of,
    is_active,
    is_over,
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
FAILURES, IGNORED = PREFIX + "job-index-failure-count", PREFIX + "job-index-ignored-failure-count"
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
    """The current state of a Job and its pods, and what follows from it."""

    def __init__(self, job: Object, pods: list[Object]) -> None:
        self.job, self.spec, self.status = job, job["spec"], job.get("status") or {}
        self.completions = int(self.spec.get("completions", 1))
        self.indexed = self.spec.get("completionMode") == "Indexed"
        self.per_index = "backoffLimitPerIndex" in self.spec
        self.active = [pod for pod in pods if is_active(pod)]
        self.leaving = [pod for pod in pods if "deletionTimestamp" in pod["metadata"] and not is_over(pod)]
        succeeded = [index_of(pod) for pod in pods if phase(pod) == "Succeeded"]
        self.done = {*succeeded, *parse_indexes(self.status.get("completedIndexes"))}
        self.succeeded = len(self.done) if self.indexed else max(len(succeeded), self.status.get("succeeded") or 0)
        self.waits_for_failure = self.spec.get("podReplacementPolicy") == "Failed"
        failed = []
        for pod in pods:
            is_held = self.waits_for_failure and TRACKED in (pod["metadata"].get("finalizers") or [])
            if phase(pod) == "Failed" and ("deletionTimestamp" not in pod["metadata"] or is_held):
                failed.append(pod)
        self.failed = sorted(failed, key=finished_at)
        self.counted = [pod for pod in self.failed if self.rule(pod)[0] != "Ignore"]
        limit = self.spec.get("backoffLimitPerIndex")
        self.given_up = parse_indexes(self.status.get("failedIndexes"))
        for pod in self.counted if limit is not None else ():  # the last try of an index, or a rule makes it final
            if self.rule(pod)[0] == "FailIndex" or failures_of(pod)[0] >= limit:
                self.given_up.add(index_of(pod))
        self.counted_out = [pod for pod in pods if self._is_counted_out(pod)]

    def last_failed(self, index: Index) -> Object | None:
        """The failed pod of an index that the next pod replaces."""
        failed = [pod for pod in self.failed if index_of(pod) == index]
        return max(failed, key=lambda pod: (sum(failures_of(pod)), finished_at(pod)), default=None)

    def _is_counted_out(self, pod: Object) -> bool:
        """Whether the Job needs the pod for no further count."""
        is_ignored = "deletionTimestamp" in pod["metadata"] and not self.waits_for_failure
        index = index_of(pod)
        settled = self.done | self.given_up | {index_of(active) for active in self.active}
        awaits_its_successor = self.per_index and index not in settled and self.last_failed(index) is pod
        return (is_ignored or is_over(pod)) and not awaits_its_successor

    def rule(self, pod: Object) -> tuple[str, str]:
        """The action of the failure policy's first rule that matches (Count if none matches), and why it matches."""
        for number, rule in enumerate(self.spec.get("podFailurePolicy", {}).get("rules") or []):
            if why := _matches(rule, pod):
                return rule["action"], f"{why} matching {rule['action']} rule at index {number}"
        return "Count", ""

    def verdict(self, time_now: float) -> tuple[str, str] | None:
        """Reason and message of the Job's end, None while it continues. An earlier verdict in the status stands."""
        conditions = self.status.get("conditions") or []
        if earlier := condition(conditions, "FailureTarget") or condition(conditions, "SuccessCriteriaMet"):
            return earlier["reason"], earlier["message"]
        for action, message in map(self.rule, self.failed):
            if action == "FailJob":
                return "PodFailurePolicy", message
        given_up = len(self.given_up)
        if len(self.counted) > self.spec.get("backoffLimit", len(self.counted) if self.per_index else 6):
            reason = "BackoffLimitExceeded"
        elif self.time_left(time_now) == 0:
            reason = "DeadlineExceeded"
        elif given_up > self.spec.get("maxFailedIndexes", given_up):
            reason = "MaxFailedIndexesExceeded"
        elif given_up and given_up + self.succeeded >= self.completions:
            reason = "FailedIndexes"
        elif self.succeeded >= self.completions:
            reason = COMPLETE
        else:
            return None
        return reason, MESSAGES[reason]

    def time_left(self, time_now: float) -> float | None:
        deadline, start = self.spec.get("activeDeadlineSeconds"), self.status.get("startTime")
        if deadline is None or start is None or self.spec.get("suspend"):
            return None
        return max(0.0, seconds(start) + float(deadline) - time_now)

    def missing(self, time_now: float, backoff: float) -> tuple[list[Index], float | None]:
        """The pods to create now, by index, and the seconds until the next back-off is over."""
        occupied = self.active + self.leaving
        room = max(0, int(self.spec.get("parallelism", 1)) - len(occupied))
        open_indexes: list[Index] = [None] * (self.completions - self.succeeded - len(occupied))
        if self.indexed:
            taken = self.done | self.given_up | {index_of(pod) for pod in occupied}
            open_indexes = [index for index in range(self.completions) if index not in taken]
        waits: dict[Index, float] = {}
        for index in open_indexes:
            waits[index] = 0.0
            if last := self.last_failed(index):  # the back-off doubles with each failure
                failures = sum(failures_of(last)) + 1 if self.per_index else len(self.failed)
                pause = min(backoff * 2.0 ** (failures - 1), BACKOFF_LIMIT_SECONDS)
                waits[index] = finished_at(last) + pause - time_now
        ready = [index for index in open_indexes if waits[index] <= 0]
        return ready[:room], min((wait for wait in waits.values() if wait > 0), default=None)


def _matches(rule: Object, pod: Object) -> str:
    """Why a rule matches a failed pod; empty when it does not."""
    name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    codes = rule.get("onExitCodes") or {"operator": "In", "values": []}
    for status in containers_of(pod) + (pod.get("status", {}).get("initContainerStatuses") or []):
        code, container = end_of(status).get("exitCode"), status["name"]
        applies = code and codes.get("containerName") in (None, container)
        if applies and (code in codes["values"]) == (codes["operator"] == "In"):
            return f"Container {container} for pod {name} failed with exit code {code}"
    for pattern in rule.get("onPodConditions") or []:
        if condition(pod["status"].get("conditions") or [], pattern["type"]):
            return f"Pod {name} has condition {pattern['type']}"
    return ""


def decide(job: Object, pods: list[Object], time_now: float, backoff: float = BACKOFF_SECONDS) -> Decision:
    """What the controller does for a Job; `backoff` is the wait before an index's first retry."""
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
        waits = (wait, view.time_left(time_now))
        decision.again = min((pause for pause in waits if pause is not None), default=None)
    decision.status |= _counts(view, decision)
    if verdict:
        _conclude(decision, *verdict)
    elif view.spec.get("suspend"):
        if set_condition(conditions, "Suspended", "True", "JobSuspended", "Job suspended"):
            decision.events.append(("Normal", "Suspended", "Job suspended"))
    elif condition(conditions, "Suspended"):
        set_condition(conditions, "Suspended", "False", "JobResumed", "Job resumed")
        decision.events.append(("Normal", "Resumed", "Job resumed"))
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
    if view.per_index:
        counts["failedIndexes"] = format_indexes(view.given_up)
    return counts


def _conclude(decision: Decision, reason: str, message: str) -> None:
    """Set the interim condition at once, the final condition when no pod is left."""
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


def _pod(view: View, index: Index) -> Object:
    meta, template = view.job["metadata"], view.spec["template"]
    name, notes = meta["name"][:50], {}
    labels = {f"{prefix}controller-uid": meta["uid"] for prefix in ("", PREFIX)}
    labels |= {f"{prefix}job-name": meta["name"] for prefix in ("", PREFIX)}
    if index is not None:
        name, labels[INDEX], notes[INDEX] = f"{name}-{index}", str(index), str(index)
        source = {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX}']"}}
        template = with_env(template, [{"name": "JOB_COMPLETION_INDEX", "valueFrom": source}])
        template["spec"]["hostname"] = f"{meta['name']}-{index}"
    if view.per_index:  # the failure counts of the pod that it replaces, plus that pod's own failure
        counted, ignored, last = 0, 0, view.last_failed(index)
        if last is not None:
            is_ignored = view.rule(last)[0] == "Ignore"
            counted, ignored = failures_of(last)
            counted, ignored = counted + (not is_ignored), ignored + is_ignored
        notes |= {FAILURES: str(counted)} | ({IGNORED: str(ignored)} if ignored else {})
    pod = pod_of(JOB, view.job, template, f"{name}-{uuid.uuid4().hex[:5]}", labels, notes)
    pod["metadata"]["finalizers"] = [TRACKED]
    return pod


def failures_of(pod: Object) -> tuple[int, int]:
    """How often the pod's index had failed when the Job created the pod: failures that count, and ignored failures."""
    notes = pod["metadata"].get("annotations") or {}
    return int(notes.get(FAILURES, 0)), int(notes.get(IGNORED, 0))


def finished_at(pod: Object) -> float:
    """When the pod's last container ended; if a container has no such time, when the pod stopped being ready, or was
    deleted, or was created."""
    meta, status = pod["metadata"], pod.get("status", {})
    ends: list[str] = [end_of(container).get("finishedAt") or "" for container in containers_of(pod)]
    if all(ends) and ends:
        return seconds(max(ends))
    for entry in status.get("conditions") or []:
        if (entry["type"], entry["status"]) == ("Ready", "False"):
            return seconds(entry["lastTransitionTime"])
    if "deletionTimestamp" in meta:
        return seconds(meta["deletionTimestamp"]) - float(meta.get("deletionGracePeriodSeconds", 0))
    return seconds(meta["creationTimestamp"])


def index_of(pod: Object) -> Index:
    index = (pod["metadata"].get("annotations") or {}).get(INDEX)
    return None if index is None else int(index)


def parse_indexes(text: str | None) -> set[Index]:
    return {int(index) for index in (text or "").split(",") if index}


def format_indexes(indexes: set[Index]) -> str:
    return ",".join(str(index) for index in sorted(index for index in indexes if index is not None))
