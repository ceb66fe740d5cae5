"""How long the rest of a stage takes: the one estimate behind every ETA.

Only finished rows count. An engine that works on hundreds of rows at once finishes few of them in the beginning and
many together later, so an estimate from the first ones would be many times too long. There is no estimate before twice
as many rows have finished as are under way. From then on it is too long by half of the time that has passed at most:
when all rows under way finish the next moment.
"""

import time
from collections.abc import Callable

ENOUGH = 5
"""Rows, or steps, that must have finished before `remaining` gives an estimate."""


class Pace:
    """Create it when the work itself begins: the model is loaded, the slow first step is over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, clock()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return max(self._clock() - self._started, 1e-3)

    def remaining(self, finished: int, left: int, *, under_way: int = 0) -> float | None:
        """Seconds until the `left` rows have finished, at the pace of the `finished` ones; None: too few have finished.
        `under_way`: how many of the rows that are left the engine is working on."""
        if not left:
            return 0.0
        if finished < max(ENOUGH, 2 * under_way):
            return None
        return left * self.seconds / finished
