"""Finished rows on their way into the parts of a folder, and what earlier attempts have stored there.

One policy for every program that stores rows. While it runs, finished rows wait until they are many or have waited
long; while the store is away they wait on, and the program goes on. When it is started again, a part that is whole
counts as it is; a row that is stored twice counts once; of a part that is damaged or gone the rows are asked for
again. The parts that are listed in the end hold every row once: what does not is written anew.
"""

import logging
import re
import time
from collections.abc import Callable, Hashable
from dataclasses import replace

import pyarrow as pa

from cgd_stages.errors import TransientError
from cgd_stages.store.folder import PARTS, REJECTED, Folder, Part
from cgd_stages.store.rows import REJECTION_SCHEMA, Row, from_parquet, sha256

log = logging.getLogger(__name__)

FLUSH_SECONDS = 60.0
"""Finished rows wait at most this long to be stored."""
FLUSH_ROWS = 512
"""As many finished rows do not wait. Also the most rows of a part, unless the program says otherwise."""
RETRY_SECONDS = 5.0
"""While the store is away: the pause between two tries, at least."""
RETRY_SHARE = 0.1
"""While the store is away: the share of the time that tries may take from the program (they are made at least every
`FLUSH_SECONDS`)."""
HELD_ROWS = 50_000
"""While the store is away: the most finished rows that are held in memory, about a gigabyte of long ones."""

_NAME = re.compile(r"(parts/|rejected/)([^/]*?)([0-9a-f]{32})\.parquet")
"""Of a part: its prefix, what the program names its parts by, and the beginning of the content's hash."""


class PartWriter:
    """The parts of a folder, as one program writes them.

    `count` is called with each row once, whether it was stored before or is new. `key` tells rows apart; without it no
    row is remembered, and every row that is handed over is stored. Names of parts begin with `own`, and with their
    number if they are `numbered`.
    """

    def __init__(
        self,
        folder: Folder,
        schema: pa.Schema,
        *,
        count: Callable[[Row], None] | None = None,
        key: Callable[[Row], Hashable] | None = None,
        own: str = "",
        numbered: bool = False,
        part_rows: int | None = None,
    ) -> None:
        self.folder = folder
        self.parts: list[Part] = []
        self.kept: set[Hashable] = set()
        """Keys of the rows that are kept, stored or not."""
        self.rejected: set[Hashable] = set()
        self._count, self._key, self._part_rows = count, key, part_rows
        self._own, self._numbered = own, numbered
        self._schemas = {PARTS: schema, REJECTED: REJECTION_SCHEMA}
        self._rows: dict[str, list[Row]] = {PARTS: [], REJECTED: []}
        """What waits to be stored."""
        self._stored_at = self._next_try = time.monotonic()

    def __contains__(self, key: Hashable) -> bool:
        return key in self.kept or key in self.rejected

    @property
    def stored_rows(self) -> int:
        return sum(part.rows for part in self.parts)

    # --- what earlier attempts have stored ----------------------------------------------------------------------

    def recover(self, may_hold: Callable[[str], bool] | None = None) -> None:
        """Take in all parts of the folder, or those that may hold rows of this program's. Its own come first: of others
        only what these lack is written anew."""
        for prefix in self._rows:
            stored = self.folder.bucket.list(self.folder.key(prefix))
            names = [part.key.removeprefix(self.folder.key()) for part in stored]
            for name in sorted(filter(may_hold, names), key=self._is_foreign):
                self.recover_part(name)

    def recover_part(self, name: str) -> bool:
        """Take in a stored part. False: it is damaged or gone, or no part at all."""
        data, named = self.folder.bucket.get(self.folder.key(name)), _NAME.fullmatch(name)
        if data is None or named is None or not sha256(data).startswith(named[3]):
            log.warning("%s is not whole: its rows are asked for again", name)
            return False
        rows = from_parquet(data)
        fresh = [row for row in rows if self.lacks(row)]
        if len(fresh) == len(rows) and not self._is_foreign(name):
            self.parts.append(Part(key=name, sha256=sha256(data), rows=len(rows)))
        else:
            self._rows[named[1]].extend(fresh)
        for row in fresh:
            self._enter(row)
        return True

    def lacks(self, row: Row) -> bool:
        """Whether a stored row is one of this program's, and not counted yet."""
        return self._key is None or self._key(row) not in self

    def _is_foreign(self, name: str) -> bool:
        """Whether a part is named as another program, or another number of shards, would name it."""
        named = _NAME.fullmatch(name)
        return named is None or named[2] != self._own

    # --- what is new --------------------------------------------------------------------------------------------

    def keep(self, row: Row) -> None:
        self._enter(row)
        self._rows[PARTS].append(row)

    def reject(self, row: Row) -> None:
        """A row that is left out of what follows; columns as in REJECTION_SCHEMA."""
        self._enter(row)
        self._rows[REJECTED].append(row)

    def _enter(self, row: Row) -> None:
        if self._key is not None:
            (self.rejected if "reason" in row else self.kept).add(self._key(row))
        if self._count is not None:
            self._count(row)

    def waiting(self, *prefixes: str) -> int:
        """Rows that are not stored yet; with prefixes (`parts/`, `rejected/`), those that go there."""
        return sum(len(self._rows[prefix]) for prefix in prefixes or self._rows)

    @property
    def due(self) -> bool:
        """Whether finished rows have waited long enough, or are many enough, to be stored."""
        now = time.monotonic()
        if not self.waiting():
            self._stored_at = now
        waited = self.waiting() >= FLUSH_ROWS or now - self._stored_at >= FLUSH_SECONDS
        return self.waiting() >= HELD_ROWS or (waited and now >= self._next_try)

    def try_flush(self) -> bool:
        """Store what waits, unless the store is away: then the program goes on, and False is returned.

        Raises TransientError when it has been away for `AWAY_SECONDS`, or when `HELD_ROWS` rows wait.
        """
        started = time.monotonic()
        if self.waiting() and started < self._next_try and self.waiting() < HELD_ROWS:
            return False
        try:
            self._store(replace(self.folder, bucket=self.folder.bucket.at_once()))
        except TransientError as error:
            if self.folder.bucket.outage.too_long or self.waiting() >= HELD_ROWS:
                raise
            now = time.monotonic()
            self._next_try = now + min(max(RETRY_SECONDS, (now - started) / RETRY_SHARE), FLUSH_SECONDS)
            log.warning("%d finished rows wait for the store: %s", self.waiting(), error.message)
            return False
        return True

    def flush(self, *prefixes: str) -> None:
        """Store what waits. Raises TransientError when the store is away; what waits stays."""
        self._store(self.folder, *prefixes)

    def _store(self, folder: Folder, *prefixes: str) -> None:
        most = self._part_rows or FLUSH_ROWS
        for prefix in prefixes or self._rows:
            rows = self._rows[prefix]
            while rows:
                number = f"{len(self.parts):05d}-" if self._numbered else ""
                self.parts.append(folder.put_rows(prefix + self._own + number, rows[:most], self._schemas[prefix]))
                del rows[:most]
        self._stored_at = time.monotonic()
