"""Rows from elsewhere: prompts and benchmarks, and the names of their columns."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from cgd_stages.contract.base import NUMBER, Between, Contract, Decimal, Name, Positive

TOLERANCE = NUMBER.replace("$", "%?$")
"""How far an answer may be off: `0.01`, or `4%` of a decimal reference."""

PROMPT = "prompt"
PROMPT_RULE = (
    f"!has(self.messages) || self.prompt == '{PROMPT}'",
    "messages takes the place of prompt: leave one of them out",
)


class Fields(Contract):
    """The names of the columns in the source. Where no column has a name, its dots lead into objects and lists:
    reward_model.ground_truth, answers.text, answers.0."""

    model_config = ConfigDict(
        json_schema_extra={"x-kubernetes-validations": [dict(zip(("rule", "message"), PROMPT_RULE, strict=True))]}
    )

    prompt: Name = Field(PROMPT, description="The column with the prompt or question.")
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

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if self.messages and self.prompt != PROMPT:
            raise ValueError(PROMPT_RULE[1])
        return self

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
    tolerance: Name | None = Field(
        None,
        description="The column that says how far a numeric answer may be off: 0.01, 4% of a decimal reference, or one "
        "of these for each of several values, separated by commas.",
    )


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


SIMILARITY = 0.5
"""The share of a question's word triples that makes a text a paraphrase of it, unless the run sets another; how it was
chosen is in docs/benchmarks.md."""
Similarity = Annotated[Decimal, Between(0.3, 1)]
Removal = Literal["keep", "remove"]
"""What becomes of prompts that are found."""


class Decontaminate(Contract):
    """The benchmarks that prompts are compared with, and what counts as a copy of a question."""

    against: tuple[str, ...]
    """The names of the benchmarks and of the tasks of lm-eval."""
    ngram: int = Field(
        13,
        ge=5,
        le=100,
        description="How many words in a row a prompt shares with a question when it counts as a copy; case and "
        "punctuation do not matter. A question with fewer words is compared as a whole, and one with fewer than 5 "
        "words matches only a prompt with the same text.",
    )
    paraphrases: Removal | None = Field(
        None,
        description="What becomes of prompts, references and refinements that say much of a question, or of its "
        "reference, in other words. keep: the report shows accuracy without such questions. remove: training learns "
        "none of them. Both compare with the tasks of lm-eval too. Default: only copies are looked for.",
    )
    similarity: Similarity | None = Field(
        None,
        description="The share of a question's word triples that makes a text a paraphrase of it. "
        f"Default: {SIMILARITY:g}.",
    )

    @property
    def share(self) -> float:
        """The similarity that holds."""
        return self.similarity or SIMILARITY


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
    near_duplicates: Removal | None = Field(
        None,
        description="What becomes of prompts that nearly repeat an earlier one, apart from numbers, case and "
        "punctuation. remove: of each group of them the first stays. Default: keep; the report counts them.",
    )

    def given(self) -> dict[str, Any]:
        """The prompts for a digest: fields that came later only where they are set."""
        dump = self.model_dump(by_alias=True) | {"fields": self.fields.given()}
        if self.near_duplicates != "remove":
            del dump["nearDuplicates"]
        if self.decontaminate:
            del dump["decontaminate"]["paraphrases"], dump["decontaminate"]["similarity"]
            if self.decontaminate.paraphrases:
                dump["paraphrases"] = [self.decontaminate.paraphrases, self.decontaminate.share]
        return dump


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
