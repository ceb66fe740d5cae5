"""Small configs of many architectures, to look at their modules rather than to train them."""

from typing import Any

from transformers import (
    DeepseekV3Config,
    FalconConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
MIXTURES = [MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig, OlmoeConfig, GptOssConfig, DeepseekV3Config]


def config_of(kind: Any) -> Any:
    given = SMALL | (EXPERTS if kind in MIXTURES else {}) | (LATENT if kind is DeepseekV3Config else {})
    if kind is Qwen3MoeConfig:
        given |= {"mlp_only_layers": [0]}  # a dense first layer
    if kind is FalconConfig:
        del given["head_dim"]
    return kind(**given)
