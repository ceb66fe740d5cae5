"""The base of every class of the contract, and its types: numbers that a manifest writes as text, dates, the names of
stages."""

from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import core_schema


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
        for name, keys in _lists_of_unique_items(type(self)):
            items = [[getattr(item, key) for key in keys] if keys else item for item in getattr(self, name)]
            if any(item in items[:place] for place, item in enumerate(items)):
                raise ValueError(f"{to_camel(name)}: name each of them once")
        return self

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, exclude_none=True)


@cache
def _lists_of_unique_items(model: type[Contract]) -> tuple[tuple[str, Any], ...]:
    """The fields whose schema asks for unique items, each with the names of the fields that an item is known by, or
    None: all of it."""
    extras = ((name, field.json_schema_extra) for name, field in model.model_fields.items())
    return tuple(
        (name, extra.get("x-kubernetes-list-map-keys"))
        for name, extra in extras
        if isinstance(extra, dict) and extra.get("x-kubernetes-list-type") in ("set", "map")
    )


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
        def written(number: float, info: SerializationInfo) -> float | str:
            return text_of(number) if info.context == MANIFEST else number

        text = core_schema.str_schema(pattern=self.pattern, max_length=self.max_length)
        return core_schema.lax_or_strict_schema(
            lax_schema=handler(source),
            strict_schema=core_schema.no_info_after_validator_function(Number, text),
            serialization=core_schema.plain_serializer_function_ser_schema(written, info_arg=True),
        )

    def __get_pydantic_json_schema__(
        self, _core: core_schema.CoreSchema, _handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "maxLength": self.max_length, "pattern": self.pattern}


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


NUMBER = r"^[0-9]+(\.[0-9]+)?([eE]-?[0-9]{1,2})?$"
"""An exponent has two digits at most, so that with 20 characters no float is infinite, or 0 where the text is not."""
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
