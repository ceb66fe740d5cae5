"""The state of a child that Kueue manages, read from its Workload. Pure.

Kueue owns the field `suspend` of such a child: it resumes an admitted child, and suspends a child that is not admitted.
So the operator suspends the child by deactivating its Workload, which frees the quota, and resumes it by activating the
Workload, which queues it again.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cgd_operator.kube.kinds import SUSPENDED_BY_RUN
from cgd_operator.kube.outside import moment, with_message

Object = dict[str, Any]

WAITS = ("WaitingForQuota", "WaitingForAdmission", "Admitted", "NotStarted")
"""Reasons of a child that Kueue holds."""
STARTING = timedelta(seconds=15)
"""The time that Kueue may need to start an admitted child."""


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


def workload(item: Object, now: datetime) -> Workload:
    """The facts of a Workload (`kueue.x-k8s.io`)."""
    active = bool(item["spec"].get("active", True))
    reason, message = _why(item, now)
    held = not active and SUSPENDED_BY_RUN in item["metadata"].get("annotations", {})
    return Workload(item["apiVersion"], item["metadata"]["name"], active, held, reason, message)


def workload_suspension(suspend: bool) -> Object:
    """The patch of a Workload that suspends or resumes its child, with our annotation in the same write."""
    note = {SUSPENDED_BY_RUN: "true" if suspend else None}
    return {"metadata": {"annotations": note}, "spec": {"active": not suspend}}


def _why(item: Object, now: datetime) -> tuple[str, str]:
    """Why the child of a Workload does not run: reason and message."""
    status = item.get("status", {})
    conditions: dict[str, Object] = {condition["type"]: condition for condition in status.get("conditions", [])}
    admitted, quota, evicted = (conditions.get(kind, {}) for kind in ("Admitted", "QuotaReserved", "Evicted"))
    if not item["spec"].get("active", True):
        why = f"its Workload {item['metadata']['name']} was deactivated"
        why += f" ({evicted['message']})" if evicted.get("message") else ""
        return "Deactivated", f"{why}; set the Workload's spec.active to true to go on"
    if admitted.get("status") == "True":
        since = moment(admitted.get("lastTransitionTime"))
        if since is None or now < since + STARTING:
            return "Admitted", "Kueue has admitted it and starts it"
        late = f"Kueue admitted it at {admitted['lastTransitionTime']} but has not started it"
        mend = "ask the cluster's administrator to check the log of Kueue's controller and its webhooks"
        return "NotStarted", f"{late}: {mend}"
    if quota.get("status") == "True":
        checks = [check for check in status.get("admissionChecks", []) if check.get("state") != "Ready"]
        names = "; ".join(with_message(check["name"], check.get("message")) for check in checks)
        return "WaitingForAdmission", f"has quota, waits for Kueue's admission checks ({names})"
    parts = ["waiting for quota"]
    if quota:
        parts.append(with_message(quota["reason"], quota.get("message")))
    if evicted.get("status") == "True" and evicted.get("message") != quota.get("message"):
        parts.append(f"evicted before: {with_message(evicted['reason'], evicted.get('message'))}")
    return "WaitingForQuota", "; ".join(parts)
