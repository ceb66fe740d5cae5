"""When a run is reconciled: at once when its spec changed or one of its children ended, a few seconds after any other
event, and twice a minute in any case.

Nothing depends on an event: a sweep finds every run with something to do or to report. So a watch that starts, or
starts again, only requests a sweep. What children have ended meanwhile is looked for before it, because deciding for
every run takes seconds.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from cgd_operator import metrics
from cgd_operator.controller import children, reconciler
from cgd_operator.controller.reconciler import Reading, Reconciler
from cgd_operator.facts.children import has_ended
from cgd_operator.facts.due import Due, due, has_untold_end
from cgd_operator.http.health import Health
from cgd_operator.kube.client import Object
from cgd_operator.kube.clock import Clock
from cgd_operator.kube.kinds import JOB, POD, PYTORCHJOB, RUN, TRAINJOB, ApiError, Kind
from cgd_operator.planning.manifests import MANAGED_BY, MANAGER, RUN_LABEL, UID_LABEL

log = logging.getLogger(__name__)

SWEEP_SECONDS = 30.0
SWEEP_RATE = 50.0
"""Runs per second that a regular sweep checks: 5,000 runs take 100 s, and not a whole core."""
RETRY_SECONDS = 2.0
PAUSE_SECONDS = 0.1
"""Between two reconciles of a run, and before a sweep that watches request, because requests come in bursts."""
OPENING_SECONDS = 2.0
"""The first sweep waits this long for the watches, so that a single sweep serves all of them."""
READING_SECONDS = 5.0
"""A reconcile that begins this soon after a sweep has read its run uses that reading, unless an event has come
since."""
READINGS = 64
"""The most readings in memory."""
AT_ONCE = 16
CHILDREN = (JOB, PYTORCHJOB, TRAINJOB, POD)
OURS = f"{MANAGED_BY}={MANAGER},{RUN_LABEL}"

Key = tuple[str, str]
"""Namespace and name of a run."""


@dataclass
class Loop:
    """Calls the reconciler: for each run one call at a time, for all runs `AT_ONCE` at a time."""

    reconciler: Reconciler
    namespaces: tuple[str, ...] = ()
    """Watched namespaces; none: all."""
    health: Health = field(default_factory=Health)
    _runs: dict[Key, str] = field(default_factory=dict)
    """The uid of every run that exists, from events and sweeps. Other runs are not retried, and events of objects that
    claim to be their children are ignored."""
    _first: dict[Key, None] = field(default_factory=dict)
    _waiting: dict[Key, None] = field(default_factory=dict)
    """Runs that wait for a reconcile, in order. `_waiting` waits until `_first` is empty."""
    _readings: dict[Key, tuple[float, Reading]] = field(default_factory=dict)
    """What a sweep has read of runs that wait for a reconcile, and when the reading began, on the monotonic clock."""
    _heard: set[Key] = field(default_factory=set)
    """Runs with an event since the sweep began to read its page."""
    _resting: set[Key] = field(default_factory=set)
    """Runs that were reconciled less than `PAUSE_SECONDS` ago."""
    _timers: dict[Key, asyncio.TimerHandle] = field(default_factory=dict)
    _tasks: dict[Key, asyncio.Task[None]] = field(default_factory=dict)
    _standing: list[asyncio.Task[None]] = field(default_factory=list)
    _wanted: asyncio.Event = field(default_factory=asyncio.Event)
    _opening: set[tuple[Kind, str | None]] = field(default_factory=set)
    """Watches that have neither begun nor failed yet."""
    _caught_up: asyncio.Event = field(default_factory=asyncio.Event)
    _stopped: bool = False

    @property
    def clock(self) -> Clock:
        return self.reconciler.cluster.clock

    def start(self) -> None:
        """Sweep and watch the runs' children until `stop`."""
        self._opening = {(kind, namespace) for kind in CHILDREN for namespace in self.namespaces or (None,)}
        works = [self._sweep_for_ever(), *(self._watch(kind, namespace) for kind, namespace in self._opening)]
        self._standing = [asyncio.create_task(work) for work in works]

    async def caught_up(self) -> None:
        """Wait until the first catch-up is over, whether or not it succeeded."""
        await self._caught_up.wait()

    async def stop(self) -> None:
        """Cancel all work and start none, even if reports still arrive: another operator may act from now on. The next
        start finds what is left undone."""
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
        """Note that a run exists."""
        self._runs[key] = uid

    def gone(self, key: Key, uid: str) -> None:
        """Note that a run is deleted: forget it, and ignore later reports about it."""
        if self._runs.get(key) == uid:
            del self._runs[key]
        self.changed(key)
        self.over(key, uid)

    def over(self, key: Key, uid: str) -> None:
        """Note that nothing is left to do for a run, and forget it."""
        self.reconciler.forget(uid)
        if task := self._tasks.get(key):  # it may have read the run before this call
            task.add_done_callback(lambda _: self.reconciler.forget(uid))

    def changed(self, key: Key) -> None:
        """Note that what was read of a run may be out of date."""
        self._heard.add(key)
        self._readings.pop(key, None)

    def poke(self, namespace: str, name: str, *, first: bool = False) -> None:
        """Request a reconcile of a run now; with `first` before other runs, because its next stage may begin."""
        key = (namespace, name)
        self.changed(key)
        if first:
            self._waiting.pop(key, None)
            self._first[key] = None
        elif key not in self._first:
            self._waiting[key] = None
        self._begin()

    def later(self, namespace: str, name: str, seconds: float) -> None:
        """Request a reconcile of a run within so many seconds; an earlier reconcile serves as well."""
        key, loop = (namespace, name), asyncio.get_running_loop()
        self.changed(key)
        timer = self._timers.get(key)
        if timer is None or timer.when() > loop.time() + seconds:
            if timer:
                timer.cancel()
            self._timers[key] = loop.call_later(seconds, self.poke, namespace, name)

    def soon(self, namespace: str, name: str) -> None:
        """Request a reconcile for an event that can wait some seconds."""
        self.later(namespace, name, reconciler.SETTLE_SECONDS)

    def _is_soon(self, key: Key) -> bool:
        """Whether a reconcile of the run comes by itself as early as `soon` would ask for it."""
        timer = self._timers.get(key)
        return timer is not None and timer.when() <= asyncio.get_running_loop().time() + reconciler.SETTLE_SECONDS

    def sweep_soon(self) -> None:
        """Request a sweep over all runs."""
        self._wanted.set()

    def _begin(self) -> None:
        """Start reconciles of the runs that wait, `AT_ONCE` at a time."""
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
            self.changed(key)  # what a sweep reads at this moment may be older
            self._resting.add(key)
            asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._rested, key)
            self._begin()

    def _rested(self, key: Key) -> None:
        self._resting.discard(key)
        self._begin()

    async def _look(self, namespace: str, name: str, reading: Reading | None) -> float | None:
        """Reconcile a run once. Returns the seconds to the next reconcile, if a time is known. Logs every error."""
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
        """Reconcile a run at once when a child has ended or is deleted, and soon after any other event. The watch lists
        nothing when it begins: the sweep reads what exists at that time."""
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
            except Exception:  # without this, the operator would fall back to sweeps in silence
                metrics.RECONCILE_ERRORS.labels("bug").inc()
                log.exception("watch of %s broke; this is a bug of cgd-operator", kind.plural)
                await asyncio.sleep(RETRY_SECONDS)

    def _opened(self, kind: Kind, namespace: str | None) -> None:
        """Request a sweep, a single one for all watches that begin together."""
        self._opening.discard((kind, namespace))
        if not self._opening:
            self.sweep_soon()

    def _happened(self, kind: Kind, event: str, item: Object) -> None:
        """Handle an event. Anybody may create objects with our labels, so name and uid must both match a run."""
        metrics.LAST_EVENT.set_to_current_time()
        labels = item["metadata"]["labels"]
        run, uid = (item["metadata"]["namespace"], labels[RUN_LABEL]), labels.get(UID_LABEL)
        if uid is None or uid != self._runs.get(run):
            return
        if kind is POD and event == "DELETED":
            self.reconciler.departed.add(item, self.clock.now())
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
                if asked_for:
                    await self._catch_up()
                self._caught_up.set()
                await self._sweep(0 if asked_for else 1 / SWEEP_RATE)
            except ApiError as error:
                log.warning("sweep failed: %s", error)
            except Exception:  # without sweeps the operator would miss whatever has no event
                metrics.RECONCILE_ERRORS.labels("bug").inc()
                log.exception("sweep broke; this is a bug of cgd-operator")
            self._caught_up.set()
            await self._unless_wanted(begun + SWEEP_SECONDS - time.monotonic())

    async def _unless_wanted(self, seconds: float) -> None:
        """Wait so long, or until a sweep is requested."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0, seconds)):
                await self._wanted.wait()

    async def _catch_up(self) -> None:
        """Look at the runs with a child whose end no status tells: their next children wait. This reads Jobs and
        trainings alone, and decides only for those runs."""
        async for namespace, runs, since in self._pages():
            awake = _awake(runs, self.clock.now())
            children = await self.reconciler.reader.children(namespace, _homes(awake))
            if behind := [run for run in awake if has_untold_end(run, children[run["metadata"]["uid"]])]:
                await self._look_first(namespace, behind, since)
        await self._few_wait(0)

    async def _look_first(self, namespace: str | None, runs: Sequence[Object], since: float) -> None:
        """Poke the listed runs before others. `since`: when the listing began, on the monotonic clock."""
        objects = await self.reconciler.reader.read(namespace, _homes(runs))
        for run in runs:
            key, uid = _key(run), run["metadata"]["uid"]
            current = self._runs.get(key) == uid and key not in self._heard and key not in self._tasks
            self.poke(*key, first=True)
            if current and len(self._readings) < READINGS:
                self._readings[key] = (since, Reading(run, objects[uid]))
        await self._few_wait(AT_ONCE)

    async def _few_wait(self, most: int) -> None:
        """Wait until at most so many runs are to be looked at before others."""
        with suppress(TimeoutError):  # under a steady stream of ends it would never be so
            async with asyncio.timeout(READING_SECONDS):
                while len(self._first) > most and self._tasks:
                    await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_COMPLETED)

    async def _sweep(self, pause: float = 0) -> None:
        """Poke every run that needs a reconcile.

        Args:
            pause: seconds to wait per run, which spreads the sweep over time. A request for a sweep ends the waiting.
        """
        states: Counter[str] = Counter()
        known, runs_before = self.reconciler.known(), dict(self._runs)
        listed, awake_uids = set[str](), set[str]()
        async for namespace, runs, since in self._pages():
            states.update(run.get("status", {}).get("state") or "New" for run in runs)
            listed.update(run["metadata"]["uid"] for run in runs)
            if awake := _awake(runs, self.clock.now()):
                awake_uids.update(run["metadata"]["uid"] for run in awake)
                await self._sweep_over(namespace, awake, since)
            self.health.swept()  # after every page, because a sweep over very many runs is not stuck
            await self._unless_wanted(pause * len(runs))
        for key, uid in runs_before.items():  # the event of the deletion may have been lost
            if uid not in listed:
                self.gone(key, uid)
        for uid in known - awake_uids:
            self.reconciler.forget(uid)
        self.reconciler.board.complete = True
        metrics.RUNS.clear()
        for state, count in states.items():
            metrics.RUNS.labels(state).set(count)

    async def _pages(self) -> AsyncIterator[tuple[str | None, Sequence[Object], float]]:
        """The runs, a page at a time, each with the namespace that was listed and when its listing began, on the
        monotonic clock."""
        for namespace in self.namespaces or (None,):
            self._heard.clear()
            since = time.monotonic()
            async for runs, _ in self.reconciler.cluster.pages(RUN, namespace):
                for run in runs:
                    self._runs.setdefault(_key(run), run["metadata"]["uid"])  # an event is newer than a list
                yield namespace, runs, since
                self._heard.clear()
                since = time.monotonic()

    async def _sweep_over(self, namespace: str | None, runs: Sequence[Object], since: float) -> None:
        """Poke those of the listed runs that need a reconcile. `since` as in `_look_first`."""
        objects = await self.reconciler.reader.read(namespace, _homes(runs))
        for run in runs:
            key, uid = _key(run), run["metadata"]["uid"]
            if self._runs.get(key) != uid:  # deleted since it was listed
                continue
            if key in self._heard or key in self._tasks:  # the listing may be older than what a reconcile has seen
                self.poke(*key)
                continue
            try:
                need = self.reconciler.due(run, objects[uid])
            except Exception:  # a bug in one run must not stop the others
                log.exception("%s/%s: cannot be looked over", *key)
                need = Due.TELLING
            if need is Due.TELLING and self._is_soon(key):  # mostly with more to tell: one write instead of two
                continue
            if need is not Due.NOTHING:
                self.poke(*key, first=need is Due.ACTING)
                if len(self._readings) < READINGS:
                    self._readings[key] = (since, Reading(run, objects[uid]))
            await asyncio.sleep(0)  # lets the events of ended children in first


def _awake(runs: Sequence[Object], now: datetime) -> list[Object]:
    """The runs that may need something."""
    return [run for run in runs if due(run, now) is not Due.NOTHING]


def _homes(runs: Sequence[Object]) -> dict[str, str]:
    """The namespaces of the runs, by uid."""
    return {run["metadata"]["uid"]: run["metadata"]["namespace"] for run in runs}


def _key(run: Object) -> Key:
    return run["metadata"]["namespace"], run["metadata"]["name"]
