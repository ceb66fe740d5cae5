"""A few kills of the interruption suites, so that they stay alive; `make chaos-generate chaos-train` runs them all."""

import signal

import pytest
from chaos import world
from chaos.generate import Scenario, at_write, away, play, random_kills
from chaos.proxy import Fault, Moment
from chaos.rank import Kill
from chaos.train import Scenario as TrainScenario
from chaos.train import Shape, student, uninterrupted
from chaos.train import play as play_train
from support.patience import PATIENCE

SMALL = (
    Scenario("random instants", 60, (2, 1), random_kills(2)),
    Scenario("after a write", 40, (1,), at_write(Moment.AFTER, 1, signal.SIGKILL, most=1)),
    Scenario("store away", 60, (1,), weather=away(1.0, 1.0, Fault.SLOW_DOWN, Fault.RESET), quiet=True),
)


@pytest.mark.slow
async def test_no_row_is_lost_or_doubled_or_wrong(tmp_path, monkeypatch):
    # How soon a row is stored, only a machine that does nothing else can say: `make chaos-generate`.
    monkeypatch.setattr(world, "SLACK", PATIENCE)
    async with world.World(tmp_path) as started:
        results = [await play(started, scenario, 0) for scenario in SMALL]
    assert [result.broken for result in results] == ["", "", ""]
    assert all(result.good for result in results), results
    assert sum(result.verdict.kills for result in results) >= 6
    assert results[-1].faults > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_that_was_killed_ends_with_the_weights_of_one_that_was_not(storage, tmp_path):
    model = student(tmp_path / "student")
    shape = Shape(1, 2, 2)
    expected = uninterrupted(storage, shape, model, tmp_path / "whole")
    scenario = TrainScenario(shape, (Kill.RANK, Kill.UPLOAD), (5, 15))
    result = play_train(storage, scenario, model, tmp_path / "killed", expected)
    assert result.broken == ""
    assert result.good, result
    assert result.again >= 2, "the kills came before their steps were stored"
