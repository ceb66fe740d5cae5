"""Writes finished rows into the parts of a folder, and recovers the parts that earlier attempts have stored.

Every program that stores rows does it this way. Finished rows wait in memory until they are many or have waited long.
While the store is away they stay in memory, and the program goes on. A program that is started again keeps undamaged
parts, counts a row that is stored twice once, and generates the rows of damaged and missing parts again. The parts that
the marker lists hold every row once: rows of other parts are written anew.
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
"""Finished rows are stored after this time at most."""
FLUSH_ROWS = 512
"""So many finished rows are stored at once. Also the most rows of a part, unless the program sets `part_rows`."""
RETRY_SECONDS = 5.0
"""While the store is away: the shortest pause between two tries."""
RETRY_SHARE = 0.1
"""While the store is away: the share of the program's time that tries may take. The pause between two is never longer
than `FLUSH_SECONDS`."""
HELD_ROWS = 50_000
"""While the store is away: the most finished rows in memory. Long rows then need about a gigabyte."""

_NAME = re.compile(r"(parts/|rejected/)([^/]*?)([0-9a-f]{32})\.parquet")
"""A part's name: its prefix, the program's own words, and the first digits of the content's hash."""


class PartWriter:
    """The parts of a folder, as one program writes them.

    `count` is called once with each row, stored before or new. `key` tells rows apart; without it the writer remembers
    no rows, and stores each one that it gets. A part's name begins with `name_start`, then its number if `numbered`.
    """

    def __init__(
        self,
        folder: Folder,
        schema: pa.Schema,
        *,
        count: Callable[[Row], None] | None = None,
        key: Callable[[Row], Hashable] | None = None,
        name_start: str = "",
        numbered: bool = False,
        part_rows: int | None = None,
    ) -> None:
        self.folder = folder
        self.parts: list[Part] = []
        self.kept: set[Hashable] = set()
        """Keys of all rows that are kept, in parts or in memory."""
        self.rejected: set[Hashable] = set()
        self._count, self._key, self._part_rows = count, key, part_rows
        self._name_start, self._numbered = name_start, numbered
        self._schemas = {PARTS: schema, REJECTED: REJECTION_SCHEMA}
        self._rows: dict[str, list[Row]] = {PARTS: [], REJECTED: []}
        """Rows that are not stored yet."""
        self._stored_at = self._next_try = time.monotonic()

    def __contains__(self, key: Hashable) -> bool:
        return key in self.kept or key in self.rejected

    @property
    def stored_rows(self) -> int:
        return sum(part.rows for part in self.parts)

    # --- rows of earlier attempts -------------------------------------------------------------------------------

    def recover(self, may_hold: Callable[[str], bool] | None = None) -> None:
        """Recover the parts of the folder whose names `may_hold` accepts; without it, all. The program's own parts come
        first, so that only the rows that they lack are written anew from others."""
        for prefix in self._rows:
            stored = self.folder.bucket.list(self.folder.key(prefix))
            names = [part.key.removeprefix(self.folder.key()) for part in stored]
            for name in sorted(filter(may_hold, names), key=self._is_foreign):
                self.recover_part(name)

    def recover_part(self, name: str) -> bool:
        """Recover one part. False: it is damaged or missing, or is no part."""
        data, name_parts = self.folder.bucket.get(self.folder.key(name)), _NAME.fullmatch(name)
        if data is None or name_parts is None or not sha256(data).startswith(name_parts[3]):
            log.warning("%s is damaged or missing: its rows are made again", name)
            return False
        rows = from_parquet(data)
        fresh = [row for row in rows if self.lacks(row)]
        if len(fresh) == len(rows) and not self._is_foreign(name):
            self.parts.append(Part(key=name, sha256=sha256(data), rows=len(rows)))
        else:
            self._rows[name_parts[1]].extend(fresh)
        for row in fresh:
            self._enter(row)
        return True

    def lacks(self, row: Row) -> bool:
        """Whether a stored row belongs to this program and is not counted yet."""
        return self._key is None or self._key(row) not in self

    def _is_foreign(self, name: str) -> bool:
        """Whether another program, or another number of shards, has named the part."""
        name_parts = _NAME.fullmatch(name)
        return name_parts is None or name_parts[2] != self._name_start

    # --- new rows -----------------------------------------------------------------------------------------------

    def keep(self, row: Row) -> None:
        self._enter(row)
        self._rows[PARTS].append(row)

    def reject(self, row: Row) -> None:
        """Store a row as rejected: later stages leave it out. Its columns are those of REJECTION_SCHEMA."""
        self._enter(row)
        self._rows[REJECTED].append(row)

    def _enter(self, row: Row) -> None:
        if self._key is not None:
            (self.rejected if "reason" in row else self.kept).add(self._key(row))
        if self._count is not None:
            self._count(row)

    def waiting(self, *prefixes: str) -> int:
        """Count of rows that are not stored yet; with prefixes (`parts/`, `rejected/`), only of those."""
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
        """Store the rows that wait. False: the store is away, and the program can go on.

        Raises TransientError when the store has been away for `AWAY_SECONDS`, or when `HELD_ROWS` rows wait.
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
        """Store the rows that wait. Raises TransientError when the store is away; the rows then stay in memory."""
        self._store(self.folder, *prefixes)

    def _store(self, folder: Folder, *prefixes: str) -> None:
        size = self._part_rows or FLUSH_ROWS
        for prefix in prefixes or self._rows:
            rows = self._rows[prefix]
            while rows:
                number = f"{len(self.parts):05d}-" if self._numbered else ""
                self.parts.append(
                    folder.put_rows(prefix + self._name_start + number, rows[:size], self._schemas[prefix])
                )
                del rows[:size]
        self._stored_at = time.monotonic()
