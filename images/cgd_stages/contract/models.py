"""Which model, where it runs, how it writes and how it is spoken to."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from cgd_stages.contract.base import FREE, Contract, Date, Fraction, Rate, Temperature, Word


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
ReasoningParser = Literal[
    "cohere_command3",
    "cohere_command4",
    "deepseek_r1",
    "deepseek_v3",
    "deepseek_v4",
    "deepseek_v41",
    "ernie45",
    "gemma4",
    "glm45",
    "glm47",
    "granite",
    "granite_thinking_parser",
    "holo2",
    "hunyuan_a13b",
    "hy_v3",
    "kimi_k2",
    "ling3",
    "mimo",
    "minicpmv",
    "minimax_m2",
    "minimax_m3",
    "mistral",
    "muse_glimmer",
    "nemotron_v3",
    "olmo3",
    "openai_gptoss",
    "plamo3",
    "poolside_v1",
    "qwen3",
    "s1",
    "seed_oss",
    "step3",
    "step3p5",
]
"""vLLM's names of the forms in which models write thoughts, and `s1`, for which vLLM has no name."""
CONFIG_MAP = "configmap://"


_RENDERED_WITH = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages"),
    *("padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs"),
    "truncation",
}
_SWITCHES = ("enable_thinking", "thinking", "reasoning")
"""The variables by which templates switch thoughts on and off."""
_QUOTED = ("true", "false")
_SWITCHING = (*_QUOTED, "on", "off", "yes", "no", "0", "1", "none", "null", "")


def _plain_values(kwargs: dict[str, Any]) -> dict[str, Any]:
    if ours := sorted(_RENDERED_WITH & set(kwargs)):
        raise ValueError(f"the run sets {', '.join(ours)} of a template: leave it out of templateKwargs")
    if switches := [name for name in _SWITCHES if _switches(kwargs.get(name))]:
        raise ValueError(f"{', '.join(switches)}: set the chat's field thinking to on or off instead")
    if quoted := [name for name, value in kwargs.items() if isinstance(value, str) and value.lower() in _QUOTED]:
        raise ValueError(f"{', '.join(quoted)}: write true or false without quotes: a template takes any text for true")
    if wrong := [name for name, value in kwargs.items() if not isinstance(value, bool | int | str)]:
        raise ValueError(f"{', '.join(wrong)}: write text, a whole number, true or false")
    return kwargs


def _switches(value: Any) -> bool:
    """Whether a value is meant to switch something on or off. A template takes every text, and most numbers, for on."""
    return isinstance(value, int) or (isinstance(value, str) and value.strip().lower() in _SWITCHING)


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
    reasoning_parser: ReasoningParser | None = Field(
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
