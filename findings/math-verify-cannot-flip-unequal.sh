#!/usr/bin/env bash
# math-verify 0.9 swaps the sides of a relation before it compares two of them, by a table that has <, <=, >, >= and =
# and not the relation that \ne stands for. So two different statements with \ne raise KeyError inside, which verify
# turns into False by default, and the same statement with its sides swapped is False too, while a < b against b > a is
# True. A caller that takes False for a wrong answer grades a right one wrong, and with raise_on_error=True gets a
# KeyError that names a class of sympy.
# Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    'math-verify[antlr4_13_2]==0.9.0' 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import logging

from math_verify import parse, verify

logging.disable(logging.CRITICAL)
print("math-verify", importlib.metadata.version("math-verify"))


def said(gold: str, answer: str) -> object:
    try:
        return verify(parse(gold), parse(answer), raise_on_error=True)
    except KeyError as error:
        return f"KeyError: {error}"


for gold, answer, works in (
    ("$x < y$", "$y > x$", True),
    (r"$x \ne y$", r"$x \ne y$", True),
    (r"$x \ne 5$", r"$x \ne 6$", False),
    (r"$x \ne y$", r"$y \ne x$", False),
):
    by_default, raising = verify(parse(gold), parse(answer)), said(gold, answer)
    print(f"{gold:12} {answer:12} by default: {by_default!s:6} raise_on_error: {raising}")
    assert by_default is works
    assert raising is True if works else "Unequality" in str(raising)
PYTHON
