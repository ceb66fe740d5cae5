"""Whether the run's models fit GPUs of the size that it names. Runs on a CPU, before the run asks for a GPU.

A GPU that serves needs at least these, so a refusal is certain and a pass is not:

    weights   bytes of the tensors, floating ones in the engine's dtype, divided by tensorParallel
    cache     keys and values of one sequence of the full context; a GPU has one head of them at least

They must fit into gpuMemoryUtilization of its memory; vLLM needs room for activations and CUDA graphs besides. A GPU
that trains needs the estimate of `training_memory`, with the largest micro-batch: maxSequenceLength tokens. Sizes come
from config.json and the headers of the safetensors, never from a model's name, and no model is loaded: `cgd plan` comes
to the same result without torch. A mixture of experts needs memory for all of its experts, and activations of those
that a token meets. There is no verdict on other formats, latent attention (MLA) and quantized students; the log names
these.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic.alias_generators import to_camel

from cgd_stages.contract import Engine, Model, Train
from cgd_stages.engines.vllm_settings import GPU_MEMORY_UTILIZATION
from cgd_stages.errors import UserError
from cgd_stages.models import resolve, targets, training_memory
from cgd_stages.models.mixture import is_routed, mixture_of
from cgd_stages.models.training_memory import giga
from cgd_stages.store.bucket import Bucket

log = logging.getLogger(__name__)

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes that an engine converts to its own; tensors of other dtypes are quantized and stay as they are."""
MXFP4 = "mxfp4"
"""The quantization of gpt-oss, which transformers undoes for a training."""
MOST_GPUS = 64
_MOST = {"num_hidden_layers": 10_000, "hidden_size": 1 << 20, "vocab_size": 1 << 28, "max_position_embeddings": 1 << 40}
"""More than in any model: transformers builds as many layers as a config says, without an end."""
CHANGES: tuple[dict[str, Any], ...] = (
    {"activation_checkpointing": "auto"},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"zero_stage": 3, "offload": "optimizer"},
    {"zero_stage": 3, "offload": "parameters"},
)
"""Changes that may make a training fit, the cheapest first."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a run is going to ask for, and the training on them."""

    memory: int
    """Bytes of one GPU."""
    training: Train


@dataclass(frozen=True)
class Served:
    """A model as an engine would serve it. `where`: its place in the spec; `config`: its config in transformers;
    `context`: in tokens."""

    where: str
    model: Model
    engine: Engine
    config: Any
    context: int


@dataclass(frozen=True)
class Misfit:
    """The arithmetic of a model that does not fit, and what to change."""

    message: str
    hint: str


def read_config(folder: Path, model: Model, where: str) -> Any:
    """The model's config in transformers. Raises UserError."""
    from transformers import AutoConfig

    with resolve.reading(model, where, "config"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
        heads, groups = (getattr(text, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
            raise ValueError(f"{heads} attention heads cannot share {groups} of keys and values (num_key_value_heads)")
        for field, most in _MOST.items():
            if isinstance(size := getattr(text, field, None), int) and not 1 <= size <= most:
                raise ValueError(f"{field} is {size} in config.json: no model has that")
        if not getattr(config, "return_dict", True):
            raise ValueError("config.json sets return_dict to false: no program here reads such outputs")
    return config


def quantization(config: Any) -> str | None:
    """The method by which a model's stored weights are quantized, as its config names it."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return str(found.get("quant_method") if isinstance(found, dict) else found.quant_method)


def context_length(config: Any, engine: Engine, model: Model, where: str) -> int:
    """Tokens of prompt and reply together, at most. Raises UserError if the run asks for more than the model takes."""
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if longest is None or (engine.max_model_len or 0) <= longest:
        return int(engine.max_model_len or longest or 0)
    if (getattr(text, "rope_parameters", None) or {}).get("factor", 1) != 1:
        log.warning("%s: maxModelLen %d needs the model's rope scaling (%d)", where, engine.max_model_len, longest)
        return int(engine.max_model_len or longest)
    message = f"maxModelLen is {engine.max_model_len}, but {model.name} takes {longest} tokens"
    raise UserError(message, hint=f"Lower {where}.maxModelLen to {longest}, or take another {where}.model.")


def refuse_misfits(bucket: Bucket, scratch: Path, gpus: Gpus, served: Sequence[Served]) -> None:
    """Raise one UserError for everything that does not fit; `served` begins with the student."""
    if misfits := find_misfits(bucket, scratch, gpus, served):
        hints = " ".join(misfit.hint for misfit in misfits)
        message = "; ".join(misfit.message for misfit in misfits)
        larger = "Or take larger GPUs: spec.placement.gpuMemory says how large they are."
        raise UserError(message, hint=f"{hints} {larger}")


def find_misfits(bucket: Bucket, scratch: Path, gpus: Gpus, served: Sequence[Served]) -> list[Misfit]:
    """Everything that does not fit; `served` begins with the student."""
    tensors = [resolve.tensors(model.model, bucket, scratch) for model in served]
    misfits = []
    for model, weights in zip(served, tensors, strict=True):
        name = model.model.name
        if weights is None:
            log.warning("%s: the size of %s is not known; whether it fits is not checked", model.where, name)
        elif cache_bytes(model.config, model.engine) is None:
            log.warning("%s: %s has latent attention; whether it fits is not checked", model.where, name)
        else:
            misfits.append(misfit_of(gpus, model, weight_bytes(weights, model.engine)))
    misfits.append(trained(gpus, served[0].config, tensors[0]))
    return [misfit for misfit in misfits if misfit]


def misfit_of(gpus: Gpus, served: Served, weights: int) -> Misfit | None:
    """Whether `weights` bytes, on all GPUs together, and the cache of one sequence fit; the log has the verdict."""

    def needs(parallel: int) -> tuple[int, int]:
        cache = cache_bytes(served.config, served.engine.model_copy(update={"tensor_parallel": parallel}))
        assert cache
        return weights // parallel, cache.total(served.context)

    room = (served.engine.gpu_memory_utilization or GPU_MEMORY_UTILIZATION) * gpus.memory
    parallel = served.engine.tensor_parallel
    on_each, cached = needs(parallel)
    arithmetic = (
        f"{served.where}: {served.model.name} needs at least {giga(on_each)} of weights and {giga(cached)} of cache "
        f"for one sequence of {served.context} tokens on each GPU (tensorParallel {parallel}); "
        f"{room / gpus.memory:.0%} of {giga(gpus.memory)} are {giga(room)}"
    )
    log.info("%s", arithmetic)
    if on_each + cached <= room:
        return None
    changes = []
    more = (parallel << doublings for doublings in range(1, MOST_GPUS.bit_length()))
    enough = next((count for count in more if count <= MOST_GPUS and sum(needs(count)) <= room), None)
    if enough:
        changes.append(f"set tensorParallel to {enough}")
    cache = cache_bytes(served.config, served.engine)
    if cache and (tokens := cache.tokens(room - on_each) // 1024 * 1024):
        changes.append(f"set maxModelLen to {tokens} or less")
    if not enough:
        changes.append("take a smaller or a quantized model")
    return Misfit(arithmetic, f"{served.where}: {', or '.join(changes)}.")


@dataclass(frozen=True)
class Cache:
    """Bytes of keys and values on one GPU: for each token of the full context (`full`), and of a sliding window
    (`windowed`); `window` in tokens."""

    full: int
    windowed: int
    window: int

    def total(self, tokens: int) -> int:
        return self.full * tokens + self.windowed * min(tokens, self.window)

    def tokens(self, room: float) -> int:
        """Tokens whose keys and values fit into `room` bytes; 0 if they do not fill the window."""
        tokens = max(0, int((room - self.windowed * self.window) / self.full)) if self.full else 0
        return tokens if tokens >= self.window else 0


def cache_bytes(config: Any, engine: Engine) -> Cache | None:
    """Bytes that a model's layers keep of a token, at least; None for latent attention."""
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
    kinds = kinds[: len(kinds) - (getattr(text, "num_kv_shared_layers", None) or 0)]
    match engine.kv_cache_dtype:
        case None | "auto":
            width: float = _width(engine)
        case "bfloat16" | "float16":
            width = 2
        case name:
            width = _quantized_width(name)
    layer = int(2 * max(1, (heads or queries) // engine.tensor_parallel) * size * width)
    return Cache(layer * kinds.count("full_attention"), layer * kinds.count("sliding_attention"), window)


def weight_bytes(tensors: Iterable[resolve.Tensor], engine: Engine) -> int:
    """Bytes of a model's weights in the engine's dtype, on all GPUs together; of weights that the engine quantizes, the
    least."""
    width = _quantized_width(engine.quantization) if engine.quantization else _width(engine)
    return int(sum(tensor.parameters * width if tensor.dtype in FLOATS else tensor.size for tensor in tensors))


def _width(engine: Engine) -> int:
    """Bytes of a float. vLLM's `auto` means 16 bits, for a model in float32 too."""
    return 4 if engine.dtype == "float32" else 2


def _quantized_width(name: str) -> float:
    """The least bytes of a number in a format of vLLM: `fp8` and the like have one, others may have three bits."""
    return 1 if re.fullmatch(r"(mx)?(fp|int)8.*", name) else 0.375


def trained(gpus: Gpus, config: Any, tensors: Sequence[resolve.Tensor] | None) -> Misfit | None:
    """Whether the training fits, with checkpointing unless the run says never."""
    shape = shape_of(config, tensors) if tensors else None
    if shape is None:
        log.warning("spec.training: there is no estimate for this student; whether its training fits is not checked")
        return None
    work, room = gpus.training, training_memory.USABLE * gpus.memory
    if work.adapter and tensors:
        shape = replace(shape, trained=targets.parameters_of(tensors, work.adapter))
    world = work.workers * work.processes_per_worker

    def needs(work: Train) -> tuple[int, int]:
        on = work.activation_checkpointing != "never"
        kept = training_memory.activations(work, shape, tokens=work.max_sequence_length, checkpointing=on)
        return training_memory.states(work, shape, world=world), kept

    fixed, kept = needs(work)
    again = "kept" if work.activation_checkpointing == "never" else "made again in backward"
    arithmetic = (
        f"spec.training: each of {world} GPUs needs {giga(fixed)} of model and optimizer (zeroStage "
        f"{work.zero_stage}, offload {work.offload}) and {giga(kept)} of activations, {again}, for "
        f"{work.max_sequence_length} tokens; {training_memory.USABLE:.0%} of {giga(gpus.memory)} are {giga(room)}"
    )
    log.info("%s", arithmetic)
    if fixed + kept <= room:
        return None
    changes = [
        "set " + " and ".join(f"{to_camel(name)} to {value}" for name, value in change.items())
        for change in CHANGES
        if sum(needs(work.model_copy(update=change))) <= room
    ][:2]
    changes += ["raise workers or gpusPerWorker" if work.zero_stage else "set zeroStage to 3 and raise workers"]
    changes += ["lower maxSequenceLength"]
    return Misfit(arithmetic, f"spec.training: {', or '.join(changes)}.")


def as_trained(tensors: Sequence[resolve.Tensor]) -> list[resolve.Tensor]:
    """The tensors of a student in its training: what is stored in MXFP4 (two weights in a byte, a scale for 32 of
    them) is trained, and stored again, in bfloat16."""
    return [
        resolve.Tensor(tensor.name, "BF16", 2 * tensor.size, 4 * tensor.size)
        if tensor.name.endswith("_blocks")
        else tensor
        for tensor in tensors
        if not tensor.name.endswith("_scales")
    ]


def parameters_of(config: Any, tensors: Sequence[resolve.Tensor]) -> tuple[int, int] | None:
    """All parameters of a model, and those that a token meets; None where they are stored in a form that hides their
    number. Raises UnknownMixture."""
    if quantization(config) == MXFP4:
        tensors = as_trained(tensors)
    if any(tensor.dtype not in FLOATS for tensor in tensors):
        return None
    every = sum(tensor.parameters for tensor in tensors)
    mixture = mixture_of(config)
    routed = sum(tensor.parameters for tensor in tensors if is_routed(tensor.name))
    return every, every - routed + routed * mixture.active // mixture.experts if mixture else every


def shape_of(config: Any, tensors: Sequence[resolve.Tensor]) -> training_memory.Shape | None:
    """The shape that `student.shape` finds in the loaded model. None: there is no estimate."""
    text = config.get_text_config()
    if quantization(config) == MXFP4:
        tensors = as_trained(tensors)
    if any(tensor.dtype not in FLOATS for tensor in tensors):
        return None
    if getattr(text, "tie_word_embeddings", False):  # the head is the embeddings
        tensors = [tensor for tensor in tensors if not tensor.name.endswith("lm_head.weight")]
    norms: dict[str, int] = {}
    for tensor in tensors:
        module = tensor.name.rpartition(".")[0]
        if _NORM.search(module):
            norms[module] = norms.get(module, 0) + tensor.parameters
    return training_memory.shape_of(config, sum(tensor.parameters for tensor in tensors), norms.values())


_NORM = re.compile(r"(norm|\bln_)[^.]*$", re.IGNORECASE)
"""Modules that are norms, as the models of transformers call them."""
