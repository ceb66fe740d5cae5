"""Store what a model thinks of stored texts, for trainings that learn its distribution.

    CGD_TASK='{...}' python -m cgd_stages.score

Makes the examples of every row as a training makes them, in the student's own tokens, has the model compute the
log-probabilities of each target, and stores them as they finish (`training.scores` has the columns). Of a training that
learns what its student samples, it scores these samples, round by round (rounds.py). It may be interrupted at any
moment: the next attempt scores the rest only.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from cgd_stages.chat.example import Unusable
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Critique, Model, Rows, Score, StageFacts
from cgd_stages.engines.replies import rejection
from cgd_stages.engines.scorer import Scorer, Scores, is_sound
from cgd_stages.engines.vllm import TokenText
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.method.examples import row_example, wording
from cgd_stages.models import resolve
from cgd_stages.models.fit import context_length, read_config
from cgd_stages.runtime.pace import Pace
from cgd_stages.runtime.program import Context, run, storing
from cgd_stages.score.rounds import score_rounds
from cgd_stages.store.folder import PARTS, Folder, ShardMarker
from cgd_stages.store.part_writer import PartWriter
from cgd_stages.store.rows import Key, Row, key_of, now
from cgd_stages.store.shards import mark, may_hold, owned_rows, part_start, summed
from cgd_stages.training.job import Training
from cgd_stages.training.scores import SCORED_TOKENS, SCORES_SCHEMA, TOP_MASS, text_digest

log = logging.getLogger(__name__)

REPORT_SECONDS = 3.0
HINT = (
    "Raise spec.training.maxSequenceLength or lower the maxTokens of the texts, so that context and text fit together. "
    "Or raise spec.generation.maxRejected."
)


def main(context: Context) -> dict[str, StageFacts]:
    context.store = context.store.waiting(context.stop)
    work = context.work_of(Score)
    model = resolve.pinned(work.model, context.store)
    start = partial(_scorer, context, work, model)
    if work.training:
        training = Training.of(context.store, work.training, context.scratch)
        return score_rounds(context, work, training, start)
    return _score_texts(context, work, model, start)


def _scorer(context: Context, work: Score, model: Model) -> Scorer:
    """Start the engine."""
    engine = work.engine.model_copy(update={"max_model_len": _room(context, work, model)})
    return Scorer(resolve.fetch(model, context.store, context.scratch), engine, work.top_k)


def _room(context: Context, work: Score, model: Model) -> int:
    """Tokens for the longest example, and for the one that an engine must write."""
    files = resolve.fetch(model, context.store, context.scratch, weights=False)
    config = read_config(files, model, "the scoring model")
    return min(work.max_sequence_length + 1, context_length(config, work.engine, model, "the scoring model"))


def _score_texts(context: Context, work: Score, model: Model, start: Callable[[], Scorer]) -> dict[str, StageFacts]:
    """Score the stored texts of an objective."""
    name, student = context.task.stage, resolve.pinned(work.student, context.store)
    template = resolve.spoken(student, work.chat, context.store, context.scratch)
    source = context.store.input("distill" if work.objective == "DistilledSFT" else "refine")
    exact = resolve.resolve(model, context.store).identity()
    is_trained = model.name.startswith(resolve.STAGE)  # what this run calls the stage does not matter
    inputs: dict[str, Any] = template.identity() | {
        "stage": "score",
        "objective": work.objective,
        "model": exact["revision"] if is_trained else exact,
        "engine": work.engine.identity(),
        "prompts": wording(work.objective, Critique(), work.context),
        "thinking": work.thinking,
        "maxSequenceLength": work.max_sequence_length,
        "topK": work.top_k,
        "upstream": source.digest,
        **template.ending(),
    }
    folder = context.store.folder(name, inputs)
    if done := folder.done():
        log.info("%s is done already: %s", name, folder.uri)
        context.store.point_at(done)
        shard = folder.shard_marker(context.shard, work.shards)
        nothing = StageFacts(digest=done.digest, output_uri=done.facts.output_uri)
        return {name: shard.facts if shard else done.facts if context.shard == 0 else nothing}
    share = Shard(context, template, source, folder, _room(context, work, model) - 1)
    return {name: share.score(start, inputs)}


class Shard:
    """This pod's share of the rows, of which some may be scored already."""

    def __init__(self, context: Context, template: ChatTemplate, source: Folder, folder: Folder, longest: int) -> None:
        self._longest = longest
        """Tokens of an example, at most."""
        self._context, self._work = context, context.work_of(Score)
        self._template, self._folder, self._source = template, folder, source
        self._started, self._clock = now(), time.monotonic()
        self._total = source.require().rows.done
        """Rows of the stage over all shards."""
        self._counts: Counter[str] = Counter()
        self._mass = 0.0
        self._asked: dict[str, tuple[str, int, list[int]]] = {}
        """By name: the texts that the engine has, as the tokens that are scored."""
        shard, shards = context.shard, self._work.shards
        self._owned = {key_of(row) for row in self._rows(["id", "sample"])}
        self._writer = _Writer(folder, shard, shards, self._owned, self._count)
        self._fresh = 0

    def score(self, start: Callable[[], Scorer], inputs: dict[str, Any]) -> StageFacts:
        """Score what is not scored yet, and write the markers of what is complete. `start` starts the engine, which is
        needed unless every row is stored."""
        texts, settings = self._texts(), dict[str, Any]()
        if (first := next(texts, None)) is not None:
            scorer = start()
            settings = scorer.settings
            with self._context.holding(), storing(self._writer.flush):
                pace, reported = Pace(), time.monotonic()
                for scores in scorer.scores(chain([first], texts), self._context.stop):
                    self._keep(scores)
                    if self._writer.due:
                        self._writer.try_flush()
                    if time.monotonic() - reported > REPORT_SECONDS:
                        reported = time.monotonic()
                        self._report(pace)
            self._context.facts[self._folder.stage] = self._facts()
            self._context.check()
            scorer.close()
        return self._end(inputs, settings)

    def _rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        parts = self._source.require().under(PARTS)
        return owned_rows(self._source, parts, self._context.shard, self._work.shards, columns)

    def _texts(self) -> Iterator[TokenText]:
        """The rows that are not stored yet, as tokens. Those that make no example are rejected here."""
        for row in self._rows():
            if key_of(row) in self._writer:
                continue
            try:
                made = row_example(
                    self._template,
                    self._work.objective,
                    row,
                    max_length=self._longest,
                    thinking=self._work.thinking,
                    instruction_turn=self._work.context,
                )
            except Unusable as error:
                self._reject(row, error.reason, error.detail)
                continue
            name = f"{row['id']}/{row['sample']}"
            self._asked[name] = row["id"], row["sample"], made.input_ids[made.start :]
            yield TokenText(name, made.input_ids, made.start)

    def _keep(self, scores: Scores) -> None:
        identity, sample, tokens = self._asked.pop(scores.name)
        row: Row = {"id": identity, "sample": sample}
        if not is_sound(scores):
            self._reject(row, "engine", "the model's log-probabilities are no numbers, or sum up to more than 1")
            return
        self._fresh += len(tokens)
        self._writer.keep(
            row
            | {
                "text": text_digest(tokens),
                "tokens": tokens,
                "logprobs": scores.logprobs,
                "top_ids": scores.top_ids.ravel(),
                "top_logprobs": scores.top_logprobs.ravel().astype(np.float16),
            }
        )

    def _reject(self, row: Row, reason: str, detail: str) -> None:
        self._writer.reject(rejection(self._folder.stage, row, reason, detail))
        if self._counts["rejected"] > self._work.max_rejected * self._total:
            self._writer.flush()
            raise _too_many(self._folder.stage, self._stage_rows.rejected, self._total, detail)

    def _count(self, row: Row) -> None:
        if "reason" in row:
            self._counts.update({"rejected": 1, f"rejected_{row['reason']}": 1})
            return
        mass = np.exp(np.asarray(row["top_logprobs"], np.float64)).sum()
        self._counts.update({"done": 1, "tokens": len(row["tokens"])})
        self._mass += float(mass)

    @property
    def _stage_rows(self) -> Rows:
        return Rows(total=len(self._owned), done=self._counts["done"], rejected=self._counts["rejected"])

    def _report(self, pace: Pace) -> None:
        rows = self._stage_rows
        left = rows.total - rows.done - rows.rejected
        self._context.progress.report(
            self._folder.stage,
            rows,
            tokens_per_second=round(self._fresh / pace.seconds, 1),
            eta=pace.remaining(rows.done, left),
        )

    def _facts(self) -> StageFacts:
        reasons = {name: float(count) for name, count in sorted(self._counts.items()) if name.startswith("rejected_")}
        return StageFacts(
            rows=self._stage_rows,
            prompt_tokens=self._counts["tokens"],
            seconds=round(time.monotonic() - self._clock, 3),
            digest=self._folder.digest,
            output_uri=self._folder.uri,
            metrics={SCORED_TOKENS: float(self._counts["tokens"]), TOP_MASS: round(self._mass, 6)} | reasons,
        )

    def _end(self, inputs: dict[str, Any], settings: dict[str, Any]) -> StageFacts:
        """Store this shard's marker and, when all other shards have theirs, the marker of the stage."""
        self._writer.flush()
        facts, folder, shards = self._facts(), self._folder, self._work.shards
        if not facts.rows.total == facts.rows.done + facts.rows.rejected == self._writer.stored_rows:
            raise RowsLost(f"{folder.stage}: {facts.rows}, stored {self._writer.stored_rows}")
        marker = ShardMarker(
            stage=folder.stage,
            digest=folder.digest,
            parts=tuple(self._writer.parts),
            started=self._started,
            completed=now(),
            facts=facts,
            shard=self._context.shard,
            shards=shards,
        )
        markers = mark(folder, marker)
        log.info("%s: shard %d has ended, as have %d of %d", folder.stage, marker.shard, len(markers), shards)
        if len(markers) < shards:
            return facts
        whole = summed([one.facts for one in markers])
        if whole.rows.total != self._total:
            raise RowsLost(f"{folder.stage}: the shards have {whole.rows.total} of {self._total} rows")
        if whole.rows.rejected > self._work.max_rejected * self._total:
            raise _too_many(folder.stage, whole.rows.rejected, self._total, "see the rejected rows of the stage")
        done = folder.finish(
            facts=whole,
            parts=[part for one in markers for part in one.parts],
            started=min(one.started for one in markers),
            inputs=inputs,
            settings=settings | {"shards": shards},
        )
        self._context.store.point_at(done)
        return facts


class _Writer(PartWriter):
    """The stored and waiting rows of a shard, of which `owned` has the keys."""

    def __init__(
        self, folder: Folder, shard: int, shards: int, owned: Collection[Key], count: Callable[[Row], None]
    ) -> None:
        super().__init__(folder, SCORES_SCHEMA, count=count, key=key_of, name_start=part_start(shard, shards))
        self._owned = owned
        self.recover(lambda name: may_hold(name, shard, shards))

    def lacks(self, row: Row) -> bool:
        return key_of(row) in self._owned and super().lacks(row)


def _too_many(stage: str, rejected: int, total: int, example: str) -> UserError:
    return UserError(f"{stage}: {rejected} of {total} texts cannot be scored: {example}", hint=HINT)


if __name__ == "__main__":
    run(main)
