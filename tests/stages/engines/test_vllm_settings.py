"""What vLLM is told: its own code judges the engine's arguments without a GPU, and finds loops as they are defined."""

import json
import threading
from pathlib import Path

import pytest
from support import tiny
from support.stage_builders import each

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.chat.thoughts import HARMONY
from cgd_stages.contract import Chat, Engine, Repetition, Sampling, Speculative
from cgd_stages.engines.base import Completion, Refused, Reply, Request, drive
from cgd_stages.engines.vllm import VllmEngine
from cgd_stages.engines.vllm_settings import (
    LOOP_TOKENS,
    loop_detection,
    needs_judging,
    on_gpu,
    refuse_wrong_engine,
    sampling_params,
    vllm_arguments,
)
from cgd_stages.errors import UserError
from cgd_stages.method.prompts import answer_messages

# vLLM and torch warn about themselves while they are imported.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


# --- loops


def first_loop(tokens: list[int], loop: Repetition) -> int | None:
    """How many tokens vLLM's scheduler takes before it stops; None: it takes all."""
    from vllm.v1.core.sched.utils import check_sequence_repetition

    params = loop_detection(loop)
    counts = (count for count in range(1, len(tokens) + 1) if check_sequence_repetition(tokens[:count], params))
    return next(counts, None)


@pytest.mark.parametrize("zeros", [40, 100, 400])
def test_a_large_number_with_a_token_for_each_digit_is_no_loop(zeros):
    assert first_loop([7] + [0] * zeros + [3], Repetition()) is None


def test_a_token_without_end_is_a_loop_from_the_least_number_of_tokens_on():
    assert first_loop([0] * 600, Repetition()) == 512
    assert first_loop([0] * 2000, Repetition(min_tokens=1500)) == 1504  # 32 times 47
    assert first_loop([0] * 300, Repetition(min_tokens=64)) == 64


@pytest.mark.parametrize("loop", [Repetition(), Repetition(min_tokens=4096), Repetition(min_tokens=32, min_repeats=8)])
@pytest.mark.parametrize("period", [1, 2, 3, 5, 7, 16, 17, 31, 33, 47, 63, 64])
def test_every_short_part_that_repeats_is_found_and_never_too_early(loop, period):
    least = max(loop.min_tokens, period * loop.min_repeats)
    found = first_loop([*range(1000, 1000 + period)] * (4 * least // period + 1), loop)
    assert found is not None
    assert least <= found < 4 * least


def test_without_loops_to_look_for_there_is_nothing_to_find():
    assert loop_detection(Repetition(stop=False)) is None


def test_the_longest_part_is_the_same_unless_loops_are_very_long():
    assert loop_detection(Repetition()).max_pattern_size == LOOP_TOKENS
    assert loop_detection(Repetition(min_tokens=8192)).max_pattern_size < 2 * LOOP_TOKENS


# --- requests


def test_a_request_is_told_what_the_manifest_says():
    given = Sampling(max_tokens=100, temperature=0.7, top_p=0.9, top_k=20, min_p=0.05, seed=3)
    params = sampling_params(given, 64, 14, stops=[5], thinking_budget=9)
    assert params.stop_token_ids == [5]
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (50, 0.7, 0.9, 20)
    assert (params.min_p, params.seed, params.thinking_token_budget) == (0.05, 3, 9)
    greedy = sampling_params(Sampling(), 1 << 20, 0)
    assert (greedy.top_k, greedy.min_p, greedy.seed, greedy.thinking_token_budget) == (0, 0.0, None, None)


def test_a_sampling_that_vllm_refuses_names_the_field():
    """Its errors are no ValueError."""
    with pytest.raises(UserError, match="temperature must be in") as raised:
        sampling_params(Sampling.model_construct(**dict(Sampling()) | {"temperature": 9.0}), 64, 14)
    assert "spec.generation" in raised.value.hint


# --- arguments


def test_the_defaults_follow_the_memory_of_the_gpu():
    sizes = {24: 128, 40: 256, 80: 512, 141: 1024}
    assert {size: on_gpu(size * 10**9)["max_num_seqs"] for size in sizes} == sizes
    assert [on_gpu(size << 30)["max_num_batched_tokens"] for size in (40, 80)] == [8192, 16384]


def test_the_arguments_hold_what_the_manifest_says(tmp_path):
    drafts = Speculative(method="ngram", num_speculative_tokens=3)
    given = vllm_arguments(tmp_path, Engine(quantization="fp8", kv_cache_dtype="fp8", speculative=drafts))
    assert (given["quantization"], given["kv_cache_dtype"]) == ("fp8", "fp8")
    assert given["speculative_config"] == {"method": "ngram", "num_speculative_tokens": 3}
    assert given["language_model_only"]
    assert not vllm_arguments(tmp_path, Engine()).keys() & {"quantization", "kv_cache_dtype", "speculative_config"}


def test_a_budget_of_thoughts_tells_vllm_what_a_thought_is(tmp_path, tiny_model):
    budget = Chat(thinking="on", thinking_budget=5, reasoning_parser="openai_gptoss")
    told = vllm_arguments(tmp_path, Engine(), ChatTemplate.load(tiny_model, budget))["reasoning_config"]
    assert (told.reasoning_start_str, told.reasoning_end_str) == (HARMONY.start, HARMONY.bridge.strip())
    without = budget.model_copy(update={"thinking_budget": None})
    for template in (None, ChatTemplate.load(tiny_model, without)):
        assert "reasoning_config" not in vllm_arguments(tmp_path, Engine(), template)


NGRAM = Speculative(method="ngram", num_speculative_tokens=3)


@pytest.fixture(params=["CPU", "no device"])
def platform(request, monkeypatch):
    """prepare runs on a CPU, with the image for GPUs: there vLLM knows no device."""
    import vllm.platforms
    from vllm.platforms.interface import UnspecifiedPlatform

    if request.param == "no device":
        import vllm.config.model
        import vllm.config.parallel
        import vllm.engine.arg_utils

        unspecified = UnspecifiedPlatform()
        monkeypatch.setattr(vllm.platforms, "_current_platform", unspecified)
        for module in (vllm.config.model, vllm.config.parallel, vllm.engine.arg_utils):
            monkeypatch.setattr(module, "current_platform", unspecified)
    return request.param


@pytest.mark.parametrize(
    ("engine", "field", "words"),
    [
        (Engine(quantization="fp9"), "spec.teacher.quantization", "Unknown quantization method"),
        (Engine(quantization="awq"), "spec.teacher.quantization", "config"),
        (Engine(kv_cache_dtype="fp9"), "spec.teacher.kvCacheDtype", "fp9"),
        (Engine(tensor_parallel=3), "spec.teacher.tensorParallel", "attention heads"),
        (Engine(max_num_seqs=64, max_num_batched_tokens=64), "", ""),
        (Engine(max_num_seqs=512, max_num_batched_tokens=64), "spec.teacher.maxNumSeqs", "max_num_seqs"),
        (Engine(speculative=Speculative(num_speculative_tokens=3)), "spec.teacher.speculative", "without"),
        (Engine(speculative=Speculative(method="suffix")), "spec.teacher.speculative", "Arctic"),
        (Engine(speculative=NGRAM), "", ""),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_without_a_gpu_and_named(tiny_model, platform, engine, field, words):
    assert needs_judging(engine)

    def judge() -> None:
        refuse_wrong_engine(tiny_model, engine, [Sampling()], "spec.teacher")

    if not field:
        return judge()
    with pytest.raises(UserError, match=words) as raised:
        judge()
    assert field in raised.value.hint
    return None


def test_a_sampling_that_does_not_go_with_the_engine_is_refused_without_a_gpu(tiny_model, platform):
    sampling = Sampling(temperature=1.0, min_p=0.1)
    refuse_wrong_engine(tiny_model, Engine(max_num_seqs=4), [sampling], "spec.student")
    with pytest.raises(UserError, match="min_p") as raised:
        refuse_wrong_engine(tiny_model, Engine(speculative=NGRAM), [Sampling(), sampling], "spec.student")
    assert "spec.student.speculative" in raised.value.hint


def test_what_vllm_alone_can_judge_is_found():
    assert not needs_judging(Engine(dtype="float32", max_model_len=64, gpu_memory_utilization=0.5))


# --- an engine


def ask(engine: VllmEngine, **sampling: object) -> Reply:
    request = Request("q", answer_messages("How many?"), Sampling.model_validate(sampling))
    (reply,) = drive(engine, each([request]), threading.Event())
    return reply


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that writes one digit for ever."""
    model = tiny.make(tmp_path_factory.mktemp("endless"), always="7")
    engine = VllmEngine(model, Engine(dtype="float32"), ChatTemplate.load(model))
    yield engine
    engine.close()


def test_a_loop_ends_where_the_manifest_says(endless):
    reply = ask(endless, max_tokens=1000)
    assert isinstance(reply, Completion)
    assert (reply.finish_reason, reply.tokens) == ("repetition", 512)
    long = ask(endless, max_tokens=1000, repetition={"minTokens": 640})
    assert isinstance(long, Completion)
    assert (long.finish_reason, long.tokens) == ("repetition", 640)
    without = ask(endless, max_tokens=1000, repetition={"stop": False})
    assert isinstance(without, Completion)
    assert (without.finish_reason, without.tokens) == ("length", 1000)


def test_a_request_that_vllm_refuses_rejects_its_row_and_no_other(endless, monkeypatch):
    """The engine has no parser of thoughts, so that a budget is one that vLLM's own code refuses."""
    monkeypatch.setattr(endless, "_thinking_budget", 5)
    reply = ask(endless, max_tokens=4)
    assert isinstance(reply, Refused)
    assert reply.reason == "engine"
    assert "thinking_token_budget is set but reasoning_config is not configured" in reply.detail
    monkeypatch.undo()
    assert isinstance(ask(endless, max_tokens=4), Completion)


def test_many_long_prompts_with_seeds_of_their_own_are_answered_on_a_cpu(endless):
    """vLLM 0.32 turns back the generator of a request whose prompt took more than one step, which torch's generators
    for CPUs cannot do: the engine died of prompts that together were longer than a step."""
    asked = [
        Request(f"q{number}", answer_messages(f"{number} " * 900), Sampling(max_tokens=2, temperature=0.7, seed=number))
        for number in range(1, 7)
    ]
    replies = list(drive(endless, each(asked), threading.Event()))
    assert {type(reply) for reply in replies} == {Completion}
    step = endless._llm.vllm_config.scheduler_config.max_num_batched_tokens
    assert sum(reply.prompt_tokens for reply in replies) > step > max(reply.prompt_tokens for reply in replies)


def test_an_argument_that_vllm_refuses_at_the_start_names_the_field(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    assert config["num_attention_heads"] == 2
    with pytest.raises(UserError, match="fp9") as raised:
        VllmEngine(tiny_model, Engine(dtype="float32", kv_cache_dtype="fp9"), ChatTemplate.load(tiny_model))
    assert "spec.student" in raised.value.hint


# --- the tokenizer


@pytest.mark.parametrize(
    "name", ["snapshots/0f3a", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "deepseek-ai/deepseek-coder-6.7b"]
)
def test_vllm_loads_the_tokenizer_that_the_template_has(tmp_path, monkeypatch, name):
    """A tokenizer of a class that loses blanks, but where transformers knows the mistake by the path."""
    from vllm.tokenizers import get_tokenizer

    monkeypatch.chdir(tmp_path)
    text = "Ann has  12 apples\n"
    for path in (tiny.misnamed(Path(name)), Path(name).resolve()):
        template = ChatTemplate.load(path)
        given = vllm_arguments(path, Engine(), template)
        loaded = get_tokenizer(given.get("tokenizer", given["model"]), trust_remote_code=False)
        ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        assert loaded.decode(ids) == text


def test_an_engine_writes_blanks_whatever_class_the_tokenizer_is_said_to_have(tmp_path):
    model = tiny.misnamed(tmp_path / "model")
    engine = VllmEngine(model, Engine(dtype="float32"), ChatTemplate.load(model))
    try:
        reply = ask(engine, max_tokens=6)
        assert isinstance(reply, Completion)
        assert "Ann 12 apples" in reply.text
        vllms = engine._llm.get_tokenizer() if hasattr(engine._llm, "get_tokenizer") else engine._llm.tokenizer
        assert vllms.decode(vllms.encode("Ann 12", add_special_tokens=False)) == "Ann 12"
    finally:
        engine.close()


def test_the_files_of_mistral_common_do_not_take_the_place_of_tokenizer_json(tmp_path):
    model = tiny.make(tmp_path / "model")
    assert "tokenizer_mode" not in vllm_arguments(model, Engine(), ChatTemplate.load(model))
    (model / "tekken.json").write_text("{}")
    assert vllm_arguments(model, Engine(), ChatTemplate.load(model))["tokenizer_mode"] == "hf"
