"""Text from outside, made safe for a terminal or a log: characters that they would obey are shown instead.

Needs only the standard library, because the operator, the commands and the stage programs all use it.
"""

import json as json_text
import logging
import re
import sys
import textwrap
import time
from typing import Any

_OBEYED = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed
    "\u2028\u2029"  # line and paragraph separator
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # order of the letters
    "\xad\u180e\u200b\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # invisible to people
    "\ud800-\udfff"  # half of a character, which UTF-8 cannot encode
)
"""Joiners (U+200C, U+200D) are not listed: scripts and emoji need them."""
_IN_LINES, _IN_A_LINE = re.compile(f"[{_OBEYED}]"), re.compile(f"[\t\n{_OBEYED}]")


def printable(text: str, *, lines: bool = False) -> str:
    """The text as one line. Characters that a terminal would obey are written as in Python: `\\x1b`, `\\u202e`, `\\n`.
    With `lines`, line feeds and tabs stay."""
    pattern = _IN_LINES if lines else _IN_A_LINE
    return pattern.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class LogFormatter(logging.Formatter):
    """Writes a record as one line and indents the lines of a traceback, so that no text can look like a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name, as the next two
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return _indented(stack_info)


def _indented(text: str) -> str:
    return textwrap.indent(printable(text, lines=True), "    | ", lambda _: True)


class JsonFormatter(logging.Formatter):
    """Writes a record as one line with a JSON object, in ASCII: nothing in it is obeyed."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json_text.dumps(told)


def start_log(
    style: str,
    *,
    times: str | None = None,
    level: int = logging.INFO,
    json: bool = False,
    beside: logging.Handler | None = None,
) -> None:
    """Write this process's log to stderr, with warnings and uncaught errors, and to `beside` as well. `style` formats
    the records (%), `times` their times; with `json` each record is an object instead. Every process sets up its log
    here."""
    handlers = [logging.StreamHandler(), *([beside] if beside else [])]
    for handler in handlers:
        handler.setFormatter(JsonFormatter() if json else LogFormatter(style, times))
    logging.basicConfig(level=level, handlers=handlers)
    logging.captureWarnings(capture=True)
    sys.excepthook = lambda *error: logging.critical("uncaught error", exc_info=error)
