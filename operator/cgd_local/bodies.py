"""How the API server reads a request's body: an apply by a YAML reader, everything else by a JSON reader.

The YAML reader is Go's (go.yaml.in/yaml/v2 2.4), and this plays what it makes of JSON: it takes no escape of half a
character, not even two halves in a row, and no control characters as they are. The JSON reader is Go's as well: half a
character becomes U+FFFD.
"""

from __future__ import annotations

import json
import re
from typing import Any

from cgd_local.statuses import bad_request

_NOT_AS_IT_IS = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""U+0085, U+2028 and U+2029 are not refused by the real reader, but read as line breaks, and lost."""
_NO_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\(?:/|u[dD][89a-fA-F])")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(text: str) -> Any:
    """The body of a request.

    Raises:
        ApiError: 400, it is no JSON.
    """
    body = _loads(text)
    if _HALF.search(text):
        halves = json.dumps(body, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
        body = _loads(halves.decode("utf-16-le", "replace"))
    return body


def read_apply(text: str) -> Any:
    """The body of an apply, which must be JSON as well.

    Raises:
        ApiError: 400, it is no JSON, or the YAML reader does not take it.
    """
    if not text.isascii() or "\x7f" in text:
        _refuse(_NOT_AS_IT_IS.search(text), "control characters are not allowed")
    if "\\" in text:
        _refuse(_NO_ESCAPE.search(text), "found invalid Unicode character escape code")
    return _loads(text)


def _refuse(found: re.Match[str] | None, why: str) -> None:
    if found:
        raise bad_request(f"error decoding YAML: error converting YAML to JSON: yaml: {why}: {found[0]!a}")


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_int=_integer)
    except ValueError as error:
        raise bad_request(f"error decoding the body: {error}") from error


def _integer(digits: str) -> int | float:
    """A number without a point, which is no integer where 64 bits do not hold it."""
    number = int(digits)
    return number if -(2**63) <= number < 2**63 else float(number)
