"""Measures how good the rows are that a run learns from, and writes cautions about them.

`Tally` counts over all rows. `grade_rows` decides right and wrong for the rows of an even sample whose reference holds
an answer. Leaks are compared with their rate by chance, because many texts hold the same short number.
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cgd_stages.contract import Contract, Keep
from cgd_stages.grading.grader import Grader
from cgd_stages.grading.reference import marked_answer, reference_answer
from cgd_stages.grading.spelling import spell
from cgd_stages.quality.near_duplicates import Signatures, outline
from cgd_stages.results.formatting import percent
from cgd_stages.results.statistics import wilson
from cgd_stages.store.rows import Row
from cgd_stages.text.references import right_answers

SAMPLED = 2000
"""The most rows that are graded: with so many, the interval of a share is at most 4.4 points wide."""
GROUPS = 5
"""The most groups of near-duplicates that are shown."""
SHORT = 40
"""The most characters of a reference that counts as an answer although nothing marks one in it."""
TEXTS = ("prompt", "answer", "critique", "refinement")


class Share(Contract):
    """The share `count` of `n` rows and its 95 % interval, which is 0 to 1 if n is 0."""

    count: int
    n: int
    share: float
    low: float
    high: float


class Lengths(Contract):
    """The number of tokens of a text over all rows."""

    low: int
    """A tenth of the rows has fewer tokens."""
    median: int
    high: int
    """A tenth of the rows has more tokens."""
    most: int


class Graded(Contract):
    """The grades of the rows whose reference holds an answer. A text without an answer is wrong."""

    sampled: int
    """The rows in the sample."""
    rows: int
    """The rows whose reference holds an answer and whose draft and refinement were both graded."""
    undecided: int
    """The rows left out because the grader could not decide on the draft or the refinement."""
    confusion: dict[str, dict[str, int]]
    """Verdict (right, wrong, missing) -> draft (right, wrong) -> rows."""
    drafts_right: Share
    refinements_right: Share
    broken: Share
    """Right drafts with a wrong refinement."""
    mended: Share
    """Wrong drafts with a right refinement."""
    verdicts_right: Share
    """Of the critiques with a verdict."""
    constant: float
    """The share of right verdicts if every draft got the same verdict, whichever is better."""
    leaks: Share
    """Critiques that hold the reference's answer, of the rows whose draft does not hold it."""
    chance: Share
    """The same, with the critique of another row."""


class Alike(Contract):
    """The size of a group of prompts that nearly repeat each other, and two of them."""

    size: int
    examples: tuple[str, ...]


class Quality(Contract):
    rows: int
    missing: Share
    """Critiques without a verdict."""
    unchanged: Share
    """Refinements that repeat the student's answer, apart from white space."""
    near_duplicates: Share
    """Prompts that nearly repeat another one, apart from numbers, case and punctuation; one of each group is not
    counted."""
    alike: tuple[Alike, ...] = ()
    """The largest groups of such prompts."""
    lengths: dict[str, Lengths]
    graded: Graded | None = None
    """None if no reference in the sample holds an answer."""
    keep: Keep = "all"
    """Which of these rows are learned."""

    def metrics(self) -> dict[str, float]:
        """The shares that a limit can be set on, and the number of graded rows; empty without references."""
        if self.graded is None:
            return {}
        return {
            "right_drafts": round(self.graded.drafts_right.share, 6),
            "right_refinements": round(self.graded.refinements_right.share, 6),
            "right_verdicts": round(self.graded.verdicts_right.share, 6),
            "graded": float(self.graded.rows),
        }


@dataclass(frozen=True)
class Marks:
    """Whether a row's draft and its refinement are right; None if that is not known."""

    draft: bool | None = None
    refinement: bool | None = None


def share(count: int, n: int) -> Share:
    low, high = wilson(count, n)
    return Share(count=count, n=n, share=count / n if n else 0.0, low=low, high=high)


# --- over all rows -----------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts over all rows, one at a time. It keeps 4 integers for each row, and an id and half a kilobyte for each
    prompt."""

    verdicts: Counter[str] = field(default_factory=Counter)
    _unchanged: int = 0
    _prompts: set[str] = field(default_factory=set)
    _signatures: Signatures = field(default_factory=Signatures)
    _lengths: dict[str, "array[int]"] = field(default_factory=lambda: {text: array("I") for text in TEXTS})

    def add(self, row: Row) -> None:
        self.verdicts[row["verdict"] or "missing"] += 1
        self._unchanged += row["answer"].split() == row["refinement"].split()
        for text, lengths in self._lengths.items():
            lengths.append(row[f"{text}_tokens"] or 0)
        if row["id"] not in self._prompts:
            self._prompts.add(row["id"])
            self._signatures.add(row["id"], outline(row))

    def quality(self, graded: Graded | None, prompts_of: Callable[[set[str]], dict[str, str]]) -> Quality:
        """`prompts_of` returns the prompts of some ids."""
        rows, groups = self.verdicts.total(), self._signatures.groups()
        largest = groups[:GROUPS]
        prompts = prompts_of({identity for group in largest for identity in group.pair})
        alike = (Alike(size=len(group.ids), examples=tuple(prompts[i] for i in group.pair)) for group in largest)
        return Quality(
            rows=rows,
            missing=share(self.verdicts["missing"], rows),
            unchanged=share(self._unchanged, rows),
            near_duplicates=share(sum(len(group.ids) - 1 for group in groups), len(self._prompts)),
            alike=tuple(alike),
            lengths={text: quantiles(lengths) for text, lengths in self._lengths.items()} if rows else {},
            graded=graded,
        )


def quantiles(values: Sequence[int]) -> Lengths:
    """The quantiles of at least one value."""
    ordered = sorted(values)
    low, median, high = (ordered[int(q * (len(ordered) - 1) + 0.5)] for q in (0.1, 0.5, 0.9))
    return Lengths(low=low, median=median, high=high, most=ordered[-1])


# --- over a sample with references ---------------------------------------------------------------------------------


def final_answer(reference: str) -> str | None:
    """The answer that a reference marks, or the whole reference without its thought if that is short; None for prose,
    which cannot be graded. Of several right answers it is the first."""
    reference = right_answers(reference)[0]
    answer = reference_answer(reference)
    short = len(answer) <= SHORT and "\n" not in answer
    return answer if answer and (short or marked_answer(reference)) else None


def grade_rows(rows: Sequence[Row], grader: Grader) -> tuple[Graded | None, list[Marks]]:
    """The figures of a sample, and the marks of each of its rows."""
    usable = [index for index, row in enumerate(rows) if final_answer(row.get("reference") or "") is not None]
    marks = [Marks()] * len(rows)
    texts = [(rows[i]["reference"], rows[i][text]) for i in usable for text in ("answer", "refinement")]
    grades = [None if grade.grade_error else grade.correct for grade in grader.grade_all(texts)]
    for place, index in enumerate(usable):
        marks[index] = Marks(*grades[2 * place : 2 * place + 2])
    return (_graded(rows, marks, usable) if usable else None), marks


def _graded(rows: Sequence[Row], marks: Sequence[Marks], usable: Sequence[int]) -> Graded:
    decided = [i for i in usable if marks[i].draft is not None and marks[i].refinement is not None]
    confusion = {verdict: {"right": 0, "wrong": 0} for verdict in ("right", "wrong", "missing")}
    for i in decided:
        confusion[rows[i]["verdict"] or "missing"]["right" if marks[i].draft else "wrong"] += 1
    pairs = Counter((marks[i].draft, marks[i].refinement) for i in decided)
    right, wrong = (pairs[draft, True] + pairs[draft, False] for draft in (True, False))
    drafts = [sum(confusion[verdict][draft] for verdict in ("right", "wrong")) for draft in ("right", "wrong")]
    verdicts = sum(drafts)
    leaked, by_chance = [], []
    for i, other in zip(usable, [*usable[1:], *usable[:1]], strict=True):
        answer = final_answer(rows[i]["reference"]) or ""
        if not holds(rows[i]["answer"], answer):
            leaked.append(holds(rows[i]["critique"], answer))
            if other != i:
                by_chance.append(holds(rows[other]["critique"], answer))
    return Graded(
        sampled=len(rows),
        rows=len(decided),
        undecided=len(usable) - len(decided),
        confusion=confusion,
        drafts_right=share(right, len(decided)),
        refinements_right=share(pairs[True, True] + pairs[False, True], len(decided)),
        broken=share(pairs[True, False], right),
        mended=share(pairs[False, True], wrong),
        verdicts_right=share(confusion["right"]["right"] + confusion["wrong"]["wrong"], verdicts),
        constant=max(drafts) / verdicts if verdicts else 0.0,
        leaks=share(sum(leaked), len(leaked)),
        chance=share(sum(by_chance), len(by_chance)),
    )


def holds(text: str, answer: str) -> bool:
    """Whether a text holds an answer as separate words, in any of its spellings. A value under another sign (-5), or a
    bound (x > 5), is another answer."""
    plain_answer = _plain(spell(answer))
    before, after = (r"(?<![\w.])", r"(?!\w|[.,]\d)") if _WORDS.match(plain_answer) else (_BEFORE, _AFTER)
    return bool(plain_answer) and re.search(before + re.escape(plain_answer) + after, _plain(text)) is not None


_WORDS = re.compile(r"[^\W\d_]{2}")
_BEFORE = r"(?<![\w.<>])(?<![<>]=)(?<!(?<![\w)\]}])[-\u00b1])"
"""A minus sign with nothing before it that it could be taken from is the value's own."""
_AFTER = r"(?!\w|[.,]\d|[<>])"
_RELATIONS = {r"\u2264|\\leq?(?:slant)?(?![A-Za-z])": "<=", r"\u2265|\\geq?(?:slant)?(?![A-Za-z])": ">="}
_SPACED = re.compile(r"\s*([=+*/^_,]|[<>]=?)\s*")
_DECORATION = re.compile(r"\\left|\\right|\\!|\\,|\\\$|\$|\*\*|(?<=\d),(?=\d{3}(?!\d))")


def _plain(text: str) -> str:
    for pattern, sign in _RELATIONS.items():
        text = re.sub(pattern, sign, text)
    text = _DECORATION.sub("", text.replace("\u2212", "-").replace("dfrac", "frac").replace("tfrac", "frac"))
    return _SPACED.sub(r"\1", " ".join(text.split())).casefold()


# --- in words ------------------------------------------------------------------------------------------------------


def cautions(quality: Quality) -> list[str]:
    """One sentence for each fault of the rows."""
    sentences = []
    if quality.missing.share > 0.1:
        sentences.append(f"{percent(quality.missing.share)} of the critiques end without a verdict.")
    if quality.unchanged.share > 0.2:
        sentences.append(f"{percent(quality.unchanged.share)} of the refinements repeat the student's answer.")
    if quality.near_duplicates.share > 0.2:
        sentences.append(f"{percent(quality.near_duplicates.share)} of the prompts nearly repeat another one.")
    if (graded := quality.graded) is None:
        return sentences
    verdicts, refinements, broken, leaks = graded.verdicts_right, graded.refinements_right, graded.broken, graded.leaks
    if verdicts.n and verdicts.share < 0.6:
        right, constant = percent(verdicts.share), percent(graded.constant)
        sentences.append(
            f"The verdict is right for only {right} of {verdicts.n} drafts; one verdict for all of them would be right "
            f"for {constant}."
        )
    if refinements.n and refinements.share < 0.7:
        wrong = percent(1 - refinements.share)
        learned = ", and the student learns wrong answers" if quality.keep == "all" else ""
        sentences.append(f"{wrong} of {refinements.n} refinements are wrong{learned}.")
    if refinements.n and refinements.share < graded.drafts_right.share:
        before, after = percent(graded.drafts_right.share), percent(refinements.share)
        sentences.append(f"Refinements are right less often ({after}) than the drafts that they improve ({before}).")
    if broken.share > 0.1:
        sentences.append(f"{percent(broken.share)} of {broken.n} right drafts have a wrong refinement.")
    if leaks.share > 0.5:
        sentences.append(
            f"{percent(leaks.share)} of {leaks.n} critiques state the reference's answer, which the draft does not "
            f"have (by chance: {percent(graded.chance.share)}): the student may learn to copy it."
        )
    return sentences
