"""What a token meets of a mixture, as the configs of the models that people use tell it."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DeepseekV3Config,
    DogeConfig,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4Config,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from cgd_stages.models.fit import parameters_of
from cgd_stages.models.mixture import (
    Mixture,
    UnknownMixture,
    is_routed,
    lacks_router_loss,
    mixture_of,
    router_weight,
)
from cgd_stages.models.resolve import Tensor
from cgd_stages.train import student

QWEN3_30B = Qwen3MoeConfig(vocab_size=151936, num_hidden_layers=48, head_dim=128, norm_topk_prob=True)
OLMOE = OlmoeConfig(intermediate_size=1024)
GPT_OSS_20B = GptOssConfig(num_hidden_layers=24, num_local_experts=32, router_aux_loss_coef=0.9)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MixtralConfig(), Mixture(experts=8, active=2, width=14336)),
        (QWEN3_30B, Mixture(experts=128, active=8, width=768)),
        (OLMOE, Mixture(experts=64, active=8, width=1024)),
        (GPT_OSS_20B, Mixture(experts=32, active=4, width=2880)),
        (Qwen2MoeConfig(), Mixture(experts=60, active=4, width=1408, shared=5632)),
        (DeepseekV3Config(), Mixture(experts=256, active=8, width=2048, shared=2048)),
        (Ernie4_5_MoeConfig(), Mixture(experts=64, active=6, width=1536, shared=2 * 1536)),
        (DbrxConfig(ffn_config={"moe_num_experts": 16, "moe_top_k": 4}), Mixture(experts=16, active=4, width=3584)),
        (LlamaConfig(), None),
        (DogeConfig(), None),
        (DogeConfig(is_moe=True), Mixture(experts=16384, active=64, width=2048)),
        (
            NemotronHConfig(moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712),
            Mixture(experts=8, active=2, width=1856, shared=3712),
        ),
    ],
)
def test_a_config_tells_what_a_token_meets(config: Any, expected: Mixture | None) -> None:
    assert mixture_of(config) == expected


@pytest.mark.parametrize(
    ("config", "lack"),
    [
        (MixtralConfig(), ""),
        (QWEN3_30B, ""),
        (OLMOE, ""),
        (GPT_OSS_20B, ""),
        (DeepseekV3Config(), "is a deepseek_v3, for which transformers has no loss of the routers"),
        (Glm4MoeConfig(), "is a glm4_moe, for which transformers has no loss of the routers"),
        (Llama4Config(), "is a llama4, for which transformers has no loss of the routers"),
        (LlamaConfig(), "has no experts and no router"),
        (LlamaConfig(num_experts=8), "is a mixture whose config does not say what a token meets of its experts"),
    ],
)
def test_a_mixture_whose_routers_have_no_loss_in_transformers_is_known(config: Any, lack: str) -> None:
    assert lacks_router_loss(config) == lack


def test_experts_of_which_nothing_is_known_are_named() -> None:
    with pytest.raises(UnknownMixture, match="the config of a llama does not say what a token meets of 8 experts"):
        mixture_of(LlamaConfig(num_experts=8))


@pytest.mark.parametrize(
    ("config", "weight"),
    [
        (MixtralConfig(router_aux_loss_coef=0.02), 0.02),
        (OLMOE, 0.01),
        (GPT_OSS_20B, 0.9),
        (DbrxConfig(ffn_config={"moe_loss_weight": 0.05}), 0.05),
        (Qwen3MoeConfig(router_aux_loss_coef=0.0), 0.0),
        (DeepseekV3Config(), 0.0),
        (LlamaConfig(router_aux_loss_coef=0.5), 0.0),
    ],
)
def test_the_weight_of_the_router_s_loss_is_the_config_s(config: Any, weight: float) -> None:
    assert router_weight(config) == weight


@pytest.mark.parametrize(
    ("name", "routed"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", True),
        ("model.layers.3.block_sparse_moe.experts.7.w2.weight", True),
        ("base_model.model.model.layers.0.mlp.experts.down_proj", True),
        ("model.layers.0.block_sparse_moe.input_linear.weight", True),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", False),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", False),
        ("model.layers.0.shared_mlp.input_linear.weight", False),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.layers.0.mlp.up_proj.weight", False),
    ],
)
def test_the_names_of_experts(name: str, routed: bool) -> None:
    assert is_routed(name) is routed


@pytest.mark.parametrize(
    ("config", "all_billions", "active_billions"),
    [
        (MixtralConfig(), 46.7, 12.9),
        (QWEN3_30B, 30.5, 3.3),
        (OLMOE, 6.9, 1.3),
        (GPT_OSS_20B, 20.9, 3.6),
        (GraniteMoeConfig(num_local_experts=32, num_experts_per_tok=8), None, None),
    ],
)
def test_the_active_parameters_are_those_that_makers_state(
    config: Any, all_billions: float | None, active_billions: float | None
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    work, parameters = student.cost(model), sum(parameter.numel() for parameter in model.parameters())
    assert work
    if all_billions is None:  # not published in this shape: its experts are found, and a quarter of them works
        assert work.body < 0.3 * parameters
        return
    embeddings = model.get_input_embeddings().weight.numel()
    assert parameters / 1e9 == pytest.approx(all_billions, abs=0.06)
    with_embeddings = work.body + work.head + (0 if config.model_type == "gpt_oss" else embeddings)
    assert with_embeddings / 1e9 == pytest.approx(active_billions, abs=0.06)


@pytest.mark.parametrize(
    ("config", "all_billions", "active_billions"),
    [
        (MixtralConfig(), 46.7, 12.9),
        (QWEN3_30B, 30.5, 3.4),
        (OLMOE, 6.9, 1.3),
        (Llama4TextConfig(), 107.8, 17.2),
        (LlamaConfig(num_hidden_layers=1), 0.5, 0.5),
    ],
)
def test_the_plan_reads_off_a_models_files_what_a_token_meets(
    config: Any, all_billions: float, active_billions: float
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = [Tensor(name, "BF16", one.numel(), 2 * one.numel()) for name, one in model.named_parameters()]
    found = parameters_of(config, tensors)
    assert found
    assert [round(number / 1e9, 1) for number in found] == [all_billions, active_billions]
    assert parameters_of(config, [*tensors, Tensor("packed", "I32", 8, 32)]) is None


NO_DEFAULT = {"deepseek_v2"}
"""Types whose default config leaves out how many experts a token meets; the models' own configs have it."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_causal_model_of_transformers_that_names_experts_is_a_known_mixture() -> None:
    unknown, known = set(), set()
    for kind in AutoModelForCausalLM._model_mapping:
        named = [name for name in getattr(kind, "__annotations__", {}) if "experts" in name]
        if not named or not any((getattr(config := kind(), name, None) or 0) > 1 for name in named):
            continue
        try:
            (known if mixture_of(config) else unknown).add(kind.model_type)
        except UnknownMixture:
            unknown.add(kind.model_type)
    assert unknown == NO_DEFAULT | {"doge"}, "a doge has experts where is_moe is true"
    assert len(known) > 40
