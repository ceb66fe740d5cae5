r"""Decides whether two answers are the same, and by which rule. It rounds nothing unless there is a tolerance.

The first rule that applies decides. math-verify 0.9 is the measure: each rule says where it is wrong.

spelling   the same text, apart from spacing, text commands, dollar signs and commas in thousands. Most answers need no
           other rule, and no parser.
choice     a lettered choice: `C`, `(C)`, `\text{(C) } 12`. math-verify reads 12 there.
word       words: `\text{Evelyn}`, `even`, `True` (also `yes`), `XIV`. math-verify multiplies their letters.
clock      times of day, `8:15`, and ratios, `1:2:3`. math-verify divides: 10:30 is 1:3.
several    several values in any order, none missing: `1, 2`, `2 and 1`, `\{1, 2\}`, `1 \pm 2`, each compared by these
           rules. math-verify compares `1, 2` and `2, 1` as a set, but a list joined by words not at all.
interval   an interval, by brackets and ends; tuple: points and lists, in order. math-verify takes `(1, 2)` for an
           interval, also as a point, and `[3]` for 3.
set        sets by their members, in whatever way they are written: `\{x : x^2 = 4\}`, `x > 2`, `(2, \infty)`, unions.
unit       units that differ, `12 m` and `12 cm`; equal values of which one has a unit, `12 cm` and `12`
equation   equations; a value may have a name, `x = 5`, or stand at the end of a computation, `12 - 5 = 7`.
tolerance  numbers that differ by at most the benchmark's tolerance
value      everything else: equal as numbers or as expressions, see `numerals` and `expressions`
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from cgd_stages.grading.expressions import number_of, same_equation, same_set, same_value
from cgd_stages.grading.numerals import exact
from cgd_stages.grading.spelling import (
    CHEMICAL,
    WORDS,
    bare,
    closes_at_end,
    same_spelling,
    sides,
    spell,
    split,
    unwrapped,
    without_outer,
)
from cgd_stages.grading.units import quantity, same_unit

LONGEST = 5000

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
    if verdict := compare_at_once(reference, answer, tolerance):
        return verdict
    answer = _one_name(_without_letter(answer, reference), reference)
    reference, answer = _named_set(reference), _named_set(answer)
    if (same := _same_word(spell(reference), spell(answer))) is not None:
        return Verdict(same, "word")
    return _compare_shapes(_shape(reference), _shape(answer), [part.strip() for part in tolerance.split(",")])


def compare_at_once(reference: str, answer: str, tolerance: str = "") -> Verdict | None:
    """The verdict where it needs no parser of expressions: the same spelling, a choice, or numbers with their units.

    Answers of more than `LONGEST` characters are compared as they are written.
    """
    if max(len(reference), len(answer)) > LONGEST:
        return Verdict(reference.split() == answer.split(), "spelling")
    if same_spelling(reference, answer) or _same_molecule(reference, answer):
        return Verdict(True, "spelling")
    if (letter := _choice(reference)) is not None:
        return Verdict(letter == _choice(answer, lenient=True), "choice")
    if tolerance:
        return None
    quantities = [quantity(spell(text)) for text in (reference, answer)]
    if any(one.may_be_factor or exact(without_outer(unwrapped(one.value))) is None for one in quantities):
        return None
    return _compare_quantities(spell(reference), spell(answer), "")


def _same_molecule(reference: str, answer: str) -> bool:
    """Whether two chemical formulas are the same but for the place of their numbers: `H_2O` and H2O."""
    texts = [re.sub(r"\\ce\{([^{}]*)\}", r"\1", unwrapped(spell(text))) for text in (reference, answer)]
    return all(map(CHEMICAL.fullmatch, texts)) and len({re.sub("[_^{}]", "", text) for text in texts}) == 1


# --- choices and words ------------------------------------------------------------------------------------------

_LETTER = re.compile(r"[(\[]([A-Ja-j])[)\]]|([A-J])\)?")
_LED_BY_LETTER = re.compile(r"(?:\(([A-Ja-j])\)|([A-J](?=\s*[.:])|[A-Ja-j](?=\)))\s*[).:])\s*(?P<text>.+)", re.DOTALL)
_ORDINARY = frozenset({"yes", "no", "odd"})
_REASONED = re.compile(r"(yes|no|true|false)(?:\s*[,.;:(]|\s+(?:because|since|as)\b)", re.IGNORECASE)
_SAME_WORD = {"yes": "true", "no": "false", "infinitely many solutions": "infinitely many", "dne": "does not exist"}


def _choice(expression: str, *, lenient: bool = False) -> str | None:
    """The letter of a lettered choice, in upper case. Lenient: the text of the choice may follow the letter."""
    text = re.sub(r"^(?:option|choice)\s+", "", unwrapped(spell(expression)), flags=re.IGNORECASE)
    match = _LETTER.fullmatch(text) or (_LED_BY_LETTER.fullmatch(text) if lenient else None)
    if lenient and not match and (small := re.fullmatch(r"([a-j])\)?", text)):
        return small[1].upper()
    return (match[1] or match[2]).upper() if match else None


def _without_letter(answer: str, reference: str) -> str:
    """The text of a choice, where the reference is that text: `(C) 12` or `C) 12` for 12."""
    led = re.compile(r"(?:\(([A-J])\)|[A-J][.):])\s*(?P<text>[^\s(,;].*)", re.DOTALL)
    match = led.fullmatch(unwrapped(spell(answer)))
    return answer if not match or led.fullmatch(unwrapped(spell(reference))) else match["text"]


def _one_name(answer: str, reference: str) -> str:
    """The name of two that the reference has: `iron (Fe)` for Fe."""
    names = re.fullmatch(r"(?P<words>[A-Za-z][\w' -]{3,})\s\((?P<other>[A-Za-z][\w' -]*)\)", unwrapped(spell(answer)))
    return next((name for name in names.groups() if _same_name(name, reference)), answer) if names else answer


def _same_name(one: str, other: str) -> bool:
    return same_spelling(one, other) or _words(spell(one))[0] == _words(spell(other))[0] is not None


_NAMED_SETS = (
    (re.compile(r"(?:the )?empty set|no (?:real )?solutions?", re.IGNORECASE), r"\emptyset"),
    (re.compile(r"all (?:real numbers|reals)", re.IGNORECASE), r"\mathbb{R}"),
)


def _named_set(expression: str) -> str:
    text = unwrapped(spell(expression))
    return next((value for name, value in _NAMED_SETS if name.fullmatch(text)), expression)


_CAPITALS = re.compile(r"(\\(?:measured)?angle\s*)?([A-Z]{2,})")
_SHORT_WORD = re.compile(r"(?=[a-z]*[aeiou])[a-wy]{3}")
_MATRIX = re.compile(r"[A-Z](?:\^(?:\{(?:-1|T|\d)\}|T|\d))?")
_MATRICES = re.compile(rf"(?=.*\^\{{?(?:-1|T))(?:{_MATRIX.pattern}){{2,}}")


def _same_word(reference: str, answer: str) -> bool | None:
    """Whether two answers are the same words; None if neither is surely made of words. Capitals alone are a word, not
    a product: XIV is no XVI. An angle has two directions. Matrices do not commute."""
    capitals = [_CAPITALS.fullmatch(unwrapped(text)) for text in (reference, answer)]
    if capitals[0] and capitals[1]:
        (kind, letters), (other_kind, other_letters) = (match.groups() for match in capitals if match)
        turned = letters[::-1] if kind else letters
        return kind == other_kind and other_letters in (letters, turned)
    if _is_other_order(unwrapped(reference), unwrapped(answer)):
        return False
    (one, sure), (other, also_sure) = _words(reference), _words(answer)
    return one == other != None if sure or also_sure else None  # noqa: E711


def _is_other_order(one: str, other: str) -> bool:
    """Whether two answers have the same letters, or the same matrices, in another order: `act` and `cat`, but not the
    products `mgh` and `abc`; `A^{-1}B` and `BA^{-1}`."""
    if all(_SHORT_WORD.fullmatch(text) for text in (one, other)):
        neighbours = ord(max(one)) - ord(min(one)) <= 3
        return one != other and sorted(one) == sorted(other) and not neighbours
    products = [text.replace(r"\top", "T").replace(" ", "") for text in (one, other)]
    if not all(_MATRICES.fullmatch(text) for text in products):
        return False
    factors = [[re.sub("[{}]", "", factor) for factor in _MATRIX.findall(text)] for text in products]
    return factors[0] != factors[1] and sorted(factors[0]) == sorted(factors[1])


def _words(expression: str) -> tuple[str | None, bool]:
    """The words of an answer, None if it has other characters; and whether they are no product of variables."""
    expression = _MEMBER.sub("", expression, count=1)
    text = unwrapped(expression).strip(" .!")
    if reasoned := _REASONED.match(text):
        text = reasoned[1]
    if not re.fullmatch(r"[A-Za-z][A-Za-z' \-]*", text):
        return None, False
    words = text.casefold().split()
    sure = any(len(word) > 3 or word in _ORDINARY for word in words) and not {"and", "or"}.intersection(words)
    phrase = " ".join(word for word in words if word not in ("the", "a", "an"))
    phrase = "neither" if phrase.startswith("neither ") else phrase
    return _SAME_WORD.get(phrase, phrase), sure or bool(re.match(WORDS, expression))


# --- shapes: one value, several values, a set, a point or an interval ---------------------------------------------

_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])")
_OR = re.compile(rf"\s*(?:,\s*)?(?:{WORDS}\s*\{{\s*,?\s*or\s*\}}|(?<![a-zA-Z])or(?![a-zA-Z]))\s*")
_AND = re.compile(
    rf"\s*(?:,\s*)?(?:{WORDS}\s*\{{\s*,?\s*(?:and|or)\s*\}}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))\s*", re.IGNORECASE
)
_BOUND = re.compile(r"[<>]|\\[lg]e(?![a-zA-Z])")
_NAMES = re.compile(
    r"\s*(?:\(\s*[a-zA-Z](?:_\{\w+\})?(?:\s*,\s*[a-zA-Z](?:_\{\w+\})?)+\s*\)|^(?:P|\\Pr)\s*\([^()=]*\)|^\|[^|=]*[A-Z][^|=]*\|)\s*=\s*"
)
_MEMBER = re.compile(
    r"^\s*(?:\\mathbf\{\w\}|\\nabla\s*\w|[A-Z]\s*\\(?:cap|cup|setminus)\s*[A-Z]|[a-zA-Z]|\\[a-z]+)(?:_\{\w+\})?\s*(?:\\in(?![a-zA-Z])\s*|=\s*(?=\\\{|\\text|\\emptyset|[(\[][^()\[\]]*,[^()\[\]]*[)\]]$))"
)
_POINT = re.compile(r"(?:[A-Z](?:_\{\w+\})?'?)\s*=?\s*(?=\()")


@dataclass(frozen=True)
class Shape:
    """`[1, 2)`: a tuple with brackets `[)` and parts 1 and 2. A value is its own only part."""

    kind: str
    text: str
    parts: tuple[str, ...]
    brackets: str = ""


def _shape(expression: str) -> Shape:
    text = _NAMES.sub("", _MEMBER.sub("", spell(expression), count=1), count=1).strip()
    text = without_outer(text) if not text.startswith("{") else text
    if text == r"\emptyset":
        return Shape("set", text, ())
    if _is_set(text):
        inside = text.removeprefix("\\")[1:].removesuffix("}").removesuffix("\\")
        if len(split(inside, "|:")) > 1:
            return Shape("value", text, (text,))
        return Shape("set", text, _values(inside))
    if all(_BOUND.search(part) for part in _OR.split(text)):
        text = _OR.sub(r" \\cup ", text)
    parts = _values(text)
    if len(parts) > 1:
        forms = len({bare(part) for part in parts}) == len(parts)  # `1/2 or 50%` is one value; in `2, 2` both count
        single = forms and all(_equal(parts[0], part, "") for part in parts[1:])
        return Shape("value", parts[0], (parts[0],)) if single else Shape("list", text, parts)
    return _bracketed(parts[0]) or Shape("value", parts[0], parts)


def _is_set(text: str) -> bool:
    r"""Whether it is a set with its members: `\{1, 2\}`, or `{1, 2}`, where the backslashes are lost."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return closes_at_end(text)
    return text[:1] + text[-1:] == "{}" and closes_at_end(text) and len(split(text[1:-1])) > 1


def _values(text: str) -> tuple[str, ...]:
    r"""The parts between commas, semicolons, "and" or "or" outside brackets. A part with one `\pm` has two values."""
    values: list[str] = []
    for part in filter(None, split(_AND.sub(", ", text))):
        if len(_PLUS_MINUS.findall(part)) == 1:
            values += [_PLUS_MINUS.sub(sign, part).strip() for sign in "+-"]
        else:
            values.append(_POINT.sub("", part) if _bracketed(_POINT.sub("", part)) else part)
    return tuple(values) or (text,)


def _bracketed(text: str) -> Shape | None:
    """A point, a list or an interval, also `]1, 2[` and the list of one value `[3]`; None for (x + 1)."""
    if len(text) < 3 or text[0] not in "([]" or text[-1] not in ")[]":
        return None
    turned = text.startswith("]") or text.endswith("[")
    if not turned and not closes_at_end(text):
        return None
    parts = split(text[1:-1])
    if len(parts) < 2 and text[0] + text[-1] != "[]":
        return None
    return Shape("tuple", text, tuple(parts), text[0] + text[-1])


def _compare_shapes(expected: Shape, actual: Shape, tolerances: Sequence[str]) -> Verdict:
    match expected.kind, actual.kind:
        case ("value", "value"):
            return _compare_values(expected.text, actual.text, tolerances[0])
        case ("tuple", "tuple"):
            return _compare_tuples(expected, actual, tolerances[0])
        case ("tuple", "list") | ("list", "tuple"):
            return Verdict(_in_order(expected.parts, actual.parts, tolerances[0]), "tuple")
        case ("set" | "list" | "value", "set" | "list" | "value") if not _describes_set(expected, actual):
            if len(tolerances) != len(expected.parts):
                tolerances = [tolerances[0]] * len(expected.parts)
            pairs = list(zip(expected.parts, tolerances, strict=True))
            if _is_ranking(expected.parts):
                return Verdict(_in_order(expected.parts, actual.parts, ""), "several")
            same = _in_any_order(pairs, actual.parts, lambda pair, value: _equal(pair[0], value, pair[1]))
            return Verdict(same, "several")
    return Verdict(_describes_set(expected, actual) and same_set(expected.text, actual.text), "set")


def _is_ranking(parts: Sequence[str]) -> bool:
    """Whether these letters stand in an order that says something: C, A, B."""
    letters = [unwrapped(part) for part in parts]
    return all(re.fullmatch("[A-J]", letter) for letter in letters) and letters != sorted(letters)


def _describes_set(*shapes: Shape) -> bool:
    """Whether one of them says which set is meant without its members, as `x > 2` does."""
    return any(shape.kind == "value" and _SET_IN_WORDS.search(shape.text) for shape in shapes)


_SET_IN_WORDS = re.compile(
    r"[<>]|\\(?:le|ge|ne|cup|cap|setminus|backslash|mathbb|in)(?![a-zA-Z])|^\\\{.*[|:]", re.DOTALL
)


def _compare_tuples(expected: Shape, actual: Shape, tolerance: str = "") -> Verdict:
    is_interval = len(expected.parts) == 2 and set(expected.brackets) != set("()")
    rule = "interval" if is_interval else "tuple"
    if expected.brackets != actual.brackets and (
        len(expected.parts) == 2 or "][" in (expected.brackets, actual.brackets)
    ):
        return Verdict(False, rule)
    return Verdict(_in_order(expected.parts, actual.parts, tolerance), rule)


def _in_any_order(references: Sequence[R], answers: Sequence[A], equal: Callable[[R, A], bool]) -> bool:
    """Whether every reference has an answer of its own, and no answer is left."""
    left = list(answers)
    if len(references) != len(left):
        return False
    for reference in references:
        match = next((place for place, answer in enumerate(left) if equal(reference, answer)), None)
        if match is None:
            return False
        del left[match]
    return not left


def _in_order(references: Sequence[str], answers: Sequence[str], tolerance: str) -> bool:
    return len(references) == len(answers) and all(
        _equal(*pair, tolerance) for pair in zip(references, answers, strict=True)
    )


def _equal(reference: str, answer: str, tolerance: str) -> bool:
    """Whether two parts are equal; x=1 and y=1 are not."""
    if same_spelling(reference, answer):
        return True
    shapes = _bracketed(reference), _bracketed(answer)
    if shapes[0] and shapes[1]:
        return _compare_tuples(shapes[0], shapes[1], tolerance).equal
    return shapes == (None, None) and _compare_values(reference, answer, tolerance).equal


# --- one value --------------------------------------------------------------------------------------------------


def _compare_values(reference: str, answer: str, tolerance: str) -> Verdict:
    if (same := _same_word(reference, answer)) is not None:
        return Verdict(same, "word")
    described = [_SET_IN_WORDS.search(text) is not None for text in (reference, answer)]
    if any(described):
        return Verdict(same_set(reference, answer) or (all(described) and same_value(reference, answer)), "set")
    equations = sides(reference), sides(answer)
    if max(map(len, equations)) > 1 and any(r"\equiv" in text for text in (reference, answer)):
        return Verdict(False, "equation")
    if max(map(len, equations)) > 1:
        return _compare_equations(*equations, tolerance)
    return _compare_quantities(reference, answer, tolerance)


_NAME = re.compile(r"(?:\\?[a-zA-Z]+(?:_\{\w+\})?|\\(?:angle|triangle)\s*[A-Z]+)'*(?:\s*\(\s*[a-zA-Z]+\s*\))?")


def _is_name(side: str) -> bool:
    text = unwrapped(side)
    return bool(_NAME.fullmatch(text)) and text not in ("e", "i", r"\pi", r"\infty", r"\emptyset")


def _compare_equations(expected: list[str], actual: list[str], tolerance: str) -> Verdict:
    """Two equations, or an equation and a value. The value of an equation is its last side, or the first if a name
    comes last: `14 = x`. An equation that ends on 0 has no value unless it begins with a name or a number."""
    if len(expected) > 1 and len(actual) > 1:
        named = [one for one in (expected, actual) if _is_name(one[0]) or _is_name(one[-1])]
        if len(named) == 2 and _name_of(expected) == _name_of(actual):
            values = [str(_value_of(one)) for one in (expected, actual)]
            return Verdict(_compare_quantities(values[0], values[1], tolerance).equal, "equation")
        return Verdict(same_equation((expected[0], expected[-1]), (actual[0], actual[-1])), "equation")
    first, second = _value_of(expected), _value_of(actual)
    if first is None or second is None:
        return Verdict(False, "equation")
    verdict = _compare_quantities(first, second, tolerance)
    return verdict if verdict.rule == "tolerance" else Verdict(verdict.equal, "equation")


def _name_of(equation: list[str]) -> str:
    return re.sub(r"\s|\(\s*\w+\s*\)", "", unwrapped(equation[0] if _is_name(equation[0]) else equation[-1]))


_TERM = r"[a-zA-Z](?:(?:\^\{-1\})?\s*\(\s*\d+\s*\))?"
_SUM = re.compile(rf"{_TERM}(?:\s*[-+]\s*{_TERM})+")
"""The sum of names, or of a function's values: a + b, f(0) + f(6)."""


def _value_of(equation: list[str]) -> str | None:
    first, last = equation[0], equation[-1]
    if len(equation) == 1 or _is_name(first):
        return last
    if _is_name(last):
        return first
    is_sum = _SUM.fullmatch(first)
    return None if last == "0" and re.search(r"[a-zA-Z]", first) and not is_sum else last


def _compare_quantities(reference: str, answer: str, tolerance: str) -> Verdict:
    expected, actual = quantity(reference), quantity(answer)
    units = [one.unit or ("%" if one.value.endswith("%") else None) for one in (expected, actual)]
    if units[0] and units[1] and not same_unit(units[0], units[1]):
        return Verdict(False, "unit")
    verdict = _compare_numbers(expected.value, actual.value, tolerance)
    if (expected.unit is None) == (actual.unit is None):
        return verdict
    if verdict.equal:
        return Verdict(True, "unit")
    angle, other = (expected, actual) if expected.unit == "degree" else (actual, expected)
    if angle.unit == "degree" and r"\pi" in other.value:
        return Verdict(same_value(rf"\frac{{{angle.value}\pi}}{{180}}", other.value), "unit")
    factor = expected.may_be_factor or actual.may_be_factor
    return Verdict(factor and same_value(reference, answer), "value")


def _compare_numbers(reference: str, answer: str, tolerance: str) -> Verdict:
    reference, answer = without_outer(unwrapped(reference)), without_outer(unwrapped(answer))
    if same_spelling(reference, answer):
        return Verdict(True, "spelling")
    if any(fields := (_fields(reference), _fields(answer))):
        return Verdict(_same_fields(*fields, reference, answer), "clock")
    if tolerance and (most := _largest_difference(reference, tolerance)) is not None:
        expected, actual = number_of(reference), number_of(answer)
        if expected is not None and actual is not None:
            return Verdict(abs(expected - actual) <= most * (1 + 1e-9), "tolerance")
    return Verdict(_same_reading(reference, answer), "value")


_TIME = re.compile(r"\d{1,2}(?::[0-5]\d){1,2}")
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}")


def _fields(expression: str) -> list[str]:
    """The numbers of a time of day, a date or a ratio; empty for anything else."""
    fields = re.split("-" if _DATE.fullmatch(expression) else r"\s*:\s*", expression)
    return fields if len(fields) > 1 and all(re.fullmatch(r"\d+(?:\.\d+)?", field) for field in fields) else []


def _same_fields(expected: list[str], actual: list[str], reference: str, answer: str) -> bool:
    """A time of day or a date equals itself alone; a ratio its multiples, and one of two numbers its fraction."""
    numbers = [[Fraction(field) for field in fields] for fields in (expected, actual)]
    if any(_TIME.fullmatch(text.replace(" ", "")) or _DATE.fullmatch(text) for text in (reference, answer)):
        return numbers[0] == numbers[1]
    if expected and actual:
        first, second = numbers
        return len(first) == len(second) and all(a * second[0] == b * first[0] for a, b in zip(*numbers, strict=True))
    ratio, other = (numbers[0], answer) if expected else (numbers[1], reference)
    return len(ratio) == 2 and ratio[1] != 0 and exact(other) == ratio[0] / ratio[1]


def _largest_difference(reference: str, tolerance: str) -> float | None:
    """The tolerance as a number; None if it is a share and the reference is no decimal fraction."""
    if not tolerance.endswith("%"):
        return float(tolerance)
    number = number_of(reference) if re.search(r"\d\.\d|\.\d|10\^", reference) else None
    return None if number is None else abs(number) * float(tolerance.removesuffix("%")) / 100


def _same_reading(reference: str, answer: str) -> bool:
    """Whether two expressions are equal. A percentage equals its number and its fraction (25% = 25 = 0.25), because
    references use both."""
    references, answers = _readings(reference), _readings(answer)
    if len(references) == len(answers):
        return _same_exactly(references[0], answers[0])
    return any(_same_exactly(*pair) for pair in itertools.product(references, answers))


def _same_exactly(reference: str, answer: str) -> bool:
    expected, actual = exact(reference), exact(answer)
    return same_value(reference, answer) if expected is None or actual is None else expected == actual


def _readings(expression: str) -> list[str]:
    """An expression; a percentage as its number and as its fraction; `5e-7` as a sum with e and as a power of ten."""
    if power := re.fullmatch(r"(\d+)e([+-]\d)", expression):
        return [expression, rf"{power[1]} \times 10^{{{int(power[2])}}}"]
    if not expression.endswith("%"):
        return [expression]
    number = expression.removesuffix("%").strip()
    return [number, rf"\frac{{{number}}}{{100}}"]
