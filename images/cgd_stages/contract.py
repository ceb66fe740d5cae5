"""The contract between the operator and the stage programs: a task goes in, progress and last words come out.

This is the one module that both worlds import, so it needs pydantic and nothing else. The operator passes a
`StageTask` as JSON in the environment variable `CGD_TASK`; unknown fields are refused on both sides, so that an
operator and an image of different versions fail loudly and at once.

A part that a manifest and a task share is one class here, with the bounds and the descriptions of the manifest's
fields. `cgd_operator.api` extends it by the fields that only a manifest has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from enum import IntEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import core_schema

FORMAT: Literal[2] = 2
"""Version of the stored rows, prompts and markers. It is part of every digest: raising it starts new folders."""

TASK = "CGD_TASK"
"""Environment variable: the task, as JSON."""
INPUTS = "CGD_INPUTS"
"""Environment variable: the folder where `configmap://name/key` is mounted as `name/key`."""
SCRATCH = "CGD_SCRATCH"
"""Environment variable: a writable folder that lives as long as the pod (model cache, checkpoints on their way)."""
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


class Contract(BaseModel):
    """Strict and frozen; camelCase on the wire, snake_case in Python."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)

    @classmethod
    def part_of(cls, other: BaseModel) -> Self:
        """This class, filled from the attributes of another object that have the names of its fields; of a subclass
        too, which pydantic would take as it is."""
        return cls.model_validate({name: getattr(other, name) for name in cls.model_fields if hasattr(other, name)})

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        """As the API server holds it of lists whose schema says so."""
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("x-kubernetes-list-type") in ("set", "map"):
                keys = _keys(extra.get("x-kubernetes-list-map-keys"))
                items = [keys(item) for item in getattr(self, name)]
                if any(item in items[:place] for place, item in enumerate(items)):
                    raise ValueError(f"{to_camel(name)}: name each of them once")
        return self

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, exclude_none=True)


def _keys(names: Any) -> Callable[[Any], Any]:
    """What an item of a list is known by: the fields with these names, or all of it."""
    return (lambda item: [getattr(item, name) for name in names]) if names else lambda item: item


MANIFEST = "manifest"
"""The context of `model_dump` that writes every number as the text of a manifest."""


class Number(float):
    """A number that remembers the text it was read from: `Number("2%")` is 0.02."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Self:
        value = float(text.removesuffix("%"))
        number = super().__new__(cls, value / 100 if text.endswith("%") else value)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.text,)


@dataclass(frozen=True)
class AsText:
    """Marks a float that a manifest writes as text: a custom resource holds no floats, because it must compare equal
    after any number of round trips. A manifest is read strictly, which accepts only text of this pattern; a task is
    read laxly, which accepts numbers."""

    pattern: str
    max_length: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        text = core_schema.str_schema(pattern=self.pattern, max_length=self.max_length)
        return core_schema.lax_or_strict_schema(
            lax_schema=handler(source),
            strict_schema=core_schema.no_info_after_validator_function(Number, text),
            serialization=core_schema.plain_serializer_function_ser_schema(_written, info_arg=True),
        )

    def __get_pydantic_json_schema__(
        self, _core: core_schema.CoreSchema, _handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "maxLength": self.max_length, "pattern": self.pattern}


def _written(number: float, info: SerializationInfo) -> float | str:
    return text_of(number) if info.context == MANIFEST else number


def text_of(number: float) -> str:
    """The number as a manifest writes it."""
    return number.text if isinstance(number, Number) else f"{number:g}"


@dataclass(frozen=True)
class Between:
    """The bounds of a number that a manifest writes as text: a CEL rule in the CRD, a validator in pydantic."""

    low: float
    high: float
    open_low: bool = False
    or_zero: bool = False
    """0 is allowed, too."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, core: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        low = f"double(self) {'>' if self.open_low else '>='} {float(self.low)}"
        low = f"(double(self) == 0.0 || {low})" if self.or_zero else low
        rule = {"rule": f"{low} && double(self) <= {float(self.high)}", "message": self.text}
        return {**handler(core), "x-kubernetes-validations": [rule]}

    @property
    def text(self) -> str:
        low = f"above {self.low:g} and at most" if self.open_low else f"from {self.low:g} to"
        zero = ", or 0" if self.or_zero else ""
        return f'write a number {low} {self.high:g}{zero}, in quotes: "0.5"'

    def check(self, number: float) -> float:
        allowed = self.low < number <= self.high or (number == self.low and not self.open_low)
        if not (allowed or (self.or_zero and number == 0)):
            raise ValueError(self.text)
        return number


NUMBER = r"^[0-9]+(\.[0-9]+)?([eE]-?[0-9]+)?$"
Decimal = Annotated[float, AsText(NUMBER, max_length=20)]
Rate = Annotated[Decimal, Between(0, 1, open_low=True)]
Fraction = Annotated[Decimal, Between(0, 1)]
Half = Annotated[Decimal, Between(0, 0.5)]
Temperature = Annotated[Decimal, Between(0.01, 2, or_zero=True)]
"""vLLM 0.32 makes 0.01 of a smaller temperature above 0."""
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1, max_length=253)]
Word = Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


def _a_day(text: str) -> str:
    try:
        date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no day of the calendar: write it as in 2026-01-31") from error
    return text


Date = Annotated[
    str,
    Field(pattern=r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])$", json_schema_extra={"format": "date"}),
    AfterValidator(_a_day),
]
FREE: dict[str, Any] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
"""The schema of an object whose fields are somebody else's."""


class StageName(str):
    """The name of a stage: its kind and, where a run has several stages of that kind, the model that it makes or
    measures: `train-cgd`, `evaluate-base`. It is stored and sent as a plain string."""

    __slots__ = ()

    @classmethod
    def of(cls, kind: str, model: str) -> Self:
        return cls(f"{kind}-{model}")

    @property
    def kind(self) -> str:
        return self.partition("-")[0]

    @property
    def model(self) -> str:
        """Empty when the run has one stage of this kind."""
        return self.partition("-")[2]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


class RunRef(Contract):
    namespace: str
    name: str
    uid: str


class Storage(Contract):
    """The folder that holds all runs. Credentials come from the environment (the default chain of the AWS SDK)."""

    uri: str
    """`s3://bucket/prefix`, without a trailing slash."""
    endpoint: str | None = None
    region: str | None = None
    path_style: bool = False
    ca_bundle: str | None = None
    """Path of a PEM file, mounted into the pod."""


class Model(Contract):
    """A model: a hub id, an `s3://` folder, a path in the image, or `stage://train-cgd`, the output of a stage."""

    name: str
    revision: str | None = None


_OURS = ("model", "messages", "stream", "n")


def _extra_body(body: dict[str, Any]) -> dict[str, Any]:
    if ours := [name for name in _OURS if name in body]:
        raise ValueError(f"the run sets {', '.join(ours)} of a request: leave it out of extraBody")
    return body


class Endpoint(Contract):
    """A chat server that speaks OpenAI's API. A pod has its key, if it needs one, in `CGD_TEACHER_API_KEY`."""

    url: str = Field(description="The server's base URL, such as https://api.example.com/v1.")
    model: str = Field(description="The model's name on the server.")
    max_concurrency: int = Field(
        64, ge=1, le=4096, description="The most requests that are open at a time, for each of the teacher's shards."
    )
    timeout_seconds: int = Field(
        1800,
        ge=1,
        le=86400,
        description="The most seconds that the server may take for a whole reply. After that the request is sent "
        "again, and the server may bill both.",
    )
    token_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="The name under which the server takes maxTokens. Newer servers refuse max_tokens."
    )
    omit: tuple[Literal["temperature", "seed"], ...] = Field(
        (),
        max_length=2,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="Parameters that no request holds, because the server refuses them. It then uses its own.",
    )
    extra_body: Annotated[dict[str, Any], AfterValidator(_extra_body), WithJsonSchema(FREE)] = Field(
        {},
        description="More fields of every request, such as reasoning_effort. They win over what the run would send.",
    )

    def identity(self) -> dict[str, Any]:
        """The model's part of a digest's inputs: everything that may change a text."""
        given = {"omit": sorted(self.omit), "extraBody": self.extra_body}
        return {"name": self.model, "endpoint": self.url} | {name: value for name, value in given.items() if value}


class Fields(Contract):
    """The names of the columns in the source. Where no column has a name, its dots lead into objects and lists:
    reward_model.ground_truth, answers.text, answers.0."""

    prompt: Name = Field("prompt", description="The column with the prompt or question.")
    messages: Name | None = Field(
        None,
        description="The column with a conversation, in place of prompt: a list of {role, content} or {from, value}. "
        "The prompt is its last user turn. The system turn and the turns before stay turns, for every model, training "
        "and evaluation. An assistant turn after the prompt is the reference unless reference names a column.",
    )
    reference: Name | None = Field(
        None,
        description="The column with the reference answer. Benchmarks and the objective SFT need it. The teacher never "
        "sees it.",
    )
    several: Literal["any", "all"] | None = Field(
        None,
        description="What a list of references means: any of them is a right answer, or a right answer has all of "
        "them. Default: any for a list of texts, and all for a list of numbers, which is a point or an interval.",
    )
    choices: Name | None = Field(
        None,
        description="The column with the choices of a question: a list of texts, {text: [...], label: [...]}, or "
        "{A: ..., B: ...}. They follow the question as lettered lines, and the reference becomes the letter; the "
        "column of the reference may have the letter, the label, the text, or the index from 0 of the right choice.",
    )

    @property
    def named(self) -> dict[str, str]:
        """The columns that are read, by the field that names them."""
        unread = {"several"} | ({"prompt"} if self.messages else set())
        return self.model_dump(exclude_none=True, exclude=unread)

    def given(self) -> dict[str, Any]:
        """The fields for a digest: those that came later only where they are set."""
        later = {"messages", "several", "choices"}
        return self.model_dump(by_alias=True, exclude={name for name in later if getattr(self, name) is None})


class BenchmarkFields(Fields):
    """The names of the columns in the source. Rows may lack a context and a tolerance."""

    context: Name | None = Field(None, description="The column with the text that stands before the question.")
    tolerance: Name | None = Field(None, description="The column that says how far a numeric answer may be off.")


class Source(Contract):
    """Rows in JSON lines or Parquet, from `s3://bucket/key`, `hf://datasets/owner/name@revision/path` (the last part of
    either may hold `*`) or `configmap://name/key`."""

    source: str
    fields: Fields = Fields()
    limit: Positive | None = Field(
        None,
        description="The most rows that the run takes: the first ones that can be used or, with a seed, an even sample "
        "of all.",
    )


class Decontaminate(Contract):
    """The benchmarks that prompts are compared with, and what counts as a copy of a question."""

    against: tuple[str, ...]
    """The names of the benchmarks."""
    ngram: int = Field(
        13,
        ge=5,
        le=100,
        description="How many words in a row a prompt shares with a question when it counts as a copy; case and "
        "punctuation do not matter. A question with fewer words is compared as a whole, and one with fewer than 5 "
        "words matches only a prompt with the same text.",
    )


class Prompts(Source):
    """The prompts that the run learns from."""

    seed: int | None = Field(
        None, ge=0, description="Draws the sample. The order of rows and files does not change the sample."
    )
    decontaminate: Decontaminate | None = Field(
        None,
        description="Removes prompts that copy a benchmark's question, and lists each with the question it matched. {} "
        "compares with all benchmarks.",
    )


class Benchmark(Source):
    """Questions with reference answers. `instruction` follows the question after a blank line."""

    name: str
    fields: BenchmarkFields = BenchmarkFields()
    instruction: str = ""
    tolerance: str | None = None
    """How far an answer may be from a decimal reference: `0.01`, or `4%` of the reference. None: not at all."""
    questions: int | None = None
    """The number of questions, for benchmarks that the operator knows."""
    samples: int = 1
    """Outputs for each question; more than one needs a temperature above 0."""


class Repetition(Contract):
    """What a loop is: a text whose end repeats itself. It is stopped and rejected."""

    stop: bool = Field(True, description="Whether the run looks for loops. If not, a loop ends at maxTokens.")
    min_tokens: int = Field(
        512,
        ge=32,
        le=8192,
        description="The fewest tokens of a loop, all repetitions together. A shorter run of the same token, such as "
        "the zeros of a large number, is no loop.",
    )
    min_repeats: int = Field(32, ge=8, le=1024, description="How often a loop repeats itself at least.")


class Sampling(Contract):
    """How a model writes. The defaults are the paper's: greedy decoding, at most 16,384 new tokens."""

    max_tokens: int = Field(
        16384,
        ge=1,
        description="The most tokens that the model may write, its thought included. A text that reaches it is cut "
        "and, unless it is an answer that unfinished keeps, rejected; an output of an evaluation is cut and counted.",
    )
    temperature: Temperature = Field(
        0.0, description='The sampling temperature: "0", which means greedy decoding, or 0.01 to 2.'
    )
    top_p: Rate = Field(1.0, description="The share of nucleus sampling. It matters only with a temperature above 0.")
    seed: int = Field(0, ge=0, description="Gives every row a seed of its own, together with the row's key.")
    top_k: int | None = Field(
        None, ge=1, description="How many of the likeliest tokens a token is drawn from; default: all."
    )
    min_p: Fraction | None = Field(
        None,
        description="The least probability of a token that may be drawn, as a share of the likeliest token's; default: "
        "none.",
    )
    repetition: Repetition | None = Field(
        None, description="What a loop is; default: at least 32 repetitions with 512 tokens or more in all."
    )

    def identity(self) -> dict[str, Any]:
        """Its part of a digest's inputs, without the fields that are not given: earlier builds had fewer."""
        return self.model_dump(by_alias=True, exclude_none=True)

    @property
    def loop(self) -> Repetition:
        return self.repetition or Repetition()


class Speculative(Contract):
    """Speculative decoding, as vLLM has it: a draft of several tokens, which the model checks in one step. The texts
    have the same distribution as without it."""

    method: (
        Literal[
            "ngram",
            "ngram_gpu",
            "suffix",
            "draft_model",
            "medusa",
            "mlp_speculator",
            "eagle",
            "eagle3",
            "mtp",
            "dflash",
            "dspark",
        ]
        | None
    ) = Field(None, description="vLLM's name of the method; default: what the model of the drafts is made for.")
    model: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="The model that writes the drafts: on the hub, an s3:// folder, or a path in the image."
    )
    num_speculative_tokens: int | None = Field(
        None, ge=1, le=64, description="The tokens of a draft; default: what the model of the drafts is made for."
    )


class Engine(Contract):
    """Arguments of the vLLM engine. `engines` chooses each one that is None for the hardware, or the model does."""

    tensor_parallel: int = Field(1, ge=1, le=64, description="How many GPUs one engine uses.")
    max_model_len: int | None = Field(
        None, ge=32, description="The context length in tokens; default: the model's own."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="The number format of the weights; auto leaves it to the engine."
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        le=8192,
        description="The most rows that one engine works on at a time. Default by the GPU's memory: 128 below 30 GiB, "
        "256 below 60 GiB, 512 below 120 GiB, else 1024.",
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=64,
        le=1048576,
        description="The most tokens of one engine step; default: 16384 on a GPU of 60 GiB or more, else 8192.",
    )
    gpu_memory_utilization: Rate | None = Field(
        None, description='The share of a GPU\'s memory that the engine takes; default: "0.92".'
    )
    quantization: Word | None = Field(
        None,
        description="vLLM's name of a quantization, such as fp8; default: what the model's config says. prepare checks "
        "it.",
    )
    kv_cache_dtype: Word | None = Field(
        None, description="vLLM's name of the number format of keys and values, such as fp8; default: the weights'."
    )
    speculative: Speculative | None = None

    def identity(self) -> dict[str, Any]:
        """The part of a digest's inputs of what may change a text by more than rounding."""
        given = {"quantization": self.quantization, "kvCacheDtype": self.kv_cache_dtype}
        always = {"maxModelLen": self.max_model_len, "dtype": self.dtype}
        return always | {name: value for name, value in given.items() if value}


Thinking = Literal["auto", "on", "off"]
Learned = Literal["drop", "learn"]
"""What becomes of the teacher's thoughts in training."""
CONFIG_MAP = "configmap://"


_RENDERED_WITH = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages"),
    *("padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs"),
    "truncation",
}
_SWITCHES = ("enable_thinking", "thinking", "reasoning")


def _plain_values(kwargs: dict[str, Any]) -> dict[str, Any]:
    if ours := sorted(_RENDERED_WITH & set(kwargs)):
        raise ValueError(f"the run sets {', '.join(ours)} of a template: leave it out of templateKwargs")
    if switches := [name for name in _SWITCHES if isinstance(kwargs.get(name), bool)]:
        raise ValueError(f"{', '.join(switches)}: set the chat's field thinking to on or off instead")
    if wrong := [name for name, value in kwargs.items() if not isinstance(value, bool | int | str)]:
        raise ValueError(f"{', '.join(wrong)}: write text, a whole number, true or false")
    return kwargs


class Chat(Contract):
    """How a model is spoken to: its chat template, and whether it thinks before it answers."""

    thinking: Thinking = Field(
        "auto",
        description='Whether the model thinks before it answers: "on" or "off" (with the quotes, which YAML needs), '
        "or auto: the teacher as its template does when nobody asks, the student as training.thinking needs it, which "
        "is off unless that is learn. prepare refuses what the template cannot do.",
    )
    template: Annotated[str, Field(min_length=1, max_length=8192)] | None = Field(
        None,
        description="A chat template that replaces the model's own: its Jinja text, or the place of a file with it, "
        "configmap://name/key or s3://bucket/key.",
    )
    template_kwargs: Annotated[dict[str, Any], AfterValidator(_plain_values), WithJsonSchema(FREE)] = Field(
        {},
        description="More variables of the template, such as reasoning_effort: text, whole numbers, true and false.",
    )
    reasoning_parser: Word | None = Field(
        None,
        description="vLLM's name of the form in which the model writes its thoughts, such as deepseek_r1; default: "
        "what template and tokenizer show.",
    )
    thinking_budget: int | None = Field(
        None, ge=1, le=1048576, description="The most tokens of a thought; the engine then ends it. Default: no limit."
    )
    date: Date | None = Field(
        None,
        description="The date (YYYY-MM-DD) that a template is told when it asks for today's; default: the day on which "
        "the run was created, in UTC.",
    )

    @property
    def template_uri(self) -> str | None:
        """Where the template's text is, if the manifest does not hold it."""
        found = self.template is not None and self.template.startswith((CONFIG_MAP, "s3://"))
        return self.template if found else None


Role = Literal["answer", "critique", "refine", "distill"]
"""The text that a model is asked for. `distill`: the teacher's own answer to the prompt alone."""

Objective = Literal["CGD", "CFT", "DistilledSFT", "SFT", "RefinedSFT"]
"""What a student reads and what it learns; `examples.conversation` is the table."""


InstructionTurn = Literal["user", "system"]
"""The turn with the instruction of CGD's and CFT's contexts; the texts of the row are always in a user turn."""


def train_stage(training: str) -> StageName:
    """The name of the stage of a training, which is called as its objective or as a variant of one."""
    return StageName.of("train", training.lower())


RivalKind = Literal["SelfRefine", "Reflexion"]
CritiqueKind = Literal["matched", "shuffled", "generic", "none", "corrupted"]
"""The text that takes the critique's place when CGD is trained: see `examples.critic`."""


Select = Literal["first", "shortest-right", "all-right"]
"""Which of several refinements of an answer are learned; see `quality.selection`."""
Keep = Literal["all", "right", "one-right"]
"""Which rows are learned, by the grade of their refinement; see `quality.selection`."""


Unfinished = Literal["keep", "reject"]
"""What becomes of an answer that has a text and no end, because maxTokens has cut it or it loops."""


class Generate(Contract):
    """Ask a model for the text of each role. Several roles share one warm engine, in this order."""

    kind: Literal["generate"] = "generate"
    roles: tuple[Role, ...]
    sampling: tuple[Sampling, ...]
    """One for each role."""
    samples: int = 1
    """How many texts are drawn for each row. A critique is drawn once."""
    unfinished: Unfinished = "reject"
    """Of the role answer; every other role rejects such texts."""
    model: Model | None = None
    endpoint: Endpoint | None = None
    engine: Engine = Engine()
    chat: Chat = Chat()
    shards: int = 1
    max_rejected: float
    """The fraction of a stage's rows that may be rejected before the stage fails."""

    def draws(self, role: Role) -> int:
        """How many texts a role draws for each row that it reads."""
        return 1 if role == "critique" else self.samples


class Critique(Contract):
    """The critique that training reads. `rate`: the fraction of rows that `corrupted` gives a wrong critique."""

    kind: CritiqueKind = "matched"
    rate: float = 0.0


Exported = Literal["bare", "context", "last"]
"""Which model of a training is exported: the one with the least loss on the held-out prompts, given the prompt alone or
in the context in which the objective learns, or the one after the last step; the last also where nothing is held
out."""


class HeldOut(Contract):
    """Prompts that are held out of training, and how often the losses on them are measured."""

    fraction: Half | None = Field(
        None,
        description='The share of the prompts that is held out: at least one prompt and never all; "0" holds none out. '
        "By default a run of 2,000 prompts or more holds out 1 %, at most 1,000 prompts, and a smaller run none: the "
        "loss on a handful of prompts is mostly noise.",
    )
    every_steps: int = Field(
        200, ge=1, description="The losses are measured after every so many steps, and after the last one."
    )


class Validation(HeldOut):
    select: Exported = "bare"


class Adapter(Contract):
    """A low-rank adapter (LoRA, Hu et al. 2021): W + alpha / rank * B A is trained in A and B alone, W stays."""

    rank: int = Field(
        16,
        ge=1,
        le=512,
        description="The rows of A and columns of B. vLLM serves the adapter with a max_lora_rank of at least this.",
    )
    alpha: int = Field(32, ge=1, le=65536, description="What the adapter adds is scaled by alpha / rank.")
    dropout: Half = Field(0.0, description="The share of a module's inputs that the adapter does not see in a step.")
    targets: tuple[Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_.]+$")], ...] = Field(
        (),
        max_length=50,
        description="What gets A and B: attention, mlp, or linear modules by the architecture's names, such as q_proj. "
        "Default: every linear module of the layers; of a mixture of experts, those of attention. prepare refuses what "
        "the student does not have.",
    )


class Course(Contract):
    """How much a training reads, and how fast it learns."""

    epochs: int = Field(1, ge=1, le=100, description="How often the training goes through the rows.")
    global_batch_size: int = Field(
        64, ge=1, le=65536, description="How many examples one step learns from, over all workers."
    )
    learning_rate: Rate = Field(
        Number("1e-6"), description='The highest learning rate of the schedule; a string, such as "1e-6".'
    )
    warmup_ratio: Fraction = Field(0.0, description="The share of the steps in which the learning rate rises.")
    weight_decay: Fraction = Field(0.0, description="The weight decay of AdamW.")
    max_sequence_length: int = Field(
        16384, ge=16, description="The most tokens of an example. A longer one is rejected, never cut."
    )
    packing: bool = Field(
        False,
        description="Puts several examples into one row of at most maxSequenceLength tokens, and each sees itself "
        "alone. Without it, examples of like length are padded to the longest. The losses are the same.",
    )
    adapter: Adapter | None = Field(
        None,
        description="Trains a low-rank adapter (LoRA) instead of all parameters, and stores both the adapter and the "
        "student with the adapter added. {} takes the defaults. An adapter wants a higher learningRate: ten to a "
        'hundred times that of a full training, such as "1e-4".',
    )
    router_loss_weight: Fraction | None = Field(
        None,
        description='The weight of the loss that keeps the routers of a mixture of experts balanced; a string, "0" '
        "leaves it out. Default: as the student's config says (router_aux_loss_coef).",
    )


class Upkeep(Contract):
    """How a training uses its GPUs, its checkpoints and validation, and its random seed."""

    zero_stage: int = Field(
        3,
        ge=0,
        le=3,
        description="What DeepSpeed ZeRO divides among the GPUs: 1 the optimizer, 2 also gradients, 3 also parameters.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="The number format of the forward and backward pass."
    )
    activation_checkpointing: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether the backward pass computes activations again, which saves memory and costs one more "
        "forward pass. auto does so where the GPU's memory would not hold them by estimate, and never on a CPU.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="What moves from the GPU's memory to the host's, and makes steps slower: optimizer (16 bytes per "
        "parameter with the summed gradients, divided by the GPUs; AdamW then runs on the CPU), or, with zeroStage 3, "
        "parameters as well.",
    )
    checkpoint_every_steps: int = Field(
        200,
        ge=1,
        description="A checkpoint is stored after every so many steps, and an interrupted training goes on from it.",
    )
    keep_checkpoints: int = Field(2, ge=1, le=100, description="How many checkpoints are kept; older ones are deleted.")
    validation: HeldOut = HeldOut()
    stop_on_loss_spike: bool = Field(
        True,
        description="Ends a training when its loss stays too high for 5 steps in a row: above the median of the 50 "
        "steps before by half of it and by 6 standard deviations. A single odd batch ends nothing.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Determines the order of the examples, which prompts are held out, and which critiques shuffled "
        "and corrupted exchange.",
    )


class Lesson(Contract):
    """What a training learns, and the number of its processes."""

    kind: Literal["train"] = "train"
    name: str | None = None
    """A variant's; None: the training is called as its objective."""
    objective: Objective = "CGD"
    critique: Critique = Critique()
    """Only the objective CGD may have another kind than `matched`."""
    bare_share: Fraction = 0.0
    """The share of CGD's rows whose context is the prompt alone."""
    context: InstructionTurn = "user"
    """Where the instruction of CGD's and CFT's contexts stands."""
    student: Model
    chat: Chat = Chat()
    thinking: Learned = "drop"
    """Whether the teacher's thought before the target is learned too, in the student's own markup."""
    workers: int = 1
    processes_per_worker: int = 1

    @property
    def title(self) -> str:
        """What people call the training: `CGD`, or a variant's name such as `cgd-shuffled`."""
        return self.name or self.objective

    @property
    def stage(self) -> StageName:
        return train_stage(self.title)


class Train(Upkeep, Course, Lesson):  # pydantic takes the fields of the last base first
    """Supervised fine-tuning of the student on the stored rows."""

    validation: Validation = Validation()
    max_rejected: float
    common_rows: bool = False
    """Leave out the rows that check leaves out: for every training alike, so that trainings can be compared."""


CHECKPOINT_BYTES = "checkpoint_bytes"
"""A metric in prepare's last words: the bytes of a checkpoint on the node that stores the largest part."""


class Prepare(Contract):
    """Read, check and store the prompts, and refuse on a CPU what would fail on a GPU later."""

    kind: Literal["prepare"] = "prepare"
    prompts: Prompts
    benchmarks: tuple[Benchmark, ...] = ()
    student: Model
    student_engine: Engine
    student_chat: Chat = Chat()
    teacher: Model | None = None
    """None if the teacher is an endpoint."""
    teacher_engine: Engine = Engine()
    teacher_chat: Chat = Chat()
    endpoint: Endpoint | None = None
    without_thoughts: tuple[str, ...] | None = None
    """The names of the run's tasks of lm-eval that leave no room for a thought of the student; None: it has no thoughts
    to give, or there are no such tasks."""
    roles: tuple[Role, ...] = ()
    """The texts that the run asks models for."""
    sampling: tuple[Sampling, ...] = ()
    """One for each role."""
    evaluation: Sampling | None = None
    """How the models write their answers to benchmarks; None: the run evaluates nothing."""
    max_rejected: float
    training: Train
    """One training of the run. All of them need the same memory."""
    lessons: tuple[Lesson, ...] = ()
    """What each training of the run learns."""
    gpu_memory: int | None = None
    """The bytes of each GPU; None if the run has no GPU or does not state its memory."""


class Check(Contract):
    """Make the examples of every training on a CPU, and refuse what would waste a GPU."""

    kind: Literal["check"] = "check"
    trainings: tuple[Train, ...]
    select: Select = "first"
    keep: Keep = "all"
    min_right_refinements: float | None = None
    """The fraction of the graded refinements that must be right."""


class Rival(Contract):
    """A method to compare with: the base model makes several passes over a question instead of being trained."""

    kind: RivalKind = Field(
        description="The student criticises its own answer, asked in the words that the teacher is asked in. Then it "
        "improves the answer (SelfRefine) or answers anew with its critiques in view (Reflexion)."
    )
    rounds: int = Field(
        1, ge=1, le=10, description="The most rounds; the model stops earlier when a critique finds the answer right."
    )


class Evaluate(Contract):
    """Ask a model each benchmark question by itself, and grade its outputs."""

    kind: Literal["evaluate"] = "evaluate"
    model: Model
    benchmarks: tuple[Benchmark, ...]
    sampling: Sampling
    engine: Engine = Engine()
    chat: Chat = Chat()
    rival: Rival | None = None
    """None: the model answers each question in one pass."""


class HarnessTask(Contract):
    """A task of lm-eval. The report calls it `name`. `metric` is 1 (right) or 0 (wrong) for every document; after a
    comma it may name the filter of lm-eval that reads the outputs."""

    name: str
    task: str
    metric: str
    few_shot: int | None = None
    """None: the task's default."""
    limit: int | None = None
    """The most documents that each part of the task uses."""
    executes: bool = False
    """The model writes a program; it is right if the task's tests pass."""
    own_code: bool = False
    """The task's definition may contain Python code: see `harness.task_guard`."""

    @property
    def measure(self) -> str:
        return self.metric.partition(",")[0]

    @property
    def filter(self) -> str:
        return self.metric.partition(",")[2]


class Harness(Contract):
    """Evaluate a model on tasks of lm-eval."""

    kind: Literal["harness"] = "harness"
    model: Model
    tasks: tuple[HarnessTask, ...]
    data: str | None = None
    """An s3:// folder with a copy of an HF_HOME; None: the hub."""
    engine: Engine = Engine()
    chat: Chat = Chat()
    max_tokens: int | None = None
    """The most tokens of a reply with a thought, for which the tasks' own limits leave no room; None: the context's
    end."""


class Report(Contract):
    """Show the whole run on one page. `spec` is the run's spec as YAML, for display."""

    kind: Literal["report"] = "report"
    stages: tuple[StageName, ...]
    """Every stage before this one, in order."""
    spec: str
    student_chat: Chat = Chat()
    """The student's in answer, training and evaluation."""
    teacher_chat: Chat = Chat()
    thinking: Learned = "drop"


class Clean(Contract):
    """Delete the objects that the run has stored and that no other run claims."""

    kind: Literal["clean"] = "clean"


Work = Annotated[Prepare | Generate | Check | Train | Evaluate | Harness | Report | Clean, Field(discriminator="kind")]


class StageTask(Contract):
    """Everything that a stage program needs. `stage` names the child: `teacher` if the teacher's stages are fused."""

    format: Literal[2] = FORMAT
    run: RunRef
    stage: StageName
    storage: Storage
    work: Work


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
    metrics: dict[str, float] = {}
    """The stage's figures. Names that begin with LENGTH and end in a number are a histogram."""


class LastWords(Contract):
    """The termination message of a pod: JSON, at most `LAST_WORDS_LIMIT` bytes."""

    outcome: Literal["done", "failed", "interrupted"]
    stages: dict[str, StageFacts] = {}
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


class Progress(Contract):
    """The body of a progress report. Transformers' reports name no stage; they count for the child's first stage."""

    trainer_status: TrainerStatus
    stage: str | None = None
    shard: Annotated[int, Field(ge=0)] = 0
    rows: Rows | None = None
    tokens_per_second: Measure | None = None


class ProgressAnswer(Contract):
    """The operator's answer to a report."""

    next_report_seconds: float = 0
    """The program sends its next report after so many seconds, or when a stage begins or ends."""
