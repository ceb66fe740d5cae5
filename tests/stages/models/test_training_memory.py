"""What is estimated against what torch keeps, and what follows from it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from cgd_stages.contract import Adapter, Model, Train, Validation
from cgd_stages.models import targets
from cgd_stages.models.training_memory import CHUNK, Shape, activations, checkpoint, decide, states
from cgd_stages.train import router, student

QWEN_7B = Shape(
    parameters=7_615_616_512,
    layers=28,
    hidden=3584,
    queries=3584,
    keys=512,
    inner=18944,
    norms=57 * 3584,
    vocabulary=152_064,
)
SMALL = Shape(
    parameters=134_515_008, layers=30, hidden=576, queries=576, keys=192, inner=1536, norms=61 * 576, vocabulary=49_152
)
A100 = 80 * 10**9


def work(**changes: Any) -> Train:
    given: dict[str, Any] = {
        "student": Model(name="student"),
        "global_batch_size": 64,
        "learning_rate": 1e-6,
        "max_sequence_length": 16384,
        "checkpoint_every_steps": 100,
        "max_rejected": 0.1,
        "zero_stage": 3,
    }
    return Train(**(given | changes))


@pytest.mark.parametrize(
    ("dtype", "zero_stage", "world", "expected"),
    [
        ("bfloat16", 0, 8, 2 + 6 + 12),
        ("bfloat16", 1, 8, 2 + 6 + 12 / 8),
        ("bfloat16", 2, 8, 2 + 6 / 8 + 12 / 8),
        ("bfloat16", 3, 8, 2 / 8 + 6 / 8 + 12 / 8),
        ("bfloat16", 3, 1, 2 + 6 + 12),
        ("float32", 0, 8, 4 + 4 + 12),
        ("float32", 2, 4, 4 + 4 / 4 + 12 / 4),
        ("float32", 3, 4, 4 / 4 + 4 / 4 + 12 / 4),
    ],
)
def test_each_zero_stage_divides_more_of_a_parameter_s_bytes(
    dtype: str, zero_stage: int, world: int, expected: float
) -> None:
    given = work(dtype=dtype, zero_stage=zero_stage)
    buffers = (2 if dtype == "bfloat16" else 4) * (5e8 + (1e9 if zero_stage == 3 else 0))
    assert states(given, QWEN_7B, world=world) == pytest.approx(expected * QWEN_7B.parameters + buffers)


@pytest.mark.parametrize(
    ("offload", "zero_stage", "expected"),
    [("none", 2, 2 + 6 / 8 + 12 / 8), ("optimizer", 1, 2 + 2), ("optimizer", 2, 2 + 2 / 8), ("parameters", 3, 2 / 8)],
)
def test_what_is_offloaded_takes_no_memory_of_the_device(offload: str, zero_stage: int, expected: float) -> None:
    given = work(offload=offload, zero_stage=zero_stage)
    buffers = 2 * (5e8 + (1e9 if zero_stage == 3 else 0))
    assert states(given, QWEN_7B, world=8) == pytest.approx(expected * QWEN_7B.parameters + buffers)


@pytest.mark.parametrize(
    ("zero_stage", "offload", "own", "learned"),
    [
        (0, "none", 2, 2 + 6 + 12 + 2),
        (2, "none", 2, 2 + 6 / 8 + 12 / 8 + 2),
        (3, "none", 2 / 8, 2 / 8 + 6 / 8 + 12 / 8 + 2),
        (3, "parameters", 0, 2 / 8 + 2),
    ],
)
def test_of_an_adapter_gradients_and_optimizer_are_its_own(
    zero_stage: int, offload: str, own: float, learned: float
) -> None:
    """And a buffer for their sum. The student's parameters are there all the same."""
    shape = replace(QWEN_7B, trained=40_000_000)
    given = work(zero_stage=zero_stage, offload=offload, adapter=Adapter())
    gathered = 2 * 1e9 if zero_stage == 3 else 0
    assert states(given, shape, world=8) == pytest.approx(own * QWEN_7B.parameters + learned * 40e6 + gathered)


@pytest.mark.parametrize(
    ("dtype", "zero_stage", "workers", "expected"),
    [
        ("bfloat16", 0, 2, 2 + 12),
        ("bfloat16", 2, 2, 2 + 12 / 2),
        ("bfloat16", 3, 2, (2 + 12) / 2),
        ("float32", 3, 4, (4 + 12) / 4),
    ],
)
def test_a_node_stores_its_share_of_a_checkpoint(dtype: str, zero_stage: int, workers: int, expected: float) -> None:
    """On 2 nodes 56 GB of a model of 8 billion parameters, in bfloat16 with ZeRO 3, whatever is offloaded."""
    given = work(dtype=dtype, zero_stage=zero_stage, workers=workers, offload="optimizer" if zero_stage else "none")
    last, none = (given.model_copy(update={"validation": one}) for one in (LAST, NOTHING_HELD_OUT))
    size = checkpoint(last, parameters=8 * 10**9, stored=16 * 10**9)
    assert size == expected * 8 * 10**9
    assert checkpoint(none, parameters=8 * 10**9, stored=16 * 10**9) == size
    assert checkpoint(given, parameters=8 * 10**9, stored=16 * 10**9) == size + 16 * 10**9, "and the best model so far"


LAST, NOTHING_HELD_OUT = Validation(select="last"), Validation(fraction=0)


@pytest.mark.parametrize(
    ("shape", "world", "tokens", "free", "on"),
    [
        (QWEN_7B, 16, 16384, A100, True),
        (QWEN_7B, 16, 4096, A100, False),
        (QWEN_7B, 16, 4096, A100 // 2, True),
        (QWEN_7B, 2, 512, A100, True),
        (QWEN_7B, 8, 512, A100, False),
        (SMALL, 1, 16384, A100, False),
        (SMALL, 1, 131072, A100, True),
        (SMALL, 1, 16384, A100 // 4, True),
    ],
)
def test_activations_are_made_again_where_they_do_not_fit(
    shape: Shape, world: int, tokens: int, free: int, on: bool
) -> None:
    decision = decide(work(), shape, world=world, tokens=tokens, free=free)
    assert decision.checkpointing is on, decision.why


@pytest.mark.parametrize(
    ("setting", "shape", "free", "on"),
    [
        ("auto", SMALL, None, False),
        ("auto", None, A100, True),
        ("always", SMALL, None, True),
        ("always", SMALL, A100, True),
        ("never", QWEN_7B, 1, False),
    ],
)
def test_the_user_decides_and_a_cpu_never_needs_it(
    setting: str, shape: Shape | None, free: int | None, on: bool
) -> None:
    given = work(activation_checkpointing=setting)
    assert decide(given, shape, world=1, tokens=512, free=free).checkpointing is on


def test_the_decision_tells_its_numbers() -> None:
    assert decide(work(), QWEN_7B, world=16, tokens=16384, free=A100).why == (
        "90% of 80.0 GB do not hold 12.5 GB of model and optimizer and 119.3 GB of activations "
        "(10.2 GB with checkpointing) for 16384 tokens"
    )


CONFIGS = [
    LlamaConfig, Qwen2Config, Qwen3Config, Gemma2Config, Gemma3TextConfig, MistralConfig, Phi3Config, Olmo2Config,
    Olmo3Config,
]  # fmt: skip
MIXTURES: dict[Any, dict[str, int]] = {
    MixtralConfig: {"num_local_experts": 8, "num_experts_per_tok": 2},
    Qwen2MoeConfig: {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 48,
                     "shared_expert_intermediate_size": 96},
    Qwen3MoeConfig: {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 48},
    OlmoeConfig: {"num_experts": 8, "num_experts_per_tok": 4},
    GptOssConfig: {"num_local_experts": 8, "num_experts_per_tok": 4},
}  # fmt: skip
TOKENS = 128


def model_of(kind: Any, dtype: torch.dtype) -> Any:
    config = kind(
        vocab_size=97, hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, **MIXTURES.get(kind, {}),
    )  # fmt: skip
    if kind is GptOssConfig:  # its attention keeps a matrix of positions, where it is not FlashAttention
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()


def kept_for_backward(model: Any) -> int:
    """Bytes of all tensors but parameters that the layers of the model save, and the loss of their routers."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids, balance = torch.arange(TOKENS).remainder(97).reshape(2, -1), router.balance_of(model)
        out = model.base_model(input_ids=ids, use_cache=False, output_router_logits=balance is not None)
        if balance:
            balance(out.router_logits)
    assert out.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", [*CONFIGS, *MIXTURES])
def test_the_estimate_of_activations_is_what_torch_keeps(kind: Any, dtype: str, checkpointing: bool) -> None:
    model = model_of(kind, getattr(torch, dtype))
    shape = student.shape(model)
    assert shape is not None
    given, layers = work(dtype=dtype), replace(shape, vocabulary=0)
    estimate = activations(given, layers, tokens=TOKENS, checkpointing=checkpointing)
    if checkpointing:  # the layer at work keeps its activations only in backward
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        estimate -= activations(given, layers, tokens=TOKENS, checkpointing=False) // shape.layers
    assert 0.9 < estimate / kept_for_backward(model) < 1.4


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_estimate_of_an_adapter_s_activations_is_what_torch_keeps(kind: Any, dtype: str, dropout: float) -> None:
    model, adapter = model_of(kind, getattr(torch, dtype)), Adapter(rank=16, dropout=dropout)
    before = student.shape(model)
    targets.add(model, adapter)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(model.dtype)
    shape = student.shape(model)
    assert before
    assert shape == replace(before, trained=sum(p.numel() for p in model.parameters() if p.requires_grad))
    layers = replace(shape, vocabulary=0)
    estimate = activations(work(dtype=dtype, adapter=adapter), layers, tokens=TOKENS, checkpointing=False)
    assert 0.9 < estimate / kept_for_backward(model) < 1.4


def test_a_chunk_of_logits_is_counted_with_what_float32_makes_of_it() -> None:
    without = replace(QWEN_7B, vocabulary=0)
    chunk = [activations(work(), shape, tokens=9000, checkpointing=True) for shape in (QWEN_7B, without)]
    assert chunk[0] - chunk[1] == CHUNK * 152_064 * (2 + 12)


def mixtral(**changes: Any) -> Shape:
    """Mixtral 8x7B."""
    with torch.device("meta"):
        shape = student.shape(AutoModelForCausalLM.from_config(MixtralConfig(**changes)))
    assert shape is not None
    return shape


def test_all_experts_take_memory_and_the_active_ones_keep_activations() -> None:
    shape, fewer = mixtral(), mixtral(num_experts_per_tok=1)
    assert shape.parameters == 46_702_792_704
    assert states(work(), shape, world=16) == states(work(), fewer, world=16)
    with_one, with_two = (activations(work(), one, tokens=1, checkpointing=False) for one in (fewer, shape))
    assert with_two - with_one == 32 * 2 * (4 * 14336 + 2 * 4096), (
        "4 copies of the elements, what goes in and comes out"
    )


def test_zero_3_gathers_all_experts_of_a_layer_at_once() -> None:
    shape = mixtral()
    buffers = states(work(), shape, world=10**12)
    assert buffers == 2 * (500_000_000 + 8 * 3 * 4096 * 14336)


def test_what_the_routers_loss_needs_stays_with_checkpointing() -> None:
    shape = mixtral()
    assert shape.mixture is not None
    more = replace(shape, mixture=replace(shape.mixture, experts=16))
    kept, kept_more = (activations(work(), one, tokens=1, checkpointing=True) for one in (shape, more))
    assert kept_more - kept == 8 * (32 * 2 * 2 + 4), "logits and softmax in every layer, a router's own in one"


def test_experts_of_which_nothing_is_known_have_no_estimate() -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        assert student.shape(AutoModelForCausalLM.from_config(config)) is None
