"""Removes the keys in a pod's environment from the texts that leave it: errors, last words, logs and stored rows.

A server may echo a key, and libraries quote servers.
"""

import logging
import os
import re
from functools import lru_cache
from html.entities import codepoint2name
from itertools import groupby
from urllib.parse import quote

from cgd_stages.contract import PROGRESS_TOKEN

_KEYS = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
"""The ends of the names of environment variables that hold a key. Ids of keys (AWS_ACCESS_KEY_ID) are no secrets."""
SHORTEST = 8
"""The characters of the shortest key. Shorter values are placeholders for servers that need no key: EMPTY, none."""


def without_keys(text: str, *, only: str = "") -> str:
    """The text with the variable's name in place of each key, or of the key in the variable `only`. A key that is
    quoted for a URL, JSON or HTML is replaced too, and so is the beginning of a key where the text is cut."""
    keys = ((key.strip(), name) for name, key in os.environ.items() if _KEYS.search(name) and name != PROGRESS_TOKEN)
    # The longest key first: it may contain another.
    for key, name in sorted(keys, key=lambda pair: -len(pair[0])):
        if len(key) < SHORTEST or only not in ("", name):
            continue
        text = _spellings(key).sub(f"<{name}>", text)
        if key[:SHORTEST] in text[-len(key) :]:
            cut = next((size for size in range(len(key) - 1, SHORTEST - 1, -1) if text.endswith(key[:size])), 0)
            text = f"{text[:-cut]}<{name}>" if cut else text
    return text


@lru_cache(maxsize=64)
def _spellings(key: str) -> re.Pattern[str]:
    """A pattern for a key in every spelling that programs use: each character plain, or escaped once or more."""
    return re.compile("".join(_spelling(character, len(list(run))) for character, run in groupby(key)))


def _spelling(character: str, times: int) -> str:
    """A pattern for a character that is repeated `times` times. It matches a text in one way only: with several, a
    hostile text could make the search run for ever."""
    if character.isascii() and character.isalnum():
        return character * times
    number = ord(character)
    utf16 = character.encode("utf-16-be", "surrogatepass").hex()  # JSON writes one or two units of four digits
    numbers = "".join(rf"\\{{1,8}}u(?i:{utf16[at : at + 4]})" for at in range(0, len(utf16), 4))
    quoted = quote(character, safe="").lower() if quote(character, safe="") != character else f"%{number:02x}"
    entities = [f"#0*{number}", f"#x0*{number:x}", codepoint2name.get(number, "apos" if character == "'" else "")]
    html = "|".join(filter(None, entities))
    itself = r"(?!)" if character == "\\" else rf"\\{{0,8}}{re.escape(character)}"
    runs = rf"\\{{{times},{8 * times}}}|" if character == "\\" else ""
    return rf"(?:{runs}(?:{itself}|{numbers}|(?i:{quoted.replace('%', '%(?:25)*')})|&(?i:{html});){{{times}}})"


def hide_in_log() -> None:
    """Remove the keys from every line of this process's log, tracebacks included."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Hiding(handler.formatter or logging.Formatter()))


class _Hiding(logging.Formatter):
    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return without_keys(self._inner.format(record))
