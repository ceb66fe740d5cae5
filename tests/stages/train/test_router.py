"""The loss of a mixture's routers is the architecture's own, and each example has the same, however it is batched."""

from typing import Any

import pytest
import torch
from support import families
from torch.nn.functional import cross_entropy
from transformers import DogeConfig

from cgd_stages.train import router, student

ROWS = [([5, 6, 7, 8, 9, 10, 11, 12], 3), ([13, 14, 15, 16, 17], 2), ([18, 19, 20], 1)]
"""Token ids of examples, and where the target of each begins."""
WEIGHT = 0.5


def batch(rows: list[tuple[list[int], int]], *, packed: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """As `loop.Examples.tensors` makes it."""
    lengths = [len(ids) for ids, _ in rows]
    targets = [torch.tensor([start - 1 <= at < len(ids) - 1 for at in range(len(ids))]) for ids, start in rows]
    if packed:
        ids = torch.cat([torch.tensor(ids) for ids, _ in rows])[None]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        return {"input_ids": ids, "position_ids": positions}, torch.cat(targets)[None]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(ids) for ids, _ in rows], batch_first=True)
    mask = pad([torch.ones(length, dtype=torch.long) for length in lengths], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}, pad(targets, batch_first=True)


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def own_losses(model: Any) -> torch.Tensor:
    """Target and router losses of all examples, each alone in the architecture's own forward."""
    losses = []
    for ids, start in ROWS:
        output = model(input_ids=torch.tensor([ids]), output_router_logits=True)
        target = cross_entropy(output.logits[0, start - 1 : -1], torch.tensor(ids[start:]), reduction="sum")
        losses.append(torch.stack([target, output.aux_loss]))
    return torch.stack(losses).sum(dim=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "packed"),
    [
        (family, packed)
        for family in families.MIXTURES
        for packed in (False, True)
        if not (packed and family == "gpt-oss")
    ],
)
def test_each_example_has_the_loss_that_its_architecture_gives_it_alone(
    family: str, packed: bool, checkpointing: bool
) -> None:
    model = families.model_of(family)
    expected = own_losses(model)
    plain = gradients(model, expected[0] + WEIGHT * expected[1])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs, target = batch(ROWS, packed=packed)
    found = torch.stack(student.TargetLoss(model).with_router(inputs, target, router.spans_of(inputs)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    distance = (gradients(model, found[0] + WEIGHT * found[1]) - plain).abs().max() / plain.abs().max()
    assert distance < 5e-6


@pytest.mark.parametrize("family", families.MIXTURES)
def test_of_one_example_it_is_what_transformers_adds_to_the_loss(family: str) -> None:
    model = families.model_of(family)
    (ids, start), weight = ROWS[0], model.config.router_aux_loss_coef
    labels = torch.tensor([[-100] * start + ids[start:]])
    whole = model(input_ids=torch.tensor([ids]), labels=labels, output_router_logits=True).loss
    inputs, target = batch(ROWS[:1], packed=False)
    loss, balance = student.TargetLoss(model).with_router(inputs, target, router.spans_of(inputs))
    torch.testing.assert_close(loss / (len(ids) - start) + weight * balance, whole, rtol=1e-5, atol=1e-5)


def test_of_a_whole_batch_at_once_it_is_another() -> None:
    """Why an example is the unit: transformers' own figure depends on what else is in the pass."""
    model = families.model_of("Mixtral")
    inputs, target = batch(ROWS, packed=False)
    _, balance = student.TargetLoss(model).with_router(inputs, target, router.spans_of(inputs))
    together = model(**inputs, output_router_logits=True).aux_loss
    assert (together - balance / len(ROWS)).abs() > 0.01


def test_where_examples_lie() -> None:
    assert router.spans_of(batch(ROWS, packed=True)[0]) == [slice(0, 8), slice(8, 13), slice(13, 16)]
    assert router.spans_of(batch(ROWS, packed=False)[0]) == [slice(0, 8), slice(8, 13), slice(16, 19)]
    assert router.spans_of({"input_ids": torch.zeros(2, 3)}) == [slice(0, 3), slice(3, 6)]


def test_without_an_example_there_is_none() -> None:
    loss = student.TargetLoss(families.model_of("Mixtral"))
    inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
    assert loss.with_router(inputs, torch.zeros(1, 1) > 0, [])[1] == 0


@pytest.mark.parametrize("family", families.FAMILIES)
def test_mixtures_have_it_and_dense_models_do_not(family: str) -> None:
    assert student.TargetLoss(families.model_of(family)).has_router is (family in families.MIXTURES)


def test_an_architecture_with_another_kind_of_router_has_none_that_is_known() -> None:
    config = DogeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, is_moe=True, num_experts=16, num_experts_per_tok=4,
    )  # fmt: skip
    from transformers import DogeForCausalLM

    assert router.balance_of(DogeForCausalLM(config)) is None
