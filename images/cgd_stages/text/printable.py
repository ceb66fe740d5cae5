"""Text from elsewhere, as a terminal or a log may have it: what they would obey is shown instead of obeyed.

Needs the standard library alone: the operator, the commands and the stage programs print by it.
"""

import logging
import re
import sys
import textwrap
from typing import Any

_OBEYED = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed
    "\u2028\u2029"  # line and paragraph separator
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # order of the letters
    "\xad\u180e\u200b\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # seen by programs alone
    "\ud800-\udfff"  # half of a character: cannot be written
)
"""Joiners (U+200C, U+200D) are not among them: scripts and emoji are written with them."""
_IN_LINES, _IN_A_LINE = re.compile(f"[{_OBEYED}]"), re.compile(f"[\t\n{_OBEYED}]")


def printable(text: str, *, lines: bool = False) -> str:
    """The text as one line, with what would be obeyed written as in Python: `\\x1b`, `\\u202e`, `\\n`. With `lines` its
    line feeds and tabs stay."""
    return (_IN_LINES if lines else _IN_A_LINE).sub(_written, text)


def _written(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


class LogFormatter(logging.Formatter):
    """A record is one line, and the lines of a traceback are indented: no text looks like another record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name, as the next two
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return _indented(stack_info)


def _indented(text: str) -> str:
    return textwrap.indent(printable(text, lines=True), "    | ", lambda _: True)


def start_log(style: str, *, times: str | None = None, level: int = logging.INFO) -> None:
    """Write this process's log to stderr, records in this `style` (%) and their times in that of `times`; with it what
    Python would write there by itself, warnings and the errors that nobody has caught. The only place where a log is
    set up.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(style, times))
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(capture=True)
    sys.excepthook = lambda *error: logging.critical("an error that nobody has caught", exc_info=error)
