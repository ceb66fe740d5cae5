"""The losses beside the likelihood are those of TRL 1.16, of which nothing else is used."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from support.method_builders import logits_of, pairs_of, plain_dpo
from support.round_player import other_model
from support.train_builders import quadruple, train_work
from transformers import AutoModelForCausalLM, AutoTokenizer

from cgd_stages.contract import Engine, Model, OnPolicy
from cgd_stages.method import losses
from cgd_stages.train.criterion import Run, on_policy
from cgd_stages.train.examples import Mixed, Sampled
from cgd_stages.train.student import TargetLoss
from cgd_stages.training.rollouts import SCORED_ROLLOUT_SCHEMA

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


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_what_is_learned_of_samples_is_trls_with_its_gradients_where_k_is_the_vocabulary(
    tmp_path: Path, tiny_model: Path, beta: float
) -> None:
    """TRL's own trainer gets the same samples; its teacher computes its own log-probabilities, ours are stored."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    load, tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained(tiny_model)
    model = load(tiny_model, dtype=torch.float32)
    teacher = load(other_model(tiny_model, tmp_path / "teacher"), dtype=torch.float32)
    sampled = [([5, 6, 7], [8, 9, 10, 11]), ([12, 13, 14], [15, 16])]

    path = tmp_path / "round.arrow"
    write_scored(path, [(context + own, len(context)) for context, own in sampled], teacher, model.config.vocab_size)
    engine = OnPolicy(refresh=1, max_tokens=4, engine=Engine(), teacher=Model(name="teacher"), teacher_engine=Engine())
    work = train_work(tiny_model, objective="GKD", beta=beta, top_k=model.config.vocab_size, on_policy=engine)
    examples = Sampled(path, model.config.vocab_size)
    run = Run(TargetLoss(model), torch.device("cpu"), packing=False, balanced=False)
    sums = on_policy(work)(run, Mixed([(examples, 0), (examples, 1)]), [0, 1])
    (sums.loss / 6).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model = load(tiny_model, dtype=torch.float32)
    config = DistillationConfig(
        output_dir=str(tmp_path), beta=beta, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=2,
    )  # fmt: skip
    texts = Dataset.from_dict({"prompt": ["a", "b"]})
    trainer = DistillationTrainer(model, teacher, config, train_dataset=texts, processing_class=tokenizer)
    theirs = trainer.compute_loss(
        model.train(),
        {
            "prompt_ids": torch.tensor([context for context, _ in sampled]),
            "prompt_mask": torch.ones(2, 3, dtype=torch.long),
            "completion_ids": torch.tensor([own + [0] * (4 - len(own)) for _, own in sampled]),
            "completion_mask": torch.tensor([[1] * len(own) + [0] * (4 - len(own)) for _, own in sampled]),
            "num_items_in_batch": torch.tensor(6),
        },
    )
    theirs.backward()
    assert sums.loss.item() / 6 == pytest.approx(theirs.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def write_scored(path: Path, sequences: list[tuple[list[int], int]], teacher: Any, top_k: int) -> None:
    """A round's file with the teacher's log-probabilities in float32."""
    schema = SCORED_ROLLOUT_SCHEMA.set(
        SCORED_ROLLOUT_SCHEMA.get_field_index("top_logprobs"), pa.field("top_logprobs", pa.list_(pa.float32()))
    )
    rows = []
    for number, (ids, start) in enumerate(sequences):
        with torch.no_grad():
            found = logits_of(teacher, ids, start).log_softmax(-1)
        tokens, top = torch.tensor(ids[start:])[:, None], found.topk(top_k)
        rows.append({
            "id": str(number), "sample": 0, "step": 0, "input_ids": ids, "start": start, "finish": "stop",
            "logprobs": [0.0] * len(tokens), "teacher_logprobs": found.gather(-1, tokens)[:, 0].tolist(),
            "top_ids": top.indices.ravel().tolist(), "top_logprobs": top.values.ravel().tolist(),
        })  # fmt: skip
    with pa.ipc.new_file(path, schema) as file:
        file.write(pa.RecordBatch.from_pylist(rows, schema=schema))


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
