"""The examples and the learning rate of every step, and each rank's share. Pure, and equal on every rank.

A global batch has exactly `globalBatchSize` examples for any number of ranks; the last one of an epoch has the rest.
The loss is the mean over the learned tokens of the global batch, so its curve does not depend on the number of ranks.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Schedule:
    """A training in numbers. `lengths` are the examples' tokens, in the order of their keys."""

    lengths: Sequence[int]
    global_batch_size: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.global_batch_size)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of a step (steps count from 0). Every epoch is shuffled anew, by seed and epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        return list(_order(len(self.lengths), self.seed, epoch)[start : start + self.global_batch_size])

    def micro_batches(self, step: int, *, rank: int, world: int, budget: int, packing: bool) -> list[list[int]]:
        """A rank's share of a step: see `dealt`."""
        return dealt(self.batch(step), self.lengths, rank=rank, world=world, budget=budget, packing=packing)

    def most_tokens(self, *, world: int, budget: int) -> int:
        """The most tokens of any micro-batch, with padding, in any step of any rank."""
        share = math.ceil(self.global_batch_size / world)
        longest = max(self.lengths)
        return max(longest, min(budget, share * longest))

    def seen(self, steps: int) -> int:
        """Examples learned in the first `steps` steps, over all epochs."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * len(self.lengths) + min(rest * self.global_batch_size, len(self.lengths))


def dealt(
    batch: Sequence[int], lengths: Sequence[int], *, rank: int, world: int, budget: int, packing: bool
) -> list[list[int]]:
    """A rank's share of a step's examples, in micro-batches of at most `budget` tokens with their padding, which
    packing avoids.

    The step is dealt out by length, so that every rank has as much to do. Every rank gets the same number of
    micro-batches, because each is a collective operation: empty ones fill up a rank's share.
    """
    longest_first = sorted(batch, key=lambda index: (-lengths[index], index))
    shares = [_fill(longest_first[start::world], lengths, budget, packing=packing) for start in range(world)]
    return shares[rank] + [[] for _ in range(max(map(len, shares)) - len(shares[rank]))]


@lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    """An epoch's order; cached, because every step needs it several times."""
    order = list(range(examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311 (an order, not a secret)
    return tuple(order)


def _fill(indices: list[int], lengths: Sequence[int], budget: int, *, packing: bool) -> list[list[int]]:
    """Batches of examples, longest first. Unless packed, a batch is padded to its first; one example always fits."""
    batches: list[list[int]] = []
    left = 0
    for index in indices:
        if not batches or lengths[index if packing else batches[-1][0]] > left:
            batches.append([])
            left = budget
        batches[-1].append(index)
        left -= lengths[index if packing else batches[-1][0]]
    return batches


def learning_rate(step: int, *, steps: int, peak: float, warmup_ratio: float) -> float:
    """Rate of a step (from 0): a linear warm-up over `warmup_ratio` of all steps, then half a cosine down to zero.

    The first step already learns (1/n of the peak), and so does the last: the rate is zero one step after it.
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
