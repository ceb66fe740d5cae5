"""Carries out what was decided for a run. Every created object has a name that derives from the run, so creating it
twice creates it once."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cgd_operator.controller.children import RunObjects
from cgd_operator.controller.telling import Teller
from cgd_operator.controller.view import View
from cgd_operator.facts.children import ChildFacts
from cgd_operator.facts.decide import Action, GiveUp, Hold, Keep, Replace, Resume, Start
from cgd_operator.facts.kueue import workload_suspension
from cgd_operator.facts.pods import owners
from cgd_operator.facts.refusals import NO_RIGHT, WEBHOOK_DOWN, judge
from cgd_operator.facts.trouble import Trouble, not_changed, not_replaced, refused
from cgd_operator.http.progress import token
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import (
    JOB,
    POD,
    SECRET,
    SUSPENDED_BY_RUN,
    TRAININGRUNTIME,
    WORKLOADS,
    AlreadyExists,
    ApiError,
)
from cgd_operator.planning import manifests
from cgd_operator.planning.dag import Child, Run
from cgd_operator.status import events

log = logging.getLogger(__name__)

Object = dict[str, Any]

AIMS = {Hold: "suspended", Resume: "resumed", GiveUp: "ended", Keep: "kept from its deletion"}
"""What a child is to be, by the action."""


@dataclass
class Actor:
    cluster: Cluster
    release: manifests.Release
    key: bytes
    """Signs the progress tokens."""
    teller: Teller
    rehearse_pods: bool
    """Whether the operator has the right to create pods. It only ever does so as a dry run."""
    equipped: dict[str, bool] = field(default_factory=dict)
    """By the uid of the run, whether its Secret with the tokens of our key exists; False: it was refused."""

    async def rehearse(self, view: View) -> Trouble | None:
        """Before the first child is created, send all kinds of children to the API server as dry runs. What its quotas,
        limits and policies refuse must be known before the teacher's GPUs are used. A refusal that may pass, such as a
        quota that is used up now, is ignored here: it comes again when the child is created."""
        samples: dict[tuple[str, ...], Child] = {}
        for child in view.children:
            samples.setdefault((child.pool, child.image, child.kind, str(child.gpus)), child)
        for child in samples.values():
            for kind, body in manifests.rehearsals(view.run, child, self.release, pods=self.rehearse_pods):
                try:
                    await self.cluster.create(kind, body, dry_run=True)
                except ApiError as error:
                    verdict = judge(error.message)
                    unable = kind is POD and verdict is NO_RIGHT
                    if error.status in (400, 403, 422) and not verdict.passing and not unable:
                        return refused(child.stage, error, view.ready, kind)
                    log.info("%s/%s: %s was not judged: %s", view.run.namespace, view.run.name, child.stage, error)
        return None

    async def act(self, view: View) -> Trouble | None:
        """Carry out the actions until the API server refuses an action. Updates the view's objects."""
        await self._equip(view)
        for action in view.actions:
            try:
                await self._carry_out(view, action)
            except ApiError as error:
                if error.status not in (400, 403, 404, 422) and judge(error.message) is not WEBHOOK_DOWN:
                    raise
                if isinstance(action, Replace):
                    return not_replaced(action.stage, action.pod, error)
                if isinstance(action, Start):
                    return refused(action.child.stage, error, view.ready)
                return not_changed(action.facts.stage, AIMS[type(action)], error)
        return None

    async def _carry_out(self, view: View, action: Action) -> None:
        run, objects = view.run, view.objects
        match action:
            case Start(child):
                await self._start(run, child, objects)
            case Hold(facts):
                await self._suspend(run, facts, True, objects)
            case Resume(facts):
                await self._suspend(run, facts, False, objects)
            case GiveUp(facts, why):
                await self._give_up(run, facts, why, objects)
            case Keep(facts):
                await self._change(run, facts, manifests.keeping(facts.kind), objects)
            case Replace():
                await self._replace(view, action)

    async def _equip(self, view: View) -> None:
        """Create the Secret with the run's progress tokens, before the first child of the run that has it. Each signing
        key has a Secret of its own, because the operator may create Secrets but neither read nor change them. A child
        that has the Secret shows that an earlier process with our key has created it."""
        run = view.run
        if not view.starts or self.equipped.get(run.uid):
            return
        name = manifests.secret_name(run, self.release)
        if run.uid not in self.equipped and any(manifests.has_secret(child, name) for child in view.objects.children):
            self.equipped[run.uid] = True
            return
        tokens: dict[str, str] = {
            child.stage: token(self.key, run.namespace, run.name, run.uid, child.stage) for child in view.children
        }
        try:
            await self.cluster.create(SECRET, manifests.progress_secret(run, tokens, self.release))
        except AlreadyExists:  # an earlier process with our key created it, and started no child
            log.debug("%s/%s: its tokens are there", run.namespace, run.name)
        except ApiError as error:
            if error.status not in (400, 403, 404, 422):
                raise
            log.warning(
                "%s/%s: its progress is not shown, as its Secret is refused: %s", run.namespace, run.name, error
            )
            self.equipped[run.uid] = False
            return
        self.equipped[run.uid] = True

    async def _start(self, run: Run, child: Child, objects: RunObjects) -> None:
        kind, body = manifests.KINDS[child.kind], manifests.manifest(run, child, self.release)
        if child.kind == "TrainJob":
            await self.cluster.apply(TRAININGRUNTIME, manifests.training_runtime(run, child, self.release))
        try:
            objects.children.append(await self.cluster.create(kind, body))
            log.info("%s/%s: started %s (%s)", run.namespace, run.name, child.stage, child.name)
        except AlreadyExists:
            existing = await self.cluster.get(kind, child.name, run.namespace)
            if existing and run.uid not in (owner["uid"] for owner in existing["metadata"].get("ownerReferences", [])):
                log.warning(
                    "%s/%s: the %s %s is not the run's, so the stage %s cannot start: delete it",
                    run.namespace, run.name, child.kind, child.name, child.stage,
                )  # fmt: skip
            elif existing and (found := await self._labelled(run, child, existing, body)):
                objects.children.append(found)

    async def _labelled(self, run: Run, child: Child, existing: Object, body: Object) -> Object | None:
        """The run's child with the labels by which alone it is found, of which somebody may have removed some; None if
        it has gone meanwhile."""
        wanted, there = body["metadata"]["labels"], existing["metadata"].get("labels", {})
        lost = {name: value for name, value in wanted.items() if name not in there}
        if not lost:
            return existing
        log.warning("%s/%s: %s has its labels again: %s", run.namespace, run.name, child.name, sorted(lost))
        change = {"metadata": {"labels": lost}}
        return await self.cluster.patch(manifests.KINDS[child.kind], child.name, run.namespace, change)

    async def _suspend(self, run: Run, facts: ChildFacts, suspend: bool, objects: RunObjects) -> None:
        """Suspend or resume a child: by its Workload if Kueue manages it, else by its own field."""
        if facts.workload and (suspend or not facts.held):
            served = next(kind for kind in WORKLOADS if kind.api_version == facts.workload.api_version)
            body = workload_suspension(suspend)
            patched = await self.cluster.patch(served, facts.workload.name, run.namespace, body)
            objects.workloads[:] = _replaced(objects.workloads, patched)
            return
        note = {SUSPENDED_BY_RUN: "true" if suspend else None}
        suspension = manifests.suspension(facts.kind, suspend)
        await self._change(run, facts, {"metadata": {"annotations": note}, "spec": suspension}, objects)

    async def _change(self, run: Run, facts: ChildFacts, patch: Object, objects: RunObjects) -> None:
        patched = await self.cluster.patch(manifests.KINDS[facts.kind], facts.name, run.namespace, patch)
        objects.children[:] = _replaced(objects.children, patched)

    async def _give_up(self, run: Run, facts: ChildFacts, why: str, objects: RunObjects) -> None:
        """End a child, or the Jobs that a TrainJob has through its JobSet: they own its pods."""
        log.info("%s/%s: gave %s up: %s", run.namespace, run.name, facts.name, why)
        await self._change(run, facts, manifests.giving_up(facts.kind, why), objects)
        if facts.kind == "TrainJob":
            for job in owners(objects.pods, facts.stage):
                await self.cluster.patch(JOB, job, run.namespace, manifests.ending())

    async def _replace(self, view: View, action: Replace) -> None:
        """Do what the cluster's pod garbage collector does on a node that is marked out of service. The Job controller
        keeps its finalizer on a pod until the pod has failed, and does not count a disrupted pod as a failure."""
        run, lost = view.run, action.pod
        manifest = next(pod for pod in view.objects.pods if pod["metadata"]["uid"] == lost.uid)
        await self.cluster.delete(POD, lost.name, run.namespace, uid=lost.uid, grace=0)
        body = manifests.disruption(manifest, view.now)
        try:
            await self.cluster.patch(POD, lost.name, run.namespace, body, subresource="status")
        except ApiError as error:
            if error.status not in (409, 422):  # the name has another uid now: the lost pod is gone already
                raise
        await self.teller.announce([events.replaced(run, action.stage, lost, view.now)])
        log.info("%s/%s: pod %s of the lost node %s is replaced", run.namespace, run.name, lost.name, lost.node)


def _replaced(objects: Iterable[Object], new: Object | None) -> list[Object]:
    """The objects with the new state of one object. If it is None the object is gone: a later reconcile notices."""
    uid = new["metadata"]["uid"] if new else ""
    return [new if new and item["metadata"]["uid"] == uid else item for item in objects]
