"""The arguments of vLLM on this machine, for generation, evaluation and lm-eval."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from cgd_stages import contract
from cgd_stages.errors import GPU_HINT, TransientError

log = logging.getLogger(__name__)

ON_GPU = {"max_num_seqs": 512, "max_num_batched_tokens": 16384, "gpu_memory_utilization": 0.92}
"""For throughput, on GPUs with 80 GB. vLLM's own defaults compromise for latency."""


def vllm_arguments(model: Path, engine: contract.Engine) -> dict[str, Any]:
    """The arguments of vLLM for a model on this machine. Sets vLLM's environment variables, too.

    Raises TransientError when vLLM has no device to run on.
    """
    for name, value in {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        from vllm.platforms import current_platform

    if current_platform.is_unspecified():
        raise TransientError("vLLM finds no GPU in this pod", hint=GPU_HINT)
    arguments: dict[str, Any] = {
        "model": str(model),
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "tensor_parallel_size": engine.tensor_parallel,
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
        "seed": 0,
    }
    arguments |= _on_cpu(engine) if current_platform.is_cpu() else dict(ON_GPU)
    arguments |= {
        name: value
        for name in ("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization")
        if (value := getattr(engine, name)) is not None
    }
    return arguments


def _on_cpu(engine: contract.Engine) -> dict[str, Any]:
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
    }


def cpu_dtype(dtype: str, *, fast_bfloat16: bool) -> str:
    """The dtype that vLLM uses on a CPU; `auto` becomes float32 where bfloat16 is slow.

    Without AVX-512, torch multiplies bfloat16 matrices without oneDNN: 1 GFLOP/s instead of 33 with float32.
    """
    return "float32" if dtype == "auto" and not fast_bfloat16 else dtype
