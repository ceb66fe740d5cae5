"""An adapter in training: added to the student, kept in checkpoints by itself, stored beside the student with it added.

The student's own weights are frozen and stay what they were: an adapter belongs to exactly these weights, so they are
hashed when training begins and again before the adapter is written. It is never added to the weights that train. Adding
it in place and taking it off again does not give bfloat16 weights back, so the stored model is made of a fresh copy of
the student, in the dtype that is stored, with one rounding: what is stored is what is evaluated.
"""

import logging
import shutil
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cgd_stages.contract import Adapter
from cgd_stages.errors import TransientError
from cgd_stages.models import targets
from cgd_stages.train import student
from cgd_stages.training.job import Job

log = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
"""PEFT's name of an adapter's weights."""
_NAME, _PREFIX = "default", "base_model.model."
"""The name that PEFT gives an adapter in a model and leaves out in files, and what it writes before all names."""


def add(model: Any, adapter: Adapter, seed: int) -> None:
    """Add an adapter to the student before DeepSpeed takes it, in the student's dtype and with the same random weights
    in every process. From then on `model.state_dict()` has no frozen weights."""
    torch.manual_seed(seed)
    targets.add(model, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)  # PEFT makes it float32, which DeepSpeed refuses
    model.register_state_dict_post_hook(_leave_out_frozen)
    if dist.get_rank() == 0:
        learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        log.info("adapter: rank %d, %d parameters are learned", adapter.rank, learned)


def _leave_out_frozen(model: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """DeepSpeed's own way leaves a frozen weight in the checkpoint under the second of two tied names."""
    for name, parameter in model.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(name, None)


def load_state(src: dict[str, Any], dst: Any) -> None:
    """Put a checkpoint's tensors into the student: the adapter's, all of them and nothing else but buffers."""
    result = dst.load_state_dict(src, strict=False)
    learned = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    missing = sorted(learned.intersection(result.missing_keys))
    if missing or result.unexpected_keys:
        raise TransientError(
            f"the checkpoint is not of this adapter: {[*missing, *result.unexpected_keys][:5]}",
            hint="Delete the training's checkpoints to train from the start.",
        )


class Keeper:
    """One process's part in keeping an adapter. All ranks call every method, in the same order."""

    def __init__(self, engine: Any, job: Job) -> None:
        self._engine, self._job = engine, job
        self._own = _hash_of_frozen(engine.module)

    def write(self, target: Path) -> None:
        """Write the adapter as PEFT does, into a folder of its own. Raises TransientError when the student's own
        weights are not what they were when training began."""
        self._refuse_changed_weights()
        state = _gathered(self._engine.module, sharded=self._job.work.zero_stage == 3)
        if dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)
            _write(self._engine.module.peft_config[_NAME], state, self._job, target)
        dist.barrier()

    def merge(self, adapter: Path, target: Path) -> None:
        """Write the student with the adapter added, for transformers and vLLM, in the student's stored dtype."""
        if dist.get_rank() == 0:
            student.write(self._job, merged(Path(self._job.student), self._job.student_dtype, adapter), target)
        dist.barrier()

    def _refuse_changed_weights(self) -> None:
        changed = torch.tensor(_hash_of_frozen(self._engine.module) != self._own, device=self._engine.device).int()
        dist.all_reduce(changed)
        if changed:
            raise TransientError(
                f"the student's own weights have changed in {int(changed)} processes while its adapter was trained; "
                "the adapter is not stored",
                hint="The next attempt loads the student anew and goes on from the newest checkpoint. If this comes "
                "again, an admin must look at the memory of the training's nodes.",
            )


def _hash_of_frozen(model: Any) -> int:
    """A hash of the bits of this process's part of the weights that are not learned."""
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            own = getattr(parameter, "ds_tensor", parameter).detach()
            total = hash((total, torch.hash_tensor(own).view(torch.int64).item())) if own.numel() else total
    return total


def _gathered(model: Any, *, sharded: bool) -> dict[str, torch.Tensor]:
    """The adapter's weights by their names in the model; on the first process alone."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with _whole(parameter) if sharded else nullcontext():
                if dist.get_rank() == 0:
                    state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return state


def _whole(parameter: torch.Tensor) -> AbstractContextManager[None]:
    """While it lasts, every process has all of a parameter that ZeRO 3 divides."""
    import deepspeed

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([parameter])
    return gathered


def _write(config: Any, state: dict[str, torch.Tensor], job: Job, target: Path) -> None:
    from safetensors.torch import save_file

    config = copy(config)
    named = {_PREFIX + name.replace(f".{_NAME}.", "."): tensor for name, tensor in state.items()}
    target.mkdir(parents=True, exist_ok=True)
    save_file(named, target / WEIGHTS, metadata={"format": "pt"})
    config.base_model_name_or_path, config.revision = job.work.student.name, job.work.student.revision
    config.target_modules, config.inference_mode = sorted(config.target_modules), True
    config.save_pretrained(str(target))


def merged(folder: Path, dtype: str, adapter: Path) -> Any:
    """A fresh copy of the stored student, on the CPU, with the adapter added.

    PEFT holds the adapter in float32 and adds the product to the weights, which rounds once, to `dtype`.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=False)
    with_adapter = PeftModel.from_pretrained(fresh, str(adapter), torch_device="cpu")
    with safe_open(adapter / WEIGHTS, "pt") as file:
        stored = set(file.keys())
    assert stored == get_peft_model_state_dict(with_adapter, save_embedding_layers=False).keys()  # PEFT only warns
    return with_adapter.merge_and_unload()
