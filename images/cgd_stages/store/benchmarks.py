"""The questions of the benchmarks, as `prepare` stores them and the evaluations read them."""

from typing import Any

import pyarrow as pa

from cgd_stages.store.folder import Folder
from cgd_stages.store.rows import TURNS, Row, from_parquet

BENCHMARKS = "benchmarks.parquet"
_BENCHMARK: list[tuple[str, Any]] = [
    ("benchmark", pa.string()),
    ("id", pa.string()),
    ("prompt", pa.string()),
    ("reference", pa.string()),
    ("tolerance", pa.string()),
    TURNS,
]
BENCHMARK_SCHEMA = pa.schema([pa.field(column, kind) for column, kind in _BENCHMARK])


def read_benchmarks(folder: Folder) -> list[Row]:
    """The questions that prepare has stored, in the columns of `BENCHMARK_SCHEMA`. A question that is no conversation
    has no `turns`: the questions are part of digests, and those of one text keep theirs."""
    (part,) = folder.require().under(BENCHMARKS)
    rows = from_parquet(folder.read(part))
    return [{name: value for name, value in row.items() if name != "turns" or value is not None} for row in rows]
