"""The process group: how a process joins it, and what all ranks find out together.

All ranks call every function but those of joining, in the same order.
"""

import logging
import os
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cgd_stages.errors import GPU_HINT, TransientError

T = TypeVar("T")


def refuse_unless_agreed(what: str, value: int) -> None:
    """Raise TransientError unless every process has the same value: pods read the store at different times."""
    everyone = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    if len(set(everyone)) > 1:
        raise TransientError(f"the processes do not agree on {what}: {everyone}", hint="The pods start again.")


def join_group() -> None:
    """Join the process group that torchrun has described in the environment."""
    gpu = take_gpu()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile a shared-memory all-reduce at every first start on a CPU; it serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if gpu else "gloo", verbose=False)


def take_gpu() -> bool:
    """Take this process's GPU; False if torch is built for CPUs alone.

    Raises TransientError if torch is built for GPUs and gets none: the training would take weeks on the CPU.
    """
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    except RuntimeError as error:
        raise TransientError(f"no GPU can be used: {str(error).splitlines()[0]}", hint=GPU_HINT) from error
    return True


def anywhere(here: bool, device: torch.device) -> bool:
    """Whether `here` is true in any process."""
    total = torch.tensor(int(here), device=device)
    dist.all_reduce(total)
    return bool(total)


def agreed(mine: Future[T], device: torch.device, what: str) -> Generator[None, None, list[T]]:
    """The results of all ranks' threads, in the order of ranks; yields until the last thread has ended. Raises this
    rank's error, and in the other processes TransientError: they could not do `what`."""
    while anywhere(not mine.done(), device):
        yield
    error = mine.exception()
    if anywhere(error is not None, device):
        raise error or TransientError(f"another process could not {what}")
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, mine.result())
    return results
