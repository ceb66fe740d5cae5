"""The loss of learned positions, a chunk at a time, is what each architecture's own forward says."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
)

from cgd_stages.train import student

VOCABULARY, HIDDEN, CHUNK = 97, 32, 3
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
BARE = {
    "llama": LlamaConfig(**SMALL),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
    ),
}
CHANGED = {
    "soft-capping": Gemma2Config(**SMALL, final_logit_softcapping=0.5),
    "division": GraniteConfig(**SMALL, logits_scaling=8.0),
    "multiplication": CohereConfig(**SMALL, logit_scale=0.25),
}
"""These models do something to the logits after the output layer."""

INPUTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
}
TARGET = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "CHUNK", CHUNK)


def made(config: Any) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict()), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # fresh weights give logits near zero, where soft-capping does little
    return model.train()


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [*BARE, *CHANGED])
def test_loss_and_gradients_are_those_of_all_logits_whatever_the_model_does_to_them(
    name: str, checkpointing: bool
) -> None:
    model = made((BARE | CHANGED)[name])
    logits = model(**INPUTS, use_cache=False).logits[TARGET]
    plain = cross_entropy(logits, INPUTS["input_ids"][:, 1:][TARGET[:, :-1]], reduction="sum")
    expected = gradients(model, plain)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = student.TargetLoss(model)(INPUTS, TARGET)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, loss), expected, rtol=1e-4, atol=1e-4)


class Widest(TorchDispatchMode):
    """Remembers how many rows of logits there were at a time; weights and their gradients are as wide."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[1] == VOCABULARY:
            self.rows = max(self.rows, len(result) if len(result) != HIDDEN else 0)
        return result


@pytest.mark.parametrize(("name", "rows"), [*((name, CHUNK) for name in BARE), *((name, 8) for name in CHANGED)])
def test_logits_exist_for_one_chunk_at_a_time_or_where_a_model_changes_them_for_what_is_learned(
    name: str, rows: int
) -> None:
    model = made((BARE | CHANGED)[name])
    loss = student.TargetLoss(model)
    with Widest() as widest:
        loss(INPUTS, TARGET).backward()
    assert widest.rows == rows


def test_without_a_learned_position_there_is_a_loss_of_zero_with_gradients() -> None:
    model = made(BARE["llama"])
    loss = student.TargetLoss(model)({"input_ids": torch.zeros(1, 1, dtype=torch.long)}, torch.zeros(1, 1) > 0)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(model, loss))


def test_outside_of_the_loss_the_model_gives_its_logits() -> None:
    model = made(BARE["llama"])
    expected = model(**INPUTS).logits
    student.TargetLoss(model)
    assert torch.equal(model(**INPUTS).logits, expected)
