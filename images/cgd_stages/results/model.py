"""The values that are read of a run for its report: its stages, their logs, graded outputs, rows. Pure."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from sys import intern
from typing import Any

from pydantic import Field

from cgd_stages.contract import Chat, Contract, Learned, Removal, RunRef, StageFacts, StageName
from cgd_stages.results.published import PublishedTable
from cgd_stages.store.maker import MADE_BY


class StageRecord(Contract):
    """A stage, read from its folder. `facts` is None if the run has no output of the stage."""

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
    def made(self) -> dict[str, Any]:
        """The run and the versions that made the output; empty for one of an earlier version. See `store.maker`."""
        made = self.settings.get(MADE_BY)
        return made if isinstance(made, dict) else {}

    @property
    def seconds(self) -> float | None:
        """The time from the stage's start to its promise; None if one of them is unknown."""
        if not (self.started and self.completed):
            return None
        return max(0.0, at(self.completed) - at(self.started))


class Step(Contract):
    """A line of a training's log."""

    step: int
    loss: float = math.nan
    router_loss: float | None = None
    """Of a mixture of experts, the mean over examples; None for a dense model."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    supervised_tokens: int | None = None
    supervised_tokens_per_second: float | None = None
    tokens_per_second: float | None = None
    validation_loss: float | None = None
    """On held-out rows, in the objective's own context; None if it was not measured after this step."""
    bare_validation_loss: float | None = None
    """On the same rows, given the prompt alone; None where that is the objective's own context."""
    early_accuracy: float | None = None
    """The share of the early questions that the student answers right after this step; None if none was asked."""
    early_accuracy_before: float | None = None
    """The same before the training."""
    early_questions: int | None = None
    """How many were asked."""
    mfu: float | None = None
    """The share of the devices' peak, a fraction of 1; None if the peak is unknown."""
    peak_memory_bytes: float | None = None


UNFINISHED_THOUGHT = "unfinished_thought"
"""The answer source of an output whose thought never ended, and the reason why generation rejects such a reply."""
Key = tuple[str, str, int]
"""The key of an output: benchmark, id of the question, sample."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A graded output of an evaluated model, without its texts, because there may be hundreds of thousands."""

    benchmark: str
    id: str
    sample: int
    asked: str
    """A hash of the prompt and the reference."""
    finish_reason: str
    tokens: int
    answer_source: str
    correct: bool
    grade_error: str = ""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Sample":
        """The sample in a row that evaluate has stored. Equal strings share memory."""
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
"""The model's label (`base`, `cgd`) -> its graded outputs."""


class Quadruple(Contract):
    """A row that training learns from. Its texts may be cut for display."""

    id: str
    sample: int
    prompt: str
    reference: str
    answer: str
    critique: str
    refinement: str
    answer_thinking: str = ""
    critique_thinking: str = ""
    refinement_thinking: str = ""
    verdict: str
    """right, wrong or missing."""
    tokens: dict[str, int]
    """Text -> its tokens."""
    draft_right: bool | None = None
    """The grade of the answer; None without a reference or a decision of the grader."""
    refinement_right: bool | None = None


class Quadruples(Contract):
    total: int
    verdicts: dict[str, int]
    """Verdict -> rows, over all rows."""
    shown: tuple[Quadruple, ...]


class GradedOutput(Contract):
    """A model's output, and the answer that the grader found in it."""

    output: str
    thinking: str | None = None
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
    base: GradedOutput
    after: GradedOutput


class AuditCounts(Contract):
    """The audited outputs of a model on a benchmark, by who calls them right: the grader, lm-eval, both or neither."""

    benchmark: str
    model: str
    both_right: int
    both_wrong: int
    lm_eval_alone: int
    grader_alone: int
    unboxed: int
    """The outputs without a box, of which lm-eval compares the whole text, or what stands between dollar signs."""

    @property
    def outputs(self) -> int:
        return self.both_right + self.both_wrong + self.lm_eval_alone + self.grader_alone


class Disagreement(Contract):
    """An audited output about which the grader and lm-eval disagree."""

    benchmark: str
    model: str
    id: str
    sample: int
    reference: str
    output: str
    extracted: str
    """Of long texts the end."""
    rule: str
    """The grader's; empty where it found no answer to compare."""
    boxed: bool
    """Whether lm-eval finds a box in the output."""
    correct: bool
    """The grader's verdict; lm-eval's is the other."""


class Audit(Contract):
    """Some outputs of every benchmark and model, judged again by lm-eval."""

    judge: str
    """lm-eval and its version."""
    counts: tuple[AuditCounts, ...]
    disagreements: tuple[Disagreement, ...]
    """Those that lm-eval alone calls right come first, and outputs with a box before those without."""


class Paraphrased(Contract):
    """A benchmark's question that texts of the run's rows say much of in other words; see `quality.paraphrases`."""

    benchmark: str
    question: str
    """The question's id."""
    rows: int
    """Rows with such a text."""
    id: str
    """Of the row with the closest text."""
    sample: int
    text: str
    """The column of the closest text: prompt, reference or refinement."""
    similarity: float
    """The share of the question's word triples that it has."""


class Decontamination(Contract):
    """What the run has looked for, and found, of the benchmarks in what it learns from."""

    paraphrases: Removal
    similarity: float
    compared: tuple[str, ...]
    """The names of the benchmarks and tasks whose questions were compared."""
    unchecked: dict[str, str] = Field(default_factory=dict)
    """Task of lm-eval -> why its questions could not be compared."""
    prepare_rows: int
    """The prompts that prepare has found; with `remove` they are rejected."""
    check_rows: int
    """The rows that check has found; with `remove` no training learns them."""
    questions: tuple[Paraphrased, ...] = ()
    """Those that the rows of check paraphrase."""


MASKED = "masked.json"
"""Check stores here a list of `Masked`, one for each training."""


class Masked(Contract):
    """A training example as text: the student reads the context and learns the target."""

    stage: StageName
    """The training's."""
    title: str
    """What people call the training, and `cgd rows --mask`."""
    id: str
    sample: int
    context: str
    target: str
    context_tokens: int
    target_tokens: int


class Rejected(Contract):
    """A row that a stage could not use."""

    id: str
    sample: int
    stage: str
    reason: str
    detail: str
    prompt: str = ""
    """Empty if the row has none, like some rows that prepare rejects."""


class ReportData(Contract):
    """The data of the report."""

    run: RunRef
    spec: str
    student_chat: Chat = Chat()
    """The student's in answer, training and evaluation."""
    teacher_chat: Chat = Chat()
    thinking: Learned = "drop"
    stages: tuple[StageRecord, ...]
    training: dict[str, tuple[Step, ...]] = Field(default_factory=dict)
    """Stage -> its log, in the order of the steps."""
    evaluations: Evaluations = Field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    """Some of the questions that training fixed or broke, in the order of `changed`."""
    audit: Audit | None = None
    published: tuple[PublishedTable, ...] = ()
    """Those about the run's student."""
    decontamination: Decontamination | None = None
    """None: the run does not look for paraphrases, or check has not ended."""
    quadruples: Quadruples | None = None
    masked: tuple[Masked, ...] = ()
    """An example of each training, where check has stored any."""
    rejected: tuple[Rejected, ...] = ()
    """Some of the rejected rows of each stage and reason."""


def at(time: str) -> float:
    """The seconds from the epoch to an RFC 3339 time."""
    return datetime.fromisoformat(time).timestamp()
