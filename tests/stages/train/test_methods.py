"""Losses beside the likelihood, in the real loop with DeepSpeed: equal to plain loops, also after an interruption."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.method_builders import (
    examples_of,
    logits_of,
    pairs_of,
    plain_dpo,
    scored,
    trained_plainly,
)
from support.train_builders import quadruple, refined, train_work, trained, weights
from transformers import AutoModelForCausalLM

from cgd_stages.chat.example import Example
from cgd_stages.contract import Adapter, Storage
from cgd_stages.errors import Interrupted
from cgd_stages.method import losses
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.rows import key_of
from cgd_stages.training.job import STOP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

ROWS = [quadruple(number) for number in range(10)]
SAME = quadruple(10, answer="10 + 11 = 21.", refinement="10 + 11 = 21.")
RIGHT = quadruple(11, verdict="right")
DPO = {"objective": "DPO", "beta": 0.2, "learning_rate": 1e-3}


@contextmanager
def stopped_in(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGTERM comes in that step, counted from 1."""
    from cgd_stages.train.trainer import Trainer

    make = Trainer._step

    def stop(self: Trainer, number: int) -> None:
        make(self, number)
        if number + 1 == step:
            (self.folder / STOP).touch()

    with monkeypatch.context() as stopping:
        stopping.setattr(Trainer, "_step", stop)
        yield


@pytest.mark.parametrize(("zero_stage", "packing"), [(2, False), (3, True)])
def test_dpo_is_a_plain_loops_and_its_start_is_its_reference_also_after_an_interruption(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    packing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, given = [*ROWS, SAME, RIGHT], {**DPO, "zero_stage": zero_stage, "packing": packing}
    folder = refined(bucket, rows)
    with stopped_in(3, monkeypatch), pytest.raises(Interrupted, match="after step 3 of 6"):
        trained(storage, tmp_path / "first", tiny_model, **given)
    records, model = trained(storage, tmp_path / "second", tiny_model, **given)
    assert folder.require().rows.done == 12
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[0]["reward_margin"] == 0
    assert records[-1]["reward_margin"] > 0.01
    work = train_work(tiny_model, **given)
    pairs, start = pairs_of(tiny_model, rows, work), AutoModelForCausalLM.from_pretrained(tiny_model)
    assert len(pairs) == len(ROWS)
    lengths = [2 * max(len(one.input_ids), len(one.rejected)) for one in pairs]
    curve, expected = trained_plainly(
        tiny_model, work, lengths, lambda now, batch: plain_dpo(now, start, [pairs[one] for one in batch], 0.2)
    )
    assert [record["loss"] for record in records] == pytest.approx(curve, rel=1e-4)
    for name, tensor in weights(model).items():
        assert tensor.detach().numpy() == pytest.approx(expected[name].numpy(), rel=1e-3, abs=5e-5), name


def test_the_reference_of_an_adapter_is_its_start_also_after_an_interruption(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Elsewhere a resumed run with an adapter has been seen to train nothing, or from a reference of its own."""
    given = {**DPO, "adapter": Adapter(rank=4), "learning_rate": 1e-2}
    refined(bucket, ROWS)
    elsewhere = storage.model_copy(update={"uri": f"{storage.uri}-whole"})
    refined(Bucket(elsewhere), ROWS)
    whole, expected = trained(elsewhere, tmp_path / "whole", tiny_model, **given)
    with stopped_in(3, monkeypatch), pytest.raises(Interrupted, match="after step 3 of 6"):
        trained(storage, tmp_path / "first", tiny_model, **given)
    records, model = trained(storage, tmp_path / "second", tiny_model, **given)
    assert (records[0]["reward_margin"], whole[0]["reward_margin"]) == (0, 0)
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in whole], rel=1e-6)
    assert records[-1]["loss"] < math.log(2) - 0.01
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, weights(expected)[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [{"objective": "SupervisedKD", "texts": "refined"}, {"objective": "GKD", "beta": 0.5}],
    ids=["forward", "gkd-of-stored-texts"],
)
def test_a_divergence_is_a_plain_loops_and_the_student_comes_to_write_as_the_teacher_does(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    method: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(3)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def top(one: Example) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logprobs, ids = logits_of(teacher, one.input_ids, one.start).log_softmax(-1).topk(16)
        return ids, logprobs.half().float()

    refined(bucket, ROWS)
    given = method | {"top_k": 5, "epochs": 4}
    work = train_work(tiny_model, **given)
    examples = examples_of(tiny_model, ROWS, "RefinedSFT", work.max_sequence_length)
    scored(bucket, "score-refined", dict(zip(map(key_of, ROWS), examples, strict=True)), top)
    with stopped_in(3, monkeypatch), pytest.raises(Interrupted, match="after step 3 of 12"):
        trained(storage, tmp_path / "first", tiny_model, **given)
    records, model = trained(storage, tmp_path / "second", tiny_model, **given)

    def loss(now: AutoModelForCausalLM, batch: list[int]) -> torch.Tensor:
        found = []
        for one in (examples[index] for index in batch):
            ids, logprobs = top(one)
            logits = logits_of(now, one.input_ids, one.start)
            found.append(losses.divergence(logits, ids[:, :5], logprobs[:, :5], method.get("beta", 0)))
        return torch.cat(found).mean()

    lengths = [len(one.input_ids) for one in examples]
    curve, expected = trained_plainly(tiny_model, work, lengths, loss)
    assert [record["loss"] for record in records] == pytest.approx(curve, rel=1e-4)
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    for name, tensor in weights(model).items():
        assert tensor.detach().numpy() == pytest.approx(expected[name].numpy(), rel=1e-3, abs=5e-5), name
