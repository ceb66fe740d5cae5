"""Progress to the operator. Losing this channel changes nothing but the display, so nothing here ever raises."""

import logging
import os
import ssl
import threading
import urllib.request
from pathlib import Path

from cgd_stages.contract import (
    PROGRESS_CA,
    PROGRESS_TOKEN,
    PROGRESS_URL,
    Metric,
    Progress,
    Rows,
    TrainerStatus,
)
from cgd_stages.folders import now

log = logging.getLogger(__name__)

INTERVAL = 2.0
"""Seconds between two reports, at least."""
TIMEOUT = 5.0


class Reporter:
    """Sends the newest state of each stage from a thread of its own; older states that were not sent are dropped."""

    def __init__(self, shard: int = 0, url: str | None = None) -> None:
        self._shard = shard
        self._url = url
        self._waiting: dict[str, Progress] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._failed = False
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
    ) -> None:
        """Say how far a stage is: rows of this shard, tokens generated a second, seconds that remain."""
        if not self._url:
            return
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
        )
        with self._changed:
            self._waiting[stage] = progress
            self._changed.notify()

    def close(self) -> None:
        """Send what waits, within one time-out, and stop."""
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
                closed = self._closed
            for progress in batch:
                self._send(progress)
            if closed:
                return
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=INTERVAL)

    def _send(self, progress: Progress) -> None:
        try:
            _post(str(self._url), progress.to_json().encode())
            self._failed = False
        except (OSError, ValueError) as error:
            if not self._failed:
                log.warning("progress is not shown: %s (%s)", error, self._url)
            self._failed = True


def _post(url: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get(PROGRESS_TOKEN):
        # Projected tokens are renewed in place: read the file for every report.
        headers["Authorization"] = f"Bearer {Path(token).read_text().strip()}"
    authority = os.environ.get(PROGRESS_CA)
    context = ssl.create_default_context(cafile=authority) if authority else None
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")  # noqa: S310 (the operator's own)
    with urllib.request.urlopen(request, timeout=TIMEOUT, context=context) as response:  # noqa: S310
        response.read()
