"""The questions of the benchmarks, as `prepare` stores them and the evaluations read them, and those that training
texts are compared with."""

from collections.abc import Sequence

import pyarrow as pa

from cgd_stages.store.folder import Folder, Part
from cgd_stages.store.rows import TURNS, Row, from_parquet

_NAME = "benchmarks"
"""How the part's name begins. The content's hash follows, because two attempts may write the same questions in other
bytes (another version of pyarrow). Earlier builds named it `benchmarks.parquet`."""
_ORIGINALS = "originals"
"""How the name of the other part begins: the questions of benchmarks and the documents of tasks of lm-eval."""
BENCHMARK_SCHEMA = pa.schema(
    [
        ("benchmark", pa.string()),
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("tolerance", pa.string()),
        TURNS,
    ]
)


def store_benchmarks(folder: Folder, questions: Sequence[Row]) -> Part:
    """Store the questions, in the columns of `BENCHMARK_SCHEMA`, as one part of the folder."""
    return folder.put_rows(f"{_NAME}-", questions, BENCHMARK_SCHEMA)


def store_originals(folder: Folder, questions: Sequence[Row]) -> Part:
    """Store the questions that training texts are compared with, in the same columns."""
    return folder.put_rows(f"{_ORIGINALS}-", questions, BENCHMARK_SCHEMA)


def read_originals(folder: Folder) -> tuple[list[Row], str]:
    """The questions that training texts are compared with, and the hash of their part."""
    (part,) = folder.require().under(_ORIGINALS)
    return from_parquet(folder.read(part)), part.sha256


def read_benchmarks(folder: Folder) -> list[Row]:
    """The questions that prepare has stored, in the columns of `BENCHMARK_SCHEMA`. A question that is no conversation
    has no `turns`: the questions are part of digests, and those of one text keep theirs."""
    (part,) = folder.require().under(_NAME)
    rows = from_parquet(folder.read(part))
    return [{name: value for name, value in row.items() if name != "turns" or value is not None} for row in rows]
