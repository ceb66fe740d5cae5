"""The Job controller of `batch/v1`, as far as a development cluster needs it.

The decisions (which pods count as failed, which indexes are done, whether the Job is over) are those of the real
controller; so are the names of conditions, reasons, labels and annotations.

Deviations: pods carry no `batch.kubernetes.io/job-tracking` finalizer, so a pod that someone deletes before it was seen
to fail is replaced but counted only while it terminates; `uncountedTerminatedPods`, `successPolicy` and adoption of
foreign pods are left out.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cgd_local.controllers import (
    RESYNC_SECONDS,
    Controller,
    condition,
    controller_of,
    finished_at,
    is_active,
    is_terminating,
    now,
    owner_reference,
    phase,
    seconds,
    set_condition,
    statuses,
    suffix,
)
from cgd_operator.cluster import JOB, POD, Cluster, Object

INDEX = "batch.kubernetes.io/job-completion-index"
INDEX_FAILURES = "batch.kubernetes.io/job-index-failure-count"
INDEX_IGNORED = "batch.kubernetes.io/job-index-ignored-failure-count"
UID_LABEL = "batch.kubernetes.io/controller-uid"
RELEASED = "cgd.dev/released"  # on pods that this controller deletes itself: they did not fail
BACKOFF_SECONDS, BACKOFF_LIMIT_SECONDS = 10.0, 600.0

MESSAGES = {
    "BackoffLimitExceeded": "Job has reached the specified backoff limit",
    "DeadlineExceeded": "Job was active longer than specified deadline",
    "MaxFailedIndexesExceeded": "Job has exceeded the specified maximal number of failed indexes",
    "FailedIndexes": "Job has failed indexes",
    "CompletionsReached": "Reached expected number of succeeded pods",
}


@dataclass(frozen=True)
class Verdict:
    """How a Job ends: the interim condition that says so, then the final one once no pod is left."""

    interim: str
    final: str
    reason: str
    message: str

    @classmethod
    def failed(cls, reason: str, message: str = "") -> "Verdict":
        return cls("FailureTarget", "Failed", reason, message or MESSAGES[reason])


COMPLETE = Verdict("SuccessCriteriaMet", "Complete", "CompletionsReached", MESSAGES["CompletionsReached"])


@dataclass(frozen=True)
class View:
    """A Job and its pods as they are now, and what follows from them. Decides, and touches nothing."""

    job: Object
    pods: list[Object]
    backoff: float = BACKOFF_SECONDS

    @cached_property
    def spec(self) -> Object:
        return dict(self.job["spec"])

    @cached_property
    def status(self) -> Object:
        return dict(self.job.get("status") or {})

    @property
    def indexed(self) -> bool:
        return bool(self.spec.get("completionMode") == "Indexed")

    @property
    def per_index(self) -> bool:
        return self.spec.get("backoffLimitPerIndex") is not None

    @property
    def suspended(self) -> bool:
        return bool(self.spec.get("suspend"))

    @cached_property
    def completions(self) -> int | None:
        value = self.spec.get("completions")
        return None if value is None else int(value)

    @cached_property
    def parallelism(self) -> int:
        return int(self.spec.get("parallelism", 1))

    @cached_property
    def replaces_terminating(self) -> bool:
        default = "Failed" if "podFailurePolicy" in self.spec else "TerminatingOrFailed"
        return bool(self.spec.get("podReplacementPolicy", default) != "Failed")

    @cached_property
    def active(self) -> list[Object]:
        return [pod for pod in self.pods if is_active(pod)]

    @cached_property
    def terminating(self) -> list[Object]:
        return [pod for pod in self.pods if is_terminating(pod)]

    @cached_property
    def failed_pods(self) -> list[Object]:
        """Failed pods in the order in which they ended; a terminating one is failed unless the policy says to wait."""
        failed = [pod for pod in self.pods if phase(pod) == "Failed"]
        if self.replaces_terminating:
            failed += self.terminating
        return sorted((pod for pod in failed if RELEASED not in annotations(pod)), key=finished_at)

    @cached_property
    def counted_failures(self) -> int:
        return sum(1 for pod in self.failed_pods if self.action(pod) != "Ignore")

    @cached_property
    def succeeded_indexes(self) -> set[int]:
        done = {index_of(pod) for pod in self.pods if phase(pod) == "Succeeded"}
        return {
            i for i in done | parse_indexes(self.status.get("completedIndexes")) if 0 <= i < (self.completions or 0)
        }

    @cached_property
    def failed_indexes(self) -> set[int]:
        if not self.per_index:
            return set()
        failed = {index_of(pod) for pod in self.failed_pods if self._fails_index(pod)}
        return failed | parse_indexes(self.status.get("failedIndexes"))

    @cached_property
    def succeeded(self) -> int:
        if self.indexed:
            return len(self.succeeded_indexes)
        return max(sum(1 for pod in self.pods if phase(pod) == "Succeeded"), int(self.status.get("succeeded") or 0))

    def _fails_index(self, pod: Object) -> bool:
        action = self.action(pod)
        spent = int(self.spec["backoffLimitPerIndex"]) <= int(annotations(pod).get(INDEX_FAILURES, 0))
        return action == "FailIndex" or (action != "Ignore" and spent)

    def action(self, pod: Object) -> str:
        """What the first matching rule of the failure policy says about a failed pod; Count when none does."""
        return self._rule(pod)[0]

    def _rule(self, pod: Object) -> tuple[str, str]:
        rules: list[Object] = self.spec.get("podFailurePolicy", {}).get("rules") or []
        for number, rule in enumerate(rules):
            if why := _matches(rule, pod):
                return rule["action"], f"{why} matching {rule['action']} rule at index {number}"
        return "Count", ""

    def verdict(self, time_now: float) -> Verdict | None:
        """How the Job ends, None while it goes on. An interim condition that was written once is kept to."""
        conditions = self.status.get("conditions") or []
        if found := condition(conditions, "FailureTarget"):
            return Verdict.failed(found["reason"], found["message"])
        if condition(conditions, "SuccessCriteriaMet"):
            return COMPLETE
        for pod in self.failed_pods:
            action, message = self._rule(pod)
            if action == "FailJob":
                return Verdict.failed("PodFailurePolicy", message)
        if self._past_backoff_limit():
            return Verdict.failed("BackoffLimitExceeded")
        if self.deadline_in(time_now) == 0:
            return Verdict.failed("DeadlineExceeded")
        return self._index_verdict() or self._success()

    def _past_backoff_limit(self) -> bool:
        limit = self.spec.get("backoffLimit")
        if limit is None:
            limit = 2**31 - 1 if self.per_index else 6
        if self.spec["template"]["spec"].get("restartPolicy") == "OnFailure":
            restarts = sum(int(s.get("restartCount", 0)) for pod in self.active for s in statuses(pod))
            if restarts >= max(limit, 1):
                return True
        return bool(self.counted_failures > limit)

    def deadline_in(self, time_now: float) -> float | None:
        deadline, start = self.spec.get("activeDeadlineSeconds"), self.status.get("startTime")
        if deadline is None or start is None or self.suspended:
            return None
        return max(0.0, seconds(start) + float(deadline) - time_now)

    def _index_verdict(self) -> Verdict | None:
        failed, limit = len(self.failed_indexes), self.spec.get("maxFailedIndexes")
        if limit is not None and failed > limit:
            return Verdict.failed("MaxFailedIndexesExceeded")
        if failed and failed + self.succeeded >= (self.completions or 0):
            return Verdict.failed("FailedIndexes")
        return None

    def _success(self) -> Verdict | None:
        if self.active:
            return None
        if self.completions is None:
            return COMPLETE if self.succeeded else None
        return COMPLETE if self.succeeded >= self.completions else None

    def surplus(self) -> list[Object]:
        """Active pods that should not be: all when suspended, doubles of an index, more than are wanted."""
        if self.suspended:
            return self.active
        kept: list[Object] = []
        for pod in sorted(self.active, key=lambda pod: pod["metadata"]["creationTimestamp"]):
            double = self.indexed and (index_of(pod) in self._taken(kept) or index_of(pod) >= (self.completions or 0))
            if not double and len(kept) < self.wanted:
                kept.append(pod)
        return [pod for pod in self.active if pod not in kept]

    @cached_property
    def wanted(self) -> int:
        if self.suspended:
            return 0
        if self.completions is None:
            return len(self.active) if self.succeeded else self.parallelism
        open_indexes = self.completions - self.succeeded - len(self.failed_indexes)
        return max(0, min(open_indexes, self.parallelism))

    def missing(self, time_now: float) -> tuple[list[int | None], float | None]:
        """The pods to create now (by index, None without one), and the seconds until a back-off is over."""
        holding = self.active if self.replaces_terminating else self.active + self.terminating
        room = self.wanted - len(holding)
        if room <= 0:
            return [], None
        if not self.indexed:
            wait = self._backoff(self.failed_pods, time_now)
            return ([], wait) if wait else ([None] * room, None)
        taken = self._taken(holding) | self.failed_indexes
        waits = {i: self._index_wait(i, time_now) for i in range(self.completions or 0) if i not in taken}
        ready = [i for i, wait in waits.items() if not wait]
        return [*ready[:room]], min((wait for wait in waits.values() if wait), default=None)

    def _taken(self, pods: Iterable[Object]) -> set[int]:
        return self.succeeded_indexes | {index_of(pod) for pod in pods}

    def _index_wait(self, index: int, time_now: float) -> float:
        mine = self.failures_of(index) if self.per_index else self.failed_pods
        return self._backoff(mine, time_now)

    def failures_of(self, index: int) -> list[Object]:
        return [pod for pod in self.failed_pods if index_of(pod) == index]

    def _backoff(self, failed: list[Object], time_now: float) -> float:
        """Seconds still to wait after failures since the last success: 1, 2, 4... times the base."""
        successes = [finished_at(pod) for pod in self.pods if phase(pod) == "Succeeded"]
        recent = [pod for pod in failed if finished_at(pod) >= max(successes, default=0.0)]
        if not recent:
            return 0.0
        delay = min(self.backoff * 2.0 ** (len(recent) - 1), BACKOFF_LIMIT_SECONDS)
        return max(0.0, finished_at(recent[-1]) + delay - time_now)


def _matches(rule: Object, pod: Object) -> str:
    name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    if wanted := rule.get("onExitCodes"):
        for status in statuses(pod):
            code = status.get("state", {}).get("terminated", {}).get("exitCode", 0)
            meant = wanted.get("containerName") in (None, status["name"])
            if code and meant and (code in wanted["values"]) == (wanted["operator"] == "In"):
                return f"Container {status['name']} for pod {name} failed with exit code {code}"
    for pattern in rule.get("onPodConditions") or []:
        for found in pod.get("status", {}).get("conditions") or []:
            if found["type"] == pattern["type"] and found["status"] == pattern.get("status", "True"):
                return f"Pod {name} has condition {found['type']}"
    return ""


class JobController(Controller):
    """`backoff` is the delay before the first retry; the real one is ten seconds, tests use less."""

    kind = JOB

    def __init__(self, cluster: Cluster, *, backoff: float = BACKOFF_SECONDS) -> None:
        super().__init__(cluster)
        self.backoff = backoff

    async def reconcile(self, owner: Object) -> float | None:
        managed = owner["spec"].get("managedBy", "kubernetes.io/job-controller")
        if "deletionTimestamp" in owner["metadata"] or managed != "kubernetes.io/job-controller":
            return None
        conditions = owner.get("status", {}).get("conditions") or []
        if ended := condition(conditions, "Complete") or condition(conditions, "Failed"):
            return await self._expire(owner, ended)
        uid = owner["metadata"]["uid"]
        pods, _ = await self.cluster.list(POD, owner["metadata"]["namespace"], labels=f"{UID_LABEL}={uid}")
        mine = [pod for pod in pods if (controller_of(pod) or {}).get("uid") == uid]
        return await self._advance(View(owner, mine, self.backoff))

    async def _expire(self, job: Object, ended: Object) -> float | None:
        ttl = job["spec"].get("ttlSecondsAfterFinished")
        if ttl is None:
            return None
        left = seconds(ended["lastTransitionTime"]) + float(ttl) - time.time()
        if left > 0:
            return left
        meta = job["metadata"]
        await self.cluster.delete(JOB, meta["name"], meta["namespace"], uid=meta["uid"], propagation="Foreground")
        return None

    async def _advance(self, view: View) -> float | None:
        verdict = view.verdict(time.time())
        change = Change()
        if verdict is not None:
            change.deleted = await self._delete(view, view.active)
        else:
            change.deleted = await self._delete(view, view.surplus())
            if not change.deleted:
                missing, change.wait = view.missing(time.time())
                change.created = [await self._create(view, index) for index in missing]
        status, events = next_status(view, verdict, change)
        if any(view.status.get(name) != value for name, value in status.items()):
            meta = view.job["metadata"]
            await self.cluster.patch(JOB, meta["name"], meta["namespace"], {"status": status}, subresource="status")
        for kind, reason, message in events:
            await self.event(view.job, kind, reason, message)
        waits = [wait for wait in (change.wait, view.deadline_in(time.time())) if wait is not None]
        return min(waits, default=RESYNC_SECONDS)

    async def _delete(self, view: View, pods: list[Object]) -> list[Object]:
        for pod in pods:
            meta = pod["metadata"]
            note = {"metadata": {"annotations": {RELEASED: "true"}}}
            await self.cluster.patch(POD, meta["name"], meta["namespace"], note)
            await self.cluster.delete(POD, meta["name"], meta["namespace"], uid=meta["uid"])
            await self.event(view.job, "Normal", "SuccessfulDelete", f"Deleted pod: {meta['name']}")
        return pods

    async def _create(self, view: View, index: int | None) -> Object:
        pod = await self.cluster.create(POD, pod_of(view, index))
        await self.event(view.job, "Normal", "SuccessfulCreate", f"Created pod: {pod['metadata']['name']}")
        return pod


@dataclass
class Change:
    """What one look did to the pods."""

    created: list[Object] = field(default_factory=list)
    deleted: list[Object] = field(default_factory=list)
    wait: float | None = None


def next_status(view: View, verdict: Verdict | None, change: Change) -> tuple[Object, list[tuple[str, str, str]]]:
    """The status to write and the Events that go with its changes."""
    conditions = [dict(c) for c in view.status.get("conditions") or []]
    events: list[tuple[str, str, str]] = []
    left = [pod for pod in view.active if pod not in change.deleted]
    ready = [pod for pod in left if condition(pod.get("status", {}).get("conditions") or [], "Ready")]
    terminating = len(view.terminating) + len(change.deleted)
    status: Object = {
        "startTime": view.status.get("startTime") or (None if view.suspended else now()),
        "active": len(left) + len(change.created),
        "ready": len(ready),
        "terminating": terminating,
        "succeeded": view.succeeded,
        "failed": max(view.counted_failures, int(view.status.get("failed") or 0)),
        "conditions": conditions,
    }
    if view.indexed:
        status["completedIndexes"] = format_indexes(view.succeeded_indexes)
    if view.per_index:
        status["failedIndexes"] = format_indexes(view.failed_indexes)
    if verdict is None:
        _suspension(view, status, events)
        return status, events
    set_condition(conditions, verdict.interim, "True", verdict.reason, verdict.message)
    if not status["active"] and not terminating:
        set_condition(conditions, verdict.final, "True", verdict.reason, verdict.message)
        if verdict is COMPLETE:
            status["completionTime"] = now()
            events.append(("Normal", "Completed", "Job completed"))
        else:
            events.append(("Warning", verdict.reason, verdict.message))
    return status, events


def _suspension(view: View, status: Object, events: list[tuple[str, str, str]]) -> None:
    was = condition(status["conditions"], "Suspended") is not None
    if view.suspended:
        status["startTime"] = None
        if set_condition(status["conditions"], "Suspended", "True", "JobSuspended", "Job suspended"):
            events.append(("Normal", "Suspended", "Job suspended"))
    elif was:
        status["startTime"] = now()
        set_condition(status["conditions"], "Suspended", "False", "JobResumed", "Job resumed")
        events.append(("Normal", "Resumed", "Job resumed"))


def pod_of(view: View, index: int | None) -> Object:
    """The pod to create for an index, or for a Job without indexes."""
    meta, template = view.job["metadata"], view.job["spec"]["template"]
    labels = dict(template.get("metadata", {}).get("labels") or {})
    notes = dict(template.get("metadata", {}).get("annotations") or {})
    for prefix in ("", "batch.kubernetes.io/"):
        labels |= {f"{prefix}controller-uid": meta["uid"], f"{prefix}job-name": meta["name"]}
    spec, base = dict(template["spec"]), meta["name"][:50]
    if index is not None:
        labels[INDEX] = notes[INDEX] = str(index)
        notes |= _failure_counts(view, index)
        base = f"{base}-{index}"
        spec.setdefault("hostname", base)
        for containers in ("initContainers", "containers"):
            if containers in spec:
                spec[containers] = [_with_index(container) for container in spec[containers]]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{base}-{suffix()}",
            "namespace": meta["namespace"],
            "labels": labels,
            "annotations": notes,
            "ownerReferences": [owner_reference(JOB, view.job)],
        },
        "spec": spec,
    }


def _failure_counts(view: View, index: int) -> dict[str, str]:
    """With a limit per index each pod carries how often its index failed before it; that is where it is remembered."""
    if not view.per_index:
        return {}
    counted = ignored = 0
    if failures := view.failures_of(index):
        before = annotations(failures[-1])
        counted, ignored = int(before.get(INDEX_FAILURES, 0)), int(before.get(INDEX_IGNORED, 0))
        if view.action(failures[-1]) == "Ignore":
            ignored += 1
        else:
            counted += 1
    return {INDEX_FAILURES: str(counted)} | ({INDEX_IGNORED: str(ignored)} if ignored else {})


def _with_index(container: Object) -> Object:
    env: list[Any] = list(container.get("env") or [])
    if not any(entry["name"] == "JOB_COMPLETION_INDEX" for entry in env):
        source = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
        env.append({"name": "JOB_COMPLETION_INDEX", "valueFrom": source})
    return {**container, "env": env}


def annotations(pod: Object) -> dict[str, str]:
    return pod["metadata"].get("annotations") or {}


def index_of(pod: Object) -> int:
    return int(annotations(pod).get(INDEX, -1))


def parse_indexes(text: str | None) -> set[int]:
    """`"0,2-4"` -> {0, 2, 3, 4}."""
    found: set[int] = set()
    for part in filter(None, (text or "").split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def format_indexes(indexes: set[int]) -> str:
    """{0, 2, 3, 4} -> `"0,2-4"`; two neighbours are written `"2,3"`, as Kubernetes does."""
    runs: list[list[int]] = []
    for index in sorted(indexes):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
