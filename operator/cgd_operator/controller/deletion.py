"""The end of a run: its finalizer, the deletion of its stored data, and its own deletion when its TTL is over."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cgd_operator.api.spec import InvalidRun
from cgd_operator.api.status import CGDRunStatus
from cgd_operator.controller.children import ChildReader, RunObjects
from cgd_operator.controller.telling import Teller
from cgd_operator.facts.children import Fate
from cgd_operator.facts.due import applied_by, is_over, ttl, wants_finalizer
from cgd_operator.facts.pods import stage_of
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import JOB, RUN, AlreadyExists, ApiError
from cgd_operator.planning.dag import CLEAN, Run, cleaning
from cgd_operator.planning.manifests import FINALIZER, KINDS, Release, cleaning_job
from cgd_operator.status import events

log = logging.getLogger(__name__)

Object = dict[str, Any]

CLEAN_SECONDS = 1800
"""The longest that a deleted run waits for its stored data to be deleted."""


@dataclass(frozen=True)
class Deletion:
    cluster: Cluster
    release: Release
    reader: ChildReader
    teller: Teller

    async def finalize(self, manifest: Object, *, wanted: bool) -> None:
        """Add or remove our finalizer. If the run has changed meanwhile, the next reconcile does it."""
        meta = manifest["metadata"]
        others = [finalizer for finalizer in meta.get("finalizers", []) if finalizer != FINALIZER]
        if wanted != (FINALIZER in meta.get("finalizers", [])):
            finalizers = [*others, FINALIZER] if wanted else others
            body = {"metadata": {"resourceVersion": meta["resourceVersion"], "finalizers": finalizers}}
            patched = await self.cluster.patch(RUN, meta["name"], meta["namespace"], body)
            manifest["metadata"] = patched["metadata"] if patched else meta

    async def expire(self, manifest: Object, status: CGDRunStatus, now: datetime) -> None:
        """Delete the run if its TTL is over; its children are garbage collected. A run that a tool would make again
        stays with its status, by which it is left alone, and its children are deleted."""
        seconds, meta = ttl(manifest), manifest["metadata"]
        if seconds is None or not is_over(manifest, status, now):
            return
        tool = applied_by(manifest)
        if tool:
            objects = (await self.reader.read(meta["namespace"], {meta["uid"]: meta["namespace"]}))[meta["uid"]]
            await self._delete(objects.children)
            settled = status.model_copy(update={"children_deleted": True})
            await self.teller.tell(manifest, settled, [events.expiry(manifest, seconds, now, tool)])
            log.info("%s/%s: its children are deleted %d s after it ended", meta["namespace"], meta["name"], seconds)
            return
        await self.teller.announce([events.expiry(manifest, seconds, now)])
        unchanged = {"uid": meta["uid"], "version": meta["resourceVersion"]}  # a user may have raised the TTL
        await self.cluster.delete(RUN, meta["name"], meta["namespace"], **unchanged)
        log.info("%s/%s: deleted %d s after it ended", meta["namespace"], meta["name"], seconds)

    async def clean(self, manifest: Object, now: datetime) -> float | None:
        """Take the deletion of a run with `deletionPolicy: Delete` to its next step: delete its children, start a Job
        that deletes the stored data, remove the finalizer. After `CLEAN_SECONDS` the finalizer is removed in any case;
        at once if the user has changed the policy meanwhile.

        Returns:
            Seconds to the next reconcile, until the finalizer is removed.
        """
        meta = manifest["metadata"]
        objects = (await self.reader.read(meta["namespace"], {meta["uid"]: meta["namespace"]}))[meta["uid"]]
        if not wants_finalizer(manifest):
            await self._let_go(manifest, objects, _kept(objects), now)
            return None
        try:
            run = Run.of(manifest)
        except InvalidRun as error:
            # A newer operator may have accepted the run and started children.
            started = bool(objects.children or manifest.get("status", {}).get("stages"))
            readable = Run.readable(manifest)
            if not started or readable is None:
                if started:
                    await self.teller.announce([events.cleaned(manifest, _unreadable(manifest, error), now)])
                await self.finalize(manifest, wanted=False)
                return None
            run = readable
        jobs = [child for child in objects.children if stage_of(child) == CLEAN]
        others = [child for child in objects.children if stage_of(child) != CLEAN]
        deleted = datetime.fromisoformat(meta["deletionTimestamp"])
        left, trouble = CLEAN_SECONDS - (now - deleted).total_seconds(), None
        facts = objects.observe(now).get(CLEAN)
        if facts and facts.fate in (Fate.SUCCEEDED, Fate.FAILED):
            trouble = facts.message if facts.fate is Fate.FAILED else ""
        elif left < 0:
            trouble = f"it took more than {CLEAN_SECONDS} s; {facts.message if facts else 'pods of the run still run'}"
        elif others:
            await self._delete(others)
        elif not jobs and not objects.pods:
            trouble = await self._start(run)
        if trouble is not None:
            await self._let_go(manifest, objects, trouble, now)
        return max(left, 0) + 1 if trouble is None else None

    async def _let_go(self, manifest: Object, objects: RunObjects, trouble: str, now: datetime) -> None:
        """Say what became of the stored data (`trouble`: why it was not deleted), and let the run be deleted."""
        meta = manifest["metadata"]
        await self.teller.announce([events.cleaned(manifest, trouble, now)])
        await self._delete(objects.children)
        await self.finalize(manifest, wanted=False)
        log.info("%s/%s: %s", meta["namespace"], meta["name"], trouble or "what it stored is deleted")

    async def _delete(self, objects: Iterable[Object]) -> None:
        for item in objects:
            meta = item["metadata"]
            if "deletionTimestamp" not in meta:
                await self.cluster.delete(KINDS[item["kind"]], meta["name"], meta["namespace"], uid=meta["uid"])

    async def _start(self, run: Run) -> str | None:
        """Create the Job that deletes the stored data. Returns why it cannot be created, such as a terminating
        namespace."""
        child = cleaning(run)
        try:
            await self.cluster.create(JOB, cleaning_job(run, child, self.release))
        except AlreadyExists:
            return None
        except ApiError as error:
            if error.status not in (400, 403, 404, 422):
                raise
            return f"the API server refused the Job for it: {error.message}"
        log.info("%s/%s: %s deletes what it stored", run.namespace, run.name, child.name)
        return None


def _kept(objects: RunObjects) -> str:
    """Why the data of a run whose deletionPolicy was changed during its deletion was not deleted."""
    begun = any(stage_of(child) == CLEAN for child in objects.children)
    part = ", but its deletion had begun, so a part may be gone" if begun else ""
    return f"spec.deletionPolicy was changed to Retain after the run was deleted{part}"


def _unreadable(manifest: Object, error: InvalidRun) -> str:
    """Why the data of a run with an unreadable storage was not deleted, and where it is."""
    stages = manifest.get("status", {}).get("stages", [])
    places = [stage["outputURI"] for stage in stages if stage.get("outputURI")]
    stays = f"; what stays: {', '.join(places)}" if places else ""
    return f"this version of the operator cannot read its spec.storage, delete it by hand{stays} ({error})"
