"""`CGDRun`, version `cgd.dev/v1alpha1`: what a user writes and what the operator answers.

Written once, here: `crds/` is generated from these models (`make crds`), with their defaults, limits and CEL rules.
There are no floats (a custom resource must compare equal after any number of round trips), so fractions are strings:
`learningRate: "1e-6"`. Everything but `suspend`, `ttlSecondsAfterFinished` and `deletionPolicy` is immutable; rows that
are stored are reused by the next run.
"""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function

from cgd_operator.benchmarks import BENCHMARKS
from cgd_stages.contract import CritiqueKind, Objective

GROUP, VERSION = "cgd.dev", "v1alpha1"

Rule = dict[str, str]
"""One of `x-kubernetes-validations`: rule, message, fieldPath?, reason?"""


class InvalidRun(ValueError):
    """A manifest that cannot be run; each line of the text names a field and what to change."""


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules for a schema, as (rule, message) pairs."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


@dataclass(frozen=True)
class Between:
    """Bounds of a number that is written as a string: for CEL in the CRD, for pydantic here."""

    low: float
    high: float
    open_low: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        bounds = f"double(self) {'>' if self.open_low else '>='} {self.low:.1f} && double(self) <= {self.high:.1f}"
        return {**handler(core), **rules((bounds, self.text))}

    @property
    def text(self) -> str:
        low = f"above {self.low:g} and at most" if self.open_low else f"from {self.low:g} to"
        return f'write a number {low} {self.high:g}, in quotes: "0.5"'

    def check(self, value: str) -> str:
        number = float(value)
        if number > self.high or number < self.low or (self.open_low and number == self.low):
            raise ValueError(self.text)
        return value


Number = Annotated[str, Field(max_length=20, pattern=r"^[0-9]+(\.[0-9]+)?([eE]-?[0-9]+)?$")]
Rate = Annotated[Number, Between(0, 1, open_low=True)]
Fraction = Annotated[Number, Between(0, 1)]
Half = Annotated[Number, Between(0, 0.5)]
GpuHours = Annotated[Number, Between(0, 100_000, open_low=True)]
Temperature = Annotated[Number, Between(0, 2)]
Name = Annotated[str, Field(min_length=1, max_length=253)]
Uri = Annotated[str, Field(min_length=1, max_length=1024)]
Percent = Annotated[str, Field(max_length=8, pattern=r"^(100|[0-9]{1,2}(\.[0-9]+)?)%$")]
Memory = Annotated[str, Field(max_length=8, pattern=r"^[1-9][0-9]{0,4}(Gi|G)$")]
Positive = Annotated[int, Field(ge=1)]
BenchmarkName = Annotated[str, Field(max_length=40, pattern=r"^[A-Za-z0-9]([A-Za-z0-9-]{0,38}[A-Za-z0-9])?$")]

SOURCE = "^(s3://[^/]+/.+|configmap://[^/]+/[^/]+|hf://datasets/[^/]+/[^/]+/.*[^/])$"
SOURCE_RULE = (
    f"self.matches('{SOURCE}')",
    "write s3://bucket/key or hf://datasets/owner/name/path (* allowed in the last part), or configmap://name/key",
)


class Part(BaseModel):
    """Strict and frozen; camelCase on the wire, snake_case in Python. `mends` are checks that CEL makes as well."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)


class KeyRef(Part):
    """A key of a Secret in the run's namespace."""

    name: Name
    key: Name


class NameRef(Part):
    """A Secret or ConfigMap in the run's namespace."""

    name: Name


class ServedModel(Part):
    """How vLLM serves a model. One independent engine per shard, tensor parallel inside it."""

    shards: int = Field(1, ge=1, le=1024, description="Pods that share the rows of a stage, each with its own engine.")
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs of one engine.")
    max_model_len: int | None = Field(None, ge=32, description="Context in tokens; default: the model's own.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_num_seqs: int | None = Field(
        None, ge=1, le=8192, description="Rows in flight in one engine; default on GPU: 512."
    )
    max_num_batched_tokens: int | None = Field(
        None, ge=64, le=1048576, description="Tokens of one engine step; default on GPU: 16384."
    )
    gpu_memory_utilization: Rate | None = Field(None, description='Share of a GPU\'s memory; default: "0.92".')


class Student(ServedModel):
    model: Uri = Field(description="Hub id, s3:// folder, or a path in the image.")
    revision: Name | None = Field(None, description="Branch, tag or commit on the hub; pinned to a commit by prepare.")


class Endpoint(Part):
    """Any OpenAI-compatible server."""

    url: Uri = Field(
        description="Base URL, such as https://api.example.com/v1.",
        json_schema_extra=rules(("self.matches('^https?://.+')", "write the whole base URL: https://host/v1")),
    )
    model: Uri
    api_key_secret_ref: KeyRef | None = None
    max_concurrency: int = Field(64, ge=1, le=4096)


class Teacher(ServedModel):
    """The model that criticises and refines: served here (`model`) or elsewhere (`endpoint`), never both."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("has(self.model) != has(self.endpoint)", "set exactly one of model (served here) and endpoint"),
            ("!has(self.revision) || has(self.model)", "revision belongs to model: remove it or set model"),
        )
    )
    model: Uri | None = Field(None, description="Hub id, s3:// folder, or a path in the image.")
    revision: Name | None = None
    endpoint: Endpoint | None = None
    fused: bool = Field(True, description="Critique and refine in one pod with one warm engine: one model load.")

    @model_validator(mode="after")
    def _one_source(self) -> "Teacher":
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("set exactly one of model (served here) and endpoint")
        if self.revision and not self.model:
            raise ValueError("revision belongs to model: remove it or set model")
        return self


class Fields(Part):
    """Names of the columns."""

    prompt: Name = "prompt"
    reference: Name | None = Field(
        None, description="Reference answer; needed by benchmarks and the objective SFT, never shown to the teacher."
    )


def _source(text: str) -> str:
    if not re.match(SOURCE, text):
        raise ValueError(SOURCE_RULE[1])
    return text


SourceUri = Annotated[Uri, AfterValidator(_source)]


class Source(Part):
    """Rows to read: JSON lines (plain, .gz, .zst) or Parquet."""

    source: SourceUri = Field(json_schema_extra=rules(SOURCE_RULE))
    fields: Fields = Fields()
    limit: Positive | None = Field(None, description="Take at most so many usable rows: the first ones.")


class Decontaminate(Part):
    """Remove prompts that share words with benchmark questions; each is listed with what it matched."""

    against: tuple[BenchmarkName, ...] = Field(
        (),
        max_length=32,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="Names of spec.evaluation.benchmarks; default: all of them.",
    )
    ngram: int = Field(
        13,
        ge=5,
        le=100,
        description="Words in a row that make a match, without case and punctuation. A question of fewer words is "
        "matched as a whole; one of fewer than 5 only by a prompt that is the same text.",
    )


SEED_RULE = ("!has(self.seed) || has(self.limit)", "seed says how the limit rows are drawn: set limit as well")


class Prompts(Source):
    """What is learned from."""

    model_config = ConfigDict(json_schema_extra=rules(SEED_RULE))

    limit: Positive | None = Field(
        None, description="Take at most so many usable rows: the first ones or, with a seed, an even sample of all."
    )
    seed: int | None = Field(None, ge=0, description="Of the sample; the order of rows and files does not change it.")
    decontaminate: Decontaminate | None = Field(None, description="{}: against all benchmarks.")

    @model_validator(mode="after")
    def _sample(self) -> "Prompts":
        if self.seed is not None and self.limit is None:
            raise ValueError(SEED_RULE[1])
        return self


class Sampling(Part):
    """Decoding of one stage. The paper's: greedy, at most 16,384 new tokens."""

    max_tokens: int = Field(16384, ge=1, description="New tokens at most; a longer text is rejected as truncated.")
    temperature: Temperature = Field("0", description="0: greedy.")
    top_p: Rate = Field("1", description="Nucleus sampling; only with a temperature above 0.")
    seed: int = Field(0, ge=0, description="Of a row's own seed, with the row's key.")


class Generation(Part):
    answer: Sampling = Sampling()
    critique: Sampling = Sampling()
    refine: Sampling = Sampling()
    distill: Sampling = Field(Sampling(), description="The teacher's own answers, for the objective DistilledSFT.")
    max_rejected: Percent = Field("2%", description="A stage that rejects more of its rows fails, loudly.")
    min_right_refinements: Percent | None = Field(
        None,
        description="Before a training GPU is asked for, an even sample of refinements is graded by the references; "
        "when fewer are right, the run fails. Needs references that end on an answer. Default: no limit.",
    )


BATCH_RULE = (
    "self.globalBatchSize >= self.workers * self.gpusPerWorker",
    "every GPU needs an example: raise globalBatchSize to at least workers * gpusPerWorker",
)
OFFLOAD_RULE = (
    "self.offload == 'none' || self.zeroStage >= (self.offload == 'parameters' ? 3 : 1)",
    "only what ZeRO partitions is offloaded: set zeroStage to 3 for parameters, to 1 or more for the optimizer",
)
RATE_RULE = (
    "(self.kind == 'corrupted') == has(self.rate)",
    'a corrupted critique needs a rate, such as "0.3", and no other kind has one',
)
ABLATION_RULE = (
    "self.critique.kind == 'matched' || 'CGD' in self.objectives",
    "only CGD is conditioned on the critique: add CGD to objectives, or leave critique out",
)
SELECT_RULE = (
    "!has(self.select) || self.select == 'last' || !has(self.fraction) || double(self.fraction) > 0.0",
    "the best model is that of the least validation loss: hold out a fraction above 0, or leave select out",
)
REFERENCE_RULE = (
    "!('SFT' in self.training.objectives) || has(self.prompts.fields.reference)",
    "the objective SFT learns the reference answer: set prompts.fields.reference to the column that has it",
)


class Critique(Part):
    """What stands in the critique's place when CGD is trained; the targets stay the same. For ablations.

    matched: the row's own. shuffled: another prompt's. generic: one placeholder text. none: left out. corrupted: of a
    fraction of the rows (rate) another prompt's critique under the opposite verdict, of the others their own.
    """

    model_config = ConfigDict(json_schema_extra=rules(RATE_RULE))

    kind: CritiqueKind = "matched"
    rate: Rate | None = Field(None, description="Fraction of the rows that get a wrong critique.")

    @model_validator(mode="after")
    def _rate_of_corrupted(self) -> "Critique":
        if (self.kind == "corrupted") != (self.rate is not None):
            raise ValueError(RATE_RULE[1])
        return self


class Validation(Part):
    """Prompts that are held out of training; the loss on them says which model is exported, no benchmark does.

    They are chosen by training.seed, the same for every objective of the run, with all samples of a prompt together.
    """

    model_config = ConfigDict(json_schema_extra=rules(SELECT_RULE))

    fraction: Half | None = Field(
        None,
        description='Share of the prompts, at least one and never all; "0": none. Default: 1 % and at most 1,000 '
        "prompts in a run of 2,000 or more; none in a smaller run, where a handful of prompts would be lost to "
        "learning for a loss that is mostly noise.",
    )
    every_steps: int = Field(200, ge=1, description="Measured after so many steps, and after the last one.")
    select: Literal["best", "last"] | None = Field(
        None,
        description="The model that is exported: the one with the least validation loss (best), or the one after the "
        "last step. Default: best where prompts are held out.",
    )

    @model_validator(mode="after")
    def _something_to_select_by(self) -> "Validation":
        if self.select == "best" and self.fraction is not None and float(self.fraction) == 0:
            raise ValueError(SELECT_RULE[1])
        return self


class Training(Part):
    model_config = ConfigDict(json_schema_extra=rules(BATCH_RULE, OFFLOAD_RULE, ABLATION_RULE))

    objectives: tuple[Objective, ...] = Field(
        ("CGD",),
        min_length=1,
        max_length=5,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="What is learned, a model for each, trained one after another: CGD (the refinement, given prompt, "
        "answer and critique), CFT (the critique, given prompt and answer), and given the prompt alone "
        "DistilledSFT (the teacher's own answer, which costs a pass of the teacher), SFT (the reference answer; needs "
        "prompts.fields.reference), RefinedSFT (the refinement).",
    )
    critique: Critique = Critique()
    epochs: int = Field(1, ge=1, le=100, description="Passes over the rows.")
    global_batch_size: int = Field(64, ge=1, le=65536, description="Examples per step, over all workers.")
    learning_rate: Rate = Field("1e-6", description="Peak of the schedule; a string, as every fraction.")
    warmup_ratio: Fraction = Field("0", description="Share of the steps with a rising learning rate.")
    weight_decay: Fraction = Field("0", description="Of AdamW.")
    max_sequence_length: int = Field(16384, ge=16, description="Tokens; a longer example is rejected, never cut.")
    packing: bool = Field(
        False,
        description="Several examples in one row of at most maxSequenceLength tokens, each seeing itself alone, rather "
        "than examples of like length padded to the longest. The losses are the same.",
    )
    workers: int = Field(1, ge=1, le=512, description="Pods of a training.")
    backend: Literal["auto", "PyTorchJob", "TrainJob"] = Field(
        "auto",
        description="What runs a training: PyTorchJob (Kubeflow Training Operator) or TrainJob (Kubeflow Trainer v2); "
        "auto takes what the cluster has, PyTorchJob first.",
    )
    gpus_per_worker: int = Field(8, ge=1, le=64, description="Also the processes of a worker, on CPU too.")
    zero_stage: int = Field(3, ge=0, le=3, description="DeepSpeed ZeRO: what is partitioned over the GPUs.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Of the forward and backward pass.")
    activation_checkpointing: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether layers compute their activations again in backward, which saves memory and costs one more "
        "forward pass. auto: where the GPU's memory is estimated not to hold them, never on a CPU.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="What is kept in the host's memory and costs time for less of the GPU's: the optimizer (12 bytes "
        "per parameter, divided by the GPUs; AdamW then runs on the CPU), or with zeroStage 3 the parameters as well.",
    )
    checkpoint_every_steps: int = Field(200, ge=1, description="A preempted training goes on from the last one.")
    keep_checkpoints: int = Field(2, ge=1, le=100, description="Older ones are removed.")
    validation: Validation = Validation()
    stop_on_loss_spike: bool = Field(
        True,
        description="End a training whose loss stays far above what it was for 5 steps in a row: above the median of "
        "the 50 steps before by half of it and by 6 standard deviations. A single odd batch ends nothing.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Order of the examples; also which prompts are held out, and which critiques are exchanged, for "
        "shuffled and corrupted.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.global_batch_size < self.workers * self.gpus_per_worker:
            raise ValueError(BATCH_RULE[1])
        if self.offload != "none" and self.zero_stage < (3 if self.offload == "parameters" else 1):
            raise ValueError(OFFLOAD_RULE[1])
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives: name each objective once")
        if self.critique.kind != "matched" and "CGD" not in self.objectives:
            raise ValueError(ABLATION_RULE[1])
        return self


class BenchmarkFields(Fields):
    """Names of the columns; rows may lack the last two."""

    context: Name | None = Field(None, description="Text that stands before the question.")
    tolerance: Name | None = Field(None, description="How far a numeric answer may be off.")


_KNOWN_NAME = f"self.name in {json.dumps(list(BENCHMARKS))}"
SOURCELESS_RULE = (
    f"has(self.source) || {_KNOWN_NAME}",
    f"a benchmark needs a source, or one of the names that are known: {', '.join(BENCHMARKS)}",
)
GRADED_RULE = (f"has(self.fields) ? has(self.fields.reference) : {_KNOWN_NAME}", "a benchmark needs fields.reference")


class Benchmark(Part):
    """Questions with reference answers; the model sees the question (and the instruction) alone.

    Of a benchmark that is known by its name (MATH-500, GSM8K, Minerva, OlympiadBench, AMC23, AIME24, AIME25, TheoremQA)
    whatever is left out is filled in: a mirror needs no more than its source.
    """

    model_config = ConfigDict(json_schema_extra=rules(SOURCELESS_RULE, GRADED_RULE))

    name: BenchmarkName
    source: SourceUri | None = Field(
        None, json_schema_extra=rules(SOURCE_RULE), description="Default: the hub, if the name is known."
    )
    fields: BenchmarkFields | None = Field(None, description="Default: the known benchmark's.")
    limit: Positive | None = Field(None, description="Take at most so many questions: the first ones.")
    instruction: str | None = Field(
        None,
        max_length=2000,
        description="Follows every question after a blank line. Default: where the name is known, to put the final "
        "answer into \\boxed{}; else nothing.",
    )
    tolerance: Annotated[str, Field(max_length=20, pattern=r"^[0-9]+(\.[0-9]+)?([eE]-?[0-9]+)?%?$")] | None = Field(
        None,
        description='How far answers to decimal references may be off: "0.01", or "4%" of the reference. Default: the '
        "known benchmark's, else not at all.",
    )
    samples: int = Field(
        1,
        ge=1,
        le=256,
        description="Outputs of every question: accuracy is their mean, and Pass@k is told for k up to this. More than "
        "1 need evaluation.sampling.temperature above 0.",
    )

    @model_validator(mode="after")
    def _known_or_whole(self) -> "Benchmark":
        if self.source is None and self.name not in BENCHMARKS:
            raise ValueError(SOURCELESS_RULE[1])
        if self.fields.reference is None if self.fields else self.name not in BENCHMARKS:
            raise ValueError(GRADED_RULE[1])
        return self


class Rival(Part):
    """A method that spends more at inference instead of training, on the base model, to compare with."""

    kind: Literal["SelfRefine"] = Field(
        description="The student criticises its own answer and improves it, in the words that the teacher is asked in."
    )
    rounds: int = Field(1, ge=1, le=10, description="At most; fewer where a critique finds the answer right.")


SAMPLES_RULE = (
    "double(self.sampling.temperature) > 0.0 || self.benchmarks.all(one, one.samples == 1)",
    "greedy decoding gives the same output every time: set sampling.temperature above 0, or samples to 1",
)


class Evaluation(Part):
    model_config = ConfigDict(json_schema_extra=rules(SAMPLES_RULE))

    benchmarks: tuple[Benchmark, ...] = Field(
        min_length=1,
        max_length=32,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    models: tuple[Literal["base", "trained"], ...] = Field(
        ("base", "trained"), min_length=1, max_length=2, json_schema_extra={"x-kubernetes-list-type": "set"}
    )
    rivals: tuple[Rival, ...] = Field(
        (),
        max_length=1,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["kind"]},
        description="Evaluated like a model, each in a stage of its own; the tokens of all passes are counted.",
    )
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _samples_differ(self) -> "Evaluation":
        if float(self.sampling.temperature) == 0 and any(one.samples > 1 for one in self.benchmarks):
            raise ValueError(SAMPLES_RULE[1])
        return self


class Storage(Part):
    """An S3 bucket. Credentials: the ServiceAccount's cloud identity, or a Secret with the two AWS keys."""

    uri: Uri = Field(
        description="s3://bucket/prefix",
        json_schema_extra=rules(
            ("self.matches('^s3://[a-z0-9][a-z0-9.-]+[a-z0-9](/.*)?$')", "write s3://bucket/prefix")
        ),
    )
    endpoint: Uri | None = Field(
        None,
        description="URL of an S3-compatible server; default: AWS.",
        json_schema_extra=rules(("self.matches('^https?://.+')", "write the whole URL: https://host:port")),
    )
    region: Name | None = None
    path_style: bool = Field(False, description="https://host/bucket/key instead of https://bucket.host/key.")
    credentials_secret_ref: NameRef | None = Field(
        None, description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if need be, AWS_SESSION_TOKEN."
    )
    ca_bundle_config_map_ref: KeyRef | None = Field(None, description="ConfigMap key with the server's CA, as PEM.")

    @model_validator(mode="after")
    def _urls(self) -> "Storage":
        if not re.match(r"^s3://[a-z0-9][a-z0-9.-]+[a-z0-9](/.*)?$", self.uri):
            raise ValueError("uri: write s3://bucket/prefix")
        if self.endpoint and not re.match(r"^https?://.+", self.endpoint):
            raise ValueError("endpoint: write the whole URL: https://host:port")
        return self


FREE: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}


class Pool(Part):
    """Where the pods of a pool run. The fields are those of a PodSpec and of a container."""

    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = Field([], max_length=64)
    affinity: dict[str, Any] = Field({}, json_schema_extra=FREE)
    resources: dict[str, Any] = Field(
        {}, json_schema_extra=FREE, description="Added to the GPUs that the run asks for."
    )
    priority_class_name: Name | None = None


VOLCANO_RULE = (
    "!has(self.queue) || self.gang == 'volcano'",
    "schedulingPolicy.queue is a queue of Volcano; leave it out for coscheduling, or set gang: volcano",
)


class SchedulingPolicy(Part):
    """The pods of a training start together or not at all. For a scheduler that the cluster has beside its own, and
    that the training's controller was set up for."""

    model_config = ConfigDict(json_schema_extra=rules(VOLCANO_RULE))

    gang: Literal["volcano", "coscheduling"] = Field(
        description="Whose PodGroups: those of Volcano, or of coscheduling in scheduler-plugins."
    )
    scheduler_name: Name | None = Field(
        None, description="Of the training's pods; default: volcano, or scheduler-plugins-scheduler."
    )
    queue: Name | None = Field(None, description="Queue of Volcano; default: its own.")

    @model_validator(mode="after")
    def _queue_is_volcanos(self) -> "SchedulingPolicy":
        if self.queue and self.gang != "volcano":
            raise ValueError(VOLCANO_RULE[1])
        return self


GPU_MEMORY_RULE = (
    "!has(self.gpuMemory) || self.accelerator != 'none'",
    "placement.gpuMemory is of GPUs, and accelerator is none: leave one of them out",
)


class Placement(Part):
    model_config = ConfigDict(json_schema_extra=rules(GPU_MEMORY_RULE))

    accelerator: str = Field(
        "nvidia.com/gpu",
        max_length=253,
        description="Resource name of a GPU; none: run on CPU and ask for no GPU.",
    )
    gpu_memory: Memory | None = Field(
        None,
        description="Memory of a GPU, of the smallest where pools differ, such as 80Gi. With it prepare refuses models "
        "and trainings that do not fit, with the arithmetic.",
    )
    student: Pool = Pool()
    teacher: Pool = Pool()
    training: Pool = Pool()
    cpu: Pool = Field(Pool(), description="prepare and report, and a teacher behind an endpoint.")
    scheduling_policy: SchedulingPolicy | None = Field(
        None, description="Gang scheduling of the trainings; minAvailable is all of a training's pods."
    )
    topology_key: Name | None = Field(
        None,
        description="Label of nodes, such as topology.kubernetes.io/zone or a rack's: all pods of a training run where "
        "its value is the same.",
    )

    @model_validator(mode="after")
    def _memory_is_of_gpus(self) -> "Placement":
        if self.gpu_memory and self.accelerator == "none":
            raise ValueError(GPU_MEMORY_RULE[1])
        return self


class Images(Part):
    """Images of the stage programs; default: those that the operator was released with."""

    generate: Uri | None = None
    train: Uri | None = None


class PodMetadata(Part):
    """Labels and annotations for every pod, such as those a cost report or a mesh reads."""

    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


_KNOWN = "self.prompts.decontaminate.against.all(name, self.evaluation.benchmarks.exists(one, one.name == name))"
AGAINST_RULE = (
    f"!has(self.prompts.decontaminate) || (has(self.evaluation) && {_KNOWN})",
    "prompts.decontaminate.against: takes names of evaluation.benchmarks, and there must be some",
)


LIMIT_RULE = ("has(self.gpuHours) || has(self.deadlineSeconds)", "a budget sets gpuHours, deadlineSeconds or both")


class Budget(Part):
    """What a run may use. When it is used up the pods are stopped and the run has failed; what is stored stays, and a
    new run with a larger budget goes on from there."""

    model_config = ConfigDict(json_schema_extra=rules(LIMIT_RULE))

    gpu_hours: GpuHours | None = Field(
        None,
        description="GPU-hours of all pods, as status.usage.gpuHours counts them; running pods in whole minutes. "
        "Nothing is counted where placement.accelerator is none.",
    )
    deadline_seconds: Positive | None = Field(
        None, description="Seconds from the run's creation to its end, those that it is suspended or in a queue too."
    )

    @model_validator(mode="after")
    def _limits_something(self) -> "Budget":
        if self.gpu_hours is None and self.deadline_seconds is None:
            raise ValueError(LIMIT_RULE[1])
        return self


class CGDRunSpec(Part):
    """One run of Critique-Guided Distillation."""

    model_config = ConfigDict(json_schema_extra=rules(AGAINST_RULE, REFERENCE_RULE))

    MUTABLE: ClassVar[frozenset[str]] = frozenset({"suspend", "ttl_seconds_after_finished", "deletion_policy"})
    """Fields that may change, and have no part in what a run makes."""

    suspend: bool = Field(False, description="Stop all pods and start nothing; finished rows stay. Set back to go on.")
    student: Student
    teacher: Teacher
    prompts: Prompts
    generation: Generation = Generation()
    training: Training = Training()
    evaluation: Evaluation | None = None
    storage: Storage
    placement: Placement = Placement()
    images: Images = Images()
    service_account_name: Name | None = Field(None, description="ServiceAccount of the stage pods.")
    hub_token_secret_ref: KeyRef | None = Field(None, description="Hugging Face token, for gated models.")
    pod_metadata: PodMetadata = PodMetadata()
    budget: Budget | None = None
    ttl_seconds_after_finished: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        description="Delete the run, with its Jobs and pods, so long after it has succeeded or failed; what it stored "
        "stays or goes by deletionPolicy. Default: never. May be changed at any time.",
    )
    deletion_policy: Literal["Retain", "Delete"] = Field(
        "Retain",
        description="Delete: when the run is deleted, so is what it stored and no other run claims. "
        "May be changed at any time.",
    )
    retries: int = Field(3, ge=0, le=100, description="Tries of a failed pod again, preemptions not counted.")

    @model_validator(mode="after")
    def _across_fields(self) -> "CGDRunSpec":
        known = {benchmark.name for benchmark in self.evaluation.benchmarks} if self.evaluation else set()
        if self.prompts.decontaminate and not (known and known.issuperset(self.prompts.decontaminate.against)):
            raise ValueError(AGAINST_RULE[1])
        if "SFT" in self.training.objectives and self.prompts.fields.reference is None:
            raise ValueError(REFERENCE_RULE[1])
        return self


class Rows(Part):
    total: int = 0
    done: int = 0
    rejected: int = 0


StageState = Literal["Pending", "Waiting", "Running", "Suspended", "Succeeded", "Failed"]


class StageStatus(Part):
    name: str
    state: StageState = "Pending"
    reason: str | None = None
    message: str | None = None
    child: str | None = None
    start_time: str | None = Field(None, json_schema_extra={"format": "date-time"})
    completion_time: str | None = Field(None, json_schema_extra={"format": "date-time"})
    attempts: int = 0
    rows: Rows | None = None
    tokens_per_second: int | None = None
    percent: int | None = None
    eta_seconds: int | None = None
    gpu_seconds: int = Field(0, description="Of all its pods, from a node's taking one to its end, times its GPUs.")
    pod_gpu_seconds: dict[str, int] = Field(
        {},
        json_schema_extra={"x-kubernetes-map-type": "atomic"},
        description="The part of gpuSeconds that the pods that are there now make, by their uids.",
    )
    tokens: int = Field(0, description="Prompt and generated tokens.")
    output_uri: str | None = Field(None, alias="outputURI")
    digest: str | None = None


class Condition(Part):
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: str = Field(json_schema_extra={"format": "date-time"})
    observed_generation: int = 0


class Usage(Part):
    gpu_hours: str = "0"
    tokens: int = 0


class Artifacts(Part):
    """S3 URIs of what the run has made."""

    quadruples: str | None = None
    checkpoints: dict[str, str] = {}
    report: str | None = None


class CGDRunStatus(Part):
    """What the operator saw last. Derived from the spec and the children every time.

    Two facts are read back, because nothing else in the cluster keeps them: that a run has succeeded, and the GPU
    seconds of pods that are gone.
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


def bytes_of(memory: str) -> int:
    """`80Gi` -> 85899345920"""
    binary = memory.endswith("i")
    return int(memory.rstrip("Gi")) * (2**30 if binary else 10**9)


def parse_spec(manifest: dict[str, Any]) -> CGDRunSpec:
    """The spec of a manifest.

    Raises:
        InvalidRun: a line for every wrong field, with its path and what to change.
    """
    try:
        return CGDRunSpec.model_validate_json(json.dumps(manifest.get("spec", {})), strict=True)
    except ValidationError as error:
        raise InvalidRun("\n".join(_mend(one) for one in error.errors())) from error


def _mend(error: Any) -> str:
    path = ".".join(["spec", *(str(part) for part in error["loc"])])
    match error["type"]:
        case "extra_forbidden":
            parent = path.rsplit(".", 1)[0]
            return f"{path}: there is no such field; `kubectl explain cgdrun.{parent}` lists those there are"
        case "missing":
            return f"{path}: is required"
        case "string_type" if isinstance(error["input"], int | float):
            return f'{path}: is a number; write it in quotes: "{error["input"]:g}"'
        case "value_error":
            return f"{path}: {error['ctx']['error']}"
        case _:
            return f"{path}: {error['msg']} (it is {error['input']!r})"
