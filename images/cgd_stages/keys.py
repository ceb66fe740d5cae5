"""The keys that a pod's environment holds leave it in no text: not in errors, last words, log or stored rows.

Servers echo what they are sent, and libraries quote what servers say.
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
"""How the names of environment variables end that hold one. Ids of keys (AWS_ACCESS_KEY_ID) are no secrets."""
SHORTEST = 8
"""Characters. What is shorter is a word that stands in for a key where none is needed: EMPTY, none."""


def without_keys(text: str, *, only: str = "") -> str:
    """The text, with the name of the variable in the place of each key (or of the variable `only`), also where it is
    quoted for a URL, JSON or HTML, and of the beginning of a key that the text ends in: somebody has cut it there."""
    for key, name in _keys():
        if only in ("", name):
            text = _spellings(key).sub(f"<{name}>", text)
            if key[:SHORTEST] in text[-len(key) :]:
                text = _without_beginning(text, key, name)
    return text


def _without_beginning(text: str, key: str, name: str) -> str:
    cut = next((size for size in range(len(key) - 1, SHORTEST - 1, -1) if text.endswith(key[:size])), 0)
    return f"{text[:-cut]}<{name}>" if cut else text


@lru_cache(maxsize=64)
def _spellings(key: str) -> re.Pattern[str]:
    """A key in the spellings that programs give it: each of its characters by itself, or escaped, once or more."""
    return re.compile("".join(_spelling(one, len(list(run))) for one, run in groupby(key)))


def _spelling(character: str, times: int) -> str:
    """Of a character that comes so many times in a row. Each has one way to match a text, or a text of the server
    could take for ever."""
    if character.isascii() and character.isalnum():
        return character * times
    number = ord(character)
    numbers = "".join(rf"\\{{1,8}}u(?i:{ord(half):04x})" for half in _halves(character))
    quoted = quote(character, safe="").lower() if quote(character, safe="") != character else f"%{number:02x}"
    entities = [f"#0*{number}", f"#x0*{number:x}", codepoint2name.get(number, "apos" if character == "'" else "")]
    html = "|".join(filter(None, entities))
    itself = r"(?!)" if character == "\\" else rf"\\{{0,8}}{re.escape(character)}"
    runs = rf"\\{{{times},{8 * times}}}|" if character == "\\" else ""
    return rf"(?:{runs}(?:{itself}|{numbers}|(?i:{quoted.replace('%', '%(?:25)*')})|&(?i:{html});){{{times}}})"


def _halves(character: str) -> str:
    """The one or two characters that JSON has for it."""
    encoded = character.encode("utf-16-be", "surrogatepass")
    return "".join(chr(int.from_bytes(encoded[at : at + 2], "big")) for at in range(0, len(encoded), 2))


def _keys() -> list[tuple[str, str]]:
    """Key and name, the longest first: one may be a part of another."""
    found = ((key.strip(), name) for name, key in os.environ.items() if _KEYS.search(name) and name != PROGRESS_TOKEN)
    return sorted(((key, name) for key, name in found if len(key) >= SHORTEST), key=lambda one: -len(one[0]))


def hide_in_log() -> None:
    """Have no line of this process's log show a key, tracebacks included."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Hiding(handler.formatter or logging.Formatter()))


class _Hiding(logging.Formatter):
    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return without_keys(self._inner.format(record))
