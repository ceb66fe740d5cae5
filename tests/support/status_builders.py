"""Statuses as the operator makes them, of runs in every state there is."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from cgd_operator.api.status import CGDRunStatus
from cgd_operator.facts.children import observe
from cgd_operator.facts.gpu_usage import count
from cgd_operator.facts.pods import Gone, pods_by_stage
from cgd_operator.facts.progress import StageProgress
from cgd_operator.facts.trouble import Trouble
from cgd_operator.planning.dag import plan
from cgd_operator.status.render import Seen, acknowledged, refused, render
from cgd_stages.contract import Rows
from support.builders import CHILDREN, Object, ended, job, manifest, pod, run

NOW = datetime(2026, 1, 1, 0, 10, tzinfo=UTC)


def render_of(
    *children: dict[str, Any],
    pods: tuple[dict[str, Any], ...] = (),
    previous: CGDRunStatus | None = None,
    progress: dict[str, StageProgress] | None = None,
    trouble: Trouble | None = None,
    changes: dict[str, Any] | None = None,
    now: datetime = NOW,
    workloads: tuple[dict[str, Any], ...] = (),
    gone: tuple[Gone, ...] = (),
) -> CGDRunStatus:
    this, previous = run(changes), previous or CGDRunStatus()
    facts = observe(children, pods, workloads, now=now, gone=gone)
    seen = Seen(
        run=this,
        children=plan(this),
        facts=facts,
        used=count(plan(this), pods_by_stage(pods, gone, now), previous, now),
        progress=(progress or {}).get,
        previous=previous,
        now=now,
        trouble=trouble,
    )
    return render(seen)


def finished(*names: str) -> list[dict[str, Any]]:
    return [job(name, "Complete") for name in names]


def shown(status: CGDRunStatus, generation: int = 1, suspend: bool = False) -> Object:
    """The CGDRun with this status, as a client reads it."""
    body = manifest({"suspend": suspend})
    body["metadata"]["generation"] = generation
    return body | {"status": status.model_dump(by_alias=True, exclude_none=True, mode="json")}


def every_state() -> dict[str, Object]:
    """A CGDRun in every state, by what has become of it."""
    failure = json.dumps({"outcome": "failed", "message": "no such bucket", "hint": "create it"})
    halfway = {"answer": StageProgress(Rows(total=48, done=30, rejected=2), 66, 812, 130)}
    learning = {"train-cgd": StageProgress(None, 40, 350, 60, loss=1.23456)}
    before_training = finished(*CHILDREN[: CHILDREN.index("train-cgd")])
    unscheduled = pod("prepare", "Pending")
    unscheduled["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
    ]
    imageless = pod("prepare", "Pending", waiting={"reason": "ImagePullBackOff", "message": "no such image"})
    done = render_of(*finished(*CHILDREN))
    running = {
        f"running {stage}": shown(render_of(*finished(*CHILDREN[:count]), job(stage), pods=(pod(stage),)))
        for count, stage in enumerate(CHILDREN)
    }
    return running | {
        "not looked at yet": shown(CGDRunStatus()),
        "changed since it was looked at": shown(render_of(job("prepare"), pods=(pod("prepare"),)), generation=2),
        "just begun": shown(render_of()),
        "pod without a node": shown(render_of(job("prepare"), pods=(unscheduled,))),
        "cannot pull its image": shown(render_of(job("prepare"), pods=(imageless,))),
        "pod without its image for a minute": shown(
            render_of(job("prepare"), pods=(imageless,), now=NOW - timedelta(minutes=9))
        ),
        "between two stages": shown(render_of(*finished("prepare"))),
        "half of the answers": shown(
            render_of(*finished("prepare"), job("answer"), pods=(pod("answer"),), progress=halfway)
        ),
        "half of the training": shown(
            render_of(*before_training, job("train-cgd"), pods=(pod("train-cgd"),), progress=learning)
        ),
        "suspended from birth": shown(render_of(changes={"suspend": True}), suspend=True),
        "suspended later": shown(
            render_of(*finished("prepare"), job("answer", suspend=True, held=True), changes={"suspend": True}),
            suspend=True,
        ),
        "cannot start": shown(render_of(trouble=Trouble("TrainingBackendMissing", "install it"))),
        "has failed for good": shown(render_of(trouble=Trouble("BudgetSpent", "raise it", final=True))),
        "failed stage": shown(
            render_of(job("prepare", "Failed"), pods=(pod("prepare", "Failed", terminated=ended(3, failure)),))
        ),
        "failed and suspended": shown(render_of(job("prepare", "Failed"), changes={"suspend": True}), suspend=True),
        "refused": shown(refused(1, "spec.storage: is required", CGDRunStatus(), NOW)),
        "succeeded": shown(done),
        "suspended after its end": shown(acknowledged(done, 2), generation=2, suspend=True),
    }
