"""Log-probabilities of stored texts: which columns their rows have, and the file from which a training reads them.

A row has the tokens of one text, the log-probability of each, and the K likeliest tokens of each position by rank, one
position after another: `top_ids[i * K:(i + 1) * K]`. They are those of the text and what ends it, without its context.
"""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cgd_stages.store.folder import PARTS, Folder
from cgd_stages.store.rows import digest_of

SCORED_TOKENS, TOP_MASS = "scored_tokens", "top_mass"
"""Metrics: the tokens that were scored, and the probability of their likeliest tokens, summed over them: the share of
the two is what the model's distribution has among the tokens that are told apart."""
_COLUMNS: list[tuple[str, Any]] = [
    ("id", pa.string()),
    ("sample", pa.int32()),
    ("text", pa.string()),
    ("tokens", pa.list_(pa.int32())),
    ("logprobs", pa.list_(pa.float32())),
    ("top_ids", pa.list_(pa.int32())),
    ("top_logprobs", pa.list_(pa.float16())),
]
SCORES_SCHEMA = pa.schema([pa.field(name, kind) for name, kind in _COLUMNS])
"""`text` is `text_digest` of the tokens."""
_READ = ["id", "sample", "top_ids", "top_logprobs"]


def text_digest(tokens: list[int]) -> str:
    """What says that two texts have the same tokens."""
    return digest_of(tokens=tokens)


def write_scores(folder: Folder, path: Path) -> None:
    """Write what a training reads of a finished stage into one file, which its processes map; one part in memory at a
    time."""
    schema = pa.schema([SCORES_SCHEMA.field(name) for name in _READ])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        for part in folder.require().under(PARTS):
            file.write_table(pq.read_table(io.BytesIO(folder.read(part)), columns=_READ).cast(schema))
