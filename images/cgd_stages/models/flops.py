"""How much of the hardware's peak a training uses (MFU), from the work that the model asks for. Pure.

The count has the multiplications that learning needs, forward and backward, as in PaLM (2022): 6 FLOPs for each
parameter and token, 4 for a parameter that is frozen beside an adapter, and attention. It has neither work that is
repeated to save memory nor work whose result a mask drops: attention is causal, and the output layer works on learned
tokens alone.
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
"""Name of a GPU -> FLOP/s in bfloat16, dense, by its maker's data sheet. The first name that matches counts."""


def peak(device: str) -> float | None:
    """FLOP/s of a GPU in bfloat16, by its name in torch; None for an unknown GPU or a part of one (MIG)."""
    if "MIG" in device:
        return None
    return next((flops for name, flops in _PEAKS if re.search(rf"\b{name}\b", device)), None)


@dataclass(frozen=True)
class Work:
    """The cost of one token. `body`: parameters without embeddings and output layer; `head`: parameters of the output
    layer; `attention`: layers times heads times their size."""

    body: int
    head: int
    attention: int
    adapter: int | None = None
    """Parameters of an adapter that is learned instead of the others; None: all are learned."""

    def flops(self, lengths: Iterable[int], supervised: int) -> float:
        """FLOPs of a step over examples of these lengths, `supervised` tokens of which are learned."""
        lengths = list(lengths)
        pairs = sum(length * length for length in lengths)
        own = 6.0 if self.adapter is None else 4.0
        learned = 6.0 * ((self.adapter or 0) * sum(lengths) + self.attention * pairs)
        return own * (self.body * sum(lengths) + self.head * supervised) + learned
