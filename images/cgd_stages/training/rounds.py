"""The rounds of a training that learns what its own student samples: which steps and which examples each has. Pure.

A round has `refresh` steps. At its beginning the student of the moment samples, for every step, a share of the step's
examples; the others learn their stored text. The programs that sample, score and train compute the same from the keys
of the examples, the task and nothing else. Steps and rounds count from 0.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cgd_stages.contract import OnPolicy, Train
from cgd_stages.store.rows import Key
from cgd_stages.training.batching import Schedule

WEIGHTS = "weights/"


@dataclass(frozen=True)
class Rounds:
    """`keys` are those of the examples that are learned, in their order; `schedule` is the training's."""

    keys: Sequence[Key]
    schedule: Schedule
    on_policy: OnPolicy

    @classmethod
    def of(cls, work: Train, keys: Sequence[Key], lengths: Sequence[int]) -> "Rounds":
        """`lengths`: the tokens of each example. Keys and lengths in the order of the keys."""
        assert work.on_policy
        return cls(keys, Schedule(lengths, work.global_batch_size, work.epochs, work.seed), work.on_policy)

    @property
    def count(self) -> int:
        return math.ceil(self.schedule.steps / self.on_policy.refresh)

    def steps(self, number: int) -> range:
        """The steps of a round."""
        refresh = self.on_policy.refresh
        return range(number * refresh, min((number + 1) * refresh, self.schedule.steps))

    def round_of(self, step: int) -> int:
        return step // self.on_policy.refresh

    def sampled(self, step: int) -> list[int]:
        """The indices of the step's examples that the student samples, in the order of the step. By seed and key; the
        share is kept over all steps, also where it is less than one example of each."""
        batch = self.schedule.batch(step)
        share, seen = self.on_policy.share, self.schedule.seen
        count = math.floor(share * seen(step + 1)) - math.floor(share * seen(step))
        if count == len(batch):
            return batch
        chosen = set(sorted(batch, key=lambda index: self._lot(step, index))[:count])
        return [index for index in batch if index in chosen]

    def asked(self, number: int) -> Iterator[tuple[int, int]]:
        """The step and the index of every example that the student samples in a round."""
        for step in self.steps(number):
            for index in self.sampled(step):
                yield step, index

    def _lot(self, step: int, index: int) -> str:
        identity, sample = self.keys[index]
        name = f"{self.schedule.seed}/on-policy/{step}/{identity}/{sample}"
        return hashlib.sha256(name.encode()).hexdigest()


def weights_of(number: int) -> str:
    """The prefix of the files with a round's weights, in the folder of the training: a whole model, from round 1 on.
    The round's marker lists them."""
    return f"{WEIGHTS}{number:05d}/"
