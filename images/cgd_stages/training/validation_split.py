"""The prompts that training leaves out, to measure its loss on examples that it does not learn. Pure.

The split is by prompts, so that all samples of a prompt are on the same side. It follows from seed and prompt ids
alone: every objective of a run is measured on the same prompts, whatever the order of rows or the number of ranks.
"""

import hashlib
from collections.abc import Iterable

WORTH_IT = 2000
"""The least prompts of a run with a split by default: 1 % of fewer would be a handful, whose loss is noise."""
SHARE = 100
"""By default one prompt in so many is held out."""
MOST = 1000
"""The most prompts that are held out by default: more make a measurement slower and hardly surer."""


def held_out(prompts: Iterable[str], fraction: float | None, seed: int) -> frozenset[str]:
    """The ids of the prompts that are held out. A fraction above 0 holds out at least one prompt and never all; 0 holds
    out none. None: one prompt in SHARE, at most MOST, in a run of at least WORTH_IT prompts."""
    order = sorted(set(prompts), key=lambda prompt: hashlib.sha256(f"{seed}/validation/{prompt}".encode()).digest())
    return frozenset(order[: count(len(order), fraction)])


def count(prompts: int, fraction: float | None) -> int:
    """How many of `prompts` prompts are held out."""
    if fraction is None:
        return min(MOST, prompts // SHARE) if prompts >= WORTH_IT else 0
    if fraction == 0 or prompts == 0:
        return 0
    return min(prompts - 1, max(1, round(fraction * prompts)))
