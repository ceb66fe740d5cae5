"""When a run is looked at: at once when its spec changed or a child of it ended, a little later when anything else
happened, and twice a minute in any case.

Nothing depends on an event: a sweep finds every run that there is something to do or to tell about. So a watch that
starts, or starts again, only asks for a sweep.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cgd_operator import metrics
from cgd_operator.controller import children, reconciler
from cgd_operator.controller.reconciler import Reading, Reconciler
from cgd_operator.facts.children import has_ended
from cgd_operator.facts.due import Due, due
from cgd_operator.http.health import Health
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import JOB, POD, PYTORCHJOB, RUN, TRAINJOB, ApiError, Kind
from cgd_operator.planning.manifests import MANAGED_BY, MANAGER, RUN_LABEL, UID_LABEL

log = logging.getLogger(__name__)

SWEEP_SECONDS = 30.0
SWEEP_RATE = 50.0
"""Runs a second that a sweep looks over which nobody asked for: five thousand runs take it 100 s, not a whole core."""
RETRY_SECONDS = 2.0
PAUSE_SECONDS = 0.1
"""Between two looks at a run, and before a sweep that watches ask for: they come in bursts."""
OPENING_SECONDS = 2.0
"""So long the first sweep waits for the watches, so that one will do."""
READING_SECONDS = 5.0
"""A look that begins so soon after a sweep has read its run reads nothing again, if nothing has happened meanwhile."""
READINGS = 64
"""So many are kept at once, for the memory's sake."""
AT_ONCE = 16
CHILDREN = (JOB, PYTORCHJOB, TRAINJOB, POD)
OURS = f"{MANAGED_BY}={MANAGER},{RUN_LABEL}"

Key = tuple[str, str]
"""Namespace and name of a run."""


@dataclass
class Loop:
    """Has the reconciler look at runs, one at a time for each run, `AT_ONCE` at a time in all."""

    reconciler: Reconciler
    namespaces: tuple[str, ...] = ()
    """Watched namespaces; none: all."""
    health: Health = field(default_factory=Health)
    _runs: dict[Key, str] = field(default_factory=dict)
    """The uid of every run that there is, as events and sweeps tell: no other is tried again, or told of its children.
    """
    _first: dict[Key, None] = field(default_factory=dict)
    _waiting: dict[Key, None] = field(default_factory=dict)
    """Runs that need a look, in their order; none of the second while there is one of the first."""
    _readings: dict[Key, tuple[float, Reading]] = field(default_factory=dict)
    """What a sweep has read of runs that wait for a look, and since when, on the monotonic clock."""
    _heard: set[Key] = field(default_factory=set)
    """Runs to which something has happened since the sweep began to read its page."""
    _resting: set[Key] = field(default_factory=set)
    """Runs that were looked at a moment ago."""
    _timers: dict[Key, asyncio.TimerHandle] = field(default_factory=dict)
    _tasks: dict[Key, asyncio.Task[None]] = field(default_factory=dict)
    _standing: list[asyncio.Task[None]] = field(default_factory=list)
    _wanted: asyncio.Event = field(default_factory=asyncio.Event)
    _opening: set[tuple[Kind, str | None]] = field(default_factory=set)
    """Watches that have neither begun nor failed yet."""
    _stopped: bool = False

    def start(self) -> None:
        """Sweep and watch the runs' children until `stop`."""
        self._opening = {(kind, namespace) for kind in CHILDREN for namespace in self.namespaces or (None,)}
        works = [self._sweep_for_ever(), *(self._watch(kind, namespace) for kind, namespace in self._opening)]
        self._standing = [asyncio.create_task(work) for work in works]

    async def stop(self) -> None:
        """End everything under way and begin nothing more, whoever still reports: another operator may act from now on.
        Whatever that leaves undone is seen at the next start."""
        self._stopped = True
        for timer in self._timers.values():
            timer.cancel()
        self._first.clear()
        self._waiting.clear()
        tasks = [*self._tasks.values(), *self._standing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def there(self, key: Key, uid: str) -> None:
        """Say that there is a run."""
        self._runs[key] = uid

    def gone(self, key: Key, uid: str) -> None:
        """Say that a run is deleted: nothing of it is kept, and nothing is taken that is told of it."""
        if self._runs.get(key) == uid:
            del self._runs[key]
        self.changed(key)
        self.over(key, uid)

    def over(self, key: Key, uid: str) -> None:
        """Say that nothing is left to do for a run: nothing of it is kept in memory."""
        self.reconciler.forget(uid)
        if task := self._tasks.get(key):  # it may have read the run before
            task.add_done_callback(lambda _: self.reconciler.forget(uid))

    def changed(self, key: Key) -> None:
        """Say that what was read of a run may be old."""
        self._heard.add(key)
        self._readings.pop(key, None)

    def poke(self, namespace: str, name: str, *, first: bool = False) -> None:
        """Say that a run needs a look, now; `first`: before others, for its next stage may begin."""
        key = (namespace, name)
        self.changed(key)
        if first:
            self._waiting.pop(key, None)
            self._first[key] = None
        elif key not in self._first:
            self._waiting[key] = None
        self._begin()

    def later(self, namespace: str, name: str, seconds: float) -> None:
        """Say that a run needs a look within so many seconds; one that comes earlier will do."""
        key, loop = (namespace, name), asyncio.get_running_loop()
        self.changed(key)
        timer = self._timers.get(key)
        if timer is None or timer.when() > loop.time() + seconds:
            if timer:
                timer.cancel()
            self._timers[key] = loop.call_later(seconds, self.poke, namespace, name)

    def soon(self, namespace: str, name: str) -> None:
        """Say that something happened that needs no answer."""
        self.later(namespace, name, reconciler.SETTLE_SECONDS)

    def sweep_soon(self) -> None:
        """Say that any run may need a look."""
        self._wanted.set()

    def _begin(self) -> None:
        """Look at what waits, `AT_ONCE` at a time."""
        while not self._stopped and len(self._tasks) < AT_ONCE and (key := self._next()):
            self._tasks[key] = asyncio.create_task(self._attend(key), name=f"reconcile {key[0]}/{key[1]}")
        metrics.QUEUE.set(len(self._first) + len(self._waiting) + len(self._tasks))

    def _next(self) -> Key | None:
        for queue in (self._first, self._waiting):
            for key in queue:
                if key not in self._tasks and key not in self._resting:
                    del queue[key]
                    return key
        return None

    async def _attend(self, key: Key) -> None:
        self._first.pop(key, None)
        self._waiting.pop(key, None)
        read, reading = self._readings.pop(key, (0.0, None))
        if time.monotonic() - read > READING_SECONDS:
            reading = None
        try:
            if timer := self._timers.pop(key, None):
                timer.cancel()
            with metrics.RECONCILE_SECONDS.time():
                again = await self._look(*key, reading)
            if again is not None:
                self.later(*key, again)
        finally:
            del self._tasks[key]
            self.changed(key)  # what a sweep reads just now may be from before
            self._resting.add(key)
            asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._rested, key)
            self._begin()

    def _rested(self, key: Key) -> None:
        self._resting.discard(key)
        self._begin()

    async def _look(self, namespace: str, name: str, reading: Reading | None) -> float | None:
        """One reconcile; the seconds to the next, if one is due. An error is logged, whatever it was."""
        try:
            return await self.reconciler.reconcile(namespace, name, reading)
        except ApiError as error:
            metrics.RECONCILE_ERRORS.labels("api").inc()
            known = (namespace, name) in self._runs
            again = f"looking again in {RETRY_SECONDS:.0f} s" if known else "the operator knows no such run"
            log.warning("%s/%s: %s; %s", namespace, name, error, again)
            return RETRY_SECONDS if known else None
        except Exception:
            metrics.RECONCILE_ERRORS.labels("bug").inc()
            log.exception("%s/%s: reconcile failed; this is a bug of cgd-operator", namespace, name)
            return None

    async def _watch(self, kind: Kind, namespace: str | None) -> None:
        """Look at once at a run whose child has ended or is gone, soon where anything else happened to one. What is
        there when the watch begins, or begins anew, is the sweep's: nobody lists it here."""
        while True:
            try:
                async for event, item in self.reconciler.cluster.watch(kind, namespace, labels=OURS, listing=False):
                    if event == "SYNCED":
                        self._opened(kind, namespace)
                    else:
                        self._happened(kind, event, item)
            except ApiError as error:
                if error.status != 404:
                    log.warning("watch of %s failed: %s", kind.plural, error)
                if (kind, namespace) in self._opening:
                    self._opened(kind, namespace)
                await asyncio.sleep(RETRY_SECONDS if error.status != 404 else children.ABSENT_SECONDS)
            except Exception:  # without its watch the operator would only sweep, and nobody would know
                metrics.RECONCILE_ERRORS.labels("bug").inc()
                log.exception("watch of %s broke; this is a bug of cgd-operator", kind.plural)
                await asyncio.sleep(RETRY_SECONDS)

    def _opened(self, kind: Kind, namespace: str | None) -> None:
        """Have all runs looked over, once for all watches that begin together."""
        self._opening.discard((kind, namespace))
        if not self._opening:
            self.sweep_soon()

    def _happened(self, kind: Kind, event: str, item: Object) -> None:
        """Anybody may make an object with our labels: it is of a run only if both name and uid are a run's."""
        metrics.LAST_EVENT.set_to_current_time()
        labels = item["metadata"]["labels"]
        run, uid = (item["metadata"]["namespace"], labels[RUN_LABEL]), labels.get(UID_LABEL)
        if uid is None or uid != self._runs.get(run):
            return
        if kind is POD and event == "DELETED":
            self.reconciler.departed.add(item, datetime.now(UTC))
        if kind is not POD and (event == "DELETED" or has_ended(item)):
            self.poke(*run, first=True)
        else:
            self.soon(*run)

    async def _sweep_for_ever(self) -> None:
        await self._unless_wanted(OPENING_SECONDS)
        while True:
            begun = time.monotonic()
            if asked_for := self._wanted.is_set():
                await asyncio.sleep(PAUSE_SECONDS)
                self._wanted.clear()
            try:
                await self._sweep(0 if asked_for else 1 / SWEEP_RATE)
            except ApiError as error:
                log.warning("sweep failed: %s", error)
            except Exception:  # without sweeps nothing would be noticed that no event tells
                metrics.RECONCILE_ERRORS.labels("bug").inc()
                log.exception("sweep broke; this is a bug of cgd-operator")
            await self._unless_wanted(begun + SWEEP_SECONDS - time.monotonic())

    async def _unless_wanted(self, seconds: float) -> None:
        """Wait so long, or until somebody asks for a sweep."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0, seconds)):
                await self._wanted.wait()

    async def _sweep(self, pause: float = 0) -> None:
        """Poke every run that needs a look.

        Args:
            pause: seconds to wait for each run, so that the sweep takes its time unless one is asked for meanwhile.
        """
        states: Counter[str] = Counter()
        known, runs_before = self.reconciler.known(), dict(self._runs)
        listed, awake_uids = set[str](), set[str]()
        for namespace in self.namespaces or (None,):
            self._heard.clear()
            since = time.monotonic()
            async for runs, _ in self.reconciler.cluster.pages(RUN, namespace):
                states.update(run.get("status", {}).get("state") or "New" for run in runs)
                for run in runs:
                    listed.add(run["metadata"]["uid"])
                    self._runs.setdefault(_key(run), run["metadata"]["uid"])  # an event is newer than a list
                now = datetime.now(UTC)
                if awake := [run for run in runs if due(run, now) is not Due.NOTHING]:
                    awake_uids.update(run["metadata"]["uid"] for run in awake)
                    await self._sweep_over(namespace, awake, since)
                self.health.swept()  # page by page: a sweep over very many runs is no hang
                await self._unless_wanted(pause * len(runs))
                self._heard.clear()
                since = time.monotonic()
        for key, uid in runs_before.items():  # the event of its deletion may have been lost
            if uid not in listed:
                self.gone(key, uid)
        for uid in known - awake_uids:
            self.reconciler.forget(uid)
        self.reconciler.board.complete = True
        metrics.RUNS.clear()
        for state, count in states.items():
            metrics.RUNS.labels(state).set(count)

    async def _sweep_over(self, namespace: str | None, runs: Sequence[Object], since: float) -> None:
        """Poke those of some runs that need a look, which began to be read at that moment of the monotonic clock."""
        homes = {run["metadata"]["uid"]: run["metadata"]["namespace"] for run in runs}
        objects = await self.reconciler.reader.read(namespace, homes)
        for run in runs:
            key, uid = _key(run), run["metadata"]["uid"]
            if self._runs.get(key) != uid:  # deleted since it was listed
                continue
            if key in self._heard or key in self._tasks:  # what was read may be older than what a look has seen
                self.poke(*key)
                continue
            try:
                need = self.reconciler.due(run, objects[uid])
            except Exception:  # the others must not wait for it
                log.exception("%s/%s: cannot be looked over", *key)
                need = Due.TELLING
            if need is not Due.NOTHING:
                self.poke(*key, first=need is Due.ACTING)
                if len(self._readings) < READINGS:
                    self._readings[key] = (since, Reading(run, objects[uid]))
            await asyncio.sleep(0)  # a child that has ended goes first


def _key(run: Object) -> Key:
    return run["metadata"]["namespace"], run["metadata"]["name"]
