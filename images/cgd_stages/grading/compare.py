r"""Decides whether two answers are the same, and by which rule. It rounds nothing unless there is a tolerance.

The first rule that applies decides:

spelling   the same text, apart from spacing, text commands, dollar signs and thousands commas
choice     a lettered choice: `C`, `(C)`, `\text{(C) } 12`
word       words: `\text{Evelyn}`, `even`, `True` (also `yes`)
several    several values in any order, none missing: `1, 2`, `2 and 1`, `\{1, 2\}`, `1 \pm 2`
interval   intervals and unions of them, by brackets and ends; tuple: points and lists, in order
unit       units that differ, `12 m` and `12 cm`, or values that are equal and of which one has a unit, `12 cm` and `12`
tolerance  numbers that differ by at most the benchmark's tolerance
value      everything else: equal as expressions

math-verify, which parses LaTeX into sympy, decides whether two expressions are equal. Decimals become exact fractions
first, so that 0.333 is not 1/3. This may take for ever: `grader` sets a deadline.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

from cgd_stages.grading.units import Quantity, is_bare_letter, quantity

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True)
class Verdict:
    equal: bool
    rule: str


def compare(reference: str, answer: str, tolerance: str = "") -> Verdict:
    """Compare an answer with a reference. `tolerance`: `0.01`, `4%` of a decimal reference, or one for each of several
    values, separated by commas; empty: exact.

    Raises:
        Exception: any error of sympy or math-verify for an expression that they cannot handle.
    """
    if same_spelling(reference, answer):
        return Verdict(True, "spelling")
    if (letter := _choice(reference)) is not None:
        return Verdict(letter == _choice(answer, lenient=True), "choice")
    tolerances = [part.strip() for part in tolerance.split(",")]
    references, answers = _values(reference), _values(answer)
    if len(answers) != len(references):
        answers = _distinct(answers)
    if len(references) == 1 == len(answers):
        return _compare_values(references[0], answers[0], tolerances[0])
    if len(references) == 1 and (bracketed := _bracketed(references[0])):
        return Verdict(_in_order(bracketed.parts, answers, tolerances[0]), "tuple")
    if len(tolerances) != len(references):
        tolerances = [tolerances[0]] * len(references)
    pairs = list(zip(references, tolerances, strict=True))
    same = _in_any_order(pairs, answers, lambda pair, value: _equal(pair[0], value, pair[1]))
    return Verdict(same, "several")


# --- one spelling for one value ---------------------------------------------------------------------------------

_WORDS = r"\\(?:text|mathrm|mbox|textbf|mathbf|textit|textrm|operatorname)"
_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r",\s*\\!\s*(?=\d{3}(?!\d))", ","),
        (r"(?<!\\)\\!", ""),
        (r"\{,\}", ","),
        (r",\s*\\[,;:]\s*(?=\d{3}(?!\d))", ","),
        (r"(?<!\\)\$|\\\(|\\\)|\\\[|\\\]|[\u20ac\u00a3]", ""),
        (r"\u2212|\u2013", "-"),
        (r"\u00d7", r"\\times "),
        (r"\u03c0", r"\\pi "),
        (r"\u221e", r"\\infty "),
        (r"\u00b1", r"\\pm "),
        (r"(?<!\\)\\[,;: ]|~|\\(?:displaystyle|limits|qquad|quad)(?![a-zA-Z])", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\[lc]?dots(?![a-zA-Z])", r"\\dots"),
        (r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr)(?![a-zA-Z])", ""),
        (r"_\{(\w+)\}", r"_\1"),
        (r"\\%|\s+percent\b", "%"),
        (r"\s+", " "),
        (r"(?<![\d.,])(\d{1,3}) (?=\d{3}(?: \d{3})*(?!\d))", r"\1"),
        (r"(?<![\d./])(\d+) (\d+) ?/ ?(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
        (r"(?<=\d) ?[eE]([+-]?\d+)(?!\d)", r" \\times 10^{\1}"),
    )
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")


def spell(expression: str) -> str:
    """The answer without dollar signs, spacing commands, thousands commas and full stop."""
    for pattern, replacement in _SPELLINGS:
        expression = pattern.sub(replacement, expression)
    expression = expression.strip().rstrip(".,;:").strip()
    if not re.search(r"[(\[{]", expression):  # a comma inside brackets separates: (3,100) is a point
        expression = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), expression)
    return expression


def same_spelling(reference: str, answer: str) -> bool:
    """Whether two answers are the same text, apart from spacing and text commands."""
    return _bare(reference) == _bare(answer) != ""


def _bare(expression: str) -> str:
    text = _unwrapped(spell(expression)).removeprefix(r"\$")
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # a blank between digits has a meaning: 1 1/2


def _unwrapped(expression: str) -> str:
    return re.sub(rf"{_WORDS}\s*\{{([^{{}}]*)\}}", r"\1", expression)


# --- choices and words ------------------------------------------------------------------------------------------

_LETTER = re.compile(r"\(([A-Za-z])\)|([A-Z])\)?")
_LED_BY_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])\s*[).:])\s*.+", re.DOTALL)
_ORDINARY = frozenset({"yes", "no", "odd"})
_SAME_WORD = {"yes": "true", "no": "false"}


def _choice(expression: str, *, lenient: bool = False) -> str | None:
    """The letter of a lettered choice, in upper case. Lenient: the text of the choice may follow the letter."""
    text = _unwrapped(spell(expression)).strip()
    match = _LETTER.fullmatch(text) or (_LED_BY_LETTER.fullmatch(text) if lenient else None)
    if lenient and not match and re.fullmatch(r"[a-z]", text):
        return text.upper()
    return (match[1] or match[2]).upper() if match else None


def _word(expression: str) -> str | None:
    """The words of an answer, or None if it is an expression."""
    text = _unwrapped(expression).strip(" .!")
    if not re.fullmatch(r"[A-Za-z][A-Za-z' \-]*", text):
        return None
    words = text.casefold().split()
    if not re.match(_WORDS, expression) and not any(len(word) > 3 or word in _ORDINARY for word in words):
        return None
    phrase = " ".join(word for word in words if word not in ("the", "a", "an"))
    return _SAME_WORD.get(phrase, phrase)


# --- several values, lists, intervals ---------------------------------------------------------------------------

_OPENING, _CLOSING = "([{", ")]}"
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])")
_AND = re.compile(
    rf"\s*(?:{_WORDS}\s*\{{\s*,?\s*(?:and|or)\s*\}}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))\s*", re.IGNORECASE
)
_NAMES = re.compile(r"\s*\(\s*[a-zA-Z](?:_\w)?(?:\s*,\s*[a-zA-Z](?:_\w)?)+\s*\)\s*=\s*")
_MEMBER = re.compile(r"\s*[a-zA-Z]\s*(?:\\in(?![a-zA-Z])\s*|=\s*(?=\\\{|\\text))")


@dataclass(frozen=True)
class Bracketed:
    """`[1, 2)`: brackets `[)`, parts 1 and 2."""

    brackets: str
    parts: tuple[str, ...]


def _values(expression: str) -> list[str]:
    r"""The values of an answer: the members of a set, or the parts between commas, semicolons, "and" or "or" outside
    brackets. A part with one `\pm` has two values."""
    text = _NAMES.sub("", _MEMBER.sub("", spell(expression), count=1), count=1).strip()
    if inner := re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL):
        text = inner[1] if _closes_at_end(text) else text
    values: list[str] = []
    for part in filter(None, _split(_AND.sub(", ", text))):
        if len(_PLUS_MINUS.findall(part)) == 1:
            values += [_PLUS_MINUS.sub(sign, part).strip() for sign in "+-"]
        else:
            values.append(part)
    return values or [text]


def _split(text: str) -> list[str]:
    """The parts between commas and semicolons outside brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if letter in ",;" and depth == 0 and text[place - 1 : place] != "\\":
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def _closes_at_end(text: str) -> bool:
    r"""Whether the last bracket of a text closes its first: not so in `\{1\} \cup \{2\}`."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if depth == 0 and letter in _CLOSING:
            return place == len(text) - 1
    return False


def _distinct(values: Sequence[str]) -> list[str]:
    """The values without repetitions: `1/2 or 0.5` is one value."""
    distinct: list[str] = []
    for value in values:
        if not any(_equal(value, other, "") for other in distinct):
            distinct.append(value)
    return distinct


def _in_any_order(references: Sequence[R], answers: Sequence[A], equal: Callable[[R, A], bool]) -> bool:
    """Whether every reference has an answer of its own, and no answer is left."""
    left = list(answers)
    for reference in references:
        match = next((answer for answer in left if equal(reference, answer)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _equal(reference: str, answer: str, tolerance: str) -> bool:
    """Whether two values are equal; x=1 and y=1 are not."""
    return same_spelling(reference, answer) or _compare_values(reference, answer, tolerance).equal


def _in_order(references: Sequence[str], answers: Sequence[str], tolerance: str) -> bool:
    return len(references) == len(answers) and all(
        _equal(*pair, tolerance) for pair in zip(references, answers, strict=True)
    )


def _bracketed(expression: str) -> Bracketed | None:
    """A point, a list or an interval; None for anything else, such as (x + 1)."""
    text = expression.strip()
    if not text or text[0] not in "([" or text[-1] not in ")]" or not _closes_at_end(text):
        return None
    parts = _split(text[1:-1])
    return Bracketed(text[0] + text[-1], tuple(parts)) if len(parts) > 1 else None


def _same_brackets(reference: Bracketed, answer: Bracketed, tolerance: str = "") -> bool:
    if reference.brackets != answer.brackets and len(reference.parts) == 2:
        return False
    return _in_order(reference.parts, answer.parts, tolerance)


def _union(expression: str) -> list[Bracketed]:
    """The pieces of a union; none if one of them is no interval, point or list."""
    pieces = [_bracketed(piece) for piece in re.split(r"\\cup(?![a-zA-Z])", expression)]
    return [piece for piece in pieces if piece] if all(pieces) else []


# --- one value --------------------------------------------------------------------------------------------------


def _compare_values(reference: str, answer: str, tolerance: str) -> Verdict:
    if (expected := _word(reference)) is not None:
        return Verdict(expected == _word(answer), "word")
    references, answers = _union(reference), _union(answer)
    if references and answers:
        first = references[0]
        is_interval = len(references) > 1 or (len(first.parts) == 2 and set(first.brackets) != set("()"))
        if len(references) == 1 == len(answers):
            same = _same_brackets(first, answers[0], tolerance)
        else:
            same = _in_any_order(references, answers, _same_brackets)
        return Verdict(same, "interval" if is_interval else "tuple")
    return _compare_quantities(reference, answer, tolerance)


def _compare_quantities(reference: str, answer: str, tolerance: str) -> Verdict:
    expected, actual = quantity(reference), quantity(answer)
    if expected.unit and actual.unit and expected.unit != actual.unit:
        return Verdict(False, "unit")
    if expected.unit and actual.unit is None and is_bare_letter(reference):
        expected = Quantity(reference)  # the m of 12 m may be a variable, because the answer has no unit
    has_unit = expected.unit is not None or actual.unit is not None
    verdict = _compare_numbers(expected.value, actual.value, tolerance)
    return Verdict(verdict.equal, "unit") if has_unit and verdict.equal else verdict


def _compare_numbers(reference: str, answer: str, tolerance: str) -> Verdict:
    if same_spelling(reference, answer):
        return Verdict(True, "spelling")
    if tolerance and (most := _largest_difference(reference, tolerance)) is not None:
        expected, actual = _number(reference), _number(answer)
        if expected is not None and actual is not None:
            return Verdict(abs(expected - actual) <= most * (1 + 1e-9), "tolerance")
    return Verdict(same_value(reference, answer), "value")


def _largest_difference(reference: str, tolerance: str) -> float | None:
    """The tolerance as a number; None if it is a share and the reference is no decimal fraction."""
    if not tolerance.endswith("%"):
        return float(tolerance)
    number = _number(reference) if re.search(r"\d\.\d|\.\d|10\^", reference) else None
    return None if number is None else abs(number) * float(tolerance.removesuffix("%")) / 100


def _number(expression: str) -> float | None:
    """The value of an expression that is a real number."""
    values = (value for value in _parsed(expression) if getattr(value, "is_number", False) and value.is_real)
    return next((float(value) for value in values), None)


def same_value(reference: str, answer: str) -> bool:
    """Whether two expressions are equal. A percentage equals its number and its fraction (25% = 25 = 0.25), because
    references use both."""
    references, answers = _readings(reference), _readings(answer)
    if len(references) == len(answers):
        return _verify(references[0], answers[0])
    return any(_verify(*pair) for pair in itertools.product(references, answers))


def _readings(expression: str) -> list[str]:
    """An expression for math-verify; a percentage as its number and as its fraction."""
    if not expression.endswith("%"):
        return [expression]
    number = expression.removesuffix("%").strip()
    return [number, rf"\frac{{{number}}}{{100}}"]


def _verify(reference: str, answer: str) -> bool:
    import math_verify

    # The time-outs use signal.alarm, which works in main threads only. Errors are raised: they are not wrong answers.
    return bool(
        math_verify.verify(
            _parsed(reference),
            _parsed(answer),
            allow_set_relation_comp=True,
            timeout_seconds=None,
            raise_on_error=True,
        )
    )


def _parsed(expression: str) -> list[Any]:
    import math_verify

    values = math_verify.parse(
        f"${expression}$",
        extraction_config=_extraction(),
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )
    return [_exact(value) for value in values]


@cache
def _extraction() -> list[Any]:
    """math-verify's default configuration without its units: it would read the m of 2m as one."""
    import math_verify

    latex = math_verify.LatexExtractionConfig()
    without_units = replace(latex.normalization_config, units=False)
    return [replace(latex, normalization_config=without_units), math_verify.ExprExtractionConfig()]


def _exact(value: Any) -> Any:
    """A sympy value without floats, which math-verify would round to six decimals."""
    import sympy  # type: ignore[import-untyped]

    floats = value.atoms(sympy.Float) if hasattr(value, "atoms") else set()
    return value.xreplace({number: sympy.Rational(str(number)) for number in floats}) if floats else value
