"""The reconcile loop: look at a run and its children, decide, act, write the status once.

Level-based: a reconcile starts from what exists and needs nothing that an earlier one remembered. Watch events only say
that it is time to look; a sweep over all runs every 30 seconds looks when no event came.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from cgd_operator import events, manifests, metrics, status, usage
from cgd_operator.api.spec import InvalidRun
from cgd_operator.api.status import CGDRunStatus
from cgd_operator.cluster import (
    EVENT,
    JOB,
    POD,
    RUN,
    SECRET,
    TRAININGRUNTIME,
    WORKLOAD,
    AlreadyExists,
    ApiError,
    Cluster,
    Kind,
)
from cgd_operator.decide import Action, Hold, Resume, Start, decide
from cgd_operator.health import Health
from cgd_operator.limits import exceeded, expired
from cgd_operator.observe import ChildFacts, Fate, observe, queued
from cgd_operator.plan import BACKENDS, CLEAN, Backend, Child, Run, choose_backend, cleaning, plan
from cgd_operator.progress import Board, token
from cgd_operator.queues import JOB_UID_LABEL, SUSPENDED_BY_RUN, workload_suspension

log = logging.getLogger(__name__)

Object = dict[str, Any]

SWEEP_SECONDS = 30.0
PROGRESS_SECONDS = 2.0
RETRY_SECONDS = 2.0
PAUSE_SECONDS = 0.1
AT_ONCE = 16
CLEAN_SECONDS = 1800
"""A deleted run stays at most so long for what it stored to be deleted."""

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

    def observe(self) -> dict[str, ChildFacts]:
        return observe(self.objects, self.pods, self.workloads)


@dataclass
class Reconciler:
    """Reconciles every run that it is poked about, one at a time for each run, `AT_ONCE` at a time in all."""

    cluster: Cluster
    release: manifests.Release
    board: Board
    key: bytes
    """Signs the progress tokens."""
    namespaces: tuple[str, ...] = ()
    """Watched namespaces; none: all."""
    health: Health = field(default_factory=Health)
    _dirty: set[tuple[str, str]] = field(default_factory=set)
    _progressed: set[tuple[str, str]] = field(default_factory=set)
    _tasks: dict[tuple[str, str], asyncio.Task[None]] = field(default_factory=dict)
    _loops: list[asyncio.Task[None]] = field(default_factory=list)
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    _equipped: set[str] = field(default_factory=set)

    def poke(self, namespace: str, name: str) -> None:
        """Say that a run needs a look, now."""
        key = (namespace, name)
        self._dirty.add(key)
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._drain(key), name=f"reconcile {namespace}/{name}")

    def progressed(self, namespace: str, name: str) -> None:
        """Say that a run's display changed: it is looked at within `PROGRESS_SECONDS`."""
        self._progressed.add((namespace, name))

    def start(self) -> None:
        """Sweep and tick until `stop`."""
        for work in (self._sweep_for_ever(), self._tick_for_ever()):
            self._loops.append(asyncio.create_task(work))

    async def stop(self) -> None:
        """End the loops and the reconciles under way; whatever they left undone is seen at the next start."""
        tasks = [*self._loops, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                await self._sweep()
            except ApiError as error:
                log.warning("sweep failed: %s", error)
            await asyncio.sleep(SWEEP_SECONDS)

    async def _sweep(self) -> None:
        states: Counter[str] = Counter()
        for namespace in self.namespaces or (None,):
            runs, _ = await self.cluster.list(RUN, namespace)
            for run in runs:
                states[run.get("status", {}).get("state") or "New"] += 1
                if not _at_rest(run, datetime.now(UTC)):
                    self.poke(run["metadata"]["namespace"], run["metadata"]["name"])
        metrics.RUNS.clear()
        for state, count in states.items():
            metrics.RUNS.labels(state).set(count)
        self.health.swept()

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            while self._progressed:
                self.poke(*self._progressed.pop())

    async def _drain(self, key: tuple[str, str]) -> None:
        try:
            while key in self._dirty:
                self._dirty.discard(key)
                metrics.QUEUE.set(len(self._tasks))
                async with self._slots:
                    with metrics.RECONCILE_SECONDS.time():
                        await self._guarded(*key)
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            del self._tasks[key]
            metrics.QUEUE.set(len(self._tasks))

    async def _guarded(self, namespace: str, name: str) -> None:
        """One reconcile; an error is logged and the run looked at again, whatever it was."""
        try:
            await self.reconcile(namespace, name)
        except ApiError as error:
            metrics.RECONCILE_ERRORS.labels("api").inc()
            log.warning("%s/%s: %s; looking again in %.0f s", namespace, name, error, RETRY_SECONDS)
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self.poke, namespace, name)
        except Exception:
            metrics.RECONCILE_ERRORS.labels("bug").inc()
            log.exception("%s/%s: reconcile failed; this is a bug of cgd-operator", namespace, name)

    async def reconcile(self, namespace: str, name: str) -> None:
        """Look, decide, act, tell. Every step may be repeated, or be the last before the operator is killed."""
        manifest = await self.cluster.get(RUN, name, namespace)
        if manifest is None:
            return
        if "deletionTimestamp" in manifest["metadata"]:
            await self._clean(manifest, datetime.now(UTC))
            return
        await self._finalize(manifest, wanted=manifest["spec"].get("deletionPolicy") == "Delete")
        previous, now = previous_status(manifest), datetime.now(UTC)
        generation = manifest["metadata"]["generation"]
        if _settled(manifest):
            if previous.observed_generation not in (0, generation):  # 0: what is there cannot be read, and stays
                await self._tell(manifest, status.acknowledged(previous, generation), ())
            await self._expire(manifest, previous, now)
            return
        try:
            run = Run.of(manifest)
        except InvalidRun as error:
            new = status.refused(generation, str(error), previous, now)
            await self._tell(manifest, new, [events.refusal(manifest, str(error), now)])
            return
        await self._reconcile(run, manifest, previous, now)

    async def _reconcile(self, run: Run, manifest: Object, previous: CGDRunStatus, now: datetime) -> None:
        there = await self._look(run)
        backend = choose_backend(run, there.served, {one["kind"] for one in there.objects})
        children = plan(run, backend or BACKENDS[0])
        facts = there.observe()
        used = usage.count(children, facts, previous, now)
        limit = exceeded(run, children, facts, usage.total(used), now - _created(manifest))
        actions = decide(children, facts, stop=run.spec.suspend or limit is not None)
        if backend is None and any(isinstance(action, Start) for action in actions):
            trouble: status.Trouble | None = status.Trouble(
                "TrainingBackendMissing", INSTALL[run.spec.training.backend]
            )
        else:
            trouble = await self._act(run, actions, there)
        seen = status.Seen(
            run=run,
            children=children,
            facts=there.observe(),
            used=used,
            progress=lambda stage: self.board.of(run.uid, stage),
            previous=previous,
            now=now,
            trouble=limit or trouble,
        )
        new = status.render(seen)
        await self._tell(manifest, new, events.transitions(run, previous, new, now))
        _measure(previous, new)
        if new.state in ("Succeeded", "Failed"):
            self.board.forget(run.uid)
        await self._expire(manifest, new, now)

    async def _expire(self, manifest: Object, new: CGDRunStatus, now: datetime) -> None:
        """Delete the run when it ended long enough ago; its children go with it."""
        ttl, meta = _ttl(manifest), manifest["metadata"]
        if ttl is None or not expired(ttl, new, now):
            return
        await self._announce([events.expiry(manifest, ttl, now)])
        await self.cluster.delete(RUN, meta["name"], meta["namespace"], uid=meta["uid"])
        log.info("%s/%s: deleted %d s after it ended", meta["namespace"], meta["name"], ttl)

    async def _clean(self, manifest: Object, now: datetime) -> None:
        """Bring the deletion of a run with `deletionPolicy: Delete` one step on: its children go, then a Job deletes
        what they stored, then the run may go. Whatever fails, the run goes after `CLEAN_SECONDS`."""
        if manifests.FINALIZER not in manifest["metadata"].get("finalizers", []):
            return
        try:
            run = Run.of(manifest)
        except InvalidRun:  # it has never started anything
            await self._finalize(manifest, wanted=False)
            return
        there = await self._look(run)
        jobs = [one for one in there.objects if one["metadata"]["labels"][manifests.STAGE_LABEL] == CLEAN]
        children = [one for one in there.objects if one not in jobs]
        deleted = datetime.fromisoformat(manifest["metadata"]["deletionTimestamp"])
        late, trouble = (now - deleted).total_seconds() > CLEAN_SECONDS, None
        facts = there.observe().get(CLEAN)
        if facts and facts.fate in (Fate.SUCCEEDED, Fate.FAILED):
            trouble = facts.message if facts.fate is Fate.FAILED else ""
        elif late:
            trouble = f"it took more than {CLEAN_SECONDS} s; {facts.message if facts else 'pods of the run still run'}"
        elif children:
            await self._delete(children)
        elif not jobs and not there.pods:
            trouble = await self._start_cleaning(run)
        if trouble is not None:
            await self._announce([events.cleaned(manifest, trouble, now)])
            await self._delete(jobs)
            await self._finalize(manifest, wanted=False)
            log.info("%s/%s: %s", run.namespace, run.name, trouble or "what it stored is deleted")

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

    async def _look(self, run: Run) -> Children:
        labels = f"{manifests.UID_LABEL}={run.uid}"
        jobs, _ = await self.cluster.list(JOB, run.namespace, labels=labels)
        pods, _ = await self.cluster.list(POD, run.namespace, labels=labels)
        there = Children(jobs, pods, (), [])
        for backend in BACKENDS:
            trainings = await self._list_if_served(manifests.KINDS[backend], run.namespace, labels)
            if trainings is not None:
                there.objects += trainings
                there.served += (backend,)
        if uids := queued(there.objects):
            owned = f"{JOB_UID_LABEL} in ({','.join(uids)})"
            there.workloads += await self._list_if_served(WORKLOAD, run.namespace, owned) or []
        return there

    async def _list_if_served(self, kind: Kind, namespace: str, labels: str) -> list[Object] | None:
        """The objects, None when the cluster does not serve the kind."""
        try:
            return (await self.cluster.list(kind, namespace, labels=labels))[0]
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    async def _act(self, run: Run, actions: tuple[Action, ...], there: Children) -> status.Trouble | None:
        """Carry the actions out; the objects they make or change are put in `there`."""
        await self._equip(run, actions)
        for action in actions:
            try:
                match action:
                    case Start(child):
                        await self._start(run, child, there)
                    case Hold(facts):
                        await self._suspend(run, facts, True, there)
                    case Resume(facts):
                        await self._suspend(run, facts, False, there)
            except ApiError as error:
                if error.status not in (400, 403, 404, 422):
                    raise
                return status.Trouble("ChildRefused", f"the API server refused a child: {error.message}")
        return None

    async def _equip(self, run: Run, actions: tuple[Action, ...]) -> None:
        """Give the run its progress tokens, once in this process: its key may differ from the last one's."""
        if run.uid in self._equipped or not any(isinstance(action, Start) for action in actions):
            return
        tokens = {child.stage: token(self.key, run.uid, child.stage) for child in plan(run)}
        await self.cluster.apply(SECRET, manifests.progress_secret(run, tokens))
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
            body = workload_suspension(suspend)
            patched = await self.cluster.patch(WORKLOAD, facts.workload.name, run.namespace, body)
            there.workloads[:] = _replaced(there.workloads, patched)
            return
        kind: Kind = manifests.KINDS[facts.kind]
        note = {SUSPENDED_BY_RUN: "true" if suspend else None}
        patched = await self.cluster.patch(
            kind,
            facts.name,
            run.namespace,
            {"metadata": {"annotations": note}, "spec": manifests.suspension(facts.kind, suspend)},
        )
        there.objects[:] = _replaced(there.objects, patched)

    async def _tell(self, manifest: Object, new: CGDRunStatus, news: Iterable[Object]) -> None:
        """Write the status if it changed, and nobody has changed the run since it was read: what was read may have been
        old already. Events go first: their names make them safe to post again, and a status that was written is no
        reason for news any more."""
        body = new.model_dump(by_alias=True, exclude_none=True, mode="json")
        if body == manifest.get("status"):
            return
        await self._announce(news)
        meta = {key: manifest["metadata"][key] for key in ("namespace", "name", "uid", "resourceVersion")}
        try:
            await self.cluster.apply(RUN, {"metadata": meta, "status": body}, subresource="status")
        except ApiError as error:
            if error.status != 404:  # deleted meanwhile
                raise

    async def _announce(self, bodies: Iterable[Object]) -> None:
        for body in bodies:
            try:
                await self.cluster.create(EVENT, body)
            except AlreadyExists:
                continue
            except ApiError as error:  # an Event is a courtesy: never the reason why a run stands still
                log.warning("event %s was not posted: %s", body["reason"], error)


def _replaced(objects: Iterable[Object], new: Object | None) -> list[Object]:
    """The objects, with the new state of one of them; none: it is gone, which a later look tells."""
    uid = new["metadata"]["uid"] if new else ""
    return [new if new and one["metadata"]["uid"] == uid else one for one in objects]


def _measure(previous: CGDRunStatus, new: CGDRunStatus) -> None:
    """Count the stages that have ended since the previous status."""
    before = {stage.name: stage.state for stage in previous.stages}
    for stage in new.stages:
        ended = stage.state in ("Succeeded", "Failed") and before.get(stage.name) != stage.state
        if ended and stage.start_time and stage.completion_time:
            kind = stage.name.partition("-")[0]
            seconds = _seconds(stage.start_time, stage.completion_time)
            metrics.STAGE_SECONDS.labels(kind, stage.state).observe(seconds)


def _seconds(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def _created(manifest: Object) -> datetime:
    return datetime.fromisoformat(manifest["metadata"]["creationTimestamp"])


def _settled(manifest: Object) -> bool:
    """A run that has succeeded stays so, even when somebody cleans up its Jobs: the one fact that is read back."""
    conditions = manifest.get("status", {}).get("conditions", [])
    return any(one["type"] == "Succeeded" and one["status"] == "True" for one in conditions)


def _at_rest(manifest: Object, now: datetime) -> bool:
    """A settled run whose time to live is not over: only an event can make it worth a look."""
    if "deletionTimestamp" in manifest["metadata"]:
        return False
    return _settled(manifest) and not expired(_ttl(manifest), previous_status(manifest), now)


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
