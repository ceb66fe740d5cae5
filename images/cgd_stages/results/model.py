"""What is read of a run for its report, as values: its stages, their logs, graded outputs, rows. Pure."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from sys import intern
from typing import Any

from pydantic import Field

from cgd_stages.contract import Contract, RunRef, StageFacts, StageName


class StageRecord(Contract):
    """One stage as its folder tells of it. `facts` is None when the run has no output of the stage."""

    name: StageName
    facts: StageFacts | None = None
    started: str = ""
    """RFC 3339, UTC."""
    completed: str = ""
    rejections: dict[str, int] = Field(default_factory=dict)
    """Reason -> rows."""
    inputs: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """Wall clock from the stage's start to its promise; None when the times are not known."""
        if not (self.started and self.completed):
            return None
        return max(0.0, at(self.completed) - at(self.started))


class Step(Contract):
    """One line of a training's log."""

    step: int
    loss: float = math.nan
    learning_rate: float | None = None
    grad_norm: float | None = None
    supervised_tokens: int | None = None
    supervised_tokens_per_second: float | None = None
    tokens_per_second: float | None = None
    validation_loss: float | None = None
    """Where it was measured: after every so many steps and after the last."""
    mfu: float | None = None
    """Share of the devices' peak, a fraction of 1; None where the peak is not known."""
    peak_memory_bytes: float | None = None


Key = tuple[str, str, int]
"""Of an output: benchmark, id of the question, sample."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One graded output of an evaluated model, without its texts: of these there may be hundreds of thousands."""

    benchmark: str
    id: str
    sample: int
    asked: str
    """Hash of the prompt and the reference."""
    finish_reason: str
    tokens: int
    answer_source: str
    correct: bool
    grade_error: str = ""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Sample":
        """Of a row that evaluate has stored. Strings that come again and again are kept once."""
        asked = hashlib.sha256(f"{row['prompt']}\0{row['reference']}".encode()).hexdigest()[:32]
        return cls(
            benchmark=intern(row["benchmark"]),
            id=intern(row["id"]),
            sample=row["sample"],
            asked=intern(asked),
            finish_reason=intern(row["finish_reason"]),
            tokens=row["tokens"],
            answer_source=intern(row["answer_source"]),
            correct=row["correct"],
            grade_error=intern(row["grade_error"]),
        )

    @property
    def key(self) -> Key:
        return self.benchmark, self.id, self.sample

    @property
    def question(self) -> tuple[str, str]:
        return self.benchmark, self.id


Evaluations = dict[str, tuple[Sample, ...]]
"""Label of the model (`base`, `cgd`) -> its graded outputs."""


class Quadruple(Contract):
    """A row that training learns from; texts may have been cut for display."""

    id: str
    sample: int
    prompt: str
    reference: str
    answer: str
    critique: str
    refinement: str
    verdict: str
    """right, wrong or missing."""
    tokens: dict[str, int]
    """Text -> its tokens."""
    draft_right: bool | None = None
    """What the grader says of the answer; None where there is no reference to hold it against, or no decision."""
    refinement_right: bool | None = None


class Quadruples(Contract):
    total: int
    verdicts: dict[str, int]
    """Over all rows, not only those shown."""
    shown: tuple[Quadruple, ...]


class Said(Contract):
    """What a model said, and what the grader took as its answer."""

    output: str
    extracted: str
    correct: bool


class Change(Contract):
    """A question that training fixed or broke, with outputs that show it."""

    benchmark: str
    id: str
    trained: str
    kind: str
    """fixed or broken."""
    prompt: str
    reference: str
    base: Said
    after: Said


class Rejected(Contract):
    """A row that a stage could not use."""

    id: str
    sample: int
    stage: str
    reason: str
    detail: str
    prompt: str = ""
    """Empty where the row has none, as some that prepare has read."""


class ReportData(Contract):
    """Everything that the report is made of."""

    run: RunRef
    spec: str
    stages: tuple[StageRecord, ...]
    training: dict[str, tuple[Step, ...]] = Field(default_factory=dict)
    """Stage -> its log, in order of steps."""
    evaluations: Evaluations = Field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    """Some of the questions that training fixed or broke, in the order of `changed`."""
    quadruples: Quadruples | None = None
    rejected: tuple[Rejected, ...] = ()
    """Some of the rejected rows of each stage and reason."""


def at(time: str) -> float:
    """Seconds since the epoch of an RFC 3339 time."""
    return datetime.fromisoformat(time).timestamp()
