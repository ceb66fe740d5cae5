"""Checkpoints of a training in the object store, so that the loss of a pod costs only minutes.

    <folder>/checkpoints/step-000020/<files of DeepSpeed>, metrics.jsonl
    <folder>/checkpoints/step-000020/DONE.json      written last, with the sha256 of every file

Nodes share no file system: every node uploads the files that its ranks wrote and downloads those that its ranks need. A
checkpoint belongs to a number of processes and a ZeRO stage. Another layout is an error, not a new start under the same
names: the user decides about the hours that are stored.
"""

import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from cgd_stages.contract import FORMAT, Contract, Train
from cgd_stages.errors import UserError
from cgd_stages.store.bucket import places
from cgd_stages.store.folder import DONE, Folder, Part
from cgd_stages.store.rows import file_sha256

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints/"
METRICS = "metrics.jsonl"
UPLOADS = 3
"""Files that a node stores at a time. boto3 gives each up to 10 of a client's 32 connections, and 80 MB."""
_RANK = re.compile(r"zero_pp_rank_(\d+)_")
_NAME = re.compile(r"step-([0-9]{6,15})")


class Checkpoint(Contract):
    """The marker of a checkpoint: the state after `step` steps."""

    format: Literal[2] = FORMAT
    step: int
    layout: "Layout"
    files: tuple[Part, ...]

    @property
    def name(self) -> str:
        return name_of(self.step)


class Layout(Contract):
    """The layout of a DeepSpeed checkpoint. Only a training of the same layout can load it."""

    processes: int
    zero_stage: int
    dtype: str

    @classmethod
    def of(cls, work: Train) -> "Layout":
        processes = work.workers * work.processes_per_worker
        return cls(processes=processes, zero_stage=work.zero_stage, dtype=work.dtype)

    def __str__(self) -> str:
        return f"{self.processes} processes, ZeRO {self.zero_stage} and {self.dtype}"


def name_of(step: int) -> str:
    return f"step-{step:06d}"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a stage's folder."""

    folder: Folder
    layout: Layout
    keep: int

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint. Raises UserError when it has another layout, or is of another version.

        A checkpoint with a damaged marker is withdrawn, and the one before it is the newest.
        """
        for step in reversed(self._complete()):
            checkpoint: Checkpoint | None = None
            try:
                checkpoint = Checkpoint.model_validate_json(self.folder.bucket.get(self._key(step, DONE)) or b"")
            except ValidationError as error:
                if error.errors()[0]["type"] != "json_invalid":
                    message = f"{self.uri(step)}/{DONE} is no marker of this format: {error}"
                    hint = f"Delete {self.uri(step)} to use the checkpoint before."
                    raise UserError(message, hint=hint) from error
            if checkpoint is None or checkpoint.step != step:
                self._withdraw(step, DONE)
                continue
            if checkpoint.layout != self.layout:
                raise UserError(
                    f"{self.uri(step)} was written with {checkpoint.layout}; this run has {self.layout}",
                    hint="Set spec.training (workers, zeroStage, dtype) as it was, "
                    f"or delete {self.uri()} to train from the start.",
                )
            return checkpoint
        return None

    def fetch(self, target: Path, ranks: range) -> int:
        """Download the files that the `ranks` need of the newest undamaged checkpoint; its steps, 0 without one."""
        while newest := self.newest():
            if self._download(newest, target, ranks):
                return newest.step
        return 0

    def _download(self, checkpoint: Checkpoint, target: Path, ranks: range) -> bool:
        """Whether every file has the hash that the marker promises. If not, the checkpoint is withdrawn."""
        paths = places(target / checkpoint.name, [part.key for part in checkpoint.files])
        for part in checkpoint.files:
            path = paths[part.key]
            if not needed_by(part.key, ranks) or (path.is_file() and file_sha256(path) == part.sha256):
                continue
            key = self._key(checkpoint.step, part.key)
            exists = any(stored.key == key for stored in self.folder.bucket.list(key))
            if exists:
                self.folder.bucket.download(key, path)
            if not exists or file_sha256(path) != part.sha256:
                self._withdraw(checkpoint.step, part.key)
                return False
        return True

    def upload(self, step: int, source: Path, ranks: range) -> list[Part]:
        """Store the files that the `ranks` of this node wrote into `source`; the result is their part of the marker."""

        def store(path: Path) -> Part:
            self.folder.bucket.upload(path, self._key(step, path.name))
            return Part(key=path.name, sha256=file_sha256(path))

        paths = sorted(path for path in source.iterdir() if owner(path.name) in ranks)
        with ThreadPoolExecutor(UPLOADS, thread_name_prefix="upload") as pool:
            return list(pool.map(store, paths))

    def complete(self, step: int, files: Iterable[Part]) -> None:
        """Write the promise, then delete all checkpoints but the last `keep` complete ones up to this step."""
        marker, bucket = Checkpoint(step=step, layout=self.layout, files=tuple(files)), self.folder.bucket
        bucket.put(self._key(step, DONE), marker.to_json().encode())
        kept = [complete for complete in self._complete() if complete <= step][-self.keep :]
        for dropped in sorted({stored for stored, _ in self._files()} - set(kept)):
            # The promise goes first: a half deleted checkpoint must not look complete.
            bucket.delete(self._key(dropped, DONE))
            for stored_file in bucket.list(self._key(dropped, "")):
                bucket.delete(stored_file.key)

    def _complete(self) -> list[int]:
        return sorted(step for step, name in self._files() if name == DONE)

    def _files(self) -> list[tuple[int, str]]:
        """Step and name of every checkpoint's files. Other objects below the prefix are not ours, and stay."""
        prefix = self.folder.key(CHECKPOINTS)
        files: list[tuple[int, str]] = []
        for stored in self.folder.bucket.list(prefix):
            name, slash, file = stored.key.removeprefix(prefix).partition("/")
            step = _NAME.fullmatch(name)
            if slash and step and name == name_of(int(step[1])):
                files.append((int(step[1]), file))
        return files

    def _withdraw(self, step: int, damaged: str) -> None:
        """Delete the promise of a checkpoint whose file `damaged` is damaged or missing."""
        log.warning("%s is damaged (%s) and is not used", self.uri(step), damaged)
        self.folder.bucket.delete(self._key(step, DONE))

    def _key(self, step: int, name: str) -> str:
        return self.folder.key(f"{CHECKPOINTS}{name_of(step)}/{name}")

    def uri(self, step: int | None = None) -> str:
        return f"{self.folder.uri}/{CHECKPOINTS}{'' if step is None else name_of(step)}".rstrip("/")


def owner(name: str) -> int:
    """The rank that stores a file: the rank in its name. Rank 0 stores files without one, which every node may have."""
    rank = _RANK.search(name)
    return int(rank[1]) if rank else 0


def needed_by(name: str, ranks: range) -> bool:
    """Whether one of the ranks reads a file: a file with its rank in the name, or with no rank."""
    rank = _RANK.search(name)
    return rank is None or int(rank[1]) in ranks
