"""Every number of the manifest that vLLM reads is within vLLM's own limits, and reaches it unchanged."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from cgd_stages.contract import Between, Chat, Engine, Repetition, Sampling, Speculative
from cgd_stages.engines.vllm_settings import loop_detection, sampling_params
from cgd_stages.errors import UserError

# vLLM and torch warn about themselves while they are imported.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

TINY = 1e-6
"""How far outside a bound of a decimal number is tried."""
LARGE = 1 << 40
"""Stands for no upper bound."""


def requested(field: str) -> Callable[[Any], Any]:
    """What vLLM makes of a field of a request, through our own way to it."""

    def ask(value: Any) -> Any:
        decoding = {"temperature": 0.5} | {field: value}
        params = sampling_params(Sampling.model_construct(**decoding), limit=1 << 50, prompt_tokens=0)
        return getattr(params, field)

    return ask


def budget(value: int) -> Any:
    return sampling_params(Sampling(), 100, 0, thinking_budget=value).thinking_token_budget


def configured(config: str, name: str, **others: Any) -> Callable[[Any], Any]:
    """What vLLM makes of an argument of an engine."""

    def ask(value: Any) -> Any:
        from vllm import config as vllm_config

        return getattr(getattr(vllm_config, config)(**{name: value, **others}), name)

    return ask


def of_a_loop(field: str) -> Callable[[Any], Any]:
    """Whether vLLM takes the loop at all: it has other fields than the manifest."""

    def ask(value: Any) -> Any:
        return value if loop_detection(Repetition.model_construct(stop=True, **{**LOOP, field: value})) else None

    return ask


LOOP = {"min_tokens": 512, "min_repeats": 32}
SCHEDULER = {"max_model_len": 32, "is_encoder_decoder": False, "enable_chunked_prefill": True}


@dataclass(frozen=True)
class Theirs:
    """vLLM's reading of a field. `low`, `high`: whether our bound there is vLLM's own, and not a narrower one."""

    ask: Callable[[Any], Any]
    low: bool = False
    high: bool = False


TABLE: dict[tuple[type[BaseModel], str], Theirs] = {
    (Sampling, "max_tokens"): Theirs(requested("max_tokens"), low=True),
    (Sampling, "temperature"): Theirs(requested("temperature"), low=True, high=True),
    (Sampling, "top_p"): Theirs(requested("top_p"), low=True, high=True),
    (Sampling, "top_k"): Theirs(requested("top_k")),
    (Sampling, "min_p"): Theirs(requested("min_p"), low=True, high=True),
    (Sampling, "seed"): Theirs(requested("seed")),
    (Repetition, "min_tokens"): Theirs(of_a_loop("min_tokens")),
    (Repetition, "min_repeats"): Theirs(of_a_loop("min_repeats")),
    (Chat, "thinking_budget"): Theirs(budget),
    (Engine, "tensor_parallel"): Theirs(
        configured("ParallelConfig", "tensor_parallel_size", distributed_executor_backend="mp"), low=True
    ),
    (Engine, "max_num_seqs"): Theirs(
        configured("SchedulerConfig", "max_num_seqs", max_num_batched_tokens=LARGE, **SCHEDULER), low=True
    ),
    (Engine, "max_num_batched_tokens"): Theirs(
        configured("SchedulerConfig", "max_num_batched_tokens", max_num_seqs=1, **SCHEDULER)
    ),
    (Engine, "gpu_memory_utilization"): Theirs(
        configured("CacheConfig", "gpu_memory_utilization"), low=True, high=True
    ),
}
JUDGED = {
    (Engine, "max_model_len"): "vLLM's limit is the model's context, and prepare compares the two",
    (Speculative, "num_speculative_tokens"): "the limit depends on the method, and vLLM judges the method in prepare",
}


def numbers() -> Iterator[tuple[type[BaseModel], str]]:
    """Every field of the manifest's classes for vLLM that holds a number."""
    for kind in (Sampling, Repetition, Chat, Engine, Speculative):
        for name, field in kind.model_fields.items():
            if any(part in (int, float) for part in _types(field.annotation)):
                yield kind, name


def bounds(kind: type[BaseModel], name: str) -> tuple[Any, Any, Any]:
    """The least value that a field takes (above 0), the greatest, and a step outside them."""
    between = next((part for part in _parts(kind.model_fields[name]) if isinstance(part, Between)), None)
    if between:
        return (TINY if between.open_low else between.low), between.high, TINY
    found = {
        bound: getattr(part, bound)
        for part in _parts(kind.model_fields[name])
        for bound in ("ge", "le")
        if hasattr(part, bound)
    }
    return found["ge"], found.get("le", LARGE), 1


def _types(annotation: Any) -> Iterator[Any]:
    """The annotation, and all that it is made of."""
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _types(part)


def _parts(field: Any) -> Iterator[Any]:
    """The metadata of a field, wherever it is in the annotation."""
    yield from field.metadata
    for part in _types(field.annotation):
        yield from getattr(part, "__metadata__", ())


def test_no_number_is_left_out():
    assert set(numbers()) == TABLE.keys() | JUDGED.keys()


@pytest.mark.parametrize(("kind", "name"), TABLE, ids=lambda value: getattr(value, "__name__", value))
def test_the_range_of_a_field_is_within_vllms_and_arrives_as_written(kind, name):
    low, high, _ = bounds(kind, name)
    for value in (low, high):
        assert getattr(kind.model_validate({name: value}), name) == value
        assert TABLE[kind, name].ask(value) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "name", "end"),
    [(*key, end) for key, theirs in TABLE.items() for end in ("low", "high") if getattr(theirs, end)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_where_the_bound_is_vllms_own_the_two_refuse_the_same(kind, name, end):
    low, high, step = bounds(kind, name)
    outside = high + step if end == "high" else 0.0 if low == TINY else low - step
    with pytest.raises(ValidationError):
        kind.model_validate({name: outside})
    try:
        theirs = TABLE[kind, name].ask(outside)
    except (ValueError, UserError):
        return
    assert not math.isclose(theirs, outside), f"vLLM takes {name} = {outside}"


def test_a_temperature_that_vllm_would_raise_is_refused():
    """vLLM makes 0.01 of 0.001 with a line in its log, and samples where nearly greedy decoding was meant."""
    assert requested("temperature")(0.001) == 0.01
    for temperature in (0.001, 0.0099):
        with pytest.raises(ValidationError, match=r"from 0.01 to 2, or 0"):
            Sampling.model_validate({"temperature": temperature})
    assert requested("temperature")(0.0) == Sampling.model_validate({"temperature": 0.0}).temperature == 0.0
