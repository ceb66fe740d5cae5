"""Plays the programs rollout and score for a training in a test: samples and scores a round when it is waited for."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cgd_stages.chat.example import Example
from cgd_stages.contract import StageFacts
from cgd_stages.store.folder import PARTS, Folder, RoundMarker
from cgd_stages.store.rows import Row, now
from cgd_stages.train.rounds import RoundsInTurn
from cgd_stages.training.rollouts import SCORED_ROLLOUT_SCHEMA
from cgd_stages.training.rounds import Rounds
from support.method_builders import logits_of


class RoundPlayer:
    """`start`, `teacher`: folders of models; `examples`: those that the training learns, in the order of their keys."""

    def __init__(
        self, start: Path, teacher: Path, examples: Sequence[Example], scratch: Path, *, top_k: int = 0, most: int = 6
    ) -> None:
        self._start, self._teacher = start, AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        self._examples, self._scratch, self._top_k, self._most = examples, scratch, top_k, most
        self.rows: dict[int, list[Row]] = {}
        """What it has stored, by round."""
        self.unsampled: set[tuple[int, int]] = set()
        """Steps and indices of examples that are left out."""

    @contextmanager
    def playing(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Whenever a training in this process looks for a round, it is there, made of the weights that the training has
        stored."""
        look = RoundsInTurn._await

        def play(waiting: RoundsInTurn, number: int) -> Any:
            self.play(waiting.rounds, waiting._own, waiting._scored, number)
            return look(waiting, number)

        with monkeypatch.context() as patched:
            patched.setattr(RoundsInTurn, "_await", play)
            yield

    def play(self, rounds: Rounds, own: Folder, scored: Folder, number: int) -> None:
        """Store a round that is not there yet. `own`: the training's folder; `scored`: that of the scored samples."""
        if scored.round(number) is not None:
            return
        student = AutoModelForCausalLM.from_pretrained(self._weights(own, number), dtype=torch.float32)
        rows = []
        for step, index in rounds.asked(number):
            if (step, index) in self.unsampled:
                continue
            (identity, sample), one = rounds.keys[index], self._examples[index]
            sampled = self._sampled(student, list(one.input_ids[: one.start]), step)
            rows.append({"id": identity, "sample": sample, "step": step} | sampled)
        mark(scored, number, scored.put_rows(PARTS, rows, SCORED_ROLLOUT_SCHEMA))
        self.rows[number] = rows

    def _weights(self, own: Folder, number: int) -> Path:
        """Those of the round, which the training has stored."""
        if number == 0:
            return self._start
        [marker] = own.round(number) or []
        target = self._scratch / f"weights-{number}"
        target.mkdir(parents=True, exist_ok=True)
        for part in marker.parts:
            (target / Path(part.key).name).write_bytes(own.read(part))
        return target

    @torch.no_grad()
    def _sampled(self, student: Any, context: list[int], step: int) -> Row:
        seed = hashlib.sha256(repr((step, context)).encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed))
        ids, finish = list(context), "length"
        while len(ids) < len(context) + self._most:
            likely = student(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
            ids.append(int(torch.multinomial(likely, 1, generator=generator)))
            if ids[-1] == student.config.eos_token_id:
                finish = "stop"
                break
        sampled, start = torch.tensor(ids[len(context) :])[:, None], len(context)
        own, theirs = (logits_of(model, ids, start).log_softmax(-1) for model in (student, self._teacher))
        top = theirs.topk(self._top_k) if self._top_k else None
        return {
            "input_ids": ids,
            "start": start,
            "logprobs": own.gather(-1, sampled)[:, 0].numpy(),
            "finish": finish,
            "teacher_logprobs": theirs.gather(-1, sampled)[:, 0].numpy(),
            "top_ids": top.indices.numpy().astype(np.int32).ravel() if top else [],
            "top_logprobs": top.values.numpy().astype(np.float16).ravel() if top else [],
        }


def mark(folder: Folder, number: int, *parts: Any) -> None:
    marker = RoundMarker(
        stage=folder.stage, digest=folder.digest, parts=parts, started=now(), completed=now(),
        facts=StageFacts(), shard=0, shards=1, round=number,
    )  # fmt: skip
    folder.mark_round(marker)


def other_model(model: Path, folder: Path, *, by: float = 0.05) -> Path:
    """Another model with the tokenizer of this one, whose weights are moved at random."""
    moved = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    folder.mkdir(parents=True)
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    moved.save_pretrained(folder)
    return folder
