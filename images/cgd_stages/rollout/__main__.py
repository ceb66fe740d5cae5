"""Let the student of a training sample what the training learns, round by round.

    CGD_TASK='{...}' python -m cgd_stages.rollout

Waits until the training has stored a round's weights (the first round has those of the training's start), takes them
into the engine, which starts once, samples a text behind each prompt of the round, stores the samples as they finish
(`training.rollouts` has the columns), and then the round's marker. It may be interrupted at any moment: the next
attempt goes on with the round that has no marker, and samples what is missing of it.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import hashlib
import logging
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from cgd_stages.contract import OnPolicy, Rollout, StageFacts
from cgd_stages.engines.sampler import CUT, Prompt, Sampler
from cgd_stages.errors import TransientError, UserError
from cgd_stages.models import resolve
from cgd_stages.models.fit import context_length, read_config
from cgd_stages.runtime.program import Context, run
from cgd_stages.store.bucket import places
from cgd_stages.store.folder import Folder
from cgd_stages.store.rows import Row, file_sha256
from cgd_stages.training.conveyor import Asked, Round, Rounded
from cgd_stages.training.job import Training
from cgd_stages.training.rollouts import ROLLOUT_SCHEMA, RolloutKey
from cgd_stages.training.rounds import weights_of

log = logging.getLogger(__name__)

CUT_SAMPLES = "cut_samples"
"""A metric: samples without an end, because maxTokens or the end of the context has cut them."""
TOO_LONG = "too_long"


def main(context: Context) -> dict[str, StageFacts]:
    context.store = context.store.waiting(context.stop)
    work, name = context.work_of(Rollout), context.task.stage
    training = Training.of(context.store, work.training, context.scratch)
    folder = context.store.folder(name, training.of_rollouts)
    if done := folder.done():
        log.info("%s is done already: %s", name, folder.uri)
        context.store.point_at(done)
        return {name: done.facts if context.shard == 0 else StageFacts(digest=done.digest)}
    return {name: Share(context, work, training, folder).run()}


class Share:
    """This pod's share of every round: the prompts whose ids it owns."""

    def __init__(self, context: Context, work: Rollout, training: Training, folder: Folder) -> None:
        self._context, self._work, self._training = context, work, training
        assert work.training.on_policy
        self._on_policy: OnPolicy = work.training.on_policy
        self._asked = Asked.of(training)
        self._refuse_unless_room()
        rounds = range(self._asked.rounds.count)
        total = sum(1 for number in rounds for _ in self._asked.of_shard(number, context.shard, work.shards))
        self._rounded = Rounded(context, folder, work.shards, len(rounds), total)
        self._engine: Sampler | None = None

    def run(self) -> StageFacts:
        for number in range(self._rounded.count):
            if self._rounded.is_made(number):
                continue
            weights = self._weights(number)
            engine, prompts = self._with(weights), self._prompts(number)
            with self._context.holding():
                made = Round(self._rounded, number, ROLLOUT_SCHEMA, len(prompts), _measure)
                made.make(self._sampled(engine, made, prompts), "generated_tokens")
            if number:
                shutil.rmtree(weights)
        settings = dict[str, object](self._engine.settings) if self._engine else {}
        if self._engine:
            self._engine.close()
        return self._rounded.finish(self._context.store, self._training.of_rollouts, settings)

    def _prompts(self, number: int) -> dict[RolloutKey, Prompt]:
        """The prompts of a round. Where the context leaves no room for a token, `most` is 0."""
        found = dict[RolloutKey, Prompt]()
        for key, index in self._asked.of_shard(number, self._context.shard, self._work.shards):
            ids, name = self._asked.contexts[index].tolist(), "/".join(map(str, key))
            seed = int(hashlib.sha256(f"{self._work.training.seed}/rollout/{name}".encode()).hexdigest()[:12], 16)
            most = max(0, min(self._on_policy.max_tokens, self._room - len(ids)))
            found[key] = Prompt(name, ids, len(ids), most, seed)
        return found

    def _sampled(self, engine: Sampler, made: Round, prompts: dict[RolloutKey, Prompt]) -> Iterator[Row]:
        """The rows of a round that are not stored yet."""
        keys = {prompt.name: key for key, prompt in prompts.items()}

        def missing() -> Iterator[Prompt]:
            for key, prompt in prompts.items():
                if key in made:
                    continue
                if prompt.most:
                    yield prompt
                else:
                    made.reject(key, TOO_LONG, f"the context has {prompt.start} tokens, which leaves no room")

        for sample in engine.samples(missing(), self._context.stop):
            identity, number, step = key = keys[sample.name]
            prompt = prompts[key]
            yield {
                "id": identity,
                "sample": number,
                "step": step,
                "input_ids": [*prompt.ids, *sample.ids],
                "start": prompt.start,
                "logprobs": sample.logprobs,
                "finish": sample.finish,
            }

    @cached_property
    def _room(self) -> int:
        """The most tokens of context and sample together: the training reads no more, and the engine holds no more."""
        store, scratch, student = self._context.store, self._context.scratch, self._training.student
        config = read_config(resolve.fetch(student, store, scratch, weights=False), student, "spec.student")
        longest = self._work.training.max_sequence_length
        return min(longest, context_length(config, self._on_policy.engine, student, "spec.student"))

    def _refuse_unless_room(self) -> None:
        """Raise UserError where more prompts than may be rejected leave no room for a sample."""
        lengths, work = [len(context) for context in self._asked.contexts], self._work.training
        if (full := sum(length >= self._room for length in lengths)) > work.max_rejected * len(lengths):
            raise UserError(
                f"{self._context.task.stage}: {full} of {len(lengths)} prompts leave no room for a sample in "
                f"{self._room} tokens",
                hint="Raise spec.student.maxModelLen and spec.training.maxSequenceLength, or take shorter prompts.",
            )

    def _with(self, weights: Path) -> Sampler:
        """The engine with these weights. It starts once, with those of the training's start, and takes others in
        place."""
        start = resolve.fetch(self._training.student, self._context.store, self._context.scratch)
        if self._engine is None:
            engine = self._on_policy.engine.model_copy(update={"max_model_len": self._room})
            self._engine = Sampler(start, engine, self._training.dataset.template)
        if weights != start:
            self._engine.take(weights)
        return self._engine

    def _weights(self, number: int) -> Path:
        """A folder with the weights of a round: those of the training's start, or what the training has stored."""
        store, scratch = self._context.store, self._context.scratch
        if number == 0:
            return resolve.fetch(self._training.student, store, scratch)
        training, prefix = self._training.place(store), weights_of(number)
        [marker] = self._rounded.await_round(training, number)
        target = scratch / prefix
        shutil.rmtree(target, ignore_errors=True)
        paths = places(target, [part.key.removeprefix(prefix) for part in marker.parts])
        for part in marker.parts:
            path = paths[part.key.removeprefix(prefix)]
            training.bucket.download(training.key(part.key), path)
            if file_sha256(path) != part.sha256:
                hint = "The pod starts again by itself, and reads it anew."
                raise TransientError(f"{training.uri}/{part.key} is not what its marker promises", hint=hint)
        return target


def _measure(row: Row) -> dict[str, float]:
    written = len(row["input_ids"]) - row["start"]
    return {"prompt_tokens": row["start"], "generated_tokens": written, CUT_SAMPLES: row["finish"] == CUT}


if __name__ == "__main__":
    run(main)
