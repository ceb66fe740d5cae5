"""The operator's log: whatever is in the texts, a record is one line, and the lines of a traceback are set in."""

import logging
import re
from types import TracebackType

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What ends a line, moves a terminal's cursor, or turns the direction of the text."""
SET_IN = "    | "


def shown(text: str) -> str:
    """The text with its control characters as escapes."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class OneLine(logging.Formatter):
    """Of messages that hold what others have said: names, answers of the API server, texts of pods."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        return shown(super().formatMessage(record))

    def formatException(  # noqa: N802
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        return "\n".join(SET_IN + shown(line) for line in super().formatException(ei).split("\n"))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return "\n".join(SET_IN + shown(line) for line in super().formatStack(stack_info).split("\n"))
