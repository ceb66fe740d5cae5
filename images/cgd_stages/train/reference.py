"""The log-probabilities of DPO's texts by the model at the start, measured once and stored in the stage's folder.

They are measured in the micro-batches of the first epoch, so the margins of its first step are 0 to the last bit. A
training that is started again reads them, or measures them anew from the start's weights: those it loads in any case.
"""

import logging
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Folder
from cgd_stages.store.rows import from_parquet, to_parquet
from cgd_stages.train.criterion import Run, logprobs
from cgd_stages.train.examples import Examples
from cgd_stages.training.batching import Schedule
from cgd_stages.training.job import Job

log = logging.getLogger(__name__)

REFERENCE = "reference"
"""The beginning of the names of the stored files."""
_COLUMNS: list[tuple[str, Any]] = [("id", pa.string()), ("chosen", pa.float32()), ("rejected", pa.float32())]
SCHEMA = pa.schema(_COLUMNS)


def measure_reference(
    engine: Any, run: Run, job: Job, name: str, examples: Examples, schedule: Schedule
) -> torch.Tensor:
    """The log-probabilities (pairs, 2) of each pair's preferred and other text. All ranks call together, before any
    step and before a checkpoint is loaded. `name` tells the examples of a training apart; `schedule` is theirs."""
    stored: list[torch.Tensor | None] = [_read(job, name, examples) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(stored, 0)
    if stored[0] is not None:
        return stored[0]
    found = torch.full((len(examples.lengths), 2), torch.nan)
    engine.eval()
    with torch.no_grad():
        for indices in _micro_batches(job, schedule):
            found[list(indices)] = logprobs(run, examples, indices)[0].float().cpu()
    engine.train()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    for part in parts:
        found = torch.where(found.isnan(), part, found)
    if dist.get_rank() == 0:
        _write(job, name, examples, found)
    return found


def _micro_batches(job: Job, schedule: Schedule) -> list[Sequence[int]]:
    """This rank's micro-batches of the first epoch."""
    rank, world, work = dist.get_rank(), dist.get_world_size(), job.work
    return [
        indices
        for step in range(schedule.steps_per_epoch)
        for indices in schedule.micro_batches(
            step, rank=rank, world=world, budget=work.max_sequence_length, packing=work.packing
        )
    ]


def _place(job: Job, name: str) -> tuple[Folder, str]:
    folder = Folder(Bucket(job.storage), job.run.namespace, job.stage, job.digest)
    return folder, folder.key("-".join(filter(None, (REFERENCE, name))) + ".parquet")


def _read(job: Job, name: str, examples: Examples) -> torch.Tensor | None:
    """None where nothing is stored of these examples."""
    folder, key = _place(job, name)
    data = folder.bucket.get(key)
    try:
        rows = from_parquet(data) if data else []
    except pa.ArrowInvalid:
        rows = []
    if [row["id"] for row in rows] != [examples.key(index) for index in range(len(examples.lengths))]:
        if data is not None:
            log.warning("%s is damaged, or of other pairs: it is measured anew", folder.bucket.uri(key))
        return None
    return torch.tensor([[row["chosen"], row["rejected"]] for row in rows])


def _write(job: Job, name: str, examples: Examples, found: torch.Tensor) -> None:
    folder, key = _place(job, name)
    rows = [
        {"id": examples.key(index), "chosen": chosen, "rejected": rejected}
        for index, (chosen, rejected) in enumerate(found.tolist())
    ]
    folder.bucket.put(key, to_parquet(rows, SCHEMA))
    log.info("the log-probabilities of %d pairs are stored", len(rows))
