"""Checkpoints of a training run in the object store, so that a pod that is lost costs only minutes.

    <folder>/checkpoints/step-000020/<files of DeepSpeed>, metrics.jsonl
    <folder>/checkpoints/step-000020/DONE.json      written last, with the sha256 of every file

No file system is shared: every node uploads what its ranks wrote and downloads what its ranks need. A checkpoint
belongs to a number of processes and a ZeRO stage. Another layout is refused rather than trained again from the start
under the same names: the hours that are stored are worth a decision.
"""

import hashlib
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
from cgd_stages.store.bucket import place
from cgd_stages.store.folder import DONE, Folder, Part

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints/"
METRICS = "metrics.jsonl"
UPLOADS = 3
"""Files that a node stores at a time. boto3 gives each up to 10 connections, of the 32 that a client has, and 80 MB."""
_RANK = re.compile(r"zero_pp_rank_(\d+)_")
_NAME = re.compile(r"step-([0-9]{6,15})")


class Checkpoint(Contract):
    """The marker of one checkpoint: the state after `step` steps."""

    format: Literal[2] = FORMAT
    step: int
    layout: "Layout"
    files: tuple[Part, ...]

    @property
    def name(self) -> str:
        return name_of(self.step)


class Layout(Contract):
    """What a checkpoint of DeepSpeed can be loaded into: nothing but the same."""

    processes: int
    zero_stage: int
    dtype: str

    @classmethod
    def of(cls, work: Train) -> "Layout":
        processes = work.workers * work.processes_per_worker
        return cls(processes=processes, zero_stage=work.zero_stage, dtype=work.dtype)


def name_of(step: int) -> str:
    return f"step-{step:06d}"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a stage's folder."""

    folder: Folder
    layout: Layout
    keep: int

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint. Raises UserError when it is of another layout.

        One whose marker is damaged is withdrawn: the one before is used.
        """
        for step in reversed(self._complete()):
            newest = self._read(step)
            if newest is None or newest.step != step:
                self._withdraw(step, DONE)
                continue
            if newest.layout != self.layout:
                was, wanted = _words(newest.layout), _words(self.layout)
                raise UserError(
                    f"{self.uri(newest.step)} was written with {was}; this run has {wanted}",
                    hint="Set spec.training (workers, zeroStage, dtype) as it was, "
                    f"or delete {self.uri()} to train from the start.",
                )
            return newest
        return None

    def fetch(self, target: Path, ranks: range) -> int:
        """Download what the `ranks` need of the newest checkpoint that is whole; its steps, 0 when there is none."""
        while newest := self.newest():
            if self._download(newest, target, ranks):
                return newest.step
        return 0

    def _download(self, checkpoint: Checkpoint, target: Path, ranks: range) -> bool:
        """Whether it is what its marker promises. If not it is withdrawn: `newest` finds the one before."""
        for part in checkpoint.files:
            path = place(target / checkpoint.name, part.key)
            if not needed_by(part.key, ranks) or (path.is_file() and file_sha256(path) == part.sha256):
                continue
            key = self._key(checkpoint.step, part.key)
            present = any(found.key == key for found in self.folder.bucket.list(key))
            if present:
                self.folder.bucket.download(key, path)
            if not present or file_sha256(path) != part.sha256:
                self._withdraw(checkpoint.step, part.key)
                return False
        return True

    def upload(self, step: int, source: Path, ranks: range) -> list[Part]:
        """Store the files that the `ranks` of this node wrote into `source`; what the marker must list of them."""

        def store(path: Path) -> Part:
            self.folder.bucket.upload(path, self._key(step, path.name))
            return Part(key=path.name, sha256=file_sha256(path))

        own = sorted(path for path in source.iterdir() if owner(path.name) in ranks)
        with ThreadPoolExecutor(UPLOADS, thread_name_prefix="upload") as pool:
            return list(pool.map(store, own))

    def complete(self, step: int, files: Iterable[Part]) -> None:
        """Write the promise, then drop the checkpoints that are no longer kept."""
        marker = Checkpoint(step=step, layout=self.layout, files=tuple(files))
        self.folder.bucket.put(self._key(step, DONE), marker.to_json().encode())
        self._prune(step)

    def _prune(self, newest: int) -> None:
        kept = [step for step in self._complete() if step <= newest][-self.keep :]
        for step in sorted(self._steps() - set(kept)):
            # The promise goes first: what is half deleted must not look complete.
            self.folder.bucket.delete(self._key(step, DONE))
            for found in list(self.folder.bucket.list(self._key(step, ""))):
                self.folder.bucket.delete(found.key)

    def _steps(self) -> set[int]:
        return {step for step, _ in self._files()}

    def _complete(self) -> list[int]:
        return sorted(step for step, name in self._files() if name == DONE)

    def _files(self) -> list[tuple[int, str]]:
        """Step and name of the files of checkpoints; what else somebody has put there is none of ours, and stays."""
        prefix = self.folder.key(CHECKPOINTS)
        names = (found.key.removeprefix(prefix).partition("/") for found in self.folder.bucket.list(prefix))
        steps = ((_NAME.fullmatch(name), file) for name, slash, file in names if slash)
        files = ((int(found[1]), found[0], file) for found, file in steps if found)
        return [(step, file) for step, name, file in files if name == name_of(step)]

    def _withdraw(self, step: int, damaged: str) -> None:
        """Take back the promise of a checkpoint with such a damaged file."""
        log.warning("%s is damaged (%s) and is not used", self.uri(step), damaged)
        self.folder.bucket.delete(self._key(step, DONE))

    def _read(self, step: int) -> Checkpoint | None:
        """A marker, None when it is no JSON. Raises UserError when it is one of another version of this program."""
        try:
            return Checkpoint.model_validate_json(self.folder.bucket.get(self._key(step, DONE)) or b"")
        except ValidationError as error:
            if error.errors()[0]["type"] == "json_invalid":
                return None
            hint = f"Delete {self.uri(step)} to use the checkpoint before."
            raise UserError(f"{self.uri(step)}/{DONE} is no marker of this format: {error}", hint=hint) from error

    def _key(self, step: int, name: str) -> str:
        return self.folder.key(f"{CHECKPOINTS}{name_of(step)}/{name}")

    def uri(self, step: int | None = None) -> str:
        return f"{self.folder.uri}/{CHECKPOINTS}{'' if step is None else name_of(step)}".rstrip("/")


def owner(name: str) -> int:
    """The rank that writes a file: the one in its name; rank 0 writes what has none, though every node may have it."""
    found = _RANK.search(name)
    return int(found[1]) if found else 0


def needed_by(name: str, ranks: range) -> bool:
    """Whether one of the ranks reads a file: its own, and every file that belongs to no rank in particular."""
    found = _RANK.search(name)
    return found is None or int(found[1]) in ranks


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _words(layout: Layout) -> str:
    return f"{layout.processes} processes, ZeRO {layout.zero_stage} and {layout.dtype}"
