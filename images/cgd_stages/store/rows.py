"""Rows, their columns at each stage, and Parquet files of them. Pure.

A stage adds columns to the rows of the stage before it; `id` and `sample` name a row at all of them.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cgd_stages.contract import FORMAT

Row = dict[str, Any]
"""One row: column name to value."""
Key = tuple[str, int]
"""A row's id and sample."""
_COLUMNS: dict[str, list[tuple[str, Any]]] = {
    "prepare": [
        ("id", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("prompt_tokens", pa.int32()),
    ],
    "answer": [
        ("answer", pa.string()),
        ("answer_thinking", pa.string()),
        ("answer_tokens", pa.int32()),
        ("answer_finish_reason", pa.string()),
    ],
    "critique": [
        ("critique", pa.string()),
        ("critique_thinking", pa.string()),
        ("critique_prompt_tokens", pa.int32()),
        ("critique_tokens", pa.int32()),
        ("critique_finish_reason", pa.string()),
        ("verdict", pa.string()),
    ],
    "refine": [
        ("refinement", pa.string()),
        ("refinement_thinking", pa.string()),
        ("refinement_prompt_tokens", pa.int32()),
        ("refinement_tokens", pa.int32()),
        ("refinement_finish_reason", pa.string()),
    ],
    "distill": [
        ("distilled", pa.string()),
        ("distilled_thinking", pa.string()),
        ("distilled_prompt_tokens", pa.int32()),
        ("distilled_tokens", pa.int32()),
        ("distilled_finish_reason", pa.string()),
    ],
    "miscritique": [
        ("miscritique", pa.string()),
        ("miscritique_thinking", pa.string()),
        ("miscritique_prompt_tokens", pa.int32()),
        ("miscritique_tokens", pa.int32()),
        ("miscritique_finish_reason", pa.string()),
    ],
    "misrefine": [
        ("misrefinement", pa.string()),
        ("misrefinement_thinking", pa.string()),
        ("misrefinement_prompt_tokens", pa.int32()),
        ("misrefinement_tokens", pa.int32()),
        ("misrefinement_finish_reason", pa.string()),
    ],
}
TURNS: tuple[str, Any] = ("turns", pa.string())
"""The column with a conversation's turns before the prompt, as JSON: a list of {role, content}. Null: the prompt is the
whole conversation."""
_CHAINS = [
    ("prepare", "answer", "critique", "refine"),
    ("prepare", "distill"),
    ("prepare", "answer", "critique", "miscritique", "misrefine"),
]
"""Each stage adds columns to the rows of the stage before it. The teacher's own answers need none of the student."""
_REJECTION: list[tuple[str, Any]] = [
    ("id", pa.string()),
    ("sample", pa.int32()),
    ("stage", pa.string()),
    ("reason", pa.string()),
    ("detail", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("tokens", pa.int32()),
]
REJECTION_SCHEMA = pa.schema(_REJECTION)
KEY = ("id", "sample")
"""The columns that tell rows apart."""
_TEXT = {
    "answer": "answer",
    "critique": "critique",
    "refine": "refinement",
    "distill": "distilled",
    "miscritique": "miscritique",
    "misrefine": "misrefinement",
}


def text_column(stage: str) -> str:
    """The column that a generating stage fills."""
    return _TEXT[stage]


def prompt_tokens_column(stage: str) -> str:
    """The column with the length of the stage's own prompt. The answer's prompt is the row's prompt."""
    return "prompt_tokens" if stage == "answer" else f"{text_column(stage)}_prompt_tokens"


def row_schema(stage: str, *, conversations: bool = False) -> pa.Schema:
    """Columns of a stage's rows: its own after those of every stage before it, so that a part needs no other part.

    The rows of prepare have turns only where the prompts are conversations: the hash of these rows names the folders
    of answers, and prompts of one text keep the hash that they have always had.
    """
    chain = next(chain for chain in _CHAINS if stage in chain)
    columns = [column for name in chain[: chain.index(stage) + 1] for column in _COLUMNS[name]]
    columns += [TURNS] if conversations or stage != "prepare" else []
    return pa.schema(columns)


def digest_of(**values: object) -> str:
    """Hash of named JSON values, 32 hex digits. The format's version is always part of it."""
    text = json.dumps({"format": FORMAT, **values}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def key_of(row: Row) -> Key:
    return row["id"], row["sample"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now() -> str:
    """RFC 3339, UTC, seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_parquet(rows: Sequence[Row], schema: pa.Schema) -> bytes:
    """Lists of numbers, which have many values, are smaller without a dictionary."""
    sink, numbers = io.BytesIO(), {field.name for field in schema if _is_numbers(field.type)}
    # pyarrow takes a list of columns as well, which its types do not say.
    dictionary: Any = [name for name in schema.names if name not in numbers] if numbers else True
    table = pa.Table.from_pylist(list(rows), schema=schema)
    pq.write_table(table, sink, compression="zstd", use_dictionary=dictionary)
    return sink.getvalue()


def _is_numbers(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))


def from_parquet(data: bytes, columns: Sequence[str] | None = None) -> list[Row]:
    """Rows of a Parquet file, with all columns or with those of `columns` that the file has."""
    file = pq.ParquetFile(io.BytesIO(data))
    present = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
    rows: list[Row] = file.read(columns=present).to_pylist()
    return rows
