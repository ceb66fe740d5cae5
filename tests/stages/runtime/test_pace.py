"""The estimate of what remains, with a clock of the test's own."""

import random
from collections.abc import Callable

import pytest

from cgd_stages.runtime.pace import ENOUGH, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def estimates(seconds_of: Callable[[int], float], *, rows: int, at_once: int) -> list[tuple[float, float]]:
    """Every estimate while an engine works on so many rows at once, and what really remained then."""
    clock = Clock()
    pace, waiting, said = Pace(clock), [seconds_of(row) for row in range(rows)], []
    ends = sorted(clock.now + waiting.pop() for _ in range(min(at_once, rows)))
    last, finished = 0.0, 0
    while ends:
        clock.now = last = ends.pop(0)
        finished += 1
        if waiting:
            ends = sorted([*ends, clock.now + waiting.pop()])
        said.append((clock.now, pace.remaining(finished, rows - finished, under_way=len(ends))))
    return [(estimate, last - now) for now, estimate in said if estimate is not None]


def uneven(row: int) -> float:
    """Rows of 7 to 40 seconds."""
    return random.Random(row).uniform(7, 40)


def test_of_rows_that_are_all_under_way_nothing_is_said_before_most_have_finished() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now += 7
    assert pace.remaining(1, 47, under_way=47) is None, "it would be 5m29s for 33 seconds"
    clock.now += 20
    assert pace.remaining(31, 17, under_way=17) is None
    assert pace.remaining(32, 16, under_way=16) == pytest.approx(16 * 27 / 32)


def test_no_estimate_of_forty_seconds_is_longer_than_they_are() -> None:
    said = estimates(uneven, rows=48, at_once=64)
    assert said
    assert all(estimate <= 20 for estimate, _ in said), "half of the time that has passed, at most"


def test_an_estimate_of_many_rows_is_near_the_truth_from_the_first_on() -> None:
    said = estimates(uneven, rows=2000, at_once=64)
    first, left = said[0]
    assert first == pytest.approx(left, rel=0.25)
    assert all(estimate == pytest.approx(left, rel=0.25, abs=20) for estimate, left in said)


def test_too_few_say_nothing_and_the_last_one_says_that_nothing_is_left() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now += 10
    assert pace.remaining(ENOUGH - 1, 5) is None
    assert pace.remaining(ENOUGH, 5) == 10 * 5 / ENOUGH
    assert pace.remaining(1, 0) == 0
