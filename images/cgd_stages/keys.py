"""The keys that a pod's environment holds leave it in no text: not in errors, last words, log or stored rows.

Servers echo what they are sent, and libraries quote what servers say.
"""

import json
import logging
import os
import re
from urllib.parse import quote

from cgd_stages.contract import PROGRESS_TOKEN

_KEYS = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
"""How the names of environment variables end that hold one. Ids of keys (AWS_ACCESS_KEY_ID) are no secrets."""
SHORTEST = 8
"""Characters. What is shorter is a word that stands in for a key where none is needed: EMPTY, none."""


def without_keys(text: str) -> str:
    """The text, with the name of the variable in the place of each key, also where it is quoted for a URL or JSON."""
    for key, name in _keys():
        for form in {key, quote(key, safe=""), json.dumps(key)[1:-1]}:
            text = text.replace(form, f"<{name}>")
    return text


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
