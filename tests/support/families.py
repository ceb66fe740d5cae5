"""Tiny random models of the families that people train, each in its own architecture, with the tiny tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from support import tiny

HIDDEN, LAYERS, HEADS, WIDTH = 64, 2, 2, 32
SHARED: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": WIDTH,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "dtype": "float32",
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "rope_theta": 150_000.0}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
MIXTURES: dict[str, Any] = {
    "Mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}),
    "Qwen3-MoE": (
        Qwen3MoeConfig,
        EXPERTS | {"moe_intermediate_size": 64, "norm_topk_prob": True, "router_aux_loss_coef": 0.3},
    ),
    "OLMoE": (OlmoeConfig, EXPERTS | {"router_aux_loss_coef": 0.01}),
    "gpt-oss": (
        GptOssConfig,
        SLIDING
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.9, "rope_parameters": YARN},
    ),
}
DENSE: dict[str, Any] = {"OLMo 2": (Olmo2Config, {}), "OLMo 3": (Olmo3Config, SLIDING)}
FAMILIES = MIXTURES | DENSE


def config_of(family: str, **changes: Any) -> Any:
    """The config of a tiny model of the family."""
    kind, own = FAMILIES[family]
    return kind(
        **(SHARED | own | {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes)
    )


def model_of(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of the family, to train; `changes`: of its config."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**config_of(family, **changes).to_dict())
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def make(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Write a random model of the family into `folder`, as transformers stores it, and return the folder.

    It ends its replies as the tiny model does, see `tiny.make`.
    """
    tiny.make(folder, seed=seed)  # for its tokenizer
    (folder / "model.safetensors").unlink()
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    model = model_of(family, seed=seed, vocab_size=vocabulary)
    end, newline = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids([tiny.END, tiny.NEWLINE])
    embedding, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    embedding *= 5.0
    head[end] = 2.0 * head[end] - embedding[newline]
    model.save_pretrained(folder)
    return folder


HALVES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""What four bits mean in MXFP4 (OCP Microscaling Formats, E2M1)."""


def make_mxfp4(folder: Path, *, seed: int = 0) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a random gpt-oss as its maker stores it, with experts in MXFP4: the folder, and the experts' weights as
    transformers names them in a model, in bfloat16."""
    make(folder, "gpt-oss", seed=seed)
    stored, experts = load_file(folder / "model.safetensors"), {}
    dice = torch.Generator().manual_seed(seed)
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, inputs, outputs = stored.pop(name).shape
        blocks = torch.randint(0, 256, (count, outputs, inputs // 32, 16), generator=dice, dtype=torch.uint8)
        scales = torch.randint(122, 126, blocks.shape[:3], generator=dice, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.stack([HALVES[(blocks & 15).long()], HALVES[(blocks >> 4).long()]], dim=-1)
        plain = pairs.flatten(-2) * 2.0 ** (scales.float() - 127)[..., None]
        experts[name] = plain.flatten(-2).transpose(1, 2).to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization, "dtype": "bfloat16"}))
    return folder, experts
