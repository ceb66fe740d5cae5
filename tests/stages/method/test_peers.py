"""The losses beside the likelihood are those of TRL 1.16, of which nothing else is used."""

from pathlib import Path

import pytest
import torch
from support.method_builders import pairs_of, plain_dpo
from support.train_builders import quadruple, train_work
from transformers import AutoModelForCausalLM, AutoTokenizer

from cgd_stages.method import losses

# TRL and torch warn about themselves while they are imported.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

ROWS = [quadruple(number) for number in range(3)]


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
def test_the_divergence_is_trls_with_its_gradients_where_k_is_the_vocabulary(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    torch.manual_seed(0)
    teacher, student = (torch.randn(1, 9, 13, dtype=torch.float64) for _ in range(2))
    ours, theirs = student[0].clone().requires_grad_(), student.clone().requires_grad_()
    expected = GKDTrainer.generalized_jsd_loss(theirs, teacher, beta=beta, reduction="sum")
    logprobs, ids = teacher[0].log_softmax(-1).topk(13)
    found = losses.divergence(ours, ids, logprobs, beta).sum()
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad[0], rtol=0, atol=1e-12)


def test_dpo_is_trls_with_its_gradients(tmp_path: Path, tiny_model: Path) -> None:
    """TRL's own trainer gets our tokens; its reference is another model than the one that learns."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = pairs_of(tiny_model, ROWS, train_work(tiny_model))
    load = AutoModelForCausalLM.from_pretrained
    model, start = load(tiny_model, dtype=torch.float32), load(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    mine = plain_dpo(model, start, pairs, 0.3)
    mine.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    texts = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    config = DPOConfig(output_dir=str(tmp_path), beta=0.3, report_to=[], use_cpu=True, bf16=False, max_length=None)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = DPOTrainer(model, start, config, train_dataset=Dataset.from_dict(texts), processing_class=tokenizer)
    model.eval()
    theirs = trainer.compute_loss(model, batch([(one.input_ids, one.start) for one in pairs]
                                               + [(list(one.rejected), one.start) for one in pairs]))  # fmt: skip
    theirs.backward()
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def batch(sequences: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
    """First the preferred texts, then the others, padded at the right, as TRL's trainer has them."""
    longest = max(len(ids) for ids, _ in sequences)
    made = {
        "input_ids": [ids + [0] * (longest - len(ids)) for ids, _ in sequences],
        "attention_mask": [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in sequences],
        "completion_mask": [
            [0] * start + [1] * (len(ids) - start) + [0] * (longest - len(ids)) for ids, start in sequences
        ],
    }
    return {name: torch.tensor(rows) for name, rows in made.items()}
