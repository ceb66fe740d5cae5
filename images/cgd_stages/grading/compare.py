r"""Whether two answers are the same, and by which rule. Exact: nothing is rounded but where a tolerance is given.

The rules, in this order; the first one that applies decides:

spelling   the same text but for spacing, text commands, dollar signs, thousands commas
choice     a lettered choice: `C`, `(C)`, `\text{(C) } 12`
word       words: `\text{Evelyn}`, `even`, `True` (also `yes`)
several    several values, all of which must be there, in any order: `1, 2`, `2 and 1`, `\{1, 2\}`, `1 \pm 2`
interval   intervals and unions of them: brackets and ends; tuple: points and lists, in order
unit       units that differ, or one that only one of the two has: `12 cm` and `12`, but never `12 m` and `12 cm`
tolerance  numbers that may be off by so much, where the benchmark says so
value      everything else: equal as expressions

Whether two expressions are equal is math-verify's to say, which parses LaTeX into sympy. Decimals become exact
fractions before that, so that 0.333 is not 1/3. It can take for ever: `grading` sets the deadline.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from cgd_stages.grading.units import is_bare_letter, quantity


@dataclass(frozen=True)
class Verdict:
    equal: bool
    rule: str


def compare(reference: str, answer: str, tolerance: str = "") -> Verdict:
    """Compare an answer with a reference. `tolerance`: `0.01`, `4%` of a decimal reference, or one of them for each of
    several values, with commas between; empty: exactly.

    Raises:
        Exception: whatever sympy or math-verify make of an expression that they cannot handle.
    """
    if same_spelling(reference, answer):
        return Verdict(True, "spelling")
    if (chosen := _choice(reference)) is not None:
        return Verdict(chosen == _choice(answer, lenient=True), "choice")
    tolerances = [one.strip() for one in tolerance.split(",")]
    references, answers = _values(reference), _values(answer)
    if len(answers) != len(references):
        answers = _distinct(answers)
    if len(references) == 1 == len(answers):
        return _one(references[0], answers[0], tolerances[0])
    if len(references) == 1 and (listed := _bracketed(references[0])):
        return Verdict(_in_order(listed.parts, answers, tolerances[0]), "tuple")
    return Verdict(_all_there(references, answers, tolerances), "several")


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
    """One spelling of an answer: no dollar signs, spacing commands, thousands commas or full stop."""
    for pattern, replacement in _SPELLINGS:
        expression = pattern.sub(replacement, expression)
    expression = expression.strip().rstrip(".,;:").strip()
    if not re.search(r"[(\[{]", expression):  # inside brackets a comma separates: (3,100) is a point
        expression = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), expression)
    return expression


def same_spelling(reference: str, answer: str) -> bool:
    """Whether two answers are the same text but for spacing and text commands."""
    return _bare(reference) == _bare(answer) != ""


def _bare(expression: str) -> str:
    text = _unwrapped(spell(expression)).removeprefix(r"\$")
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # a blank between digits is not nothing: 1 1/2


def _unwrapped(expression: str) -> str:
    return re.sub(rf"{_WORDS}\s*\{{([^{{}}]*)\}}", r"\1", expression)


# --- choices and words ------------------------------------------------------------------------------------------

_LETTER = re.compile(r"\(([A-Za-z])\)|([A-Z])\)?")
_LED_BY_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])\s*[).:])\s*.+", re.DOTALL)
_ORDINARY = frozenset({"yes", "no", "odd"})
_SAME_WORD = {"yes": "true", "no": "false"}


def _choice(expression: str, *, lenient: bool = False) -> str | None:
    """The letter of a lettered choice, in upper case. Lenient: also one that is followed by what it stands for."""
    text = _unwrapped(spell(expression)).strip()
    found = _LETTER.fullmatch(text) or (_LED_BY_LETTER.fullmatch(text) if lenient else None)
    if lenient and not found and re.fullmatch(r"[a-z]", text):
        return text.upper()
    return (found[1] or found[2]).upper() if found else None


def _word(expression: str) -> str | None:
    """The words that an answer consists of, or None where it is an expression."""
    text = _unwrapped(expression).strip(" .!")
    if not re.fullmatch(r"[A-Za-z][A-Za-z' \-]*", text):
        return None
    words = text.casefold().split()
    if not re.match(_WORDS, expression) and not any(len(word) > 3 or word in _ORDINARY for word in words):
        return None
    told = " ".join(word for word in words if word not in ("the", "a", "an"))
    return _SAME_WORD.get(told, told)


# --- several values, lists, intervals ---------------------------------------------------------------------------

_OPENING, _CLOSING = "([{", ")]}"
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
    """The values of an answer: what commas, semicolons, "and", "or" separate outside brackets; the members of a set."""
    text = _NAMES.sub("", _MEMBER.sub("", spell(expression), count=1), count=1).strip()
    if inner := re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL):
        text = inner[1] if _closes_at_end(text) else text
    found = [part for part in _split(_AND.sub(", ", text)) if part]
    return [one for part in found for one in _both_signs(part)] or [text]


def _split(text: str, separators: str = ",;") -> list[str]:
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if letter in separators and depth == 0 and text[place - 1 : place] != "\\":
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def _closes_at_end(text: str) -> bool:
    r"""Whether the bracket that a text begins with is closed by its end alone: not so in `\{1\} \cup \{2\}`."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if depth == 0 and letter in _CLOSING:
            return place == len(text) - 1
    return False


def _both_signs(expression: str) -> list[str]:
    if len(re.findall(r"\\pm(?![a-zA-Z])", expression)) != 1:
        return [expression]
    return [re.sub(r"\\pm(?![a-zA-Z])", sign, expression).strip() for sign in "+-"]


def _distinct(values: Sequence[str]) -> list[str]:
    """The values without those that were said before in other words: `1/2 or 0.5` is one."""
    found: list[str] = []
    for value in values:
        if not any(_equal(value, other, "") for other in found):
            found.append(value)
    return found


def _all_there(references: Sequence[str], answers: Sequence[str], tolerances: Sequence[str]) -> bool:
    left = list(answers)
    each = tolerances if len(tolerances) == len(references) else [tolerances[0]] * len(references)
    for reference, tolerance in zip(references, each, strict=True):
        match = next((answer for answer in left if _equal(reference, answer, tolerance)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _equal(reference: str, answer: str, tolerance: str) -> bool:
    """Whether two values of several are equal; x=1 and y=1 are not."""
    return same_spelling(reference, answer) or _one(reference, answer, tolerance).equal


def _in_order(references: Sequence[str], answers: Sequence[str], tolerance: str) -> bool:
    return len(references) == len(answers) and all(
        _equal(*pair, tolerance) for pair in zip(references, answers, strict=True)
    )


def _bracketed(expression: str) -> Bracketed | None:
    """A point, a list or an interval; None for anything else, (x + 1) too."""
    text = expression.strip()
    if not text or text[0] not in "([" or text[-1] not in ")]" or not _closes_at_end(text):
        return None
    parts = _split(text[1:-1])
    return Bracketed(text[0] + text[-1], tuple(parts)) if len(parts) > 1 else None


def _same_union(references: Sequence[Bracketed], answers: Sequence[Bracketed]) -> bool:
    left = list(answers)
    for reference in references:
        match = next((answer for answer in left if _same_brackets(reference, answer)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _same_brackets(reference: Bracketed, answer: Bracketed, tolerance: str = "") -> bool:
    if reference.brackets != answer.brackets and len(reference.parts) == 2:
        return False
    return _in_order(reference.parts, answer.parts, tolerance)


def _union(expression: str) -> list[Bracketed] | None:
    pieces = [_bracketed(piece) for piece in re.split(r"\\cup(?![a-zA-Z])", expression)]
    return [piece for piece in pieces if piece] if all(pieces) else None


# --- one value --------------------------------------------------------------------------------------------------


def _one(reference: str, answer: str, tolerance: str) -> Verdict:
    if (expected := _word(reference)) is not None:
        return Verdict(expected == _word(answer), "word")
    pieces = _union(reference), _union(answer)
    if pieces[0] and pieces[1]:
        is_interval = len(pieces[0]) > 1 or (len(pieces[0][0].parts) == 2 and set(pieces[0][0].brackets) != set("()"))
        if len(pieces[0]) == 1 == len(pieces[1]):
            same = _same_brackets(pieces[0][0], pieces[1][0], tolerance)
        else:
            same = _same_union(pieces[0], pieces[1])
        return Verdict(same, "interval" if is_interval else "tuple")
    return _quantities(reference, answer, tolerance)


def _quantities(reference: str, answer: str, tolerance: str) -> Verdict:
    wanted, given = quantity(reference), quantity(answer)
    if wanted.unit and given.unit and wanted.unit != given.unit:
        return Verdict(False, "unit")
    if wanted.unit and given.unit is None and is_bare_letter(reference):
        wanted = type(wanted)(reference)  # 12 m without a unit in the answer: m is a variable, for all we know
    dropped = wanted.unit is not None or given.unit is not None
    verdict = _numbers(wanted.value, given.value, tolerance)
    return Verdict(verdict.equal, "unit") if dropped and verdict.equal else verdict


def _numbers(reference: str, answer: str, tolerance: str) -> Verdict:
    if same_spelling(reference, answer):
        return Verdict(True, "spelling")
    if tolerance and (off := _allowed(reference, tolerance)) is not None:
        numbers = _number(reference), _number(answer)
        if numbers[0] is not None and numbers[1] is not None:
            return Verdict(abs(numbers[0] - numbers[1]) <= off * (1 + 1e-9), "tolerance")
    return Verdict(same_value(reference, answer), "value")


def _allowed(reference: str, tolerance: str) -> float | None:
    """How far an answer may be off; None where the tolerance is a share and the reference is no decimal fraction."""
    if not tolerance.endswith("%"):
        return float(tolerance)
    number = _number(reference) if re.search(r"\d\.\d|\.\d|10\^", reference) else None
    return None if number is None else abs(number) * float(tolerance.removesuffix("%")) / 100


def _number(expression: str) -> float | None:
    for value in _parsed(expression):
        if getattr(value, "is_number", False) and value.is_real:
            return float(value)
    return None


def same_value(reference: str, answer: str) -> bool:
    """A percentage equals both its number and its fraction (25% = 25 = 0.25): references are written either way."""
    references, answers = _readings(reference), _readings(answer)
    if len(references) == len(answers):
        return _verify(references[0], answers[0])
    return any(_verify(one, other) for one in references for other in answers)


def _readings(expression: str) -> list[str]:
    """An expression as math-verify shall read it; a percentage as its number, then as its fraction."""
    if not expression.endswith("%"):
        return [expression]
    number = expression.removesuffix("%").strip()
    return [number, rf"\frac{{{number}}}{{100}}"]


def _verify(reference: str, answer: str) -> bool:
    import math_verify

    # The time-outs are None because signal.alarm belongs to main threads; the errors are raised, not swallowed.
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
    """As math-verify reads by default, but without its units: it takes the m of 2m for one."""
    import math_verify

    latex = math_verify.LatexExtractionConfig()
    without_units = replace(latex.normalization_config, units=False)
    return [replace(latex, normalization_config=without_units), math_verify.ExprExtractionConfig()]


def _exact(value: Any) -> Any:
    """A sympy value without floats: math-verify rounds floats to six decimals before it compares them."""
    import sympy  # type: ignore[import-untyped]

    floats = value.atoms(sympy.Float) if hasattr(value, "atoms") else set()
    return value.xreplace({number: sympy.Rational(str(number)) for number in floats}) if floats else value
