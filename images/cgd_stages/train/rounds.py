"""The rounds of a training that learns what its own student samples: what has come is read, the weights are handed on.

A round's steps learn what the student of the round's beginning has sampled and the teacher has scored. Two other
programs do that (`rollout`, `score`), and all three speak through the store alone. So a training waits for a round
before its first step, and after its last one stores the weights that the next round samples with. What it learns is
read from the store again after an interruption, and is the same; where the next round has been sampled already, nobody
asks for its weights any more.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from cgd_stages.contract import RoundOf, StageFacts
from cgd_stages.errors import Interrupted, UserError
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Folder, Part, RoundMarker
from cgd_stages.store.rows import file_sha256, now
from cgd_stages.train.examples import Examples, Mixed, Sampled, Scored
from cgd_stages.train.group import agreed, anywhere
from cgd_stages.training.conveyor import await_round
from cgd_stages.training.job import STOP, Job, Record
from cgd_stages.training.rollouts import write_round
from cgd_stages.training.rounds import WEIGHTS, Rounds, weights_of

log = logging.getLogger(__name__)

PAUSE = 0.1
"""Seconds between two looks at a thread."""
MOST_GAP = 1.0
"""Nats between student and sampler in a round's first step, on average: in 16 bits it is some hundredths."""


class RoundsInTurn:
    """One process's part in the rounds. All ranks call every public method, in the same order.

    Threads read and write the store: while a rank waits for its own, all of them go on asking each other whether the
    training is to stop.
    """

    def __init__(self, job: Job, folder: Path, stored: Examples, device: torch.device) -> None:
        """`stored`: the examples of the training, which say what each step learns or asks for."""
        work = job.work
        assert work.on_policy
        assert work.scored_rollouts
        self.rounds = Rounds.of(work, stored.keys(), stored.lengths)
        self._job, self._folder, self._stored, self._device = job, folder, stored, device
        self._share = work.on_policy.share
        self._leaving = threading.Event()
        bucket = Bucket(job.storage).waiting(self._leaving)
        self._own = Folder(bucket, job.run.namespace, job.stage, job.digest)
        self._scored = Folder(bucket, job.run.namespace, work.scored_rollouts, job.scored_rollouts)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rounds")
        self._number: int | None = None
        self._batches: dict[int, list[int]] = {}
        self._waited = 0.0
        self.examples = Mixed(())
        """Those of the round that is learned."""

    def at(self, step: int) -> RoundOf:
        """Where the training is before a step: in its round, or waiting for that."""
        number = self.rounds.round_of(step)
        missing = None if number == self._number else self._scored.stage
        return RoundOf(number=number + 1, of=self.rounds.count, waits_for=missing)

    def take(self, step: int) -> bool:
        """Wait until the round of a step (from 0) has been sampled and scored, and read it; False if SIGTERM comes
        before that."""
        number = self.rounds.round_of(step)
        if number == self._number:
            return True
        path, began = self._folder / f"round-{number:05d}.arrow", time.monotonic()
        if not self._wait(self._thread.submit(self._fetch, number, path), f"read round {number + 1}"):
            return False
        before, self._number = self._number, number
        self._open(path)
        dist.barrier()
        if self._first_of_node and before is not None:
            (self._folder / f"round-{before:05d}.arrow").unlink()
        self._delete_weights(number)
        self._waited = time.monotonic() - began
        return True

    def batch(self, step: int) -> list[int]:
        """The indices of the step's examples among those of the round. Raises UserError when there are none."""
        if batch := self._batches[step]:
            return batch
        rows = ", ".join(self._stored.key(index) for index in self.rounds.schedule.batch(step))
        raise UserError(
            f"step {step + 1} has nothing to learn: of these rows (id/sample) the student could sample nothing that "
            f"the teacher could score: {rows}",
            hint="The rejected rows of the training's stages rollout and score say why. Raise "
            "spec.training.maxSequenceLength and spec.student.maxModelLen, or globalBatchSize.",
        )

    def told(self, batch: Sequence[int]) -> Record:
        """Figures of a step's samples, and how long it has waited for its round, if it is the first to learn it."""
        waited, self._waited = self._waited, 0.0
        return self.examples.told(batch) | ({"waited_seconds": round(waited, 4)} if waited else {})

    def refuse_unless_own(self, step: int, record: Record) -> None:
        """Raise UserError where a round's first step shows that another model has sampled the round."""
        gap = record.get("sampler_gap", 0.0)
        if step == self.rounds.steps(self.rounds.round_of(step))[0] and gap > MOST_GAP:
            raise UserError(
                f"round {self.rounds.round_of(step) + 1} was not sampled by this student: its log-probabilities of the "
                f"sampled tokens are {gap:.2f} nats from the sampler's, on average",
                hint="vLLM does not take this student's new weights, or computes something else than transformers: "
                "look for warnings in the log of the training's rollout stage, and take another student or vLLM.",
            )

    def hand_on(self, done: int, write: Callable[[Path], None]) -> None:
        """After so many steps: store the weights of the round that begins now, if one does that has not been sampled.
        `write` writes the model into a folder; all ranks call it."""
        if done == self.rounds.schedule.steps or self.rounds.round_of(done) == self.rounds.round_of(done - 1):
            return
        number = self.rounds.round_of(done)
        if not self._wait(self._thread.submit(self._is_asked_for, number), "look for the next round"):
            return
        target, started = self._folder / "weights", now()
        write(target)
        self._wait(self._thread.submit(self._upload, number, target, started), "store a round's weights")

    def end(self) -> None:
        """After the last step: delete the weights of all rounds. Nobody reads them any more."""
        self._delete_weights(self.rounds.count)

    def _wait(self, mine: Future[bool], what: str) -> bool:
        """What all ranks' threads say together; those that wait for a round give up when SIGTERM comes."""
        threads = agreed(mine, self._device, what)
        while True:
            try:
                next(threads)
            except StopIteration as end:
                return all(end.value)
            if anywhere((self._folder / STOP).exists(), self._device):
                self._leaving.set()
            time.sleep(PAUSE)

    # --- what has come ------------------------------------------------------------------------------------------

    def _fetch(self, number: int, path: Path) -> bool:
        """Write a round into a file that the node's processes map, as soon as it is complete."""
        if not self._first_of_node:
            return True
        markers = self._await(number)
        if markers is None:
            return False
        temporary = path.with_suffix(".new")
        write_round(self._scored, markers, temporary)
        temporary.rename(path)
        return True

    def _await(self, number: int) -> Sequence[RoundMarker] | None:
        """The markers of a round; None if SIGTERM comes first."""
        try:
            return await_round(self._scored, number, self._refuse_to_wait)
        except Interrupted:
            return None

    def _refuse_to_wait(self) -> None:
        if self._leaving.is_set():
            raise Interrupted("SIGTERM")

    def _open(self, path: Path) -> None:
        """Lay out the round's examples by its steps, in the order in which a step has them."""
        sampled = Sampled(path, self._job.work.top_k or 0)
        keys, parts = self.rounds.keys, list[tuple[Sampled | Scored, int]]()
        assert self._number is not None
        self._batches = {}
        for step in self.rounds.steps(self._number):
            first, asked = len(parts), set(self.rounds.sampled(step))
            for index in self.rounds.schedule.batch(step):
                if index not in asked:
                    assert isinstance(self._stored, Scored)
                    parts.append((self._stored, index))
                elif (place := sampled.places.get((*keys[index], step))) is not None:
                    parts.append((sampled, place))
            self._batches[step] = list(range(first, len(parts)))
        self.examples = Mixed(parts)
        log.info("round %d of %d: %d samples", self._number + 1, self.rounds.count, len(sampled.places))

    # --- what is handed on ----------------------------------------------------------------------------------------

    def _is_asked_for(self, number: int) -> bool:
        """Whether the weights of a round are still wanted: they are not stored, and it has not been sampled. The first
        process knows it."""
        if dist.get_rank() != 0:
            return True
        return self._own.round(number) is None and self._scored.round(number) is None

    def _upload(self, number: int, source: Path, started: str) -> bool:
        if dist.get_rank() != 0:
            return True
        parts = []
        for path in sorted(source.iterdir()):
            name = f"{weights_of(number)}{path.name}"
            self._own.bucket.upload(path, self._own.key(name))
            parts.append(Part(key=name, sha256=file_sha256(path)))
        marker = RoundMarker(
            stage=self._own.stage,
            digest=self._own.digest,
            parts=tuple(parts),
            started=started,
            completed=now(),
            facts=StageFacts(digest=self._own.digest),
            shard=0,
            shards=1,
            round=number,
        )
        self._own.mark_round(marker)
        shutil.rmtree(source)
        log.info("the weights of round %d are stored", number + 1)
        return True

    def _delete_weights(self, before: int) -> None:
        """Delete the weights of the rounds before one: a round that is scored needs none, and this one may be the first
        that a program reads which has just been started again."""
        if dist.get_rank() != 0:
            return
        prefix = self._own.key(WEIGHTS)
        old = [one.key for one in self._own.bucket.list(prefix) if int(one.key.removeprefix(prefix)[:5]) < before]
        for number in sorted({int(key.removeprefix(prefix)[:5]) for key in old}):
            self._own.forget_round(number)  # the markers first: they must not promise what is going
        for key in old:
            self._own.bucket.delete(key)

    @property
    def _first_of_node(self) -> bool:
        return bool(dist.get_rank() == self._job.first_rank)
