r"""What an output says its answer is. Pure, and linear in the output's length.

The first rule that finds something decides:

1. an explicit last line behind all boxes: `**Answer: D**`, `#### 42`, "The correct choice is C."
2. the last box, and boxes before it that only "and" or a comma separates. A last box that is empty or never closed
   takes back what came before it: then only the text behind it counts.
3. what the text announces: "The answer is"; in its last sentence also "The solutions are"; on the next line, if need be
4. an option with its text at the beginning, `D) 0.25`; yes or no at the beginning of the last line, or said in it
5. of the last sentences the last one that has any: the last formula, else the last result of a computation, else the
   last number or expression that is written without dollar signs. What only explains it does not count, and a sentence
   that leaves open which value is meant has none (`prose`).

Remarks at the end ("Note that ...", "We may check our answer: ...") count only if nothing else does, and what the text
denies anywhere ("but 3 is extraneous") is no answer.

math-verify 0.9 has other rules: its last match wins, also a number inside a longer formula, and a withdrawn box counts.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from cgd_stages.grading.formulas import (
    BETWEEN_VALUES,
    FORMULA,
    RELATION,
    START,
    content_of,
    expression_end,
    expressions_at,
    formulas_with_value,
    is_mere_name,
    joined,
    last_side,
    run_of,
)
from cgd_stages.grading.markup import last_boxes, without_markup
from cgd_stages.grading.numerals import NUMBER_WORD, of_words
from cgd_stages.grading.prose import (
    NUMBER,
    SPAN,
    gives_up,
    has_several,
    is_plan,
    is_question,
    sentences,
    statements,
    without_remarks,
)
from cgd_stages.grading.spelling import CHEMICAL, EQUALS, MONTHS, bare, split
from cgd_stages.grading.spelling import sides as sides_of
from cgd_stages.grading.units import unit_after

AnswerSource = Literal["boxed", "text", "none", "unfinished_thought"]


@dataclass(frozen=True)
class FoundAnswer:
    """The answer in an output, and where it was found."""

    text: str
    source: AnswerSource


NOTHING = FoundAnswer("", "none")
NEAR = 3
"""The last sentences of an output in which an unmarked answer is looked for."""
TAIL = 4000
"""The last characters of an output in which an unmarked answer is looked for."""


@lru_cache(maxsize=8)  # an output is asked once for each of its right answers
def find_answer(output: str, *, in_words: bool = False) -> FoundAnswer:
    """The answer of a text. `source` tells a boxed answer from one that was found in the words. `in_words`: words are
    asked for, such as a name or a day, so the last sentence's words count before its numbers."""
    text, denied = _without_denied(without_markup(output))
    boxes, end = last_boxes(text)
    if line := explicit_last_line(text, end):
        return FoundAnswer(line, "text")
    if boxes:
        return FoundAnswer(", ".join(dict.fromkeys(boxes)), "boxed")
    for part in (without_remarks(text[end:]), text[end:]):
        for rule in (announced, _lettered, _yes_or_no, *((_words,) if in_words else ()), _last_value, _alone):
            if (found := rule(part)) is None:
                return NOTHING
            if found := _left(found, denied) or (found if rule is announced else ""):
                return FoundAnswer(found, "text")
    if numbers := list(NUMBER_WORD.finditer(sentences(text[end:])[-1][1])):
        return FoundAnswer(of_words(numbers[-1]), "text")
    return NOTHING


_VALUE = (
    r"(?:[a-z]\s*=\s*)?(?:\$[^$\n]{1,80}\$|\\\([^\n]{1,80}?\\\)|-?\\?\$?\d(?:[\d,./]*\d)?(?![\w%^*/+(\\])"
    r"|\\boxed\{[^{}\n]{1,80}\})"
)
_NEGATED = re.compile(
    rf"(?:\b(?:not|cannot|instead of|rather than|reject|discard)"
    rf"|n['\u2019]t)\s+(?:be\s+|equal(?:\s+to)?\s+)?{_VALUE}"
    rf"|(?<![\w.\\{{^(+*/=-]){_VALUE}\s+(?:(?:is|are)\s+(?:wrong|incorrect|impossible|extraneous|rejected|excluded|invalid|discarded"
    r"|too\s+(?:large|small|big|high|low|many|few)|not\s+(?:correct|right|possible|valid|allowed|a\s+solution))"
    r"|(?:do(?:es)?\s+not|do(?:es)?n['\u2019]t)\s+(?:satisfy|work|hold|fit)|fails?)\b"
    rf"|\b(?:is|are|be)\s+(?:strictly\s+)?(?:less|more|greater)\s+than\s+{_VALUE}(?=[.\s]*\Z)",
    re.IGNORECASE,
)
"""A value that the text says is none."""


_DENIES = re.compile(
    r"not|n['\u2019]t|instead|rather|reject|discard|wrong|incorrect|impossible|extraneous|excluded|invalid|too|fail|than",
    re.IGNORECASE,
)
"""A part of every denial, which is faster looked for."""


def _without_denied(text: str) -> tuple[str, set[str]]:
    """The text without the values that it says are none, and these values."""
    denials = [denial[0] for denial in _NEGATED.finditer(text)] if _DENIES.search(text) else []
    values = (value for denial in denials for value in re.findall(_VALUE, denial, re.IGNORECASE))
    return _NEGATED.sub("", text) if denials else text, {bare(sides_of(value)[-1]) for value in values}


def _left(found: str, denied: Collection[str]) -> str:
    """What is left of an answer without the values that the text has denied somewhere: `5` of `5, -2`."""
    values = split(found) if denied else []
    return ", ".join(value for value in values if bare(sides_of(value)[-1]) not in denied) if values else found


# --- announcements ----------------------------------------------------------------------------------------------

FINAL_MARK = re.compile(r"####\s*(?P<answer>[^\n]+)")
_VERB = r"(?:\s+(?:is|are|was|must\s+be|should\s+be|would\s+be|will\s+be|equals|comes?\s+(?:out\s+)?to)\b|\s*:)"
_ANNOUNCEMENT = re.compile(
    r"\b(?:(?P<answer_word>(?<!is the )(?<!is the final )(?<!as the )answers?|ans\.?)"
    r"|results?|solutions?|roots?|(?P<choice_word>(?:correct|right|best|appropriate|likely)\s+(?:choice|option|letter)))\b"
    rf"(?:[^.:=\n$\\]{{0,80}}?{_VERB}|\s*=|(?<=answer)\s*\n)(?!\s+(?:not|to\s+[a-z]+)\b)[\s:]*(?=(?P<answer>[^\n]+))",
    re.IGNORECASE,
)
EXPLICIT_LINE = re.compile(
    r"(?:^|(?<=[.!?:,]\s)|(?<=\n))\W{0,5}(?:(?:so|thus|therefore|hence)\b,?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?"
    r"(?:correct\s*:|answer\s*(?:[:=]|[-\u2013\u2014](?=\s))|(?:answer|choice|option)\s+is\b)[\s:]*(?=(?P<answer>[^\n]+))",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"(?:[\s:\"'\u201c]|(?:that|simply|just|only|exactly|approximately|about|equal\s+to|either|both|therefore|thus|then|indeed|now|option|"
    r"choice|letter|the\s+(?:option|letter|number|value))\b)*",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"[(\[]?(?P<letter>[A-J])[)\]]?(?=\s*(?:[.,;:!\"}]|$)|\s+(?:because|since|as|for)\b|\s+[-\u2013\u2014(]\s*[a-z]{2,})|\(?[A-J]\)\s+(?=[^\s=+*/^-])",
    re.MULTILINE,
)
_LETTERS = re.compile(
    r"\(?[A-J]\)?(?:(?:\s*,(?:\s*and\b)?|\s+and\b|\s*&)\s*\(?[A-J]\)?)+(?=\s*(?:[.;:!]|$))", re.MULTILINE
)
_LETTER_AT_END = re.compile(
    r"(?:\b(?:[Oo]ption|[Cc]hoice|[Ss]tatement|must\s+be|it\s+is|leav(?:es|ing)(?:\s+only)?)|\b[Ii]t['\u2019]s"
    r"|(?:\A|[.!?]\s|\n)(?:So|Thus|Hence|Therefore),?)\s+\(?([A-J])\)?[.\s]*\Z|\bletter\b[^.\n]{0,60}\bis\s+([A-Z])[.\s]*\Z"
)
_REASONED_LETTER = re.compile(r"\W*\(?([A-J])\)?(?:,|\s[-\u2013\u2014])?\s+(?:because|since|as)\b")
_NAMED_OPTION = re.compile(
    r"\b(?:option|choice)\s+\(?([A-J])\b\)?\s+(?!(?:is|was|are|and|or|nor|cannot|can|does)\b)[a-z]+"
)
_SPANS = re.compile(rf"\d+\s?{SPAN}(?:,?\s+(?:and\s+)?\d+\s?{SPAN})+\b")
_MORE = re.compile(
    rf"{NUMBER}\s+(?:or\s+(?:more|less|fewer|greater)\b|[a-z]+(?:,\s+{NUMBER}\s+[a-z]+)*,?\s+and\s+{NUMBER}\s+[a-z]+)"
    rf"|{NUMBER}\s?[a-z]+\s*(?:\u00d7|\\times|x|by)\s*{NUMBER}\s?[a-z]+"
)
"""A number that is a part of what is said: `12 or more`, `12 apples and 5 oranges`."""
_COMPARED = re.compile(
    r"\b(?:more|less|fewer|greater|larger|smaller|higher|lower)\s+than\b|\b(?:between|at\s+least|at\s+most|same\s+as)\b",
    re.IGNORECASE,
)
_SMALL_LETTER = re.compile(r"\(?[a-j]\)")
_YES_OR_NO = re.compile(
    r"(?P<word>yes|no|true|false)\b(?=\s*(?:[.,;:!(\u2013\u2014-]|$)|\s+(?:because|since|as)\b)", re.IGNORECASE
)
_SAID = re.compile(
    r"\b(?:has|have|is|are)\s+(?P<solutions>(?:no|infinitely\s+many)\s+(?:real\s+)?solutions?)[.\s]*\Z"
    r"|\bboth\s+(?P<pair>(?-i:[A-J])\s+and\s+(?-i:[A-J]))\s+(?:are|hold|apply)\b"
    rf"|\b(?:options?|choices?|statements?|answers?|order|ranking)\b[^.\n]*\b(?:is|are)\s+(?P<letters>(?-i:{_LETTERS.pattern}))[.\s]*\Z"
    r"|\b(?P<state>does\s+not\s+exist|(?<=is\s)(?:undefined|indeterminate|impossible)|(?:con|di)verges)[.\s]*\Z"
    r"|\b(?P<unknown>cannot\s+be\s+determined)\b"
    r"|(?:\b(?:statement|claim|conjecture)\b[^.\n]{0,60}?\bis|\bthat['\u2019]s)\s+(?P<word>true|false)\b(?=\s*(?:[.,:;!]|$)|\s+(?:because|since|as)\b)",
    re.IGNORECASE,
)
_BOTH = re.compile(r"\b(true|false)\b.*\b(?:and|but|while|whereas)\b.*\b(?!\1)(?:true|false)\b", re.IGNORECASE)
_ALL_BUT = re.compile(
    r"\ball\s+(?:real\s+(?:numbers?|values)|reals)(?:\s+of\s+\$?x\$?)?\s+except\s+(?:for\s+)?\$?(?:x\s*=\s*)?"
    r"(?P<value>-?[\d./]*\d)\$?[.\s]*\Z"
)
_REASON = r"(?:(?:For|Since|Because|As|If|When|Take|Let|Consider|A\s+counterexample)\b)"
_OPTION = re.compile(r"^\W*?(\(?(?:[A-J][).]|[B-J]:|[a-j]\))\s+\S.{0,80})$", re.MULTILINE)
_DAY = re.compile(r"\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b")
_MONTH = re.compile(rf"\b(?:in|is)\s+(?:{MONTHS})\b")
_DATE = re.compile(
    rf"(?:{MONTHS})\s+\d{{1,2}}(?:,?\s+\d{{4}})?(?!\d)|\b\d{{1,2}}(?:st|nd|rd|th)?\s+(?:of\s+)?(?:{MONTHS})(?:,?\s+\d{{4}})?"
)
_CORRECT = re.compile(
    r"(?:(?<!nor )(?<!not )\(?(?P<first>[A-J])\)?\s+is\s+"
    r"(?:(?:the\s+)?(?:correct|right|best|(?:final\s+)?answer)|the\s+only\s)|\b(?i:choose|pick|select|go(?:ing)?\s+with)\s+(?:option\s+)?\(?"
    r"(?P<second>[A-J])\b)[^.\n]*[.\s]*$"
)
_PREDICATE = re.compile(
    r"(?:\b(?:is|are|was|were|be|becomes?|called|named|known\s+as|means|stands\s+for|by|remains)\s+"
    r"|\banswer:\s+|\A[A-Z][\w' -]{1,40}:\s+)"
    r"(?:(?:called|named|(?:best\s+)?(?:known|described|classified|characteri[sz]ed)\s+as|in|at|on|by|from|the|an?)\s+)*",
    re.IGNORECASE,
)
_EXPLAINED = re.compile(
    r",?\s+(?:because|since)\b|,\s+(?:while|whereas|whose|not|rather|unlike|(?:closely\s+)?followed\s+by)\b"
)
_AND_OTHERS = re.compile(r"\s(?:and|but|while|whereas)\s")
"""What stands between two predicates of a sentence that says two things: "gold is Au and silver is"."""
_NAME_WITH_DIGITS = re.compile(rf"\b\d(?:,\d)*-[a-z]+|{CHEMICAL.pattern}")
_REACTION = re.compile(r"->|\u2192")
_COMMENT = re.compile(r"(?:not|correct|right|wrong|incorrect|clear|found|given|obtained|shown|the)\b", re.IGNORECASE)
_READ = 4000
"""The most characters behind an announcement that are read."""


def explicit_last_line(text: str, box_end: int) -> str:
    """The answer of a last line that says nothing else, if it stands behind every box."""
    if choice := _CORRECT.search(text, box_end):
        return choice["first"] or choice["second"]
    last = list(FINAL_MARK.finditer(text, box_end))[-1:] or list(EXPLICIT_LINE.finditer(text, box_end))[-1:]
    if not last or text[last[0].end("answer") :].strip():
        return ""
    return _value_at_start(last[0]["answer"]) or ""


def announced(text: str) -> str:
    """The value of the last announcement that is followed by a value at once; else of the last one of all.

    Solutions and results may be those of a step, so they count in the last sentence alone.
    """
    final = list(FINAL_MARK.finditer(text))
    last = sentences(text)[-1][0]
    found = final or [one for one in _ANNOUNCEMENT.finditer(text) if _is_final(one) or one.start() >= last]
    for match in reversed(found):
        behind = text[match.start("answer") : match.start("answer") + _READ]
        if value := _value_at_start(behind):
            return value
        if match.start() >= last and (formulas := formulas_with_value(match["answer"])):
            return joined(formulas[-1:])
    within = (_value_in_sentence(one["answer"]) for one in reversed(found) if final or _is_final(one))
    return next(filter(None, within), "")


def _is_final(announcement: re.Match[str]) -> bool:
    return bool(announcement["answer_word"] or announcement["choice_word"])


def _value_at_start(words: str) -> str | None:
    """The letter, yes or no, formulas or expressions with which some words begin."""
    if filler := _FILLER.match(words):
        words = words[filler.end() :]
    if letters := _LETTERS.match(words):
        return letters[0]
    if choice := _CHOICE.match(words):
        lead = re.match(r"\(?[A-J]\)?\s*[:.]?\s*", words)
        if choice["letter"] and not re.match(r"\)?\s*[:.]\s*\S|\)\s+\S", words[choice.end("letter") :]):
            return choice["letter"]
        return lead[0] + _sentence(words[lead.end() :]) if lead else _sentence(words)
    if word := _YES_OR_NO.match(words) or _DATE.match(words):
        return word[0]
    if (formula := FORMULA.match(words)) and content_of(formula):
        return joined(run_of(list(FORMULA.finditer(words)), words))
    if whole := _SPANS.match(words) or _MORE.match(words):
        return whole[0]
    if (end := expression_end(words, 0)) is not None:
        computed = re.match(r"(?:\s*[-+*/\u00d7\u00f7=]\s*[^.\n=]{0,60}(?:\.\d+)?)*=[^\n]*", words[end:])
        return (computed and _last_result(words[: end + computed.end()])) or ", ".join(expressions_at(words, 0))
    return None


def _value_in_sentence(sentence: str) -> str:
    """The first formula, else the first expression, else the words."""
    if formulas := [match for match in FORMULA.finditer(sentence) if content_of(match)]:
        return joined(run_of(formulas, sentence))
    for start in () if _COMPARED.search(sentence) else START.finditer(sentence):
        if found := expressions_at(sentence, start.start()):
            return ", ".join(found)
    return "" if _COMMENT.match(sentence) and len(sentence) < 40 else _EXPLAINED.split(_sentence(sentence))[0]


def _sentence(text: str) -> str:
    return re.split(r"[.!?](?:\s|$)", text)[0].strip(" :`\"'")


def _yes_or_no(text: str) -> str:
    line = text.rstrip().rpartition("\n")[2].strip()
    match = _YES_OR_NO.match(line)
    if match and (len(match["word"]) > 3 or not re.search(rf"[.!?]\s+(?!{_REASON}).*\d", line)):
        return match["word"]
    if but := _ALL_BUT.search(line):
        return rf"\mathbb{{R}} \setminus \{{{but['value']}\}}"
    said = None if _BOTH.search(line) else _SAID.search(line)
    return str(next(filter(None, said.groups()))) if said else ""


def _lettered(text: str) -> str:
    """The first line, if it is an option with its text and no other line is: `D) 0.25`; or the letter at the end."""
    if last := _LETTER_AT_END.search(text, max(0, len(text) - 200)) or _REASONED_LETTER.match(text):
        return str(next(filter(None, last.groups())))
    options = _OPTION.findall(text)
    if len(options) == 1 and re.match(rf"\W*{re.escape(options[0])}", text):
        return str(options[0])
    named = set(_NAMED_OPTION.findall(sentences(text)[-1][1]))
    return str(named.pop()) if len(named) == 1 else ""


def _words(text: str) -> str:
    """What the last sentence says something is, or a short text that says nothing of anything: "It is iron (Fe)." """
    sentence = _EXPLAINED.split(sentences(text)[-1][1].strip(" \n.!\"'\u201c\u201d"))[0]
    if state := re.search(r"\b(?:con|di)verges\b(?!\s+to)", sentence):
        return state[0]
    for times in (_DATE, _DAY, _MONTH):
        if found := [match[0] for match in times.finditer(sentence)]:
            return found[-1].removeprefix("in ").removeprefix("is ")
    if quoted := re.search(r"[\"\u201c]([^\"\u201c\u201d]{2,100})\Z", sentence):
        return quoted[1]
    *said, last = _PREDICATE.split(sentence)
    if len(said) > 1 and _AND_OTHERS.search(said[-1]):
        return ""
    if not said and (len(last) > 60 or text.strip() != sentences(text)[-1][1].strip()):
        return ""
    last = last if said else re.sub(r"^(?:We|I)\s+(?!and\b)(?:(?:therefore|thus)\s+)?", "", last)
    last = re.sub(r"\s*\((?=[^()]*\d{3}|(?:[^()\s]+\s+){2})[^()]*\)", "", last)
    words = (
        re.split(
            r",?\s+(?:because|since|which|who|when|where|(?<=,\s)(?:not|rather|unlike)|(?:in|on|at|during|around)\s+\d\w*)\b",
            last,
        )[0]
        if said
        else last
    )
    if re.search(r"[\d$\\=]", _NAME_WITH_DIGITS.sub("", words)) and not _REACTION.search(words):
        return ""
    return words.strip(" \"'\u201c\u201d")


def _alone(text: str) -> str:
    """A short text that is nothing but an answer, a letter or an expression; or the last day that it names."""
    if days := _DAY.findall(sentences(text)[-1][1]):
        return str(days[-1])
    text = text.strip().rstrip(".")
    if len(text) > 60 or "\n" in text or not text:
        return ""
    text = _FILLER.sub("", text, count=1)
    whole = any(alone.fullmatch(text) for alone in (_CHOICE, _LETTERS, _SMALL_LETTER))
    return text if whole or expression_end(text, 0) == len(text) else ""


# --- an unmarked answer -----------------------------------------------------------------------------------------

_BOUNDED = re.compile(r"([a-zA-Z])\s*(?:[<>\u2264\u2265]|\\[lg](?:eq?)?(?:slant)?(?![a-zA-Z]))")


def _last_value(text: str) -> str | None:
    """The value of the last sentence that has one. None where that sentence leaves open which value is meant."""
    parts = [sentence for _, sentence in sentences(text)][-NEAR:]
    if any(map(gives_up, parts[-2:])):
        return None
    for sentence in reversed(parts):
        for part in () if is_question(sentence) else statements(sentence):
            if found := _last_formula(part) or _last_result(part) or _last_expression(part):
                return None if is_plan(part) or has_several(part) else found
    return ""


_MEASURED = re.compile(r"\A[^<>]*[\d}]\Z")


def _last_formula(sentence: str) -> str:
    """The last formula that may be an answer, with those before it that say as much: `$1$, $2$ and $3$`."""
    formulas = formulas_with_value(sentence)
    run = formulas[-1:]
    for match in reversed(formulas[:-1]):
        if not BETWEEN_VALUES.fullmatch(sentence, match.end(), run[0].start()) or not _alike(match, run[0]):
            break
        run.insert(0, match)
    unit = unit_after(sentence[run[0].end() :]).strip() if len(run) == 1 else ""
    return joined(run) + (rf"\text{{ {unit}}}" if unit and _MEASURED.search(joined(run)) else "")


def _alike(one: re.Match[str], other: re.Match[str]) -> bool:
    """Whether two formulas are both values, or say values of one name or of coordinates."""
    equations = [len(sides_of(content_of(match))) > 1 for match in (one, other)]
    names = [sides_of(content_of(match))[0] for match in (one, other)]
    if any(RELATION.search(content_of(match)) for match in (one, other)):
        first, second = (_BOUNDED.match(content_of(match)) for match in (one, other))
        return first is not None and second is not None and first[1] == second[1]
    if not any(equations):
        return True
    bases = {re.sub(r"_\{?\w+\}?$", "", name) for name in names}
    return all(equations) and (len(bases) == 1 or bases <= {"x", "y", "z"})


# --- expressions without dollar signs ---------------------------------------------------------------------------


def _last_result(sentence: str) -> str:
    """What stands behind the last equals sign of a computation in words: `90 minutes / 450 minutes = 20%`."""
    for equals in reversed(list(EQUALS.finditer(sentence))):
        if re.search(r"(?<![\w.])[a-zA-Z]\s*$", sentence[: equals.start()]):
            return ""
        if found := expressions_at(
            sentence, equals.end() + len(sentence[equals.end() :]) - len(sentence[equals.end() :].lstrip())
        ):
            return found[0]
    return ""


_KNOWN = re.compile(
    r"\b(?:the|these|those|all|his|their|(?:in|of|for|with|on|from|to)\s+her)\s\Z"
)  # numbers of the question: "in the 6 boxes"


_SPAN = re.compile(rf"\d+\s?({SPAN})")


def _go_together(one: str, other: str, between: str) -> bool:
    """Whether two expressions are parts of one answer: values, values of names, or `2 hours 30 minutes`."""
    if not between.strip():
        return bool(_SPAN.fullmatch(one)) and unit_after(other.lstrip("0123456789.")) != ""
    equations = [sides_of(expression) for expression in (one, other)]
    named = [len(sides) > 1 and is_mere_name(sides[0]) for sides in equations]
    return bool(BETWEEN_VALUES.fullmatch(between)) and (all(named) or not any(len(sides) > 1 for sides in equations))


def _last_expression(text: str) -> str:
    """The last number or expression, with those that "and" joins to it: `x = 1 and x = 2`, "the values are 1 and 2"."""
    text = text[-TAIL:]
    found: list[tuple[int, int, str]] = []
    position = 0
    while start := START.search(text, position):
        end = expression_end(text, start.start())
        if end is None:
            position = start.end()
            continue
        found.append((start.start(), end, last_side(text[start.start() : end].strip())))
        position = end
    found = [one for one in found if not _KNOWN.search(text[max(0, one[0] - 20) : one[0]])]
    run = found[-1:]
    for one in reversed(found[:-1]):
        if not _go_together(one[2], run[0][2], text[one[1] : run[0][0]]):
            break
        run.insert(0, one)
    parts = _SPAN.fullmatch(run[0][2]) if len(run) > 1 else None
    if (
        run
        and "=" not in run[0][2]
        and not parts
        and not RELATION.search(run[0][2])
        and not re.search(r"\b(?:are|measure|equal|namely):?\s*\Z", text[: run[0][0]])
    ):
        run = run[-1:]
    return (" or " if run and RELATION.search(run[0][2]) else ", ").join(value for _, _, value in run)
