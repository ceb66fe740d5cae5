"""One process of the training loop that writes down the gradients of its first step: see test_train_gradients.py.

    python -m torch.distributed.run --nproc-per-node 2 -m gradient_ranks <folder> <dtype>

All is the product's own but for the dtype if it is float64, also in the loss; between ranks, where DeepSpeed can send
it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad
from torch.nn.functional import cross_entropy

from cgd_stages.train import loop, student
from cgd_stages.train.group import join_group
from cgd_stages.train.trainer import Trainer
from cgd_stages.training.job import JOB, Job

CASES = "cases.json"
"""Of each case, what differs from the job or its work."""


def main(folder: Path, dtype: str) -> None:
    loop._quieten()
    join_group()
    if dtype == "float64":
        in_float64()
    job = Job.model_validate_json((folder / JOB).read_text())
    for number, changes in enumerate(json.loads((folder / CASES).read_text())):
        of_job = {name: changes.pop(name) for name in ("student", "router_loss_weight") if name in changes}
        case = job.model_copy(update=of_job | {"work": job.work.model_copy(update=changes)})
        if dist.get_rank() == 0:
            (folder / JOB).write_text(case.to_json())
        dist.barrier()
        gradients = of_first_step(loop.start(folder))
        if dist.get_rank() == 0:
            torch.save(gradients, folder / f"gradients-{number}.pt")
        dist.barrier()


def in_float64() -> None:
    """The student, its loss, and without ZeRO what DeepSpeed sends; its configuration and lists know no such dtype.
    ZeRO's buffers are made for float32 and refuse another."""
    load, initialize = student.load, student.initialize
    get_accelerator().supported_dtypes = lambda: [torch.float64]

    def initialized(model: Any, config: dict[str, Any]) -> Any:
        engine = initialize(model, config)
        engine.communication_data_type = torch.float64
        return engine

    student.load = lambda *given: load(*given).double()
    student.initialize = initialized
    student._float32_loss = lambda logits, learned: cross_entropy(logits.double(), learned, reduction="sum")


def of_first_step(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Name -> gradient of the whole batch, averaged over ranks as DeepSpeed's step would take it."""
    batch = trainer.schedule.batch(0)
    units = trainer.criterion.units(trainer.examples, batch)
    trainer._accumulate(trainer.examples, batch, units, len(trainer.examples.sequence_lengths(batch)))
    found = {}
    for name, parameter in trainer.engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter)
        assert gradient is not None, name
        found[name] = gradient.detach().double().clone().cpu()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    sys.stderr.flush()
    os._exit(
        0
    )  # as the product's loop does: threads of the process group may abort an interpreter that takes itself down
