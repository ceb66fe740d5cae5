"""The rows of a stage that one of its pods does: a *shard* owns the rows with int(id, 16) % shards == shard."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from cgd_stages.contract import Rows, StageFacts
from cgd_stages.store.folder import Folder, Part, ShardMarker
from cgd_stages.store.rows import Row, from_parquet

_NAME = re.compile(r"(?:parts|rejected)/(\d+)-of-(\d+)-[0-9a-f]{32}\.parquet")


def part_start(shard: int, shards: int) -> str:
    """How the names of a shard's parts begin."""
    return f"{shard:05d}-of-{shards:05d}-"


def owns(identity: str, shard: int, shards: int) -> bool:
    return int(identity, 16) % shards == shard


def may_hold(part: str, shard: int, shards: int) -> bool:
    """Whether a part of this name can hold rows of the shard: not when another shard of the same number wrote it."""
    match = _NAME.fullmatch(part)
    return not match or int(match[2]) != shards or int(match[1]) == shard


def owned_rows(
    folder: Folder, parts: Sequence[Part], shard: int, shards: int, columns: Sequence[str] | None = None
) -> Iterator[Row]:
    """The shard's rows of an earlier stage, one part in memory at a time; `columns` must hold the id."""
    for part in parts:
        if may_hold(part.key, shard, shards):
            yield from (row for row in from_parquet(folder.read(part), columns) if owns(row["id"], shard, shards))


def mark(folder: Folder, marker: ShardMarker) -> list[ShardMarker]:
    """Store the marker of a shard that has ended, unless it is there already; the markers of all that have ended."""
    former = folder.shard_marker(marker.shard, marker.shards)
    if former is None or former.parts != marker.parts:  # each attempt must get further than the one before
        folder.mark_shard(marker)
    markers = (folder.shard_marker(shard, marker.shards) for shard in range(marker.shards))
    return [found for found in markers if found is not None]


def summed(facts: Sequence[StageFacts]) -> StageFacts:
    """The facts of a stage: the sum over its shards, and the seconds of the longest."""
    metrics: Counter[str] = Counter()
    for shard in facts:
        metrics.update(shard.metrics)
    return StageFacts(
        rows=Rows(
            total=sum(shard.rows.total for shard in facts),
            done=sum(shard.rows.done for shard in facts),
            rejected=sum(shard.rows.rejected for shard in facts),
        ),
        prompt_tokens=sum(shard.prompt_tokens for shard in facts),
        generated_tokens=sum(shard.generated_tokens for shard in facts),
        seconds=max((shard.seconds for shard in facts), default=0.0),
        metrics=dict(metrics),
    )
