"""One reconcile of a run: read it and its children, decide, act, write the status once.

Level-based: a reconcile starts from what exists and needs no memory of earlier reconciles. `queue` decides when.
"""

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from cgd_operator import metrics
from cgd_operator.api.spec import InvalidRun
from cgd_operator.api.status import CGDRunStatus
from cgd_operator.controller.actions import Actor
from cgd_operator.controller.children import ChildReader, Departed, RunObjects
from cgd_operator.controller.deletion import Deletion
from cgd_operator.controller.telling import Teller
from cgd_operator.controller.view import View
from cgd_operator.facts.due import ENDED, Due, Outlook, due, has_succeeded, previous_status, wants_finalizer
from cgd_operator.facts.progress import Board
from cgd_operator.facts.refusals import WEBHOOK_DOWN
from cgd_operator.facts.trouble import INSTALL, Trouble
from cgd_operator.facts.waiting import QUIET
from cgd_operator.http.progress import key_id
from cgd_operator.http.webhook import Webhook
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import RUN
from cgd_operator.planning.dag import Run
from cgd_operator.planning.manifests import Release
from cgd_operator.status import cloud_event, events, render

Object = dict[str, Any]

SETTLE_SECONDS = 5.0
"""After a child is started, the status is written this much later, when the child mostly has its pod: one write instead
of two."""


@dataclass(frozen=True)
class Reading:
    """A run and its children as a sweep has read them. A reconcile may use them instead of reading again."""

    manifest: Object
    objects: RunObjects


@dataclass
class Reconciler:
    """Takes runs to their next step."""

    cluster: Cluster
    release: Release
    board: Board
    key: bytes
    """Signs the progress tokens."""
    departed: Departed = field(default_factory=Departed)
    rehearse_pods: bool = True
    """Whether the operator has the right to create pods. It only ever does so as a dry run."""
    stalled_after: timedelta = render.STALLED_AFTER
    webhook: Webhook | None = None
    """Who is told when a run ends."""

    def __post_init__(self) -> None:
        self.release = replace(self.release, key_id=key_id(self.key))
        self.reader = ChildReader(self.cluster, self.departed)
        self._teller = Teller(self.cluster)
        self._actor = Actor(self.cluster, self.release, self.key, self._teller, self.rehearse_pods)
        self._deletion = Deletion(self.cluster, self.release, self.reader, self._teller)

    async def reconcile(self, namespace: str, name: str, reading: Reading | None = None) -> float | None:
        """Read, decide, act, write the status. Every step may be repeated, or be the last before the operator is
        killed.

        Args:
            reading: what a sweep has just read of the run; None: read it now.

        Returns:
            Seconds to the next reconcile, if something is left to report.
        """
        manifest = reading.manifest if reading else await self.cluster.get(RUN, name, namespace)
        now = self.cluster.clock.now()
        if manifest is None or due(manifest, now) is Due.NOTHING:
            return None
        uid, generation = manifest["metadata"]["uid"], manifest["metadata"]["generation"]
        if "deletionTimestamp" in manifest["metadata"]:
            self.board.forget(uid)
            return await self._deletion.clean(manifest, now)
        await self._deletion.finalize(manifest, wanted=wants_finalizer(manifest))
        previous = previous_status(manifest)
        if has_succeeded(manifest):
            if previous.observed_generation not in (0, generation):  # 0: the status cannot be read, and stays as it is
                await self._teller.tell(manifest, render.acknowledged(previous, generation), ())
            await self._deletion.expire(manifest, previous, now)
            return None
        try:
            run = Run.of(manifest)
        except InvalidRun as error:
            refusal = events.refusal(manifest, str(error), now)
            await self._teller.tell(manifest, render.refused(generation, str(error), previous, now), [refusal])
            return None
        objects = reading.objects if reading else (await self.reader.read(namespace, {uid: namespace}))[uid]
        return await self._act_and_tell(View.of(run, manifest, objects, now), manifest)

    async def _act_and_tell(self, view: View, manifest: Object) -> float | None:
        run, previous = view.run, view.previous
        trouble: Trouble | None = None
        if view.backend is None and view.starts:
            trouble = Trouble("TrainingBackendMissing", INSTALL[run.spec.training.backend])
        else:
            if view.starts and not view.objects.children:
                trouble = await self._actor.rehearse(view)
            trouble = trouble or await self._actor.act(view)
        self.board.expect(run.uid, view.under_way)
        if view.starts and not trouble and previous.observed_generation == run.generation:
            return SETTLE_SECONDS
        status = view.status(self.board, trouble, self.stalled_after)
        if self.webhook and (ended := cloud_event.run_ended(run, previous, status, view.now)):
            await self.webhook.send(ended)
        if await self._teller.tell(manifest, status, events.transitions(run, previous, status, view.now)):
            self.departed.told(run.uid, view.objects.gone)
            _measure(previous, status)
        if status.state in ENDED:
            self.board.forget(run.uid)
        await self._deletion.expire(manifest, status, view.now)
        if trouble and trouble.reason == WEBHOOK_DOWN.reason:
            return SETTLE_SECONDS
        podless = any(stage.reason == "NoPods" for stage in status.stages)
        return QUIET.total_seconds() + 1 if podless else None  # by then Events give the reason

    def due(self, manifest: Object, objects: RunObjects) -> Due:
        """What a run needs, judged by what a sweep has read of it. Also updates whose progress reports are accepted."""
        now, uid = self.cluster.clock.now(), manifest["metadata"]["uid"]
        if "deletionTimestamp" in manifest["metadata"] or has_succeeded(manifest):
            self.board.forget(uid)
            return due(manifest, now)
        try:
            run = Run.of(manifest)
        except InvalidRun as error:
            previous, generation = previous_status(manifest), manifest["metadata"]["generation"]
            refused = render.refused(generation, str(error), previous, now)
            return due(manifest, now, Outlook(acts=False, status=refused))
        view = View.of(run, manifest, objects, now)
        outlook = Outlook(bool(view.actions), view.status(self.board, None, self.stalled_after))
        over = outlook.status.state in ENDED and not outlook.acts
        self.board.expect(uid, {} if over else view.under_way)
        return due(manifest, now, outlook)

    def known(self) -> set[str]:
        """The uids of the runs that something in memory belongs to."""
        return {*self.board.runs, *self.board.allowances, *self.departed.runs, *self._actor.equipped}

    def forget(self, uid: str) -> None:
        """Forget a run that has ended or is deleted."""
        self.board.forget(uid)
        self.departed.runs.pop(uid, None)
        self._actor.equipped.pop(uid, None)


def _measure(previous: CGDRunStatus, status: CGDRunStatus) -> None:
    """Count the stages that have ended since the previous status."""
    before = {stage.name: stage.state for stage in previous.stages}
    for stage in status.stages:
        ended = stage.state in ENDED and before.get(stage.name) != stage.state
        if ended and stage.start_time and stage.completion_time:
            seconds = render.seconds_between(stage.start_time, stage.completion_time)
            metrics.STAGE_SECONDS.labels(stage.name.kind, stage.state).observe(seconds)
