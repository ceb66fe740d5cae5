"""The end of a run as a CloudEvent (CloudEvents 1.0, JSON): for chats, pipelines and registries. Pure."""

from datetime import datetime
from typing import Any

from cgd_operator.api import GROUP
from cgd_operator.api.fields import without_user
from cgd_operator.api.status import CGDRunStatus
from cgd_operator.kube.kinds import RUN
from cgd_operator.planning.dag import Run

ENDS = ("Succeeded", "Failed")
"""States in which a run has ended."""


def run_ended(run: Run, old: CGDRunStatus, new: CGDRunStatus, now: datetime) -> dict[str, Any] | None:
    """The event of a run that has just ended; None: it has not. Its id derives from the run and its end, so that who
    gets it twice knows it: it is sent before the status is written, at least once. It holds names, places and counts;
    of keys it knows nothing."""
    if new.state == old.state or new.state not in ENDS:
        return None
    end = next((one for one in new.conditions if one.type == "Succeeded"), None)
    return {
        "specversion": "1.0",
        "id": f"{run.uid}-{new.state.lower()}",
        "source": RUN.path(run.namespace, run.name),
        "type": f"{GROUP}.run.{new.state.lower()}",
        "subject": f"{run.namespace}/{run.name}",
        "time": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "datacontenttype": "application/json",
        "data": {
            "namespace": run.namespace,
            "name": run.name,
            "uid": run.uid,
            "state": new.state,
            "reason": end.reason if end else "",
            "message": without_user(end.message) if end else "",
            "artifacts": new.artifacts.model_dump(by_alias=True, exclude_none=True),
            "usage": new.usage.model_dump(by_alias=True),
        },
    }
