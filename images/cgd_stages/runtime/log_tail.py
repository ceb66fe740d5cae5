"""The end of a program's log, kept in the store: a run is asked about when its pods and their logs are gone.

It has what this process has logged, its traceback too. What processes of libraries write is in the pod's log alone.
"""

import logging
import socket
from collections import deque
from dataclasses import replace

from cgd_stages.errors import StageError
from cgd_stages.store.run import RunStore

log = logging.getLogger(__name__)

KEPT = 1 << 16
"""Bytes that are kept, about 600 lines."""


class LogTail(logging.Handler):
    """Keeps the last lines of this process's log, as they are written to stderr, without keys."""

    def __init__(self) -> None:
        super().__init__()
        self._lines = deque[bytes]()
        self._size = 0

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n".encode(errors="backslashreplace")[-KEPT:]
        self._lines.append(line)
        self._size += len(line)
        while self._size > KEPT:
            self._size -= len(self._lines.popleft())

    @property
    def text(self) -> bytes:
        return b"".join(self._lines)

    def store(self, store: RunStore, stage: str) -> None:
        """Store what was kept, once: a store that is away keeps nobody waiting, and a log decides nothing."""
        if store.bucket.outage.since is not None:
            return
        try:
            replace(store, bucket=store.bucket.one_try()).keep_log(
                stage, f"pod {socket.gethostname()}\n".encode() + self.text
            )
        except StageError as error:
            log.warning("the end of this log is not stored: %s", error.message)
