r"""Units at the end of an answer: `12\text{ cm}`, `12 cm`, `\$12`, `3 \text{ m}^2`, `5 miles per hour`. Pure.

Any words behind a number are its unit, known or not, unless they change its value (`4\text{ or more}`). If only one of
two answers has a unit, the unit is ignored, because most references leave it out. Answers with different units are
different, whatever their numbers: no unit is converted. (math-verify 0.9 cuts every unit off, also the letter of `2m`,
so 12 m equals 12 cm.)
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
    "penny": "penny pennies",
    "mol": "mol mole",
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
    "a": "ampere amp",
    "ohm": "ohm",
    "coulomb": "coulomb",
    "tesla": "tesla",
    "farad": "farad",
    "cal": "cal calorie",
    "kcal": "kcal kilocalorie",
    "bar": "bar",
    "km/h": "kph kmh",
    "mi/h": "mph",
}
_ONE_NAME = (
    "unit dozen dime nickel quarter quart pint cup teaspoon tablespoon decade century acre hectare knot rpm atm mol"
)
_SYMBOLS = "kohm mol mM mT mC uC nC um us uA uF uL ug umol uM nF pF mmHg "
_SYMBOLS += "eV keV MeV GeV mA kN MN kJ MJ mJ kPa MPa kHz MHz GHz mV kV mW kW MW kB MB GB TB AU Gyr Myr kpc Mpc nm"
_UNITS = {name: unit for unit, names in _NAMES.items() for name in names.split()}
_UNITS |= {name: name for name in _ONE_NAME.split()}
_UNITS |= {f"{name}s": unit for name, unit in _UNITS.items() if len(name) > 1 and f"{name}s" not in _UNITS}
_UNITS |= {symbol: symbol for symbol in _SYMBOLS.split()} | {unit.upper(): unit for unit in "anjwvk"} | {"T": "tesla"}
"""Every name of a unit in small letters, and the symbols whose capitals matter: mJ is no MJ."""

_TEXT = r"\\(?:text|mathrm|mbox|textrm|operatorname|rm)"
_POWER = r"(?:\s*\^\s*\{?\s*(?P<power>[23])\s*\}?)?"
_WRAPPED = re.compile(
    rf"(?P<value>.*?[\d\}}\)!a-zA-Z])?\s*{_TEXT}\s*\{{\s*(?P<unit>[a-zA-Z][a-zA-Z ./\-^23]*)\}}{_POWER}$"
)
_PLAIN = re.compile(rf"(?P<value>.*[\d\}}\)])(?P<gap>\s*)(?P<unit>[a-zA-Z][a-zA-Z ./\-]*){_POWER}$")
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "pi", "sqrt", "mod", "gcd", "lcm", "arctan")
)
_CHANGING = frozenset(
    ("or", "plus", "minus", "squared", "cubed", "factorial", "not", "wrong", "incorrect", "above", "below")
) | {"least", "most"}
"""Words behind a number that make it another value, or none."""
_ENDING = re.compile(r"(?<=[a-z]{2})(?:ies|ie|y|es|s|e)+$")
_COMMENT = re.compile(rf"(?<=[\d}})])\s*(?:\s|{_TEXT}\s*\{{\s*)\((?P<words>|[a-z][a-zA-Z ]{{3,}})\)\s*\}}?$")

_RESIDUE = re.compile(r"(?P<value>.+?)\s*(?:\\pmod\s*\{?\s*|\(\s*(?:\\mod|mod)\s*)(?P<modulus>\w+)\s*[})]?")
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")


@dataclass(frozen=True)
class Quantity:
    """An answer without its unit, which has one spelling and is None if there is none. `may_be_factor`: it is a letter
    that may also be a variable, as in `12 m`."""

    value: str
    unit: str | None = None
    may_be_factor: bool = False


def quantity(expression: str) -> Quantity:
    """The value of an answer and the unit at its end; a dollar sign may stand in front.

    A single letter after a number is a unit only if a blank separates them (`12 m`): `12m` is a product.
    """
    text = expression.strip()
    if (comment := _COMMENT.search(text)) and not _CHANGING.intersection(comment["words"].split()):
        text = text[: comment.start()]
    if re.fullmatch(rf"{_TEXT}\s*\{{\s*\d[^{{}}]*\}}", text):
        text = unwrapped(text)
    if text.startswith((r"\$", r"-\$")):
        return Quantity(re.sub(r"\s*dollars?$", "", text.replace(r"\$", "").strip()), "dollar")
    if text.endswith(r"^\circ"):
        angle = text.removesuffix(r"^\circ").strip()
        return Quantity(text) if _ANGLE_FUNCTION.search(angle) else Quantity(angle, "degree")
    if residue := _RESIDUE.fullmatch(text):
        return Quantity(residue["value"], f"mod {residue['modulus']}")
    if (wrapped := _WRAPPED.fullmatch(text)) and wrapped["value"]:
        value = wrapped["value"].strip().removesuffix(r"^\circ")
        unit = _standard_unit(wrapped["unit"], wrapped["power"]) or _words(wrapped["unit"], wrapped["power"])
        return Quantity(value, unit) if unit else Quantity(text)
    if plain := _PLAIN.fullmatch(text):
        unit = _standard_unit(plain["unit"], plain["power"])
        words = plain["unit"].split()
        if unit and (
            len(plain["unit"]) > 1 or (plain["gap"] and {plain["unit"], plain["unit"].lower()} & _UNITS.keys())
        ):
            return Quantity(plain["value"].strip(), unit, len(plain["unit"]) == 1)
        if not unit and plain["gap"] and len(words[0]) > 2 and (unit := _words(plain["unit"], plain["power"])):
            return Quantity(plain["value"].strip(), unit)
    return Quantity(text)


_AFTER_A_NUMBER = re.compile(r"\s?[a-zA-Z]+(?:(?:\s+per)?\s*[ /\u00b7\u22c5]\s*[a-zA-Z]+){0,2}(?:\^\{?[23]\}?)?")
_LARGE = frozenset(("hundred", "thousand", "million", "billion", "trillion"))
_ORDINARY_WORDS = frozenset(("in", "am", "second", "deg", "a", "s", "l", "n", "j", "w", "v", "k"))
_SYMBOL = re.compile(r"\s(?:[NJWVKL](?![\w'^/])|A(?=[.,;)]|\s*\Z))")


def unit_after(text: str) -> str:
    """The known unit with which a text begins, as it is written behind a number; empty if it begins with none.

    Words that are more often something else in a sentence are none: the `in` of "12 in all".
    """
    if symbol := _SYMBOL.match(text):
        return symbol[0]
    match = _AFTER_A_NUMBER.match(text)
    words = match[0] if match else ""
    while words.strip():
        if words.strip() in _LARGE:
            return words
        if words.strip().lower() not in _ORDINARY_WORDS and _standard_unit(re.sub(r"[\^{}]", "", words), None):
            return words
        words = re.sub(r"\s*[ /\u00b7\u22c5]?\s*(?:[a-zA-Z]+|\^\{?[23]\}?)$", "", words)
    return ""


def _standard_unit(unit: str, power: str | None) -> str | None:
    """`square inches`, `in^2`, `sq in` -> `in^2`; None if a part of the unit is unknown."""
    text = re.sub(r"(?<=[a-zA-Z])\.(?=[a-zA-Z]\b)|\.(?=\s|$)", "", unit.strip())
    text = re.sub(r"(?<=[a-zA-Z])\s*[\u00b7\u22c5]\s*(?=[a-zA-Z])", ".", text)
    text = re.sub(r"\s+per\s+|\s*/\s*", "/", text)
    parts = [[_factor(factor.strip()) for factor in part.split(".")] for part in text.split("/")]
    if not all(all(part) for part in parts):
        return None
    return "/".join(".".join(map(str, part)) for part in parts) + (f"^{power}" if power else "")


def _factor(text: str) -> str | None:
    for words, power in (("square |sq ", "2"), ("cubic |cu ", "3")):
        if prefix := re.match(words, text, re.IGNORECASE):
            unit = _known(text[prefix.end() :].strip())
            return f"{unit}^{power}" if unit else None
    if match := re.fullmatch(r"([a-zA-Z]+)\s*(?:\^?([23])|(squared)|(cubed))", text):
        unit = _known(match[1])
        return f"{unit}^{match[2] or ('2' if match[3] else '3')}" if unit else None
    return _known(text)


def _known(name: str) -> str | None:
    return _UNITS.get(name) or _UNITS.get(name.lower())


def _words(text: str, power: str | None) -> str | None:
    """The words of a unit that is not known, in one spelling; None if they change the value of the number before them.

    In longer words the case does not count, nor whether they are one or many: `Berries` is `berry`.
    """
    parts = re.findall(r"[a-zA-Z]+|\S", re.sub(r"\bper\b", "/", text))
    if (_CHANGING | _FUNCTIONS).intersection(map(str.lower, parts)):
        return None
    words = [_known(part) or (_ENDING.sub("", part.lower()) if len(part) > 3 else part) for part in parts]
    return " ".join(words) + (f"^{power}" if power else "")


def same_unit(one: str, other: str) -> bool:
    """Whether two units are the same; a degree may be one of any scale."""
    return one == other or ("degree" in (one, other) and one.split()[0] == other.split()[0])
