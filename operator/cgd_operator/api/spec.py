"""The whole `spec`, and how a manifest is read."""

import json
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from cgd_operator.api.evaluation import Evaluation
from cgd_operator.api.fields import (
    HTTP,
    PLAIN,
    SHAPES,
    GpuHours,
    Image,
    KeyRef,
    NameRef,
    S3Uri,
    Text,
    Uri,
    no_user,
    rules,
    without_user,
)
from cgd_operator.api.generation import Generation, Prompts, Student, Teacher
from cgd_operator.api.placement import Placement
from cgd_operator.api.pods import ModelCache, Pods
from cgd_operator.api.training import Training
from cgd_stages.contract import METHODS, Contract, Name, Positive

SHOWN = 300
"""The most characters of a wrong value in a message. Several conditions of a status repeat the message, and a value may
be as large as the run."""


class InvalidRun(ValueError):
    """A manifest that cannot be run; each line of the text names a field and what to change."""


_BUCKET = "write s3://bucket/prefix, with a bucket's name of 3 or more small letters, digits, dots and hyphens"


class Storage(Contract):
    """The S3 bucket where the run stores everything. The pods use the ServiceAccount's cloud identity, or the keys of a
    Secret."""

    uri: Annotated[S3Uri, Text("^s3://[a-z0-9][a-z0-9.-]+[a-z0-9](/.*)?$", _BUCKET)] = Field(
        description="The folder below which the run stores its data, such as s3://bucket/prefix."
    )
    endpoint: (
        Annotated[
            Uri,
            no_user("storage.credentialsSecretRef"),
            Text(HTTP, f"write the whole URL: https://host:port, {PLAIN}"),
        ]
        | None
    ) = Field(None, description="The URL of an S3 server; default: AWS.")
    region: Name | None = Field(None, description="The bucket's region; default: the AWS SDK's.")
    path_style: bool = Field(
        False, description="Addresses objects as https://host/bucket/key rather than https://bucket.host/key."
    )
    credentials_secret_ref: NameRef | None = Field(
        None, description="A Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if needed, AWS_SESSION_TOKEN."
    )
    ca_bundle_config_map_ref: KeyRef | None = Field(
        None, description="A key of a ConfigMap with the certificate of the server's CA, as PEM."
    )


class Images(Contract):
    """The images of the stage programs; default: those that the operator was released with."""

    generate: Image | None = Field(None, description="The image of every stage but the trainings.")
    train: Image | None = Field(None, description="The image of the trainings.")


class PodMetadata(Contract):
    """Labels and annotations that every pod gets, such as those that a cost report or a mesh reads."""

    labels: dict[str, str] = Field({})
    annotations: dict[str, str] = Field({})


_REFERENCES = "has(self.prompts.fields.reference) || has(self.prompts.fields.messages)"
REFERENCE_RULE = (
    f"!('SFT' in self.training.objectives || self.training.variants.exists(one, one.kind == 'SFT')) || {_REFERENCES}",
    "the objective SFT learns the reference answer: set prompts.fields.reference to the column that has it",
)
RIGHT_RULE = (
    f"(self.training.keep == 'all' && self.generation.refine.select == 'first') || {_REFERENCES}",
    "training.keep and generation.refine.select need references to grade with: set prompts.fields.reference",
)


_NAMES = " || ".join(f"self.evaluation.{kind}.exists(one, one.name == name)" for kind in ("benchmarks", "tasks"))
_KNOWN = f"self.prompts.decontaminate.against.all(name, {_NAMES})"
AGAINST_RULE = (
    f"!has(self.prompts.decontaminate) || (has(self.evaluation) && {_KNOWN})",
    "prompts.decontaminate.against: takes names of evaluation.benchmarks and evaluation.tasks, and there must be some",
)


_MODES = "(self.training.thinking == 'learn') == (self.student.chat.thinking == 'on')"
THINKING_RULE = (
    f"!has(self.training.thinking) || self.student.chat.thinking == 'auto' || {_MODES}",
    "training.thinking: a student is trained as it answers: learn goes with student.chat.thinking on, drop with off",
)


_LEARNS = "(has(self.training.thinking) && self.training.thinking == 'learn')"
BUDGET_RULE = (
    f"!has(self.student.chat.thinkingBudget) || self.student.chat.thinking == 'on' || {_LEARNS}",
    "student.chat.thinkingBudget: this student does not think: leave it out, or set training.thinking to learn",
)


EARLY_RULE = (
    "!has(self.training.stopUnless) || (has(self.evaluation) && has(self.evaluation.early))",
    "training.stopUnless judges by the early questions: set evaluation.early, such as {questions: 64}",
)


_SCORED = tuple(kind for kind, method in METHODS.items() if method.scored_by == "teacher")
SCORED_RULE = (
    f"!self.training.variants.exists(one, one.kind in {list(_SCORED)}) || has(self.teacher.model)",
    (
        f"the kinds {', '.join(_SCORED)} need the teacher's probabilities of texts, which endpoints do not give: set "
        "teacher.model"
    ),
)


LIMIT_RULE = ("has(self.gpuHours) || has(self.deadlineSeconds)", "a budget sets gpuHours, deadlineSeconds or both")


class Budget(Contract):
    """What the run may use. When it is used up, the pods stop and the run has failed. Stored rows stay, and a new run
    with a larger budget goes on from them."""

    model_config = ConfigDict(json_schema_extra=rules(LIMIT_RULE))

    gpu_hours: GpuHours | None = Field(
        None,
        description="The most GPU-hours of all pods, as status.usage.gpuHours counts them: running pods in whole "
        "minutes. With placement.accelerator none nothing is counted.",
    )
    deadline_seconds: Positive | None = Field(
        None,
        description="The most seconds from the run's creation to its end. Time in a queue or while it is suspended "
        "counts.",
    )

    @model_validator(mode="after")
    def _limits_something(self) -> "Budget":
        if self.gpu_hours is None and self.deadline_seconds is None:
            raise ValueError(LIMIT_RULE[1])
        return self


class CGDRunSpec(Contract):
    """One run of Critique-Guided Distillation."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            AGAINST_RULE, REFERENCE_RULE, RIGHT_RULE, THINKING_RULE, BUDGET_RULE, EARLY_RULE, SCORED_RULE
        )
    )

    MUTABLE: ClassVar[frozenset[str]] = frozenset(
        {"suspend", "ttl_seconds_after_finished", "deletion_policy", "replace_lost_pods_after_seconds"}
    )
    """Fields that may change, and have no part in what a run makes."""

    suspend: bool = Field(
        False,
        description="Stops all pods and starts nothing. Rows that are finished stay. Set it back to false to go on.",
    )
    student: Student
    teacher: Teacher
    prompts: Prompts
    generation: Generation = Generation()
    training: Training = Training()
    evaluation: Evaluation | None = None
    storage: Storage
    placement: Placement = Placement()
    images: Images = Images()
    service_account_name: Name | None = Field(None, description="The ServiceAccount of the stage pods.")
    hub_token_secret_ref: KeyRef | None = Field(
        None, description="The key of a Secret that holds a Hugging Face token, for gated models."
    )
    pod_metadata: PodMetadata = PodMetadata()
    pods: Pods = Pods()
    model_cache: ModelCache | None = None
    budget: Budget | None = None
    ttl_seconds_after_finished: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        description="The run is deleted, with its Jobs and pods, so long after it has succeeded or failed. "
        "deletionPolicy decides on what it stored. A run that Argo CD, Flux or Helm applies stays, because they would "
        "make it again: of one that has succeeded the Jobs and pods are deleted. Default: never. You may change this "
        "at any time.",
    )
    deletion_policy: Literal["Retain", "Delete"] = Field(
        "Retain",
        description="What becomes of the stored data when the run is deleted. Retain keeps it; Delete deletes what no "
        "other run claims. You may change this at any time.",
    )
    replace_lost_pods_after_seconds: int | None = Field(
        None,
        ge=60,
        le=2**31 - 1,
        description="Replaces a pod whose node is lost, so long after the pod should have ended and has not. The "
        "operator needs the right to do so (lostPods.replace in its chart). Default: an admin sees to the node. You "
        "may change this at any time.",
    )
    retries: int = Field(
        3, ge=0, le=100, description="How often a failed pod is tried again. Preemptions do not count."
    )

    @model_validator(mode="after")
    def _across_fields(self) -> "CGDRunSpec":
        evaluation = self.evaluation
        known = {benchmark.name for benchmark in evaluation.benchmarks} if evaluation else set()
        known |= {task.name for task in evaluation.tasks} if evaluation else set()
        if self.prompts.decontaminate and not (known and known.issuperset(self.prompts.decontaminate.against)):
            raise ValueError(AGAINST_RULE[1])
        learned, thinks = self.training.thinking, self.student.chat.thinking
        if learned and thinks != "auto" and (learned == "learn") != (thinks == "on"):
            raise ValueError(THINKING_RULE[1])
        if self.student.chat.thinking_budget and learned != "learn" and thinks != "on":
            raise ValueError(BUDGET_RULE[1])
        drawn = [f"generation.{name}" for name in ("refine", "distill") if getattr(self.generation, name).samples > 1]
        if drawn and self.teacher.endpoint and (same := _same_for_all_draws(self.teacher.endpoint.extra_body)):
            raise ValueError(
                f"teacher.endpoint.extraBody: its {' and '.join(same)} would make all samples of {' and '.join(drawn)} "
                "the same: leave it out, or set samples to 1"
            )
        if self.training.stop_unless and not (self.evaluation and self.evaluation.early):
            raise ValueError(EARLY_RULE[1])
        if self.training.kinds.intersection(_SCORED) and not self.teacher.model:
            raise ValueError(SCORED_RULE[1])
        fields = self.prompts.fields
        if fields.reference is None and fields.messages is None:
            if "SFT" in self.training.kinds:
                raise ValueError(REFERENCE_RULE[1])
            if self.training.keep != "all" or self.generation.refine.select != "first":
                raise ValueError(RIGHT_RULE[1])
        return self


def _same_for_all_draws(extra_body: dict[str, Any]) -> list[str]:
    """The fields of every request, which win over what the run would send, that leave nothing to chance."""
    greedy = ["temperature"] if extra_body.get("temperature") in (0, "0") else []
    return greedy + (["seed"] if extra_body.get("seed") is not None else [])


def parse_spec(manifest: dict[str, Any]) -> CGDRunSpec:
    """The spec of a manifest.

    Raises:
        InvalidRun: a line for every wrong field, with its path and what to change.
    """
    try:
        text = json.dumps(manifest.get("spec", {}))
        return CGDRunSpec.model_validate_json(text, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidRun(without_user("\n".join(map(_mend, _causes(error))))) from error


def readable_spec(manifest: dict[str, Any]) -> CGDRunSpec | None:
    """The parts of a spec that another version has accepted and this one can read, without the fields in them that it
    does not know; for what needs no more than storage and placement. None: the storage is not among them."""
    given: dict[str, Any] = manifest.get("spec") or {}
    parts: dict[str, Any] = {"teacher": Teacher.model_construct()}
    for name, field in CGDRunSpec.model_fields.items():
        kind, text = TypeAdapter[Any](field.annotation or Any), json.dumps(given.get(field.alias or name))
        with suppress(ValidationError):
            parts[name] = kind.validate_json(text, strict=True, extra="ignore")
    return CGDRunSpec.model_construct(**parts) if "storage" in parts else None


def _causes(error: ValidationError) -> list[Any]:
    """Without what only follows from another error: pydantic counts a wrong item of a list as a missing one."""
    errors = error.errors()
    return [
        one
        for one in errors
        if one["type"] != "too_short" or not any(_is_within(other["loc"], one["loc"]) for other in errors)
    ]


def _is_within(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _mend(error: Any) -> str:
    path = ".".join(["spec", *(str(part) for part in error["loc"])])
    value, shown = error["input"], repr(error["input"])
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}\u2026"
    match error["type"]:
        case "extra_forbidden":
            parent = ".".join(["spec", *(part for part in error["loc"][:-1] if isinstance(part, str))])
            return f"{path}: there is no such field; `kubectl explain cgdrun.{parent}` lists those there are"
        case "missing":
            return f"{path}: is required"
        case "string_type" if isinstance(value, bool):
            return f"{path}: is true or false; write it in quotes: {json.dumps(json.dumps(value))}"
        case "string_type" if isinstance(value, int | float):
            return f"{path}: is a number; write it in quotes: {json.dumps(json.dumps(value))}"
        case "literal_error" if isinstance(value, bool) and "'on'" in error["ctx"]["expected"]:
            return f'{path}: write it in quotes: "{"on" if value else "off"}"'
        case "string_pattern_mismatch" if error["ctx"]["pattern"] in SHAPES:
            return f"{path}: {SHAPES[error['ctx']['pattern']]} (it is {shown})"
        case "value_error":
            return f"{path}: {error['ctx']['error']}"
        case _:
            return f"{path}: {error['msg']} (it is {shown})"
