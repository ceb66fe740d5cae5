"""What the student of a training samples while it is trained, and what the teacher says of it: the columns of the rows,
and who reads them.

    <namespace>/rollout-<training>/<digest>/parts/<round>-<shard>-of-<shards>-*.parquet   ROLLOUT_SCHEMA
    <namespace>/score-<training>/<digest>/parts/<round>-<shard>-of-<shards>-*.parquet     SCORED_ROLLOUT_SCHEMA
    <namespace>/<either>/<digest>/rounds/<round>/<shard>-of-<shards>.json                 the parts of a round, last

The stage that scores adds its columns to those of the stage that samples, so a training reads its rows alone.
"""

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cgd_stages.store.folder import PARTS, Folder, RoundMarker
from cgd_stages.store.rows import Row, from_parquet
from cgd_stages.store.shards import part_start

_COLUMNS: list[tuple[str, Any]] = [
    ("id", pa.string()),
    ("sample", pa.int32()),
    ("step", pa.int32()),
    ("input_ids", pa.list_(pa.int32())),
    ("start", pa.int32()),
    ("logprobs", pa.list_(pa.float32())),
    ("finish", pa.string()),
]
_SCORES: list[tuple[str, Any]] = [
    ("teacher_logprobs", pa.list_(pa.float32())),
    ("top_ids", pa.list_(pa.int32())),
    ("top_logprobs", pa.list_(pa.float16())),
]
ROLLOUT_SCHEMA = pa.schema([pa.field(name, kind) for name, kind in _COLUMNS])
"""`id` and `sample` are those of the row whose prompt was asked, `step` (from 0) is the training's step that learns it.
`input_ids` are context and sample, of which those from `start` on were sampled, with the token that ended the sample
unless `finish` is `length`; `logprobs` are the sampler's own, of each sampled token, at temperature 1."""
SCORED_ROLLOUT_SCHEMA = pa.schema([pa.field(name, kind) for name, kind in (*_COLUMNS, *_SCORES)])
"""With the teacher's log-probability of each sampled token, and its K likeliest tokens at each of their positions by
rank, one position after another, as in `scores`; K may be 0."""
RolloutKey = tuple[str, int, int]
_PART = re.compile(rf"{PARTS}(\d+)-(\d+)-of-(\d+)-[0-9a-f]{{32}}\.parquet")


def rollout_key(row: Row) -> RolloutKey:
    """What tells the rows of a training apart: an example is sampled once in each epoch at most."""
    return row["id"], row["sample"], row["step"]


def round_start(number: int, shard: int, shards: int) -> str:
    """How the names of a round's parts begin."""
    return f"{number:05d}-{part_start(shard, shards)}"


def is_of_round(part: str, number: int, shard: int, shards: int) -> bool:
    """Whether a part of this name is one of a round and shard."""
    found = _PART.fullmatch(part)
    return found is not None and tuple(map(int, found.groups())) == (number, shard, shards)


def round_rows(folder: Folder, markers: Sequence[RoundMarker], columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows that the markers of a round list, one part in memory at a time, in no promised order."""
    for marker in markers:
        for part in marker.parts:
            if part.key.startswith(PARTS):
                yield from from_parquet(folder.read(part), columns)


def write_round(folder: Folder, markers: Sequence[RoundMarker], path: Path) -> None:
    """Write the scored rows of a round into one file, which a training's processes map; one part in memory at a
    time."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCORED_ROLLOUT_SCHEMA) as file:
        for part in (part for marker in markers for part in marker.parts if part.key.startswith(PARTS)):
            table = pq.read_table(io.BytesIO(folder.read(part)), columns=SCORED_ROLLOUT_SCHEMA.names)
            file.write_table(table.cast(SCORED_ROLLOUT_SCHEMA))
