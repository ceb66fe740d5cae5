"""The values of a line, and the text that a row stores of each. Pure.

A reference is compared, and learned, as a text: a number keeps the digits that the file has (27, 27.50, 1e3), because a
reader that makes a float of each would store 27.0. `jiter` 0.19 keeps them in its `LosslessFloat`.
"""

import json
import math
from datetime import date, time
from decimal import Decimal
from typing import Any

import jiter

NUL = "a character NUL, which tokenizers and stores do not take"
OVERFLOW = "a number that is too large for a float"
NOT_FINITE = "a number that is NaN or infinite, which JSON cannot hold"


def parse(raw: bytes) -> Any:
    """The value of a JSON text in UTF-8. Floats are a `LosslessFloat`, whose `str` is the number as it was written.

    Raises ValueError for what is no JSON (also NaN and half of a surrogate pair), for values that are nested more than
    200 deep, for a name that stands twice in an object, and for what `flaw` finds.
    """
    value = jiter.from_json(raw, allow_inf_nan=False, catch_duplicate_keys=True, float_mode="lossless-float")
    if found := flaw(value):
        raise ValueError(found)
    return value


def flaw(value: Any) -> str:
    """What no row may hold, wherever it stands in the value; empty where the value is fine."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str(text) if "\0" in text:
                return NUL
            case jiter.LosslessFloat() as number if math.isinf(float(number)):
                return OVERFLOW
            case float(number) if not math.isfinite(number):
                return NOT_FINITE
            case dict(members):
                waiting += [*members, *members.values()]
            case list(items) | tuple(items):
                waiting += items
    return ""


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, a blank text, and a list or an object of nothing else."""
    match value:
        case str():
            return not value.strip()
        case dict():
            return all(map(is_empty, value.values()))
        case list() | tuple():
            return all(map(is_empty, value))
    return value is None


def kind(value: Any) -> str:
    """The name of a value's type, for people."""
    return "float" if isinstance(value, jiter.LosslessFloat) else type(value).__name__


def as_text(value: Any) -> str:
    """A text, a date or a time of Parquet as it is; any other value as JSON, with its numbers as they were written.

    Raises ValueError for a value that JSON cannot hold, such as NaN or bytes.
    """
    match value:
        case str():
            return value
        case date() | time():
            return value.isoformat()
    try:
        return _json(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a {kind(value)}, which JSON cannot hold") from error


def _json(value: Any) -> str:
    match value:
        case jiter.LosslessFloat():
            return str(value)
        case Decimal():
            return format(value, "f")
        case dict():
            return "{" + ", ".join(f"{_json(as_text(name))}: {_json(item)}" for name, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_json, value)) + "]"
        case date() | time():
            value = value.isoformat()
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
