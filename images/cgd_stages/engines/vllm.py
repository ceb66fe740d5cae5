"""The vLLM engine, in this process, on GPUs or on a CPU."""

import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from cgd_stages import contract
from cgd_stages.chat.template import ChatTemplate, ControlTokens
from cgd_stages.engines.base import Completion, Refused, Reply, Request
from cgd_stages.engines.vllm_settings import sampling_params, thinking_budget, vllm_arguments
from cgd_stages.errors import StageError, TransientError, UserError

log = logging.getLogger(__name__)

SETTINGS_HINT = (
    "Correct the model or its settings (maxModelLen, dtype, quantization, ...) in spec.student or spec.teacher."
)


class VllmEngine:
    """vLLM in this process, on GPUs or on a CPU.

    `template` is how the model is spoken to: `resolve.spoken`. Raises UserError when the model does not load and a
    retry would fail the same way.
    """

    def __init__(self, model: Path, engine: contract.Engine, template: ChatTemplate) -> None:
        self._template = template
        self._thinking_budget = thinking_budget(template)
        self._llm = start_vllm(model, engine, template)
        config = self._llm.vllm_config
        self._limit = int(config.model_config.max_model_len)
        self._most_requests = 2 * int(config.scheduler_config.max_num_seqs)
        self._refused: list[Reply] = []
        self._failure: StageError | None = None
        self.settings = {
            "engine": "vllm",
            **device_of(config),
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
        if self._failure:
            return 0
        under_way = int(self._llm.get_num_unfinished_requests())
        return self._most_requests - under_way - len(self._refused)

    @property
    def busy(self) -> bool:
        return bool(self._refused) or self._failure is not None or self._llm.has_unfinished_requests()

    def submit(self, request: Request) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input

        try:
            ids = self._template.token_ids(self._template.render(request.messages))
        except (TemplateError, ControlTokens) as error:
            reason = "template" if isinstance(error, TemplateError) else "control_tokens"
            self._refused.append(Refused(request.name, reason, str(error)))
            return
        if len(ids) >= self._limit:
            detail = f"the prompt has {len(ids)} tokens; the model's context ends at {self._limit}"
            self._refused.append(Refused(request.name, "too_long", detail, len(ids)))
            return
        stops, budget = self._template.extra_stops, self._thinking_budget
        params = sampling_params(request.sampling, self._limit, len(ids), stops=stops, thinking_budget=budget)
        try:
            self._llm.add_request(request.name, tokens_input(ids), params)
        except (ValueError, VLLMClientError) as error:
            self._refused.append(Refused(request.name, "engine", f"vLLM refuses the request: {error}", len(ids)))

    def step(self) -> list[Reply]:
        if self._failure:
            raise self._failure
        replies, self._refused = self._refused, []
        if not self._llm.has_unfinished_requests():
            return replies
        from vllm.exceptions import VLLMClientError, VLLMError

        try:
            outputs = [output for output in self._llm.step() if output.finished]
        except VLLMClientError as error:
            raise UserError(f"vLLM refuses a request: {error}", hint=SETTINGS_HINT) from error
        except (RuntimeError, VLLMError) as error:
            hint = "The pod starts again by itself. If it dies again, an admin must read its log."
            raise TransientError(f"the engine died: {error}", hint=hint) from error
        for output in outputs:
            (generated,) = output.outputs
            parts = self._template.split(generated.token_ids, generated.text)
            completion = Completion(
                name=output.request_id,
                text=parts.text,
                thinking=parts.thinking,
                unfinished_thinking=parts.unfinished_thinking,
                finish_reason=str(generated.finish_reason),
                prompt_tokens=len(output.prompt_token_ids),
                tokens=len(generated.token_ids),
                cached_tokens=output.num_cached_tokens or 0,
            )
            replies.append(completion)
        return replies

    def end(self, error: StageError) -> None:
        self._failure = self._failure or error

    def metrics(self) -> dict[str, float]:
        """`preemptions`: how often a request lost its cache to others and was computed again."""
        values = {metric.name: metric.value for metric in self._llm.get_metrics() if hasattr(metric, "value")}
        names = {"generated_tokens": "vllm:generation_tokens", "preemptions": "vllm:num_preemptions"}
        return {name: float(values.get(vllm_name, 0)) for name, vllm_name in names.items()}

    def close(self) -> None:
        self._llm.engine_core.shutdown()


@dataclass(frozen=True)
class TokenText:
    """Tokens of a text. Those before `start` are its context. The caller chooses `name`."""

    name: str
    ids: Sequence[int]
    start: int


T = TypeVar("T", bound=TokenText)


def finished(llm: Any, texts: Iterable[tuple[T, Any]], stop: Event, room: int) -> Iterator[tuple[T, Any]]:
    """Each text with vLLM's finished RequestOutput, in no promised order, until `stop`. `texts` come with their
    SamplingParams; the engine has `room` of them at a time.

    Raises TransientError when the engine dies, UserError when it refuses a text.
    """
    from vllm.exceptions import VLLMClientError, VLLMError
    from vllm.inputs.engine import tokens_input

    waiting, under_way = iter(texts), dict[str, T]()
    try:
        while not stop.is_set():
            while len(under_way) < room and (given := next(waiting, None)) is not None:
                text, params = given
                under_way[text.name] = text
                llm.add_request(text.name, tokens_input(list(text.ids)), params)
            if not under_way:
                return
            for output in llm.step():
                if output.finished:
                    yield under_way.pop(output.request_id), output
        llm.abort_request(list(under_way))
    except (StageError, GeneratorExit):
        llm.abort_request(list(under_way))  # the engine is well, and nobody waits for these
        raise
    except VLLMClientError as error:
        raise UserError(f"vLLM refuses a text: {error}", hint=SETTINGS_HINT) from error
    except (RuntimeError, VLLMError) as error:
        hint = "The pod starts again by itself. If it dies again, an admin must read its log."
        raise TransientError(f"the engine died: {error}", hint=hint) from error


def device_of(config: Any) -> dict[str, str]:
    """The kind and the name of the devices that an engine of this configuration runs on."""
    from vllm.platforms import current_platform

    return {"device": config.device_config.device_type, "deviceName": current_platform.get_device_name()}


def start_vllm(model: Path, engine: contract.Engine, template: ChatTemplate | None) -> Any:
    started, arguments = time.monotonic(), vllm_arguments(model, engine, template)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        from vllm import EngineArgs
        from vllm.exceptions import VLLMClientError
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

    try:
        llm = LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
    except (ValueError, NotImplementedError, VLLMClientError) as error:
        raise UserError(f"vLLM cannot load the model {model}: {error}", hint=SETTINGS_HINT) from error
    log.info("engine ready in %.0f s", time.monotonic() - started)
    return llm
