"""Finds the prompts that share n words in a row with a benchmark's question. Pure: texts in, texts out.

A word is a run of letters and digits, without case; in scripts without blanks between words, each character is a word.
Punctuation and operators are no words. A question with fewer than n words matches as a whole. A question with fewer
than `FEWEST` words ("What is 2 + 3?" and "What is 2 - 3?" have the same four) matches only a prompt with the same text,
apart from case and blanks.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from cgd_stages.store.rows import Row
from cgd_stages.text.normal import normalised

FEWEST = 5
"""The words of the shortest match inside a longer prompt."""

Words = tuple[str, ...]

_DENSE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_DENSE}]|[^\W_{_DENSE}]+")


@dataclass(frozen=True)
class Match:
    """A question that shares `words` with a prompt."""

    benchmark: str
    question: str
    """The question's id."""
    words: str

    def __str__(self) -> str:
        return f"shares words with the question {self.question} of {self.benchmark}: {self.words!r}"


def words_of(text: str) -> Words:
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


class Questions:
    """The questions of some benchmarks, which prompts are compared with. `ngram` is at least `FEWEST`."""

    def __init__(self, questions: Iterable[Row], ngram: int) -> None:
        assert ngram >= FEWEST
        self._ngram = ngram
        self._questions: list[tuple[Row, Words]] = [(row, words_of(row["prompt"])) for row in questions]
        self._texts: dict[str, Row] = {}
        self._places: dict[Words, list[tuple[int, int]]] = {}
        for number, (row, words) in enumerate(self._questions):
            self._texts.setdefault(_text(row["prompt"]), row)
            # Every run that is long enough covers one of these places, so the index needs no others.
            for place in range(0, len(words) - FEWEST + 1, self._needed(words) - FEWEST + 1):
                self._places.setdefault(words[place : place + FEWEST], []).append((number, place))

    def match(self, prompt: str) -> Match | None:
        """The first question that the prompt copies, and the longest run of words that both have there."""
        if (row := self._texts.get(_text(prompt))) is not None:
            return Match(row["benchmark"], row["id"], row["prompt"])
        words = words_of(prompt)
        heads = zip(*(words[start:] for start in range(FEWEST)), strict=False)
        for place, head in enumerate(heads):
            for number, question_place in self._places.get(head, ()):
                row, question = self._questions[number]
                before = _equal_words(reversed(words[:place]), reversed(question[:question_place]))
                after = _equal_words(words[place:], question[question_place:])
                if before + after >= self._needed(question):
                    return Match(row["benchmark"], row["id"], " ".join(words[place - before : place + after]))
        return None

    def _needed(self, question: Words) -> int:
        """The fewest words in a row that make a match with the question; at least `FEWEST`."""
        return max(FEWEST, min(self._ngram, len(question)))


def _equal_words(words: Iterable[str], others: Iterable[str]) -> int:
    """The number of words at the start of both that are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(words, others, strict=False)))


def _text(text: str) -> str:
    return normalised(text).casefold()
