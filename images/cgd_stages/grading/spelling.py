r"""One spelling for one value: what LaTeX, Markdown and Unicode write in several ways is written in one. Pure.

Nothing here changes a value. A blank between digits stays unless it separates thousands, because `1 1/2` is no 11/2 and
`3 4` is no number at all. (math-verify 0.9 reads `3 4` as 7: its parser takes two numbers side by side for a mixed
fraction.)
"""

import re
import unicodedata
from functools import lru_cache

from cgd_stages.grading.numerals import NUMBER_WORD, of_words

OPENING, CLOSING = "([{", ")]}"

WORDS = r"\\(?:text|mathrm|mbox|textbf|mathbf|textit|mathit|textrm|textsf|texttt|mathsf|emph|bm|boldsymbol|underline)"
_WRAPPED = re.compile(rf"{WORDS}\s*\{{((?:[^{{}}]|_\{{\w+\}})*)\}}|\\operatorname\s*\{{([^{{}}]*)\}}")

_UNICODE = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
        "\u00f7": r"\div ", "\u03c0": r"\pi ", "\u03b8": r"\theta ", "\u221e": r"\infty ", "\u00b1": r"\pm ",
        "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2205": r"\emptyset ", "\u00b0": r"^\circ ",
        "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2026": r"\dots ", "\u2248": r"\approx ",
        "\u20ac": "", "\u00a3": "", "\u00a5": "", "\u20b9": "", "\u211d": r"\mathbb{R}", "\u2044": "/",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    }
)  # fmt: skip

_TH = "st|nd|rd|th"
_LARGE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_SPANS = "hours?|hrs?|h|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|feet|foot|ft|inch(?:es)?|in"
_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\A\s*(-?)\s*\$(?=[\d.][^$]*\Z)", r"\1\\$"),  # a price, not the begin of a formula
        (rf"\A\s*(?:{WORDS}\s*\{{)?\s*(?:(?i:the )?(?i:final )?(?i:answer)(?: is)?)\s*:?\s*\}}", ""),
        (r"\\checkmark(?![a-zA-Z])|\A\s*\\(?:approx|sim)(?![a-zA-Z])", ""),
        (r"\\var(phi|epsilon|theta)(?![a-zA-Z])", r"\\\1"),
        (rf"(?<=\d)\s*(?:{WORDS}\s*\{{\s*to\s*\}}|(?<=\s)to(?=\s))\s*(?=\d)", ":"),
        (r"\u221a\s*\(", r"\\sqrt("),
        (r"\\(?:[lL]arge|LARGE|[hH]uge|small|normalsize|bf|rm|it|boldmath|(?:text)?color\s*\{\w+\})(?![a-zA-Z])", " "),
        (r"\u221a\s*(\w+)", r"\\sqrt{\1}"),
        (r",\s*\\[!,;: ]\s*(?=\d{3}(?!\d))", ","),
        (rf"(?:{WORDS}\s*)?\{{\s*([,:])\s*\}}", r"\1"),
        (r"\\{2}\s*\[[^\]]*\]", r"\\\\"),
        (r"\\[lr]brace(?![a-zA-Z])", lambda match: r"\{" if match[0][1] == "l" else r"\}"),
        (r"(?<!\\)\$|(?<!\\)\\[()\[\]]", ""),
        (r"(?:(?<!\\)\\[!,;:> ]|[~\s]|\\(?:displaystyle|textstyle|limits|qquad|quad|thinspace)(?![a-zA-Z]))+", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\[lcv]?dots(?![a-zA-Z])|\.{3}", r"\\dots"),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
        (r"\\(l|g|n)eq?(?:slant)?(?![a-zA-Z])", r"\\\1e"),
        (r"\\([lr])angle(?![a-zA-Z])", lambda match: "(" if match[1] == "l" else ")"),
        (r"\\(?:[lr]?vert|mid)(?![a-zA-Z])", "|"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}|^\s*\{\s*\}\s*$", r"\\emptyset"),
        (rf"(?<=[0-9A-F])\s*(?:{WORDS}\s*\{{\s*)?\(?(?:in )?base[ -](\w+)\)?\}}?", r"_{\1}"),
        (rf"(?<=\d)\^?\s*(?:\{{?{WORDS}\{{(?:{_TH})\}}\}}?|\{{(?:{_TH})\}}|(?:{_TH})(?![a-zA-Z]))", ""),
        (
            rf"(?<=\d)\s*({WORDS}\s*\{{)?\s*({'|'.join(_LARGE)})\b",
            lambda match: rf"\times 10^{{{_LARGE[match[2]]}}}{match[1] or ''}",
        ),
        (r"(?<![\\a-zA-Z{])(pi|log|ln|sin|cos|tan|exp)(?![a-zA-Z])", r"\\\1 "),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])", r"^\\circ"),
        (rf"\^\\circ\s*(?:{WORDS}\s*\{{\s*)?([CF])(?![a-zA-Z])\s*\}}?", r"\\text{ degrees \1}"),
        (r"(?<=degrees )([CF])(?:elsius|ahrenheit)", r"\1"),
        (r"\\(?:bmod|mod)(?![a-zA-Z])|(?<=\d)\s*mod\s*(?=\d)", r"\\mod"),
        (rf"\b(\d{{1,2}})(?:{_TH})?\s+(?:of\s+)?({MONTHS}),?\s+(?=\d{{4}})", r"\2 \1, "),
        (r"(?<=\d)(\s*(?:kg|N|J|g|W|kW|V|A|Pa))\s*\\cdot\s*(?=(?:m|s|K|h|mol)(?![a-zA-Z]))", r"\1."),
        (rf"(?<=\d)\s*\\mu(?![a-zA-Z])\s*(?:{WORDS}\s*\{{\s*)?([a-zA-Z]+)\s*\}}?", r" u\1"),
        (r"_(\w)", r"_{\1}"),
        (rf"(?<=\d)\s*(?:{WORDS}\s*\{{\s*(k)\s*\}}\s*)?\\Omega(?![a-zA-Z])", r"\\text{ \1ohm}"),
        (r"\\(?:vec|hat|overrightarrow)\s*\{\s*(\w+)\s*\}", r"\1"),
        (r"\\(?:long)?rightarrow(?![a-zA-Z])|->|\u2192", r"\\to "),
        (rf"(?<=\d) ?({_SPANS}) (?=\d+ ?(?:{_SPANS})\b)", r" \1, "),
        (r"\s*\\%|\s+%|\s+percent\b|\s*\\text\s*\{\s*percent\s*\}", "%"),
    )
)  # fmt: skip
_SUBSCRIPT = r"(?:_?\{?\d+\}?)?"
CHEMICAL = re.compile(
    rf"(?=.*[\d+-]|[A-Z][a-z]?[A-Z])(?:[A-Z][a-z]?{_SUBSCRIPT}|\((?:[A-Z][a-z]?{_SUBSCRIPT})+\){_SUBSCRIPT})+(?:\^?\{{?\d?[+-]\}}?)?"
)
"""The formula of a molecule or an ion: `CH3COOH`, `HCO_3^-`."""
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,/^_])(?<!\d )[1-9]\d{0,2}(?: \d{3})+(?![\d/]| ?\d| ?/)")
_MIXED = re.compile(r"(?<![\d./])(\d{1,99}) (\d{1,99}) ?/ ?(\d{1,99})(?![\d.])")
_E_NOTATION = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([eE])([+-]?)(\d+)(?![\d.]*[a-zA-Z!^])")


_RAISED = (
    (re.compile(r"(?:\d[\u0304\u0305])+"), lambda match: rf"\overline{{{re.sub('[^0-9]', '', match[0])}}}"),
    (re.compile(r"(?<=\d)\s?([\u00bc-\u00be\u2150-\u215e])"), lambda match: f" {_plain(match[1])}"),
    (re.compile(r"[\u00bc-\u00be\u2150-\u215e]"), lambda match: _plain(match[0])),
    (re.compile(r"[\u00b2\u00b3\u00b9\u2070-\u207f]+"), lambda match: f"^{{{_plain(match[0])}}}"),
    (re.compile(r"[\u2080-\u2089]+"), lambda match: f"_{{{_plain(match[0])}}}"),
    (re.compile(r"\u2212"), lambda _: "-"),
    (re.compile(r"(?<=\d)\s?k?[\u03a9\u2126]"), lambda match: " kohm" if "k" in match[0] else " ohm"),
    (re.compile(r"(?<=\d)\s?[\u03bc\u00b5](?=[a-zA-Z])"), lambda _: " u"),
)
_TIMES = re.compile(r"(?<=\d)\s+x\s+(?=\d)")


def on_the_line(text: str) -> str:
    """A text whose raised, lowered and overlined digits, small fractions and `3 x 4` are written in ASCII and LaTeX."""
    for pattern, replacement in () if text.isascii() else _RAISED:
        text = pattern.sub(replacement, text)
    return _TIMES.sub(r" \\times ", text)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2044", "/")


@lru_cache(maxsize=4096)
def spell(expression: str) -> str:
    """The expression without dollar signs, spacing commands, separators of thousands and full stop."""
    expression = on_the_line(expression).translate(_UNICODE)  # references, too, have raised digits
    for pattern, replacement in _SPELLINGS:
        expression = pattern.sub(replacement, expression)
    expression = expression.strip()
    while expression.endswith((".", ",", ";", ":")):
        expression = expression[:-1].rstrip()
    expression = _SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), expression)
    expression = _MIXED.sub(_mixed, expression)
    expression = _E_NOTATION.sub(_power_of_ten, expression)
    if not re.search(r"[(\[{]", expression):  # a comma inside brackets separates: (3,100) is a point
        expression = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), expression)
    word = NUMBER_WORD.fullmatch(unwrapped(expression))
    return of_words(word) if word else expression


def _mixed(match: re.Match[str]) -> str:
    whole, upper, lower = match.groups()
    return rf"{whole}\frac{{{upper}}}{{{lower}}}" if int(upper) < int(lower) else match[0]


def _power_of_ten(match: re.Match[str]) -> str:
    """`1.6e-19` is a power of ten; `2e-1` and `2e+1` are sums with Euler's number, as `2e - 1` is."""
    number, letter, sign, power = match.groups()
    is_sum = letter == "e" and sign and "." not in number and number != "1" and len(power) == 1
    return match[0] if is_sum else rf"{number} \times 10^{{{sign.strip('+')}{power}}}"


def same_spelling(reference: str, answer: str) -> bool:
    """Whether two answers are the same text, apart from spacing and text commands."""
    return bare(reference) == bare(answer) != ""


def bare(expression: str) -> str:
    """The spelled expression without text commands and without blanks that say nothing."""
    text = re.sub(r"\^\{(\w)\}", r"^\1", unwrapped(spell(expression)).removeprefix(r"\$"))
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def unwrapped(expression: str) -> str:
    r"""The expression with the contents of its text commands: `\textbf{(\text{C})}` is `(C)`."""
    while (inner := _WRAPPED.sub(lambda match: match[1] or match[2] or "", expression)) != expression:
        expression = inner
    return expression.strip()


EQUALS = re.compile(r"(?<![<>:\\])(?<!\s!)=(?!=)")


def sides(equation: str) -> list[str]:
    r"""The sides of an equation or of a chain of them. The sign in `\sum_{k=1}` makes none."""
    found, start = [], 0
    for equals in EQUALS.finditer(equation):
        before = equation[: equals.start()]
        if before.count("{") == before.count("}"):
            found.append(equation[start : equals.start()].strip())
            start = equals.end()
    return [*found, equation[start:].strip()]


def split(text: str, separators: str = ",;") -> list[str]:
    """The parts between separators outside brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in OPENING) - (letter in CLOSING)
        if letter in separators and depth == 0 and text[place - 1 : place] != "\\":
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def closes_at_end(text: str) -> bool:
    r"""Whether the last bracket of a text closes its first: not so in `\{1\} \cup \{2\}`."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in OPENING) - (letter in CLOSING)
        if depth == 0 and letter in CLOSING:
            return place == len(text) - 1
    return False


def without_outer(text: str) -> str:
    """A value without round brackets or braces that hold all of it: `(073)` is 073, `(1, 2)` stays."""
    while len(text) > 2 and text[0] + text[-1] in ("()", "{}") and closes_at_end(text) and len(split(text[1:-1])) == 1:
        text = text[1:-1].strip()
    return text
