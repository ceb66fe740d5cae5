"""An adapter gets the modules that were meant, in each family, and what it cannot reach is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from support.architectures import MIXTURES, config_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from cgd_stages.contract import Adapter, Model
from cgd_stages.errors import UserError
from cgd_stages.models import resolve, targets

SEPARATE = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED = {"gate_proj", "up_proj", "down_proj"}
DENSE: dict[Any, tuple[set[str], set[str]]] = {
    LlamaConfig: (SEPARATE, GATED),
    Qwen2Config: (SEPARATE, GATED),
    Qwen3Config: (SEPARATE, GATED),
    MistralConfig: (SEPARATE, GATED),
    Gemma2Config: (SEPARATE, GATED),
    Gemma3TextConfig: (SEPARATE, GATED),
    Olmo2Config: (SEPARATE, GATED),
    Phi3Config: ({"qkv_proj", "o_proj"}, {"gate_up_proj", "down_proj"}),
    GPT2Config: ({"c_attn", "c_proj"}, {"c_fc", "c_proj"}),
    GPTNeoXConfig: ({"query_key_value", "dense"}, {"dense_h_to_4h", "dense_4h_to_h"}),
    FalconConfig: ({"query_key_value", "dense"}, {"dense_h_to_4h", "dense_4h_to_h"}),
    OPTConfig: ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}),
}
"""Family -> the names of its linear modules in attention and in the MLP."""


def model_of(kind: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(kind))


def adapted(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def own_names(names: set[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("kind", DENSE)
def test_of_a_dense_student_every_linear_module_of_every_layer_gets_an_adapter(kind: Any) -> None:
    model, (attention, mlp) = model_of(kind), DENSE[kind]
    linear = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear") and "head" not in name and name != "embed_out"
    }
    targets.add(model, Adapter(rank=4))
    assert adapted(model) == linear
    assert own_names(linear) == attention | mlp
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned
    assert all(".lora_A." in name or ".lora_B." in name for name in learned)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_target_may_be_one_kind_of_module_also_where_both_kinds_share_names(kind: Any, part: str) -> None:
    model = model_of(kind)
    targets.add(model, Adapter(targets=(part,)))
    names = adapted(model)
    assert own_names(names) == DENSE[kind][part == "mlp"]
    other = {"attention": ("mlp", ".fc"), "mlp": ("attn", "attention")}[part]
    assert not [name for name in names if any(word in name for word in other)]


def test_a_target_may_be_a_module_by_its_name() -> None:
    model = model_of(LlamaConfig)
    targets.add(model, Adapter(targets=("v_proj", "self_attn.q_proj")))
    assert own_names(adapted(model)) == {"q_proj", "v_proj"}
    assert len(adapted(model)) == 4


@pytest.mark.parametrize("kind", MIXTURES)
def test_of_a_mixture_attention_alone_gets_an_adapter(kind: Any) -> None:
    """PEFT makes expert tensors of MLP names, leaves out dense layers, and stores what vLLM does not load as it is."""
    model = model_of(kind)
    targets.add(model, Adapter(rank=4))
    names = adapted(model)
    assert names
    assert all("self_attn" in name for name in names)
    learned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name in learned if "mlp" in name or "expert" in name]


@pytest.mark.parametrize("target", ["mlp", "gate_proj", "experts", "gate"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_and_routers_of_a_mixture_are_refused(kind: Any, target: str) -> None:
    with pytest.raises(UserError, match="mixture of experts, where attention alone can have an adapter"):
        targets.add(model_of(kind), Adapter(targets=("attention", target)))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "c_attn", "Attention", "proj", "norm"])
def test_what_the_layers_do_not_have_is_refused_with_what_they_have(target: str) -> None:
    with pytest.raises(UserError, match=f"'{target}': the student has no linear module of this name") as refused:
        targets.add(model_of(LlamaConfig), Adapter(targets=(target,)))
    assert refused.value.hint.endswith("choose of: attention, mlp, down_proj, gate_proj, k_proj, o_proj, q_proj, "
                                       "up_proj, v_proj.")  # fmt: skip


def test_modules_that_peft_reaches_besides_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "endings", lambda names, others: ["q_proj"])
    with pytest.raises(UserError, match=r"PEFT adds the adapter to other modules .* model\.layers\.0\.mlp\.down_proj"):
        targets.add(model_of(LlamaConfig), Adapter())


@pytest.mark.parametrize("kind", [*DENSE, *MIXTURES])
def test_the_files_headers_tell_how_large_the_adapter_is(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind))
    model.save_pretrained(tmp_path)
    stored = resolve.tensors(Model(name=str(tmp_path)), None, tmp_path)  # type: ignore[arg-type]
    assert stored
    for adapter in (Adapter(rank=8), Adapter(rank=3, targets=("attention",))):
        other = model_of(kind)
        targets.add(other, adapter)
        learned = sum(parameter.numel() for parameter in other.parameters() if parameter.requires_grad)
        assert targets.parameters_of(stored, adapter) == learned


def test_of_a_name_alone_the_size_is_about_right() -> None:
    """Llama 3.1 8B with rank 16 has 41.9 million parameters, of attention 13.6 million."""
    assert 0.7 < targets.roughly(8.03e9, Adapter()) / 41.9e6 < 1.4
    assert 0.7 < targets.roughly(8.03e9, Adapter(targets=("attention",))) / 13.6e6 < 1.6
    assert 0.7 < targets.roughly(70.6e9, Adapter()) / 207e6 < 1.4


def test_an_adapter_changes_nothing_before_it_has_learned() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(LlamaConfig)).eval()
    tokens = torch.arange(20)[None]
    before = model(tokens).logits
    targets.add(model, Adapter())
    assert torch.equal(model(tokens).logits, before)


def test_a_quantized_student_is_refused(tiny_model: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model)
    config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(UserError, match="the student is quantized"):
        targets.refuse(config, AutoTokenizer.from_pretrained(tiny_model), Adapter())


def test_tokens_that_the_student_has_no_embeddings_for_are_refused_but_a_padding_token(tiny_model: Path) -> None:
    config, tokenizer = AutoConfig.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = "<|pad|>"
    tokenizer.add_tokens(["<|pad|>"], special_tokens=True)
    targets.refuse(config, tokenizer, Adapter())
    tokenizer.add_tokens(["<think>", "</think>"])
    with pytest.raises(UserError, match=r"2 tokens more than the student has embeddings \(\d+\), such as '</think>'"):
        targets.refuse(config, tokenizer, Adapter())
