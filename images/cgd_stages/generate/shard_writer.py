"""The rows of one shard of a stage: which of them are stored, and what they come to.

A shard owns the rows with int(id, 16) % shards == shard. Its parts are named `<shard>-of-<shards>-<hash>.parquet`. Its
marker lists parts that hold exactly the shard's rows, each once, so that the union of all markers of a stage has no
row twice. Whatever breaks this is written anew instead of listed: rows of an attempt with another number of shards,
and rows that two pods of the same shard have stored because one of them was thought dead.
"""

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence

from cgd_stages.contract import Rows
from cgd_stages.store.folder import Folder, Part
from cgd_stages.store.part_writer import PartWriter
from cgd_stages.store.rows import Row, from_parquet, prompt_tokens_column, row_schema, text_column

_NAME = re.compile(r"(?:parts|rejected)/(\d+)-of-(\d+)-[0-9a-f]{32}\.parquet")


def owns(identity: str, shard: int, shards: int) -> bool:
    return int(identity, 16) % shards == shard


def packed(row: Row) -> bytes:
    """A row's key, in 14 bytes. A shard remembers one for every row that it has."""
    return bytes.fromhex(row["id"]) + int(row["sample"]).to_bytes(4)


def may_hold(part: str, shard: int, shards: int) -> bool:
    """Whether a part of this name can hold rows of the shard. No when it belongs to another one of as many."""
    named = _NAME.fullmatch(part)
    return not named or int(named[2]) != shards or int(named[1]) == shard


def owned_rows(
    folder: Folder, parts: Sequence[Part], shard: int, shards: int, columns: Sequence[str] | None = None
) -> Iterator[Row]:
    """The shard's rows of an earlier stage, one part in memory at a time; `columns` must hold the id."""
    for part in parts:
        if may_hold(part.key, shard, shards):
            yield from (row for row in from_parquet(folder.read(part), columns) if owns(row["id"], shard, shards))


class ShardWriter(PartWriter):
    """What a shard has stored and is about to store. Opening it reads everything stored so far.

    `source` are the keys of the shard's rows in the stage before: what is stored beyond them (by a pod that read
    another outcome of that stage) is left out.
    """

    def __init__(self, folder: Folder, shard: int, shards: int, source: Collection[Hashable] | None = None) -> None:
        super().__init__(
            folder, row_schema(folder.stage), count=self._add, key=packed, own=f"{shard:05d}-of-{shards:05d}-"
        )
        self.counts: Counter[str] = Counter()
        """Sums over the shard's rows: done, rejected, prompt_tokens, tokens, and the metrics of the stage."""
        self._shard, self._shards, self._source = shard, shards, source
        self.recover(lambda name: may_hold(name, shard, shards))

    def lacks(self, row: Row) -> bool:
        has_source = self._source is None or packed(row) in self._source
        return has_source and super().lacks(row) and owns(row["id"], self._shard, self._shards)

    def rows(self, total: int) -> Rows:
        return Rows(total=total, done=self.counts["done"], rejected=self.counts["rejected"])

    def metrics(self) -> dict[str, float]:
        """Counts by reason of rejection and by verdict."""
        return {
            name: float(count) for name, count in sorted(self.counts.items()) if "_" in name and "tokens" not in name
        }

    def _add(self, row: Row) -> None:
        if "reason" in row:
            cost = {"prompt_tokens": row["prompt_tokens"], "tokens": row["tokens"]}
            self.counts.update({"rejected": 1, f"rejected_{row['reason']}": 1, **cost})
            return
        stage = self.folder.stage
        cost = {"prompt_tokens": row[prompt_tokens_column(stage)], "tokens": row[f"{text_column(stage)}_tokens"]}
        self.counts.update({"done": 1, **cost})
        if stage == "critique":
            self.counts[f"verdict_{row['verdict'] or 'missing'}"] += 1
