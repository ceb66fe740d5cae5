r"""What a reference says its value is. Pure."""

import json
import re

from cgd_stages.chat.thoughts import split_text
from cgd_stages.grading.extraction import EXPLICIT_LINE, FINAL_MARK, announced, explicit_last_line
from cgd_stages.grading.markup import all_boxes, last_boxes, without_markup
from cgd_stages.grading.numerals import NUMBER_WORD
from cgd_stages.grading.spelling import CHEMICAL, MONTHS, bare
from cgd_stages.text.references import right_answers


def reference_answer(reference: str) -> str:
    """The value in a reference: the one that it marks, or the whole text; without its thought, and empty where nothing
    stands behind that."""
    text = without_thought(reference)
    return marked_answer(reference) or (text if text == reference.strip() else without_markup(text).strip())


def marked_answer(reference: str) -> str:
    r"""The value that a reference marks: its last `\boxed{}`, or the text after `####`; empty if it marks none. A JSON
    list of texts, which a source with `several: all` has, holds several values; a list of numbers such as `[1, 2]` is
    an interval.

    It may also end on an announcement ("The answer is 17."). A reference with a thought is a whole reply of a model,
    which announces anywhere, and so is a line that begins with an announcement ("Answer: Paris")."""
    text = without_thought(reference)
    if re.match(r"\s*\[\s*\"", text) and (texts := _listed(text)):
        return ", ".join(texts)
    if boxes := last_boxes(text)[0]:
        return ", ".join(boxes)
    if marks := list(FINAL_MARK.finditer(text)):
        return str(marks[-1]["answer"]).strip()
    reply = without_markup(text)
    if value := explicit_last_line(reply, 0):
        return value
    is_reply = text != reference.strip() or ("\n" not in reply and EXPLICIT_LINE.match(reply))
    return announced(reply) if is_reply else ""


def is_in_words(value: str) -> bool:
    """Whether a reference's value is made of words, or of a chemical formula: no number, letter or expression."""
    value = value.strip()
    if re.search(r"->|\u2192|^\d(?:,\d)*-[a-z]{3}", value) or CHEMICAL.fullmatch(value):
        return True
    words = re.match(rf"\d{{1,2}}\s(?:{MONTHS})|(?:the\s+)?[A-Za-z]+\d?[A-Za-z]|[IVX]+(?:,|\sand)\s", value)
    return bool(words) and not re.search(r"[\\=+^_*/<>$]", value) and not NUMBER_WORD.fullmatch(value)


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


def has_answer(reference: str) -> bool:
    r"""Whether an output can be right at all: not so where the reference is blank, `$$`, `\boxed{}` or a thought."""
    return any(_says(answer) for answer in right_answers(reference))


def _says(reference: str) -> bool:
    boxes = list(all_boxes(without_thought(reference)))
    return bool(boxes[-1][2].strip() if boxes else bare(reference_answer(reference)).strip("#"))
