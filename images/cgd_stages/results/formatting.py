"""Writes numbers for people. Pure."""

import math
from collections.abc import Sequence

THIN = "\u202f"
"""A narrow space that does not break, between a number and its unit and between thousands."""


def count(value: float) -> str:
    """A whole number with its thousands separated."""
    return f"{round(value):,}".replace(",", THIN) if math.isfinite(value) else "\u2013"


def number(value: float | None) -> str:
    """A quantity with three or four digits; a dash if it is unknown or not finite."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    if float(value).is_integer() or abs(value) >= 1000:
        return count(value)
    return f"{value:.3f}".rstrip("0") if abs(value) < 10 else f"{value:.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}{THIN}%" if math.isfinite(share) else "\u2013"


def spread(mean: float, deviation: float) -> str:
    """The mean and the standard deviation of some shares, in percent."""
    return f"{100 * mean:.1f} \u00b1 {100 * deviation:.1f}"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign; plus or minus for 0."""
    text = f"{100 * difference:+.1f}"
    return "\u00b10.0" if float(text) == 0 else text.replace("-", "\u2212")


def probability(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "\u2013"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded}{THIN}s"
    if rounded < 3600:
        return f"{rounded // 60}{THIN}min {rounded % 60:02d}{THIN}s"
    return f"{count(rounded // 3600)}{THIN}h {rounded % 3600 // 60:02d}{THIN}min"


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
