"""The early look: the student in training answers questions in the training's own processes, greedily.

transformers generates, because the weights are here: vLLM would need a second copy of them, and a GPU of its own. Each
rank asks its share. Where ZeRO-3 has spread the weights they are gathered once, if every GPU has room for them; else
layer by layer for each token, which is slow between nodes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.grading.grader import Grader
from cgd_stages.train import student
from cgd_stages.training.early import EarlyQuestion
from cgd_stages.training.job import Job

SPARE = 1.25
"""Weights are gathered where the free memory is this many times their bytes: the cache needs some of it."""


@dataclass(frozen=True)
class Reply:
    """An output of the student. `cut`: it has reached the most tokens."""

    text: str
    cut: bool
    unfinished_thinking: bool


@dataclass(frozen=True)
class Look:
    """What the student answers: shares of the questions."""

    right: float
    cut: float


class EarlyLook:
    """Asks the questions, and grades the replies in rank 0. All ranks call together.

    The file `stop` ends a look before its time: the grace period after SIGTERM is for a checkpoint.
    """

    def __init__(self, engine: Any, job: Job, questions: Sequence[EarlyQuestion], stop: Path) -> None:
        assert job.work.early is not None
        self._engine, self._job, self._stop = engine, job, stop
        self.questions = questions
        self._template = ChatTemplate.load(Path(job.student), job.work.chat, name=job.work.student.name)

    def __call__(self) -> Look | None:
        """None if it was stopped."""
        replies = self.replies()
        if self._most(self._stop.exists()):
            return None
        right = self._right(replies) if dist.get_rank() == 0 else 0
        total = torch.tensor(right, device=self._engine.device)
        dist.broadcast(total, 0)
        return Look(int(total) / len(replies), sum(reply.cut for reply in replies) / len(replies))

    def replies(self) -> list[Reply]:
        """The replies to all questions, in their order, on every rank."""
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = range(rank, len(self.questions), world)
        batches = self._batches(mine)
        found: dict[int, Reply] = {}
        with torch.no_grad(), _whole(self._engine, self._job) as together:
            # Where the weights are gathered for each token, every rank must ask as many batches as the others.
            for batch in batches + [[]] * (self._most(len(batches)) - len(batches) if together else 0):
                found |= self._ask(batch, together=together)
        everyone: list[dict[int, Reply]] = [{} for _ in range(world)]
        dist.all_gather_object(everyone, found)
        replies = {number: reply for part in everyone for number, reply in part.items()}
        return [replies[number] for number in range(len(self.questions))]

    def _batches(self, mine: Sequence[int]) -> list[list[int]]:
        """Questions that are asked at once, longest first: with their padding and outputs at most as many tokens as a
        micro-batch of the training may have."""
        batches: list[list[int]] = []
        room = 0
        for number in sorted(mine, key=lambda number: -len(self.questions[number].ids)):
            if not batches or len(batches[-1]) == room:
                batches.append([])
                longest = len(self.questions[number].ids)
                room = max(1, self._limit // (longest + self._most_new(longest)))
            batches[-1].append(number)
        return batches

    @property
    def _limit(self) -> int:
        return self._job.work.max_sequence_length

    def _most_new(self, longest: int) -> int:
        """The most new tokens of a batch with a prompt of this length."""
        assert self._job.work.early is not None
        return min(self._job.work.early.max_tokens, self._limit - longest)

    def _ask(self, batch: list[int], *, together: bool) -> dict[int, Reply]:
        """Generate the batch's outputs; without questions one token, in step with the other ranks."""
        from transformers import GenerationConfig, StoppingCriteriaList

        prompts = [self.questions[number].ids for number in batch] or [self.questions[0].ids[:1]]
        longest, stops = max(map(len, prompts)), sorted(self._template.stops)
        # Padded at the left, by any token: the mask hides it.
        ids = torch.tensor([(stops[0],) * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        new = self._most_new(longest) if batch else 1
        model, device = self._engine.module, self._engine.device
        # A model's own generation config may hold more than its stops, such as a penalty that an evaluation has not.
        own, model.generation_config = (
            model.generation_config,
            GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=stops, pad_token_id=stops[0]),
        )
        self._engine.eval()
        try:
            output = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                synced_gpus=together,
                stopping_criteria=StoppingCriteriaList([self._stopped]),
            )
        finally:
            model.generation_config = own
            self._engine.train()
        replies = output[:, longest:].tolist()
        return {number: self._reply(reply, new) for number, reply in zip(batch, replies, strict=bool(batch))}

    def _stopped(self, ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """For every output of a batch, whether it ends here."""
        return torch.full((len(ids),), self._stop.exists(), device=ids.device)

    def _reply(self, ids: list[int], most: int) -> Reply:
        end = next((place + 1 for place, number in enumerate(ids) if number in self._template.stops), None)
        written = ids[:end]
        text = self._template.tokenizer.decode(written, skip_special_tokens=True)
        parts = self._template.split(written, text)
        return Reply(parts.text, end is None and len(ids) == most, parts.unfinished_thinking)

    def _right(self, replies: Sequence[Reply]) -> int:
        right = 0
        with Grader(workers=1) as grader:
            for question, reply in zip(self.questions, replies, strict=True):
                if not reply.unfinished_thinking:
                    grade = grader.grade(question.reference, reply.text, question.tolerance, cut=reply.cut)
                    right += grade.correct
        return right

    def _most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        most = torch.tensor(number, device=self._engine.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)


@contextmanager
def _whole(engine: Any, job: Job) -> Iterator[bool]:
    """Inside, every rank has all weights. The result is whether the ranks must go token by token together, because they
    gather the weights for each: with ZeRO-3, where a GPU has no room for them."""
    if job.work.zero_stage < 3:
        yield False
        return
    parameters = list(engine.module.parameters())
    need = sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)
    free = student.free_memory(engine.device)
    if free is not None and free < SPARE * need:
        yield True
        return
    import deepspeed

    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(parameters):
        # DeepSpeed's hooks would partition each layer after its forward.
        offload._remove_module_hooks()
        try:
            yield False
        finally:
            offload.setup_zero_stage3_hooks()
