"""Sources of prompts and benchmarks: files of JSON lines or Parquet, in S3, on the Hugging Face hub or in a ConfigMap,
read row by row."""

import codecs
import gzip
import hashlib
import io
import itertools
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic_core import from_json

from cgd_stages.contract import INPUTS, Fields, Source
from cgd_stages.errors import TransientError, UserError
from cgd_stages.runtime.program import Context
from cgd_stages.store.bucket import place
from cgd_stages.text.normal import normalised

CONFIG_MAP = "configmap://"
HUB = "hf://datasets/"
LINE_BYTES = 4 << 20
"""Of a row, unpacked: a context of a million tokens. A longer one is rejected, so that a small file that unpacks to a
large one costs no memory."""
TOO_LONG = f"longer than {LINE_BYTES >> 20} MiB"
BATCH_ROWS, BATCH_BYTES = 1000, 64 << 20
"""Rows of a Parquet file that are unpacked together: so many, if they have no more bytes."""
FORMATS = ".jsonl or .json (JSON lines), the same with .gz or .zst, or .parquet"


@dataclass(frozen=True)
class File:
    """One file of a source on this machine: `name` as the user knows it, `sha256` of its bytes, and of a file from the
    hub the commit it is of."""

    name: str
    path: Path
    sha256: str
    revision: str = ""


@dataclass(frozen=True)
class Line:
    """One row of a source: `value`, or why there is none. `where` says which, such as `prompts.jsonl line 12`."""

    where: str
    value: dict[str, Any] | None
    fault: str = ""


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
    if source.source.startswith(HUB):
        return _from_hub(source.source, field)
    hint = f"Write {field}.source as s3://bucket/key or configmap://name/key, or as {HUB}owner/name@revision/path."
    raise UserError(f"{source.source!r} is not a source of rows", hint=hint)


def read_lines(files: list[File], field: str, fields: Fields) -> Iterator[Line]:
    """Every row of the files, in order. Raises UserError when a file as a whole cannot be read.

    Of a Parquet file that has all the `fields` no other column is read.
    """
    for file in files:
        try:
            yield from _parquet_lines(file, fields) if file.name.endswith(".parquet") else _json_lines(file, field)
        except (pa.ArrowException, zlib.error, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            message = f"{file.name} cannot be read: {error}"
            raise UserError(message, hint=f"Check the file of {field}.source; it may be cut or corrupt.") from error


def _from_config_map(context: Context, uri: str) -> File:
    name = uri.removeprefix(CONFIG_MAP)
    if context.inputs is None:
        raise UserError(f"{uri} is not mounted: {INPUTS} is not set")
    path = place(context.inputs, name)
    if not path.is_file():
        config_map, _, key = name.partition("/")
        hint = f"Apply a ConfigMap {config_map} with the key {key} in the namespace of the run."
        raise TransientError(f"there is no {uri} yet", hint=hint)
    return _file(uri, path)


def _from_store(context: Context, uri: str, field: str) -> list[File]:
    parent, _, pattern = uri.rpartition("/")
    bucket = context.store.bucket.at(parent)
    fixed = pattern.partition("*")[0]
    found = [item for item in bucket.list(fixed) if fnmatchcase(item.key, pattern) and "/" not in item.key]
    if not found:
        raise UserError(f"there is no object {uri}", hint=f"Correct {field}.source.")
    files = []
    for item in found:
        path = place(context.scratch / "sources", hashlib.sha256(f"{parent}/{item.key}".encode()).hexdigest()[:16])
        bucket.download(item.key, path)
        files.append(_file(f"{parent}/{item.key}", path))
    return files


def _from_hub(uri: str, field: str) -> list[File]:
    """The files of a data set at one commit; those that an earlier run has left in the cache are not fetched again."""
    from huggingface_hub import parse_hf_uri, snapshot_download

    try:
        where = parse_hf_uri(uri)
        folder, slash, pattern = where.path_in_repo.rpartition("/")
        commit = Path(
            snapshot_download(
                where.id,
                repo_type="dataset",
                revision=where.revision,
                allow_patterns=[where.path_in_repo],
                # The hub's * crosses slashes; ours does not, and a folder below may be large.
                ignore_patterns=[f"{folder}{slash}*/*"],
            )
        )
    except (ValueError, OSError) as error:
        _hub_refused(error, uri, field)
    below = place(commit, where.path_in_repo).parent
    found = sorted(path for path in below.glob("*") if path.is_file() and fnmatchcase(path.name, pattern))
    if not found:
        raise UserError(f"the data set {where.id} has no file {where.path_in_repo}", hint=f"Correct {field}.source.")
    parent = uri.rpartition("/")[0]
    return [replace(_file(f"{parent}/{path.name}", path), revision=commit.name) for path in found]


def _hub_refused(error: Exception, uri: str, field: str) -> NoReturn:
    from huggingface_hub import constants, errors

    form = f"Correct {field}.source: {HUB}owner/name@revision/path, with * allowed in the last part."
    token = "the Hugging Face token of spec.hubTokenSecretRef"  # noqa: S105 (a name)
    match error:
        case errors.HfUriError() | errors.HFValidationError():
            raise UserError(f"{uri} names no data set: {error}", hint=form) from error
        case errors.GatedRepoError():
            hint = f"Ask for access on the page of the data set, and give {token}."
            raise UserError(f"{uri}: the data set is gated: {error}", hint=hint) from error
        case errors.RepositoryNotFoundError():
            hint = f"{form} If the data set is private, give {token}."
            raise UserError(f"{uri}: there is no such data set on the hub", hint=hint) from error
        case errors.RevisionNotFoundError():
            raise UserError(f"{uri}: the data set has no such revision", hint=form) from error
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            raise UserError(f"{uri}: the hub denies access: {error}", hint=f"Check {token}.") from error
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            hint = f"Allow the pod to reach the hub (HF_HUB_OFFLINE is set), or put the files in S3 for {field}.source."
            raise UserError(f"{uri} is not in the local cache, and the hub is switched off", hint=hint) from error
        case OSError() if not isinstance(error, errors.HfHubHTTPError | errors.LocalEntryNotFoundError):
            raise error
        case _:
            hint = f"The hub may be out of reach from this pod; files in S3 for {field}.source do not need it."
            raise TransientError(f"{uri} cannot be fetched from the hub: {error}", hint=hint) from error


def _file(name: str, path: Path) -> File:
    with path.open("rb") as opened:
        return File(name, path, hashlib.file_digest(opened, "sha256").hexdigest())


def _parquet_lines(file: File, fields: Fields) -> Iterator[Line]:
    numbers, wanted = itertools.count(1), fields.columns
    # A text that comes many times is held once: a file of some hundred bytes may have a thousand of 5 MB.
    options: dict[str, Any] = {"arrow_extensions_enabled": False}  # which its stubs do not know
    texts = _texts(pq.read_metadata(file.path).schema)
    with pq.ParquetFile(file.path, read_dictionary=texts, **options) as table:
        # A file that lacks one is read whole, so that what it has instead can be told.
        columns = wanted if set(wanted) <= set(table.schema_arrow.names) else None
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            for value in _values(batch):
                where = f"{file.name} row {next(numbers)}"
                yield Line(where, None, value) if isinstance(value, str) else Line(where, value)


def _texts(schema: pq.ParquetSchema) -> list[str]:
    """The paths of all columns of text or bytes, also within lists and structs."""
    columns: list[Any] = [schema.column(index) for index in range(len(schema))]
    return [one.path for one in columns if one.physical_type == "BYTE_ARRAY" and one.logical_type.type != "DECIMAL"]


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Every row of a batch, or what is wrong with it: of a small batch all at once, else one after another."""
    if _size(batch) <= BATCH_BYTES:
        with suppress(ValueError, OverflowError, LookupError):  # one of them has no value: it is found below
            yield from _plain(batch).to_pylist()
            return
    for one in (batch.slice(index, 1) for index in range(batch.num_rows)):
        try:
            yield _plain(one).to_pylist()[0] if _size(one) <= LINE_BYTES else TOO_LONG
        except UnicodeDecodeError as error:
            yield f"not UTF-8: {error}"
        except (ValueError, OverflowError, LookupError) as error:  # dates that Python has not, unknown time zones
            yield f"a value that cannot be read: {error}"


def _size(batch: pa.RecordBatch) -> int:
    """Bytes of all its rows when they are unpacked."""
    columns: list[Any] = batch.columns
    return sum(map(_bytes, columns))


def _bytes(column: Any) -> int:
    kind = column.type
    if pa.types.is_dictionary(kind) and _is_text(kind.value_type):
        return len(column) + (pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(map(_bytes, column.flatten()))
    if pa.types.is_map(kind):
        first, end = column.offsets[0].as_py(), column.offsets[-1].as_py()
        return len(column) + sum(_bytes(part.slice(first, end - first)) for part in (column.keys, column.items))
    if any(is_kind(kind) for is_kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        return len(column) + _bytes(column.flatten())
    return int(column.nbytes)


def _is_text(kind: pa.DataType) -> bool:
    is_kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(is_kind(kind) for is_kind in is_kinds)


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    columns: list[Any] = batch.columns
    plain = [one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in columns]
    return pa.RecordBatch.from_arrays(plain, names=batch.schema.names)


def _json_lines(file: File, field: str) -> Iterator[Line]:
    with _opened(file, field) as opened:
        for number, raw in enumerate(_bounded(opened), start=1):
            where = f"{file.name} line {number}"
            if raw is None:
                yield Line(where, None, TOO_LONG)
            elif raw.strip():
                yield _json_line(where, raw)


def _bounded(opened: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long, which is never held as a whole."""
    while raw := opened.readline(LINE_BYTES + 1):
        if len(raw) <= LINE_BYTES:
            yield raw
            continue
        while raw and not raw.endswith(b"\n"):
            raw = opened.readline(LINE_BYTES)
        yield None


def _json_line(where: str, raw: bytes) -> Line:
    """Values that are nested 200 deep, and halves of surrogate pairs, are refused by the reader."""
    try:
        value = from_json(raw.removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        return Line(where, None, f"not JSON in UTF-8: {error}")
    if not isinstance(value, dict):
        return Line(where, None, f"a JSON {type(value).__name__}, not an object")
    return Line(where, value)


def _opened(file: File, field: str) -> BinaryIO:
    if file.name.endswith((".jsonl", ".json")):
        return file.path.open("rb")
    if file.name.endswith((".jsonl.gz", ".json.gz")):
        return cast("BinaryIO", gzip.open(file.path, "rb"))
    if file.name.endswith((".jsonl.zst", ".json.zst")):
        return _unzstd(file)
    raise UserError(f"{file.name} has no known format", hint=f"{field}.source takes {FORMATS}.")


def _unzstd(file: File) -> BinaryIO:
    codec = pa.input_stream(str(file.path), compression="zstd")
    return cast("BinaryIO", io.BufferedReader(codec))
