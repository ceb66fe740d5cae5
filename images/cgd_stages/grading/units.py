r"""Units at the end of an answer: `12\text{ cm}`, `12 cm`, `\$12`, `3 \text{ m}^2`, `5 miles per hour`. Pure.

A unit that only one of two answers has says nothing, because references mostly leave it out. Two units that are known
and differ make two answers different, whatever the numbers; nothing is converted.
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
_KNOWN = {name: unit for unit, names in _NAMES.items() for name in names.split()}
_KNOWN |= {f"{name}s": unit for name, unit in _KNOWN.items() if len(name) > 1 and f"{name}s" not in _KNOWN}

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
    """An answer without its unit. `unit`: its one spelling; empty: words that are no known unit; None: none at all."""

    value: str
    unit: str | None = None


def quantity(expression: str) -> Quantity:
    """The value and the unit that an answer ends on; dollars may stand before it.

    A single bare letter after a number is a unit only where it stands apart (`12 m`): `12m` is a product.
    """
    text = expression.strip()
    if text.startswith((r"\$", r"-\$")):
        return Quantity(text.replace(r"\$", "").strip(), "dollar")
    if text.endswith(("^\\circ", "^{\\circ}", "\\degree", "\u00b0")):
        return Quantity(re.sub(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|\u00b0)$", "", text).strip(), "degree")
    if (wrapped := _WRAPPED.fullmatch(text)) and wrapped["value"]:
        return Quantity(wrapped["value"].strip(), _one_spelling(wrapped["unit"], wrapped["power"]) or "")
    if plain := _PLAIN.fullmatch(text):
        unit = _one_spelling(plain["unit"], plain["power"])
        words = plain["unit"].split()
        if unit and (plain["gap"] or len(plain["unit"]) > 1):
            return Quantity(plain["value"].strip(), unit)
        if not unit and plain["gap"] and len(words[0]) > 2 and not _FUNCTIONS.intersection(words):
            return Quantity(plain["value"].strip(), "")
    return Quantity(text)


def is_bare_letter(expression: str) -> bool:
    r"""Whether what looks like a unit may be a variable: `12 m`, not `12\text{ m}` and not `12 cm`."""
    plain = _PLAIN.fullmatch(expression.strip())
    return bool(plain and len(plain["unit"]) == 1)


def _one_spelling(unit: str, power: str | None) -> str | None:
    """`square inches`, `in^2`, `sq in` -> `in^2`; None where a part of it is not known."""
    text = re.sub(r"(?<=[a-zA-Z])\.(?=[a-zA-Z]\b)|\.(?=\s|$)", "", unit.strip().lower())
    text = re.sub(r"\s+per\s+|\s*/\s*", "/", text)
    parts = [_factor(part.strip()) for part in text.split("/")]
    if not all(parts):
        return None
    return "/".join(str(part) for part in parts) + (f"^{power}" if power else "")


def _factor(text: str) -> str | None:
    for words, power in (("square |sq ", "2"), ("cubic |cu ", "3")):
        if found := re.match(words, text):
            unit = _KNOWN.get(text[found.end() :].strip())
            return f"{unit}^{power}" if unit else None
    if found := re.fullmatch(r"([a-z]+)\s*(?:\^?([23])|(squared)|(cubed))", text):
        unit = _KNOWN.get(found[1])
        return f"{unit}^{found[2] or ('2' if found[3] else '3')}" if unit else None
    return _KNOWN.get(text)
