"""The API server's time, for decisions about times that the cluster has written: grace periods, times to live,
deadlines. The clock of the operator's machine may be wrong, and would call healthy nodes lost, or delete runs early.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

log = logging.getLogger(__name__)

WRONG_SECONDS = 10.0
"""A clock that differs by so much is logged."""


class Clock:
    """Learns from the `Date` of answers how far the API server's clock is from ours. A `Date` has whole seconds, and an
    answer takes time: within that uncertainty the two count as equal.

    Args:
        local: seconds since 1970 by the clock of this machine.
    """

    def __init__(self, local: Callable[[], float] = time.time) -> None:
        self.local = local
        self._ahead = 0.0
        """Seconds by which the API server's clock is ahead of ours."""

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.local() + self._ahead, UTC)

    def heard(self, date: str, sent: float) -> None:
        """Take in the `Date` of an answer that has just come, to a request that was sent at `sent` of the local clock.
        A text that is no date changes nothing."""
        try:
            told = parsedate_to_datetime(date).timestamp()
        except ValueError:
            return
        before, least, most = self._ahead, told - self.local(), told + 1 - sent
        self._ahead = min(max(before, least), most)
        if abs(self._ahead) >= WRONG_SECONDS > abs(before):
            differs = f"{abs(self._ahead):.0f} s {'behind' if self._ahead > 0 else 'ahead of'}"
            log.warning("the clock of this machine is %s that of the API server, which is used: set it right", differs)
