"""What the programs of an on-policy training share: one samples, one scores, one trains, round after round.

Each waits for the round of the program before it, makes its own, and writes the round's marker last. They speak through
the store alone, and each writes its own folder alone. A round that has its marker is not made again.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cgd_stages.chat.example import Example
from cgd_stages.contract import RoundOf, Rows, StageFacts
from cgd_stages.engines.replies import rejection
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.runtime.pace import Pace
from cgd_stages.runtime.program import Context, storing
from cgd_stages.store.folder import Folder, Part, RoundMarker
from cgd_stages.store.part_writer import PartWriter
from cgd_stages.store.rows import Key, Row, key_of, now
from cgd_stages.store.run import RunStore
from cgd_stages.store.shards import owns, summed
from cgd_stages.training.dataset import ExampleCounts
from cgd_stages.training.job import Training
from cgd_stages.training.rollouts import RolloutKey, is_of_round, rollout_key, round_start
from cgd_stages.training.rounds import Rounds

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""Seconds between two looks for a round's markers: a round is handed over three times."""
TOLD_SECONDS = 60.0
"""Seconds between two words of the log about what is waited for."""
REPORT_SECONDS = 3.0


@dataclass(frozen=True)
class Asked:
    """The prompts that a training's student may be asked, in the order of their keys, and their rounds."""

    contexts: Sequence[NDArray[np.int32]]
    """The tokens of each."""
    rounds: Rounds

    @classmethod
    def of(cls, training: Training) -> "Asked":
        """Those of the examples that the training learns. Raises the errors that `check` would have raised."""
        dataset, found = training.dataset, list[tuple[Key, NDArray[np.int32], int]]()
        counts = ExampleCounts.of(dataset)
        for row, example in dataset.examples():
            counts.add(row, example)
            if isinstance(example, Example) and row["id"] not in counts.held_out:
                context = np.asarray(example.input_ids[: example.start], np.int32)
                found.append((key_of(row), context, len(example.input_ids)))
        counts.refuse_unless_enough(dataset.total, training.work.max_rejected)
        found.sort(key=lambda one: one[0])
        keys, contexts, lengths = zip(*found, strict=True)
        return cls(contexts, Rounds.of(training.work, keys, lengths))

    def of_shard(self, number: int, shard: int, shards: int) -> Iterator[tuple[RolloutKey, int]]:
        """The key of each row that a shard has in a round, and the index of its prompt."""
        for step, index in self.rounds.asked(number):
            identity, sample = self.rounds.keys[index]
            if owns(identity, shard, shards):
                yield (identity, sample, step), index


def await_round(folder: Folder, number: int, check: Callable[[], None]) -> list[RoundMarker]:
    """The markers of a round of another stage, when all are there. It waits as long as that takes: hold nothing that is
    not stored, so that SIGTERM ends the program. `check` raises Interrupted where SIGTERM has come before.

    Raises UserError when the stage has ended without the round.
    """
    started, told = time.monotonic(), -TOLD_SECONDS
    while (markers := folder.round(number)) is None:
        check()
        seconds = time.monotonic() - started
        if seconds - told >= TOLD_SECONDS:
            told = seconds
            log.info("waiting for round %d of %s, for %.0f s so far", number + 1, folder.stage, seconds)
            if folder.done() and folder.round(number) is None:
                raise UserError(
                    f"{folder.uri} is complete, and its round {number + 1} is gone",
                    hint=f"Delete {folder.uri} and apply the run again: it makes that training anew.",
                )
        time.sleep(LOOK_SECONDS)
    return markers


@dataclass
class Rounded:
    """The rounds of one shard in the folder of its stage, and the end of the stage."""

    context: Context
    folder: Folder
    shards: int
    count: int
    """Rounds of the stage."""
    total: int
    """Rows of the shard in all rounds."""
    ended: list[StageFacts] = field(default_factory=list)
    """Of the rounds that have this shard's marker."""

    def is_made(self, number: int) -> bool:
        """Whether the shard has nothing to make in a round: it has marked it, or another number of shards has."""
        marker = self.folder.round_marker(number, self.context.shard, self.shards)
        if marker:
            self.ended.append(marker.facts)
        return marker is not None or self.folder.round(number) is not None

    def mark(self, number: int, parts: Sequence[Part], started: str, facts: StageFacts) -> None:
        """Promise the round. Raises RowsLost where the parts do not have the rows that the facts count."""
        rows, stored = facts.rows, sum(part.rows for part in parts)
        if not rows.total == rows.done + rows.rejected == stored:
            raise RowsLost(f"{self.folder.stage}, round {number + 1}: {rows}, stored {stored}")
        marker = RoundMarker(
            stage=self.folder.stage,
            digest=self.folder.digest,
            parts=tuple(parts),
            started=started,
            completed=now(),
            facts=facts,
            shard=self.context.shard,
            shards=self.shards,
            round=number,
        )
        self.ended.append(self.folder.mark_round(marker).facts)
        log.info("%s: round %d of %d has ended: %s", self.folder.stage, number + 1, self.count, rows)

    def await_round(self, upstream: Folder, number: int) -> list[RoundMarker]:
        """`await_round`, and the word in the progress that it waits."""
        if (there := upstream.round(number)) is not None:
            return there
        self.report(number, StageFacts(), waits_for=upstream.stage)
        return await_round(upstream, number, self.context.check)

    def report(
        self,
        number: int,
        under_way: StageFacts,
        *,
        tokens_per_second: float | None = None,
        waits_for: str | None = None,
    ) -> None:
        """Report how far the shard is, with what it has made of a round."""
        facts = self.so_far(under_way)
        self.context.facts[self.folder.stage] = facts
        at = RoundOf(number=number + 1, of=self.count, waits_for=waits_for)
        self.context.progress.report(self.folder.stage, facts.rows, tokens_per_second=tokens_per_second, at=at)

    def so_far(self, *under_way: StageFacts) -> StageFacts:
        """The facts of the shard, of all rounds that have ended and of what is under way."""
        facts = together([*self.ended, *under_way])
        rows = facts.rows.model_copy(update={"total": self.total})
        return facts.model_copy(update={"rows": rows, "digest": self.folder.digest, "output_uri": self.folder.uri})

    def finish(self, store: RunStore, inputs: dict[str, Any], settings: dict[str, Any]) -> StageFacts:
        """The shard's facts. Where all shards have made all rounds, the promise of the stage too."""
        rounds = [markers for number in range(self.count) if (markers := self.folder.round(number)) is not None]
        if len(rounds) == self.count:
            markers = [marker for one in rounds for marker in one]
            whole = together([summed([marker.facts for marker in one]) for one in rounds])
            done = self.folder.finish(
                facts=whole,
                parts=[part for marker in markers for part in marker.parts],
                started=min(marker.started for marker in markers),
                inputs=inputs,
                settings=settings | {"shards": self.shards, "rounds": self.count},
            )
            store.point_at(done)
        return self.so_far()


class Round:
    """A round of a shard while it is made; a part of it may be stored already. `measure`: what a kept row counts, by
    name; `prompt_tokens` and `generated_tokens` are the facts of these names, all others are metrics."""

    def __init__(
        self, rounded: Rounded, number: int, schema: pa.Schema, total: int, measure: Callable[[Row], dict[str, float]]
    ) -> None:
        self._rounded, self._number, self._total, self._measure = rounded, number, total, measure
        self._rows, self._measured = Counter[str](), Counter[str]()
        self._started, self._clock = now(), time.monotonic()
        shard, shards = rounded.context.shard, rounded.shards
        start = round_start(number, shard, shards)
        self._writer = PartWriter(rounded.folder, schema, count=self._count, key=rollout_key, name_start=start)
        # Rejected rows of an earlier attempt are rejected again.
        self._writer.recover(lambda name: is_of_round(name, number, shard, shards))

    def __contains__(self, key: RolloutKey) -> bool:
        return key in self._writer

    def make(self, rows: Iterator[Row], rate_of: str) -> None:
        """Keep the rows as they come, then promise the round. `rate_of`: which of the counts is told as tokens a
        second. After SIGTERM `rows` must end; what has come is stored."""
        pace, reported, before = Pace(), time.monotonic(), self._measured[rate_of]
        self._rounded.report(self._number, self.facts)
        with storing(self._writer.flush):
            for row in rows:
                self._writer.keep(row)
                if self._writer.due:
                    self._writer.try_flush()
                if time.monotonic() - reported > REPORT_SECONDS:
                    reported, rate = time.monotonic(), (self._measured[rate_of] - before) / pace.seconds
                    self._rounded.report(self._number, self.facts, tokens_per_second=round(rate, 1))
        self._rounded.report(self._number, self.facts)
        self._rounded.context.check()
        self._rounded.mark(self._number, self._writer.parts, self._started, self.facts)

    def reject(self, key: RolloutKey, reason: str, detail: str) -> None:
        row: Row = {"id": key[0], "sample": key[1]}
        # The step is no column of rejected rows; it tells them apart here.
        self._writer.reject(rejection(self._rounded.folder.stage, row, reason, detail) | {"step": key[2]})

    def _count(self, row: Row) -> None:
        if "reason" in row:
            self._rows["rejected"] += 1
            self._measured[f"rejected_{row['reason']}"] += 1
            return
        self._rows["done"] += 1
        self._measured.update(self._measure(row))

    @property
    def facts(self) -> StageFacts:
        metrics = {name: float(value) for name, value in self._measured.items()}
        return StageFacts(
            rows=Rows(total=self._total, done=self._rows["done"], rejected=self._rows["rejected"]),
            prompt_tokens=int(metrics.pop("prompt_tokens", 0)),
            generated_tokens=int(metrics.pop("generated_tokens", 0)),
            seconds=round(time.monotonic() - self._clock, 3),
            metrics=metrics,
        )


def together(rounds: Sequence[StageFacts]) -> StageFacts:
    """The facts of several rounds, which have come one after another."""
    return summed(rounds).model_copy(update={"seconds": round(sum(facts.seconds for facts in rounds), 3)})
