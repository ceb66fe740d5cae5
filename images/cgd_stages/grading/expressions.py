r"""Whether two expressions have the same value. It rounds nothing, and it may take for ever: `grader` sets a deadline.

latex2sympy2_extended 1.11, the parser of math-verify 0.9, turns LaTeX into sympy; relations, sets and what else is no
number are compared by math-verify with 100 digits. Numbers and functions are compared here, because math-verify

- takes every difference below 10^{-15} for 0, and rounds decimals to six places,
- lets the parser write all letters small: \pi(R^2-r^2) becomes 0,
- takes i for a variable, except in one spelling of a complex number,
- is not symmetric.

What the parser reads otherwise than everybody else is rewritten before it is asked (`_prepared`): `2(3)` is a product
(it adds), `\sin 30^\circ` has degrees (it drops them), `1011_2` has a base (it drops it), `0.1x` is a tenth of x (it
makes a binary fraction of 0.1), `3!!` is 3 (it reads (3!)!), f(x + 1) and E[X^2] are no products.
"""

import re
import zlib
from collections.abc import Sequence
from functools import cache, lru_cache
from math import prod
from typing import Any

from cgd_stages.grading.numerals import exact
from cgd_stages.grading.spelling import CLOSING, OPENING, closes_at_end, split, without_outer

LONGEST = 1000
"""The most characters of an expression that is parsed; the parser needs seconds for each thousand."""
DIGITS = 120
"""Digits to which irrational numbers are computed; they are the same when all but 20 agree."""

_DEGREES = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_EXACT = re.compile(
    r"(?<![\w.}\\])[0-9]+_\{\w+\}"
    r"|(?<![\w.])\d*\.\d*(?:\\(?:overline|bar|dot)\s*\{\s*\d+\s*\}(?:\d*\\dot\s*\{\d\})?|\(\d+\)|\\dots)"
    r"|(?<![\w.])(?:\d*\.\d+(?![\d.(])|\d+\.(?!\d))"
)
"""Numbers in a base, repeating and other decimals, which `numerals` reads."""
_REWRITTEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\*\*", "^"),
        (r"\^\s*(-\d+|-[a-z])", r"^{\1}"),
        (r"(?<![\^_\d.])(\d+)\s*\(", r"\1 \\cdot ("),
        (r"\)\s*(?=[(\d])", r") \\cdot "),
    )
)  # fmt: skip
_NUMBERS_SIDE_BY_SIDE = re.compile(r"\d\s+\d")
_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73)
_POINTS = 4
_DOUBLE_FACTORIAL = re.compile(r"(?<![\w.])(\d{1,3})!!(?!!)")
_BOUND = re.compile(r"\\(?:int|sum|prod|lim)(?![a-zA-Z])|\\frac\s*\{\s*(?:d|\\partial)")
_CALL = re.compile(r"(?<![a-zA-Z\\{_])([EPfgh])(\^\{?-1\}?)?\s*(?=[(\[])")


def same_value(reference: str, answer: str) -> bool:
    """Whether two spelled expressions are equal; False where one of them cannot be parsed.

    Raises:
        Exception: any error of sympy for an expression that it cannot handle.
    """
    expected, actual = parsed(reference), parsed(answer)
    return expected is not None and actual is not None and _same(expected, actual)


def number_of(expression: str) -> float | None:
    """The value of an expression that is a real number."""
    if (number := exact(expression)) is not None:
        return float(number)
    value: Any = parsed(expression)
    return float(value) if getattr(value, "is_number", False) and value.is_real else None


def load() -> None:
    """Import sympy and the parser, and let both make their tables."""
    same_set(r"\{x : x^2 = 2\}", r"\{-\sqrt{2}, \sqrt{2}\}")


# --- parsing ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def parsed(expression: str) -> Any | None:
    """A spelled expression as a sympy value, unevaluated; None if it is none."""
    import sympy  # type: ignore[import-untyped]
    from latex2sympy2_extended.latex2sympy2 import (  # type: ignore[import-untyped]
        ConversionConfig,
        latex2sympy,
    )
    from latex2sympy2_extended.math_normalization import normalize_latex  # type: ignore[import-untyped]

    if (number := exact(expression)) is not None:
        return sympy.Rational(number.numerator, number.denominator)
    if (prepared := _prepared(expression)) is None:
        return None
    try:
        value = latex2sympy(
            normalize_latex(prepared, _normalization()),
            is_real=True,
            convert_degrees=bool(_DEGREES.search(prepared)),
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except (RecursionError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - the parser raises bare Exceptions, and what it passes on from sympy
        return None
    return _with_imaginary_unit(value, expression)


@cache
def _normalization() -> Any:
    from latex2sympy2_extended.math_normalization import NormalizationConfig

    return NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")


def _prepared(expression: str) -> str | None:
    """The expression as the parser reads it rightly; None if it is no expression."""
    text = expression.strip()
    if not text or len(text) > LONGEST or r"\dots" in text.replace(r".\dots", "") or _NUMBERS_SIDE_BY_SIDE.search(text):
        return None
    try:
        text = _EXACT.sub(_as_fraction, text)
    except ValueError:
        return None
    text = _DOUBLE_FACTORIAL.sub(lambda match: str(prod(range(int(match[1]), 0, -2))), text)
    if "!!" in text:
        return None
    text = _with_calls_named(text)
    text = _braced(_braced(text, r"\\?sqrt\s*(?=\()", r"\sqrt"), r"\^\s*(?=\()", "^")
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return text


def _as_fraction(match: re.Match[str]) -> str:
    if (value := exact(match[0])) is None:
        raise ValueError(match[0])
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _braced(text: str, before: str, command: str) -> str:
    r"""`sqrt(x+1)` and `2^(x+1)` with braces."""
    pattern = re.compile(before)
    while match := pattern.search(text):
        end = _closing(text, match.end())
        if end is None:
            return text
        text = rf"{text[: match.start()]}{command}{{{text[match.end() + 1 : end]}}}{text[end + 1 :]}"
    return text


def _with_calls_named(text: str) -> str:
    """The text with one name for each value of E, P, f, g and h: the parser multiplies E[X^2] and f(x + 1) out."""
    position = len(text) if _BOUND.search(text) else 0
    while call := _CALL.search(text, position):
        position = call.end()
        end = _closing(text, call.end())
        is_factor = end is None or (call[1] == "P" and text[end + 1 :].lstrip().startswith("^"))  # P(1+r)^t
        values: list[Any] = [] if is_factor else [parsed(part) for part in split(text[call.end() + 1 : end])]
        if end is not None and values and all(hasattr(value, "doit") for value in values):
            name = zlib.crc32(f"{call[0]}{[value.doit() for value in values]}".encode())
            text = f"{text[: call.start()]}q_{{{name}}}{text[end + 1 :]}"
    return text


def _closing(text: str, opening: int) -> int | None:
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] in OPENING) - (text[place] in CLOSING)
        if depth == 0:
            return place
    return None


def _with_imaginary_unit(value: Any, expression: str) -> Any:
    """i is the imaginary unit, except where it counts something."""
    import sympy

    if not hasattr(value, "free_symbols") or re.search(r"i\s*=|_\{?\s*i|[<>]|\\(?:le|ge)(?![a-zA-Z])", expression):
        return value
    return value.subs(sympy.Symbol("i", real=True), sympy.I)


# --- comparing --------------------------------------------------------------------------------------------------


def _same(expected: Any, actual: Any) -> bool:
    import sympy

    if expected == actual:
        return True
    if isinstance(expected, sympy.MatrixBase) and isinstance(actual, sympy.MatrixBase):
        pairs = zip(expected.flat(), actual.flat(), strict=False)
        return bool(expected.shape == actual.shape) and all(_same(*pair) for pair in pairs)
    if isinstance(expected, sympy.Expr) and isinstance(actual, sympy.Expr):
        return _same_function(expected.doit(), actual.doit())
    return _verify(expected, actual) or _verify(actual, expected)


def _verify(expected: Any, actual: Any) -> bool:
    import math_verify

    # Its time-outs use signal.alarm and take whole seconds only; this process has a deadline of its own. Errors are
    # raised, because they are no wrong answers; but it raises KeyError for every unlike relation with \ne.
    try:
        return bool(
            math_verify.verify(
                [expected], [actual], float_rounding=DIGITS, numeric_precision=DIGITS - 20,
                allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True,
            )
        )  # fmt: skip
    except KeyError:
        return False


def _same_function(expected: Any, actual: Any) -> bool:
    """Whether two expressions agree: as numbers, or as functions at fixed points. (Functions that agree at four points
    of no meaning and differ elsewhere are not found in answers, and simplifying may take for ever.)"""
    import sympy

    if expected == actual:
        return True
    symbols = sorted(expected.free_symbols | actual.free_symbols, key=str)
    if not symbols:
        return _same_number(expected, actual)
    decided = 0
    for point in range(_POINTS):
        values = {symbol: _coordinate(place, point) for place, symbol in enumerate(symbols)}
        pair = [side.subs(values).doit() for side in (expected, actual)]
        if any(side.has(sympy.nan, sympy.zoo, sympy.oo) for side in pair):
            continue
        if any(sympy.N(side, 15).as_real_imag()[0].is_number is not True for side in pair):
            return _simplifies_to_zero(expected - actual)
        if not _same_number(*pair):
            return False
        decided += 1
    return decided > 1 or _simplifies_to_zero(expected - actual)


def _coordinate(place: int, point: int) -> Any:
    """A fraction for each symbol; the first point is positive, the others have both signs."""
    import sympy

    sign = -1 if point and (place + point) % 2 else 1
    return sympy.Rational(sign * _PRIMES[(place + 5 * point) % len(_PRIMES)], 2 + 2 * ((place + point) % 4))


def _same_number(expected: Any, actual: Any) -> bool:
    import sympy

    if expected.is_Rational and actual.is_Rational:
        return bool(expected == actual)
    if any(side.has(sympy.nan, sympy.zoo, sympy.oo) for side in (expected, actual)):
        return bool(expected == actual)
    one, other = (sympy.N(side, DIGITS) for side in (expected, actual))
    if not (one.is_number and other.is_number):
        return _simplifies_to_zero(expected - actual)
    largest = max(abs(one), abs(other))
    if largest < sympy.Float(10, DIGITS) ** (20 - DIGITS):  # the digits of an exact zero mean nothing
        return _simplifies_to_zero(expected - actual)
    return bool(abs(one - other) <= largest * sympy.Float(10, DIGITS) ** (20 - DIGITS))


def _simplifies_to_zero(difference: Any) -> bool:
    import sympy

    return bool(sympy.simplify(difference).is_zero)


# --- equations and inequalities ---------------------------------------------------------------------------------


def same_equation(expected: Sequence[str], actual: Sequence[str]) -> bool:
    """Whether two equations, each by its two sides, say the same: their differences are multiples of each other."""
    import sympy

    sides: list[Any] = [parsed(side) for side in (*expected, *actual)]
    if any(not isinstance(side, sympy.Expr) for side in sides):
        return False
    one, other = (left.doit() - right.doit() for left, right in (sides[:2], sides[2:]))
    if one.free_symbols != other.free_symbols or not one.free_symbols:
        return False
    values = {symbol: _coordinate(place, 0) for place, symbol in enumerate(sorted(one.free_symbols, key=str))}
    first, second = one.subs(values), other.subs(values)
    return bool(second != 0) and _same_function(one * second, other * first)


# --- sets -------------------------------------------------------------------------------------------------------


def same_set(reference: str, answer: str) -> bool:
    """Whether two spelled sets have the same members, in whatever way they are written."""
    if (expected := set_of(reference)) is None or (actual := set_of(answer)) is None:
        return False
    return bool(expected == actual) or _same_sets(expected, actual)


def _same_sets(expected: Any, actual: Any) -> bool:
    import sympy

    if isinstance(expected, sympy.FiniteSet) and isinstance(actual, sympy.FiniteSet):
        left = list(actual)
        for member in expected:
            match = next((other for other in left if _same(member, other)), None)
            if match is None:
                return False
            left.remove(match)
        return not left
    if isinstance(expected, sympy.Interval) and isinstance(actual, sympy.Interval):
        opened = (expected.left_open, expected.right_open) == (actual.left_open, actual.right_open)
        return opened and _same(expected.start, actual.start) and _same(expected.end, actual.end)
    return bool(expected.symmetric_difference(actual).is_empty)


@lru_cache(maxsize=512)
def set_of(text: str) -> Any | None:
    r"""The set that a spelled expression names: `\{-2, 2\}`, `[1, 2)`, `(-\infty, 1) \cup (1, \infty)`, `x > 2`,
    `\{x : x^2 = 4\}`; None if it names none."""
    import sympy

    text = without_outer(text.strip())
    for command, join in ((r"\\cup", sympy.Union), (r"\\setminus|\\backslash", sympy.Complement)):
        pieces = re.split(rf"(?:{command})(?![a-zA-Z])", text)
        if len(pieces) > 1:
            sets = [set_of(piece) for piece in pieces]
            return None if any(piece is None for piece in sets) else join(*sets)
    if text.startswith(r"\{") and closes_at_end(text):
        return _braced_set(text[2:-2].strip())
    if (
        text[:1] in ("(", "[")
        and text[-1:] in (")", "]")
        and closes_at_end(text)
        and len(ends := split(text[1:-1])) == 2
    ):
        start, end = (parsed(one) for one in ends)
        if not all(isinstance(one, sympy.Expr) for one in (start, end)):
            return None
        return sympy.Interval(start, end, left_open=text[0] == "(", right_open=text[-1] == ")")
    return _set_from(parsed(text))


def _braced_set(inside: str) -> Any | None:
    import sympy

    builder = split(inside, "|:")
    if len(builder) == 2:
        conditions = [_condition(part) for part in (*split(builder[0])[:1], *split(builder[1]))]
        sets = [one for one in conditions if one is not None]
        if len(sets) < max(2, len(conditions)):
            return None
        found = sympy.Intersection(*sets)
        return sympy.FiniteSet(*found) if isinstance(found, sympy.Range) and found.is_finite_set else found
    members = [parsed(part) for part in split(inside)]
    return None if any(member is None for member in members) else sympy.FiniteSet(*members)


_DOMAIN = re.compile(r"[a-zA-Z]\s*(?:\\in\s*\\mathbb\s*\{?\s*([RZNQC])\s*\}?)?")


def _condition(text: str) -> Any | None:
    r"""The set of one condition in `\{x \in \mathbb{R} : x^2 = 4\}`."""
    import sympy

    if domain := _DOMAIN.fullmatch(text.strip()):
        sets = {"Z": sympy.S.Integers, "N": sympy.S.Naturals, "Q": sympy.S.Rationals, "C": sympy.S.Complexes}
        return sets.get(domain[1], sympy.S.Reals)
    value = parsed(text)
    if isinstance(value, sympy.Eq) and len(value.free_symbols) == 1:
        return sympy.solveset(value.lhs - value.rhs, next(iter(value.free_symbols)), sympy.S.Reals)
    return _set_from(value)


def _set_from(value: Any) -> Any | None:
    import sympy

    if isinstance(value, sympy.Set):
        return value
    if isinstance(value, sympy.Eq):
        return value.rhs if isinstance(value.rhs, sympy.Set) else None
    relations = getattr(value, "_unsorted_args", None) or (value,)
    if all(isinstance(one, sympy.core.relational.Relational) for one in relations):
        symbols = set().union(*(one.free_symbols for one in relations))
        if len(symbols) == 1:
            try:
                return sympy.Intersection(*(one.as_set() for one in relations))
            except NotImplementedError:  # sympy solves no such inequality, so nobody can say which set it is
                return None
    return None
