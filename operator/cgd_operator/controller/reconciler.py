"""One look at a run: read it and its children, decide, act, write the status once.

Level-based: a reconcile starts from what exists and needs nothing that an earlier one remembered. `loop` says when.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import ValidationError

from cgd_operator import metrics
from cgd_operator.api.spec import InvalidRun
from cgd_operator.api.status import CGDRunStatus
from cgd_operator.controller.departed import Departed
from cgd_operator.facts import gpu_usage, retries
from cgd_operator.facts.children import (
    LONG_AGO,
    QUIET,
    ChildFacts,
    Fate,
    Gone,
    PodFacts,
    checkpoint_bytes,
    has_ended,
    observe,
    pods_by_stage,
    queued,
    unexplained,
)
from cgd_operator.facts.decide import Action, GiveUp, Hold, Replace, Resume, Start, decide, replacements
from cgd_operator.facts.progress import Board
from cgd_operator.facts.refusals import NO_RIGHT, OTHER, POLICY, WEBHOOK_DOWN, explain, judge
from cgd_operator.http.progress import key_id, token
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import (
    EVENT,
    JOB,
    POD,
    RUN,
    SECRET,
    TRAININGRUNTIME,
    WORKLOADS,
    AlreadyExists,
    ApiError,
    Kind,
    one_of,
)
from cgd_operator.kube.kueue import JOB_UID_LABEL, SUSPENDED_BY_RUN, workload_suspension
from cgd_operator.planning import manifests
from cgd_operator.planning.dag import BACKENDS, CLEAN, Backend, Child, Run, choose_backend, cleaning, plan
from cgd_operator.status import events, render
from cgd_operator.status.limits import exceeded, expired

log = logging.getLogger(__name__)

Object = dict[str, Any]

SETTLE_SECONDS = 5.0
"""A child that was started is told of when it had so long to get its pod: mostly one write instead of two."""
ABSENT_SECONDS = 30.0
"""A kind that the cluster did not serve is asked for again after so long."""
CLEAN_SECONDS = 1800
"""A deleted run stays at most so long for what it stored to be deleted."""

ENDED = ("Succeeded", "Failed")
"""States of a run of which nothing more is reported."""
GPU_TIME = ("gpuSeconds", "podGpuSeconds")
COUNTS = ("rows", "percent", "tokensPerSecond", "etaSeconds", "progress", "eta")
"""Fields of a status that say how far a stage is."""

INSTALL: dict[str, str] = {
    "auto": "the cluster has neither PyTorchJob (kubeflow.org/v1) nor TrainJob (trainer.kubeflow.org/v1alpha1): "
    "install the Kubeflow Training Operator or Kubeflow Trainer; then the run goes on",
    "PyTorchJob": "training.backend is PyTorchJob (kubeflow.org/v1), which the cluster has not: install the Kubeflow "
    "Training Operator; then the run goes on",
    "TrainJob": "training.backend is TrainJob (trainer.kubeflow.org/v1alpha1), which the cluster has not: install "
    "Kubeflow Trainer; then the run goes on",
}
"""What is missing and who must install it, for each `training.backend`."""


@dataclass
class Children:
    """The objects of one run."""

    objects: list[Object]
    pods: list[Object]
    served: tuple[Backend, ...]
    """Kinds of trainings that the cluster knows."""
    workloads: list[Object]
    """What Kueue has for those that have not ended."""
    gone: tuple[Gone, ...] = ()
    """Pods that were deleted, which no status tells yet."""
    events: list[Object] = field(default_factory=list)
    """Why pods of theirs are missing or do not start."""

    def observe(self, now: datetime) -> dict[str, ChildFacts]:
        return observe(self.objects, self.pods, self.workloads, self.events, now, self.gone)


@dataclass(frozen=True)
class Reading:
    """A run and its children as a sweep has read them, which a look may start from instead of reading them again."""

    manifest: Object
    children: Children


@dataclass(frozen=True)
class View:
    """A run at one moment, and what is to be done."""

    run: Run
    there: Children
    previous: CGDRunStatus
    created: datetime
    now: datetime
    backend: Backend | None
    children: tuple[Child, ...]
    used: Mapping[str, gpu_usage.Used]
    limit: render.Trouble | None
    actions: tuple[Action, ...]
    checkpoint_bytes: int
    """Of a training; 0: not known. From prepare's last words, or from the status where its pod is gone."""

    @classmethod
    def of(cls, run: Run, manifest: Object, there: Children, now: datetime) -> "View":
        previous, created = previous_status(manifest), _created(manifest)
        backend = choose_backend(run, there.served, {one["kind"] for one in there.objects})
        facts = there.observe(now)
        size = checkpoint_bytes(facts) or previous.checkpoint_bytes or 0
        children = plan(run, backend or BACKENDS[0], size)
        used = gpu_usage.count(children, pods_by_stage(there.pods, there.gone, now), previous, now)
        limit = exceeded(run, children, facts, gpu_usage.total(used), now - created)
        enough = retries.enough(facts.values(), previous, run.spec.retries)
        actions = decide(children, facts, stop=run.spec.suspend or limit is not None, enough=enough)
        actions += replacements(facts, run.spec.replace_lost_pods_after_seconds, now)
        return cls(run, there, previous, created, now, backend, children, used, limit, actions, size)

    @property
    def starts(self) -> bool:
        return any(isinstance(action, Start) for action in self.actions)

    @property
    def ready(self) -> datetime:
        """Since when the next stage could have begun."""
        ends = [one.end for one in self.there.observe(self.now).values() if one.fate is Fate.SUCCEEDED and one.end]
        return max([self.created, *ends])

    def status(self, board: Board, trouble: render.Trouble | None, stalled_after: timedelta) -> CGDRunStatus:
        """Of what is there now."""
        seen = render.Seen(
            run=self.run,
            children=self.children,
            facts=self.there.observe(self.now),
            used=self.used,
            progress=lambda stage: board.of(self.run.uid, stage),
            previous=self.previous,
            now=self.now,
            trouble=self.limit or trouble,
            stalled_after=stalled_after,
            checkpoint_bytes=self.checkpoint_bytes,
        )
        return render.render(seen)


@dataclass
class Reconciler:
    """Brings runs one step on."""

    cluster: Cluster
    release: manifests.Release
    board: Board
    key: bytes
    """Signs the progress tokens."""
    departed: Departed = field(default_factory=Departed)
    rehearse_pods: bool = True
    """Whether the operator may create pods, which it does as a dry run alone."""
    stalled_after: timedelta = render.STALLED_AFTER
    _equipped: set[str] = field(default_factory=set)
    """Runs that have the tokens of our key."""
    _absent: dict[Kind, float] = field(default_factory=dict)
    """When the cluster was found not to serve a kind, on the monotonic clock."""

    def __post_init__(self) -> None:
        self.release = replace(self.release, key_id=key_id(self.key))

    async def reconcile(self, namespace: str, name: str, reading: Reading | None = None) -> float | None:
        """Look, decide, act, tell. Every step may be repeated, or be the last before the operator is killed.

        Args:
            reading: what a sweep has read of the run a moment ago; None: it is read now.

        Returns:
            Seconds after which to look again, if something is left to be told.
        """
        manifest = reading.manifest if reading else await self.cluster.get(RUN, name, namespace)
        if manifest is None:
            return None
        if "deletionTimestamp" in manifest["metadata"]:
            self.board.forget(manifest["metadata"]["uid"])
            return await self._clean(manifest, datetime.now(UTC))
        await self._finalize(manifest, wanted=manifest["spec"].get("deletionPolicy") == "Delete")
        previous, now = previous_status(manifest), datetime.now(UTC)
        generation = manifest["metadata"]["generation"]
        if _settled(manifest):
            self.departed.told(uid := manifest["metadata"]["uid"], self.departed.of(uid))
            if previous.observed_generation not in (0, generation):  # 0: what is there cannot be read, and stays
                await self._tell(manifest, render.acknowledged(previous, generation), ())
            await self._expire(manifest, previous, now)
            return None
        try:
            run = Run.of(manifest)
        except InvalidRun as error:
            new = render.refused(generation, str(error), previous, now)
            await self._tell(manifest, new, [events.refusal(manifest, str(error), now)])
            return None
        there = reading.children if reading else (await self.look(namespace, {run.uid: namespace}))[run.uid]
        return await self._reconcile(View.of(run, manifest, there, now), manifest)

    async def _reconcile(self, view: View, manifest: Object) -> float | None:
        run, previous, now = view.run, view.previous, view.now
        trouble: render.Trouble | None = None
        if view.backend is None and view.starts:
            trouble = render.Trouble("TrainingBackendMissing", INSTALL[run.spec.training.backend])
        else:
            refusal = await self._rehearse(view) if view.starts and not view.there.objects else None
            trouble = refusal or await self._act(view)
        self.board.expect(run.uid, _under_way(view))
        if view.starts and not trouble and previous.observed_generation == run.generation:
            return SETTLE_SECONDS
        new = view.status(self.board, trouble, self.stalled_after)
        if await self._tell(manifest, new, events.transitions(run, previous, new, now)):
            self.departed.told(run.uid, view.there.gone)
            _measure(previous, new)
        if new.state in ENDED:
            self.board.forget(run.uid)
        await self._expire(manifest, new, now)
        if trouble and trouble.reason == WEBHOOK_DOWN.reason:
            return SETTLE_SECONDS
        podless = any(stage.reason == "NoPods" for stage in new.stages)
        return QUIET.total_seconds() + 1 if podless else None  # by then Events say why

    def behind(self, manifest: Object, there: Children) -> Literal["", "in telling", "in acting"]:
        """In what a run is behind: whether a look would do something, or have something to tell. How far a stage is
        does not count: for that its reports come, no more often than the operator can write."""
        if "deletionTimestamp" in manifest["metadata"]:
            self.board.forget(manifest["metadata"]["uid"])
            return "in acting"
        previous, now, generation = previous_status(manifest), datetime.now(UTC), manifest["metadata"]["generation"]
        if _settled(manifest):
            return "" if at_rest(manifest, now) else "in telling"
        try:
            run = Run.of(manifest)
        except InvalidRun:
            late = previous.state != "Refused" or previous.observed_generation != generation
            return "in telling" if late else ""
        view = View.of(run, manifest, there, now)
        if view.actions:
            self.board.expect(run.uid, _under_way(view))
            return "in acting"
        new = view.status(self.board, None, self.stalled_after)
        self.board.expect(run.uid, {} if new.state in ENDED else _under_way(view))
        late = _says_more(_body(new), manifest, without=COUNTS) or expired(_ttl(manifest), new, now)
        return "in telling" if late else ""

    def known(self) -> set[str]:
        """The uids of the runs of which something is in memory."""
        return {*self.board.runs, *self.board.allowances, *self.departed.runs, *self._equipped}

    def forget(self, uid: str) -> None:
        """The run is through, or is not there any more."""
        self.board.forget(uid)
        self.departed.runs.pop(uid, None)
        self._equipped.discard(uid)

    async def _expire(self, manifest: Object, new: CGDRunStatus, now: datetime) -> None:
        """Delete the run when it ended long enough ago; its children go with it."""
        ttl, meta = _ttl(manifest), manifest["metadata"]
        if ttl is None or not expired(ttl, new, now):
            return
        await self._announce([events.expiry(manifest, ttl, now)])
        unchanged = {"uid": meta["uid"], "version": meta["resourceVersion"]}  # somebody may have given it more time
        await self.cluster.delete(RUN, meta["name"], meta["namespace"], **unchanged)
        log.info("%s/%s: deleted %d s after it ended", meta["namespace"], meta["name"], ttl)

    async def _clean(self, manifest: Object, now: datetime) -> float | None:
        """Bring the deletion of a run with `deletionPolicy: Delete` one step on: its children go, then a Job deletes
        what they stored, then the run may go. Whatever fails, the run goes after `CLEAN_SECONDS`."""
        if manifests.FINALIZER not in manifest["metadata"].get("finalizers", []):
            return None
        meta = manifest["metadata"]
        there = (await self.look(meta["namespace"], {meta["uid"]: meta["namespace"]}))[meta["uid"]]
        try:
            run = Run.of(manifest)
        except InvalidRun as error:
            # A newer operator may have accepted it, and started something.
            started = bool(there.objects or manifest.get("status", {}).get("stages"))
            readable = Run.readable(manifest)
            if not started or readable is None:
                if started:
                    await self._announce([events.cleaned(manifest, _unreadable(manifest, error), now)])
                await self._finalize(manifest, wanted=False)
                return None
            run = readable
        jobs = [one for one in there.objects if one["metadata"]["labels"].get(manifests.STAGE_LABEL) == CLEAN]
        children = [one for one in there.objects if one not in jobs]
        deleted = datetime.fromisoformat(manifest["metadata"]["deletionTimestamp"])
        left, trouble = CLEAN_SECONDS - (now - deleted).total_seconds(), None
        facts = there.observe(now).get(CLEAN)
        if facts and facts.fate in (Fate.SUCCEEDED, Fate.FAILED):
            trouble = facts.message if facts.fate is Fate.FAILED else ""
        elif left < 0:
            trouble = f"it took more than {CLEAN_SECONDS} s; {facts.message if facts else 'pods of the run still run'}"
        elif children:
            await self._delete(children)
        elif not jobs and not there.pods:
            trouble = await self._start_cleaning(run)
        if trouble is not None:
            await self._announce([events.cleaned(manifest, trouble, now)])
            await self._delete(there.objects)
            await self._finalize(manifest, wanted=False)
            log.info("%s/%s: %s", run.namespace, run.name, trouble or "what it stored is deleted")
        return max(left, 0) + 1 if trouble is None else None

    async def _delete(self, objects: Iterable[Object]) -> None:
        for one in objects:
            meta = one["metadata"]
            if "deletionTimestamp" not in meta:
                kind = manifests.KINDS[one["kind"]]
                await self.cluster.delete(kind, meta["name"], meta["namespace"], uid=meta["uid"])

    async def _start_cleaning(self, run: Run) -> str | None:
        """Create the Job that deletes what the run has stored; why there can be none, such as a namespace that goes."""
        child = cleaning(run)
        try:
            await self.cluster.create(JOB, manifests.cleaning_job(run, child, self.release))
        except AlreadyExists:
            return None
        except ApiError as error:
            if error.status not in (400, 403, 404, 422):
                raise
            return f"the API server refused the Job for it: {error.message}"
        log.info("%s/%s: %s deletes what it stored", run.namespace, run.name, child.name)
        return None

    async def _finalize(self, manifest: Object, *, wanted: bool) -> None:
        """Have our finalizer on the run, or not. Of a run that has changed meanwhile, the next look takes care."""
        meta = manifest["metadata"]
        others = [one for one in meta.get("finalizers", []) if one != manifests.FINALIZER]
        if wanted != (manifests.FINALIZER in meta.get("finalizers", [])):
            finalizers = [*others, manifests.FINALIZER] if wanted else others
            body = {"metadata": {"resourceVersion": meta["resourceVersion"], "finalizers": finalizers}}
            patched = await self.cluster.patch(RUN, meta["name"], meta["namespace"], body)
            manifest["metadata"] = patched["metadata"] if patched else meta

    async def look(self, namespace: str | None, homes: Mapping[str, str]) -> dict[str, Children]:
        """What there is of some runs, by their uids, in a namespace or (None) in all.

        Args:
            homes: the runs' namespaces by their uids. Labels are anybody's to write: nothing elsewhere is of a run.
        """
        labels = one_of(manifests.UID_LABEL, homes)
        served = (self._list_if_served(manifests.KINDS[kind], namespace, labels) for kind in BACKENDS)
        (jobs, _), (pods, _), lists = await asyncio.gather(
            self.cluster.list(JOB, namespace, labels=labels),
            self.cluster.list(POD, namespace, labels=labels),
            asyncio.gather(*served),
        )
        trainings = {kind: found for kind, found in zip(BACKENDS, lists, strict=True) if found is not None}
        objects = [*jobs, *(one for found in trainings.values() for one in found)]
        objects, pods = ([one for one in found if _home(one) == homes[_run_uid(one)]] for found in (objects, pods))
        workloads: list[Object] = []
        if owners := queued(objects):
            owned = one_of(JOB_UID_LABEL, owners)
            workloads = await self._workloads(namespace, owned)
        run_of = {one["metadata"]["uid"]: _run_uid(one) for one in objects}
        there = {uid: Children([], [], tuple(trainings), [], self.departed.of(uid)) for uid in homes}
        for one in objects:
            there[_run_uid(one)].objects.append(one)
        for pod in pods:
            children = there[_run_uid(pod)]
            if not any(one.pod.uid == pod["metadata"]["uid"] for one in children.gone):  # the list is older
                children.pods.append(pod)
        for one in workloads:
            uid = run_of[one["metadata"]["labels"][JOB_UID_LABEL]]
            if _home(one) == homes[uid]:
                there[uid].workloads.append(one)
        await self._ask_events(there.values())
        return there

    async def _ask_events(self, there: Iterable[Children]) -> None:
        """Read the Events that may say why pods are missing or do not start: few lists, however many children."""
        now = datetime.now(UTC)
        wanted = [(one, questions) for one in there if (questions := {*unexplained(one.objects, one.pods, now)})]
        answers: dict[tuple[str, str], list[Object]] = {}
        for namespace, fields in sorted({question for _, questions in wanted for question in questions}):
            try:
                answers[namespace, fields] = (await self.cluster.list(EVENT, namespace, fields=fields))[0]
            except ApiError as error:  # what they would say is a courtesy
                log.warning("events in %s were not read: %s", namespace, error)
        for children, questions in wanted:
            names = {one["metadata"]["name"] for one in (*children.objects, *children.pods)}
            names |= {f"{one['metadata']['name']}-node-0" for one in children.objects}  # the Job of a TrainJob's JobSet
            found = [event for one in questions for event in answers.get(one, ())]
            children.events = [event for event in found if event["involvedObject"].get("name") in names]

    async def _workloads(self, namespace: str | None, labels: str) -> list[Object]:
        for kind in WORKLOADS:
            if (found := await self._list_if_served(kind, namespace, labels)) is not None:
                return found
        return []

    async def _list_if_served(self, kind: Kind, namespace: str | None, labels: str) -> list[Object] | None:
        """The objects, None when the cluster does not serve the kind."""
        if time.monotonic() - self._absent.get(kind, -ABSENT_SECONDS) < ABSENT_SECONDS:
            return None
        try:
            return (await self.cluster.list(kind, namespace, labels=labels))[0]
        except ApiError as error:
            if error.status != 404:
                raise
            self._absent[kind] = time.monotonic()
            return None

    async def _rehearse(self, view: View) -> render.Trouble | None:
        """Before the first child of a run is made, have the API server judge what its children will be: what it would
        refuse, with its quotas, limits and policies, must not be found out when the teacher's GPUs were used. Whatever
        may pass, such as a quota that is used up now, is met again when the child is made."""
        alike: dict[tuple[str, ...], Child] = {}
        for child in view.children:
            alike.setdefault((child.pool, child.image, child.kind, str(child.gpus)), child)
        for child in alike.values():
            for kind, body in manifests.rehearsals(view.run, child, self.release, pods=self.rehearse_pods):
                try:
                    await self.cluster.create(kind, body, dry_run=True)
                except ApiError as error:
                    verdict = judge(error.message)
                    unable = kind is POD and verdict is NO_RIGHT
                    if error.status in (400, 403, 422) and not verdict.passing and not unable:
                        return _refused(child, error, view, kind)
                    log.info("%s/%s: %s was not judged: %s", view.run.namespace, view.run.name, child.stage, error)
        return None

    async def _act(self, view: View) -> render.Trouble | None:
        """Carry the actions out; the objects they make or change are put in what there is."""
        run, there = view.run, view.there
        await self._equip(view)
        for action in view.actions:
            try:
                match action:
                    case Start(child):
                        await self._start(run, child, there)
                    case Hold(facts):
                        await self._suspend(run, facts, True, there)
                    case Resume(facts):
                        await self._suspend(run, facts, False, there)
                    case GiveUp(facts, why):
                        log.info("%s/%s: gave %s up: %s", run.namespace, run.name, facts.name, why)
                        await self._change(run, facts, manifests.giving_up(why), there)
                    case Replace(stage, pod):
                        await self._replace(run, stage, pod, there)
            except ApiError as error:
                if error.status not in (400, 403, 404, 422) and judge(error.message) is not WEBHOOK_DOWN:
                    raise
                if isinstance(action, Replace):
                    return _not_replaced(action, error)
                return _refused(action.child if isinstance(action, Start) else action.facts, error, view)
        return None

    async def _equip(self, view: View) -> None:
        """Give the run its progress tokens, before the first child that this process starts. They are in a Secret for
        each key: the operator may create Secrets, and can neither read nor change one."""
        run = view.run
        if run.uid in self._equipped or not view.starts:
            return
        tokens: dict[str, str] = {
            child.stage: token(self.key, run.namespace, run.name, run.uid, child.stage) for child in view.children
        }
        try:
            await self.cluster.create(SECRET, manifests.progress_secret(run, tokens, self.release))
        except AlreadyExists:  # from a process before this one that had the same key
            log.debug("%s/%s: its tokens are there", run.namespace, run.name)
        except ApiError as error:
            if error.status not in (400, 403, 404, 422):
                raise
            log.warning(
                "%s/%s: its progress is not shown, as its Secret is refused: %s", run.namespace, run.name, error
            )
            return
        self._equipped.add(run.uid)

    async def _start(self, run: Run, child: Child, there: Children) -> None:
        kind, body = manifests.KINDS[child.kind], manifests.manifest(run, child, self.release)
        if child.kind == "TrainJob":
            await self.cluster.apply(TRAININGRUNTIME, manifests.training_runtime(run, child, self.release))
        try:
            there.objects.append(await self.cluster.create(kind, body))
            log.info("%s/%s: started %s (%s)", run.namespace, run.name, child.stage, child.name)
        except AlreadyExists:
            if found := await self.cluster.get(kind, child.name, run.namespace):
                there.objects.append(found)

    async def _suspend(self, run: Run, facts: ChildFacts, suspend: bool, there: Children) -> None:
        """Hold a child or let it go: where Kueue has it, by its Workload, else by itself."""
        if facts.workload and (suspend or not facts.held):
            served = next(kind for kind in WORKLOADS if kind.api_version == facts.workload.api_version)
            body = workload_suspension(suspend)
            patched = await self.cluster.patch(served, facts.workload.name, run.namespace, body)
            there.workloads[:] = _replaced(there.workloads, patched)
            return
        note = {SUSPENDED_BY_RUN: "true" if suspend else None}
        suspension = manifests.suspension(facts.kind, suspend)
        await self._change(run, facts, {"metadata": {"annotations": note}, "spec": suspension}, there)

    async def _change(self, run: Run, facts: ChildFacts, patch: Object, there: Children) -> None:
        patched = await self.cluster.patch(manifests.KINDS[facts.kind], facts.name, run.namespace, patch)
        there.objects[:] = _replaced(there.objects, patched)

    async def _replace(self, run: Run, stage: str, pod: PodFacts, there: Children) -> None:
        """What the cluster's own pod garbage collector does when it knows that a node is out of service. The Job
        controller holds a pod until it has failed, and counts no failure of one that was disrupted."""
        now = datetime.now(UTC)
        body = manifests.disruption(next(one for one in there.pods if one["metadata"]["uid"] == pod.uid), now)
        await self.cluster.delete(POD, pod.name, run.namespace, uid=pod.uid, grace=0)
        try:
            await self.cluster.patch(POD, pod.name, run.namespace, body, subresource="status")
        except ApiError as error:
            if error.status not in (409, 422):  # a pod of the same name has another uid: this one is gone already
                raise
        await self._announce([events.replaced(run, stage, pod, now)])
        log.info("%s/%s: pod %s of the lost node %s is replaced", run.namespace, run.name, pod.name, pod.node)

    async def _tell(self, manifest: Object, new: CGDRunStatus, news: Iterable[Object]) -> bool:
        """Write the status if it says more, and nobody has changed the run since it was read: what was read may have
        been old already. Whether it said more. Events go first: their names make them safe to post again, and a status
        that was written is no reason for news any more."""
        body = _body(new)
        if not _says_more(body, manifest):
            return False
        await self._announce(news)
        meta = {key: manifest["metadata"][key] for key in ("namespace", "name", "uid", "resourceVersion")}
        try:
            applied = await self.cluster.apply(RUN, {"metadata": meta, "status": body}, subresource="status")
            manifest["metadata"] = applied["metadata"]
        except ApiError as error:
            if error.status != 404:  # deleted meanwhile
                raise
        return True

    async def _announce(self, bodies: Iterable[Object]) -> None:
        for body in bodies:
            try:
                await self.cluster.create(EVENT, body)
            except AlreadyExists:
                continue
            except ApiError as error:  # an Event is a courtesy: never the reason why a run stands still
                log.warning("event %s was not posted: %s", body["reason"], error)


def _unreadable(manifest: Object, error: InvalidRun) -> str:
    """Why nothing of a run was deleted whose storage cannot be read, and what stays."""
    stages = manifest.get("status", {}).get("stages", [])
    places = [stage["outputURI"] for stage in stages if stage.get("outputURI")]
    stays = f"; what stays: {', '.join(places)}" if places else ""
    return f"this version of the operator cannot read its spec.storage, delete it by hand{stays} ({error})"


def _refused(child: Child | ChildFacts, error: ApiError, view: View, kind: Kind | None = None) -> render.Trouble:
    """What is told of a refusal. What somebody can put right beside the run, such as an absent ServiceAccount, may be
    on its way, and alarms nobody at once."""
    verdict, words = judge(error.message), explain(error.message)
    if verdict.passing:
        return render.Trouble(verdict.reason, f"the child of stage {child.stage} cannot be made: {words}", since=None)
    told = f"the API server refused the child of stage {child.stage}: {words}"
    if kind is POD and verdict in (OTHER, POLICY):
        told += (
            "; if it is refused only because the operator tries it as a pod of its own, set rehearsal.pods=false in "
        )
        told += "the operator's chart"
    final = verdict is OTHER and error.status in (400, 422)
    return render.Trouble("ChildRefused", told, since=LONG_AGO if final else view.ready)


def _not_replaced(action: Replace, error: ApiError) -> render.Trouble:
    told = f"pod {action.pod.name} of stage {action.stage} is on a lost node and cannot be replaced: {error.message}"
    return render.Trouble("NodeLost", f"{told}; lostPods.replace=true in the operator's chart gives it the right")


def _under_way(view: View) -> dict[str, tuple[tuple[str, ...], int]]:
    """The children that are there and have not ended, as `Board.expect` takes them."""
    there = {one["metadata"]["labels"].get(manifests.STAGE_LABEL) for one in view.there.objects if not has_ended(one)}
    return {child.stage: (child.stages, child.pods) for child in view.children if child.stage in there}


def _replaced(objects: Iterable[Object], new: Object | None) -> list[Object]:
    """The objects, with the new state of one of them; none: it is gone, which a later look tells."""
    uid = new["metadata"]["uid"] if new else ""
    return [new if new and one["metadata"]["uid"] == uid else one for one in objects]


def _home(thing: Object) -> str:
    return str(thing["metadata"]["namespace"])


def _run_uid(thing: Object) -> str:
    return str(thing["metadata"]["labels"][manifests.UID_LABEL])


def _body(new: CGDRunStatus) -> Object:
    return new.model_dump(by_alias=True, exclude_none=True, mode="json")


def _says_more(body: Object, manifest: Object, *, without: Collection[str] = ()) -> bool:
    """Whether a status differs from that which is there by more than these fields, and GPU time, which grows by
    itself."""
    unasked = (*GPU_TIME, *without)
    return _only(body, unasked) != _only(manifest.get("status", {}), unasked)


def _only(body: Object, unasked: Collection[str]) -> Object:
    stages = [_less(stage, unasked) for stage in body.get("stages", [])]
    rest = _less(body, ("stages", "usage", *unasked))
    return rest | {"stages": stages, "tokens": body.get("usage", {}).get("tokens")}


def _less(part: Object, names: Collection[str]) -> Object:
    return {name: value for name, value in part.items() if name not in names}


def _measure(previous: CGDRunStatus, new: CGDRunStatus) -> None:
    """Count the stages that have ended since the previous status."""
    before = {stage.name: stage.state for stage in previous.stages}
    for stage in new.stages:
        ended = stage.state in ("Succeeded", "Failed") and before.get(stage.name) != stage.state
        if ended and stage.start_time and stage.completion_time:
            seconds = render.seconds_between(stage.start_time, stage.completion_time)
            metrics.STAGE_SECONDS.labels(stage.name.kind, stage.state).observe(seconds)


def _created(manifest: Object) -> datetime:
    return datetime.fromisoformat(manifest["metadata"]["creationTimestamp"])


def _settled(manifest: Object) -> bool:
    """A run that has succeeded stays so, even when somebody cleans up its Jobs: the one fact that is read back."""
    conditions = manifest.get("status", {}).get("conditions", [])
    return any(one["type"] == "Succeeded" and one["status"] == "True" for one in conditions)


def at_rest(manifest: Object, now: datetime) -> bool:
    """A settled run whose time to live is not over, and of which all changes are known: only an event can make it worth
    a look."""
    meta = manifest["metadata"]
    if "deletionTimestamp" in meta or not _settled(manifest):
        return False
    previous = previous_status(manifest)
    is_known = previous.observed_generation in (0, meta["generation"])
    return is_known and _has_its_finalizer(manifest) and not expired(_ttl(manifest), previous, now)


def _has_its_finalizer(manifest: Object) -> bool:
    """Whether the finalizer is there, or not, as the run's deletionPolicy wants it."""
    wanted: bool = manifest["spec"].get("deletionPolicy") == "Delete"
    return wanted == (manifests.FINALIZER in manifest["metadata"].get("finalizers", []))


def _ttl(manifest: Object) -> int | None:
    ttl: int | None = manifest["spec"].get("ttlSecondsAfterFinished")
    return ttl


def previous_status(manifest: Object) -> CGDRunStatus:
    """The status as it was written last; what another version of the operator wrote there and this one does not know is
    left out."""
    try:
        return CGDRunStatus.model_validate(manifest.get("status") or {}, extra="ignore")
    except ValidationError:  # of another version of the operator: GPU seconds of pods that are gone are lost with it
        return CGDRunStatus()
