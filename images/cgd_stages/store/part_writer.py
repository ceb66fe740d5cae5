"""The books of one shard of a stage: which of its rows are stored, and the parts that are being added.

A shard owns the rows with int(id, 16) % shards == shard. Parts are named `<shard>-of-<shards>-<hash>.parquet`. Its
marker lists parts that hold exactly the shard's rows, each once, so that the union of all markers of a stage has no
row twice. Whatever breaks this is written anew instead of listed: rows of an attempt with another number of shards,
and rows that two pods of the same shard have stored because one of them was thought dead.
"""

import logging
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from cgd_stages.contract import Rows
from cgd_stages.errors import TransientError
from cgd_stages.store.bucket import Stored
from cgd_stages.store.folder import PARTS, REJECTED, Folder, Part
from cgd_stages.store.rows import REJECTION_SCHEMA, Row, from_parquet, row_schema, sha256

log = logging.getLogger(__name__)

FLUSH_SECONDS = 60.0
"""Finished rows wait at most this long to be stored."""
FLUSH_ROWS = 512
"""As many finished rows do not wait. Also the most rows of a part."""
RETRY_SECONDS = 5.0
"""While the store is away: the pause between two tries, at least."""
RETRY_SHARE = 0.1
"""While the store is away: the share of the time that tries may take from the generation (they are made at least
every `FLUSH_SECONDS`)."""
HELD_ROWS = 50_000
"""While the store is away: the most finished rows that are held in memory, about a gigabyte of long ones."""

Packed = bytes
"""A key in 20 bytes."""
_NAME = re.compile(r"(?:parts|rejected)/(\d+)-of-(\d+)-([0-9a-f]{32})\.parquet")
KEY = ("id", "sample")
_TEXT = {"answer": "answer", "critique": "critique", "refine": "refinement", "distill": "distilled"}


def text_column(stage: str) -> str:
    """The column that a generating stage fills."""
    return _TEXT[stage]


def prompt_tokens_column(stage: str) -> str:
    """Where the length of the stage's own prompt is: the answer's prompt is the prompt."""
    return "prompt_tokens" if stage == "answer" else f"{text_column(stage)}_prompt_tokens"


def owns(identity: str, shard: int, shards: int) -> bool:
    return int(identity, 16) % shards == shard


def packed(row: Row) -> Packed:
    """A row's key. A shard remembers one for every row that it has."""
    return bytes.fromhex(row["id"]) + int(row["sample"]).to_bytes(4)


def may_hold(part: str, shard: int, shards: int) -> bool:
    """Whether a part of this name can hold rows of the shard. No when it belongs to another one of as many."""
    found = _NAME.fullmatch(part)
    return not found or int(found[2]) != shards or int(found[1]) == shard


def owned_rows(
    folder: Folder, parts: Sequence[Part], shard: int, shards: int, columns: Sequence[str] | None = None
) -> Iterator[Row]:
    """The shard's rows of an earlier stage, one part in memory at a time; `columns` must hold the id."""
    for part in parts:
        if may_hold(part.key, shard, shards):
            yield from (row for row in from_parquet(folder.read(part), columns) if owns(row["id"], shard, shards))


class Ledger:
    """What a shard has stored and is about to store. Opening it reads the keys of everything stored so far.

    `wanted` are the keys of the shard's rows in the stage before: what is stored beyond them (by a pod that read
    another outcome of that stage) is left out.
    """

    def __init__(self, folder: Folder, shard: int, shards: int, wanted: Collection[Packed] | None = None) -> None:
        self.folder = folder
        self.parts: list[Part] = []
        self.tally: Counter[str] = Counter()
        """Sums over the shard's rows: done, rejected, prompt_tokens, tokens, and the metrics of the stage."""
        self._shard, self._shards = shard, shards
        self.kept: set[Packed] = set()
        """Keys of the rows that are kept, stored or not."""
        self._rejected: set[Packed] = set()
        self._kept_rows: list[Row] = []
        self._rejected_rows: list[Row] = []
        self._stored_at = self._next_try = time.monotonic()
        for prefix in (PARTS, REJECTED):
            for found in sorted(folder.bucket.list(folder.key(prefix)), key=self._is_foreign):
                self._take(found, wanted)

    def __contains__(self, key: Packed) -> bool:
        return key in self.kept or key in self._rejected

    def rows(self, total: int) -> Rows:
        return Rows(total=total, done=self.tally["done"], rejected=self.tally["rejected"])

    @property
    def due(self) -> bool:
        """Whether finished rows have waited long enough, or are many enough, to be stored."""
        now = time.monotonic()
        if not self._waiting:
            self._stored_at = now
        waited = self._waiting >= FLUSH_ROWS or now - self._stored_at >= FLUSH_SECONDS
        return self._waiting >= HELD_ROWS or (waited and now >= self._next_try)

    @property
    def _waiting(self) -> int:
        return len(self._kept_rows) + len(self._rejected_rows)

    def keep(self, row: Row) -> None:
        self._count(row)
        self._kept_rows.append(row)

    def reject(self, row: Row) -> None:
        """A row that the model did not answer well; columns as in REJECTION_SCHEMA."""
        self._count(row)
        self._rejected_rows.append(row)

    def try_flush(self) -> bool:
        """Store what waits, unless the store is away: then generating goes on, and False is returned.

        Raises TransientError when it has been away for `AWAY_SECONDS`, or when `HELD_ROWS` rows wait.
        """
        started = time.monotonic()
        if self._waiting and started < self._next_try and self._waiting < HELD_ROWS:
            return False
        try:
            self._store(replace(self.folder, bucket=self.folder.bucket.at_once()))
        except TransientError as error:
            if self.folder.bucket.outage.too_long or self._waiting >= HELD_ROWS:
                raise
            now = time.monotonic()
            self._next_try = now + min(max(RETRY_SECONDS, (now - started) / RETRY_SHARE), FLUSH_SECONDS)
            log.warning("%d finished rows wait for the store: %s", self._waiting, error.message)
            return False
        return True

    def flush(self) -> None:
        """Store what waits. Raises TransientError when the store is away; what waits stays."""
        self._store(self.folder)

    def _store(self, folder: Folder) -> None:
        own = f"{self._shard:05d}-of-{self._shards:05d}-"
        schema = row_schema(folder.stage)
        for prefix, rows, columns in (
            (PARTS, self._kept_rows, schema),
            (REJECTED, self._rejected_rows, REJECTION_SCHEMA),
        ):
            while rows:
                self.parts.append(folder.put_rows(prefix + own, rows[:FLUSH_ROWS], columns))
                del rows[:FLUSH_ROWS]
        self._stored_at = time.monotonic()

    def _is_foreign(self, found: Stored) -> bool:
        """Parts of this shard and number of shards are taken first: only what they lack is written anew."""
        name = _NAME.fullmatch(found.key.removeprefix(self.folder.key()))
        return name is None or (int(name[1]), int(name[2])) != (self._shard, self._shards)

    def _take(self, found: Stored, wanted: Collection[Packed] | None) -> None:
        """Count a stored part in, or the rows of it that are this shard's and not counted yet."""
        name = found.key.removeprefix(self.folder.key())
        if not may_hold(name, self._shard, self._shards):
            return
        data = self.folder.bucket.get(found.key)
        named = _NAME.fullmatch(name)
        if data is None or named is None or not sha256(data).startswith(named[3]):
            log.warning("%s is not whole: its rows are asked for again", name)
            return
        rows = from_parquet(data)
        fresh = [row for row in rows if self._lacks(row, wanted)]
        if len(fresh) == len(rows) and int(named[2]) == self._shards:
            self.parts.append(Part(key=name, sha256=sha256(data), rows=len(rows)))
        else:
            (self._kept_rows if name.startswith(PARTS) else self._rejected_rows).extend(fresh)
        for row in fresh:
            self._count(row)

    def _lacks(self, row: Row, wanted: Collection[Packed] | None) -> bool:
        """Whether a stored row is this shard's, and not counted yet."""
        key = packed(row)
        return (wanted is None or key in wanted) and key not in self and owns(row["id"], self._shard, self._shards)

    def _count(self, row: Row) -> None:
        stage = self.folder.stage
        if "reason" in row:
            self._rejected.add(packed(row))
            self.tally.update(
                {
                    "rejected": 1,
                    f"rejected_{row['reason']}": 1,
                    "prompt_tokens": row["prompt_tokens"],
                    "tokens": row["tokens"],
                }
            )
            return
        self.kept.add(packed(row))
        self.tally.update(
            {
                "done": 1,
                "prompt_tokens": row[prompt_tokens_column(stage)],
                "tokens": row[f"{text_column(stage)}_tokens"],
            }
        )
        if stage == "critique":
            self.tally[f"verdict_{row['verdict'] or 'missing'}"] += 1

    def metrics(self) -> dict[str, float]:
        """Counts by reason of rejection and by verdict."""
        return {
            name: float(count) for name, count in sorted(self.tally.items()) if "_" in name and "tokens" not in name
        }
