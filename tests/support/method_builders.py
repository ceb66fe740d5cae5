"""Builders for the tests of methods: stored log-probabilities, and plain loops to compare with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from cgd_stages.chat.example import Example
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import RunRef, StageFacts, Supervised, Train
from cgd_stages.method.examples import row_example
from cgd_stages.method.pairs import Pair, pair
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS, Folder
from cgd_stages.store.rows import Row, digest_of, now
from cgd_stages.store.run import RunStore
from cgd_stages.training.batching import Schedule, learning_rate
from cgd_stages.training.scores import SCORES_SCHEMA, text_digest
from support.stage_builders import RUN

Loss = Callable[[Any, Sequence[int]], torch.Tensor]
"""The mean loss of a model over the examples of these indices."""


def logits_of(model: Any, ids: Sequence[int], start: int) -> torch.Tensor:
    """Of the positions that predict the tokens from `start` on."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0, start - 1 : -1]
    return logits


def logprob(model: Any, ids: Sequence[int], start: int) -> torch.Tensor:
    """The log-probability of a text below its context."""
    found = logits_of(model, ids, start).log_softmax(-1)
    return found.gather(-1, torch.tensor(ids[start:])[:, None]).sum()


def pairs_of(model: Path, rows: Sequence[Row], work: Train) -> list[Pair]:
    template = ChatTemplate.load(model)
    found = [pair(template, row, max_length=work.max_sequence_length) for row in rows]
    return [one for one in found if isinstance(one, Pair)]


def plain_dpo(model: Any, start: Any, pairs: Sequence[Pair], beta: float) -> torch.Tensor:
    """By the paper's equation 7, a pair at a time: the mean."""
    total = torch.zeros(())
    for one in pairs:
        with torch.no_grad():
            before = [logprob(start, ids, one.start) for ids in (one.input_ids, one.rejected)]
        gain, loss = (
            logprob(model, ids, one.start) - reference
            for ids, reference in zip((one.input_ids, one.rejected), before, strict=True)
        )
        total = total - logsigmoid(beta * (gain - loss))
    return total / len(pairs)


def trained_plainly(
    model: Path, work: Train, lengths: Sequence[int], loss: Loss
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps and the final weights of a plain loop with AdamW; `lengths` are the schedule's."""
    torch.set_num_threads(1)
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    schedule = Schedule(lengths, work.global_batch_size, work.epochs, work.seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, weight_decay=work.weight_decay)
    losses = []
    for step in range(schedule.steps):
        rate = learning_rate(step, steps=schedule.steps, peak=work.learning_rate, warmup_ratio=work.warmup_ratio)
        optimizer.param_groups[0]["lr"] = rate
        value = loss(student, schedule.batch(step))
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses, {name: tensor.detach() for name, tensor in student.named_parameters()}


def examples_of(model: Path, rows: Sequence[Row], objective: Supervised, max_length: int) -> list[Example]:
    template = ChatTemplate.load(model)
    return [row_example(template, objective, row, max_length=max_length) for row in rows]


def scored(
    bucket: Bucket,
    stage: str,
    examples: dict[tuple[str, int], Example],
    top: Callable[[Example], tuple[torch.Tensor, torch.Tensor]],
    run: RunRef = RUN,
) -> Folder:
    """A finished stage with the log-probabilities of these examples' targets. `top` gives the ids and log-probabilities
    of an example's likeliest tokens, (positions, K) by rank."""
    rows = []
    for (identity, sample), one in sorted(examples.items()):
        ids, logprobs = top(one)
        tokens = one.input_ids[one.start :]
        row = {"id": identity, "sample": sample, "text": text_digest(tokens), "tokens": tokens}
        row |= {"logprobs": np.zeros(len(tokens), np.float32), "top_ids": ids.numpy().astype(np.int32).ravel()}
        rows.append(row | {"top_logprobs": logprobs.detach().numpy().astype(np.float16).ravel()})
    folder = Folder(bucket, run.namespace, stage, digest_of(stage=stage, rows=[row["text"] for row in rows]))
    facts = StageFacts.model_validate({"rows": {"total": len(rows), "done": len(rows)}})
    parts = [folder.put_rows(PARTS, rows, SCORES_SCHEMA)]
    RunStore(bucket, run).point_at(folder.finish(facts=facts, parts=parts, started=now(), inputs={}))
    return folder
