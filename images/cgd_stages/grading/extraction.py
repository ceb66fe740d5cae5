r"""What an output says its answer is. Pure, and linear in the output's length.

The first rule that finds something decides:

1. an explicit last line behind all boxes: `**Answer: D**`, `#### 42`, "The correct choice is C."
2. the last box, and boxes before it that only "and" or a comma separates. A last box that is empty or never closed
   takes back what came before it: then only the text behind it counts.
3. what the text announces: "The answer is"; in its last sentence also "The solutions are"; on the next line, if need be
4. an option with its text at the beginning, `D) 0.25`; yes or no at the beginning of the last line, or said in it
5. in the last sentence that has any: the last formula, else the last result of a computation, else the last number or
   expression that is written without dollar signs. What only explains it does not count.

Remarks at the end ("Note that ...", "We may check our answer: ...") count only if nothing else does.

math-verify 0.9 has other rules: its last match wins, also a number inside a longer formula, and a withdrawn box counts.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from cgd_stages.chat.thoughts import split_text
from cgd_stages.grading.spelling import bare, on_the_line
from cgd_stages.grading.spelling import sides as sides_of
from cgd_stages.grading.units import unit_after
from cgd_stages.text.references import right_answers

AnswerSource = Literal["boxed", "text", "none", "unfinished_thought"]


@dataclass(frozen=True)
class FoundAnswer:
    """The answer in an output, and where it was found."""

    text: str
    source: AnswerSource


NOTHING = FoundAnswer("", "none")
TAIL = 4000
"""The last characters of an output in which an unmarked answer is looked for."""


def find_answer(output: str) -> FoundAnswer:
    """The answer of a text. `source` tells a boxed answer from one that was found in the words."""
    text = _NEGATED.sub("", _without_markup(output))
    boxes, end = _last_boxes(text)
    if line := _explicit_last_line(text, end):
        return FoundAnswer(line, "text")
    if boxes:
        return FoundAnswer(", ".join(dict.fromkeys(boxes)), "boxed")
    for part in (_without_remarks(text[end:]), text[end:]):
        for rule in (_announced, _lettered, _yes_or_no, _last_value, _alone):
            if found := rule(part):
                return FoundAnswer(found, "text")
    return NOTHING


def reference_answer(reference: str) -> str:
    """The value in a reference: the one that it marks, or the whole text; without its thought, and empty where nothing
    stands behind that."""
    text = without_thought(reference)
    return marked_answer(reference) or (text if text == reference.strip() else _without_markup(text).strip())


def marked_answer(reference: str) -> str:
    r"""The value that a reference marks: its last `\boxed{}`, or the text after `####`; empty if it marks none. A JSON
    list of texts, which a source with `several: all` has, holds several values; a list of numbers such as `[1, 2]` is
    an interval.

    A reference with a thought is a whole reply of a model, which may also announce its answer ("The answer is")."""
    text = without_thought(reference)
    if re.match(r"\s*\[\s*\"", text) and (texts := _listed(text)):
        return ", ".join(texts)
    if boxes := _last_boxes(text)[0]:
        return ", ".join(boxes)
    if marks := list(_FINAL_MARK.finditer(text)):
        return str(marks[-1]["answer"]).strip()
    if text == reference.strip():
        return ""
    reply = _without_markup(text)
    return _explicit_last_line(reply, 0) or _announced(reply)


def without_thought(reference: str) -> str:
    """A reference's text behind its thought; empty where the thought has no end."""
    return split_text(reference).text


def _listed(text: str) -> list[str]:
    """The texts of a JSON list; empty for anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else []


_VALUE = (
    r"(?:[a-z]\s*=\s*)?(?:\$[^$\n]{1,80}\$|\\\([^\n]{1,80}?\\\)|-?\\?\$?\d(?:[\d,./]*\d)?(?![\w%^*/+(\\])"
    r"|\\boxed\{[^{}\n]{1,80}\})"
)
_NEGATED = re.compile(
    rf"(?:\b(?:not|cannot|instead of|rather than|reject|discard)"
    rf"|n['\u2019]t)\s+(?:be\s+|equal(?:\s+to)?\s+)?{_VALUE}"
    rf"|(?<![\w.\\{{^(+*/=-]){_VALUE}\s+(?:is|are)\s+(?:wrong|incorrect|impossible|not\s+(?:correct|right|possible))\b"
    rf"|\b(?:is|are|be)\s+(?:strictly\s+)?(?:less|more|greater)\s+than\s+{_VALUE}(?=[.\s]*\Z)",
    re.IGNORECASE,
)
"""A value that the text says is none."""


def has_answer(reference: str) -> bool:
    r"""Whether an output can be right at all: not so where the reference is blank, `$$`, `\boxed{}` or a thought."""
    return any(_says(answer) for answer in right_answers(reference))


def _says(reference: str) -> bool:
    boxes = list(_boxes(without_thought(reference)))
    return bool(boxes[-1][2].strip() if boxes else bare(reference_answer(reference)).strip("#"))


_ITEM = re.compile(r"\n+[ \t]*(?:[-*\u2022]|\d[.)])[ \t]+")


def _in_a_line(items: re.Match[str]) -> str:
    first, *others = _ITEM.split(items[0].rstrip())
    return f"{first} {', '.join(others)}"


_MARKUP = tuple(
    (re.compile(pattern, flags), replacement)
    for pattern, flags, replacement in (
        (r"\[asy\].*?\[/asy\]|<<[^<>\n]*>>", re.DOTALL, ""),  # drawings, and GSM8K's notes for a calculator
        (r"(?<=[*_$])!(?=\s|\Z)", 0, "."),
        (r"<answer>\s*([^<>]{1,500}?)\s*</answer>", 0, r"\n#### \1\n"),
        (r"^[ \t]*(?:```.*|\|[ :|-]+\|[ \t]*)$|`|^[ \t]*>[ \t]+", re.MULTILINE, ""),
        (r"(?<![\w)}])(?:\*\*|__)|(?:\*\*|__)(?![\w({\\])", 0, ""),  # `2**10` stays
        (r"(?<![\w)}\]*\\|])([*_])(?=[^\s*_])([^*_\n]{1,200})(?<=\S)\1(?![\w*({\\])", 0, r"\2"),
        (r"^[ \t]*\|[ \t].*[ \t]\|[ \t]*$", re.MULTILINE, lambda row: row[0].replace("|", "\t")),
        (r":\s*\n(?:[ \t]*(?:[-*\u2022]|\d[.)])[ \t]+[^\n]{1,60}(?:\n|\Z)){2,}\Z", 0, _in_a_line),
    )
)  # fmt: skip


def _without_markup(output: str) -> str:
    """The text without emphasis, code fences, tables and drawings; a list at its end is one line."""
    text = on_the_line(output)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.rstrip()


# --- boxes ------------------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\d\-]|\Z)")
_BARE_BOX = re.compile(r"-?\d+(?:\.\d+)?")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$.]|\\q?quad)*(?:\\text\{)?\s*(?:,|;|and|or|,\s*and|,\s*or)\s*\}?(?:[\s$(\[]|\\q?quad|\\)*", re.IGNORECASE
)


def _last_boxes(text: str) -> tuple[list[str], int]:
    """The contents of the last box, and of the boxes before it that only a conjunction separates; and where it ends.
    None are left when the last one is empty or has no end."""
    boxes = list(_boxes(text))
    if not boxes or not boxes[-1][2]:
        return [], boxes[-1][1] if boxes else 0
    contents: list[str] = []
    next_start: int | None = None
    for start, end, content in reversed(boxes):
        if not content or (next_start is not None and not _BETWEEN_BOXES.fullmatch(text, end, next_start)):
            break
        contents.insert(0, content)
        next_start = start
    return contents, boxes[-1][1]


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    r"""The start, end and content of every box. An inner box is part of the outer one. A box without an end takes in
    the rest of the text, unless another box follows.

    In `\boxed 5`, TeX takes one token; models mean the number.
    """
    position = 0
    while match := _BOX.search(text, position):
        position = match.end()
        braced = text[position : position + 1] == "{"
        end = _closing_brace(text, position) if braced else position
        if end is None:
            if not _BOX.search(text, position):
                yield match.start(), len(text), ""
            continue
        number = None if braced else _BARE_BOX.match(text, position)
        content = text[position + 1 : end] if braced else number[0] if number else ""
        position = end + 1
        yield match.start(), position, _BOX.sub("", content).strip()


def _closing_brace(text: str, opening: int) -> int | None:
    """The place of the brace that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        if text[index] in "{}" and text[index - 1] != "\\":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return index
    return None


# --- announcements ----------------------------------------------------------------------------------------------

_FINAL_MARK = re.compile(r"####\s*(?P<answer>[^\n]+)")
_VERB = r"(?:\s+(?:is|are|was|must\s+be|should\s+be|would\s+be|will\s+be|equals|comes?\s+(?:out\s+)?to)\b|\s*:)"
_ANNOUNCEMENT = re.compile(
    r"\b(?:(?P<answer_word>(?<!is the )(?<!is the final )(?<!as the )answers?|ans\.?)"
    r"|results?|solutions?|roots?|(?:correct|right|best)\s+(?:choice|option|letter))\b"
    rf"(?:[^.:=\n$\\]{{0,80}}?{_VERB}|\s*=|(?<=answer)\s*\n)(?!\s+not\b)[\s:]*(?=(?P<answer>[^\n]+))",
    re.IGNORECASE,
)
_EXPLICIT_LINE = re.compile(
    r"(?:^|(?<=[.!?:,]\s)|(?<=\n))\W{0,5}(?:(?:so|thus|therefore|hence)\b,?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?"
    r"(?:answer\s*[:=]|(?:answer|choice|option)\s+is\b)[\s:]*(?=(?P<answer>[^\n]+))",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"(?:[\s:\"'\u201c]|(?:that|simply|just|only|exactly|approximately|about|equal\s+to|either|both|therefore|thus|then|indeed|now|option|"
    r"choice|letter|the\s+(?:option|letter|number|value))\b)*",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"[(\[]?(?P<letter>[A-J])[)\]]?(?=\s*(?:[.,;:!\"}]|$)|\s+(?:because|since|as|for)\b|\s+[-\u2013\u2014(]\s*[a-z]{2,})|\([A-J]\)\s+(?=[^\s=+*/^-])",
    re.MULTILINE,
)
_YES_OR_NO = re.compile(
    r"(?P<word>yes|no|true|false)\b(?=\s*(?:[.,;:!(\u2013\u2014-]|$)|\s+(?:because|since|as)\b)", re.IGNORECASE
)
_SAID = re.compile(
    r"\b(?:has|have|is|are)\s+(?P<solutions>no\s+(?:real\s+)?solutions?)[.\s]*\Z"
    r"|\b(?:statement|claim|conjecture)\b[^.\n]{0,60}?\bis\s+(?P<word>true|false)\b(?=\s*(?:[.,;!]|$)|\s+(?:because|since|as)\b)",
    re.IGNORECASE,
)
_REASON = r"(?:(?:For|Since|Because|As|If|When|Take|Let|Consider|A\s+counterexample)\b)"
_OPTION = re.compile(r"^\s*(\(?(?:[A-J][).]|[a-j]\))\s+\S.{0,80})$", re.MULTILINE)
_DAY = re.compile(r"\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b")
_DATE = re.compile(
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December)\s+\d{1,2}(?:,\s+\d{4})?(?!\d)"
)
_CORRECT = re.compile(
    r"(?:\(?(?P<first>[A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right|best|(?:final\s+)?answer)|\b(?i:choose|pick|select|go\s+with)\s+(?:option\s+)?\(?"
    r"(?P<second>[A-J])\b)[^.\n]*[.\s]*$"
)
_COMMENT = re.compile(r"(?:not|correct|right|wrong|incorrect|clear|found|given|obtained|shown|the)\b", re.IGNORECASE)
_READ = 4000
"""The most characters behind an announcement that are read."""


def _explicit_last_line(text: str, box_end: int) -> str:
    """The answer of a last line that says nothing else, if it stands behind every box."""
    if choice := _CORRECT.search(text, box_end):
        return choice["first"] or choice["second"]
    last = list(_FINAL_MARK.finditer(text, box_end))[-1:] or list(_EXPLICIT_LINE.finditer(text, box_end))[-1:]
    if not last or text[last[0].end("answer") :].strip():
        return ""
    return _value_at_start(last[0]["answer"]) or ""


def _announced(text: str) -> str:
    """The value of the last announcement that is followed by a value at once; else of the last one of all.

    Solutions and results may be those of a step, so they count in the last sentence alone.
    """
    final = list(_FINAL_MARK.finditer(text))
    last = _sentences(text)[-1][0]
    found = final or [one for one in _ANNOUNCEMENT.finditer(text) if one["answer_word"] or one.start() >= last]
    for match in reversed(found):
        behind = text[match.start("answer") : match.start("answer") + _READ]
        if value := _value_at_start(behind):
            return value
        if match.start() >= last and (formulas := _formulas_with_value(match["answer"])):
            return _joined(formulas[-1:])
    sentences = (_value_in_sentence(one["answer"]) for one in reversed(found) if final or one["answer_word"])
    return next(filter(None, sentences), "")


def _value_at_start(words: str) -> str | None:
    """The letter, yes or no, formulas or expressions with which some words begin."""
    if filler := _FILLER.match(words):
        words = words[filler.end() :]
    if choice := _CHOICE.match(words):
        if choice["letter"] and not re.match(r"\)?\s*[:.]\s*\S|\)\s+\S", words[choice.end("letter") :]):
            return choice["letter"]
        return _sentence(words)
    if word := _YES_OR_NO.match(words) or _DATE.match(words):
        return word[0]
    if (formula := _FORMULA.match(words)) and _content(formula):
        return _joined(_run(list(_FORMULA.finditer(words)), words))
    if (end := _expression_end(words, 0)) is not None:
        computed = re.match(r"(?:\s*[-+*/\u00d7\u00f7=]\s*[^.\n=]{0,60}(?:\.\d+)?)*=[^\n]*", words[end:])
        return (computed and _last_result(words[: end + computed.end()])) or ", ".join(_expressions(words, 0))
    return None


def _value_in_sentence(sentence: str) -> str:
    """The first formula, else the first expression, else the words."""
    if formulas := [match for match in _FORMULA.finditer(sentence) if _content(match)]:
        return _joined(_run(formulas, sentence))
    for start in _START.finditer(sentence):
        if found := _expressions(sentence, start.start()):
            return ", ".join(found)
    return "" if _COMMENT.match(sentence) and len(sentence) < 40 else _sentence(sentence)


def _sentence(text: str) -> str:
    return re.split(r"[.!?](?:\s|$)", text)[0].strip(" :`\"'")


def _yes_or_no(text: str) -> str:
    line = text.rstrip().rpartition("\n")[2].strip()
    match = _YES_OR_NO.match(line)
    if match and (len(match["word"]) > 3 or not re.search(rf"[.!?]\s+(?!{_REASON}).*\d", line)):
        return match["word"]
    said = _SAID.search(line)
    return str(said["solutions"] or said["word"]) if said else ""


def _lettered(text: str) -> str:
    """The first line, if it is an option with its text and no other line is: `D) 0.25`."""
    options = _OPTION.findall(text)
    return options[0] if len(options) == 1 and text.lstrip().startswith(options[0]) else ""


def _alone(text: str) -> str:
    """A short text that is nothing but an answer, a letter or an expression; or the last day that it names."""
    if days := _DAY.findall(_sentences(text)[-1][1]):
        return str(days[-1])
    text = text.strip().rstrip(".")
    if len(text) > 60 or "\n" in text or not text:
        return ""
    text = _FILLER.sub("", text, count=1)
    return text if _CHOICE.fullmatch(text) or _expression_end(text, 0) == len(text) else ""


# --- formulas ---------------------------------------------------------------------------------------------------

_ROWS = r"(?:align|aligned|gather|gathered|equation|eqnarray|multline|split)\*?"
_FORMULA = re.compile(
    rf"(?<!\\)\$\$(?P<display>(?:\\.|[^$\\]){{1,2000}})\$\$"
    rf"|(?<![\\$])\$(?P<dollar>(?=\S)(?:\\.|[^$\\\n]|\n(?!\s*\n)){{1,2000}}?)(?<=\S)\$(?!\d)"
    rf"|(?<![\\$])\$(?=[^$\n]*[=\\^])(?P<loose>(?:\\.|[^$\\\n]){{1,300}})\$(?!\d)"
    rf"|\\\((?P<paren>.{{1,2000}}?)\\\)|\\\[(?P<bracket>.{{1,2000}}?)\\\]"
    rf"|\\begin\{{{_ROWS}\}}(?P<rows>.{{1,4000}}?)\\end\{{{_ROWS}\}}",
    re.DOTALL,
)
_BETWEEN_VALUES = re.compile(r"\s*(?:,|;|,?\s*\b(?:and|or)\b)\s*", re.IGNORECASE)
_BARE_NAME = re.compile(r"(?:\\?[a-zA-Z]+(?:_\{?\w+\}?)?'?|[A-Z]{2,3})(?:\s*\(\s*[a-z]\s*\))?")
_CONSTANTS = frozenset((r"\pi", "e", "i", r"\infty", r"\emptyset", r"\varnothing"))
_INNER = re.compile(r"\\begin\{(\w*(?:matrix|cases|array))\}.*?\\end\{\1\}", re.DOTALL)
_CONDITION = re.compile(
    r"(?<!only )\b(?:for|all|any|every|each|when|where|if|with|since|because|as|that)\s*$", re.IGNORECASE
)
_AFTER_VALUE = re.compile(r"\bis\s*(?:\$|\\\().*\b(?:when|where|at|if|for)\b(?:(?!\bis\b)[^$\\]){0,30}\Z", re.DOTALL)
_RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|neq?|equiv|mid|in\s*\\mathbb)(?![a-zA-Z])")


def _content(match: re.Match[str]) -> str:
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


def _run(formulas: list[re.Match[str]], text: str) -> list[re.Match[str]]:
    """The first formula and the next ones that only a conjunction separates."""
    run = formulas[:1]
    for match in formulas[1:]:
        if not _BETWEEN_VALUES.fullmatch(text, run[-1].end(), match.start()):
            break
        run.append(match)
    return run


def _joined(formulas: list[re.Match[str]]) -> str:
    """The values of formulas that follow each other; inequalities between which "or" stands are one."""
    text = ""
    for before, match in zip([None, *formulas], formulas, strict=False):
        value = _last_side(_content(match))
        between = match.string[before.end() : match.start()] if before else ""
        text += (" or " if "or" in between and _RELATION.search(value) else ", " if before else "") + value
    return text


def _formulas_with_value(sentence: str) -> list[re.Match[str]]:
    """The formulas of a sentence that may be an answer: names yield to values, conditions to what is said of them."""
    formulas = [match for match in _FORMULA.finditer(sentence) if _content(match)]
    named = [match for match in formulas if not _is_mere_name(_content(match))]
    return [match for match in named if not _is_condition(match, sentence)] or named


def _is_condition(formula: re.Match[str], sentence: str) -> bool:
    """Whether it only says for which values the sentence holds: "for all $n > 2$", "is $9$, when $x = 3$"."""
    before, content = sentence[: formula.start()], _content(formula)
    if _RELATION.search(content):
        return bool(_CONDITION.search(before))
    return bool(_AFTER_VALUE.search(before))


def _is_mere_name(content: str) -> bool:
    return bool(_BARE_NAME.fullmatch(content)) and content not in _CONSTANTS


# --- an unmarked answer -----------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(
    r"[.!?]\)?(?:\$+|\\\])?\)?\s+(?=[A-Z(\\$])|(?:\\\]|\\end\{\w+\*?\})\s*(?=[A-Z(])|\n\s*\n|\n(?=[A-Z])"
)
_REMARK = re.compile(
    r"\((?=[A-Z][a-z]+\s)|(?:Note|Notice|Remark|Alternatively|Check|Verif(?:ication|y(?:ing)?)|Explanation|To\s+(?:check|verify)|In\s+fact|Indeed|"
    r"For\s+these\s+values|I\s+hope|(?:We|You|One)\s+(?:may|can|might)\s+(?:also\s+)?(?:check|verify|recogni[sz]e))\b"
)


@lru_cache(maxsize=8)
def _sentences(text: str) -> list[tuple[int, str]]:
    """The sentences with their places. A formula is never cut."""
    formulas = [match.span() for match in _FORMULA.finditer(text)]
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


def _without_remarks(text: str) -> str:
    """The text without the remarks at its end, which may have several sentences in brackets."""
    sentences = _sentences(text)
    first = len(sentences)
    for place in range(len(sentences) - 1, 0, -1):
        opened = sum(sentence.count("(") - sentence.count(")") for _, sentence in sentences[place:first])
        if _REMARK.match(sentences[place][1]):
            first = place
        elif opened >= 0:
            break
    return text[: sentences[first][0]] if first < len(sentences) else text


_ASIDE = re.compile(
    r"\s+(?:is|as)\s+the\s+(?:final\s+)?answer\b.*"
    r"|\s*\((?:i\.e\.|e\.g\.|(?:or|since|because|as|which|that|about)\s)[^()]*\)"
    r"|\s*\((?:rounded\s|\d+\s[a-z]+\s+and\s+\d+\s[a-z]+)[^()]*\)"
    r"|,?\s+(?:in\s+total|in\s+all|altogether):\s.*|(?<=[\d$)])\s+out\s+of\s+(?:the\s+)?\$?\d.*"
    r"|,\s+which\s+is\s+(?:less|more|fewer|greater|larger|smaller)\s+than\b.*"
    r"|(?<=[\w$)}\]]),?\s+(?:because|since)\b.*|,\s+with\s[^,=]*\bleft\b[^,=]*\Z"
    r"|\s+(?:after|before|by)\s+\w+ing\b[^,=]*\Z|\s+in\s+\d+\s+(?:second|minute|hour|day|week|month|year)s?\.?\s*\Z"
    r"|(?<=\d)\s+(?:at|when|where)\s+[a-zA-Z]\s*=[^,]*\Z",
    re.DOTALL,
)
_PURPOSE = re.compile(r"\b((?:tak|took|need|cost|requir)\w*\s[^.,=]*?\d[^,=]*?)\s+to\s+[a-z]{3,}\s[^,=]*\Z")


def _last_value(text: str) -> str:
    """The value of the last sentence that has one."""
    for _, sentence in reversed(_sentences(text)):
        for part in (_PURPOSE.sub(r"\1", _ASIDE.sub("", sentence)), sentence):
            if found := _last_formula(part) or _last_result(part) or _last_expression(part):
                return found
    return _last_formula(text, names=True) or _last_expression(text)


def _last_formula(sentence: str, *, names: bool = False) -> str:
    """The last formula that may be an answer, with those before it that say as much: `$1$, $2$ and $3$`."""
    formulas = _formulas_with_value(sentence) or (list(_FORMULA.finditer(sentence)) if names else [])
    run = formulas[-1:]
    for match in reversed(formulas[:-1]):
        if not _BETWEEN_VALUES.fullmatch(sentence, match.end(), run[0].start()) or not _alike(match, run[0]):
            break
        run.insert(0, match)
    return _joined(run)


def _alike(one: re.Match[str], other: re.Match[str]) -> bool:
    """Whether two formulas are both values, or say values of one name or of coordinates."""
    equations = [len(sides_of(_content(match))) > 1 for match in (one, other)]
    names = [sides_of(_content(match))[0] for match in (one, other)]
    if not any(equations):
        return not any(_RELATION.search(_content(match)) for match in (one, other))
    return all(equations) and (names[0] == names[1] or set(names) <= {"x", "y", "z"})


_EQUALS = re.compile(r"(?<![<>:\\])(?<!\s!)=(?!=)")
_OR = re.compile(r"(?:,|\\q?quad)?\s*\\(?:text|mathrm|mbox)\s*\{\s*(?:or|and)\s*\}\s*(?:\\q?quad)?")
_APPROXIMATELY = re.compile(r"\\approx(?![a-zA-Z])|\u2248")


def _last_side(expression: str) -> str:
    """The last side of a computation; an equation that begins with a name or has a variable stays, without its middle.
    What is only approximately equal is left out, unless a name stands before it."""
    if len(alternatives := _OR.split(expression)) > 1:
        return ", ".join(map(_last_side, alternatives))
    expression = re.split(r"\\(?:Rightarrow|implies|to|equiv)(?![a-zA-Z])(?![^{}]*\})", expression)[-1]
    expression = re.sub(r"\\pmod\s*(?:\{[^{}]*\}|\w)", "", expression)
    exactly, *roughly = _APPROXIMATELY.split(expression)
    if roughly and _is_mere_name(exactly.strip()):
        return f"{exactly.strip()} = {roughly[-1].strip()}"
    if roughly and re.search(r"\\\$", exactly):
        exactly = roughly[-1]  # sums of money are rounded, not estimated
    sides = [side for side in sides_of(exactly) if side]
    if len(sides) < 2:
        return sides[0] if sides else exactly.strip()
    without_commands = re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^}]*\}|\\[a-zA-Z]+", "", sides[0])
    if re.search(r"[a-zA-Z]", without_commands) or _BARE_NAME.fullmatch(sides[0]):
        return exactly.strip() if len(sides) == 2 else f"{sides[0]} = {sides[-1]}"
    return sides[-1] if not _is_mere_name(sides[-1]) else sides[0]


# --- expressions without dollar signs ---------------------------------------------------------------------------

_MONEY = r"(?:\\?\$|[\u20ac\u00a3])"
_START = re.compile(
    rf"(?<![\w.\\])(?:[-+\u2212\u00b1]?\s?{_MONEY}?\s?(?:\d|\.\d)"
    rf"|\\(?:[dtc]?frac|sqrt|pi|infty|log|ln|sin|cos|tan|binom)"
    rf"(?![a-zA-Z])|\\\{{|\u221a|\u03c0|[a-zA-Z](?:_\w+|\(\w\))?\s*(?:[=<>\u2264\u2265]|[-+*/^](?=\s*\S)|(?<=[a-zA-Z])\([^()]{{1,40}}[-+][^()]{{1,40}}\))"
    rf"|[({{\[](?=\s*[-\d\\a-z]))"
)
_ENDINGS = frozenset(("st", "nd", "rd", "th"))  # of ordinal numbers
_TOKEN = re.compile(
    r"(?P<blank>[ \t]+|\\[,;: !]|~)"
    r"|(?P<number>\d*\.\d*(?=\\(?:overline|bar|dot)(?![a-zA-Z])|\(\d+\))|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?(?:\.{3}|\u2026)?|\.\d+)"
    r"|(?P<command>\\[a-zA-Z]+|\\[{}%])"
    r"|(?P<function>(?:sqrt|sin|cos|tan|log|ln|pi|mod|gcd|lcm)(?![a-zA-Z]))"
    r"|(?P<word>[a-zA-Z]+)"
    r"|(?P<operator>\*\*|[-+\u2212\u2013*\u00d7\u00b7\u22c5\u00f7/^_=<>\u2264\u2265\u00b1\u2248\u222a\u2229|:])"
    rf"|(?P<money>{_MONEY}(?=\s?\d))"
    r"|(?P<open>[({\[])|(?P<close>[)}\]])|(?P<after>!(?![!=]|\s+[A-Z])|%|\u00b0|')|(?P<comma>,)"
    r"|(?P<sign>[\u221a\u03c0\u221e\u2205])"
)


def _last_result(sentence: str) -> str:
    """What stands behind the last equals sign of a computation in words: `90 minutes / 450 minutes = 20%`."""
    for equals in reversed(list(_EQUALS.finditer(sentence))):
        if re.search(r"(?<![\w.])[a-zA-Z]\s*$", sentence[: equals.start()]):
            return ""
        if found := _expressions(
            sentence, equals.end() + len(sentence[equals.end() :]) - len(sentence[equals.end() :].lstrip())
        ):
            return found[0]
    return ""


_KNOWN = re.compile(r"\b(?:the|these|those|all|his|her|their)\s\Z")  # numbers of the question: "in the 6 boxes"


def _last_expression(text: str) -> str:
    """The last number or expression, with those that "and" joins to it: `x = 1 and x = 2`, "the values are 1 and 2"."""
    text = text[-TAIL:]
    found: list[tuple[int, int, str]] = []
    position = 0
    while start := _START.search(text, position):
        end = _expression_end(text, start.start())
        if end is None:
            position = start.end()
            continue
        found.append((start.start(), end, _last_side(text[start.start() : end].strip())))
        position = end
    found = [one for one in found if not _KNOWN.search(text[max(0, one[0] - 20) : one[0]])] or found
    run = found[-1:]
    for one in reversed(found[:-1]):
        if not _BETWEEN_VALUES.fullmatch(text, one[1], run[0][0]) or ("=" in one[2]) != ("=" in run[0][2]):
            break
        run.insert(0, one)
    if run and "=" not in run[0][2] and not re.search(r"\bare:?\s*\Z", text[: run[0][0]]):
        run = run[-1:]
    return ", ".join(value for _, _, value in run)


def _expressions(text: str, start: int) -> list[str]:
    """The expression at a place, and those that a conjunction joins to it; none if there is none."""
    found: list[str] = []
    between = None
    while (end := _expression_end(text, start)) is not None:
        value = _last_side(text[start:end].strip())
        if between and "or" in between[0] and _RELATION.search(value):
            found[-1] += f" or {value}"
        else:
            found.append(value)
        if not (between := _BETWEEN_VALUES.match(text, end)):
            break
        start = between.end()
    return found


def _expression_end(text: str, start: int) -> int | None:
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
            position = (_closing_brace(text, position) or position) + 1
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
