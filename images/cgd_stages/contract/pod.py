"""What a pod finds in its environment and what it says: exit codes, progress, last words."""

from enum import IntEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from cgd_stages.contract.base import Contract

TASK = "CGD_TASK"
"""Environment variable: the task, as JSON."""
INPUTS = "CGD_INPUTS"
"""Environment variable: the folder where `configmap://name/key` is mounted as `name/key`."""
SCRATCH = "CGD_SCRATCH"
"""Environment variable: a writable folder that lives as long as the pod (model cache, checkpoints on their way)."""
MODEL_CACHE = "CGD_MODEL_CACHE"
"""Environment variable: the folder where the stage `fetch` keeps models for all pods; only it may write there."""
TERMINATION_LOG = "CGD_TERMINATION_LOG"
"""Environment variable: the file that receives the last words."""
TEACHER_API_KEY = "CGD_TEACHER_API_KEY"
"""Environment variable: the key of the teacher's endpoint. Never logged, never part of a digest."""
PROGRESS_URL = "KUBEFLOW_TRAINER_SERVER_URL"
"""Environment variable: the URL that takes `Progress`. Kubeflow Trainer gives this and the next two their names."""
PROGRESS_CA = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
"""Environment variable: the path of the PEM file that verifies the progress server's certificate, if it uses TLS."""
PROGRESS_TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # noqa: S105
"""Environment variable: the path of the file that holds the bearer token; every report reads it anew."""

LAST_WORDS_LIMIT = 4096
"""Kubernetes keeps so many bytes of a termination message."""


class Exit(IntEnum):
    """What a program's exit code tells the controllers. They retry every code that is not listed."""

    DONE = 0
    PERMANENT = 3
    """The user must change something; a retry would fail the same way."""
    RETRY = 201
    """Worth another try. Above 127, because a PyTorchJob takes 1-127 as permanent."""
    INTERRUPTED = 143
    """SIGTERM: all finished work is stored."""


MOST = 10**15
"""The largest number that a pod may report, so that a sum over pods and stages fits in 64 bits."""
Count = Annotated[int, Field(ge=0, le=MOST)]
Measure = Annotated[float, Field(ge=0, le=MOST)]
"""The bounds refuse infinity and NaN."""


class Rows(Contract):
    """The rows of a stage or of one shard: total = done + rejected at its end."""

    total: Count = 0
    done: Count = 0
    rejected: Count = 0


CHECKPOINT_BYTES = "checkpoint_bytes"
"""A metric in prepare's last words: the bytes of a checkpoint on the node that stores the largest part."""
STUDENT_BYTES, TEACHER_BYTES = "student_bytes", "teacher_bytes"
"""Metrics in prepare's last words: the bytes of the models' weights as they are stored."""
ACCURACY = "_accuracy"
"""How the name of a metric ends that is the share of right answers on a benchmark."""
LENGTH = "length_to_"
"""A metric's name is this prefix and a power of two. Its value is the number of examples with at most so many tokens
and more than half as many."""


class StageFacts(Contract):
    """What a program reports of a stage, or of its shard of the stage, at the end."""

    rows: Rows = Rows()
    prompt_tokens: Count = 0
    generated_tokens: Count = 0
    seconds: Measure = 0.0
    digest: str = ""
    output_uri: str = Field(default="", alias="outputURI")
    metrics: dict[str, float] = Field({})
    """The stage's figures. Names that begin with LENGTH and end in a number are a histogram."""


NO_TRANSFER = "NoTransfer"
"""The error, in last words, of a training that `stopUnless` has ended, and the reason of its run's failure."""


class LastWords(Contract):
    """The termination message of a pod: JSON, at most `LAST_WORDS_LIMIT` bytes."""

    outcome: Literal["done", "failed", "interrupted"]
    stages: dict[str, StageFacts] = Field({})
    error: str = ""
    """The class of the error."""
    message: str = ""
    hint: str = ""
    """Who must act, and what to change."""


class Metric(Contract):
    name: str
    value: str


class TrainerStatus(Contract):
    """The status in the format of Kubeflow Trainer's server, which transformers reports by itself."""

    model_config = ConfigDict(extra="ignore")

    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    estimated_remaining_seconds: Count | None = None
    metrics: tuple[Metric, ...] = ()
    last_updated_time: str | None = None


class RoundOf(Contract):
    """Where a stage is that goes on round by round."""

    number: Count
    """From 1."""
    of: Count
    waits_for: Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9.-]+$")] | None = None
    """The stage whose part in the round is not there yet; None: it is at work."""


class Progress(Contract):
    """The body of a progress report. Transformers' reports name no stage; they count for the child's first stage."""

    trainer_status: TrainerStatus
    stage: str | None = None
    shard: Annotated[int, Field(ge=0)] = 0
    rows: Rows | None = None
    tokens_per_second: Measure | None = None
    round: RoundOf | None = None


class ProgressAnswer(Contract):
    """The operator's answer to a report."""

    next_report_seconds: float = 0
    """The program sends its next report after so many seconds, or when a stage begins or ends."""
