"""Reads untrusted values on objects: annotations, labels, times, last words. Pure.

Whoever may write pods may write anything there. A value that cannot be read counts as absent, so that no run, watch or
sweep fails because of it.
"""

from datetime import UTC, datetime
from functools import lru_cache

from pydantic import ValidationError

from cgd_stages.contract import LastWords

LARGEST_NUMBER = 10**9


def number(text: object) -> int:
    """The whole number in a label or an annotation; 0 if it is not a number."""
    digits = str(text)
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < len(str(LARGEST_NUMBER)) else 0


def moment(text: object) -> datetime | None:
    """A time between 1970 and 9000, so that arithmetic with it cannot overflow; None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        time = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return time if 1970 <= time.year < 9000 else None


@lru_cache(maxsize=128)
def last_words(message: str) -> LastWords | None:
    """The termination message of a stage program; None for any other text, which is shown unchanged. A look reads each
    message several times; a message has 4 KB at most."""
    if not message.startswith("{"):
        return None
    try:
        return LastWords.model_validate_json(message)
    except ValidationError:
        return None


def with_message(reason: str, message: str | None) -> str:
    return f"{reason}: {message}" if message else reason
