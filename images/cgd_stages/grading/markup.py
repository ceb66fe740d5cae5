r"""The markup of a model's text: what only makes it look well is taken away, and its boxes are found. Pure."""

import re
from collections.abc import Iterator

from cgd_stages.grading.spelling import on_the_line

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
        (r"(\b(?:odds|ratio|proportion)\b[^.\n]{0,80}?\b\d+) to (?=\d)", re.IGNORECASE, r"\1:"),
        (r"\b(\d+)(?: in | out of )(\d+) (?=chance|probability)", 0, r"\1/\2 "),
        (r"(\b(?:chances?|probability)\b[^.\n]{0,60}?\b(?:is|are) \d+)(?: in | out of )(?=\d)", 0, r"\1/"),
        (r"\"(?:final_?)?answer\"\s*:\s*\"?([^\"{}\n]{1,300}?)\"?\s*\}\s*\Z", re.IGNORECASE, r"\n#### \1"),
        (r"(?<=\d)\s?[a-zA-Z]{1,4}/\([a-zA-Z\u00b0\u00b7\u22c5* ]{1,20}\)", 0, ""),  # 0.39 J/(g K)
        (r"(?<!\bin \d)(?<!\bin \d\d)(?<=\d) (?:more|additional|extra|full|whole) (?=[a-z])", 0, " "),
        (r"^[ \t]*(?:```.*|\|[ :|-]+\|[ \t]*)$|`|^[ \t]*>[ \t]+", re.MULTILINE, ""),
        (r"(?<![\w)}])(?:\*\*|__)|(?:\*\*|__)(?![\w({\\])", 0, ""),  # `2**10` stays
        (r"(?<![\w)}\]*\\|])([*_])(?=[^\s*_])([^*_\n]{1,200})(?<=\S)\1(?![\w*({\\])", 0, r"\2"),
        (r"^[ \t]*\|[ \t].*[ \t]\|[ \t]*$", re.MULTILINE, lambda row: row[0].replace("|", "\t")),
        (r":\s*\n(?:[ \t]*(?:[-*\u2022]|\d[.)])[ \t]+[^\n]{1,60}(?:\n|\Z)){2,}\Z", 0, _in_a_line),
    )
)  # fmt: skip


def without_markup(output: str) -> str:
    """The text without emphasis, code fences, tables and drawings; a list at its end is one line."""
    text = on_the_line(output)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.rstrip()


# --- boxes ------------------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\d\-]|\Z)")
_BARE_BOX = re.compile(r"-?\d+(?:\.\d+)?")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$.]|\\q?quad)*(?:[a-z]{3,}\s)?(?:\\text\{)?\s*(?:,|;|and|or|,\s*and|,\s*or)\s*\}?(?:[\s$(\[]|\\q?quad|\\)*"
    r"(?:[a-zA-Z](?:_\{?\w\}?)?\s*=\s*)?",
    re.IGNORECASE,
)


def last_boxes(text: str) -> tuple[list[str], int]:
    """The contents of the last box, and of the boxes before it that only a conjunction separates; and where it ends.
    None are left when the last one is empty or has no end."""
    boxes = list(all_boxes(text))
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


def all_boxes(text: str) -> Iterator[tuple[int, int, str]]:
    r"""The start, end and content of every box. An inner box is part of the outer one. A box without an end takes in
    the rest of the text, unless another box follows.

    In `\boxed 5`, TeX takes one token; models mean the number.
    """
    position = 0
    while match := _BOX.search(text, position):
        position = match.end()
        braced = text[position : position + 1] == "{"
        end = closing_brace(text, position) if braced else position
        if end is None:
            if not _BOX.search(text, position):
                yield match.start(), len(text), ""
            continue
        number = None if braced else _BARE_BOX.match(text, position)
        content = text[position + 1 : end] if braced else number[0] if number else ""
        position = end + 1
        yield match.start(), position, _BOX.sub("", content).strip()


def closing_brace(text: str, opening: int) -> int | None:
    """The place of the brace that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        if text[index] in "{}" and text[index - 1] != "\\":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return index
    return None
