"""The checkpoints of a running training: written at a step, stored during the next steps.

A checkpoint of an adapter has the adapter and its optimizer alone; the student comes from its own files.

DeepSpeed writes a step's files to the node's own disk; from there a few threads of each node store and hash them.
Threads of different nodes do not communicate. Between two later steps the processes agree that all files are stored;
then a thread of the first process writes the promise. One checkpoint at a time is on its way.
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
from typing import Any

import torch
import torch.distributed as dist

from cgd_stages.errors import TransientError, UserError
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Part
from cgd_stages.train import adapter
from cgd_stages.train.group import agreed
from cgd_stages.training.checkpoints import METRICS, name_of
from cgd_stages.training.job import BEST, CHECKPOINTS, Job, Record, read_records, write_records
from cgd_stages.training.tensorboard import EVENTS, event_file

log = logging.getLogger(__name__)

PAUSE = 0.1
"""Seconds between two looks at an upload while `wait` waits for it."""

CARRIED = "best-"
"""Prefix of the best model's files in a checkpoint: a training that continues from it chooses among the same models as
one that was never interrupted."""

WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable: with "1" torch.load returns only tensors and plain values, whatever its caller asks for."""


class Saver:
    """One process's part in its training's checkpoints. All ranks call every public method, in the same order.

    The next call of any method raises a thread's error, in every process. While the store is away the threads wait for
    it, see `Bucket.waiting`.
    """

    def __init__(self, engine: Any, job: Job, folder: Path) -> None:
        self._engine, self._job = engine, job
        self._folder, self._local = folder, folder / CHECKPOINTS
        self._in_a_hurry = threading.Event()
        self._checkpoints = job.checkpoints(Bucket(job.storage).waiting(self._in_a_hurry))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._on_its_way: Generator[None] = (None for _ in ())

    def save(self, step: int, records: list[Record]) -> None:
        """Write the state after `step` steps to this disk and begin to store it, once the checkpoint before is stored.

        `records` are the curve so far; rank 0 stores its own.
        """
        self.wait()
        frozen_stay = self._job.work.adapter is not None
        self._engine.save_checkpoint(
            str(self._local), tag=name_of(step), save_latest=False, exclude_frozen_parameters=frozen_stay
        )
        if dist.get_rank() == 0:
            folder, best = self._local / name_of(step), self._folder / BEST
            write_records(folder / METRICS, records)
            for path in best.iterdir() if best.is_dir() else ():
                (folder / f"{CARRIED}{path.name}").hardlink_to(path)
        self._on_its_way = self._stored(step, self._thread.submit(self._upload, step))

    def go_on(self) -> None:
        """Take the checkpoint on its way one step further, without waiting."""
        next(self._on_its_way, None)

    def wait(self) -> None:
        """Return when no checkpoint is on its way any more."""
        for _ in self._on_its_way:
            time.sleep(PAUSE)

    def hurry(self) -> None:
        """Stop waiting for a store that is away: threads try once more, and fail."""
        self._in_a_hurry.set()

    def load(self) -> list[Record]:
        """Go to the step that the job continues from; the result is the curve up to there."""
        folder = self._local / name_of(self._job.resume)
        with _data_alone(self._checkpoints.uri(self._job.resume)):
            into = adapter.load_state if self._job.work.adapter else None
            path, _ = self._engine.load_checkpoint(str(self._local), tag=folder.name, custom_load_fn=into)
        if path is None:
            raise TransientError(f"DeepSpeed does not load the checkpoint {folder}", hint="See the pod's log.")
        records = read_records(folder / METRICS)
        if dist.get_rank() == 0:
            for path in folder.glob(f"{CARRIED}*"):
                (self._folder / BEST).mkdir(exist_ok=True)
                path.rename(self._folder / BEST / path.name.removeprefix(CARRIED))
        dist.barrier()
        self._remove(folder)
        log.info("going on after step %d", self._job.resume)
        return records

    def store_curve(self, records: list[Record]) -> None:
        """Store the curve of a training that ends without a model."""
        if dist.get_rank() == 0:
            write_records(self._folder / METRICS, records)
            stage = self._checkpoints.folder
            stage.bucket.upload(self._folder / METRICS, stage.key(METRICS))
            stage.bucket.put(stage.key(EVENTS), event_file(records))

    def _stored(self, step: int, upload: Future[list[Part]]) -> Generator[None]:
        """Store a checkpoint: all nodes' files, then the promise. Yields while a thread is busy."""
        device, what = self._engine.device, "store its part of a checkpoint"
        files = yield from agreed(upload, device, what)
        promise = self._thread.submit(self._complete, step, [part for parts in files for part in parts])
        yield from agreed(promise, device, what)
        if dist.get_rank() == 0:
            log.info("checkpoint after step %d is stored", step)

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
    """Inside, DeepSpeed reads nothing from a checkpoint's pickles but tensors, plain values and its own settings.

    DeepSpeed asks torch to run what a pickle says, so everybody who can write to the bucket could run code here. Raises
    UserError when a file of the checkpoint `uri` holds more than data.
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
