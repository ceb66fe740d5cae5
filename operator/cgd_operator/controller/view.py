"""A run at one moment and the actions that it needs: the plan and the facts together. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cgd_operator.api.status import CGDRunStatus
from cgd_operator.controller.children import RunObjects
from cgd_operator.facts import gpu_usage, retries
from cgd_operator.facts.children import ChildFacts, Fate, has_ended, told_sizes
from cgd_operator.facts.decide import Action, Start, decide, replacements
from cgd_operator.facts.due import previous_status
from cgd_operator.facts.pods import pods_by_stage
from cgd_operator.facts.progress import Board
from cgd_operator.facts.trouble import Trouble, exceeded
from cgd_operator.planning.dag import BACKENDS, Backend, Child, Run, choose_backend, plan
from cgd_operator.planning.manifests import STAGE_LABEL
from cgd_operator.planning.requests import Sizes
from cgd_operator.status import render

Object = dict[str, Any]


@dataclass(frozen=True)
class View:
    run: Run
    objects: RunObjects
    """The run's objects. Actions update them with what they create and change."""
    previous: CGDRunStatus
    created: datetime
    now: datetime
    backend: Backend | None
    children: tuple[Child, ...]
    facts: Mapping[str, ChildFacts]
    used: Mapping[str, gpu_usage.Used]
    limit: Trouble | None
    actions: tuple[Action, ...]
    sizes: Sizes
    """From prepare's last words, or from the status if its pod is gone."""

    @classmethod
    def of(cls, run: Run, manifest: Object, objects: RunObjects, now: datetime) -> "View":
        previous, created = previous_status(manifest), _created(manifest)
        backend = choose_backend(run, objects.served, {child["kind"] for child in objects.children})
        facts = objects.observe(now)
        known = Sizes(previous.checkpoint_bytes or 0, previous.student_bytes or 0, previous.teacher_bytes or 0)
        sizes = told_sizes(facts, known)
        children = plan(run, backend or BACKENDS[0], sizes)
        used = gpu_usage.count(children, pods_by_stage(objects.pods, objects.gone, now), previous, now)
        limit = exceeded(run, children, facts, gpu_usage.total(used), now - created)
        enough = retries.enough(facts.values(), previous, run.spec.retries)
        actions = decide(children, facts, stop=run.spec.suspend or limit is not None, enough=enough)
        actions += replacements(facts, run.spec.replace_lost_pods_after_seconds, now)
        return cls(run, objects, previous, created, now, backend, children, facts, used, limit, actions, sizes)

    @property
    def starts(self) -> bool:
        return any(isinstance(action, Start) for action in self.actions)

    @property
    def ready(self) -> datetime:
        """Since when the next stage could have begun."""
        ends = [child.end for child in self.facts.values() if child.fate is Fate.SUCCEEDED and child.end]
        return max([self.created, *ends])

    @property
    def under_way(self) -> dict[str, tuple[tuple[str, ...], int]]:
        """The children that exist and have not ended, as `Board.expect` takes them."""
        going = [item["metadata"]["labels"].get(STAGE_LABEL) for item in self.objects.children if not has_ended(item)]
        return {child.stage: (child.stages, child.pods) for child in self.children if child.stage in going}

    def status(self, board: Board, trouble: Trouble | None, stalled_after: timedelta) -> CGDRunStatus:
        """The status of what exists now."""
        return render.render(
            render.Seen(
                run=self.run,
                children=self.children,
                facts=self.objects.observe(self.now) if self.actions else self.facts,
                used=self.used,
                progress=lambda stage: board.of(self.run.uid, stage),
                previous=self.previous,
                now=self.now,
                trouble=self.limit or trouble,
                stalled_after=stalled_after,
                sizes=self.sizes,
            )
        )


def _created(manifest: Object) -> datetime:
    return datetime.fromisoformat(manifest["metadata"]["creationTimestamp"])
