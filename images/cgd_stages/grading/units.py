r"""Units at the end of an answer: `12\text{ cm}`, `12 cm`, `\$12`, `3 \text{ m}^2`, `5 miles per hour`. Pure.

If only one of two answers has a unit, the unit is ignored, because most references leave it out. Answers with different
known units are different, whatever their numbers: no unit is converted.
"""

import re
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Quantity:
    """An answer without its unit. `unit` has one spelling; it is empty for words that are no known unit, and None if
    the answer has neither."""

    value: str
    unit: str | None = None


def quantity(expression: str) -> Quantity:
    """The value of an answer and the unit at its end; a dollar sign may stand in front.

    A single letter after a number is a unit only if a blank separates them (`12 m`): `12m` is a product.
    """
    text = expression.strip()
    if text.startswith((r"\$", r"-\$")):
        return Quantity(text.replace(r"\$", "").strip(), "dollar")
    if text.endswith(("^\\circ", "^{\\circ}", "\\degree", "\u00b0")):
        return Quantity(re.sub(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|\u00b0)$", "", text).strip(), "degree")
    if (wrapped := _WRAPPED.fullmatch(text)) and wrapped["value"]:
        return Quantity(wrapped["value"].strip(), _standard_unit(wrapped["unit"], wrapped["power"]) or "")
    if plain := _PLAIN.fullmatch(text):
        unit = _standard_unit(plain["unit"], plain["power"])
        words = plain["unit"].split()
        if unit and (plain["gap"] or len(plain["unit"]) > 1):
            return Quantity(plain["value"].strip(), unit)
        if not unit and plain["gap"] and len(words[0]) > 2 and not _FUNCTIONS.intersection(words):
            return Quantity(plain["value"].strip(), "")
    return Quantity(text)


def is_bare_letter(expression: str) -> bool:
    r"""Whether the unit may be a variable, as in `12 m`, but not in `12\text{ m}` or `12 cm`."""
    plain = _PLAIN.fullmatch(expression.strip())
    return bool(plain and len(plain["unit"]) == 1)


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
