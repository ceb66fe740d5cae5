"""How the rows are made: the two models, the prompts, the decoding."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from cgd_operator.api.fields import HTTP, PLAIN, BenchmarkName, KeyRef, ModelUri, Percent, Text, Uri, no_user, rules
from cgd_stages import contract
from cgd_stages.contract import Contract, Name, Number, Rate, Sampling


class ServedModel(Contract):
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
    model: ModelUri = Field(description="Hub id, s3:// folder, or a path in the image.")
    revision: Name | None = Field(None, description="Branch, tag or commit on the hub; pinned to a commit by prepare.")


class Endpoint(Contract):
    """Any OpenAI-compatible server."""

    url: Annotated[
        Uri,
        no_user("teacher.endpoint.apiKeySecretRef"),
        Text(HTTP, f"write the whole base URL: https://host/v1, {PLAIN}"),
    ] = Field(description="Base URL, such as https://api.example.com/v1.")
    model: Annotated[Uri, no_user("teacher.endpoint.apiKeySecretRef")]
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
    model: ModelUri | None = Field(None, description="Hub id, s3:// folder, or a path in the image.")
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


SourceUri = Annotated[
    Uri,
    Text(
        "^(s3://[^/]+/.+|configmap://[^/]+/[^/]+|hf://datasets/[^/]+/[^/]+/.*[^/])$",
        "write s3://bucket/key or hf://datasets/owner/name/path (* allowed in the last part), or configmap://name/key",
    ),
    no_user("storage.credentialsSecretRef (s3://) or hubTokenSecretRef (the hub)"),
]


class Decontaminate(contract.Decontaminate):
    """Remove prompts that share words with benchmark questions; each is listed with what it matched."""

    against: tuple[BenchmarkName, ...] = Field(
        (),
        max_length=32,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="Names of spec.evaluation.benchmarks; default: all of them.",
    )


SEED_RULE = ("!has(self.seed) || has(self.limit)", "seed says how the limit rows are drawn: set limit as well")


class Prompts(contract.Prompts):
    """What is learned from."""

    model_config = ConfigDict(json_schema_extra=rules(SEED_RULE))

    source: SourceUri
    decontaminate: Decontaminate | None = Field(None, description="{}: against all benchmarks.")

    @model_validator(mode="after")
    def _sample(self) -> "Prompts":
        if self.seed is not None and self.limit is None:
            raise ValueError(SEED_RULE[1])
        return self


class Generation(Contract):
    answer: Sampling = Sampling()
    critique: Sampling = Sampling()
    refine: Sampling = Sampling()
    distill: Sampling = Field(Sampling(), description="The teacher's own answers, for the objective DistilledSFT.")
    max_rejected: Percent = Field(Number("2%"), description="A stage that rejects more of its rows fails, loudly.")
    min_right_refinements: Percent | None = Field(
        None,
        description="Before a training GPU is asked for, an even sample of refinements is graded by the references; "
        "when fewer are right, the run fails. Needs references that end on an answer. Default: no limit.",
    )
