"""When a run is looked at: at once when its spec changed or a child of it ended, a little later when anything else
happened, and twice a minute in any case.

Nothing depends on an event: a sweep finds every run that there is something to do or to tell about. So a watch that
starts, or starts again, only asks for a sweep.
"""

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cgd_operator import metrics, reconcile
from cgd_operator.cluster import RUN, ApiError, Object
from cgd_operator.health import Health
from cgd_operator.reconcile import Reconciler, at_rest

log = logging.getLogger(__name__)

SWEEP_SECONDS = 30.0
RETRY_SECONDS = 2.0
PAUSE_SECONDS = 0.1
"""Between two looks at a run, and before a sweep that watches ask for: they come in bursts."""
AT_ONCE = 16
TOGETHER = 50
"""Runs whose children a sweep asks for at once."""

Key = tuple[str, str]
"""Namespace and name of a run."""


@dataclass
class Loop:
    """Has the reconciler look at runs, one at a time for each run, `AT_ONCE` at a time in all."""

    reconciler: Reconciler
    namespaces: tuple[str, ...] = ()
    """Watched namespaces; none: all."""
    health: Health = field(default_factory=Health)
    _dirty: set[Key] = field(default_factory=set)
    _timers: dict[Key, asyncio.TimerHandle] = field(default_factory=dict)
    _tasks: dict[Key, asyncio.Task[None]] = field(default_factory=dict)
    _sweeps: asyncio.Task[None] | None = None
    _wanted: asyncio.Event = field(default_factory=asyncio.Event)
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    def start(self) -> None:
        """Sweep until `stop`."""
        self._sweeps = asyncio.create_task(self._sweep_for_ever(), name="sweeps")

    async def stop(self) -> None:
        """End the sweeps and the looks under way; whatever they left undone is seen at the next start."""
        for timer in self._timers.values():
            timer.cancel()
        tasks = [*self._tasks.values(), *([self._sweeps] if self._sweeps else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def poke(self, namespace: str, name: str) -> None:
        """Say that a run needs a look, now."""
        key = (namespace, name)
        self._dirty.add(key)
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._drain(key), name=f"reconcile {namespace}/{name}")

    def later(self, namespace: str, name: str, seconds: float) -> None:
        """Say that a run needs a look within so many seconds; one that comes earlier will do."""
        key, loop = (namespace, name), asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is None or timer.when() > loop.time() + seconds:
            if timer:
                timer.cancel()
            self._timers[key] = loop.call_later(seconds, self.poke, namespace, name)

    def soon(self, namespace: str, name: str) -> None:
        """Say that something happened that needs no answer."""
        self.later(namespace, name, reconcile.SETTLE_SECONDS)

    def sweep_soon(self) -> None:
        """Say that any run may need a look."""
        self._wanted.set()

    async def _drain(self, key: Key) -> None:
        try:
            while key in self._dirty:
                self._dirty.discard(key)
                metrics.QUEUE.set(len(self._tasks))
                async with self._slots:
                    if timer := self._timers.pop(key, None):
                        timer.cancel()
                    with metrics.RECONCILE_SECONDS.time():
                        again = await self._look(*key)
                if again is not None:
                    self.later(*key, again)
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            del self._tasks[key]
            metrics.QUEUE.set(len(self._tasks))

    async def _look(self, namespace: str, name: str) -> float | None:
        """One reconcile; the seconds to the next, if one is due. An error is logged, whatever it was."""
        try:
            return await self.reconciler.reconcile(namespace, name)
        except ApiError as error:
            metrics.RECONCILE_ERRORS.labels("api").inc()
            log.warning("%s/%s: %s; looking again in %.0f s", namespace, name, error, RETRY_SECONDS)
            return RETRY_SECONDS
        except Exception:
            metrics.RECONCILE_ERRORS.labels("bug").inc()
            log.exception("%s/%s: reconcile failed; this is a bug of cgd-operator", namespace, name)
            return None

    async def _sweep_for_ever(self) -> None:
        while True:
            self._wanted.clear()
            try:
                await self._sweep()
            except ApiError as error:
                log.warning("sweep failed: %s", error)
            try:
                async with asyncio.timeout(SWEEP_SECONDS):
                    await self._wanted.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(PAUSE_SECONDS)

    async def _sweep(self) -> None:
        """Poke every run that is behind."""
        states: Counter[str] = Counter()
        for namespace in self.namespaces or (None,):
            runs, _ = await self.reconciler.cluster.list(RUN, namespace)
            states.update(run.get("status", {}).get("state") or "New" for run in runs)
            awake = [run for run in runs if not at_rest(run, datetime.now(UTC))]
            for first in range(0, len(awake), TOGETHER):
                await self._sweep_over(namespace, awake[first : first + TOGETHER])
        metrics.RUNS.clear()
        for state, count in states.items():
            metrics.RUNS.labels(state).set(count)
        self.health.swept()

    async def _sweep_over(self, namespace: str | None, runs: list[Object]) -> None:
        there = await self.reconciler.look(namespace, [run["metadata"]["uid"] for run in runs])
        for run in runs:
            meta = run["metadata"]
            try:
                behind = self.reconciler.is_behind(run, there[meta["uid"]])
            except Exception:  # the others must not wait for it
                log.exception("%s/%s: cannot be looked over", meta["namespace"], meta["name"])
                behind = True
            if behind:
                self.poke(meta["namespace"], meta["name"])
            await asyncio.sleep(0)  # a child that has ended goes first
