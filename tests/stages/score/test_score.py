"""score with the real vLLM and the real store: the figures are the model's, and an interruption doubles and loses none.

One engine serves all tests: a start takes a while, and a process can have one at a time.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from support.method_builders import examples_of, logits_of
from support.stage_builders import RUN, context
from support.train_builders import quadruple, refined, train_work
from transformers import AutoModelForCausalLM

from cgd_stages.chat.example import Example
from cgd_stages.contract import Engine, Model, OnPolicy, Rollout, Score, Storage, Train
from cgd_stages.engines.scorer import Scorer, Scores, is_sound
from cgd_stages.engines.vllm import TokenText
from cgd_stages.errors import Interrupted, UserError
from cgd_stages.score import __main__ as score
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Folder, read_rows
from cgd_stages.store.rows import Key, Row, key_of
from cgd_stages.store.run import RunStore
from cgd_stages.training.conveyor import Asked, Round, Rounded
from cgd_stages.training.job import Training
from cgd_stages.training.rollouts import ROLLOUT_SCHEMA, RolloutKey, rollout_key

# vLLM and torch warn about themselves while they are imported.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

ROWS = [quadruple(number) for number in range(40)]
K = 5


class Watched(Scorer):
    """The scorer, which outlives the programs of a test; it remembers what it was asked, and may be stopped after some
    texts."""

    def __init__(self, model: Path) -> None:
        super().__init__(model, Engine(dtype="float32", max_model_len=1024), K)
        self.asked: list[str] = []
        self.stop_after: int | None = None

    def scores(self, texts: Iterable[TokenText], stop: Event) -> Iterator[Scores]:
        for number, found in enumerate(super().scores(texts, stop), start=1):
            self.asked.append(found.name)
            yield found
            if number == self.stop_after:
                stop.set()
                return

    def close(self) -> None:
        """Stays warm for the next test."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "teacher", seed=5)


@pytest.fixture(scope="module")
def warm(teacher: Path) -> Iterator[Watched]:
    scorer = Watched(teacher)
    yield scorer
    Scorer.close(scorer)


@pytest.fixture
def scorer(warm: Watched, monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(score, "Scorer", lambda *_: warm)
    warm.asked, warm.stop_after = [], None
    return warm


def work(student: Path, teacher: Path, **changes: Any) -> Score:
    given: dict[str, Any] = {
        "objective": "RefinedSFT",
        "student": Model(name=str(student)),
        "model": Model(name=str(teacher)),
        "engine": Engine(dtype="float32"),
        "max_sequence_length": 600,
        "top_k": K,
        "max_rejected": 0.1,
    }
    return Score(**(given | changes))


def scored(storage: Storage, scratch: Path, asked: Score, shard: int = 0) -> Any:
    made = context(storage, asked, scratch, shard=shard)
    made.task = made.task.model_copy(update={"stage": "score-refined"})
    return score.main(made)["score-refined"]


def folder_of(bucket: Bucket) -> Folder:
    return RunStore(bucket, RUN).input("score-refined")


def expected(model: Path, student: Path, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities (positions, vocabulary) of a row's target by transformers, and its tokens."""
    [one] = examples_of(student, [row], "RefinedSFT", 600)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return logits_of(loaded, one.input_ids, one.start).log_softmax(-1), torch.tensor(one.input_ids[one.start :])


def test_what_is_stored_is_what_the_model_thinks_of_the_target(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, teacher: Path, scorer: Watched
) -> None:
    refined(bucket, ROWS)
    facts = scored(storage, tmp_path, work(tiny_model, teacher))
    rows = {key_of(row): row for row in read_rows(folder_of(bucket))}
    assert (facts.rows.done, len(rows)) == (40, 40)
    mass = 0.0
    for row in ROWS:
        found = rows[key_of(row)]
        logprobs, tokens = expected(teacher, tiny_model, row)
        assert found["tokens"] == tokens.tolist()
        np.testing.assert_allclose(found["logprobs"], logprobs.gather(-1, tokens[:, None])[:, 0], atol=1e-4)
        top = np.array(found["top_logprobs"], np.float64).reshape(-1, K)
        np.testing.assert_allclose(top, logprobs.topk(K).values, rtol=2e-3, atol=1e-3)
        stored = torch.tensor(found["top_ids"]).view(-1, K)
        np.testing.assert_allclose(logprobs.gather(-1, stored), top, rtol=2e-3, atol=1e-3)
        mass += float(np.exp(top).sum())
    assert facts.metrics["top_mass"] == pytest.approx(mass, rel=1e-3)
    assert facts.metrics["scored_tokens"] == sum(len(row["tokens"]) for row in rows.values())


def test_an_interrupted_stage_goes_on_with_the_rest_also_with_another_number_of_shards(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, teacher: Path, scorer: Watched
) -> None:
    refined(bucket, ROWS)
    asked = work(tiny_model, teacher)
    scorer.stop_after = 7
    with pytest.raises(Interrupted):
        scored(storage, tmp_path, asked)
    first = set(scorer.asked)
    scorer.stop_after = None
    halves = asked.model_copy(update={"shards": 2})
    facts = [scored(storage, tmp_path, halves, shard) for shard in range(2)]
    assert len(scorer.asked) == len(set(scorer.asked)) == 40
    assert len(first) == 7
    assert sum(one.rows.done for one in facts) == 40
    keys = [key_of(row) for row in read_rows(folder_of(bucket))]
    assert sorted(keys) == sorted(map(key_of, ROWS))
    before = len(scorer.asked)
    assert scored(storage, tmp_path, halves, 1) == facts[1]
    assert len(scorer.asked) == before, "what is done is not asked again"


def test_a_text_without_room_is_rejected_and_too_many_are_refused(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, teacher: Path, scorer: Watched
) -> None:
    long = quadruple(41, refinement="So it is. " * 200)
    refined(bucket, [*ROWS, long])
    facts = scored(storage, tmp_path, work(tiny_model, teacher))
    assert (facts.rows.done, facts.rows.rejected, facts.metrics["rejected_too_long"]) == (40, 1, 1)
    refined(bucket, [*ROWS[:3], long])
    with pytest.raises(UserError, match="1 of 4 texts cannot be scored"):
        scored(storage, tmp_path, work(tiny_model, teacher))


def test_the_context_of_cgd_changes_the_figures_and_not_the_tokens(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, teacher: Path, scorer: Watched
) -> None:
    refined(bucket, ROWS[:2])
    bare = scored(storage, tmp_path, work(tiny_model, teacher))
    plain = {key_of(row): row for row in read_rows(folder_of(bucket))}
    critiqued = scored(storage, tmp_path, work(tiny_model, teacher, objective="CGD"))
    assert bare.digest != critiqued.digest
    for row in read_rows(folder_of(bucket)):
        assert row["text"] == plain[key_of(row)]["text"]
        assert row["logprobs"] != pytest.approx(plain[key_of(row)]["logprobs"], abs=1e-3)


def sampled(bucket: Bucket, storage: Storage, scratch: Path, train: Train, shards: int = 1) -> dict[RolloutKey, Row]:
    """What the stage rollout has stored of every round: the refinements, as if the student had sampled them."""
    assert train.rollouts
    store = RunStore(bucket, RUN)
    training, examples = Training.of(store, train, scratch), dict[Key, Example]()
    for row, made in training.dataset.examples():
        assert isinstance(made, Example)
        examples[key_of(row)] = made
    asked, found = Asked.of(training), dict[RolloutKey, Row]()
    for number in range(asked.rounds.count):
        given = context(storage, Rollout(training=train), scratch)
        rounded = Rounded(given, store.folder(train.rollouts, training.of_rollouts), shards, asked.rounds.count, 0)
        rows = dict[RolloutKey, Row]()
        for key, _ in asked.of_shard(number, 0, 1):
            made = examples[key[:2]]
            row = {"id": key[0], "sample": key[1], "step": key[2], "input_ids": made.input_ids, "start": made.start}
            own = np.zeros(len(made.input_ids) - made.start, np.float32)
            rows[key] = row | {"logprobs": own, "finish": "stop"}
        Round(rounded, number, ROLLOUT_SCHEMA, len(rows), lambda _: {}).make(iter(rows.values()), "generated_tokens")
        found |= rows
    return found


@pytest.mark.parametrize("top_k", [K, 0])
def test_samples_are_scored_round_by_round_with_their_own_columns_kept(
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    teacher: Path,
    scorer: Watched,
    monkeypatch: pytest.MonkeyPatch,
    top_k: int,
) -> None:
    monkeypatch.setattr(scorer, "_top_k", top_k)
    refined(bucket, ROWS[:6])
    engine, judge = Engine(dtype="float32"), Model(name=str(teacher))
    drawn = OnPolicy(refresh=1, max_tokens=9, engine=engine, teacher=judge, teacher_engine=engine)
    train = train_work(tiny_model, name="gkd", objective="GKD", beta=0.5, top_k=top_k or None, on_policy=drawn)
    given = sampled(bucket, storage, tmp_path, train)
    made = context(storage, work(tiny_model, teacher, training=train, top_k=top_k), tmp_path)
    made.task = made.task.model_copy(update={"stage": "score-gkd"})
    facts = score.main(made)["score-gkd"]
    folder = RunStore(bucket, RUN).input("score-gkd")
    rows = {rollout_key(row): row for row in read_rows(folder)}
    assert rows.keys() == given.keys()
    assert (facts.rows.done, len(scorer.asked)) == (12, 12), "two epochs of six rows"
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    for key, row in rows.items():
        assert row["input_ids"] == given[key]["input_ids"]
        with torch.no_grad():
            logprobs = logits_of(model, row["input_ids"], row["start"]).log_softmax(-1)
        tokens = torch.tensor(row["input_ids"][row["start"] :])
        np.testing.assert_allclose(row["teacher_logprobs"], logprobs.gather(-1, tokens[:, None])[:, 0], atol=1e-4)
        top = np.array(row["top_logprobs"], np.float64).reshape(len(tokens), top_k)
        np.testing.assert_allclose(top, logprobs.topk(top_k).values, rtol=2e-3, atol=1e-3)
    assert ("top_mass" in facts.metrics) is bool(top_k)
    assert facts.metrics["scored_tokens"] == sum(len(row["teacher_logprobs"]) for row in rows.values())
    assert score.main(made)["score-gkd"].rows == facts.rows
    assert len(scorer.asked) == 12, "what is done is not asked again"


@pytest.mark.parametrize(
    ("top", "sound"), [([-0.1, -3.0], True), ([-0.1, -np.inf], True), ([0.0, -0.5], False), ([-1.0, np.nan], False)]
)
def test_what_is_no_distribution_is_not_stored(top: list[float], sound: bool) -> None:
    logprobs = np.array([top], np.float32)
    assert is_sound(Scores("a", logprobs[:, 0], np.zeros((1, 2), np.int32), logprobs)) is sound
