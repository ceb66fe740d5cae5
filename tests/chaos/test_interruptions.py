"""A few kills of the interruption suite, so that it stays alive; `make chaos-generate` runs all of it."""

import signal

import pytest
from chaos.generate import Scenario, at_write, away, play, random_kills
from chaos.proxy import Fault, Moment
from chaos.world import World

SMALL = (
    Scenario("random instants", 60, (2, 1), random_kills(2)),
    Scenario("after a write", 40, (1,), at_write(Moment.AFTER, 1, signal.SIGKILL, most=1)),
    Scenario("store away", 60, (1,), weather=away(1.0, 1.0, Fault.SLOW_DOWN, Fault.RESET), quiet=True),
)


@pytest.mark.slow
async def test_no_row_is_lost_or_doubled_or_wrong(tmp_path):
    async with World(tmp_path) as world:
        results = [await play(world, scenario, 0) for scenario in SMALL]
    assert [result.broken for result in results] == ["", "", ""]
    assert all(result.good for result in results), results
    assert sum(result.verdict.kills for result in results) >= 6
    assert results[-1].faults > 0
