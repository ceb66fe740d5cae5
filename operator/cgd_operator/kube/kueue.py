"""What Kueue says of a child, read from the Workload that it keeps for it. Pure.

Kueue owns `suspend` of a child that it manages: it starts what is suspended and admitted, and stops what runs and is
not. Such a child is therefore held by deactivating its Workload, which gives its quota back, and let go by activating
it, which puts it into the queue again.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cgd_operator.kube.outside import moment

Object = dict[str, Any]

QUEUE_LABEL, PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
QUEUE_LABELS = (QUEUE_LABEL, PRIORITY_LABEL)
"""Labels of a run that every child gets."""
JOB_UID_LABEL = "kueue.x-k8s.io/job-uid"
"""Label of a Workload: the uid of the child that it stands for."""
SUSPENDED_BY_RUN = "cgd.dev/suspended-by-run"
"""Annotation on what the operator suspended, a child or its Workload: only that is resumed by it."""
WAITS = ("WaitingForQuota", "WaitingForAdmission", "Admitted", "NotStarted")
"""Reasons of a child that Kueue holds."""
STARTING = timedelta(seconds=15)
"""What Kueue may take to start what it has admitted."""


@dataclass(frozen=True)
class Workload:
    api_version: str
    name: str
    active: bool
    held: bool
    """The operator has deactivated it."""
    reason: str
    message: str
    """Why its child does not run."""


def workload(found: Object, now: datetime) -> Workload:
    """The facts of a Workload (`kueue.x-k8s.io`)."""
    active = bool(found["spec"].get("active", True))
    reason, message = _waiting(found.get("status", {}), now) if active else _deactivated(found)
    held = not active and SUSPENDED_BY_RUN in found["metadata"].get("annotations", {})
    return Workload(found["apiVersion"], found["metadata"]["name"], active, held, reason, message)


def workload_suspension(suspend: bool) -> Object:
    """The patch of a Workload that holds its child or lets it go: fact and note in one write."""
    note = {SUSPENDED_BY_RUN: "true" if suspend else None}
    return {"metadata": {"annotations": note}, "spec": {"active": not suspend}}


def _deactivated(found: Object) -> tuple[str, str]:
    name, queue = found["metadata"]["name"], _condition(found.get("status", {}), "Evicted")
    why = f" ({queue['message']})" if queue.get("message") else ""
    return "Deactivated", f"its Workload {name} was deactivated{why}; set the Workload's spec.active to true to go on"


def _waiting(status: Object, now: datetime) -> tuple[str, str]:
    admitted = _condition(status, "Admitted")
    if admitted.get("status") == "True":
        return _admitted(str(admitted.get("lastTransitionTime") or ""), now)
    if _condition(status, "QuotaReserved").get("status") == "True":
        checks = [one for one in status.get("admissionChecks", []) if one.get("state") != "Ready"]
        names = "; ".join(_colon(one["name"], one.get("message")) for one in checks)
        return "WaitingForAdmission", f"has quota, waits for Kueue's admission checks ({names})"
    return "WaitingForQuota", _for_quota(_condition(status, "QuotaReserved"), _condition(status, "Evicted"))


def _admitted(since: str, now: datetime) -> tuple[str, str]:
    admitted = moment(since)
    if admitted is None or now < admitted + STARTING:
        return "Admitted", "Kueue has admitted it and starts it"
    told = f"Kueue admitted it at {since} but has not started it"
    return (
        "NotStarted",
        f"{told}: ask the cluster's administrator to check the log of Kueue's controller and its webhooks",
    )


def _for_quota(quota: Object, evicted: Object) -> str:
    parts = ["waiting for quota"]
    if quota:
        parts.append(_colon(quota["reason"], quota.get("message")))
    if evicted.get("status") == "True" and evicted.get("message") != quota.get("message"):
        parts.append(f"evicted before: {_colon(evicted['reason'], evicted.get('message'))}")
    return "; ".join(parts)


def _condition(status: Object, kind: str) -> Object:
    return next((one for one in status.get("conditions", []) if one["type"] == kind), {})


def _colon(reason: str, message: str | None) -> str:
    return f"{reason}: {message}" if message else reason
