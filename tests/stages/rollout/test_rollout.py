"""rollout and score, round by round, as pods run them: real vLLM samples with the weights of each round, another one
scores, and an interruption doubles and loses none. The test plays the training, which stores weights."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from support.method_builders import logits_of
from support.patience import PATIENCE
from support.stage_builders import RUN, Ended, Program, VllmProgram, context
from support.train_builders import quadruple, refined, train_work
from transformers import AutoModelForCausalLM

from cgd_stages.contract import Engine, Model, OnPolicy, Rollout, Score, StageFacts, StageTask, Storage, Train, Work
from cgd_stages.errors import UserError
from cgd_stages.rollout import __main__ as rollout
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS, Part, RoundMarker, read_rows
from cgd_stages.store.rows import Row, file_sha256, from_parquet, now
from cgd_stages.store.run import RunStore
from cgd_stages.training.job import Training
from cgd_stages.training.rollouts import rollout_key
from cgd_stages.training.rounds import weights_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns about itself while it is imported

ROWS, K = 600, 5
LINES = " Think as long as you like, then say it in one line." * 3
"""So long a prompt has blocks of its own in vLLM's cache, which round 1 would find as round 0 has left them."""
MOST = 12


def work(student: Path, teacher: Path, **changes: Any) -> Train:
    """A training of two steps, each a round of its own, in which all prompts are asked."""
    engine = Engine(dtype="float32")
    drawn = OnPolicy(refresh=1, max_tokens=MOST, engine=engine, teacher=Model(name=str(teacher)), teacher_engine=engine)
    given: dict[str, Any] = {
        "name": "gkd", "objective": "GKD", "beta": 0.5, "top_k": K, "on_policy": drawn, "epochs": 2,
        "global_batch_size": ROWS,
    }  # fmt: skip
    return train_work(student, **(given | changes))


def scoring(train: Train) -> Score:
    assert train.on_policy
    return Score(
        objective="RefinedSFT", training=train, student=train.student, model=train.on_policy.teacher,
        engine=train.on_policy.teacher_engine, max_sequence_length=600, top_k=train.top_k or 0, max_rejected=0.0,
    )  # fmt: skip


class World:
    """A training's folders, and the programs beside it."""

    def __init__(self, bucket: Bucket, storage: Storage, train: Train, folder: Path) -> None:
        refined(bucket, [quadruple(number, prompt=f"What is {number}?{LINES}") for number in range(ROWS)])
        self.train, self.store, self.storage, self._folder = train, RunStore(bucket, RUN), storage, folder
        self.training = Training.of(self.store, train, folder / "scratch")

    def start(self, attempt: str, stage: str, asked: Work) -> Program:
        task = StageTask(run=RUN, stage=stage, storage=self.storage, work=asked)
        return VllmProgram(asked.kind, task, self._folder / attempt)

    def store_weights(self, number: int, model: Path) -> None:
        """As the training does after its last step before the round."""
        folder, parts = self.training.place(self.store), list[Part]()
        for path in sorted(model.iterdir()):
            key = f"{weights_of(number)}{path.name}"
            folder.bucket.upload(path, folder.key(key))
            parts.append(Part(key=key, sha256=file_sha256(path)))
        marker = {"stage": folder.stage, "digest": folder.digest, "started": now(), "completed": now()}
        folder.mark_round(
            RoundMarker(**marker, facts=StageFacts(), round=number, shard=0, shards=1, parts=tuple(parts))
        )

    def sampled(self) -> int:
        """Rows in the parts of rollout, whether a marker lists them or not."""
        folder = self.training.rollouts(self.store)
        parts = [folder.bucket.get(stored.key) for stored in folder.bucket.list(folder.key(PARTS))]
        return sum(len(from_parquet(part)) for part in parts if part)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.1)


def ended(program: Program) -> Ended:
    found = program.wait()
    assert found.code == 0, found.log
    return found


def audit(rows: list[Row], student: Path, teacher: Path) -> None:
    """Every thirtieth row has the log-probabilities of these models, as transformers computes them."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, teacher)]
    for row in rows[::30]:
        ids, start = row["input_ids"], row["start"]
        sampled = torch.tensor(ids[start:])[:, None]
        with torch.no_grad():
            own, judged = (logits_of(model, ids, start).log_softmax(-1) for model in models)
        np.testing.assert_allclose(row["logprobs"], own.gather(-1, sampled)[:, 0], atol=1e-4)
        np.testing.assert_allclose(row["teacher_logprobs"], judged.gather(-1, sampled)[:, 0], atol=1e-4)
        top = np.array(row["top_logprobs"], np.float64).reshape(-1, K)
        np.testing.assert_allclose(top, judged.topk(K).values, rtol=2e-3, atol=1e-3)
        stored = torch.tensor(row["top_ids"]).view(-1, K)
        np.testing.assert_allclose(judged.gather(-1, stored), top, rtol=2e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_round_is_sampled_with_its_weights_and_scored_once_whatever_is_killed(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path
) -> None:
    teacher, later = (tiny.make(tmp_path / f"model-{seed}", seed=seed) for seed in (5, 7))
    world = World(bucket, storage, work(tiny_model, teacher), tmp_path)
    asked = Rollout(training=world.train)

    killed = world.start("a", "rollout-gkd", asked)
    killed.send_once(lambda: world.sampled() >= 512, signal.SIGKILL)
    assert killed.wait().code == -signal.SIGKILL

    waiting, scores = world.start("b", "rollout-gkd", asked), world.start("s", "score-gkd", scoring(world.train))
    until(lambda: world.training.scored_rollouts(world.store).round(0))
    waiting.send(signal.SIGTERM)  # there are no weights for it to go on with
    assert waiting.wait().code == 143
    before = world.sampled()

    world.store_weights(1, later)
    told = ended(world.start("c", "rollout-gkd", asked)).words.stages["rollout-gkd"]
    judged = ended(scores).words.stages["score-gkd"]
    assert (told.rows.total, told.rows.done, told.rows.rejected) == (2 * ROWS, 2 * ROWS, 0)
    assert judged.rows == told.rows
    assert world.sampled() - before == ROWS, "round 0 was not sampled again"

    rows = sorted(read_rows(world.store.input("score-gkd")), key=rollout_key)
    assert len({rollout_key(row) for row in rows}) == len(rows) == 2 * ROWS
    by_step = [[row for row in rows if row["step"] == step] for step in range(2)]
    assert [len(found) for found in by_step] == [ROWS, ROWS]
    for found, student in zip(by_step, (tiny_model, later), strict=True):
        audit(found, student, teacher)
    lengths = {len(row["input_ids"]) - row["start"] for row in rows}
    assert max(lengths) == MOST
    assert min(lengths) < MOST
    end = world.training.dataset.template.turn.end[0]
    assert all((row["input_ids"][-1] == end) is (row["finish"] == "stop") for row in rows)
    assert told.metrics["cut_samples"] == sum(row["finish"] == "length" for row in rows) > 0
    assert told.generated_tokens == judged.metrics["scored_tokens"] == sum(len(row["logprobs"]) for row in rows)

    again = context(storage, asked, tmp_path / "again")
    again.task = again.task.model_copy(update={"stage": "rollout-gkd"})
    assert rollout.main(again)["rollout-gkd"].rows.done == 2 * ROWS, "what is done starts no engine"


def test_prompts_without_room_for_a_sample_are_refused_before_the_engine_starts(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path
) -> None:
    refined(bucket, [quadruple(number, prompt=f"What is {number} and {number}? " * 9) for number in range(4)])
    train = work(tiny_model, tiny_model)
    assert train.on_policy
    small = train.on_policy.model_copy(update={"engine": Engine(dtype="float32", max_model_len=32)})
    made = context(storage, Rollout(training=train.model_copy(update={"on_policy": small})), tmp_path)
    made.task = made.task.model_copy(update={"stage": "rollout-gkd"})
    with pytest.raises(UserError, match="4 of 4 prompts leave no room for a sample in 32 tokens"):
        rollout.main(made)


def test_whoever_has_a_part_in_a_training_finds_the_same_folders_and_others_find_others(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path
) -> None:
    refined(bucket, [quadruple(number) for number in range(4)])
    store, other = RunStore(bucket, RUN), shutil.copytree(tiny_model, tmp_path / "other")
    tiny.change(other / "generation_config.json", max_length=99)

    def folders(**changes: Any) -> tuple[str, str, str]:
        given = work(tiny_model, changes.pop("teacher", tiny_model), **changes)
        training = Training.of(store, given, tmp_path)
        return (
            training.place(store).digest,
            training.rollouts(store).digest,
            training.scored_rollouts(store).digest,
        )

    first = folders()
    assert first == folders(zero_stage=3)
    changed = [
        folders(beta=0.4),
        folders(top_k=4),
        folders(teacher=other),
        folders(seed=3),
        folders(learning_rate=2e-3),
    ]
    drawn = work(tiny_model, tiny_model).on_policy
    assert drawn
    changed += [
        folders(on_policy=drawn.model_copy(update=one))
        for one in ({"refresh": 2}, {"max_tokens": 9}, {"engine": Engine(dtype="bfloat16")})
    ]
    assert len({digest for one in (first, *changed) for digest in one}) == 3 * (1 + len(changed))
