"""Sources of prompts and benchmarks: files of JSON lines or Parquet, in S3 or in a ConfigMap, read row by row."""

import gzip
import hashlib
import io
import json
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cgd_stages.contract import INPUTS, Source
from cgd_stages.errors import TransientError, UserError
from cgd_stages.program import Context

CONFIG_MAP = "configmap://"
FORMATS = ".jsonl, .jsonl.gz, .jsonl.zst or .parquet"


@dataclass(frozen=True)
class File:
    """One file of a source on this machine: `name` as the user knows it, `sha256` of its bytes."""

    name: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class Line:
    """One row of a source: `value`, or why there is none. `where` says which, such as `prompts.jsonl line 12`."""

    where: str
    value: dict[str, Any] | None
    fault: str = ""


def normalised(text: str) -> str:
    """The text up to Unicode composition and blanks: what makes two prompts the same prompt."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def row_id(text: str) -> str:
    """Id of a prompt: 20 hex digits that depend on nothing but its normalised text."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()[:20]


def open_source(context: Context, source: Source, field: str) -> list[File]:
    """Bring a source's files here. `field` is where the spec names it, for the messages.

    Raises UserError when there is no such file, TransientError for a ConfigMap that may still be on its way.
    """
    if source.source.startswith(CONFIG_MAP):
        return [_from_config_map(context, source.source)]
    if source.source.startswith("s3://"):
        return _from_store(context, source.source, field)
    hint = f"Write {field}.source as s3://bucket/key or configmap://name/key."
    raise UserError(f"{source.source!r} is not a source of rows", hint=hint)


def read_lines(files: list[File], field: str) -> Iterator[Line]:
    """Every row of the files, in order. Raises UserError when a file as a whole cannot be read."""
    for file in files:
        try:
            yield from _parquet_lines(file) if file.name.endswith(".parquet") else _json_lines(file, field)
        except (pa.ArrowException, zlib.error, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            message = f"{file.name} cannot be read: {error}"
            raise UserError(message, hint=f"Check the file of {field}.source; it may be cut or corrupt.") from error


def _from_config_map(context: Context, uri: str) -> File:
    name = uri.removeprefix(CONFIG_MAP)
    if context.inputs is None:
        raise UserError(f"{uri} is not mounted: {INPUTS} is not set")
    path = context.inputs / name
    if not path.is_file():
        config_map, _, key = name.partition("/")
        hint = f"Apply a ConfigMap {config_map} with the key {key} in the namespace of the run."
        raise TransientError(f"there is no {uri} yet", hint=hint)
    return _file(uri, path)


def _from_store(context: Context, uri: str, field: str) -> list[File]:
    parent, _, pattern = uri.rpartition("/")
    bucket = context.bucket.at(parent)
    fixed = pattern.partition("*")[0]
    found = [item for item in bucket.list(fixed) if fnmatchcase(item.key, pattern) and "/" not in item.key]
    if not found:
        raise UserError(f"there is no object {uri}", hint=f"Correct {field}.source.")
    files = []
    for item in found:
        path = context.scratch / "sources" / hashlib.sha256(f"{parent}/{item.key}".encode()).hexdigest()[:16]
        bucket.download(item.key, path)
        files.append(_file(f"{parent}/{item.key}", path))
    return files


def _file(name: str, path: Path) -> File:
    with path.open("rb") as opened:
        return File(name, path, hashlib.file_digest(opened, "sha256").hexdigest())


def _parquet_lines(file: File) -> Iterator[Line]:
    number = 0
    with pq.ParquetFile(file.path) as table:
        for batch in table.iter_batches(batch_size=1000):
            for value in batch.to_pylist():
                number += 1
                yield Line(f"{file.name} row {number}", value)


def _json_lines(file: File, field: str) -> Iterator[Line]:
    with _opened(file, field) as opened:
        for number, raw in enumerate(opened, start=1):
            if raw.strip():
                yield _json_line(f"{file.name} line {number}", raw)


def _json_line(where: str, raw: bytes) -> Line:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except ValueError as error:
        return Line(where, None, f"not JSON in UTF-8: {error}")
    if not isinstance(value, dict):
        return Line(where, None, f"a JSON {type(value).__name__}, not an object")
    return Line(where, value)


def _opened(file: File, field: str) -> BinaryIO:
    if file.name.endswith(".jsonl"):
        return file.path.open("rb")
    if file.name.endswith(".jsonl.gz"):
        return cast("BinaryIO", gzip.open(file.path, "rb"))
    if file.name.endswith(".jsonl.zst"):
        return _unzstd(file)
    raise UserError(f"{file.name} has no known format", hint=f"{field}.source takes {FORMATS}.")


def _unzstd(file: File) -> BinaryIO:
    codec = pa.input_stream(str(file.path), compression="zstd")
    return cast("BinaryIO", io.BufferedReader(codec))
