"""A pack is a way to compute, not to learn: its examples do not see each other."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from cgd_stages.train import student
from cgd_stages.train.examples import Examples

ROWS = [([5, 6, 7, 8, 9, 10, 11], 4), ([12, 13, 14, 15], 1), ([16, 17, 18, 19, 20], 3), ([21, 22], 1)]


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    ids, starts = zip(*ROWS, strict=True)
    table = pa.table({"id": [f"{n}" for n in range(4)], "sample": [0] * 4, "input_ids": list(ids), "start": starts})
    with pa.ipc.new_file(tmp_path / "examples", table.schema) as writer:
        writer.write_table(table)
    return Examples(tmp_path / "examples")


def learned(model: torch.nn.Module, examples: Examples, batches: list[list[int]], *, packing: bool) -> torch.Tensor:
    """Summed loss of these batches and its gradients, in one vector of float64."""
    model.zero_grad()
    loss_of, total = student.TargetLoss(model), torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = loss_of(*examples.tensors(batch, packing=packing))
        loss.backward()
        total += loss.detach()
    return torch.cat([total[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


def test_positions_begin_again_and_no_example_learns_the_start_of_the_next(examples: Examples) -> None:
    inputs, target = examples.tensors([1, 3], packing=True)
    assert inputs["input_ids"].tolist() == [[12, 13, 14, 15, 21, 22]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert target.tolist() == [[True, True, True, False, True, False]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_loss_and_gradients_are_those_of_each_example_alone(
    examples: Examples, tiny_model: Path, attention: str, packing: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "CHUNK", chunk)
    make = AutoModelForCausalLM.from_pretrained
    model = make(tiny_model, dtype=torch.float64, attn_implementation=attention).train()
    together = learned(model, examples, [[0, 1, 2, 3]], packing=packing)
    alone = learned(model, examples, [[0], [1], [2], [3]], packing=packing)
    # The loss, norms and rotary embeddings are in float32, whatever the model is in.
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_another_neighbour_changes_nothing(examples: Examples, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        logits = [model(**examples.tensors([n, 2], packing=True)[0], use_cache=False).logits[0, -5:] for n in (0, 1)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
