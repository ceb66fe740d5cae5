"""Examples of a packed row see themselves alone, or packing is refused: when a training begins, and before."""

import pytest
import torch
from support import families
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    Qwen3NextConfig,
)

from cgd_stages.errors import UserError
from cgd_stages.models import attention
from cgd_stages.models.attention import refuse_leaks, try_packing


def test_examples_that_would_see_each_other_in_a_packed_row_are_refused() -> None:
    with pytest.raises(UserError, match="in a gpt_oss, examples that share a row see each other") as refused:
        refuse_leaks(families.model_of("gpt-oss"))
    assert refused.value.hint == "Set spec.training.packing to false."


@pytest.mark.parametrize("family", [family for family in families.FAMILIES if family != "gpt-oss"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_examples_of_other_families_do_not_see_each_other(family: str, kind: str) -> None:
    model = families.model_of(family)
    model.set_attn_implementation(kind)
    refuse_leaks(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_look_at_packs_leaves_the_model_as_it_was() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1))
    before = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    refuse_leaks(model)
    assert torch.equal(model(input_ids=torch.tensor([[1, 2, 3]])).logits, before)


LARGE = {
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "pad_token_id": 128_001,
}


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parameters of the small models on which there is a verdict."""
    seen, look = [], attention._leaks

    def looked(model: torch.nn.Module) -> bool:
        found = look(model)
        seen.append(sum(parameter.numel() for parameter in model.parameters()))
        return found

    monkeypatch.setattr(attention, "_leaks", looked)
    return seen


@pytest.mark.parametrize("family", [family for family in families.FAMILIES if family != "gpt-oss"])
def test_before_a_training_a_small_model_of_the_same_kind_shows_it(family: str, verdicts: list[int]) -> None:
    try_packing(families.config_of(family))
    assert len(verdicts) == 1


def test_the_small_model_of_a_large_one_is_small(verdicts: list[int]) -> None:
    config = LlamaConfig(**LARGE)
    before = config.to_dict()
    try_packing(config)
    assert verdicts[0] < 5_000_000
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "config",
    [
        families.config_of("gpt-oss"),
        Qwen3NextConfig(
            num_hidden_layers=48, hidden_size=2048, num_experts=16, linear_num_value_heads=4, linear_num_key_heads=2
        ),
        MambaConfig(num_hidden_layers=64),
    ],
    ids=lambda config: config.model_type,
)
def test_before_a_training_such_students_are_refused(config: object) -> None:
    with pytest.raises(UserError, match="examples that share a row see each other"):
        try_packing(config)


def test_where_no_small_model_can_be_made_the_training_looks(caplog: pytest.LogCaptureFixture) -> None:
    config = LlamaConfig(**LARGE)
    config.hidden_act = "unknown"
    try_packing(config)
    assert "packing is tried when the training begins" in caplog.text
