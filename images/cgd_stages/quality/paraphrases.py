"""Finds the texts that say much of a benchmark's question, or of its reference, in other words. Pure: texts in, values
out.

A text paraphrases a question when it has at least the share `similarity` of the question's word triples. The share is
of the question alone, so a question inside a longer text is found as well. It is exact: an inverted index of the
questions' rarest triples leads to every question that a text may share enough with (the prefix filter of Chaudhuri,
Ganti and Kaushik, 2006), and the triples of these are compared. MinHash, as in `near_duplicates`, estimates the share
of both texts, which a longer text lowers.

Numbers are words here: a question with other numbers is a paraphrase as far as its other words say so. Three numbers
in a row count for nothing: many solutions calculate 4 * 2 = 8. In scripts without blanks a word is a character
(Chinese, Japanese) or four in a row (Thai, Lao, Khmer, Burmese, Tibetan).
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import pyarrow as pa

from cgd_stages.quality.contamination import words_of
from cgd_stages.results.formatting import percent
from cgd_stages.store.rows import Row

FEWEST = 10
"""A question of fewer words is not looked for; two characters of a script without blanks count as one word."""
FOUND = "paraphrases-"
"""How the name of a part with the questions that were found begins."""
_FOUND: list[tuple[str, Any]] = [
    ("benchmark", pa.string()),
    ("question", pa.string()),
    ("rows", pa.int64()),
    ("id", pa.string()),
    ("sample", pa.int32()),
    ("text", pa.string()),
    ("similarity", pa.float64()),
]
FOUND_SCHEMA = pa.schema(_FOUND)
"""A question that training texts paraphrase: its benchmark and id, how many rows do so, and the closest text: its row's
id and sample, its column (prompt, reference or refinement) and its share of the question's triples."""

Triples = frozenset[tuple[str, ...]]

_CHARACTERS = 4
"""The characters in a row that are a word in a script with letters and without blanks."""
_UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"
_RUN = re.compile(rf"[{_UNSPACED}]+|[^{_UNSPACED}]+")
_IDEOGRAPH = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class Paraphrase:
    """A question that a text paraphrases, or (`part` is reference) whose reference it does."""

    benchmark: str
    question: str
    """The question's id."""
    part: str
    similarity: float

    def __str__(self) -> str:
        whose = "" if self.part == "question" else f"{self.part} of the "
        return (
            f"{percent(self.similarity)} of the word triples of the {whose}question {self.question} of {self.benchmark}"
        )


class Originals:
    """The questions of some benchmarks with their references, which texts are compared with."""

    def __init__(self, questions: Iterable[Row], similarity: float) -> None:
        self._originals: list[tuple[Row, str, Triples, int]] = []
        """A question or a reference, its triples, and how many of these make a paraphrase."""
        for row in questions:
            for part, text in (("question", row["prompt"]), ("reference", row.get("reference") or "")):
                triples, words = _triples(text)
                if words >= FEWEST and len(triples) >= FEWEST - 2:
                    self._originals.append((row, part, triples, max(1, math.ceil(similarity * len(triples) - 1e-9))))
        common = Counter(triple for _, _, triples, _ in self._originals for triple in triples)
        self._places: dict[tuple[str, ...], list[int]] = {}
        for number, (_, _, triples, needed) in enumerate(self._originals):
            # Whoever has `needed` of all has one of any `all - needed + 1`: the rarest lead to the fewest questions.
            rarest = sorted(triples, key=lambda triple: (common[triple], triple))
            for triple in rarest[: len(triples) - needed + 1]:
                self._places.setdefault(triple, []).append(number)

    def paraphrased(self, text: str) -> list[Paraphrase]:
        """The questions that the text paraphrases, each once, the closest first."""
        triples, _ = _triples(text)
        closest: dict[tuple[str, str], Paraphrase] = {}
        for number in {number for triple in triples & self._places.keys() for number in self._places[triple]}:
            row, part, original, needed = self._originals[number]
            if (shared := len(original & triples)) >= needed:
                found = Paraphrase(row["benchmark"], row["id"], part, shared / len(original))
                key = found.benchmark, found.question
                closest[key] = min(found, closest.get(key, found), key=_order)
        return sorted(closest.values(), key=_order)


@dataclass
class Findings:
    """The questions that the texts of some rows paraphrase."""

    originals: Originals
    rows: int = 0
    """Rows of which some text paraphrases a question."""
    _questions: dict[tuple[str, str], Row] = field(default_factory=dict)

    def add(self, row: Row, texts: Mapping[str, str | None]) -> str:
        """Compare the texts of a row, by column. Returns the closest match in words; empty if there is none."""
        found = [
            (match, column) for column, text in texts.items() if text for match in self.originals.paraphrased(text)
        ]
        found.sort(key=lambda pair: _order(pair[0]))
        self.rows += bool(found)
        met = set()
        for match, column in found:
            if (key := (match.benchmark, match.question)) in met:
                continue
            met.add(key)
            entry = self._questions.get(key, {"rows": 0, "similarity": 0.0})
            closest = {"id": row["id"], "sample": row["sample"], "text": column, "similarity": match.similarity}
            if _closeness(entry) < _closeness(closest):
                entry |= closest
            self._questions[key] = entry | {"benchmark": key[0], "question": key[1], "rows": entry["rows"] + 1}
        return f"the {found[0][1]} has {found[0][0]}" if found else ""

    @property
    def metrics(self) -> dict[str, float]:
        return {"paraphrased": float(self.rows), "paraphrased_questions": float(len(self._questions))}

    def questions(self) -> list[Row]:
        """In the columns of `FOUND_SCHEMA`, sorted."""
        return sorted(self._questions.values(), key=itemgetter("benchmark", "question"))


def _closeness(entry: Row) -> tuple[float, str, int]:
    """What decides which row is named: it does not depend on the order of the rows."""
    return entry["similarity"], entry.get("id", ""), -entry.get("sample", 0)


def _order(found: Paraphrase) -> tuple[float, str, str, str]:
    return -found.similarity, found.benchmark, found.question, found.part


def _triples(text: str) -> tuple[Triples, float]:
    """The triples of a text's words, and the number of its words as `FEWEST` counts them."""
    words: list[str] = []
    count = 0.0
    for run in _RUN.findall(unicodedata.normalize("NFKC", text).casefold()):
        if "\u0e00" <= run[0] <= "\u109f" or "\u1780" <= run[0] <= "\u17ff":
            words += [run[start : start + _CHARACTERS] for start in range(max(1, len(run) - _CHARACTERS + 1))]
            count += len(run) / 2
        else:
            plain = words_of(run)
            words += plain
            count += len(plain) - len(_IDEOGRAPH.findall(run)) / 2
    triples = zip(words, words[1:], words[2:], strict=False)
    return frozenset(triple for triple in triples if not "".join(triple).isdigit()), count
