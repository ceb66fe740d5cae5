"""Folders of stages in the object store: where rows are, which marker says so, and who may trust it.

    <namespace>/<stage>/<digest>/parts/*.parquet     rows
    <namespace>/<stage>/<digest>/rejected/*.parquet  id, sample, stage, reason, detail
    <namespace>/<stage>/<digest>/shards/*.json       one marker a shard, written when the shard has ended
    <namespace>/<stage>/<digest>/DONE.json           the promise, written last; readers trust only what it lists
    <namespace>/runs/<run>/<stage>.json              pointer of a run to the folder of its stage
    <namespace>/claims/<uid>/<stage>/<digest>        empty: the run of this uid makes or uses the folder

A digest is the hash of everything that determines the output. A folder is therefore never changed once it is done,
and a changed input never meets stale data.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, Field, ValidationError

from cgd_stages.contract import FORMAT, Contract, Rows, RunRef, StageFacts
from cgd_stages.errors import TransientError, UserError
from cgd_stages.storage import Bucket

Row = dict[str, Any]
"""One row: column name to value."""
Key = tuple[str, int]
"""Of a row: id and sample."""

_CLAIM = re.compile(r"([^/]+)/([a-z0-9-]+)/([0-9a-f]+)")

DONE = "DONE.json"
PARTS = "parts/"
REJECTED = "rejected/"

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
}
_CHAINS = [("prepare", "answer", "critique", "refine"), ("prepare", "distill")]
"""Stages that add columns to the rows of the one before. The teacher's own answers need no student's."""
_REJECTION: list[tuple[str, Any]] = [
    ("id", pa.string()),
    ("sample", pa.int32()),
    ("stage", pa.string()),
    ("reason", pa.string()),
    ("detail", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("tokens", pa.int32()),
]
REJECTION_SCHEMA = pa.schema([pa.field(column, kind) for column, kind in _REJECTION])


def row_schema(stage: str) -> pa.Schema:
    """Columns of a stage's rows: those of every stage before it and its own. A part stands alone."""
    chain = next(chain for chain in _CHAINS if stage in chain)
    upto = chain[: chain.index(stage) + 1]
    return pa.schema([pa.field(column, kind) for name in upto for column, kind in _COLUMNS[name]])


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]+$")]
"""As `digest_of` makes it: it is part of keys, and of paths on machines that read them."""


def _moment(text: str) -> str:
    found = datetime.fromisoformat(text)
    if found.tzinfo is None or not 1970 <= found.year < 9000:
        raise ValueError("no time with its zone")
    return text


Moment = Annotated[str, AfterValidator(_moment)]
"""As `now` makes it: readers take the time between two."""


class Part(Contract):
    """One data file; `key` is relative to the folder."""

    key: str
    sha256: str
    rows: int = 0


class Marker(Contract):
    """What the marker of a shard and the marker of a whole stage have in common."""

    format: Literal[2] = FORMAT
    stage: str
    digest: str
    parts: tuple[Part, ...] = ()
    started: Moment
    completed: Moment
    facts: StageFacts


class ShardMarker(Marker):
    shard: int
    shards: int


class Done(Marker):
    """`DONE.json`. `parts` lists every data file of the folder, rejected rows and model files too; `inputs` what the
    digest was made of, `settings` what ran it without determining the output (engine arguments, workers)."""

    inputs: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def rows(self) -> Rows:
        return self.facts.rows

    def under(self, prefix: str) -> list[Part]:
        """The data files below `prefix`, such as `parts/` or `model/`, in the order of their names."""
        return sorted((part for part in self.parts if part.key.startswith(prefix)), key=lambda part: part.key)

    def content(self) -> str:
        """Fingerprint of the rows themselves, however they came about."""
        return digest_of(parts=[part.sha256 for part in self.under(PARTS)])


M = TypeVar("M", bound=Marker)


class Pointer(Contract):
    """Where a run's stage has its output."""

    run_uid: str
    stage: str
    digest: Digest
    uri: str
    facts: StageFacts


def digest_of(**what: object) -> str:
    """Hash of named JSON values, 32 hex digits. The format's version is always part of it."""
    text = json.dumps({"format": FORMAT, **what}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def key_of(row: Row) -> Key:
    return row["id"], row["sample"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def now() -> str:
    """RFC 3339, UTC, seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_parquet(rows: Sequence[Row], schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, compression="zstd")
    return sink.getvalue()


def from_parquet(data: bytes, columns: Sequence[str] | None = None) -> list[Row]:
    """Rows of a Parquet file; of `columns`, those that the file has."""
    file = pq.ParquetFile(io.BytesIO(data))
    present = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
    rows: list[Row] = file.read(columns=present).to_pylist()
    return rows


@dataclass(frozen=True)
class Folder:
    """The folder of one stage and digest."""

    bucket: Bucket
    namespace: str
    stage: str
    digest: str

    def key(self, name: str = "") -> str:
        """Key in the bucket of `name` in this folder."""
        return f"{self.namespace}/{self.stage}/{self.digest}/{name}"

    @property
    def uri(self) -> str:
        return self.bucket.uri(self.key()).rstrip("/")

    def done(self) -> Done | None:
        """The promise, or None. Raises UserError when it is not the promise of this folder."""
        data = self.bucket.get(self.key(DONE))
        return None if data is None else self._checked(Done, data, DONE)

    def require(self) -> Done:
        """The promise. Raises TransientError when the stage has not ended."""
        done = self.done()
        if done is None:
            raise TransientError(f"{self.uri} is not complete", hint=f"The stage {self.stage} must end first.")
        return done

    def put(self, name: str, data: bytes, *, rows: int = 0) -> Part:
        """Store a data file and say what the marker must list. The same content under the same name is no conflict."""
        if not self.bucket.put(self.key(name), data, if_absent=True) and self.bucket.get(self.key(name)) != data:
            raise TransientError(f"{self.uri}/{name} exists with another content", hint="Delete the folder.")
        return Part(key=name, sha256=sha256(data), rows=rows)

    def put_rows(self, prefix: str, rows: Sequence[Row], schema: pa.Schema) -> Part:
        """Store rows as one Parquet file named after its content: two writers cannot overwrite each other.

        An object of that name with another content is a damaged one. It is mended: to refuse it would fail every
        attempt that comes to the same rows.
        """
        data = to_parquet(rows, schema)
        name = f"{prefix}{sha256(data)[:32]}.parquet"
        if not self.bucket.put(self.key(name), data, if_absent=True) and self.bucket.get(self.key(name)) != data:
            self.bucket.put(self.key(name), data)
        return Part(key=name, sha256=sha256(data), rows=len(rows))

    def read(self, part: Part) -> bytes:
        """A data file that a marker lists. Raises TransientError when it is missing or not what was promised."""
        data = self.bucket.get(self.key(part.key))
        if data is None or sha256(data) != part.sha256:
            state = "is missing" if data is None else "is not what its marker promises"
            raise TransientError(f"{self.uri}/{part.key} {state}", hint=f"Delete {self.uri} to compute it anew.")
        return data

    def mark_shard(self, marker: ShardMarker) -> None:
        """Write a shard's marker; a newer one of the same shard replaces it."""
        self.bucket.put(self.key(_shard_name(marker.shard, marker.shards)), marker.to_json().encode())

    def shard_marker(self, shard: int, shards: int) -> ShardMarker | None:
        name = _shard_name(shard, shards)
        data = self.bucket.get(self.key(name))
        return None if data is None else self._checked(ShardMarker, data, name)

    def finish(
        self,
        *,
        facts: StageFacts,
        parts: Iterable[Part],
        started: str,
        inputs: dict[str, Any],
        settings: dict[str, Any] | None = None,
    ) -> Done:
        """Write the promise, last. When another was quicker, that one holds and is returned."""
        done = Done(
            stage=self.stage,
            digest=self.digest,
            parts=tuple(parts),
            started=started,
            completed=now(),
            facts=facts.model_copy(update={"digest": self.digest, "output_uri": self.uri}),
            inputs=inputs,
            settings=settings or {},
        )
        if self.bucket.put(self.key(DONE), done.to_json().encode(), if_absent=True):
            return done
        return self.require()

    def _checked(self, kind: type[M], data: bytes, name: str) -> M:
        hint = f"Delete {self.uri} to compute it anew."
        try:
            marker = kind.model_validate_json(data)
        except ValidationError as error:
            raise UserError(f"{self.uri}/{name} is not a marker of this format: {error}", hint=hint) from error
        if (marker.stage, marker.digest) != (self.stage, self.digest):
            raise UserError(f"{self.uri}/{name} is the marker of {marker.stage}/{marker.digest}", hint=hint)
        return marker


def claim(folder: Folder, run: RunRef) -> None:
    """Say that the run makes or uses the folder, before it does: see clean.py, which deletes what nobody claims."""
    key = _claim_key(run.namespace, run.uid, folder.stage, folder.digest)
    if folder.bucket.get(key) is None:
        folder.bucket.put(key, b"")


def read_claims(bucket: Bucket, namespace: str) -> dict[str, set[Folder]]:
    """The folders of every run that has ever begun one, by the run's uid. Other objects that somebody has stored below
    the same prefix are no claims."""
    found: dict[str, set[Folder]] = {}
    for stored in bucket.list(_claim_key(namespace)):
        if claimed := _CLAIM.fullmatch(stored.key.removeprefix(_claim_key(namespace))):
            uid, stage, digest = claimed.groups()
            found.setdefault(uid, set()).add(Folder(bucket, namespace, stage, digest))
    return found


def withdraw(folder: Folder, run: RunRef) -> None:
    """Take a claim back."""
    folder.bucket.delete(_claim_key(run.namespace, run.uid, folder.stage, folder.digest))


def write_pointer(bucket: Bucket, run: RunRef, done: Done) -> Pointer:
    """Link the run to the folder of one of its stages. Doing it twice is doing it once."""
    pointer = Pointer(
        run_uid=run.uid, stage=done.stage, digest=done.digest, uri=done.facts.output_uri, facts=done.facts
    )
    key, data = _pointer_key(run, done.stage), pointer.to_json().encode()
    if bucket.get(key) != data:
        bucket.put(key, data)
    return pointer


def read_pointer(bucket: Bucket, run: RunRef, stage: str) -> Pointer:
    """Where the run's stage has its output. Raises TransientError when it has none, or one of another run's life."""
    data = bucket.get(_pointer_key(run, stage))
    hint = f"The stage {stage} of {run.namespace}/{run.name} has not ended yet: its output is there when it has."
    if data is None:
        raise TransientError(f"the run {run.name} has no output of {stage}", hint=hint)
    pointer = _pointer(data)
    if pointer is None:
        what = f"{bucket.uri(_pointer_key(run, stage))} is no pointer of this format"
        raise UserError(what, hint=f"Delete the object and the Job of the stage {stage}, which makes it anew.")
    if pointer.run_uid != run.uid:
        raise TransientError(f"the output of {stage} belongs to an earlier run named {run.name}", hint=hint)
    return pointer


def open_input(bucket: Bucket, run: RunRef, stage: str) -> Folder:
    """The finished folder of an earlier stage of the run."""
    return Folder(bucket, run.namespace, stage, read_pointer(bucket, run, stage).digest)


def delete_pointers(bucket: Bucket, run: RunRef) -> None:
    """Delete the run's pointers, not those of another run of its name."""
    for stored in list(bucket.list(_pointer_key(run))):
        data = bucket.get(stored.key)
        pointer = None if data is None else _pointer(data)
        if pointer and pointer.run_uid == run.uid:
            bucket.delete(stored.key)


def _pointer(data: bytes) -> Pointer | None:
    """None: it is none, but an object of somebody else's below the same prefix."""
    try:
        return Pointer.model_validate_json(data)
    except ValidationError:
        return None


def read_rows(folder: Folder, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Every row of a finished folder, one part in memory at a time, in no promised order: sort by (id, sample)."""
    for part in folder.require().under(PARTS):
        yield from from_parquet(folder.read(part), columns)


def _shard_name(shard: int, shards: int) -> str:
    return f"shards/{shard:05d}-of-{shards:05d}.json"


def _pointer_key(run: RunRef, stage: str = "") -> str:
    """Key of a pointer; without a stage, what those of the run begin with."""
    return f"{run.namespace}/runs/{run.name}/" + (f"{stage}.json" if stage else "")


def _claim_key(namespace: str, *rest: str) -> str:
    """Key of a claim; without the rest, what all keys of claims begin with."""
    return f"{namespace}/claims/{'/'.join(rest)}"
