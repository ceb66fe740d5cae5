"""How the rows are made: the two models, the prompts, the decoding."""

import re
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from cgd_operator.api.fields import (
    FILE,
    HTTP,
    PARTS,
    PLAIN,
    PLAIN_PARTS,
    KeyRef,
    ModelUri,
    Percent,
    Text,
    Uri,
    no_user,
    plain_parts,
    rules,
)
from cgd_stages import contract
from cgd_stages.contract import Contract, Engine, Name, Number, Sampling, Select, Unfinished, Word

_PLACED = "!has(self.template) || self.template.contains('{')"
TEMPLATE_RULE = (
    f"{_PLACED} || self.template.matches('{FILE}')",
    "write the text of a Jinja template (8,192 characters at most), configmap://name/key or s3://bucket/key",
)
TEMPLATE_PARTS_RULE = (f"{_PLACED} || !self.template.matches('{PARTS}')", f"template: {PLAIN_PARTS}")


class Chat(contract.Chat):
    """How a model is spoken to: its chat template, and whether it thinks before it answers."""

    model_config = ConfigDict(json_schema_extra=rules(TEMPLATE_RULE, TEMPLATE_PARTS_RULE))

    @model_validator(mode="after")
    def _template_or_its_place(self) -> "Chat":
        if self.template is not None and "{" not in self.template:
            if not re.fullmatch(FILE, self.template):
                raise ValueError(TEMPLATE_RULE[1])
            Text(PARTS, TEMPLATE_PARTS_RULE[1], absent=True).check(self.template)
        return self


class Speculative(contract.Speculative):
    """Speculative decoding, as vLLM has it: a draft of several tokens, which the model checks in one step. The texts
    have the same distribution as without it."""

    model: ModelUri | None = Field(
        None, description="The model that writes the drafts: on the hub, an s3:// folder, or a path in the image."
    )


class ServedModel(Engine):
    """How vLLM serves a model. One independent engine per shard, tensor parallel inside it."""

    speculative: Speculative | None = None

    shards: int = Field(
        1, ge=1, le=1024, description="How many pods share the rows of a stage. Each runs its own engine."
    )
    chat: Chat = Chat()


class Student(ServedModel):
    model: ModelUri = Field(description="A model on the hub, an s3:// folder, or a path in the image.")
    revision: Name | None = Field(None, description="A branch, tag or commit on the hub. prepare pins it to a commit.")


class Endpoint(contract.Endpoint):
    """A chat server that speaks OpenAI's API."""

    url: Annotated[
        Uri,
        no_user("teacher.endpoint.apiKeySecretRef"),
        Text(HTTP, f"write the whole base URL: https://host/v1, {PLAIN}"),
    ] = Field(description="The server's base URL, such as https://api.example.com/v1.")
    model: Annotated[Uri, no_user("teacher.endpoint.apiKeySecretRef")] = Field(
        description="The model's name on the server."
    )
    api_key_secret_ref: KeyRef | None = Field(None, description="The key of a Secret that holds the server's API key.")


SERVED_RULE = (
    "has(self.model) || !(has(self.chat.template) || has(self.chat.reasoningParser) || has(self.chat.date))",
    "template, reasoningParser and date of chat are for a model that the run serves: remove them, or set model",
)
ENGINE_FIELDS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "quantization",
    "kv_cache_dtype",
    "speculative",
)
ENGINE_RULE = (
    "has(self.model) || !("
    + " || ".join(f"has(self.{to_camel(name)})" for name in ENGINE_FIELDS)
    + " || self.tensorParallel != 1 || self.dtype != 'auto')",
    "maxModelLen, tensorParallel and an engine's other fields are for a model that the run serves: remove them",
)


class Teacher(ServedModel):
    """The model that criticises and refines. The run serves it (`model`), or another server does (`endpoint`)."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("has(self.model) != has(self.endpoint)", "set exactly one of model (served here) and endpoint"),
            ("!has(self.revision) || has(self.model)", "revision belongs to model: remove it or set model"),
            SERVED_RULE,
            ENGINE_RULE,
        )
    )
    model: ModelUri | None = Field(None, description="A model on the hub, an s3:// folder, or a path in the image.")
    revision: Name | None = Field(None, description="A branch, tag or commit on the hub. prepare pins it to a commit.")
    endpoint: Endpoint | None = None
    fused: bool = Field(True, description="One pod criticises and refines, so that the model is loaded once.")

    @model_validator(mode="after")
    def _one_source(self) -> "Teacher":
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("set exactly one of model (served here) and endpoint")
        if self.revision and not self.model:
            raise ValueError("revision belongs to model: remove it or set model")
        chat = self.chat
        if not self.model and (chat.template or chat.reasoning_parser or chat.date):
            raise ValueError(SERVED_RULE[1])
        served = any(getattr(self, name) is not None for name in ENGINE_FIELDS)
        if not self.model and (served or self.tensor_parallel != 1 or self.dtype != "auto"):
            raise ValueError(ENGINE_RULE[1])
        return self


SourceUri = Annotated[
    Uri,
    plain_parts(),
    Text(
        "^(s3://[^/]+/.+|configmap://[^/]+/[^/]+|hf://datasets/[^/]+/[^/]+/.*[^/])$",
        "write s3://bucket/key or hf://datasets/owner/name/path (* allowed in the last part), or configmap://name/key",
    ),
    no_user("storage.credentialsSecretRef (s3://) or hubTokenSecretRef (the hub)"),
]


SIMILARITY_RULE = (
    "!has(self.similarity) || has(self.paraphrases)",
    "similarity says what is a paraphrase: set paraphrases as well",
)


class Decontaminate(contract.Decontaminate):
    """Which benchmarks prompts are compared with, and what counts as a copy."""

    model_config = ConfigDict(json_schema_extra=rules(SIMILARITY_RULE))

    against: tuple[Word, ...] = Field(
        (),
        max_length=64,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="Names of evaluation.benchmarks and evaluation.tasks to compare with; default: all benchmarks and, "
        "with paraphrases, all tasks.",
    )

    @model_validator(mode="after")
    def _similar_in_what(self) -> "Decontaminate":
        if self.similarity is not None and not self.paraphrases:
            raise ValueError(SIMILARITY_RULE[1])
        return self


SEED_RULE = ("!has(self.seed) || has(self.limit)", "seed says how the limit rows are drawn: set limit as well")


class Prompts(contract.Prompts):
    """The prompts that the run learns from."""

    model_config = ConfigDict(json_schema_extra=rules(SEED_RULE))

    source: SourceUri = Field(
        description="One file, or several that a * stands for: JSON lines (plain, .gz or .zst) or Parquet."
    )
    decontaminate: Decontaminate | None = Field(None, description="{}: against all benchmarks.")

    @model_validator(mode="after")
    def _sample(self) -> "Prompts":
        if self.seed is not None and self.limit is None:
            raise ValueError(SEED_RULE[1])
        return self


DRAWS_RULE = (
    "!has(self.samples) || self.samples == 1 || double(self.temperature) > 0.0",
    "greedy decoding gives the same text every time: set temperature above 0, or samples to 1",
)


class Draws(Sampling):
    """How a model writes, and how many texts it writes for each row."""

    model_config = ConfigDict(json_schema_extra=rules(DRAWS_RULE))

    samples: int = Field(
        1,
        ge=1,
        le=64,
        description="How many texts are drawn for each row; each becomes a row. More than 1 needs a temperature above "
        "0.",
    )

    @model_validator(mode="after")
    def _texts_differ(self) -> "Draws":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(DRAWS_RULE[1])
        return self


class Answers(Draws):
    """How the student answers, and what becomes of its answers that have no end."""

    unfinished: Unfinished = Field(
        "keep",
        description="What becomes of an answer that maxTokens has cut or that loops. keep: it is criticised and "
        "refined like any other, because the student reads an answer and never learns it; it is counted. reject: it is "
        "no row. An answer that was cut within its thought has no text and is always rejected.",
    )


_PLACED_AT = "^(s3://[^/]*/?|configmap://[^/]*/?|configmap://[^/]*/[^/]*/.*)$"
Instruction = Annotated[
    str,
    Field(min_length=1, max_length=8192),
    Text(_PLACED_AT, "write the text itself, configmap://name/key or s3://bucket/key", absent=True),
    Text(PARTS, PLAIN_PARTS, absent=True),
]


class Critiques(Sampling):
    """How the teacher criticises."""

    instruction: Instruction | None = Field(
        None,
        description="Replaces the system turn of the requests for critiques: a text, configmap://name/key or "
        "s3://bucket/key. With {prompt} and {answer} in it, it is the whole user turn instead. It should ask for a "
        'last line "Conclusion: right" or "Conclusion: wrong".',
    )


class Refinements(Draws):
    """How the teacher refines, and which of several refinements of an answer are learned."""

    instruction: Instruction | None = Field(
        None,
        description="Replaces the system turn of the requests for refinements: a text, configmap://name/key or "
        "s3://bucket/key. With {prompt}, {answer} and {critique} in it, it is the whole user turn instead.",
    )
    select: Select = Field(
        "first",
        description="Which of several refinements of an answer are learned: the first that is complete, the shortest "
        "right one, or all right ones. If none is right, the first is taken. Right is what the grader finds right by "
        "the reference.",
    )


class Generation(Contract):
    """How the rows are made, stage by stage, and how many of them may be lost."""

    answer: Answers = Answers()
    critique: Critiques = Critiques()
    refine: Refinements = Refinements()
    distill: Draws = Field(
        Draws(), description="How the teacher writes its own answers, for the objective DistilledSFT."
    )
    max_rejected: Percent = Field(Number("2%"), description="A stage fails when it rejects a larger share of its rows.")
    min_right_refinements: Percent | None = Field(
        None,
        description="The run fails before it asks for a training GPU when a smaller share of the refinements is right. "
        "An even sample of them is compared with the references, which must end on an answer. Default: no limit.",
    )
