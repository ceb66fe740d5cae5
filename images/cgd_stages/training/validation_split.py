"""Which prompts are held out of training, to measure the loss on what is not learned. Pure.

Prompts, not rows: all samples of a prompt are on the same side. The choice follows from seed and prompt ids alone, so
that every objective of a run is measured on the same prompts and no order or number of ranks changes it.
"""

import hashlib
from collections.abc import Iterable

WORTH_IT = 2000
"""Prompts from which on a share is held out unasked: of fewer, 1 % would be a handful, whose loss is noise."""
SHARE = 100
"""One prompt in so many is held out unasked."""
MOST = 1000
"""Prompts held out unasked at most: more make a measurement slower and hardly surer."""


def held_out(prompts: Iterable[str], fraction: float | None, seed: int) -> frozenset[str]:
    """The ids that are not learned. A fraction above 0 holds out at least one prompt and never all of them; 0 holds
    out none; None: one in SHARE, at most MOST, in a run of at least WORTH_IT prompts."""
    order = sorted(set(prompts), key=lambda prompt: hashlib.sha256(f"{seed}/validation/{prompt}".encode()).digest())
    return frozenset(order[: count(len(order), fraction)])


def count(prompts: int, fraction: float | None) -> int:
    """How many of so many prompts are held out."""
    if fraction is None:
        return min(MOST, prompts // SHARE) if prompts >= WORTH_IT else 0
    if fraction == 0 or prompts == 0:
        return 0
    return min(prompts - 1, max(1, round(fraction * prompts)))
