"""The checkpoints of a training that runs: written at a step, stored while the next steps are made.

DeepSpeed writes a step's files to the node's own disk; from there a few threads of each node store and hash them.
Threads of different nodes never speak with each other: the processes agree at later steps, between two steps, that all
files are stored; then the first one's thread writes the promise. One checkpoint at a time is on its way.
"""

import logging
import os
import pickle
import shutil
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cgd_stages.errors import TransientError, UserError
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Part
from cgd_stages.training.checkpoints import METRICS, name_of
from cgd_stages.training.job import BEST, CHECKPOINTS, Job, Record, read_records, write_records

log = logging.getLogger(__name__)

PAUSE = 0.1
"""Seconds between two looks at an upload that is waited for."""

CARRIED = "best-"
"""A checkpoint carries the files of the best model so far under their names behind this prefix: a training that goes
on from it chooses among the same models as one that was never interrupted."""

WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable: with "1" torch.load makes tensors and plain values alone, whatever its caller asks for."""

T = TypeVar("T")


class Saver:
    """One process's part in its training's checkpoints. Every public method is called by all ranks, in one order.

    What fails in a thread is raised by the next call of any method, in every process. While the store is away,
    threads wait for it, see `Bucket.waiting`.
    """

    def __init__(self, engine: Any, job: Job, folder: Path) -> None:
        self._engine, self._job = engine, job
        self._folder, self._local = folder, folder / CHECKPOINTS
        self._in_a_hurry = threading.Event()
        self._checkpoints = job.checkpoints(Bucket(job.storage).waiting(self._in_a_hurry))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._on_its_way = self._nothing()

    def save(self, step: int, records: list[Record]) -> None:
        """Write the state after `step` steps to this disk and begin to store it; the checkpoint before is waited for.

        `records` are the curve so far; those of rank 0 count.
        """
        self.wait()
        self._engine.save_checkpoint(str(self._local), tag=name_of(step), save_latest=False)
        if dist.get_rank() == 0:
            write_records(self._local / name_of(step) / METRICS, records)
            self._carry_best(self._local / name_of(step))
        self._on_its_way = self._stored(step, self._thread.submit(self._upload, step))

    def go_on(self) -> None:
        """Look, without waiting, how far the checkpoint on its way is."""
        next(self._on_its_way, None)

    def wait(self) -> None:
        """Return when no checkpoint is on its way any more."""
        for _ in self._on_its_way:
            time.sleep(PAUSE)

    def hurry(self) -> None:
        """The end is near: a store that is away is tried once more and not waited for."""
        self._in_a_hurry.set()

    def load(self) -> list[Record]:
        """Go to the step that the job is to go on from; the curve up to there."""
        folder = self._local / name_of(self._job.resume)
        with _data_alone(self._checkpoints.uri(self._job.resume)):
            path, _ = self._engine.load_checkpoint(str(self._local), tag=folder.name)
        if path is None:
            raise TransientError(f"DeepSpeed does not load the checkpoint {folder}", hint="See the pod's log.")
        records = read_records(folder / METRICS)
        if dist.get_rank() == 0:
            self._fetch_best(folder)
        dist.barrier()
        self._remove(folder)
        log.info("going on after step %d", self._job.resume)
        return records

    def store_curve(self, records: list[Record]) -> None:
        """Store the curve alone, of a training that ends without a model."""
        if dist.get_rank() == 0:
            write_records(self._folder / METRICS, records)
            stage = self._checkpoints.folder
            stage.bucket.upload(self._folder / METRICS, stage.key(METRICS))

    def _carry_best(self, checkpoint: Path) -> None:
        best = self._folder / BEST
        for path in best.iterdir() if best.is_dir() else ():
            (checkpoint / f"{CARRIED}{path.name}").hardlink_to(path)

    def _fetch_best(self, checkpoint: Path) -> None:
        for path in checkpoint.glob(f"{CARRIED}*"):
            (self._folder / BEST).mkdir(exist_ok=True)
            path.rename(self._folder / BEST / path.name.removeprefix(CARRIED))

    def _nothing(self) -> Generator[None]:
        yield from ()

    def _stored(self, step: int, upload: Future[list[Part]]) -> Generator[None]:
        """The way of a checkpoint; yields wherever a thread has not come to its end."""
        files = yield from self._agreed(upload)
        yield from self._agreed(self._thread.submit(self._complete, step, [part for parts in files for part in parts]))
        if dist.get_rank() == 0:
            log.info("checkpoint after step %d is stored", step)

    def _agreed(self, mine: Future[T]) -> Generator[None, None, list[T]]:
        """What the threads of all ranks have made, in their order; yields until the last one is ready."""
        while self._count(not mine.done()):
            yield
        error = mine.exception()
        if self._count(error is not None):
            raise error or TransientError("another process could not store its part of a checkpoint")
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine.result())
        return everyone

    def _count(self, here: bool) -> int:
        """In how many processes that is so."""
        total = torch.tensor(int(here), device=self._engine.device)
        dist.all_reduce(total)
        return int(total)

    def _upload(self, step: int) -> list[Part]:
        if not self._first_of_node:
            return []
        return self._checkpoints.upload(step, self._local / name_of(step), self._job.ranks)

    def _complete(self, step: int, files: list[Part]) -> None:
        local = self._local / name_of(step)
        if dist.get_rank() == 0:
            self._checkpoints.complete(step, files)
            folder = self._checkpoints.folder
            folder.bucket.upload(local / METRICS, folder.key(METRICS))
        self._remove(local)

    def _remove(self, folder: Path) -> None:
        if self._first_of_node:
            shutil.rmtree(folder)

    @property
    def _first_of_node(self) -> bool:
        return bool(dist.get_rank() == self._job.first_rank)


@contextmanager
def _data_alone(uri: str) -> Iterator[None]:
    """Inside, DeepSpeed makes of a checkpoint's pickles nothing but tensors, plain values and its own settings.

    DeepSpeed asks torch to do whatever a pickle says, so that whoever can write to the bucket would run code here.
    Raises UserError when a file of the checkpoint `uri` holds more than data.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ[WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{uri} holds more than data, and is not loaded: {error}",
            hint=f"Find out who else can write to the bucket, and delete {uri} to go on from the checkpoint before.",
        ) from error
