r"""Units at the end of an answer: `12\text{ cm}`, `12 cm`, `\$12`, `3 \text{ m}^2`, `5 miles per hour`. Pure.

If only one of two answers has a unit, the unit is ignored, because most references leave it out. Answers with different
known units are different, whatever their numbers: no unit is converted. (math-verify 0.9 cuts every unit off, also the
letter of `2m`, so 12 m equals 12 cm.)
"""

import re
from dataclasses import dataclass

from cgd_stages.grading.spelling import unwrapped

_NAMES = {
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "m": "m meter metre",
    "km": "km kilometer kilometre",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "mg": "mg milligram",
    "g": "g gram gm",
    "kg": "kg kilogram",
    "lb": "lb pound",
    "oz": "oz ounce",
    "ton": "ton tonne",
    "ms": "ms millisecond",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year yr",
    "ml": "ml milliliter millilitre",
    "l": "l liter litre",
    "gallon": "gallon",
    "degree": "degree deg",
    "radian": "radian rad",
    "dollar": "dollar usd",
    "cent": "cent",
    "euro": "euro",
    "am": "am",
    "pm": "pm",
    "hz": "hz hertz",
    "n": "newton",
    "j": "j joule",
    "w": "w watt",
    "v": "v volt",
    "pa": "pa pascal",
    "k": "kelvin",
}
_UNITS = {name: unit for unit, names in _NAMES.items() for name in names.split()}
_UNITS |= {f"{name}s": unit for name, unit in _UNITS.items() if len(name) > 1 and f"{name}s" not in _UNITS}

_TEXT = r"\\(?:text|mathrm|mbox|textrm|operatorname|rm)"
_POWER = r"(?:\s*\^\s*\{?\s*(?P<power>[23])\s*\}?)?"
_WRAPPED = re.compile(
    rf"(?P<value>.*?[\d\}}\)!a-zA-Z])?\s*{_TEXT}\s*\{{\s*(?P<unit>[a-zA-Z][a-zA-Z ./\-^23]*)\}}{_POWER}$"
)
_PLAIN = re.compile(rf"(?P<value>.*[\d\}}\)])(?P<gap>\s*)(?P<unit>[a-zA-Z][a-zA-Z ./\-]*){_POWER}$")
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "pi", "sqrt", "mod", "gcd", "lcm", "arctan")
)


_RESIDUE = re.compile(r"(?P<value>.+?)\s*(?:\\pmod\s*\{?\s*|\(\s*(?:\\mod|mod)\s*)(?P<modulus>\w+)\s*[})]?")
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")


@dataclass(frozen=True)
class Quantity:
    """An answer without its unit. `unit` has one spelling; it is empty for words that are no known unit, and None if
    the answer has neither. `may_be_factor`: it is a letter that may also be a variable, as in `12 m`."""

    value: str
    unit: str | None = None
    may_be_factor: bool = False


def quantity(expression: str) -> Quantity:
    """The value of an answer and the unit at its end; a dollar sign may stand in front.

    A single letter after a number is a unit only if a blank separates them (`12 m`): `12m` is a product.
    """
    text = expression.strip()
    if re.fullmatch(rf"{_TEXT}\s*\{{\s*\d[^{{}}]*\}}", text):
        text = unwrapped(text)
    if text.startswith((r"\$", r"-\$")):
        return Quantity(text.replace(r"\$", "").strip(), "dollar")
    if text.endswith(r"^\circ"):
        angle = text.removesuffix(r"^\circ").strip()
        return Quantity(text) if _ANGLE_FUNCTION.search(angle) else Quantity(angle, "degree")
    if residue := _RESIDUE.fullmatch(text):
        return Quantity(residue["value"], f"mod {residue['modulus']}")
    if (wrapped := _WRAPPED.fullmatch(text)) and wrapped["value"]:
        value = wrapped["value"].strip().removesuffix(r"^\circ")
        return Quantity(value, _standard_unit(wrapped["unit"], wrapped["power"]) or "")
    if plain := _PLAIN.fullmatch(text):
        unit = _standard_unit(plain["unit"], plain["power"])
        words = plain["unit"].split()
        if unit and (plain["gap"] or len(plain["unit"]) > 1):
            return Quantity(plain["value"].strip(), unit, len(plain["unit"]) == 1)
        if not unit and plain["gap"] and len(words[0]) > 2 and not _FUNCTIONS.intersection(words):
            return Quantity(plain["value"].strip(), "")
    return Quantity(text)


_AFTER_A_NUMBER = re.compile(r"\s?[a-zA-Z]+(?:(?:\s+per)?\s*[ /]\s*[a-zA-Z]+){0,2}(?:\^\{?[23]\}?)?")
_LARGE = frozenset(("hundred", "thousand", "million", "billion", "trillion"))
_ORDINARY_WORDS = frozenset(("in", "am", "second", "deg", "a", "s", "l", "n", "j", "w", "v", "k"))


def unit_after(text: str) -> str:
    """The known unit with which a text begins, as it is written behind a number; empty if it begins with none.

    Words that are more often something else in a sentence are none: the `in` of "12 in all".
    """
    match = _AFTER_A_NUMBER.match(text)
    words = match[0] if match else ""
    while words.strip():
        if words.strip() in _LARGE:
            return words
        if words.strip().lower() not in _ORDINARY_WORDS and _standard_unit(re.sub(r"[\^{}]", "", words), None):
            return words
        words = re.sub(r"\s*[ /]?\s*(?:[a-zA-Z]+|\^\{?[23]\}?)$", "", words)
    return ""


def _standard_unit(unit: str, power: str | None) -> str | None:
    """`square inches`, `in^2`, `sq in` -> `in^2`; None if a part of the unit is unknown."""
    text = re.sub(r"(?<=[a-zA-Z])\.(?=[a-zA-Z]\b)|\.(?=\s|$)", "", unit.strip().lower())
    text = re.sub(r"\s+per\s+|\s*/\s*", "/", text)
    parts = [_factor(part.strip()) for part in text.split("/")]
    if not all(parts):
        return None
    return "/".join(str(part) for part in parts) + (f"^{power}" if power else "")


def _factor(text: str) -> str | None:
    for words, power in (("square |sq ", "2"), ("cubic |cu ", "3")):
        if prefix := re.match(words, text):
            unit = _UNITS.get(text[prefix.end() :].strip())
            return f"{unit}^{power}" if unit else None
    if match := re.fullmatch(r"([a-z]+)\s*(?:\^?([23])|(squared)|(cubed))", text):
        unit = _UNITS.get(match[1])
        return f"{unit}^{match[2] or ('2' if match[3] else '3')}" if unit else None
    return _UNITS.get(text)
