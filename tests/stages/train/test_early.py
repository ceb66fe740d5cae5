"""The early questions in real trainings: the student answers as in a plain loop, and is trained as without them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.stage_builders import context
from support.train_builders import STAGE, quadruple, question, refined, train_task, train_work, trained, weights

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Chat, Early, StopUnless, Storage
from cgd_stages.errors import Interrupted, NoTransfer
from cgd_stages.store.bucket import Bucket
from cgd_stages.train import __main__ as train
from cgd_stages.training import early
from cgd_stages.training.job import STOP

# What torch and DeepSpeed warn of is theirs.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

ROWS = [quadruple(number, refinement="The answer is 7.") for number in range(10)]
QUESTIONS = [question(number, "7" if number % 2 else "8") for number in range(7)]
INSTRUCTION = "The answer is?"
EARLY = Early(questions=5, max_tokens=12, instructions={"sums": INSTRUCTION})
LEARNS: dict[str, Any] = {"objective": "RefinedSFT", "learning_rate": 1e-2, "epochs": 6, "max_sequence_length": 300}
STEPS = 18


def shares(records: list[dict[str, float]]) -> dict[int, float]:
    """The early accuracy by step; at 0 that before the training."""
    found = {int(record["step"]): record[early.EARLY] for record in records if early.EARLY in record}
    return {0: records[0][early.BEFORE], **found}


def plain_replies(model: Any, folder: Path) -> list[str]:
    """What the model says to each early question, asked by itself and greedily, token by token."""
    template, replies = ChatTemplate.load(folder, Chat()), []
    for of in chosen(folder):
        ids = list(of.ids)
        for _ in range(EARLY.max_tokens):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in template.stops:
                break
        replies.append(template.tokenizer.decode(ids[len(of.ids) :], skip_special_tokens=True).strip())
    return replies


def chosen(folder: Path) -> list[early.EarlyQuestion]:
    template = ChatTemplate.load(folder, Chat())
    return early.choose(QUESTIONS, train_work(folder, **LEARNS), EARLY, template)


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of every look."""
    from cgd_stages.train.early import EarlyLook, Reply

    ask, found = EarlyLook.replies, list[list[str]]()

    def noted(self: EarlyLook) -> list[Reply]:
        given = ask(self)
        found.append([reply.text for reply in given])
        return given

    monkeypatch.setattr(EarlyLook, "replies", noted)
    return found


@pytest.mark.parametrize(("zero_stage", "room"), [(0, None), (2, None), (3, None), (3, 0)])
def test_the_questions_change_no_weight_and_are_answered_as_one_by_one(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    replies: list[list[str]],
    zero_stage: int,
    room: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With ZeRO-3 and no room for all weights they are gathered for every token."""
    from transformers import AutoModelForCausalLM

    from cgd_stages.train import student

    refined(bucket, ROWS, questions=QUESTIONS)
    elsewhere = storage.model_copy(update={"uri": f"{storage.uri}-without"})
    refined(Bucket(elsewhere), ROWS)
    without, expected = trained(elsewhere, tmp_path / "without", tiny_model, zero_stage=zero_stage, **LEARNS)
    assert not replies
    monkeypatch.setattr(student, "free_memory", lambda _: room)
    records, model = trained(storage, tmp_path / "with", tiny_model, zero_stage=zero_stage, early=EARLY, **LEARNS)
    assert [record["loss"] for record in records] == [record["loss"] for record in without]
    for name, tensor in weights(model).items():
        assert tensor.equal(weights(expected)[name]), name
    assert list(shares(records)) == [0, 2, 5, 9]
    student_alone = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert replies[0] == plain_replies(student_alone, tiny_model)
    assert replies[-1] == ["The answer is 7."] * 5
    right = sum(of.reference == "7" for of in chosen(tiny_model))
    assert (shares(records)[0], shares(records)[9]) == (0, right / 5)


def test_a_training_without_transfer_ends_and_goes_on_from_its_checkpoint_without_the_condition(
    launcher: None, bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, ROWS, questions=QUESTIONS)
    elsewhere = storage.model_copy(update={"uri": f"{storage.uri}-without"})
    refined(Bucket(elsewhere), ROWS, questions=QUESTIONS)
    whole, expected = trained(elsewhere, tmp_path / "whole", tiny_model, early=EARLY, **LEARNS)
    strict = EARLY.model_copy(update={"stop_unless": StopUnless(after=0.2, gain=0.99)})
    for attempt in ("first", "again"):  # the checkpoint remembers
        with pytest.raises(NoTransfer, match=r"after step 4 of 18 the student answers .* asks for a gain of 0\.99"):
            trained(storage, tmp_path / attempt, tiny_model, early=strict, **LEARNS)
    kept = {found.key.split("checkpoints/")[1] for found in bucket.list() if "checkpoints/" in found.key}
    assert {name.partition("/")[0] for name in kept} == {"step-000003", "step-000004"}
    records, model = trained(storage, tmp_path / "on", tiny_model, early=EARLY, **LEARNS)
    looks = shares(records)
    assert list(looks) == [0, 2, 4, 5, 9]
    assert {step: looks[step] for step in shares(whole)} == shares(whole)
    for name, tensor in weights(model).items():
        assert tensor.equal(weights(expected)[name]), name


def test_sigterm_in_a_look_leaves_it_out_and_loses_no_step(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cgd_stages.train.early import EarlyLook, Reply

    refined(bucket, ROWS, questions=QUESTIONS)
    ask = EarlyLook.replies
    looks: list[list[Reply]] = []

    def interrupted(self: EarlyLook) -> list[Reply]:
        if len(looks) == 2:
            (tmp_path / "first" / f"{STAGE}-0" / STOP).touch()
        looks.append(ask(self))
        return looks[-1]

    with monkeypatch.context() as patch:
        patch.setattr(EarlyLook, "replies", interrupted)
        with pytest.raises(Interrupted, match="after step 5 of 18"):
            trained(storage, tmp_path / "first", tiny_model, early=EARLY, **LEARNS)
    assert {len(reply.text) > 0 for reply in looks[1]} == {True}
    assert max(len(reply.text.split()) for reply in looks[2]) <= 1, "one token at most, then every output ends"
    records, _ = trained(storage, tmp_path / "on", tiny_model, early=EARLY, **LEARNS)
    assert (len(records), list(shares(records))) == (STEPS, [0, 2, 9])


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_processes_share_the_questions(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path, zero_stage: int
) -> None:
    refined(bucket, ROWS, questions=QUESTIONS)
    work = train_work(tiny_model, early=EARLY, processes_per_worker=2, zero_stage=zero_stage, **LEARNS)
    training = context(storage, work, tmp_path)
    training.task = train_task(storage, work)
    facts = train.main(training)[STAGE]
    assert facts.metrics[early.BEFORE] == 0
    references = [of.reference for of in chosen(tiny_model)]
    assert facts.metrics[early.EARLY] == references.count("7") / 5, "it says 7 after half of its steps"
