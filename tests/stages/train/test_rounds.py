"""Learning what the student itself samples, in the real loop with DeepSpeed: the numbers are those of a plain loop, and
the weights of each round are there when they are asked for; also after interruptions."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.method_builders import examples_of, logits_of, scored, trained_plainly
from support.patience import PATIENCE
from support.round_player import RoundPlayer, other_model
from support.stage_builders import Program, context
from support.train_builders import (
    STAGE,
    has_checkpoint,
    quadruple,
    refined,
    stored_curve,
    train_task,
    train_work,
    trained,
    until_gone,
    weights,
)
from transformers import AutoModelForCausalLM

from cgd_stages.chat.example import Example
from cgd_stages.contract import Adapter, Engine, Exit, Model, OnPolicy, Storage, Train
from cgd_stages.errors import Interrupted, UserError
from cgd_stages.method import losses
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.rows import Row, key_of
from cgd_stages.train import __main__ as train
from cgd_stages.train.rounds import RoundsInTurn
from cgd_stages.train.stage import stage_of
from cgd_stages.training.job import STOP
from cgd_stages.training.rounds import Rounds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

ROWS = [quadruple(number) for number in range(10)]
TOP_K = 8


class Killed(BaseException):
    """In place of `kill -9`: nothing is tidied up or stored."""


def given(teacher: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a training with 6 steps in 3 rounds."""
    on_policy: dict[str, Any] = {"share": 1.0, "refresh": 2, "max_tokens": 6}
    on_policy |= {name: changes.pop(name) for name in tuple(on_policy) if name in changes}
    engines = {"engine": Engine(), "teacher": Model(name=str(teacher)), "teacher_engine": Engine()}
    settings = {"objective": "GKD", "beta": 0.5, "top_k": TOP_K, "checkpoint_every_steps": 1}
    return settings | changes | {"on_policy": OnPolicy(**on_policy, **engines)}


OPD = {"objective": "OPD", "beta": None, "top_k": None}


@pytest.fixture
def teacher(tiny_model: Path, tmp_path: Path) -> Path:
    return other_model(tiny_model, tmp_path / "teacher")


@pytest.fixture
def examples(tiny_model: Path) -> list[Example]:
    return examples_of(tiny_model, ROWS, "RefinedSFT", 600)


def rounds_of(work: Train, examples: Sequence[Example]) -> Rounds:
    return Rounds.of(work, [key_of(row) for row in ROWS], [len(one.input_ids) for one in examples])


@contextmanager
def killed_in(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process is gone right after that step, counted from 1."""
    from cgd_stages.train.trainer import Trainer

    make = Trainer._step

    def die(self: Trainer, number: int) -> None:
        make(self, number)
        if number + 1 == step:
            self.saver.wait()  # what is stored before a kill is a matter of luck elsewhere
            raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(Trainer, "_step", die)
        yield


@contextmanager
def killed_while_waiting_for(round_number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    take = RoundsInTurn.take

    def die(self: RoundsInTurn, step: int) -> bool:
        if self.rounds.round_of(step) == round_number:
            raise Killed
        return take(self, step)

    with monkeypatch.context() as dying:
        dying.setattr(RoundsInTurn, "take", die)
        yield


def plainly(
    model: Path, work: Train, examples: Sequence[Example], rows: Sequence[Row], loss: Callable[[Any, Row], torch.Tensor]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain loop over the examples and the rows that were stored of all rounds; `loss` is that of each token."""
    rounds = rounds_of(work, examples)
    stored = {(row["id"], row["sample"], row["step"]): row for row in rows}
    steps = iter(range(rounds.schedule.steps))

    def of_step(now: Any, batch: Sequence[int]) -> torch.Tensor:
        step, found = next(steps), []
        asked = rounds.sampled(step)
        for index in batch:
            row: Row = {"input_ids": examples[index].input_ids, "start": examples[index].start, "stored": True}
            if index in asked:
                row = stored[(*rounds.keys[index], step)]
            found.append(loss(now, row))
        return torch.cat(found).mean()

    return trained_plainly(model, work, rounds.schedule.lengths, of_step)


def own_logprobs(now: Any, row: Row) -> torch.Tensor:
    tokens = torch.tensor(row["input_ids"][row["start"] :])
    return logits_of(now, row["input_ids"], row["start"]).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def rewarded(now: Any, row: Row) -> torch.Tensor:
    return losses.rewarded(
        own_logprobs(now, row), *(torch.tensor(row[name]) for name in ("teacher_logprobs", "logprobs"))
    )


def squared(now: Any, row: Row) -> torch.Tensor:
    return losses.squared(own_logprobs(now, row), torch.tensor(row["teacher_logprobs"]))


def top_of(teacher: Any, ids: Sequence[int], start: int, top_k: int = TOP_K) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logprobs, tokens = logits_of(teacher, ids, start).log_softmax(-1).topk(top_k)
    return tokens, logprobs.half().float()


def diverged(teacher: Any, beta: float, top_k: int = TOP_K) -> Callable[[Any, Row], torch.Tensor]:
    """By the teacher's likeliest tokens and, of samples, the sampled one."""

    def loss(now: Any, row: Row) -> torch.Tensor:
        logits = logits_of(now, row["input_ids"], row["start"])
        ids, logprobs = top_of(teacher, row["input_ids"], row["start"], top_k)
        if "stored" not in row:
            tokens = torch.tensor(row["input_ids"][row["start"] :])[:, None]
            ids = torch.cat([ids, tokens], 1)
            logprobs = torch.cat([logprobs, torch.tensor(row["teacher_logprobs"])[:, None]], 1)
        return losses.divergence(logits, ids, logprobs, beta)

    return loss


def same(model: Path, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights(model).items():
        assert tensor.detach().numpy() == pytest.approx(expected[name].numpy(), rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("changes", "zero_stage", "packing"),
    [
        ({"share": 0.5}, 2, False),
        ({"beta": 1.0}, 3, True),
        (OPD | {"form": "reward"}, 2, True),
        (OPD | {"form": "loss"}, 0, False),
    ],
    ids=["gkd-half", "gkd-reverse", "opd-reward", "opd-loss"],
)
def test_samples_are_learned_as_in_a_plain_loop_also_where_the_training_is_killed(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    teacher: Path,
    examples: list[Example],
    changes: dict[str, Any],
    zero_stage: int,
    packing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In mid-round and between rounds. The weights are those of a loop that was never interrupted."""
    settings = given(teacher, **changes, zero_stage=zero_stage, packing=packing)
    work, big = train_work(tiny_model, **settings), AutoModelForCausalLM.from_pretrained(teacher)
    refined(bucket, ROWS)
    if work.scores:
        top = {key_of(row): one for row, one in zip(ROWS, examples, strict=True)}
        scored(bucket, work.scores, top, lambda one: top_of(big, one.input_ids, one.start))
    player = RoundPlayer(tiny_model, teacher, examples, tmp_path, top_k=TOP_K if work.top_k else 0)
    with player.playing(monkeypatch):
        with killed_while_waiting_for(1, monkeypatch), pytest.raises(Killed):
            trained(storage, tmp_path / "first", tiny_model, **settings)
        with killed_in(3, monkeypatch), pytest.raises(Killed):
            trained(storage, tmp_path / "second", tiny_model, **settings)
        records, model = trained(storage, tmp_path / "third", tiny_model, **settings)
    assert sorted(player.rows) == [0, 1, 2], "no round was made twice"
    rows = [row for number in sorted(player.rows) for row in player.rows[number]]
    assert len(rows) == (10 if work.scores else 20)
    if work.objective == "GKD":
        loss = diverged(big, work.beta or 0.0)
    else:
        loss = rewarded if work.form == "reward" else squared
    curve, expected = plainly(tiny_model, work, examples, rows, loss)
    assert [record["loss"] for record in records] == pytest.approx(curve, rel=1e-4, abs=1e-6)
    assert all(record["sampler_gap"] < 1e-4 for record in records[::2]), "each round has the weights of its beginning"
    same(model, expected)
    told = [record["samples"] * record["sample_tokens"] for record in records]
    assert sum(told) == pytest.approx(sum(len(row["input_ids"]) - row["start"] for row in rows), abs=0.1)
    first = torch.cat([torch.tensor(row["logprobs"] - row["teacher_logprobs"]) for row in rows if row["step"] == 0])
    assert records[0]["reverse_kl"] == pytest.approx(first.mean().item(), abs=1e-5)
    left = [
        stored.key for stored in bucket.list(f"team/{STAGE}/") if "/weights/" in stored.key or "/rounds/" in stored.key
    ]
    assert left == [], "nobody needs the weights of rounds any more"


def test_the_student_comes_to_write_as_the_teacher_does_which_no_likelihood_of_its_own_samples_would_do(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    teacher: Path,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refined(bucket, ROWS)
    settings = given(teacher, beta=1.0, top_k=16, epochs=4, refresh=3)
    player = RoundPlayer(tiny_model, teacher, examples, tmp_path, top_k=16)
    with player.playing(monkeypatch):
        records, model = trained(storage, tmp_path / "run", tiny_model, **settings)
    big = AutoModelForCausalLM.from_pretrained(teacher)

    def apart(student: Path) -> float:
        """KL(student || teacher) at the first sampled position of all rows, which knows no sample."""
        small, found = AutoModelForCausalLM.from_pretrained(student), []
        for one in examples:
            with torch.no_grad():
                q, p = (logits_of(m, one.input_ids, one.start)[0].log_softmax(-1) for m in (small, big))
            found.append((q.exp() * (q - p)).sum())
        return float(torch.stack(found).mean())

    # Not by the losses of steps: each is of a few samples of its own, and tells little.
    assert apart(model) < 0.8 * apart(tiny_model)
    assert all(0 < record["teacher_top_mass"] < 1 for record in records)


def test_sigterm_while_a_round_is_waited_for_stores_what_was_learned(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    teacher: Path,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refined(bucket, ROWS)
    settings = given(teacher, **OPD, form="reward", checkpoint_every_steps=100)
    player = RoundPlayer(tiny_model, teacher, examples, tmp_path)
    play = player.play

    def stopped(rounds: Rounds, *others: Any) -> None:
        """Nothing comes of the second round, but SIGTERM."""
        if others[-1] == 1:
            (tmp_path / "first" / f"{STAGE}-0" / STOP).touch()
        else:
            play(rounds, *others)

    monkeypatch.setattr(player, "play", stopped)
    with player.playing(monkeypatch), pytest.raises(Interrupted, match="after step 2 of 6, waiting for its next round"):
        trained(storage, tmp_path / "first", tiny_model, **settings)
    monkeypatch.setattr(player, "play", play)
    with player.playing(monkeypatch):
        records, _ = trained(storage, tmp_path / "second", tiny_model, **settings)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert sorted(player.rows) == [0, 1, 2]


def test_the_weights_of_a_round_are_those_of_the_student_with_its_adapter(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    teacher: Path,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refined(bucket, ROWS)
    settings = given(teacher, **OPD, form="reward", adapter=Adapter(rank=4), refresh=3)
    player = RoundPlayer(tiny_model, teacher, examples, tmp_path)
    with player.playing(monkeypatch):
        records, _ = trained(storage, tmp_path / "run", tiny_model, **settings)
    first = next(record for record in records if record["step"] == 4)
    rows = [row for row in player.rows[1] if row["step"] == 3]
    apart = torch.cat([torch.tensor(row["logprobs"] - row["teacher_logprobs"]) for row in rows]).mean().item()
    # What the player has sampled with is what the trainer has: the ratio of both is 1 at a round's beginning.
    assert first["loss"] == pytest.approx(apart, abs=2e-5)
    assert first["sampler_gap"] < 1e-5 < records[2]["sampler_gap"]
    start = weights(tiny_model)
    moved = weights(tmp_path / "weights-1")
    assert any(not tensor.equal(start[name]) for name, tensor in moved.items())


def test_rows_without_a_sample_are_left_out_and_a_step_without_any_is_refused(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    teacher: Path,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refined(bucket, ROWS)
    settings = given(teacher, **OPD, form="loss")
    work = train_work(tiny_model, **settings)
    rounds = rounds_of(work, examples)
    player = RoundPlayer(tiny_model, teacher, examples, tmp_path)
    player.unsampled = {(0, rounds.sampled(0)[1]), *((1, index) for index in rounds.sampled(1))}
    with player.playing(monkeypatch), pytest.raises(UserError, match="step 2 has nothing to learn") as refused:
        trained(storage, tmp_path / "run", tiny_model, **settings)
    assert all(ROWS[index]["id"] in refused.value.message for index in rounds.sampled(1))
    assert len(player.rows[0]) == 3


def test_samples_of_another_model_are_refused(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    teacher: Path,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where an engine goes on with the weights that it had."""
    refined(bucket, ROWS)
    player = RoundPlayer(tiny_model, teacher, examples, tmp_path)
    wrong = other_model(tiny_model, tmp_path / "wrong", by=0.5)
    own = player._weights
    monkeypatch.setattr(player, "_weights", lambda folder, number: wrong if number == 1 else own(folder, number))
    with player.playing(monkeypatch), pytest.raises(UserError, match="round 2 was not sampled by this student"):
        trained(storage, tmp_path / "run", tiny_model, **given(teacher, **OPD, form="reward"))


@pytest.mark.methods
@pytest.mark.timeout(1800)
def test_a_training_that_is_killed_goes_on_in_its_round_and_between_rounds(
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    teacher: Path,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a pod runs it, with kill -9: the curve is that of a plain loop, and no weights are stored twice."""
    refined(bucket, ROWS)
    settings = given(teacher, **OPD, form="reward", checkpoint_every_steps=3)
    work = train_work(tiny_model, **settings)
    task, made = train_task(storage, work), context(storage, work, tmp_path / "here")
    made.task = task
    stage = stage_of(made)
    own, coming, rounds = stage.folder, stage.training.scored_rollouts(made.store), rounds_of(work, examples)
    player = RoundPlayer(tiny_model, teacher, examples, tmp_path)

    player.play(rounds, own, coming, 0)
    first = Program("train", task, tmp_path / "a")
    first.send_once(lambda: own.round(1), signal.SIGKILL)  # it waits for the second round
    first.wait()
    until_gone(tmp_path / "a")
    [marked] = own.round(1) or []

    player.play(rounds, own, coming, 1)
    second = Program("train", task, tmp_path / "b")
    second.send_once(lambda: has_checkpoint(bucket), signal.SIGKILL)  # after step 3, in the second round
    second.wait()
    until_gone(tmp_path / "b")
    assert own.round(1) == [marked]

    third = Program("train", task, tmp_path / "c")
    third.send_once(lambda: own.round(2), signal.SIGCONT)  # which changes nothing
    player.play(rounds, own, coming, 2)
    ended = third.wait()
    assert ended.code == Exit.DONE, ended.log
    assert "going on after step 3" in ended.log
    records = stored_curve(bucket, own)
    rows = [row for number in range(3) for row in player.rows[number]]
    curve, _ = plainly(tiny_model, work, examples, rows, rewarded)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in records] == pytest.approx(curve, rel=2e-3, abs=1e-5)


@pytest.mark.usefixtures("two_ranks")
def test_two_processes_wait_for_a_round_together_and_hand_on_the_weights_that_zero_3_divides(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, teacher: Path, examples: list[Example]
) -> None:
    refined(bucket, ROWS)
    settings = given(teacher, top_k=16, processes_per_worker=2, zero_stage=3)
    work = train_work(tiny_model, **settings)
    made = context(storage, work, tmp_path / "run")
    made.task = train_task(storage, work)
    stage = stage_of(made)
    own, coming, rounds = stage.folder, stage.training.scored_rollouts(made.store), rounds_of(work, examples)
    player = RoundPlayer(tiny_model, teacher, examples, tmp_path, top_k=16)

    def play_all() -> None:
        for number in range(3):
            deadline = time.monotonic() + PATIENCE
            while number and not own.round(number):
                assert time.monotonic() < deadline, f"no weights of round {number}"
                time.sleep(0.1)
            player.play(rounds, own, coming, number)

    with ThreadPoolExecutor() as pool:
        playing = pool.submit(play_all)
        train.main(made)
        playing.result()
    records = stored_curve(bucket, own)
    rows = [row for number in range(3) for row in player.rows[number]]
    big = AutoModelForCausalLM.from_pretrained(teacher)
    curve, _ = plainly(tiny_model, work, examples, rows, diverged(big, 0.5, top_k=16))
    assert [record["loss"] for record in records] == pytest.approx(curve, rel=2e-3, abs=1e-5)
    assert all(record["sampler_gap"] < 1e-4 for record in records[::2])
