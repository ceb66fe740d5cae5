"""Engines: what turns messages into text. One protocol, two kinds: vLLM in this process, an OpenAI-compatible server.

An engine is fed all the time: `submit` while it has room, `step` to collect what has finished. One bad request is an
outcome (`Refused`), never an exception; an exception means that the engine as a whole cannot go on.
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from cgd_stages import contract
from cgd_stages.contract import Sampling
from cgd_stages.errors import GPU_HINT, TransientError, UserError
from cgd_stages.method.prompts import Message, render, token_ids
from cgd_stages.text.whole import whole

log = logging.getLogger(__name__)

LOOP_TOKENS, LOOP_REPEATS = 64, 32
"""A text that repeats up to so many tokens so many times in a row has no end: vLLM stops it there, which saves the
rest of its `maxTokens`."""

MOST_TOKENS = 2**31 - 1
"""Of a row, which has 32 bits for them."""


@dataclass(frozen=True)
class Request:
    """One question. `name` is the caller's own and unique among the requests that are under way."""

    name: str
    messages: list[Message]
    sampling: Sampling
    """Its `seed` is this request's own, and counts only where the temperature is not zero."""


@dataclass(frozen=True)
class Completion:
    """What the model said: its whole output, why it ended (`stop`, `length` or `repetition`), its cost in tokens."""

    name: str
    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int
    thinking: str = ""
    """What a server has told apart from the text; a thought inside the text is still there."""
    cached_tokens: int = 0
    """Tokens of the prompt that were in the prefix cache."""


@dataclass(frozen=True)
class Refused:
    """Why there is no output: `template`, `too_long` or `endpoint`."""

    name: str
    reason: str
    detail: str
    prompt_tokens: int = 0


Outcome = Completion | Refused


class Engine(Protocol):
    """A warm model. Not safe to share between threads."""

    settings: dict[str, Any]
    """What it was started with: goes into logs and markers, and determines no output."""

    @property
    def room(self) -> int:
        """How many more requests keep it busy without piling up."""

    @property
    def busy(self) -> bool:
        """Whether outcomes are still to come."""

    def submit(self, request: Request) -> None: ...

    def step(self) -> list[Outcome]:
        """Work for a moment; what has finished since the last step. Raises TransientError when the engine is dead."""

    def metrics(self) -> dict[str, float]:
        """What it tells of itself while it runs: `generated_tokens`, those of unfinished requests too where it knows
        them, and what is its own, such as `preemptions`."""

    def close(self) -> None: ...


def drive(
    engine: Engine, take: Callable[[], Request | None], stop: Event, *, on_step: Callable[[], None] = lambda: None
) -> Iterator[Outcome]:
    """Keep the engine full until every request has an outcome, or until `stop`: then the unfinished are dropped.

    `take` gives the next request, or None when there is none for now: outcomes may bring more, so it is asked again
    after every step. `on_step` is called after every step, whether or not it finished anything.
    """
    while not stop.is_set():
        while engine.room > 0 and (request := take()) is not None:
            engine.submit(request)
        if not engine.busy:
            return
        yield from map(_storable, engine.step())
        on_step()


def _storable(outcome: Outcome) -> Outcome:
    """The outcome, as rows take it: JSON from a server may hold half of a character, and any number of tokens."""
    changed: dict[str, Any] = {field.name: _within(getattr(outcome, field.name)) for field in fields(outcome)}
    return replace(outcome, **changed)


def _within(value: str | int) -> str | int:
    return whole(value) if isinstance(value, str) else max(0, min(value, MOST_TOKENS))


class VllmEngine:
    """vLLM in this process, on GPUs or on a CPU, fed request by request.

    Raises UserError when the model does not load for a reason that a retry would meet again.
    """

    def __init__(self, model: Path, engine: contract.Engine) -> None:
        self._llm = _start_vllm(model, engine)
        config = self._llm.vllm_config
        self._tokenizer = self._llm.get_tokenizer()
        self._limit = int(config.model_config.max_model_len)
        self._wanted = 2 * int(config.scheduler_config.max_num_seqs)
        self._refused: list[Outcome] = []
        self.settings = {
            "engine": "vllm",
            "device": config.device_config.device_type,
            "dtype": str(config.model_config.dtype),
            "maxModelLen": self._limit,
            "maxNumSeqs": config.scheduler_config.max_num_seqs,
            "maxNumBatchedTokens": config.scheduler_config.max_num_batched_tokens,
            "blockSize": config.cache_config.block_size,
            "prefixCaching": config.cache_config.enable_prefix_caching,
            "gpuMemoryUtilization": config.cache_config.gpu_memory_utilization,
            "tensorParallel": config.parallel_config.tensor_parallel_size,
        }
        log.info("engine: %s", self.settings)

    @property
    def room(self) -> int:
        under_way = int(self._llm.get_num_unfinished_requests())
        return self._wanted - under_way - len(self._refused)

    @property
    def busy(self) -> bool:
        return bool(self._refused) or self._llm.has_unfinished_requests()

    def submit(self, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

        try:
            ids = token_ids(self._tokenizer, render(self._tokenizer, request.messages))
        except (TemplateError, ValueError, TypeError) as error:
            self._refused.append(Refused(request.name, "template", str(error)))
            return
        if len(ids) >= self._limit:
            detail = f"the prompt has {len(ids)} tokens, the context {self._limit}"
            self._refused.append(Refused(request.name, "too_long", detail, len(ids)))
            return
        ask = request.sampling
        params = SamplingParams(
            max_tokens=min(ask.max_tokens, self._limit - len(ids)),
            temperature=ask.temperature,
            top_p=ask.top_p,
            seed=ask.seed if ask.temperature > 0 else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            repetition_detection=RepetitionDetectionParams(max_pattern_size=LOOP_TOKENS, min_count=LOOP_REPEATS),
        )
        self._llm.add_request(request.name, tokens_input(ids), params)

    def step(self) -> list[Outcome]:
        refused, self._refused = self._refused, []
        if not self._llm.has_unfinished_requests():
            return refused
        from vllm.exceptions import VLLMServerError

        try:
            outputs = self._llm.step()
        except (RuntimeError, VLLMServerError) as error:
            raise TransientError(f"the engine died: {error}", hint="See the pod's log; it is started anew.") from error
        return refused + [_completion(output) for output in outputs if output.finished]

    def metrics(self) -> dict[str, float]:
        """`preemptions`: how often a request lost its cache to others and had to be computed anew."""
        told = {metric.name: metric.value for metric in self._llm.get_metrics() if hasattr(metric, "value")}
        names = {"generated_tokens": "vllm:generation_tokens", "preemptions": "vllm:num_preemptions"}
        return {name: float(told.get(key, 0)) for name, key in names.items()}

    def close(self) -> None:
        self._llm.engine_core.shutdown()


def _completion(output: Any) -> Completion:
    """A finished request as vLLM tells it."""
    (said,) = output.outputs
    return Completion(
        name=output.request_id,
        text=said.text,
        finish_reason=str(said.finish_reason),
        prompt_tokens=len(output.prompt_token_ids),
        tokens=len(said.token_ids),
        cached_tokens=output.num_cached_tokens or 0,
    )


def vllm_arguments(model: Path, engine: contract.Engine) -> dict[str, Any]:
    """What vLLM is started with for a model on this machine, its environment variables set.

    Raises TransientError where this vLLM has no device to run on.
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


def _start_vllm(model: Path, engine: contract.Engine) -> Any:
    started, arguments = time.monotonic(), vllm_arguments(model, engine)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        from vllm import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

    try:
        llm = LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
    except (ValueError, NotImplementedError) as error:
        hint = "Correct the model or its settings (maxModelLen, dtype, ...) in spec.student or spec.teacher."
        raise UserError(f"vLLM does not take the model {model}: {error}", hint=hint) from error
    log.info("engine ready in %.0f s", time.monotonic() - started)
    return llm


ON_GPU = {"max_num_seqs": 512, "max_num_batched_tokens": 16384, "gpu_memory_utilization": 0.92}
"""For throughput, on GPUs with 80 GB: vLLM's own defaults look after latency as well."""


def _on_cpu(engine: contract.Engine) -> dict[str, Any]:
    """What vLLM wants on a CPU: a small cache, every core, one process, no compilation."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if engine.tensor_parallel == 1:
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = cores
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # The default block of 128 tokens would leave short prompts without a shared prefix.
    return {
        "enforce_eager": True,
        "block_size": 32,
        "max_num_seqs": 64,
        "dtype": cpu_dtype(engine.dtype, fast_bfloat16=_has_fast_bfloat16()),
    }


def cpu_dtype(wanted: str, *, fast_bfloat16: bool) -> str:
    """The dtype that `auto` stands for on a CPU.

    Without AVX-512, torch multiplies bfloat16 matrices without oneDNN: 1 GFLOP/s where float32 reaches 33.
    """
    return "float32" if wanted == "auto" and not fast_bfloat16 else wanted


def _has_fast_bfloat16() -> bool:
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
