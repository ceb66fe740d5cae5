"""Reads the objects of runs: children, pods, Workloads, and Events that explain why a pod is missing. Keeps the last
state of deleted pods until the status of their run records them."""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cgd_operator.facts.children import ChildFacts, observe, queued, unexplained
from cgd_operator.facts.pods import Gone, last_state
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import EVENT, JOB, JOB_UID_LABEL, POD, WORKLOADS, ApiError, Kind, one_of
from cgd_operator.planning.dag import BACKENDS, Backend
from cgd_operator.planning.manifests import KINDS, UID_LABEL

log = logging.getLogger(__name__)

Object = dict[str, Any]

ABSENT_SECONDS = 30.0
"""A kind that the cluster does not serve is tried again after this time."""
MOST_DEPARTED = 2048
"""The most deleted pods in memory. Beyond that, the pods of the run whose first pod was deleted earliest are
forgotten."""


@dataclass
class Departed:
    """Deleted pods in their last state. Only in memory: an operator that ends loses those that no status records."""

    runs: dict[str, dict[str, Gone]] = field(default_factory=dict)
    """By the uids of run and pod."""

    def add(self, pod: Object, now: datetime) -> None:
        """A watch reports that the pod is deleted; `pod` is its last state."""
        meta = pod["metadata"]
        run = meta["labels"].get(UID_LABEL)
        if run is None:  # the pod has our other labels but is not ours
            return
        self.runs.setdefault(run, {})[meta["uid"]] = last_state(pod, now)
        while sum(map(len, self.runs.values())) > MOST_DEPARTED:
            del self.runs[next(iter(self.runs))]

    def of(self, run: str) -> tuple[Gone, ...]:
        return tuple(self.runs.get(run, {}).values())

    def told(self, run: str, gone: tuple[Gone, ...]) -> None:
        """Forget pods that the run's status now records."""
        left = {uid: pod for uid, pod in self.runs.pop(run, {}).items() if pod not in gone}
        if left:
            self.runs[run] = left


@dataclass
class RunObjects:
    """The objects of a run."""

    children: list[Object]
    pods: list[Object]
    served: tuple[Backend, ...]
    """Kinds of trainings that the cluster knows."""
    workloads: list[Object]
    """Kueue's Workloads of the children that have not ended."""
    gone: tuple[Gone, ...] = ()
    """Deleted pods that the status does not mention yet."""
    events: list[Object] = field(default_factory=list)
    """They explain why pods are missing or do not start."""

    def observe(self, now: datetime) -> dict[str, ChildFacts]:
        return observe(self.children, self.pods, self.workloads, self.events, now, self.gone)


@dataclass
class ChildReader:
    cluster: Cluster
    departed: Departed
    _absent: dict[Kind, float] = field(default_factory=dict)
    """When the cluster last did not serve a kind, on the monotonic clock."""

    async def read(self, namespace: str | None, homes: Mapping[str, str]) -> dict[str, RunObjects]:
        """The objects of some runs by uid, in a namespace or (None) in all.

        Args:
            homes: the runs' namespaces by uid. Anybody may write our labels, so objects in other namespaces are
                ignored.
        """
        (children, served), (pods, _) = await asyncio.gather(
            self._children(namespace, homes),
            self.cluster.list(POD, namespace, labels=one_of(UID_LABEL, homes)),
        )
        runs = {uid: RunObjects(children[uid], [], served, [], self.departed.of(uid)) for uid in homes}
        run_of = {child["metadata"]["uid"]: uid for uid in homes for child in children[uid]}
        for pod in pods:
            own = runs[_run_uid(pod)]
            is_gone = any(gone.pod.uid == pod["metadata"]["uid"] for gone in own.gone)  # an older list
            if _namespace(pod) == homes[_run_uid(pod)] and not is_gone:
                own.pods.append(pod)
        if owners := queued(child for own in runs.values() for child in own.children):
            labels = one_of(JOB_UID_LABEL, owners)
            for kind in WORKLOADS:  # the first version that the cluster serves
                if (workloads := await self._list_if_served(kind, namespace, labels)) is not None:
                    break
            for workload in workloads or ():
                uid = run_of[workload["metadata"]["labels"][JOB_UID_LABEL]]
                if _namespace(workload) == homes[uid]:
                    runs[uid].workloads.append(workload)
        await self._ask_events(runs.values())
        return runs

    async def children(self, namespace: str | None, homes: Mapping[str, str]) -> dict[str, list[Object]]:
        """The Jobs and trainings of some runs by uid; arguments as of `read`."""
        return (await self._children(namespace, homes))[0] if homes else {}

    async def _children(
        self, namespace: str | None, homes: Mapping[str, str]
    ) -> tuple[dict[str, list[Object]], tuple[Backend, ...]]:
        """The Jobs and trainings by the run's uid, and the kinds of trainings that the cluster knows."""
        labels = one_of(UID_LABEL, homes)
        (jobs, _), trainings = await asyncio.gather(
            self.cluster.list(JOB, namespace, labels=labels),
            asyncio.gather(*(self._list_if_served(KINDS[kind], namespace, labels) for kind in BACKENDS)),
        )
        served = tuple(kind for kind, objects in zip(BACKENDS, trainings, strict=True) if objects is not None)
        children: dict[str, list[Object]] = {uid: [] for uid in homes}
        for item in (*jobs, *(training for objects in trainings for training in objects or ())):
            if _namespace(item) == homes[uid := _run_uid(item)]:
                children[uid].append(item)
        return children, served

    async def _ask_events(self, runs: Collection[RunObjects]) -> None:
        """Read the Events that may explain why pods are missing or do not start, with few lists for many children."""
        now = self.cluster.clock.now()
        asked = [(own, {*unexplained(own.children, own.pods, now)}) for own in runs]
        answers: dict[tuple[str, str], list[Object]] = {}
        for namespace, fields in sorted({question for _, questions in asked for question in questions}):
            try:
                answers[namespace, fields] = (await self.cluster.list(EVENT, namespace, fields=fields))[0]
            except ApiError as error:  # a run goes on without this explanation
                log.warning("events in %s were not read: %s", namespace, error)
        for own, questions in asked:
            names = {item["metadata"]["name"] for item in (*own.children, *own.pods)}
            names |= {f"{child['metadata']['name']}-node-0" for child in own.children}  # the Job of a TrainJob's JobSet
            events = (event for question in questions for event in answers.get(question, ()))
            own.events = [event for event in events if event["involvedObject"].get("name") in names]

    async def _list_if_served(self, kind: Kind, namespace: str | None, labels: str) -> list[Object] | None:
        """The objects; None if the cluster does not serve the kind."""
        if time.monotonic() - self._absent.get(kind, -ABSENT_SECONDS) < ABSENT_SECONDS:
            return None
        try:
            return (await self.cluster.list(kind, namespace, labels=labels))[0]
        except ApiError as error:
            if error.status != 404:
                raise
            self._absent[kind] = time.monotonic()
            return None


def _namespace(item: Object) -> str:
    return str(item["metadata"]["namespace"])


def _run_uid(item: Object) -> str:
    return str(item["metadata"]["labels"][UID_LABEL])
