"""Whether GPUs of the size that the run names hold its models: told on a CPU, before a GPU is asked for.

For a GPU that serves the least is counted that must be there, so a refusal is certain and a pass is not:

    weights   bytes of the tensors, floating ones in the engine's dtype, divided by tensorParallel
    cache     keys and values of one sequence of the whole context; a GPU has one head of them at least

within gpuMemoryUtilization of its memory; vLLM wants room for activations and CUDA graphs besides. For a GPU that
trains it is the estimate in `memory`, with a micro-batch of maxSequenceLength tokens, the largest there may be. Sizes
come from config.json and the headers of the safetensors, never from a model's name, and no model is made: `cgd plan`
says the same where there is no torch. What cannot be known gets no verdict, and the log says so: other formats, latent
attention (MLA), quantized students and mixtures of experts in training.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgd_stages.contract import Engine, Model, Train
from cgd_stages.engines.base import ON_GPU
from cgd_stages.errors import UserError
from cgd_stages.models import resolve, training_memory
from cgd_stages.store.bucket import Bucket

log = logging.getLogger(__name__)

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of tensors that an engine turns into its own; the others are quantized and stay."""
MOST_GPUS = 64
CHANGES: tuple[dict[str, Any], ...] = (
    {"activation_checkpointing": "auto"},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"zero_stage": 3, "offload": "optimizer"},
    {"zero_stage": 3, "offload": "parameters"},
)
"""What may make a training fit, from the cheapest on."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a run is going to ask for, and what it trains on them."""

    memory: int
    """Bytes of one."""
    training: Train


@dataclass(frozen=True)
class Served:
    """A model as an engine would serve it; `config` is that of transformers, `context` in tokens."""

    where: str
    model: Model
    engine: Engine
    config: Any
    context: int


@dataclass(frozen=True)
class Misfit:
    """What does not fit, with the arithmetic, and what to change."""

    message: str
    hint: str


def read_config(folder: Path, model: Model, where: str) -> Any:
    """The model's config in transformers. Raises UserError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise resolve.unloadable(model, where, "config", error) from error


def context_length(config: Any, engine: Engine, model: Model, where: str) -> int:
    """Tokens that prompt and reply may have together. Raises UserError when the run wants more than the model takes."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if own is None or (engine.max_model_len or 0) <= own:
        return int(engine.max_model_len or own or 0)
    if (getattr(config.get_text_config(), "rope_parameters", None) or {}).get("factor", 1) != 1:
        log.warning("%s: maxModelLen %d needs the model's rope scaling (%d)", where, engine.max_model_len, own)
        return int(engine.max_model_len or own)
    message = f"maxModelLen is {engine.max_model_len}, but {model.name} takes {own} tokens"
    raise UserError(message, hint=f"Lower {where}.maxModelLen to {own}, or take another {where}.model.")


def refuse_misfits(bucket: Bucket, scratch: Path, gpus: Gpus, served: Sequence[Served]) -> None:
    """Raise one UserError for all that does not fit; the student comes first among the served."""
    if misfits := find_misfits(bucket, scratch, gpus, served):
        hints = " ".join(one.hint for one in misfits)
        raise UserError("; ".join(one.message for one in misfits), hint=f"{hints} Or take larger GPUs: {_SAY}.")


def find_misfits(bucket: Bucket, scratch: Path, gpus: Gpus, served: Sequence[Served]) -> list[Misfit]:
    """All that does not fit; the student comes first among the served."""
    weights = [resolve.tensors(one.model, bucket, scratch) for one in served]
    found = [_served(gpus, one, tensors) for one, tensors in zip(served, weights, strict=True)]
    found.append(trained(gpus, served[0].config, weights[0]))
    return [one for one in found if one]


_SAY = "spec.placement.gpuMemory says how large they are"


def _served(gpus: Gpus, one: Served, tensors: Sequence[resolve.Tensor] | None) -> Misfit | None:
    if tensors is None:
        log.warning("%s: the size of %s is not known; whether it fits is not checked", one.where, one.model.name)
        return None
    cache = cache_bytes(one.config, one.engine)
    if cache is None:
        log.warning("%s: %s has latent attention; whether it fits is not checked", one.where, one.model.name)
        return None
    return misfit_of(gpus, one, weight_bytes(tensors, one.engine))


def misfit_of(gpus: Gpus, one: Served, weights: int) -> Misfit | None:
    """Whether weights of so many bytes, all GPUs together, and a sequence's cache fit; the verdict is logged."""
    share = one.engine.gpu_memory_utilization or float(ON_GPU["gpu_memory_utilization"])
    room = share * gpus.memory
    own, cache = _needs(one, weights, one.engine.tensor_parallel)
    arithmetic = (
        f"{one.where}: {one.model.name} needs at least {_giga(own)} of weights and {_giga(cache)} of cache for one "
        f"sequence of {one.context} tokens on each GPU (tensorParallel {one.engine.tensor_parallel}); {share:.0%} of "
        f"{_giga(gpus.memory)} are {_giga(room)}"
    )
    log.info("%s", arithmetic)
    if own + cache <= room:
        return None
    return Misfit(arithmetic, f"{one.where}: {_or(_serving_mends(one, weights, room))}.")


def _needs(one: Served, weights: int, gpus: int) -> tuple[int, int]:
    cache = cache_bytes(one.config, one.engine.model_copy(update={"tensor_parallel": gpus}))
    assert cache
    return weights // gpus, cache.total(one.context)


def _serving_mends(one: Served, weights: int, room: float) -> Iterator[str]:
    gpus = one.engine.tensor_parallel
    more = (gpus << doublings for doublings in range(1, MOST_GPUS.bit_length()) if gpus << doublings <= MOST_GPUS)
    enough = next((count for count in more if sum(_needs(one, weights, count)) <= room), None)
    if enough:
        yield f"set tensorParallel to {enough}"
    cache = cache_bytes(one.config, one.engine)
    if cache and (tokens := cache.tokens(room - weights // gpus) // 1024 * 1024):
        yield f"set maxModelLen to {tokens} or less"
    if not enough:
        yield "take a smaller or a quantized model"


@dataclass(frozen=True)
class Cache:
    """Bytes of keys and values on one GPU: for each token of the whole context, and of a sliding window."""

    whole: int
    windowed: int
    window: int

    def total(self, tokens: int) -> int:
        return self.whole * tokens + self.windowed * min(tokens, self.window)

    def tokens(self, room: float) -> int:
        """Tokens beyond the window whose keys and values fit into so many bytes; 0: none."""
        found = max(0, int((room - self.windowed * self.window) / self.whole)) if self.whole else 0
        return found if found >= self.window else 0


def cache_bytes(config: Any, engine: Engine) -> Cache | None:
    """What a model's layers keep of a token, at least; None for latent attention."""
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        return None
    heads, queries = getattr(text, "num_key_value_heads", None), getattr(text, "num_attention_heads", None)
    if not queries:  # a model without attention
        return Cache(0, 0, 0)
    size = getattr(text, "head_dim", None) or text.hidden_size // queries
    window = getattr(text, "sliding_window", None) or 0
    plain = "sliding_attention" if window else "full_attention"
    kinds = getattr(text, "layer_types", None) or [plain] * text.num_hidden_layers
    own = kinds[: len(kinds) - (getattr(text, "num_kv_shared_layers", None) or 0)]
    layer = 2 * max(1, (heads or queries) // engine.tensor_parallel) * size * _width(engine)
    return Cache(layer * own.count("full_attention"), layer * own.count("sliding_attention"), window)


def weight_bytes(tensors: Iterable[resolve.Tensor], engine: Engine) -> int:
    """Bytes of a model's weights in the engine's dtype, on all GPUs together."""
    return sum(one.parameters * _width(engine) if one.dtype in FLOATS else one.size for one in tensors)


def _width(engine: Engine) -> int:
    """vLLM's `auto` takes 16 bits, for a model in float32 too."""
    return 4 if engine.dtype == "float32" else 2


def trained(gpus: Gpus, config: Any, tensors: Sequence[resolve.Tensor] | None) -> Misfit | None:
    """Whether the training fits, with activations made again in backward unless the run says never."""
    shape = shape_of(config, tensors) if tensors else None
    if shape is None:
        log.warning("spec.training: a training of this student is not estimated; whether it fits is not checked")
        return None
    work, room = gpus.training, training_memory.USABLE * gpus.memory
    world = work.workers * work.processes_per_worker
    fixed, kept = _trains(work, shape, world)
    again = "kept" if work.activation_checkpointing == "never" else "made again in backward"
    arithmetic = (
        f"spec.training: each of {world} GPUs needs {_giga(fixed)} of model and optimizer (zeroStage "
        f"{work.zero_stage}, offload {work.offload}) and {_giga(kept)} of activations, {again}, for "
        f"{work.max_sequence_length} tokens; {training_memory.USABLE:.0%} of {_giga(gpus.memory)} are {_giga(room)}"
    )
    log.info("%s", arithmetic)
    if fixed + kept <= room:
        return None
    fitting = [
        " and ".join(f"{_CAMEL[name]} to {value}" for name, value in change.items())
        for change in CHANGES
        if sum(_trains(work.model_copy(update=change), shape, world)) <= room
    ]
    mends = [f"set {one}" for one in fitting[:2]]
    mends += ["raise workers or gpusPerWorker" if work.zero_stage else "set zeroStage to 3 and raise workers"]
    mends += ["lower maxSequenceLength"]
    return Misfit(arithmetic, f"spec.training: {_or(mends)}.")


_CAMEL = {"activation_checkpointing": "activationCheckpointing", "zero_stage": "zeroStage", "offload": "offload"}


def shape_of(config: Any, tensors: Sequence[resolve.Tensor]) -> training_memory.Shape | None:
    """The student in numbers, as `student.shape` has it of the model itself. None: not estimated."""
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None) or not getattr(text, "num_attention_heads", None):
        return None
    if any(one.dtype not in FLOATS for one in tensors):
        return None
    tied = bool(getattr(text, "tie_word_embeddings", False))
    own = [one for one in tensors if not (tied and one.name.endswith("lm_head.weight"))]
    norms: dict[str, int] = {}
    for one in own:
        module = one.name.rpartition(".")[0]
        if _NORM.search(module):
            norms[module] = norms.get(module, 0) + one.parameters
    return training_memory.shape_of(config, sum(one.parameters for one in own), norms.values())


_NORM = re.compile(r"(norm|\bln_)[^.]*$", re.IGNORECASE)
"""Modules that are norms, as the models of transformers call them."""


def _trains(work: Train, shape: training_memory.Shape, world: int) -> tuple[int, int]:
    checkpointing = work.activation_checkpointing != "never"
    return (
        training_memory.states(work, shape, world=world),
        training_memory.activations(work, shape, tokens=work.max_sequence_length, checkpointing=checkpointing),
    )


def _or(mends: Iterable[str]) -> str:
    return ", or ".join(mends)


def _giga(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
