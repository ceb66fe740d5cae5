r"""Formulas of a text, and expressions that it writes without dollar signs: where they are and what each says. Pure."""

import re

from cgd_stages.grading.markup import closing_brace
from cgd_stages.grading.spelling import sides as sides_of
from cgd_stages.grading.spelling import split
from cgd_stages.grading.units import unit_after

_ROWS = r"(?:align|aligned|gather|gathered|equation|eqnarray|multline|split)\*?"
FORMULA = re.compile(
    rf"(?<!\\)\$\$(?P<display>(?:\\.|[^$\\]){{1,2000}})\$\$"
    rf"|(?<![\\$])\$(?P<dollar>(?=\S)(?:\\.|[^$\\\n]|\n(?!\s*\n)){{1,2000}}?)(?<=\S)\$(?!\d)"
    rf"|(?<![\\$])\$(?=[^$\n]*[=\\^])(?P<loose>(?:\\.|[^$\\\n]){{1,300}})\$(?!\d)"
    rf"|\\\((?P<paren>.{{1,2000}}?)\\\)|\\\[(?P<bracket>.{{1,2000}}?)\\\]"
    rf"|\\begin\{{{_ROWS}\}}(?P<rows>.{{1,4000}}?)\\end\{{{_ROWS}\}}",
    re.DOTALL,
)
BETWEEN_VALUES = re.compile(r"\s*(?:,|;|,?\s*\b(?:and|or)\b)\s*", re.IGNORECASE)
_BARE_NAME = re.compile(r"(?:\\?[a-zA-Z]+(?:_\{?\w+\}?)?'?|[A-Z]{2,3})(?:\s*\(\s*[a-z]\s*\))?")
_CONSTANTS = frozenset((r"\pi", "e", "i", r"\infty", r"\emptyset", r"\varnothing"))
_INNER = re.compile(r"\\begin\{(\w*(?:matrix|cases|array))\}.*?\\end\{\1\}", re.DOTALL)
_CONDITION = re.compile(
    r"(?<!only )\b(?:for|all|any|every|each|when|where|if|with|since|because|as|that)\s*$", re.IGNORECASE
)
_AFTER_VALUE = re.compile(r"\bis\s*(?:\$|\\\().*\b(?:when|where|at|if|for)\b(?:(?!\bis\b)[^$\\]){0,30}\Z", re.DOTALL)
RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|neq?|equiv|mid|in\s*\\mathbb)(?![a-zA-Z])")


def content_of(match: re.Match[str]) -> str:
    """What a formula says: of several rows the last. Empty for what is no formula: the words between two prices."""
    content = next(group for name, group in match.groupdict().items() if group is not None)
    content = re.sub(rf"\\(?:begin|end)\{{{_ROWS}\}}", "", content)
    inner = [found[0] for found in _INNER.finditer(content)]
    rows = _INNER.sub("\0", content)
    if match["rows"] is not None or "&" in rows:
        filled = [
            row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])", rows.replace("&", "")) if row.strip(" \n.,")
        ]
        left = sum(row.count("\0") for row in filled[:-1])
        content = filled[-1] if filled else ""
        for found in inner[left:]:
            content = content.replace("\0", found, 1)
    content = content.strip().rstrip(".,;").strip()
    words = re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}\s|(?<![\\a-zA-Z{])[a-zA-Z]{3,}\s+[a-zA-Z]{2,}", content)
    return "" if words and (match["dollar"] or match["loose"]) and "\\" not in content else content


def run_of(formulas: list[re.Match[str]], text: str) -> list[re.Match[str]]:
    """The first formula and the next ones that only a conjunction separates."""
    run = formulas[:1]
    for match in formulas[1:]:
        if not BETWEEN_VALUES.fullmatch(text, run[-1].end(), match.start()):
            break
        run.append(match)
    return run


def joined(formulas: list[re.Match[str]]) -> str:
    """The values of formulas that follow each other; inequalities between which "or" stands are one."""
    text = ""
    for before, match in zip([None, *formulas], formulas, strict=False):
        value = last_side(content_of(match))
        between = match.string[before.end() : match.start()] if before else ""
        text += (" or " if "or" in between and RELATION.search(value) else ", " if before else "") + value
    return text


def formulas_with_value(sentence: str) -> list[re.Match[str]]:
    """The formulas of a sentence that may be an answer: names yield to values, conditions to what is said of them."""
    formulas = [match for match in FORMULA.finditer(sentence) if content_of(match)]
    named = [match for match in formulas if not is_mere_name(content_of(match))]
    conditions: list[re.Match[str]] = []
    for match in named:
        goes_on = bool(conditions) and BETWEEN_VALUES.fullmatch(sentence, conditions[-1].end(), match.start())
        if _is_condition(match, sentence) or (goes_on and RELATION.search(content_of(match))):
            conditions.append(match)
    return [match for match in named if match not in conditions] or named


def _is_condition(formula: re.Match[str], sentence: str) -> bool:
    """Whether it only says for which values the sentence holds: "for all $n > 2$", "is $9$, when $x = 3$"."""
    before, content = sentence[: formula.start()], content_of(formula)
    if RELATION.search(content):
        return bool(_CONDITION.search(before))
    return bool(_AFTER_VALUE.search(before))


def is_mere_name(content: str) -> bool:
    return bool(_BARE_NAME.fullmatch(content)) and content not in _CONSTANTS


_OR = re.compile(r"(?:,|\\q?quad)?\s*\\(?:text|mathrm|mbox)\s*\{\s*(?:or|and)\s*\}\s*(?:\\q?quad)?")
_APPROXIMATELY = re.compile(r"\\approx(?![a-zA-Z])|\u2248")


def last_side(expression: str) -> str:
    """The last side of a computation; an equation that begins with a name or has a variable stays, without its middle.
    What is only approximately equal is left out, unless a name stands before it."""
    if len(alternatives := _OR.split(expression)) > 1:
        return ", ".join(map(last_side, alternatives))
    listed = split(expression)
    if len(listed) > 1 and all(len(sides_of(part)) > 1 for part in listed):
        return ", ".join(map(last_side, listed))
    expression = re.split(r"\\(?:Rightarrow|implies|to|equiv)(?![a-zA-Z])(?![^{}]*\})", expression)[-1]
    expression = re.sub(r"\\pmod\s*(?:\{[^{}]*\}|\w)", "", expression)
    exactly, *roughly = _APPROXIMATELY.split(expression)
    if roughly and is_mere_name(exactly.strip()):
        return f"{exactly.strip()} = {roughly[-1].strip()}"
    if roughly and re.search(r"\\\$|\d\.\d", exactly):
        exactly = roughly[-1]  # sums of money and what is computed of decimals are rounded, not estimated
    sides = [side for side in sides_of(exactly) if side]
    if len(sides) < 2:
        return sides[0] if sides else exactly.strip()
    without_commands = re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^}]*\}|\\[a-zA-Z]+", "", sides[0])
    if re.search(r"[a-zA-Z]", without_commands) or _BARE_NAME.fullmatch(sides[0]):
        return exactly.strip() if len(sides) == 2 else f"{sides[0]} = {sides[-1]}"
    return sides[-1] if not is_mere_name(sides[-1]) else sides[0]


# --- expressions without dollar signs ---------------------------------------------------------------------------

_MONEY = r"(?:\\?\$|[\u20ac\u00a3])"
START = re.compile(
    rf"(?<![\w.\\])(?<![<>\u2264\u2265])(?<![<>\u2264\u2265]\s)(?:[-+\u2212\u00b1]?\s?{_MONEY}?\s?(?:\d|\.\d)"
    rf"|\\(?:[dtc]?frac|sqrt|pi|infty|log|ln|sin|cos|tan|binom)"
    rf"(?![a-zA-Z])|(?:sqrt|sin|cos|tan|log|ln|exp|arc(?:sin|cos|tan))\s?\(|\\\{{|\u221a|\u03c0|[a-zA-Z](?:_\w+|\(\w\))?\s*(?:[=<>\u2264\u2265\u2208]|[-+*/^](?=\s*\S)|(?<=[a-zA-Z])\([^()]{{1,40}}[-+][^()]{{1,40}}\))"
    rf"|(?<![\^_])[({{\[](?=\s*[-\d\\a-z]))"
)
_ENDINGS = frozenset(("st", "nd", "rd", "th"))  # of ordinal numbers
_TOKEN = re.compile(
    r"(?P<blank>[ \t]+|\\[,;: !]|~)"
    r"|(?P<number>0x[0-9a-fA-F]+|0b[01]+|\d*\.\d*(?=\\(?:overline|bar|dot)(?![a-zA-Z])|\(\d+\))|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?(?:\.{3}|\u2026)?|\.\d+)"
    r"|(?P<command>\\[a-zA-Z]+|\\[{}%])"
    r"|(?P<function>(?:sqrt|sin|cos|tan|log|ln|exp|arc(?:sin|cos|tan)|pi|mod|gcd|lcm)(?![a-zA-Z]))"
    r"|(?P<word>[a-zA-Z]+)"
    r"|(?P<operator>\*\*|[-+\u2212\u2013*\u00d7\u00b7\u22c5\u00f7/^_=<>\u2264\u2265\u00b1\u2208\u2248\u222a\u2229|:])"
    rf"|(?P<money>{_MONEY}(?=\s?\d))"
    r"|(?P<open>[({\[])|(?P<close>[)}\]])|(?P<after>!(?![!=]|\s+[A-Z])|%|\u00b0|')|(?P<comma>,)"
    r"|(?P<sign>[\u221a\u03c0\u221e\u2205])"
)


def expressions_at(text: str, start: int) -> list[str]:
    """The expression at a place, and those that a conjunction joins to it; none if there is none."""
    found: list[str] = []
    between = None
    while (end := expression_end(text, start)) is not None:
        value = last_side(text[start:end].strip())
        if between and "or" in between[0] and RELATION.search(value):
            found[-1] += f" or {value}"
        else:
            found.append(value)
        if not (between := BETWEEN_VALUES.match(text, end)):
            break
        start = between.end()
    return found


def expression_end(text: str, start: int) -> int | None:
    """Where the longest expression ends that begins at a place, with its unit; None if none begins there."""
    depth, end, previous, has_value = 0, None, "start", False
    position, blank = start, False
    while match := _TOKEN.match(text, position):
        kind = str(match.lastgroup)
        if kind == "blank":
            blank, position = True, match.end()
            continue
        if not _continues(text, match, kind, previous, blank, depth):
            break
        opened = kind == "open" or match[0] == r"\{"
        closed = kind == "close" or match[0] == r"\}"
        depth += opened - closed
        if depth < 0:
            break
        is_name = kind in ("word", "command", "function", "sign")
        has_value = has_value or kind == "number" or is_name
        position, blank = match.end(), False
        if match[0] == "|" and previous in ("number", "name", "close", "after"):
            closed = True
        previous = "name" if is_name and not opened and not closed else "close" if closed else kind
        if match[0] in (r"\text", r"\mathrm", r"\mbox") and text[position : position + 1] == "{":
            position = (closing_brace(text, position) or position) + 1
        if depth == 0 and has_value and previous in ("number", "name", "close", "after"):
            end = position
    if end is None or (end == start + 1 and re.match(r"[a-zA-Z]\s+[a-zA-Z']{2,}", text[start:])):
        return None  # an article is no variable
    return end + len(unit_after(text[end:]))


def _continues(text: str, match: re.Match[str], kind: str, previous: str, blank: bool, depth: int) -> bool:
    """Whether a token belongs to the expression before it."""
    behind_value = previous in ("number", "name", "close", "after")
    if kind == "number":
        thousands = previous == "number" and re.fullmatch(r"\d{3}", match[0])
        fraction = previous == "number" and re.match(r"\d+\s?/\s?\d", text[match.start() :])
        return not (previous == "number" and blank) or bool(thousands or fraction)
    if kind == "word":
        if len(match[0]) > 3 or (len(match[0]) > 1 and (blank or not behind_value)):
            return bool(depth) and not blank and len(match[0]) == 1
        if (
            (behind_value and blank and not depth)
            or match[0] in _ENDINGS
            or (len(match[0]) > 1 and not match[0].islower())
        ):
            return False
        return not unit_after(text[match.start() :]) or len(match[0]) == 1
    if kind == "comma":
        return depth > 0
    if kind == "after":
        return behind_value and (not blank or match[0] == "%")
    if kind == "operator" and match[0] == ":":
        return bool(re.match(r":\s?\d", text[match.start() :])) and previous == "number"
    if kind == "operator" and match[0] in "<>\u2264\u2265":
        return previous == "name" or bool(re.match(r".\s*[a-zA-Z]\b", text[match.start() :]))
    return not (kind in ("open", "money") and behind_value and blank and text[match.start()] in "([$")
