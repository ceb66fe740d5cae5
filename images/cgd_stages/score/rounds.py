"""The teacher's log-probabilities of what a training's student samples, round by round: the same warm engine waits for
the samples of each round, and adds its columns to their rows."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cgd_stages.contract import Score, StageFacts
from cgd_stages.engines.scorer import Scorer, is_sound
from cgd_stages.engines.vllm import TokenText
from cgd_stages.errors import UserError
from cgd_stages.runtime.program import Context
from cgd_stages.store.folder import Folder
from cgd_stages.store.rows import Row
from cgd_stages.store.shards import owns
from cgd_stages.training.conveyor import Asked, Round, Rounded
from cgd_stages.training.job import Training
from cgd_stages.training.rollouts import SCORED_ROLLOUT_SCHEMA, RolloutKey, rollout_key, round_rows
from cgd_stages.training.scores import SCORED_TOKENS, TOP_MASS

log = logging.getLogger(__name__)


def score_rounds(
    context: Context, work: Score, training: Training, start: Callable[[], Scorer]
) -> dict[str, StageFacts]:
    """Score every round. `start` starts the engine, which is needed unless every round is stored."""
    name = context.task.stage
    folder = context.store.folder(name, training.of_scores)
    if done := folder.done():
        log.info("%s is done already: %s", name, folder.uri)
        context.store.point_at(done)
        return {name: done.facts if context.shard == 0 else StageFacts(digest=done.digest)}
    asked = Asked.of(training)
    rounds = range(asked.rounds.count)
    total = sum(1 for number in rounds for _ in asked.of_shard(number, context.shard, work.shards))
    rounded = Rounded(context, folder, work.shards, len(rounds), total)
    upstream, engine = training.rollouts(context.store), None
    for number in rounds:
        if rounded.is_made(number):
            continue
        engine = engine or start()
        samples = _samples(context, rounded, upstream, number)
        with context.holding():
            made = Round(rounded, number, SCORED_ROLLOUT_SCHEMA, len(samples), _measure)
            made.make(_scored(context, engine, made, samples), SCORED_TOKENS)
        _refuse_unless_enough(name, rounded, work.max_rejected)
    settings = dict[str, Any](engine.settings) if engine else {}
    if engine:
        engine.close()
    return {name: rounded.finish(context.store, training.of_scores, settings)}


def _samples(context: Context, rounded: Rounded, upstream: Folder, number: int) -> dict[RolloutKey, Row]:
    """The shard's samples of a round, when they are there."""
    markers = rounded.await_round(upstream, number)
    rows = (row for row in round_rows(upstream, markers) if owns(row["id"], context.shard, rounded.shards))
    return {rollout_key(row): row for row in rows}


def _scored(context: Context, engine: Scorer, made: Round, samples: dict[RolloutKey, Row]) -> Iterator[Row]:
    """The rows of a round that are not stored yet. Those that the teacher cannot judge are rejected: it gives a token
    of theirs no probability, or does not have it."""
    keys = {"/".join(map(str, key)): key for key in samples}

    def missing() -> Iterator[TokenText]:
        for name, key in keys.items():
            ids = samples[key]["input_ids"]
            if key in made:
                continue
            if len(ids) > engine.limit:
                made.reject(key, "too_long", f"{len(ids)} tokens, the teacher's context has {engine.limit}")
            elif max(ids) >= engine.vocabulary:
                made.reject(key, "engine", f"the teacher has {engine.vocabulary} tokens, the sample holds {max(ids)}")
            else:
                yield TokenText(name, ids, samples[key]["start"])

    for scores in engine.scores(missing(), context.stop):
        key = keys[scores.name]
        if not (is_sound(scores) and np.isfinite(scores.logprobs).all()):
            made.reject(key, "engine", "the teacher gives a sampled token no probability, or none that makes sense")
            continue
        yield samples[key] | {
            "teacher_logprobs": scores.logprobs,
            "top_ids": scores.top_ids.ravel(),
            "top_logprobs": scores.top_logprobs.ravel().astype(np.float16),
        }


def _measure(row: Row) -> dict[str, float]:
    tokens, top = len(row["input_ids"]) - row["start"], np.asarray(row["top_logprobs"], np.float64)
    measured = {"prompt_tokens": len(row["input_ids"]), SCORED_TOKENS: tokens}
    return measured | ({TOP_MASS: float(np.exp(top).sum())} if len(top) else {})


def _refuse_unless_enough(stage: str, rounded: Rounded, max_rejected: float) -> None:
    rows = rounded.so_far().rows
    if rows.rejected > max_rejected * rows.total:
        raise UserError(
            f"{stage}: {rows.rejected} of {rows.total} samples cannot be scored; see the rejected rows of the stage",
            hint="Raise spec.teacher.maxModelLen or lower maxTokens of the variant. Or raise "
            "spec.generation.maxRejected.",
        )
