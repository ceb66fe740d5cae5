"""How much of the hardware's peak a training uses (MFU), from the work that the model asks for. Pure.

Counted are the multiplications that learning needs, forward and backward, as in PaLM (2022): 6 FLOPs for each parameter
and token, and attention. What is done twice to save memory does not count, nor what a mask throws away: attention is
causal, and the output layer works on learned tokens alone.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PEAKS: list[tuple[str, float]] = [
    (r"H100 PCIe", 756e12),
    (r"H(100|200) NVL", 835e12),
    (r"G?H(100|200)", 989e12),
    (r"A100", 312e12),
    (r"B200", 2250e12),
    (r"L40S", 362e12),
    (r"L4", 121e12),
    (r"MI300X", 1307e12),
]
"""Name of a GPU -> FLOP/s in bfloat16, dense, by its maker's data sheet. The first that fits counts."""


def peak(device: str) -> float | None:
    """FLOP/s of a GPU in bfloat16, by the name that torch gives it; None when unknown, or a part of one (MIG)."""
    if "MIG" in device:
        return None
    return next((flops for name, flops in _PEAKS if re.search(rf"\b{name}\b", device)), None)


@dataclass(frozen=True)
class Work:
    """What one token costs. `body`: parameters but embeddings and output layer; `head`: those of the output layer;
    `attention`: layers times heads times their size."""

    body: int
    head: int
    attention: int

    def flops(self, lengths: Iterable[int], supervised: int) -> float:
        """FLOPs of a step over examples of these lengths, of which so many tokens are learned."""
        given = list(lengths)
        pairs = sum(length * length for length in given)
        return 6.0 * (self.body * sum(given) + self.head * supervised + self.attention * pairs)
