"""Rounds in the real store: who waits for whom, what is made again and what is not, and when a stage has ended."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.patience import PATIENCE
from support.stage_builders import RUN, context, stored_rejections, stored_rows
from support.train_builders import train_work

from cgd_stages.contract import Rollout, RoundOf, StageFacts, Storage
from cgd_stages.errors import Interrupted, RowsLost, UserError
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Folder, Part, RoundMarker
from cgd_stages.store.rows import Row, now
from cgd_stages.store.run import RunStore
from cgd_stages.training import conveyor
from cgd_stages.training.conveyor import Round, Rounded, await_round
from cgd_stages.training.rollouts import ROLLOUT_SCHEMA, round_rows

INPUTS = {"stage": "rollout", "training": "abc"}


def a_row(number: int, step: int = 0) -> Row:
    return {
        "id": f"{number:020x}", "sample": 0, "step": step, "input_ids": [1, 2, 3, 4], "start": 2,
        "logprobs": [-0.5, -1.0], "finish": "stop",
    }  # fmt: skip


def measure(_: Row) -> dict[str, float]:
    return {"prompt_tokens": 2, "generated_tokens": 2, "cut_samples": 0}


class World:
    """One stage with rounds, as its shards see it."""

    def __init__(self, storage: Storage, scratch: Path, model: Path) -> None:
        self._storage, self._scratch, self._work = storage, scratch, Rollout(training=train_work(model))
        self.reported: list[RoundOf] = []

    def shard(self, shard: int = 0, shards: int = 1, *, count: int = 2, total: int = 6) -> Rounded:
        made = context(self._storage, self._work, self._scratch, shard=shard)
        made.task = made.task.model_copy(update={"stage": "rollout-gkd"})

        def report(*_: object, at: RoundOf, **__: object) -> None:
            self.reported.append(at)

        made.progress.report = report  # type: ignore[assignment]
        return Rounded(made, made.store.folder("rollout-gkd", INPUTS), shards, count, total)


@pytest.fixture
def world(storage: Storage, tmp_path: Path, tiny_model: Path) -> World:
    return World(storage, tmp_path, tiny_model)


def make(rounded: Rounded, number: int, rows: list[Row], total: int | None = None) -> None:
    Round(rounded, number, ROLLOUT_SCHEMA, len(rows) if total is None else total, measure).make(
        iter(rows), "generated_tokens"
    )


def test_a_round_is_there_when_all_its_shards_have_marked_it(world: World) -> None:
    first, second = (world.shard(number, 2) for number in range(2))
    make(first, 0, [a_row(0), a_row(2)])
    assert first.folder.round(0) is None
    make(second, 0, [a_row(1)])
    markers = first.folder.round(0)
    assert markers
    assert sorted(row["id"][-1] for row in round_rows(first.folder, markers)) == ["0", "1", "2"]
    assert first.folder.round(1) is None


def test_the_stage_has_ended_when_all_shards_have_made_all_rounds(bucket: Bucket, world: World) -> None:
    store = RunStore(bucket, RUN)
    first, second = (world.shard(number, 2) for number in range(2))
    for rounded, numbers in ((first, (0, 2)), (second, (1, 3))):
        for number in range(2):
            make(rounded, number, [a_row(one, step=number) for one in numbers])
        facts = rounded.finish(store, INPUTS, {"engine": "none"})
        assert (facts.rows.total, facts.rows.done, facts.generated_tokens) == (6, 4, 8)
        assert (rounded.folder.done() is None) is (rounded is first)
    done = second.folder.require()
    assert (done.rows.total, done.rows.done, done.facts.generated_tokens) == (8, 8, 16)
    assert done.settings == {"engine": "none", "shards": 2, "rounds": 2}
    assert len(stored_rows(bucket, "rollout-gkd")) == 8
    assert store.pointer("rollout-gkd").digest == done.digest


def test_a_round_that_is_marked_is_not_made_again(world: World) -> None:
    make(world.shard(), 0, [a_row(0)])
    again = world.shard()
    assert again.is_made(0)
    assert not again.is_made(1)
    assert again.so_far().rows.done == 1
    assert world.shard(1, 2).is_made(0), "also when another number of shards has made it"


def test_an_interrupted_round_keeps_what_is_stored_and_doubles_nothing(bucket: Bucket, world: World) -> None:
    rounded = world.shard(count=1, total=3)

    def interrupted() -> Iterator[Row]:
        yield a_row(0)
        yield a_row(1)
        rounded.context.stop.set()

    with pytest.raises(Interrupted):
        Round(rounded, 0, ROLLOUT_SCHEMA, 3, measure).make(interrupted(), "generated_tokens")
    assert rounded.folder.round(0) is None
    again = world.shard(count=1, total=3)
    made = Round(again, 0, ROLLOUT_SCHEMA, 3, measure)
    keys = [(f"{number:020x}", 0, 0) for number in range(3)]
    assert [key in made for key in keys] == [True, True, False]
    made.make(iter([a_row(2)]), "generated_tokens")
    again.finish(RunStore(bucket, RUN), INPUTS, {})
    assert [row["id"][-1] for row in stored_rows(bucket, "rollout-gkd")] == ["0", "1", "2"]
    assert again.so_far().generated_tokens == 6


def test_rows_of_one_round_are_not_taken_for_those_of_another(world: World) -> None:
    rounded = world.shard()
    make(rounded, 0, [a_row(0, step=0)])
    assert (a_row(0)["id"], 0, 0) not in Round(rounded, 1, ROLLOUT_SCHEMA, 1, measure)


def test_a_row_that_is_left_out_is_stored_with_its_reason_and_counted(bucket: Bucket, world: World) -> None:
    rounded = world.shard(count=1, total=2)
    made = Round(rounded, 0, ROLLOUT_SCHEMA, 2, measure)

    def rows() -> Iterator[Row]:
        made.reject((a_row(1)["id"], 0, 0), "too_long", "no room")
        yield a_row(0)

    made.make(rows(), "generated_tokens")
    facts = rounded.finish(RunStore(bucket, RUN), INPUTS, {})
    assert (facts.rows.done, facts.rows.rejected, facts.metrics["rejected_too_long"]) == (1, 1, 1)
    assert [row["detail"] for row in stored_rejections(bucket, "rollout-gkd")] == ["no room"]


def test_a_round_that_lacks_a_row_is_no_round(world: World) -> None:
    with pytest.raises(RowsLost, match="round 1"):
        make(world.shard(), 0, [a_row(0)], total=2)
    assert world.shard().folder.round(0) is None


def test_the_first_marker_of_a_round_holds(bucket: Bucket) -> None:
    folder = Folder(bucket, "team", "train-gkd", "abc")

    def marker(key: str) -> RoundMarker:
        given: dict[str, Any] = {"stage": "train-gkd", "digest": "abc", "started": now(), "completed": now()}
        part = Part(key=key, sha256="00")
        return RoundMarker(**given, facts=StageFacts(), shard=0, shards=1, round=3, parts=(part,))

    assert folder.mark_round(marker("a")).parts[0].key == "a"
    assert folder.mark_round(marker("b")).parts[0].key == "a"
    [found] = folder.round(3) or []
    assert found.parts[0].key == "a"


def test_what_waits_goes_on_when_the_round_comes_and_says_what_it_waits_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conveyor, "LOOK_SECONDS", 0.01)
    upstream, found = world.shard(count=1, total=1), list[RoundMarker]()
    waits = threading.Thread(target=lambda: found.extend(world.shard().await_round(upstream.folder, 0)))
    waits.start()
    while not world.reported:
        waits.join(0.01)
    assert world.reported[0] == RoundOf(number=1, of=2, waits_for="rollout-gkd")
    assert not found
    make(upstream, 0, [a_row(0)])
    waits.join(PATIENCE)
    assert [marker.facts.rows.done for marker in found] == [1]


def test_nobody_waits_for_a_stage_that_has_ended_without_the_round(bucket: Bucket) -> None:
    folder = Folder(bucket, "team", "train-gkd", "abc")
    folder.finish(facts=StageFacts(), parts=[], started=now(), inputs={})
    with pytest.raises(UserError, match="its round 3 is gone"):
        await_round(folder, 2, lambda: None)


def test_a_signal_that_came_while_a_round_was_stored_ends_the_wait(world: World) -> None:
    rounded = world.shard()
    rounded.context.stop.set()
    with pytest.raises(Interrupted):
        rounded.await_round(world.shard().folder, 0)
