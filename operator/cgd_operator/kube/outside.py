"""What others have written on objects, read without trust: annotations, labels, times, last words. Pure.

Whoever may write pods may write anything there. What cannot be read counts as not written, so that no run, no watch and
no sweep fails of it.
"""

from datetime import UTC, datetime

from pydantic import ValidationError

from cgd_stages.contract import LastWords

LARGEST_NUMBER = 10**9


def number(text: object) -> int:
    """A whole number in a label or an annotation; 0 where it is none."""
    digits = str(text)
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < len(str(LARGEST_NUMBER)) else 0


def moment(text: object) -> datetime | None:
    """A time of this world: seconds can be added to it, and taken away."""
    if not isinstance(text, str):
        return None
    try:
        time = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return time if 1970 <= time.year < 9000 else None


def last_words(message: str) -> LastWords | None:
    """The termination message of one of our programs; None for any other, which is shown as it is."""
    if not message.startswith("{"):
        return None
    try:
        return LastWords.model_validate_json(message)
    except ValidationError:
        return None


def with_message(reason: str, message: str | None) -> str:
    return f"{reason}: {message}" if message else reason
