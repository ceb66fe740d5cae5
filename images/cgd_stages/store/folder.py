"""Folders of stages in the object store: rows, and the markers that say which rows readers may trust.

    <namespace>/<stage>/<digest>/parts/*.parquet     rows
    <namespace>/<stage>/<digest>/rejected/*.parquet  id, sample, stage, reason, detail
    <namespace>/<stage>/<digest>/shards/*.json       one marker a shard, written when the shard has ended
    <namespace>/<stage>/<digest>/rounds/*/*.json     one marker a round and shard, of stages that go on round by round
    <namespace>/<stage>/<digest>/DONE.json           the promise, written last; readers trust only what it lists

A digest is the hash of everything that determines the output. A folder is therefore never changed once it is done,
and a changed input never meets stale data.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import pyarrow as pa
from pydantic import AfterValidator, Field, ValidationError

from cgd_stages.contract import FORMAT, Contract, Rows, StageFacts
from cgd_stages.errors import TransientError, UserError
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.rows import Row, digest_of, from_parquet, now, sha256, to_parquet

DONE = "DONE.json"
PARTS = "parts/"
REJECTED = "rejected/"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]+$")]
"""A result of `digest_of`. It is part of keys, and of paths on machines that read them."""


def _moment(text: str) -> str:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None or not 1970 <= moment.year < 9000:
        raise ValueError("a time has a zone, and a year from 1970 to 8999")
    return text


Moment = Annotated[str, AfterValidator(_moment)]
"""A result of `now`. Readers compute the time between two."""


class Part(Contract):
    """One data file; `key` is relative to the folder."""

    key: str
    sha256: str
    rows: int = 0


class Marker(Contract):
    """The fields that the markers of a shard and of a stage share."""

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


class RoundMarker(ShardMarker):
    """What a shard has stored for one round, counted from 0. Who waits for the round may read its parts."""

    round: int


class Done(Marker):
    """`DONE.json`. `parts` lists every data file of the folder, rejected rows and model files too. The digest was made
    of `inputs`; `settings` ran the stage without determining its output (engine arguments, workers)."""

    inputs: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def rows(self) -> Rows:
        return self.facts.rows

    def under(self, prefix: str) -> list[Part]:
        """The data files below `prefix`, such as `parts/` or `model/`, in the order of their names."""
        return sorted((part for part in self.parts if part.key.startswith(prefix)), key=lambda part: part.key)

    def content(self) -> str:
        """Fingerprint of the rows themselves, whatever inputs led to them."""
        return digest_of(parts=[part.sha256 for part in self.under(PARTS)])


M = TypeVar("M", bound=Marker)


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
        """The promise, None before the stage has ended. Raises UserError when it is not this folder's."""
        data = self.bucket.get(self.key(DONE))
        return None if data is None else self._checked(Done, data, DONE)

    def require(self) -> Done:
        """The promise. Raises TransientError when the stage has not ended."""
        done = self.done()
        if done is None:
            raise TransientError(f"{self.uri} is not complete", hint=f"The stage {self.stage} must end first.")
        return done

    def put(self, name: str, data: bytes, *, alone: bool = False) -> Part:
        """Store a data file; the result is its entry in the marker. The same content under the same name is no
        conflict. `alone`: nobody else writes this folder, so that a file of that name is an earlier attempt's, and is
        overwritten."""
        exists = not self.bucket.put(self.key(name), data, if_absent=not alone)
        if exists and self.bucket.get(self.key(name)) != data:
            raise TransientError(f"{self.uri}/{name} exists with another content", hint="Delete the folder.")
        return Part(key=name, sha256=sha256(data))

    def put_rows(self, prefix: str, rows: Sequence[Row], schema: pa.Schema) -> Part:
        """Store rows as one Parquet file named after its content: two writers cannot overwrite each other.

        An object of that name with another content is damaged, and is overwritten: an error would fail every attempt
        that makes the same rows.
        """
        data = to_parquet(rows, schema)
        name = f"{prefix}{sha256(data)[:32]}.parquet"
        if not self.bucket.put(self.key(name), data, if_absent=True) and self.bucket.get(self.key(name)) != data:
            self.bucket.put(self.key(name), data)
        return Part(key=name, sha256=sha256(data), rows=len(rows))

    def read(self, part: Part) -> bytes:
        """A data file that a marker lists. Raises TransientError when it is missing, or has another hash."""
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

    def mark_round(self, marker: RoundMarker) -> RoundMarker:
        """Write the marker of a round and shard that has none; the marker that holds, which may be another writer's."""
        name = _round_name(marker.round, marker.shard, marker.shards)
        self.bucket.put(self.key(name), marker.to_json().encode(), if_absent=True)
        return self.round_marker(marker.round, marker.shard, marker.shards) or marker

    def round_marker(self, number: int, shard: int, shards: int) -> RoundMarker | None:
        name = _round_name(number, shard, shards)
        data = self.bucket.get(self.key(name))
        return None if data is None else self._checked(RoundMarker, data, name)

    def round(self, number: int) -> list[RoundMarker] | None:
        """The markers of all shards of a round; None as long as one is missing. The number of shards is the writers'
        affair: an interrupted round may have been begun with another number."""
        prefix = self.key(_round(number))
        stored = {one.key.removeprefix(prefix) for one in self.bucket.list(prefix)}
        for shards in sorted({int(found[1]) for name in stored if (found := _SHARD.fullmatch(name))}):
            if all(_shard_of(shard, shards) in stored for shard in range(shards)):
                markers = (self.round_marker(number, shard, shards) for shard in range(shards))
                return [marker for marker in markers if marker]
        return None

    def forget_round(self, number: int) -> None:
        """Delete the markers of a round whose parts are going to be deleted."""
        for stored in self.bucket.list(self.key(_round(number))):
            self.bucket.delete(stored.key)

    def finish(
        self,
        *,
        facts: StageFacts,
        parts: Iterable[Part],
        started: str,
        inputs: dict[str, Any],
        settings: dict[str, Any] | None = None,
    ) -> Done:
        """Write the promise, last. If another writer was quicker, its promise holds and is returned."""
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


def read_rows(folder: Folder, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Every row of a finished folder, one part in memory at a time, in no promised order: sort by (id, sample)."""
    for part in folder.require().under(PARTS):
        yield from from_parquet(folder.read(part), columns)


def _shard_name(shard: int, shards: int) -> str:
    return f"shards/{_shard_of(shard, shards)}"


_SHARD = re.compile(r"[0-9]{5}-of-([0-9]{5})\.json")


def _shard_of(shard: int, shards: int) -> str:
    return f"{shard:05d}-of-{shards:05d}.json"


def _round(number: int) -> str:
    return f"rounds/{number:05d}/"


def _round_name(number: int, shard: int, shards: int) -> str:
    return _round(number) + _shard_of(shard, shards)
