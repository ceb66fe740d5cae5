"""When a loss has run away, and which validation was the best."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgd_stages.training.curves import BASELINE, STREAK, best, measured, spiked

CALM = [1.5 + 0.1 * math.sin(step) for step in range(BASELINE)]


def fires_at(losses: list[float]) -> int | None:
    """The number of steps after which a training with this curve is ended."""
    return next((steps for steps in range(1, len(losses) + 1) if spiked(losses[:steps])), None)


def test_a_loss_that_leaps_and_stays_high_ends_the_run_when_it_has_been_high_for_a_streak() -> None:
    assert fires_at(CALM + [4.0] * 20) == BASELINE + STREAK


def test_a_loss_that_blows_up_from_step_to_step_ends_the_run() -> None:
    assert fires_at([*CALM, *(1.5 * 1.4**step for step in range(1, 20))]) is not None


@pytest.mark.parametrize("high", range(1, STREAK))
def test_a_spike_that_passes_ends_nothing(high: int) -> None:
    assert fires_at(CALM + [9.0] * high + CALM) is None


def test_the_start_is_never_suspicious() -> None:
    assert fires_at([0.1] * (BASELINE - 1) + [9.0] * STREAK) is None


def test_a_curve_without_noise_may_rise_by_less_than_half() -> None:
    assert fires_at([1.0] * BASELINE + [1.49] * STREAK) is None
    assert fires_at([1.0] * BASELINE + [1.51] * STREAK) == BASELINE + STREAK


def test_an_earlier_outlier_does_not_hide_a_spike() -> None:
    assert fires_at([*CALM[:20], 100.0, *CALM[21:], *[4.0] * STREAK]) == BASELINE + STREAK


def test_learning_rarely_looks_like_a_spike() -> None:
    for seed in range(20):
        noise = random.Random(seed)
        curve = [(0.5 + 2 * math.exp(-step / 100)) * noise.lognormvariate(0, 0.5) for step in range(1000)]
        assert fires_at(curve) is None, seed


@given(st.lists(st.floats(1.0, 1.49), min_size=BASELINE + STREAK, max_size=BASELINE + STREAK))
def test_a_loss_within_half_of_its_median_is_never_a_spike(losses: list[float]) -> None:
    assert not spiked(losses)


@given(
    st.lists(st.sampled_from([1.0, 1.5, 2.0, 4.0, 8.0]), min_size=BASELINE + STREAK, max_size=80), st.integers(-4, 4)
)
def test_the_unit_of_the_loss_does_not_matter(losses: list[float], power: int) -> None:
    assert spiked(losses) == spiked([loss * 2.0**power for loss in losses])


def curve(own: dict[int, float], bare: dict[int, float]) -> list[dict[str, float]]:
    """A training of eight steps, some of which were measured."""
    losses = {"validation_loss": own, "bare_validation_loss": bare}
    return [
        {"step": float(step)} | {name: given[step] for name, given in losses.items() if step in given}
        for step in range(8)
    ]


def test_the_best_is_the_earliest_of_the_least_losses_that_the_run_chooses_by() -> None:
    records = curve({2: 3.0, 4: 1.0, 6: 1.0, 7: 2.0}, {2: 9.0, 4: 8.0, 6: 7.0, 7: 7.0})
    assert best(records, "context") is records[4]
    assert best(records, "bare") is records[6]
    assert best(records, "last") is None
    assert [record["step"] for record in measured(records)] == [2, 4, 6, 7]
    assert best(records[:2], "bare") is None


def test_where_the_prompt_alone_is_the_context_one_loss_is_both() -> None:
    records = curve({2: 3.0, 4: 1.0, 6: 2.0}, {})
    assert best(records, "bare") is best(records, "context") is records[4]
