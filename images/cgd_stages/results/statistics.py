"""Intervals, tests and their power for shares of right answers. Pure: the same numbers give the same figures, to the
last bit.

With one output for each question, the interval of a proportion is Wilson's and that of a difference of paired ones is
the adjusted Wald interval of Bonett and Price (2012); both are valid for small sets, which are common. With several
outputs, those of a question are not independent, so questions are resampled. The test is over all flips of the
questions' signs in both cases; of very many flips a part is drawn.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""The quantile of the normal distribution for intervals of 95 %."""
RESAMPLES = 10_000
SEED = 20250516
"""The seed of the resampling is fixed, so that every report has the same figures."""
FEWEST = 5
"""The fewest questions that are resampled: fewer have so few different resamples that their percentiles say nothing."""
EXACT_WORK = 2e8
"""The most additions of an exact sign-flip test (about a second); beyond it, flips are drawn."""
WHOLE = 2**40
"""The largest unit of a sign-flip test in which numbers of 64 bits are sure to be exact."""
FLIPS = 100_000
"""The flips that are drawn: the standard error of a p-value of 0.05 is then 0.0007."""
POWER = 0.8
"""The chance with which a difference that could have shown does show."""

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

    If all questions have the same share, resampling changes nothing. Then, and with fewer than `FEWEST` questions, the
    interval is Wilson's, as if each question had one output.
    """
    if len(shares) < FEWEST or len(set(shares)) <= 1:
        return wilson(math.fsum(shares), len(shares))
    return bootstrap(shares)


def difference_interval(differences: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of the questions' differences, each from -1 to 1, by resampling questions.

    If all differences are the same, and with fewer than `FEWEST` questions, the interval is that of Bonett and Price,
    as if each question had one output.
    """
    if is_resampled(differences):
        return bootstrap(differences)
    up, down = (math.fsum(max(0.0, sign * value) for value in differences) for sign in (1, -1))
    return paired_interval(up, down, len(differences))


def is_resampled(differences: Sequence[float]) -> bool:
    """Whether the interval of the mean of these differences is by resampling."""
    return len(differences) >= FEWEST and len(set(differences)) > 1


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


# --- tests -------------------------------------------------------------------------------------------------------


def sign_flip(differences: Sequence[int]) -> float:
    """The exact two-sided p-value of the hypothesis that each question's difference, a whole number of outputs, could
    as well have the other sign. With one output for each question it is McNemar's exact test."""
    return _all_flips(tuple(sorted(abs(value) for value in differences if value)), abs(sum(differences)))


@lru_cache(maxsize=4096)
def _all_flips(sizes: tuple[int, ...], observed: int) -> float:
    """The chance that the sum of the sizes, each with a random sign, is at least as far from 0 as the one observed."""
    total = sum(sizes)
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


def mean_flip(differences: NDArray[np.float64], unit: int) -> tuple[float, bool]:
    """The two-sided p-value of the hypothesis that each question's difference could as well have the other sign, and
    whether it is exact. The statistic is the sum, so weights of questions are part of their differences.

    unit: a number that makes every difference whole. Where that is too many flips to count, `FLIPS` of them are drawn.
    """
    if unit > WHOLE:
        return drawn_flips(differences), False
    whole = np.rint(differences * unit).astype(np.int64)
    whole //= int(np.gcd.reduce(whole)) or 1
    if np.count_nonzero(whole) * (2 * int(np.abs(whole).sum()) + 1) > EXACT_WORK:
        return drawn_flips(differences), False
    return sign_flip(whole.tolist()), True


def drawn_flips(differences: NDArray[np.float64]) -> float:
    """The p-value of `mean_flip` from `FLIPS` random flips with a fixed seed. The observed signs count as a flip, so
    that the p-value is valid whatever the draw (Phipson and Smyth, 2010)."""
    sizes, counts = np.unique(np.abs(differences[differences != 0]).round(15), return_counts=True)
    rng = np.random.default_rng(SEED)
    sums = np.zeros(FLIPS)
    # Questions of the same size are flipped together: what counts is how many of them are positive.
    for size, count in zip(sizes, counts, strict=True):
        sums += size * (2.0 * rng.binomial(count, 0.5, size=FLIPS) - count)
    observed = abs(float(differences.sum()))
    return float(1 + np.count_nonzero(np.abs(sums) >= observed - 1e-9 * sizes.max(initial=0.0))) / (1 + FLIPS)


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values corrected for their number by Holm (1979): those below a level hold together, with a chance of at
    most that level that a true hypothesis is among them."""
    corrected, least = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = least
    return corrected


# --- power -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def detectable(n: int, changed: float, level: float) -> float | None:
    """The smallest difference of two proportions over the same n questions that McNemar's exact test finds at this
    level with a chance of `POWER`, to a hundredth of a point; None if it cannot find any.

    changed: the share of the questions on which the models differ; a larger difference means a larger share.
    """
    if mcnemar_power(n, changed, 1.0, level) < POWER:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if mcnemar_power(n, changed, middle, level) >= POWER else (middle, high)
    return high


def mcnemar_power(n: int, changed: float, difference: float, level: float) -> float:
    """The chance that McNemar's exact two-sided test finds a difference of two proportions over the same n questions,
    with the right sign. Exact up to 60 questions; with more, over 60 numbers of questions that differ."""
    differ = max(changed, difference)
    if n == 0 or differ == 0:
        return 0.0
    lost = (1 - difference / differ) / 2
    middle, reach = n * differ, 6 * math.sqrt(n * differ * (1 - differ))
    low, high = max(0, math.floor(middle - reach)), min(n, math.ceil(middle + reach))
    numbers = np.unique(np.rint(np.linspace(low, high, min(61, high - low + 1))).astype(int))
    weights = binomial(n, differ)[numbers]
    found = [binomial(number, lost)[: critical(number, level) + 1].sum() for number in numbers.tolist()]
    return float(weights @ np.array(found) / weights.sum())


@lru_cache(maxsize=4096)
def critical(changed: int, level: float) -> int:
    """The most questions, of those on which two models differ, that the better one may lose at this level; -1 if it is
    not better even without a loss."""
    return int(np.count_nonzero(2 * np.cumsum(binomial(changed, 0.5)) < level)) - 1


def binomial(n: int, chance: float) -> NDArray[np.float64]:
    """The chances of 0, 1, ..., n successes."""
    if chance in (0.0, 1.0):
        certain = np.zeros(n + 1)
        certain[round(chance * n)] = 1.0
        return certain
    successes = np.arange(n + 1)
    factorials = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
    logs = factorials[n] - factorials - factorials[::-1]
    chances: NDArray[np.float64] = np.exp(logs + successes * math.log(chance) + (n - successes) * math.log1p(-chance))
    return chances


def detectable_mean(n: int, low: float, high: float, level: float) -> float | None:
    """The smallest mean difference over n questions that a sign-flip test finds at this level with a chance of `POWER`,
    by the normal distribution with the standard error that an interval of 95 % from `low` to `high` has; None if it
    cannot find any."""
    if 2.0 ** (1 - n) >= level:
        return None
    quantile = NormalDist().inv_cdf
    difference = (quantile(1 - level / 2) + quantile(POWER)) * (high - low) / (2 * Z)
    return difference if difference <= 1 else None


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k outputs is right, estimated without bias from n >= k outputs (Chen et al., 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
