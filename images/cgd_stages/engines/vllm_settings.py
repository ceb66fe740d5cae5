"""The arguments of vLLM on this machine, for generation, evaluation and lm-eval, and of each request."""

import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.chat.tokenizer import TEKKEN, WHOLE
from cgd_stages.contract import Engine, Repetition, Sampling
from cgd_stages.errors import GPU_HINT, TransientError, UserError

log = logging.getLogger(__name__)

GPU_MEMORY_UTILIZATION = 0.92
LOOP_TOKENS = 64
"""The longest part, in tokens, whose repetition is looked for."""


def on_gpu(memory: int) -> dict[str, Any]:
    """The settings for a GPU with `memory` bytes, for throughput: vLLM's own defaults compromise for latency. A smaller
    GPU has less room for keys and values, and a row that loses its room is computed again."""
    gib = memory / (1 << 30)
    return {
        "max_num_seqs": 128 if gib < 30 else 256 if gib < 60 else 512 if gib < 120 else 1024,
        "max_num_batched_tokens": 8192 if gib < 60 else 16384,
        "gpu_memory_utilization": GPU_MEMORY_UTILIZATION,
    }


def vllm_arguments(model: Path, engine: Engine, template: ChatTemplate | None = None) -> dict[str, Any]:
    """The arguments of vLLM for a model on this machine. Sets vLLM's environment variables, too. `template` has the
    tokenizer, and shows what a thought is, where vLLM must end one that reaches its budget.

    Raises TransientError when vLLM has no device to run on.
    """
    platform = _platform()
    if platform.is_unspecified():
        raise TransientError("vLLM finds no GPU in this pod", hint=GPU_HINT)
    hardware = _on_cpu(engine) if platform.is_cpu() else on_gpu(platform.get_device_total_memory())
    arguments = _arguments(model, engine, hardware)
    # vLLM must load the tokenizer that the template has: see `load_tokenizer`. Of a model with files of mistral-common,
    # too, vLLM 0.32 takes those by default.
    if (model / TEKKEN).is_file() and (model / WHOLE).is_file():
        arguments["tokenizer_mode"] = "hf"
    if template and template.files:
        arguments["tokenizer"] = str(template.files)
    if template and template.markup is not None and thinking_budget(template) is not None:
        # How vLLM finds a thought, and what the model writes when the budget is used up.
        from vllm.config.reasoning import ReasoningConfig

        start, end = template.markup.start, template.markup.bridge.strip()
        arguments["reasoning_config"] = ReasoningConfig(reasoning_start_str=start, reasoning_end_str=end)
    return arguments


def _platform() -> Any:
    for name, value in {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        from vllm.platforms import current_platform

    return current_platform


def _arguments(model: Path, engine: Engine, hardware: dict[str, Any]) -> dict[str, Any]:
    always = {
        "model": str(model),
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "tensor_parallel_size": engine.tensor_parallel,
        "enable_prefix_caching": True,
        "language_model_only": True,  # no memory, and no processor, for pictures that nobody sends
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
        "seed": 0,
    }
    chosen = {
        name: value
        for name in (*on_gpu(0), "quantization", "kv_cache_dtype")
        if (value := getattr(engine, name)) is not None
    }
    if engine.speculative:
        chosen["speculative_config"] = engine.speculative.model_dump(exclude_none=True)
    return always | hardware | chosen


def thinking_budget(template: ChatTemplate) -> int | None:
    """The most tokens of a thought, in a mode that has thoughts; None: no limit."""
    return template.chat.thinking_budget if template.thinks else None


def _on_cpu(engine: Engine) -> dict[str, Any]:
    """vLLM's settings for a CPU: a small cache, every core, one process, no compilation."""
    import torch

    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if engine.tensor_parallel == 1:
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    fast_bfloat16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return {
        "enforce_eager": True,
        "block_size": 32,  # with the default of 128 tokens, short prompts would share no prefix
        "max_num_seqs": 64,
        "dtype": cpu_dtype(engine.dtype, fast_bfloat16=fast_bfloat16),
        # vLLM 0.32 turns back the generator of a request with a seed whose prompt took several steps, which torch's
        # generators for CPUs cannot do: the engine dies. A step of a given size may be too small for a whole prompt.
        "enable_chunked_prefill": engine.max_num_batched_tokens is not None,
    }


def cpu_dtype(dtype: str, *, fast_bfloat16: bool) -> str:
    """The dtype that vLLM uses on a CPU; `auto` becomes float32 where bfloat16 is slow.

    Without AVX-512, torch multiplies bfloat16 matrices without oneDNN: 1 GFLOP/s instead of 33 with float32.
    """
    return "float32" if dtype == "auto" and not fast_bfloat16 else dtype


# --- requests


def sampling_params(
    sampling: Sampling,
    limit: int,
    prompt_tokens: int,
    *,
    stops: Sequence[int] = (),
    thinking_budget: int | None = None,
) -> Any:
    """vLLM's SamplingParams of a request whose prompt has `prompt_tokens` of the context's `limit` tokens. `stops`: ids
    of tokens that end a reply besides those that the model's generation config names.

    Raises UserError when vLLM does not take the sampling.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind

    try:
        return SamplingParams(
            max_tokens=min(sampling.max_tokens, limit - prompt_tokens),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            min_p=sampling.min_p or 0.0,
            seed=sampling.seed if sampling.temperature > 0 else None,
            stop_token_ids=list(stops),
            output_kind=RequestOutputKind.FINAL_ONLY,
            repetition_detection=loop_detection(sampling.loop),
            thinking_token_budget=thinking_budget,
        )
    except (ValueError, VLLMClientError) as error:
        hint = "Correct the sampling in spec.generation or spec.evaluation."
        raise UserError(f"vLLM refuses the sampling: {error}", hint=hint) from error


def loop_detection(loop: Repetition) -> Any:
    """vLLM's RepetitionDetectionParams; None: it looks for no loops.

    vLLM counts repetitions of a part that has `min_pattern_size` tokens or more. A shorter part that repeats is a
    longer part that repeats, so this size sets the fewest tokens of any loop: with 16 tokens, 32 times, a run of one
    token is a loop from 512 tokens on, and not from 32. The longest part has at least twice as many tokens less one, so
    that every shorter part has a multiple between the two.
    """
    if not loop.stop:
        return None
    from vllm.sampling_params import RepetitionDetectionParams

    repeats = max(loop.min_repeats, math.ceil(loop.min_tokens / LOOP_TOKENS))
    shortest = math.ceil(loop.min_tokens / repeats)
    return RepetitionDetectionParams(
        min_pattern_size=shortest, max_pattern_size=max(LOOP_TOKENS, 2 * shortest - 1), min_count=repeats
    )


# --- checks without a GPU


def needs_judging(engine: Engine) -> bool:
    """Whether the arguments hold anything that only vLLM can judge."""
    given = (engine.quantization, engine.kv_cache_dtype, engine.speculative)
    sizes = (engine.max_num_seqs, engine.max_num_batched_tokens)
    return engine.tensor_parallel > 1 or any(value is not None for value in (*given, *sizes))


def refuse_wrong_engine(model: Path, engine: Engine, samplings: Sequence[Sampling], where: str) -> None:
    """Have vLLM's own code judge an engine's arguments, and the sampling of its requests, before the run has a GPU.
    `where` names the model in the spec. Raises UserError with the fields to correct.

    vLLM's config of a whole engine needs a device; its parts do not.
    """
    hardware = _on_cpu(engine) if (platform := _platform()).is_cpu() else on_gpu(0)
    from vllm import EngineArgs
    from vllm.config import CacheConfig, ParallelConfig, SchedulerConfig, VllmConfig

    log.info("%s: vLLM judges its arguments for %s", where, platform.device_type or "a GPU")
    with _judged(where, "quantization", "dtype", "maxModelLen"):
        arguments = _arguments(model, engine, hardware)
        engine_args = EngineArgs(**arguments)
        config = engine_args.create_model_config()
        VllmConfig.get_quantization_config(config, engine_args.create_load_config())
    with _judged(where, "kvCacheDtype", "gpuMemoryUtilization"):
        CacheConfig(cache_dtype=engine_args.kv_cache_dtype, gpu_memory_utilization=engine_args.gpu_memory_utilization)
    with _judged(where, "tensorParallel"):
        parallel = ParallelConfig(tensor_parallel_size=engine.tensor_parallel, distributed_executor_backend="mp")
        config.verify_with_parallel_config(parallel)
    with _judged(where, "speculative"):
        speculative = engine_args.create_speculative_config(config, parallel)
    with _judged(where, "maxNumSeqs", "maxNumBatchedTokens"):
        SchedulerConfig(
            max_num_batched_tokens=engine_args.max_num_batched_tokens or SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS,
            max_num_seqs=engine_args.max_num_seqs,
            max_model_len=config.max_model_len,
            is_encoder_decoder=config.is_encoder_decoder,
            enable_chunked_prefill=True,
        )
    for sampling in samplings:
        with _judged(where, "speculative", "the sampling in spec.generation or spec.evaluation"):
            sampling_params(sampling, config.max_model_len, 0).verify(config, speculative, None, None)


@contextmanager
def _judged(where: str, *fields: str) -> Iterator[None]:
    """Names the fields that the block reads when vLLM refuses them."""
    from vllm.exceptions import VLLMError

    names = [field if " " in field else f"{where}.{field}" for field in fields]
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except (ValueError, TypeError, NotImplementedError, ImportError, VLLMError) as error:
        message = f"{where}: vLLM refuses its arguments: {error}"
        raise UserError(message, hint=f"Correct {' or '.join(names)}.") from error
