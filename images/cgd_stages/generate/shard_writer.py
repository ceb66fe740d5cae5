"""The rows of one shard of a stage: which are stored, and their sums.

A shard owns the rows with int(id, 16) % shards == shard. Its parts are named `<shard>-of-<shards>-<hash>.parquet`. Its
marker lists parts that hold the shard's rows and no others, each once, so that the markers of a stage together have no
row twice. A part that breaks this is not listed; its rows are written anew. Such parts come from an attempt with
another number of shards, and from two pods of one shard when the cluster lost sight of the first.
"""

from collections import Counter
from collections.abc import Collection, Hashable, Iterator

from cgd_stages.contract import Rows
from cgd_stages.engines.replies import ENDLESS
from cgd_stages.store.folder import Folder
from cgd_stages.store.part_writer import PartWriter
from cgd_stages.store.rows import Row, prompt_tokens_column, row_schema, text_column
from cgd_stages.store.shards import may_hold, owns, part_start


def packed(row: Row) -> bytes:
    """A row's key in 14 bytes, of which a shard remembers one for each of its rows."""
    return bytes.fromhex(row["id"]) + int(row["sample"]).to_bytes(4)


def drawn(row: Row, draws: int) -> Iterator[Row]:
    """A row of the stage before, once for each text that is drawn for it. Its samples follow one another:
    `sample * draws` and up."""
    return (row | {"sample": row["sample"] * draws + draw} for draw in range(draws))


class ShardWriter(PartWriter):
    """The stored and waiting rows of a shard. Its constructor reads all that is stored.

    `source` has the keys of the shard's rows in the stage before; for each of them `draws` texts are drawn. Stored rows
    of other keys, by a pod that read another outcome of that stage, are left out.
    """

    def __init__(
        self, folder: Folder, shard: int, shards: int, source: Collection[Hashable] | None = None, draws: int = 1
    ) -> None:
        super().__init__(
            folder, row_schema(folder.stage), count=self._add, key=packed, name_start=part_start(shard, shards)
        )
        self.counts: Counter[str] = Counter()
        """Sums over the shard's rows: `done`, `rejected`, `prompt_tokens`, `tokens`, and the metrics of the stage."""
        self._shard, self._shards, self._source, self._draws = shard, shards, source, draws
        self.recover(lambda name: may_hold(name, shard, shards))

    def lacks(self, row: Row) -> bool:
        drawn_for = row | {"sample": row["sample"] // self._draws}
        has_source = self._source is None or packed(drawn_for) in self._source
        return has_source and super().lacks(row) and owns(row["id"], self._shard, self._shards)

    def rows(self, total: int) -> Rows:
        return Rows(total=total, done=self.counts["done"], rejected=self.counts["rejected"])

    def metrics(self) -> dict[str, float]:
        """Rows by reason of rejection, by verdict, and answers without an end by what ended them."""
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
        if stage == "answer" and (ending := row["answer_finish_reason"]) in ENDLESS.values():
            self.counts[f"unfinished_{ending}"] += 1
        if stage == "critique":
            self.counts[f"verdict_{row['verdict'] or 'missing'}"] += 1
