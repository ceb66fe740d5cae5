"""The Job controller of `batch/v1`, as far as the operator's Jobs need it. Pure: `controllers` acts.

The decisions (which pods count as failed, which indexes are done, whether the Job is over) are those of the real
controller; so are the names of conditions, reasons, labels and annotations.

A pod is held (`TRACKED`) until it has succeeded or failed: one that is deleted by force and never says so stays, where
the Job's `podReplacementPolicy` is Failed. There a pod that somebody deletes has failed when it ends so; what the Job
deletes itself, when it is suspended or over, is let go first and counts for nothing. With a limit per index the last
failed pod of an index is held until another takes its place, which bears how often the index has failed (`FAILURES`),
and how often that was ignored by the failure policy: these counts outlive the pods.

Deviations: elsewhere a pod that is deleted never counts as failed, and is replaced once it has ended; ranges of indexes
are not abbreviated; `status.failed` counts failures at once and forgets those of pods that are gone when new ones come.
Left out: work queues (no `completions`), restarts in the pod, `successPolicy`, `managedBy`, a change of `parallelism`
downwards.
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
    """A Job and its pods as they are now, and what follows from them."""

    def __init__(self, job: Object, pods: list[Object]) -> None:
        self.job, self.spec, self.status = job, job["spec"], job.get("status") or {}
        self.completions = int(self.spec.get("completions", 1))
        self.indexed = self.spec.get("completionMode") == "Indexed"
        self.per_index = "backoffLimitPerIndex" in self.spec
        self.active = [pod for pod in pods if is_active(pod)]
        self.leaving = [pod for pod in pods if is_leaving(pod)]
        succeeded = [index_of(pod) for pod in pods if phase(pod) == "Succeeded"]
        self.done = {*succeeded, *parse_indexes(self.status.get("completedIndexes"))}
        self.succeeded = len(self.done) if self.indexed else max(len(succeeded), self.status.get("succeeded") or 0)
        self.waits_for_failure = self.spec.get("podReplacementPolicy") == "Failed"
        failed = [pod for pod in pods if phase(pod) == "Failed" and self._is_ours_to_count(pod)]
        self.failed = sorted(failed, key=finished_at)
        self.counted = [pod for pod in self.failed if self.rule(pod)[0] != "Ignore"]
        self.given_up = {index_of(pod) for pod in self.counted if self._is_final(pod)}
        self.given_up |= parse_indexes(self.status.get("failedIndexes"))
        self.counted_out = [pod for pod in pods if self._is_counted_out(pod)]

    def last_failed(self, index: Index) -> Object | None:
        """The failed pod of an index that the next one takes the place of."""
        failed = [pod for pod in self.failed if index_of(pod) == index]
        return max(failed, key=lambda pod: (sum(failures_of(pod)), finished_at(pod)), default=None)

    def _is_ours_to_count(self, pod: Object) -> bool:
        held = TRACKED in (pod["metadata"].get("finalizers") or [])
        return "deletionTimestamp" not in pod["metadata"] or (self.waits_for_failure and held)

    def _is_counted_out(self, pod: Object) -> bool:
        """Nothing more will be learned from a pod."""
        unheard = "deletionTimestamp" in pod["metadata"] and not self.waits_for_failure
        index = index_of(pod)
        settled = self.done | self.given_up | {index_of(active) for active in self.active}
        awaits_its_successor = self.per_index and index not in settled and self.last_failed(index) is pod
        return (unheard or is_over(pod)) and not awaits_its_successor

    def rule(self, pod: Object) -> tuple[str, str]:
        """The action of the first matching rule of the failure policy (Count when none does), and why it matches."""
        for number, rule in enumerate(self.spec.get("podFailurePolicy", {}).get("rules") or []):
            if why := _matches(rule, pod):
                return rule["action"], f"{why} matching {rule['action']} rule at index {number}"
        return "Count", ""

    def _is_final(self, pod: Object) -> bool:
        """Whether its index is not tried again, for which there must be a limit per index: it was the last try, or its
        failure is final."""
        limit = self.spec.get("backoffLimitPerIndex")
        return limit is not None and (self.rule(pod)[0] == "FailIndex" or failures_of(pod)[0] >= limit)

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
        given_up = len(self.given_up)
        if len(self.counted) > self.spec.get("backoffLimit", len(self.counted) if self.per_index else 6):
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
        last = self.last_failed(index)
        if last is None:
            return 0.0
        known = sum(failures_of(last)) + 1 if self.per_index else len(self.failed)
        return finished_at(last) + min(backoff * 2.0 ** (known - 1), BACKOFF_LIMIT_SECONDS) - time_now


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
    if view.per_index:
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
        source = {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX}']"}}
        template = with_env(template, [{"name": "JOB_COMPLETION_INDEX", "valueFrom": source}])
        template["spec"]["hostname"] = f"{meta['name']}-{index}"
    if view.per_index:
        notes |= _failures_before(view, index)
    pod = pod_of(JOB, view.job, template, f"{name}-{uuid.uuid4().hex[:5]}", labels, notes)
    pod["metadata"]["finalizers"] = [TRACKED]
    return pod


def _failures_before(view: View, index: Index) -> dict[str, str]:
    """What a new pod bears of the failures of its index: those of the pod whose place it takes, and that one's own."""
    last = view.last_failed(index)
    if last is None:
        return {FAILURES: "0"}
    counted, ignored = failures_of(last)
    if view.rule(last)[0] == "Ignore":
        ignored += 1
    else:
        counted += 1
    return {FAILURES: str(counted)} | ({IGNORED: str(ignored)} if ignored else {})


def failures_of(pod: Object) -> tuple[int, int]:
    """How often its index had failed when it was made: what counts, and what the failure policy ignores."""
    notes = pod["metadata"].get("annotations") or {}
    return int(notes.get(FAILURES, 0)), int(notes.get(IGNORED, 0))


def finished_at(pod: Object) -> float:
    """When its last container ended. Where one has no such time, when the pod stopped being ready, or was deleted, or
    was made."""
    meta, status = pod["metadata"], pod.get("status", {})
    ends: list[str] = [end_of(container).get("finishedAt") or "" for container in containers_of(pod)]
    if all(ends) and ends:
        return seconds(max(ends))
    unready = [one for one in status.get("conditions") or [] if (one["type"], one["status"]) == ("Ready", "False")]
    if unready:
        return seconds(unready[0]["lastTransitionTime"])
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
