"""Replies as models write them on school maths, competitions, science, multiple choice and general questions: each
against references that it has right (+) and wrong (-). All were written before any verdict on them was seen; see
docs/results.md for how many the grader had wrong before it was mended."""

import pytest
from support.everyday import REPLIES, everyday

from cgd_stages.grading.compare import compare
from cgd_stages.grading.extraction import find_answer
from cgd_stages.grading.reference import is_in_words, reference_answer

GROUP = 20
"""Replies in a test."""


ALL = list(everyday())


@pytest.mark.parametrize("first", range(0, len(ALL), GROUP))
def test_a_reply_is_graded_as_a_person_would(first: int) -> None:
    wrong = [
        (reference, reply)
        for reply, references in ALL[first : first + GROUP]
        for reference, right in references
        if graded(reference, reply) is not right
    ]
    assert not wrong


def graded(reference: str, reply: str) -> bool:
    value = reference_answer(reference)
    found = find_answer(reply, in_words=is_in_words(value))
    return found.source != "none" and compare(value, found.text).equal


def test_the_file_is_read_whole() -> None:
    text = REPLIES.read_text(encoding="utf-8")
    assert sum(len(references) for _, references in ALL) == sum(line[:2] in ("+ ", "- ") for line in text.splitlines())
    assert {right for _, references in ALL for _, right in references} == {True, False}
