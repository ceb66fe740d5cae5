"""The state of each child: Jobs, PyTorchJobs, TrainJobs, their pods, Workloads and Events in, facts out. Pure."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from cgd_operator.facts.kueue import STARTING, Workload, workload
from cgd_operator.facts.pods import LONG_AGO, Gone, Object, PodFacts, account, pod_facts, stage_of
from cgd_operator.facts.waiting import Notice, Why, expected_pods, missing, noticed, questions, retrying, waiting
from cgd_operator.kube.kinds import JOB_UID_LABEL, QUEUE_LABEL, SUSPENDED_BY_RUN
from cgd_operator.kube.outside import moment
from cgd_operator.planning.dag import PREPARE
from cgd_operator.planning.manifests import GIVEN_UP, expires, suspension
from cgd_operator.planning.requests import Sizes
from cgd_stages.contract import CHECKPOINT_BYTES, MOST, NO_TRANSFER, STUDENT_BYTES, TEACHER_BYTES

ENDS = frozenset({"Complete", "Succeeded", "Failed"})
"""Types of the conditions with which Jobs, PyTorchJobs and TrainJobs end."""
NEVER = datetime.max.replace(tzinfo=UTC)


class Fate(Enum):
    ABSENT = "absent"
    WAITING = "waiting"
    """It exists, but no pod of it runs."""
    RUNNING = "running"
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LEAVING = "leaving"
    """It is being deleted."""


@dataclass(frozen=True)
class ChildFacts:
    name: str
    stage: str
    kind: str
    fate: Fate
    uid: str = ""
    reason: str = ""
    message: str = ""
    stuck: datetime | None = None
    """Since when it waits for a person to mend something; None: it does not."""
    suspended: bool = False
    held: bool = False
    """Suspended by the operator, not by a queue."""
    given_up: str = ""
    """Why the operator has ended it."""
    expires: bool = False
    """Its controller deletes it some time after its end."""
    start: datetime | None = None
    end: datetime | None = None
    attempts: int = 0
    pods: tuple[PodFacts, ...] = ()
    gone: tuple[PodFacts, ...] = ()
    """Deleted pods in their last known state, until the status has recorded them."""
    workload: Workload | None = None
    """Its Workload; None: Kueue does not manage it."""


def observe(
    children: Iterable[Object],
    pods: Iterable[Object],
    workloads: Iterable[Object] = (),
    events: Iterable[Object] = (),
    now: datetime = LONG_AGO,
    gone: Iterable[Gone] = (),
) -> dict[str, ChildFacts]:
    """The facts of every existing child by stage. If a stage has two, the child not being deleted counts.

    `events` are Warnings about the children, the objects that their controllers create, and their pods. `now` decides
    what takes too long; without it nothing does. `gone` are recently deleted pods.
    """
    queues = {item["metadata"]["labels"][JOB_UID_LABEL]: workload(item, now) for item in workloads}
    notices = [Notice.of(event) for event in events]
    by_stage: dict[str, list[PodFacts]] = {}
    for pod in pods:
        by_stage.setdefault(stage_of(pod), []).append(noticed(pod_facts(pod, now), notices, now))
    facts: dict[str, ChildFacts] = {}
    for child in sorted(children, key=lambda child: "deletionTimestamp" not in child["metadata"]):
        stage = stage_of(child)
        own = tuple(sorted(by_stage.get(stage, []), key=lambda pod: (pod.start or NEVER, pod.name)))
        left = tuple(pod.pod for pod in gone if pod.stage == stage)
        queue = queues.get(child["metadata"].get("uid", ""))
        facts[stage] = _child(child, own, left, queue, *_fate(child, own, left, queue, notices, now))
    return facts


def told_sizes(facts: Mapping[str, ChildFacts], before: Sizes) -> Sizes:
    """The sizes in prepare's last words; of `before` what they do not tell."""
    prepare = facts.get(PREPARE)
    pods = (*prepare.pods, *prepare.gone) if prepare else ()
    words = [pod.words.stages[PREPARE] for pod in pods if pod.words and PREPARE in pod.words.stages]

    def told(metric: str) -> int:
        sizes = (stage.metrics.get(metric, 0) for stage in words)
        return next((int(size) for size in sizes if 0 < size <= MOST), 0)

    return Sizes(
        checkpoint=told(CHECKPOINT_BYTES) or before.checkpoint,
        student=told(STUDENT_BYTES) or before.student,
        teacher=told(TEACHER_BYTES) or before.teacher,
    )


def has_ended(child: Mapping[str, Any]) -> bool:
    conditions = child.get("status", {}).get("conditions", [])
    return any(condition["type"] in ENDS and condition["status"] == "True" for condition in conditions)


def queued(children: Iterable[Object]) -> tuple[str, ...]:
    """The uids of the children that Kueue may have a Workload for: not ended, and in a queue or suspended by somebody
    else (Kueue may queue what names no queue)."""
    uids = []
    for child in children:
        meta, suspended = child["metadata"], is_suspended(child)
        in_a_queue = QUEUE_LABEL in meta.get("labels", {})
        suspended_by_others = suspended and SUSPENDED_BY_RUN not in meta.get("annotations", {})
        if not has_ended(child) and "deletionTimestamp" not in meta and (in_a_queue or suspended_by_others):
            uids.append(meta["uid"])
    return tuple(uids)


def unexplained(children: Iterable[Object], pods: Collection[Object], now: datetime) -> Iterator[tuple[str, str]]:
    """The Events to read, as namespace and field selector: those that may explain why a child has no pod, or why a pod
    on a node has no container, after some seconds."""
    for child in children:
        if has_ended(child):
            continue
        own = [pod_facts(pod, now) for pod in pods if stage_of(pod) == stage_of(child)]
        going = "deletionTimestamp" not in child["metadata"] and not is_suspended(child)
        for fields in questions(child, own, now, going=going):
            yield child["metadata"]["namespace"], fields


def is_suspended(child: Object) -> bool:
    """Whether its manifest suspends it. Its pods may still run."""
    spec = child.get("spec", {})
    return bool(spec.get("suspend") or spec.get("runPolicy", {}).get("suspend"))


def _child(
    child: Object, pods: tuple[PodFacts, ...], gone: tuple[PodFacts, ...], queue: Workload | None, fate: Fate, why: Why
) -> ChildFacts:
    meta, status = child["metadata"], child.get("status", {})
    notes = meta.get("annotations", {})
    begun = Counter((pod.shard, pod.restarts) for pod in pods)
    end = None
    if fate in (Fate.SUCCEEDED, Fate.FAILED):
        ends = [pod.end for pod in pods if pod.end]
        changes = [moment(condition.get("lastTransitionTime")) for condition in status.get("conditions", [])]
        end = moment(status.get("completionTime")) or max(ends or filter(None, changes), default=None)
    return ChildFacts(
        name=meta["name"],
        stage=stage_of(child),
        kind=child["kind"],
        fate=fate,
        uid=meta.get("uid", ""),
        reason=why.reason,
        message=why.message,
        stuck=why.stuck,
        suspended=is_suspended(child),
        held=SUSPENDED_BY_RUN in notes,
        given_up=notes.get(GIVEN_UP, ""),
        expires=expires(child),
        start=moment(status.get("startTime")) or min((pod.start for pod in pods if pod.start), default=None),
        end=end,
        attempts=max((pod.restarts + max(begun[pod.shard, pod.restarts], pod.failures + 1) for pod in pods), default=0),
        pods=pods,
        gone=gone,
        workload=queue,
    )


def _fate(
    child: Object,
    pods: tuple[PodFacts, ...],
    gone: tuple[PodFacts, ...],
    queue: Workload | None,
    notices: Collection[Notice],
    now: datetime,
) -> tuple[Fate, Why]:
    meta, conditions = child["metadata"], child.get("status", {}).get("conditions", [])
    true = {condition["type"]: condition for condition in conditions if condition["status"] == "True"}
    running = [pod for pod in pods if pod.phase == "Running"]
    if "deletionTimestamp" in meta:
        holders = meta.get("finalizers", [])
        held = f"; it stays until these finalizers are removed: {', '.join(holders)}" if holders else ""
        return Fate.LEAVING, Why("Deleted", f"is being deleted{held}")
    if "Complete" in true or "Succeeded" in true:
        return Fate.SUCCEEDED, Why()
    if "Failed" in true:
        return Fate.FAILED, _failure(true["Failed"], meta.get("annotations", {}).get(GIVEN_UP), gone + pods)
    if is_suspended(child):
        if queue and not queue.held and SUSPENDED_BY_RUN not in meta.get("annotations", {}):
            return Fate.WAITING if queue.active else Fate.SUSPENDED, Why(queue.reason, queue.message)
        return Fate.SUSPENDED, Why("Suspended", _suspension(child, queue, len(running), now))
    why = missing(child, pods, notices, now)
    if not running:
        return Fate.WAITING, why or waiting(pods, gone)
    if why is None:
        leaving = next((pod for pod in running if pod.due), None)
        cause = f" ({leaving.disruption})" if leaving and leaving.disruption else ""
        remade = f"pod {leaving.name} is being deleted{cause}, and is made again when it has ended" if leaving else ""
        return Fate.RUNNING, Why(message=retrying(pods) or remade)
    due = expected_pods(child, pods)
    share = f"{len(running)} of {due} pods run; " if len(running) < due else ""
    return Fate.RUNNING, replace(why, message=share + why.message)


def _suspension(child: Object, queue: Workload | None, running: int, now: datetime) -> str:
    """What people should know of a suspended child: who has suspended it if not the operator, and what still runs.
    Kueue suspends a child when it is created, and makes its Workload a moment later."""
    meta, kind, why = child["metadata"], child["kind"], ""
    is_new = now < (moment(meta.get("creationTimestamp")) or LONG_AGO) + STARTING
    by_others = queue is None and SUSPENDED_BY_RUN not in meta.get("annotations", {}) and not is_new
    if by_others and QUEUE_LABEL in meta.get("labels", {}):
        why = f"its {kind} is suspended and has no Workload: ask the cluster's administrator whether Kueue works"
    elif by_others:
        patch = json.dumps({"spec": suspension(kind, False)})
        mend = f"`kubectl patch {kind.lower()} {meta['name']} --type merge -p '{patch}'` lets it go on"
        why = f"somebody has suspended its {kind}, not the operator: {mend}"
    ending = f"pods that still run until they have stored what is finished: {running}" if running else ""
    return "; ".join(filter(None, [why, ending]))


def _failure(condition: Object, given_up: str | None, pods: tuple[PodFacts, ...]) -> Why:
    """The reason of a failure: why the operator has given the child up, or from the pod that explains it best, which is
    one that asks the user for a change, else the last one with last words."""
    failed = [pod for pod in pods if pod.failed]
    without_transfer = any(pod.words and pod.words.error == NO_TRANSFER for pod in pods)
    reason = NO_TRANSFER if without_transfer else str(condition.get("reason") or "Failed")
    if given_up:
        return Why(NO_TRANSFER if without_transfer else "GivenUp", given_up)
    if not failed:
        return Why(reason, str(condition.get("message") or "failed; its pods are gone"))
    permanent = [pod for pod in failed if pod.words and pod.words.outcome == "failed" and pod.exit_code == 3]
    telling = [pod for pod in failed if pod.words or pod.tail]
    return Why(reason, account((permanent or telling or failed)[-1]))
