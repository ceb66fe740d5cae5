"""How the API server reads a request's body: an apply by Go's YAML reader, everything else by Go's JSON reader.

The YAML reader (go.yaml.in/yaml/v2 2.4), as played here, refuses some JSON: escapes of half a character, even two
halves in a row, and control characters that are not escaped. The JSON reader turns half a character into U+FFFD.
"""

from __future__ import annotations

import json
import re
from typing import Any

from cgd_local.statuses import bad_request

_NOT_AS_IT_IS = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""The real reader does not refuse U+0085, U+2028 and U+2029: it takes them for line breaks and loses them."""
_NO_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\(?:/|u[dD][89a-fA-F])")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(text: str) -> Any:
    """The body of a request.

    Raises:
        ApiError: 400 if it is not JSON.
    """
    body = _loads(text)
    if _HALF.search(text):
        halves = json.dumps(body, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
        body = _loads(halves.decode("utf-16-le", "replace"))
    return body


def read_apply(text: str) -> Any:
    """The body of an apply, which must be JSON as well.

    Raises:
        ApiError: 400 if it is not JSON, or the YAML reader refuses it.
    """
    if not text.isascii() or "\x7f" in text:
        _refuse(_NOT_AS_IT_IS.search(text), "control characters are not allowed")
    if "\\" in text:
        _refuse(_NO_ESCAPE.search(text), "found invalid Unicode character escape code")
    return _loads(text)


def _refuse(offence: re.Match[str] | None, why: str) -> None:
    if offence:
        raise bad_request(f"error decoding YAML: error converting YAML to JSON: yaml: {why}: {offence[0]!a}")


def _loads(text: str) -> Any:
    def integer(digits: str) -> int | float:
        """A number beyond 64 bits is a float, even without a point."""
        number = int(digits)
        return number if -(2**63) <= number < 2**63 else float(number)

    try:
        return json.loads(text, parse_int=integer)
    except ValueError as error:
        raise bad_request(f"error decoding the body: {error}") from error
