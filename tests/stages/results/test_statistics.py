"""Intervals and tests against closed forms and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgd_stages.results import statistics
from cgd_stages.results.statistics import (
    bootstrap,
    difference_interval,
    paired_interval,
    pass_at_k,
    share_interval,
    sign_flip,
    student,
    wilson,
)

COUNTS = st.integers(0, 60)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_gives_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_covers_the_truth_95_times_in_100_on_average() -> None:
    n, truths = 32, [i / 100 for i in range(1, 100)]

    def coverage(truth: float) -> float:
        return math.fsum(
            math.comb(n, k) * truth**k * (1 - truth) ** (n - k)
            for k in range(n + 1)
            if wilson(k, n)[0] <= truth <= wilson(k, n)[1]
        )

    assert math.fsum(map(coverage, truths)) / len(truths) == pytest.approx(0.95, abs=0.01)


@given(COUNTS, COUNTS, COUNTS)
def test_the_paired_interval_turns_with_the_models(fixed: int, broken: int, same: int) -> None:
    n = fixed + broken + same
    low, high = paired_interval(fixed, broken, n)
    turned = paired_interval(broken, fixed, n)
    assert (low, high) == pytest.approx((-turned[1], -turned[0]))
    assert -1 <= low <= high <= 1


def test_the_paired_interval_of_an_example_computed_by_hand() -> None:
    assert paired_interval(10, 1, 32) == pytest.approx((0.0769, 0.4525), abs=1e-4)


# --- the test over questions -------------------------------------------------------------------------------------


def binomial_tail(fixed: int, broken: int) -> float:
    """McNemar's exact test, two-sided."""
    changed = fixed + broken
    tail = sum(math.comb(changed, i) for i in range(min(fixed, broken) + 1))
    return min(1.0, 2 * tail / 2**changed)


@given(COUNTS, COUNTS, st.integers(0, 5))
def test_with_one_output_a_question_the_sign_flips_are_the_exact_test_of_mcnemar(
    fixed: int, broken: int, same: int
) -> None:
    assert sign_flip([1] * fixed + [0] * same + [-1] * broken) == pytest.approx(binomial_tail(fixed, broken))


@given(st.lists(st.integers(-4, 4), max_size=8))
def test_the_sign_flips_are_counted_as_if_one_by_one(differences: list[int]) -> None:
    observed = abs(sum(differences))
    flips = list(itertools.product((1, -1), repeat=len(differences)))
    extreme = sum(
        abs(sum(sign * one for sign, one in zip(signs, differences, strict=True))) >= observed for signs in flips
    )
    assert sign_flip(differences) == pytest.approx(extreme / len(flips))


def test_the_sign_flips_bear_thousands_of_changes() -> None:
    assert 0 <= sign_flip([1] * 1500 + [-1] * 800) < 1e-40


def test_chance_alone_is_called_a_difference_at_most_5_times_in_100() -> None:
    rng = np.random.default_rng(1)
    shares = rng.beta(0.6, 0.9, (1000, 40))
    gains = rng.binomial(4, shares) - rng.binomial(4, shares)
    false_alarms = np.mean([sign_flip(row.tolist()) < 0.05 for row in gains])
    assert 0.03 < false_alarms < 0.055


# --- several outputs a question ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (4, 2), (4, 4), (16, 8), (7, 3)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_pass_at_k_is_unbiased(n: int, k: int, p: float) -> None:
    expected = math.fsum(
        math.comb(n, right) * p**right * (1 - p) ** (n - right) * pass_at_k(n, right, k) for right in range(n + 1)
    )
    assert expected == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(
    ("n", "right", "k", "value"), [(10, 3, 1, 0.3), (10, 3, 5, 1 - 21 / 252), (10, 0, 10, 0.0), (10, 1, 10, 1.0)]
)
def test_pass_at_k_of_examples_computed_by_hand(n: int, right: int, k: int, value: float) -> None:
    assert pass_at_k(n, right, k) == pytest.approx(value)


def test_pass_at_k_bears_large_numbers() -> None:
    assert pass_at_k(256, 2, 128) == pytest.approx(1 - 127 / (2 * 255))


@pytest.mark.parametrize(("freedom", "quantile"), [(4, 2.7764), (9, 2.2622), (29, 2.0452), (10**6, 1.95996)])
def test_students_quantile_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, rel=0.005)


def test_the_bootstrap_agrees_with_the_normal_interval_where_that_holds() -> None:
    values = np.random.default_rng(2).binomial(4, 0.4, 2000) / 4
    half = 1.959964 * values.std(ddof=1) / math.sqrt(len(values))
    assert bootstrap(values.tolist()) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 25)


def test_the_bootstrap_is_the_same_every_time_and_knows_no_order() -> None:
    assert bootstrap([0, 0.25, 1, 0.25]) == bootstrap([1, 0.25, 0.25, 0])


@pytest.mark.parametrize("n", [20, 60])
def test_intervals_of_shares_and_differences_cover_the_truth_95_times_in_100(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 2000)
    rng, times = np.random.default_rng(3), 600
    covered = np.zeros(2)
    for _ in range(times):
        base = rng.beta(0.6, 0.9, n)
        before, after = rng.binomial(4, base) / 4, rng.binomial(4, base**0.5) / 4
        low, high = share_interval(before.tolist())
        covered[0] += low <= 0.4 <= high
        low, high = difference_interval((after - before).tolist())
        covered[1] += low <= MEAN_OF_ROOT - 0.4 <= high
    assert (np.abs(covered / times - 0.95) < 0.025).all(), covered / times


MEAN_OF_ROOT = math.gamma(1.1) * math.gamma(1.5) / (math.gamma(0.6) * math.gamma(2.0))
"""Of the square root of a number with the distribution Beta(0.6, 0.9)."""


def test_where_all_questions_are_alike_the_interval_is_not_a_point() -> None:
    assert share_interval([1.0] * 30) == wilson(30, 30)
    assert share_interval([0.5] * 30) == wilson(15, 30)
    assert difference_interval([0.0] * 30) == paired_interval(0, 0, 30)
    assert difference_interval([-0.5] * 30) == paired_interval(0, 15, 30)
