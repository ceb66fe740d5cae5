r"""Sentences of an output without a mark: which of them state an answer, and what in them only explains. Pure.

A value that nothing announces is taken from the last sentence that states one. A sentence that states several, of
different things, states no answer, and nor does one that says what would be done next: nobody can tell which value the
writer means, and a guess that hits the reference would be a right grade for no answer.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

from cgd_stages.grading.formulas import FORMULA

_SENTENCE_END = re.compile(
    r"[.!?]\)?(?:\$+|\\\])?\)?\s+(?=[A-Z(\\$])|(?:\\\]|\\end\{\w+\*?\})\s*(?=[A-Z(])|\n\s*\n|\n(?=[A-Z])"
)
_REMARK = re.compile(
    r"\((?=[A-Z][a-z]+\s)|(?:Note|Notice|Remark|Alternatively|Check|Verif(?:ication|y(?:ing)?)|Explanation|To\s+(?:check|verify)|In\s+fact|Indeed|"
    r"For\s+these\s+values|I\s+hope|(?:We|You|One)\s+(?:may|can|might)\s+(?:also\s+)?(?:check|verify|recogni[sz]e))\b"
)


@lru_cache(maxsize=8)
def sentences(text: str) -> list[tuple[int, str]]:
    """The sentences with their places. A formula is never cut."""
    formulas = [match.span() for match in FORMULA.finditer(text)]
    places, start, later = [], 0, 0
    for end in _SENTENCE_END.finditer(text):
        while later < len(formulas) and formulas[later][1] <= end.start():
            later += 1
        inside = later < len(formulas) and formulas[later][0] < end.start() and formulas[later][1] > end.end()
        if not inside:
            places.append((start, end.end()))
            start = end.end()
    places.append((start, len(text)))
    return [(first, text[first:last]) for first, last in places if text[first:last].strip()] or [(0, text)]


def without_remarks(text: str) -> str:
    """The text without the remarks at its end, which may have several sentences in brackets."""
    parts = sentences(text)
    first = len(parts)
    for place in range(len(parts) - 1, 0, -1):
        opened = sum(sentence.count("(") - sentence.count(")") for _, sentence in parts[place:first])
        if _REMARK.match(parts[place][1]):
            first = place
        elif opened >= 0:
            break
    return text[: parts[first][0]] if first < len(parts) else text


_ASIDE = re.compile(
    r"\s*\((?:i\.e\.|e\.g\.|(?:or|since|because|as|which|that|about)\s)[^()]*\)"
    r"|\s*\((?:rounded\s|\d+\s[a-z]+\s+and\s+\d+\s[a-z]+)[^()]*\)"
    r"|(?<=[a-z])\s+\(\d+\s[a-z]+\)(?=[.\s]*\Z)|\s+(?:at|by)\s+\d{1,2}(?::\d\d)?\s*(?:[ap]\.?m\b\.?|o'clock)(?=[.\s]*\Z)"
    r"|(?<=[\w)}$]),\s+(?:when|where|if|assuming|given\s+that)\b[^,]*\Z"
    r"|(?<=[a-z])\s+for\s+\d[\d,.]*\s+(?!dollars|cents|euros)[a-z]+(?=[.\s]*\Z)"
    r"|(?<=[a-z])\s+when\s+(?:he|she|it|they)\b[^,=\d]*\bin\s+\d{4}(?=[.\s]*\Z)"
    r"|,?\s+(?:in\s+total|in\s+all|altogether):\s.*|(?<=[\d$)])\s+out\s+of\s+(?:the\s+)?\$?\d.*"
    r"|(?<=[\w$)}\]]),?\s+(?:because|since)\b.*|,\s+with\s[^,=]*\bleft\b[^,=]*\Z"
    r"|\s+(?:after|before|by)\s+\w+ing\b[^,=]*\Z|\s+(?:in|after|within)\s+\d[\d.]*\s+(?:s|(?:second|minute|hour|day|week|month|year)s?)\.?\s*\Z"
    r"|(?<=\d)\s+(?:at|when|where)\s+[a-zA-Z]\s*=[^,]*\Z"
    r"|,\s+(?:which\s+is\s+)?(?:attained|achieved|reached|obtained|which\s+occurs|occurring)\s+(?:at|when|for|if|by)\b[^,]*\Z",
    re.DOTALL,
)
_THEN = re.compile(
    r"[,;]\s+(?:and\s+)?(?:so|thus|hence|therefore|which\s+(?:means|leaves|makes|gives)|leaving|giving)\b"
)
_SAYS = re.compile(
    r"[$)\]][^$\\()]{0,80}?\b(?:is|are|equals|becomes|must\s+be|will\s+be|(?:doubles|comes|amounts|adds\s+up|rises)\s+to)\s+"
    r"(?:exactly\s+|about\s+|approximately\s+)?(?=-?[\d.,/]*\d%?[a-z .\n]*\Z)"
)
"""The verb between a formula and the number that it is: "The last digit of $3^{10}$ is 9." """
_WITHIN = re.compile(r"\b(?:finish|complete)\w*\s[^.,]*\sin\s+\d+\s+[a-z]+\.?\s*\Z")
_PURPOSE = re.compile(r"\b((?:tak|took|need|cost|requir)\w*\s[^.,=]*?\d[^,=]*?)\s+to\s+[a-z]{3,}\s[^,=]*\Z")


def statements(sentence: str) -> Iterator[str]:
    """What a sentence says, from its gist to its whole: a consequence without what only explains it, the sentence
    without that, and the sentence."""
    sentence = _LEADING.sub("", _LABEL.sub("", sentence))
    brief = sentence if _WITHIN.search(sentence) else _PURPOSE.sub(r"\1", _ASIDE.sub("", sentence))
    for part in (_THEN.split(brief)[-1], brief, sentence):
        said = _SAYS.search(part)
        yield part[said.end() :] if said else part


# --- sentences that state no answer -----------------------------------------------------------------------------

NUMBER = r"[-+]?\\?\$?\d(?:[\d,./]*\d)?%?"
_VALUE = rf"(?:[a-zA-Z]\s*=\s*)?(?:\$[^$\n]{{1,80}}\$|\\\([^\n]{{1,80}}?\\\)|{NUMBER})"
_STATED = rf"(?:[a-zA-Z]\s*=\s*)?(?:\$[^$\n=]{{1,80}}\$|\\\([^\n=]{{1,80}}?\\\)|{NUMBER})"
"""The same, but no computation, whose result counts."""
_VERB = (
    r"\b(?:is|are|was|were|equals?|has|have|had|costs?|takes?|took|needs?|gets?|got|makes?|made|weighs?|measures?|holds?"
    r"|earns?|scores?d?|reads?|pays?|paid|sells?|sold|eats?|ate|runs?|ran|in)(?:\s+(?:only|exactly|about|now|rank))?"
)
_JOINED = (
    r"(?:[,;]\s+(?:(?:and|but|while|whereas)\s+|(?=(?:the|an?|his|her|its|[A-Z])\b))|\s(?:and|but|while|whereas)\s+)"
)
_TOGETHER = (
    r"(?:so|thus|hence|therefore|their|total|sum|product|(?<!common )difference|ratio|probability|average|greatest"
    r"|largest|smallest|least|together|altogether)\b"
)
_END = r"(?:\^\{?\d\}?|[^\d$\\=])*\Z"
_COORDINATED = re.compile(
    rf"{_VERB}\s+{_VALUE}[^=;]*?{_JOINED}(?:\$[^$\n]*\$|(?!\d|{_JOINED}|\b{_TOGETHER})[^=;$])*?{_VERB}\s+{_STATED}{_END}"
    rf"|=\s*{NUMBER}\s+(?:for|on|from|in|of)\b[^=]*\s(?:and|but|while|whereas)\s[^=]*=\s*{NUMBER}{_END}"
)
"""Two values, each of a thing of its own: "Ann has 12 and Ben has 15." """
SPAN = r"(?:hours?|hrs?|h|minutes?|mins?|seconds?|days?|weeks?|months?|years?|feet|foot|ft|inch(?:es)?|pounds?|ounces?)"
_COUNTED = re.compile(
    rf"\A[^=]*(?<![\w.$]){NUMBER}\s+(?!{SPAN}\b|and\b)[a-z]+[^.;=\d]*?(?:,[^.;=]*?)?\s(?:and|or)\s+{NUMBER}\s+(?!{SPAN}\b)[a-z]+{_END}"
    rf"|\b[a-z]{{3,}}\s+{NUMBER}\s+and\s+[a-z]{{3,}}\s+{NUMBER}{_END}"
)
"""Several things, counted: "3 cups of flour and 2 cups of sugar"."""
_NAMED = re.compile(
    r"\$\s*([a-wA-Z](?:\(\w\))?)\s*=[^$=]*\$[^$=,;]{0,12}\s(?:and|but)\s+\$\s*(?!\1)[a-wA-Z](?:\(\w\))?\s*=[^$=]*\$[^$=\d]{0,12}\Z"
)
"""Values of two names that are no coordinates: `$a = 2$ and $b = 7$`."""
_SIDES = re.compile(rf"{NUMBER}\s?[a-z]+\s+by\s+{NUMBER}\s?[a-z]+{_END}")
_RANGE = re.compile(rf"\bbetween\s+{_VALUE}\s+and\s+{_VALUE}{_END}|\bfrom\s+{_VALUE}[^.;,=]*?\sto\s+{_VALUE}{_END}")
_LEADING = re.compile(
    r"\A\W*(?:(?:since|as|if|when|because|after|with|given)\b|(?:for)\s+(?=\S+,))(?:[^,$]|\$[^$]*\$|(?<=\d),(?=\d))*,",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"\b(?:theorem|lemma|corollary|proposition|equations?|eq\.|figure|fig\.|table|section|chapter|steps?|cases?|problems?|exercise|example|"
    r"page)\s+\(?\d+(?:\.\d+)*\)?(?!\s*[=:])",
    re.IGNORECASE,
)
_COMPUTE = (
    r"(?:find|compute|calculate|determine|evaluate|solve|show|prove|check|verify|consider|decide|divide|multiply|add|subtract|substitute"
    r"|simplify|factor|continue)"
)
_PLAN = re.compile(
    r"\A(?!.*\b(?:gives?|get|yields?|obtain|find|found|which\s+is|implies)\b|.*:)(?=[^=]*=?[^=]*\Z)"
    r"(?:\W*(?:(?:so|now|next|then|first|finally|thus|hence|and|but)\b,?\s+)*"
    r"(?:(?:let(?!\s+me\s+know)|suppose|assum(?:e|ing)|consider|denote|recall)\b"
    r"|(?:we|I)\s+(?:(?:will|can|must|should|now|then|next)\s+)*(?:substitute|consider|try|apply|assumed?|suppose|verify)\b)"
    rf"|.*\b(?:needs?|have|want|going|remains?|suffices|must|trying|question\s+is)\s+(?:whether|(?:to\s+)?{_COMPUTE})\b)",
    re.IGNORECASE | re.DOTALL,
)
_GIVES_UP = re.compile(
    r"\b(?:not\s+(?:sure|certain|enough\s+information)|(?:do|does|did)(?:\s+not|n['\u2019]t)\s+know|(?:cannot|can['\u2019]t|unable\s+to)\s+(?:be\s+)?"
    r"(?:determined?|decided?|continued?|solved?|tell|say|find|answer(?:ed)?)|no\s+idea)\b",
    re.IGNORECASE,
)


def is_question(sentence: str) -> bool:
    return sentence.rstrip(" \n)\"'").endswith("?")


def is_plan(statement: str) -> bool:
    """Whether it only says what is assumed, or what is to be done: "Let $n = 7$.", "We need to compute 9 * 4." """
    return bool(_PLAN.search(statement))


def gives_up(sentence: str) -> bool:
    """Whether its writer does not know the answer."""
    return bool(_GIVES_UP.search(sentence))


def has_several(statement: str) -> bool:
    """Whether it ends on values of several things, of which one may be the answer."""
    return any(pattern.search(statement) for pattern in (_COORDINATED, _COUNTED, _NAMED, _SIDES, _RANGE))
