"""Intervals and tests for shares of right answers. Pure: the same numbers give the same figures, to the last bit.

With one output for each question, the interval of a proportion is Wilson's and that of a difference of paired ones is
the adjusted Wald interval of Bonett and Price (2012); both are valid for small sets, which are common. With several
outputs, those of a question are not independent, so questions are resampled. The test is exact in both cases.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

Z = 1.959963984540054
"""The quantile of the normal distribution for intervals of 95 %."""
RESAMPLES = 10_000
SEED = 20250516
"""The seed of the resampling is fixed, so that every report has the same figures."""

Interval = tuple[float, float]


def wilson(successes: float, n: int) -> Interval:
    """The 95 % interval of a proportion (E. B. Wilson, 1927); (0, 1) if n is 0."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return max(0.0, low), min(1.0, high)


def paired_interval(fixed: float, broken: float, n: int) -> Interval:
    """The 95 % interval of the difference of two proportions over the same n questions (Bonett and Price, 2012)."""
    up, down = (fixed + 1) / (n + 2), (broken + 1) / (n + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def share_interval(shares: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of the questions' shares, each from 0 to 1, by resampling questions.

    If all questions have the same share, resampling changes nothing; then the interval is Wilson's, as if each question
    had one output.
    """
    if len(set(shares)) <= 1:
        return wilson(math.fsum(shares), len(shares))
    return bootstrap(shares)


def difference_interval(differences: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of the questions' differences, each from -1 to 1, by resampling questions.

    If all differences are the same, the interval is that of Bonett and Price, as if each question had one output.
    """
    if len(set(differences)) <= 1:
        total = math.fsum(differences)
        return paired_interval(max(0.0, total), max(0.0, -total), len(differences))
    return bootstrap(differences)


def bootstrap(values: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of at least two values by the bootstrap, with the expanded percentiles of
    Hesterberg (2015), because plain percentiles are too narrow for few values."""
    n = len(values)
    kinds, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    # Drawing n of n values means drawing how often each distinct value comes, and these are few.
    drawn = np.random.default_rng(SEED).multinomial(n, counts / n, size=RESAMPLES)
    tail = NormalDist().cdf(-student(n - 1) * math.sqrt(n / (n - 1)))
    low, high = np.quantile(drawn @ kinds / n, [tail, 1 - tail])
    return float(low), float(high)


def student(freedom: int) -> float:
    """The quantile of Student's t for intervals of 95 % (Abramowitz and Stegun, 26.7.5): to 1 % from 4 degrees on."""
    corrections = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96, (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + math.fsum(term / freedom**power for power, term in enumerate(corrections, start=1))


def sign_flip(differences: Sequence[int]) -> float:
    """The exact two-sided p-value of the hypothesis that each question's difference, a whole number of outputs, could
    as well have the other sign. With one output for each question it is McNemar's exact test."""
    sizes = [abs(difference) for difference in differences if difference]
    total, observed = sum(sizes), abs(sum(differences))
    # chances[i]: the chance that the sum over the questions so far is i - total.
    chances = np.zeros(2 * total + 1)
    chances[total] = 1.0
    for size in sizes:
        flipped = np.zeros_like(chances)
        flipped[size:] += chances[:-size] / 2
        flipped[:-size] += chances[size:] / 2
        chances = flipped
    sums = np.abs(np.arange(-total, total + 1))
    return min(1.0, float(chances[sums >= observed].sum()))


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k outputs is right, estimated without bias from n >= k outputs (Chen et al., 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
