"""`status`: what the operator answers."""

from typing import Literal

from pydantic import Field

from cgd_stages.contract import Contract, StageName


class Rows(Contract):
    total: int = 0
    done: int = 0
    rejected: int = 0


StageState = Literal["Pending", "Waiting", "Running", "Suspended", "Succeeded", "Failed"]


class PodAttempts(Contract):
    name: str
    uid: str = ""
    """Of the pod that was counted last; empty: the next one is no new attempt."""
    owner: str = ""
    """The uid of the PyTorchJob: one that is made anew begins to count anew."""
    excused: bool = False
    """It may fail by no fault of its own: the next one is no new attempt."""
    attempts: int


class StageStatus(Contract):
    name: StageName
    state: StageState = "Pending"
    reason: str | None = None
    message: str | None = None
    child: str | None = None
    start_time: str | None = Field(None, json_schema_extra={"format": "date-time"})
    completion_time: str | None = Field(None, json_schema_extra={"format": "date-time"})
    attempts: int = Field(0, description="The highest number of starts of any of the pods.")
    pod_attempts: tuple[PodAttempts, ...] = Field(
        (),
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="How often each pod of a PyTorchJob was made: it is made again under the same name.",
    )
    rows: Rows | None = None
    tokens_per_second: int | None = None
    percent: int | None = None
    eta_seconds: int | None = None
    gpu_seconds: int = Field(
        0, description="The time of all its pods, each from when a node takes it to its end, times its GPUs."
    )
    pod_gpu_seconds: dict[str, int] = Field(
        {},
        json_schema_extra={"x-kubernetes-map-type": "atomic"},
        description="gpuSeconds of each pod, by its uid. When many pods are gone, some of them are left out.",
    )
    tokens: int = Field(0, description="How many tokens the stage has read and written.")
    accuracy: str | None = Field(
        None,
        description="Of a stage that evaluates: the share of right answers, the mean of its benchmarks, such as 43.8%.",
    )
    round: str | None = Field(
        None,
        description="Of a stage that goes on round by round: in which one it is, and which other stage it waits for, "
        'such as "3 of 12, waits for train-gkd".',
    )
    loss: str | None = Field(None, description="Of a training: the loss of its last step that is known, such as 1.234.")
    output_uri: str | None = Field(None, alias="outputURI")
    digest: str | None = None


class Condition(Contract):
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: str = Field(json_schema_extra={"format": "date-time"})
    observed_generation: int = 0


class Usage(Contract):
    gpu_hours: str = "0"
    tokens: int = 0


class Artifacts(Contract):
    """S3 URIs of what the run has made."""

    quadruples: str | None = None
    checkpoints: dict[str, str] = Field({})
    report: str | None = None


class CGDRunStatus(Contract):
    """What the operator saw last. Derived from the spec and the children every time.

    Five facts are read back, because nothing else in the cluster keeps them: that a run has succeeded, the GPU seconds
    of pods that are gone, the last words of a failed stage, how often the pods of a PyTorchJob were made, and how large
    prepare found checkpoint and models.
    """

    observed_generation: int = 0
    state: str = "New"
    stage: str | None = None
    progress: str | None = None
    eta: str | None = None
    conditions: tuple[Condition, ...] = Field(
        (), json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    )
    stages: tuple[StageStatus, ...] = Field(
        (), json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
    )
    artifacts: Artifacts = Artifacts()
    usage: Usage = Usage()
    checkpoint_bytes: int | None = Field(
        None, description="Of a training, on the node that stores most of it, as prepare has told."
    )
    children_deleted: bool | None = Field(
        None, description="Whether the Jobs and pods of a run that stays are deleted (ttlSecondsAfterFinished)."
    )
    student_bytes: int | None = Field(None, description="Of the student's weights, as prepare has told.")
    teacher_bytes: int | None = Field(None, description="Of the teacher's weights, as prepare has told.")
