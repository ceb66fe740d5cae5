"""Sources of prompts and benchmarks: files of JSON lines or Parquet, in S3, on the Hugging Face hub or in a ConfigMap.
They are read row by row."""

import codecs
import gzip
import hashlib
import io
import itertools
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cgd_stages.contract import CONFIG_MAP, Fields, Source
from cgd_stages.errors import TransientError, UserError
from cgd_stages.prepare.values import flaw, parse
from cgd_stages.runtime.inputs import mounted
from cgd_stages.runtime.program import Context
from cgd_stages.store.bucket import place
from cgd_stages.text.normal import normalised

HUB = "hf://datasets/"
LINE_BYTES = 4 << 20
"""The most bytes of an unpacked row: a context of a million tokens. A longer row is rejected, so that a small file that
unpacks to a large one takes no memory."""
TOO_LONG = f"longer than {LINE_BYTES >> 20} MiB"
BATCH_ROWS, BATCH_BYTES = 1000, 64 << 20
"""The most rows of a Parquet file that are unpacked together, and the most bytes of them."""
FORMATS = ".jsonl or .json (JSON lines), the same with .gz or .zst, or .parquet"


@dataclass(frozen=True)
class File:
    """One file of a source on this machine. `name` is the user's; `sha256` is of the bytes; `revision` is the commit of
    a file from the hub."""

    name: str
    path: Path
    sha256: str
    revision: str = ""


@dataclass(frozen=True)
class Line:
    """One row of a source: its `value`, or the `fault` why it has none. `where` names it: `prompts.jsonl line 12`."""

    where: str
    value: dict[str, Any] | None
    fault: str = ""


def row_id(text: str) -> str:
    """Id of a prompt: 20 hex digits of the hash of its normalised text."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()[:20]


def open_source(context: Context, source: Source, field: str) -> list[File]:
    """Fetch the files of a source. Messages call it by `field`, its place in the spec.

    Raises UserError when no file exists, TransientError when a ConfigMap has not been mounted yet.
    """
    if source.source.startswith(CONFIG_MAP):
        return [_file(source.source, mounted(context, source.source))]
    if source.source.startswith("s3://"):
        return _from_store(context, source.source, field)
    if source.source.startswith(HUB):
        return _from_hub(source.source, field)
    hint = f"Write {field}.source as s3://bucket/key or configmap://name/key, or as {HUB}owner/name@revision/path."
    raise UserError(f"{source.source!r} is not a source of rows", hint=hint)


def read_lines(files: list[File], field: str, fields: Fields) -> Iterator[Line]:
    """Every row of the files, in order. Raises UserError when a file as a whole cannot be read.

    A Parquet file that has all `fields` is read without its other columns.
    """
    for file in files:
        try:
            yield from (
                _parquet_lines(file, field, fields) if file.name.endswith(".parquet") else _json_lines(file, field)
            )
        except (pa.ArrowException, zlib.error, EOFError, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            message = f"{file.name} cannot be read: {error}"
            raise UserError(message, hint=f"Check the file of {field}.source; it may be cut or corrupt.") from error


def _from_store(context: Context, uri: str, field: str) -> list[File]:
    parent, _, pattern = uri.rpartition("/")
    bucket = context.store.bucket.at(parent)
    fixed = pattern.partition("*")[0]
    keys = [stored.key for stored in bucket.list(fixed) if fnmatchcase(stored.key, pattern) and "/" not in stored.key]
    if not keys:
        raise UserError(f"there is no object {uri}", hint=f"Correct {field}.source.")
    files = []
    for key in keys:
        name = f"{parent}/{key}"
        path = place(context.scratch / "sources", hashlib.sha256(name.encode()).hexdigest()[:16])
        bucket.download(key, path)
        files.append(_file(name, path))
    return files


def _from_hub(uri: str, field: str) -> list[File]:
    """The files of a data set at one commit. Files that an earlier run has left in the cache are not fetched again."""
    from huggingface_hub import parse_hf_uri, snapshot_download

    try:
        dataset = parse_hf_uri(uri)
        folder, slash, pattern = dataset.path_in_repo.rpartition("/")
        commit = Path(
            snapshot_download(
                dataset.id,
                repo_type="dataset",
                revision=dataset.revision,
                allow_patterns=[dataset.path_in_repo],
                # The hub's * crosses slashes; ours does not, and a folder below may be large.
                ignore_patterns=[f"{folder}{slash}*/*"],
            )
        )
    except (ValueError, OSError) as error:
        _hub_refused(error, uri, field)
    local_folder = place(commit, dataset.path_in_repo).parent
    paths = sorted(path for path in local_folder.glob("*") if path.is_file() and fnmatchcase(path.name, pattern))
    if not paths:
        message = f"the data set {dataset.id} has no file {dataset.path_in_repo}"
        raise UserError(message, hint=f"Correct {field}.source.")
    parent = uri.rpartition("/")[0]
    return [replace(_file(f"{parent}/{path.name}", path), revision=commit.name) for path in paths]


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


def _parquet_lines(file: File, field: str, fields: Fields) -> Iterator[Line]:
    numbers = itertools.count(1)
    schema = pq.read_metadata(file.path).schema
    schema_columns: list[Any] = [schema.column(index) for index in range(len(schema))]
    texts = [  # all columns of text or bytes, also within lists and structs
        column.path
        for column in schema_columns
        if column.physical_type == "BYTE_ARRAY" and column.logical_type.type != "DECIMAL"
    ]
    options: dict[str, Any] = {"arrow_extensions_enabled": False}  # which its stubs lack
    # A repeated text is held once (`read_dictionary`): a file of some hundred bytes may repeat 5 MB a thousand times.
    with pq.ParquetFile(file.path, read_dictionary=texts, **options) as table:
        names = table.schema_arrow.names
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            message = f"{file.name} has several columns of the name {repeated[0]!r}"
            raise UserError(message, hint=f"Rename or remove them in the file of {field}.source.")
        wanted = {name if name in names else name.partition(".")[0] for name in fields.named.values()}
        # A file that lacks a named column is read whole, so that the error can name the columns it has.
        columns = sorted(wanted) if wanted <= set(names) else None
        # A batch of two row groups has two dictionaries, and pyarrow 26 reads no such batch of a nested column.
        batches = (
            table.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns)
            for group in range(table.num_row_groups)
        )
        for batch in itertools.chain.from_iterable(batches):
            for value in _values(batch):
                where = f"{file.name} row {next(numbers)}"
                if isinstance(value, str):
                    yield Line(where, None, value)
                else:
                    fault = flaw([value.get(name) for name in wanted])
                    yield Line(where, None if fault else value, fault)


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Every row of a batch, or what is wrong with it. A small batch is unpacked at once, a large one row by row."""
    if _size(batch) <= BATCH_BYTES:
        with suppress(ValueError, OverflowError, LookupError):  # a value cannot be read: the loop below finds its row
            yield from _plain(batch)
            return
    for row in (batch.slice(index, 1) for index in range(batch.num_rows)):
        try:
            yield _plain(row)[0] if _size(row) <= LINE_BYTES else TOO_LONG
        except UnicodeDecodeError as error:
            yield f"not UTF-8: {error}"
        except (ValueError, OverflowError, LookupError) as error:  # dates beyond Python's, unknown time zones
            yield f"a value that cannot be read: {error}"


def _size(batch: pa.RecordBatch) -> int:
    """The bytes of all rows when they are unpacked."""
    columns: list[Any] = batch.columns
    return sum(map(_bytes, columns))


def _bytes(column: Any) -> int:
    kind, types = column.type, pa.types
    if types.is_dictionary(kind):
        text = kind.value_type
        if any(
            is_kind(text)
            for is_kind in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
        ):
            return len(column) + (pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0)
    if types.is_struct(kind):
        return sum(map(_bytes, column.flatten()))
    if types.is_map(kind):
        first, end = column.offsets[0].as_py(), column.offsets[-1].as_py()
        return len(column) + sum(_bytes(part.slice(first, end - first)) for part in (column.keys, column.items))
    if any(is_kind(kind) for is_kind in (types.is_list, types.is_large_list, types.is_fixed_size_list)):
        return len(column) + _bytes(column.flatten())
    return int(column.nbytes)


def _plain(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows, with each float of 16 or 32 bits as the shortest number that names it: 27.1, not 27.100000381469727."""
    rows: list[dict[str, Any]] = batch.to_pylist()
    for column in batch.schema:
        if "float" in str(column.type):  # a double is none; the name of a part may be, which only costs time
            for row in rows:
                row[column.name] = _short(row[column.name], column.type)
    return rows


_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)


def _short(value: Any, kind: Any) -> Any:
    """A value of the type with its floats of 16 and 32 bits shortened, however deep they are."""
    types = pa.types
    if value is None:
        return None
    if types.is_float16(kind) or types.is_float32(kind):
        return float(str((np.float16 if types.is_float16(kind) else np.float32)(value)))
    if types.is_struct(kind):
        return {field.name: _short(value[field.name], field.type) for field in kind}
    if types.is_map(kind):
        return [(_short(name, kind.key_type), _short(item, kind.item_type)) for name, item in value]
    if types.is_dictionary(kind):
        return _short(value, kind.value_type)
    return [_short(item, kind.value_type) for item in value] if isinstance(kind, _LISTS) else value


def _json_lines(file: File, field: str) -> Iterator[Line]:
    with _opened(file, field) as opened:
        for number, raw in enumerate(_bounded(opened), start=1):
            where = f"{file.name} line {number}"
            if raw is None:
                yield Line(where, None, TOO_LONG)
            elif raw.strip():
                try:
                    value = parse(raw.removeprefix(codecs.BOM_UTF8))
                except ValueError as error:
                    yield Line(where, None, f"no JSON that a row can hold: {error}")
                else:
                    fault = "" if isinstance(value, dict) else f"a JSON {type(value).__name__}, not an object"
                    yield Line(where, None if fault else value, fault)


def _bounded(opened: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for a line that is too long, which is never held as a whole."""
    while raw := opened.readline(LINE_BYTES + 1):
        if len(raw) <= LINE_BYTES:
            yield raw
            continue
        while raw and not raw.endswith(b"\n"):
            raw = opened.readline(LINE_BYTES)
        yield None


def _opened(file: File, field: str) -> BinaryIO:
    if file.name.endswith((".jsonl", ".json")):
        return file.path.open("rb")
    if file.name.endswith((".jsonl.gz", ".json.gz")):
        return cast("BinaryIO", gzip.open(file.path, "rb"))
    if file.name.endswith((".jsonl.zst", ".json.zst")):
        codec = pa.input_stream(str(file.path), compression="zstd")
        return cast("BinaryIO", io.BufferedReader(codec))
    raise UserError(f"{file.name} has no known format", hint=f"{field}.source takes {FORMATS}.")
