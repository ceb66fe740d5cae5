"""Reports progress to the operator. Only the display depends on it, so nothing here ever raises."""

import logging
import os
import ssl
import threading
from pathlib import Path

from pydantic import ValidationError

from cgd_stages.contract import (
    PROGRESS_CA,
    PROGRESS_TOKEN,
    PROGRESS_URL,
    Metric,
    Progress,
    ProgressAnswer,
    RoundOf,
    Rows,
    TrainerStatus,
)
from cgd_stages.runtime.web import exchange
from cgd_stages.store.rows import now

log = logging.getLogger(__name__)

INTERVAL = 2.0
"""Seconds between two reports, unless the operator asks for more: with very many runs it does."""
MOST_SECONDS = 300.0
"""The longest pause. It doubles with each report that fails: an operator with a new key refuses the tokens of all
running pods, and their further reports must not hold up those of other pods."""
TIMEOUT = 5.0
MOST = 1 << 16
"""Bytes of an answer."""


class Reporter:
    """Sends the newest state of each stage from its own thread, and drops older states that it has not sent."""

    def __init__(self, shard: int = 0, url: str | None = None) -> None:
        self._shard = shard
        self._url = url
        self._waiting: dict[str, Progress] = {}
        self._through: dict[str, bool] = {}
        """By stage, whether all its rows have ended; a stage has no entry before its first report."""
        self._turned = False
        """A stage has begun or ended since the last report, so the next one is sent at once."""
        self._changed = threading.Condition()
        self._closed = False
        self._failures = 0
        """Reports that have failed since the last one that the operator took."""
        self._thread = threading.Thread(target=self._send_all, name="progress", daemon=True)
        if url:
            self._thread.start()

    @classmethod
    def from_environment(cls, shard: int) -> "Reporter":
        return cls(shard, os.environ.get(PROGRESS_URL))

    def report(
        self,
        stage: str,
        rows: Rows,
        *,
        tokens_per_second: float | None = None,
        eta: float | None = None,
        metrics: dict[str, float] | None = None,
        at: RoundOf | None = None,
    ) -> None:
        """Report how far a stage is: this shard's rows, tokens generated per second, seconds that remain; of a stage
        with rounds, which of them it is at."""
        if not self._url:
            return
        try:
            progress = Progress(
                trainer_status=TrainerStatus(
                    progress_percentage=100 * (rows.done + rows.rejected) // rows.total if rows.total else None,
                    estimated_remaining_seconds=None if eta is None else round(eta),
                    metrics=tuple(Metric(name=name, value=f"{value:.6g}") for name, value in (metrics or {}).items()),
                    last_updated_time=now(),
                ),
                stage=stage,
                shard=self._shard,
                rows=rows,
                tokens_per_second=tokens_per_second,
                round=at,
            )
        except (ValueError, OverflowError) as error:  # NaN, infinite or out of range
            log.warning("progress of %s is not shown: %s", stage, error)
            return
        through = rows.done + rows.rejected >= rows.total
        with self._changed:
            self._turned = self._turned or self._through.get(stage) is not through
            self._through[stage] = through
            self._waiting[stage] = progress
            self._changed.notify()

    def close(self) -> None:
        """Send the states that wait, within one time-out, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(TIMEOUT)

    def _send_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                batch, self._waiting = list(self._waiting.values()), {}
                closed, self._turned = self._closed, False
            pauses = [self._send(progress) for progress in batch]
            if closed:
                return
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._turned, timeout=max([INTERVAL, *pauses]))

    def _send(self, progress: Progress) -> float:
        """Send one report; the result is the number of seconds after which the operator wants the next one."""
        headers: dict[str, str] = {}
        authority = os.environ.get(PROGRESS_CA)
        try:
            if token := os.environ.get(PROGRESS_TOKEN):
                # Projected tokens are renewed in place: read the file for every report.
                headers["Authorization"] = f"Bearer {Path(token).read_text().strip()}"
            context = ssl.create_default_context(cafile=authority) if authority else None
            body = progress.to_json().encode()
            answer = exchange(str(self._url), body, headers=headers, seconds=TIMEOUT, most=MOST, context=context)
            self._failures = 0
        except (OSError, ValueError) as error:
            if not self._failures:
                log.warning("progress is not shown: %s (%s)", error, self._url)
            self._failures += 1
            return min(INTERVAL * 2.0 ** min(self._failures, 10), MOST_SECONDS)
        try:
            return ProgressAnswer.model_validate_json(answer).next_report_seconds
        except ValidationError:  # Kubeflow Trainer's own server has another answer
            return INTERVAL
