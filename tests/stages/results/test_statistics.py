"""Intervals and tests against closed forms and simulation."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cgd_stages.results import statistics
from cgd_stages.results.statistics import (
    bootstrap,
    detectable,
    detectable_mean,
    difference_interval,
    drawn_flips,
    holm,
    mcnemar_power,
    mean_flip,
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


@pytest.mark.parametrize(("shares", "resampled"), [([1.0, 0.5, 0.5, 0.0], False), ([1.0, 0.5, 0.5, 0.0, 0.5], True)])
def test_fewer_than_five_questions_are_not_resampled(shares: list[float], resampled: bool) -> None:
    """Their interval is that of one output for each question, which is wider."""
    total, n = math.fsum(shares), len(shares)
    assert share_interval(shares) == (bootstrap(shares) if resampled else wilson(total, n))
    differences = [shares[0], *(-share for share in shares[1:])]
    expected = bootstrap(differences) if resampled else paired_interval(1.0, total - 1.0, n)
    assert difference_interval(differences) == expected


def test_where_all_questions_are_alike_the_interval_is_not_a_point() -> None:
    assert share_interval([1.0] * 30) == wilson(30, 30)
    assert share_interval([0.5] * 30) == wilson(15, 30)
    assert difference_interval([0.0] * 30) == paired_interval(0, 0, 30)
    assert difference_interval([-0.5] * 30) == paired_interval(0, 15, 30)


# --- all flips, drawn flips, several tests -----------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=5))
def test_the_flips_of_shares_are_counted_as_if_one_by_one(counts: list[tuple[int, int]]) -> None:
    """Each question with four outputs of one model and three of the other."""
    differences = [Fraction(one, 4) - Fraction(other, 3) for one, other in counts]
    flips = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(sign * value for sign, value in zip(signs, differences, strict=True))) for signs in flips]
    p, exact = mean_flip(np.array([float(value) for value in differences]), 12)
    assert exact
    assert p == pytest.approx(sum(value >= abs(sum(differences)) for value in sums) / len(sums))
    assert mean_flip(-np.array([float(value) for value in differences]), 12) == (p, exact)


@pytest.mark.parametrize("differences", [[0.25, 0.5, -0.25, 1.0, 0.75, 0.5], [1.0] * 9 + [-1.0] * 2, [0.0, 0.0]])
def test_drawn_flips_come_near_to_all_flips_and_are_the_same_every_time(differences: list[float]) -> None:
    values = np.array(differences)
    all_flips, _ = mean_flip(values, 4)
    assert drawn_flips(values) == pytest.approx(all_flips, abs=4 * math.sqrt(0.25 / statistics.FLIPS))
    assert drawn_flips(values) == drawn_flips(values[::-1])


def test_flips_without_a_common_unit_are_drawn() -> None:
    values = np.array([0.3, -0.1, 0.2])
    assert mean_flip(values, 2**50) == (drawn_flips(values), False)


def test_the_test_of_nothing_shows_nothing() -> None:
    assert mean_flip(np.array([]), 1) == (1.0, True)
    assert drawn_flips(np.array([])) == 1.0


def test_mcnemar_and_scipy_agree() -> None:
    for won, lost in itertools.product(range(0, 40, 3), repeat=2):
        expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
        assert sign_flip([1] * won + [-1] * lost) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ps", "corrected"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
        # Holm (1979), as in R: p.adjust(c(0.01, 0.02, 0.022, 0.09), "holm")
        ([0.01, 0.02, 0.022, 0.09], [0.04, 0.06, 0.06, 0.09]),
    ],
)
def test_holm_gives_the_values_computed_by_hand(ps: list[float], corrected: list[float]) -> None:
    assert holm(ps) == pytest.approx(corrected)


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_keeps_the_order_and_never_helps(ps: list[float]) -> None:
    corrected = holm(ps)
    assert all(p <= q <= min(1, len(ps) * p) for p, q in zip(ps, corrected, strict=True))
    for (p, q), (other, more) in itertools.combinations(zip(ps, corrected, strict=True), 2):
        assert p == other or (p < other) <= (q <= more)
    assert holm(ps[::-1]) == corrected[::-1]


# --- power -------------------------------------------------------------------------------------------------------


def enumerated(n: int, changed: float, difference: float, level: float) -> float:
    """The power by all numbers of questions that differ and are lost, with scipy's binomial distribution."""
    differ = max(changed, difference)
    numbers, lost = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    chances = stats.binom.pmf(numbers, n, differ) * stats.binom.pmf(lost, numbers, (1 - difference / differ) / 2)
    better = (2 * lost < numbers) & (2 * stats.binom.cdf(lost, numbers, 0.5) < level)
    return float(chances[better].sum())


@pytest.mark.parametrize(
    ("n", "changed", "difference"), [(12, 0.5, 0.4), (25, 0.3, 0.25), (25, 0.1, 0.3), (30, 0.0, 0.25), (20, 0.9, 0.2)]
)
@pytest.mark.parametrize("level", [0.05, 0.05 / 3])
def test_the_power_of_mcnemars_test_is_that_of_all_outcomes(
    n: int, changed: float, difference: float, level: float
) -> None:
    assert mcnemar_power(n, changed, difference, level) == pytest.approx(enumerated(n, changed, difference, level))


def test_the_power_of_many_questions_is_that_of_a_simulation() -> None:
    n, changed, difference, rng = 1000, 0.2, 0.045, np.random.default_rng(5)
    up, down = (changed + difference) / 2, (changed - difference) / 2
    won, lost, _ = rng.multinomial(n, [up, down, 1 - up - down], size=20_000).T
    simulated = np.mean((won > lost) & (2 * stats.binom.cdf(lost, won + lost, 0.5) < 0.05))
    assert mcnemar_power(n, changed, difference, 0.05) == pytest.approx(simulated, abs=0.012)


@pytest.mark.parametrize(
    ("n", "changed", "level"), [(20, 0.2, 0.05), (60, 0.1, 0.025), (500, 0.13, 0.0125), (40, 0, 0.05)]
)
def test_the_difference_that_would_have_shown_is_the_smallest_with_a_power_of_80_percent(
    n: int, changed: float, level: float
) -> None:
    found = detectable(n, changed, level)
    assert found is not None
    assert mcnemar_power(n, changed, found, level) >= 0.8
    assert mcnemar_power(n, changed, found - 2e-4, level) < 0.8


def test_the_difference_that_would_have_shown_comes_near_to_connors_formula_where_that_holds() -> None:
    n, changed = 2000, 0.2
    found = detectable(n, changed, 0.05)
    assert found is not None
    half, power = stats.norm.ppf(0.975), stats.norm.ppf(0.8)
    needed = (half * math.sqrt(changed) + power * math.sqrt(changed - found**2)) ** 2 / found**2
    assert 0.95 * n < needed < n, "the exact test needs a little more than the formula says"


@pytest.mark.parametrize(("n", "level"), [(0, 0.05), (1, 0.05), (5, 0.05), (7, 0.0125)])
def test_of_too_few_questions_no_difference_can_be_seen(n: int, level: float) -> None:
    assert detectable(n, 0.0, level) is None
    assert detectable(n, 1.0 * (n > 0), level) is None
    assert detectable_mean(n, -0.01, 0.01, level) is None


def test_more_questions_a_milder_level_and_fewer_changes_show_smaller_differences() -> None:
    few, many, strict, restless = (
        detectable(*given) or 1.0 for given in ((50, 0.2, 0.05), (200, 0.2, 0.05), (50, 0.2, 0.01), (50, 0.4, 0.05))
    )
    assert many < few < min(strict, restless)


def test_the_mean_difference_that_would_have_shown_is_that_of_the_normal_distribution() -> None:
    se = 0.02
    found = detectable_mean(100, 0.03 - 1.959964 * se, 0.03 + 1.959964 * se, 0.025)
    assert found == pytest.approx((stats.norm.ppf(1 - 0.0125) + stats.norm.ppf(0.8)) * se)
    assert detectable_mean(6, -1, 1, 0.05) is None
