"""Engines turn messages into text. They share one protocol: vLLM in this process, or an OpenAI-compatible server.

The caller submits requests while the engine has room, and collects replies with `step`. A bad request has the reply
`Refused`; an exception means that the engine as a whole cannot go on.
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
from cgd_stages.text.normal import valid_unicode

log = logging.getLogger(__name__)

LOOP_TOKENS, LOOP_REPEATS = 64, 32
"""vLLM stops a text that repeats up to 64 tokens 32 times in a row, which saves the rest of its `maxTokens`."""

MOST_TOKENS = 2**31 - 1
"""A row has 32 bits for a number of tokens."""


@dataclass(frozen=True)
class Request:
    """One question. The caller chooses `name`, which is unique among the requests under way."""

    name: str
    messages: list[Message]
    sampling: Sampling
    """The engine uses its `seed`, which differs by request, only at a temperature above 0."""


@dataclass(frozen=True)
class Completion:
    """A model's whole output, why it ended (`stop`, `length` or `repetition`), and its cost in tokens."""

    name: str
    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int
    thinking: str = ""
    """The thinking that a server returns in its own field. The text may hold more of it."""
    cached_tokens: int = 0
    """The tokens of the prompt that the prefix cache held."""


@dataclass(frozen=True)
class Refused:
    """A request without an output; `reason` is `template`, `too_long` or `endpoint`."""

    name: str
    reason: str
    detail: str
    prompt_tokens: int = 0


Reply = Completion | Refused


class Engine(Protocol):
    """A warm model. Not safe to share between threads."""

    settings: dict[str, Any]
    """The settings that the engine runs with, for logs and markers. No output depends on them."""

    @property
    def room(self) -> int:
        """How many more requests the engine can use now."""

    @property
    def busy(self) -> bool:
        """Whether replies are still to come."""

    def submit(self, request: Request) -> None: ...

    def step(self) -> list[Reply]:
        """Work for a moment and return the replies since the last step. Raises TransientError if the engine died."""

    def metrics(self) -> dict[str, float]:
        """The engine's figures while it runs: `generated_tokens`, if possible with those of unfinished requests, and
        others such as `preemptions`."""

    def close(self) -> None: ...


def drive(
    engine: Engine, take: Callable[[], Request | None], stop: Event, *, on_step: Callable[[], None] = lambda: None
) -> Iterator[Reply]:
    """Keep the engine full until every request has a reply, or until `stop`, which drops unfinished requests.

    `take` returns the next request, or None if it has none now. It is called again after every step, because replies
    may lead to more requests. `on_step` is called after every step, with or without replies.
    """
    while not stop.is_set():
        while engine.room > 0 and (request := take()) is not None:
            engine.submit(request)
        if not engine.busy:
            return
        yield from map(_storable, engine.step())
        on_step()


def _storable(reply: Reply) -> Reply:
    """The reply within the bounds of a row: a server's JSON may hold half of a character, and any number."""
    values: dict[str, Any] = {field.name: getattr(reply, field.name) for field in fields(reply)}
    for name, value in values.items():
        values[name] = valid_unicode(value) if isinstance(value, str) else max(0, min(value, MOST_TOKENS))
    return replace(reply, **values)


class VllmEngine:
    """vLLM in this process, on GPUs or on a CPU.

    Raises UserError when the model does not load and a retry would fail the same way.
    """

    def __init__(self, model: Path, engine: contract.Engine) -> None:
        self._llm = _start_vllm(model, engine)
        config = self._llm.vllm_config
        self._tokenizer = self._llm.get_tokenizer()
        self._limit = int(config.model_config.max_model_len)
        self._most_requests = 2 * int(config.scheduler_config.max_num_seqs)
        self._refused: list[Reply] = []
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
        return self._most_requests - under_way - len(self._refused)

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
            detail = f"the prompt has {len(ids)} tokens; the model's context ends at {self._limit}"
            self._refused.append(Refused(request.name, "too_long", detail, len(ids)))
            return
        sampling = request.sampling
        params = SamplingParams(
            max_tokens=min(sampling.max_tokens, self._limit - len(ids)),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed if sampling.temperature > 0 else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            repetition_detection=RepetitionDetectionParams(max_pattern_size=LOOP_TOKENS, min_count=LOOP_REPEATS),
        )
        self._llm.add_request(request.name, tokens_input(ids), params)

    def step(self) -> list[Reply]:
        replies, self._refused = self._refused, []
        if not self._llm.has_unfinished_requests():
            return replies
        from vllm.exceptions import VLLMServerError

        try:
            outputs = [output for output in self._llm.step() if output.finished]
        except (RuntimeError, VLLMServerError) as error:
            hint = "The pod starts again by itself. If it dies again, an admin must read its log."
            raise TransientError(f"the engine died: {error}", hint=hint) from error
        for output in outputs:
            (generated,) = output.outputs
            completion = Completion(
                name=output.request_id,
                text=generated.text,
                finish_reason=str(generated.finish_reason),
                prompt_tokens=len(output.prompt_token_ids),
                tokens=len(generated.token_ids),
                cached_tokens=output.num_cached_tokens or 0,
            )
            replies.append(completion)
        return replies

    def metrics(self) -> dict[str, float]:
        """`preemptions`: how often a request lost its cache to others and was computed again."""
        values = {metric.name: metric.value for metric in self._llm.get_metrics() if hasattr(metric, "value")}
        names = {"generated_tokens": "vllm:generation_tokens", "preemptions": "vllm:num_preemptions"}
        return {name: float(values.get(vllm_name, 0)) for name, vllm_name in names.items()}

    def close(self) -> None:
        self._llm.engine_core.shutdown()


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
        raise UserError(f"vLLM cannot load the model {model}: {error}", hint=hint) from error
    log.info("engine ready in %.0f s", time.monotonic() - started)
    return llm


ON_GPU = {"max_num_seqs": 512, "max_num_batched_tokens": 16384, "gpu_memory_utilization": 0.92}
"""For throughput, on GPUs with 80 GB. vLLM's own defaults compromise for latency."""


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
