"""How long the rest of a stage takes: the one estimate behind every ETA that is told.

Only what has finished tells of the rest. An engine that works on hundreds of rows at once finishes few of them in the
beginning and many together later, so an estimate from the first ones would be many times too long. Nothing is said
before twice as many rows have finished as are under way: from then on, an estimate is too long by half of the time
that has passed at most, which is when all that is under way ends the next moment.
"""

import time
from collections.abc import Callable

ENOUGH = 5
"""Rows, or steps, that must have finished before anything is said."""


class Pace:
    """Make it when the work itself begins: the model is loaded, the slow first step is over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, clock()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return max(self._clock() - self._started, 1e-3)

    def remaining(self, finished: int, left: int, *, under_way: int = 0) -> float | None:
        """Seconds until `left` more have finished, at the pace of those that have since the work began; None: too few
        have. `under_way`: how many of those that are left are worked on at this moment."""
        if not left:
            return 0.0
        if finished < max(ENOUGH, 2 * under_way):
            return None
        return left * self.seconds / finished
