"""Which prompts share words with a benchmark's questions: the overlap of n words in a row. Pure: texts in, texts out.

Words are runs of letters and digits, without case (in scripts that put no blanks between words, each character is a
word); punctuation, operators and blanks are no words. A question of fewer than n words is looked for as a whole. One of
fewer than `FEWEST` words says too little for that ("What is 2 + 3?" has four, "What is 2 - 3?" the same four): it is
matched only by a prompt that is the same text but for case and blanks.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from cgd_stages.store.rows import Row
from cgd_stages.text.normal import normalised

FEWEST = 5
"""Words of the shortest match inside a longer prompt."""

Words = tuple[str, ...]

_DENSE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_DENSE}]|[^\W_{_DENSE}]+")


@dataclass(frozen=True)
class Match:
    """The question of a benchmark that a prompt shares words with."""

    benchmark: str
    question: str
    """The question's id."""
    words: str

    def __str__(self) -> str:
        return f"shares words with the question {self.question} of {self.benchmark}: {self.words!r}"


def words_of(text: str) -> Words:
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


class Questions:
    """The questions of some benchmarks, to hold prompts against. `ngram` is at least `FEWEST`."""

    def __init__(self, questions: Iterable[Row], ngram: int) -> None:
        assert ngram >= FEWEST
        self._ngram = ngram
        self._questions: list[tuple[Row, Words]] = [(row, words_of(row["prompt"])) for row in questions]
        self._texts: dict[str, Row] = {}
        self._places: dict[Words, list[tuple[int, int]]] = {}
        for number, (row, words) in enumerate(self._questions):
            self._texts.setdefault(_text(row["prompt"]), row)
            # Every run that is long enough holds one of these places, so that the others need not be remembered.
            for place in range(0, len(words) - FEWEST + 1, self._needed(words) - FEWEST + 1):
                self._places.setdefault(words[place : place + FEWEST], []).append((number, place))

    def match(self, prompt: str) -> Match | None:
        """The first question that the prompt overlaps with, and all words in a row that they share there."""
        if (same := self._texts.get(_text(prompt))) is not None:
            return Match(same["benchmark"], same["id"], same["prompt"])
        words = words_of(prompt)
        heads = zip(*(words[start:] for start in range(FEWEST)), strict=False)
        for place, head in enumerate(heads):
            for number, there in self._places.get(head, ()):
                row, asked = self._questions[number]
                shared = _common_run(words, place, asked, there)
                if len(shared) >= self._needed(asked):
                    return Match(row["benchmark"], row["id"], " ".join(shared))
        return None

    def _needed(self, question: Words) -> int:
        """How many words in a row make a match with the question; at least `FEWEST`."""
        return max(FEWEST, min(self._ngram, len(question)))


def _common_run(one: Words, here: int, other: Words, there: int) -> Words:
    """The longest run of words that both have around a place where they agree."""
    before = _agreeing(reversed(one[:here]), reversed(other[:there]))
    after = _agreeing(one[here:], other[there:])
    return one[here - before : here + after]


def _agreeing(one: Iterable[str], other: Iterable[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _text(text: str) -> str:
    return normalised(text).casefold()
