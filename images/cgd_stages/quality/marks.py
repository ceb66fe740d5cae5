"""How good the rows are that a run learns from. Counts in, figures and words of caution out.

`Tally` counts over all rows. Right and wrong need a reference that ends on an answer and a grader: `grade_rows` looks
at the rows of an even sample that have one. A leak is told with its rate by chance, because a short number stands in
many texts.
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cgd_stages.contract import Contract
from cgd_stages.grading.compare import spell
from cgd_stages.grading.grader import Grader, reference_answer
from cgd_stages.quality.contamination import words_of
from cgd_stages.quality.near_duplicates import Signatures
from cgd_stages.results.formatting import percent
from cgd_stages.results.statistics import wilson
from cgd_stages.store.rows import Row

SAMPLED = 2000
"""Rows that are graded at most: with so many the interval of a share is at most 4.4 points wide."""
GROUPS = 5
"""Groups of near-duplicates that are shown."""
SHORT = 40
"""Characters of a reference that is an answer as a whole, though nothing marks it as one."""
TEXTS = ("prompt", "answer", "critique", "refinement")


class Share(Contract):
    """`count` of `n` rows, and the 95 % interval of the share; 0 of 0 says nothing."""

    count: int
    n: int
    share: float
    low: float
    high: float


class Lengths(Contract):
    """Tokens of a text over all rows."""

    low: int
    """A tenth of the rows has fewer."""
    median: int
    high: int
    """A tenth of the rows has more."""
    most: int


class Graded(Contract):
    """What a grader makes of the rows that have a reference with an answer. A text without an answer is wrong."""

    sampled: int
    """Rows that were looked at."""
    rows: int
    """Of these, the rows whose reference has an answer and whose draft and refinement could both be graded."""
    undecided: int
    """Rows left out, because the grader could not decide on the draft or on the refinement."""
    confusion: dict[str, dict[str, int]]
    """Verdict (right, wrong, missing) -> draft (right, wrong) -> rows."""
    drafts_right: Share
    refinements_right: Share
    broken: Share
    """Right drafts with a wrong refinement."""
    mended: Share
    """Wrong drafts with a right refinement."""
    verdicts_right: Share
    """Of the verdicts that were given."""
    constant: float
    """Share of right verdicts if every draft were called the same, whichever does better."""
    leaks: Share
    """Critiques that hold the reference's answer, of those whose draft does not hold it."""
    chance: Share
    """The same with the critique of another row."""


class Alike(Contract):
    """A group of prompts that nearly repeat each other, and two of them."""

    size: int
    examples: tuple[str, ...]


class Quality(Contract):
    rows: int
    missing: Share
    """Critiques without a verdict."""
    unchanged: Share
    """Refinements that are the student's answer, but for white space."""
    near_duplicates: Share
    """Prompts that nearly repeat another one, all but one of each group: see `alike`. Numbers, case and punctuation
    count for nothing."""
    alike: tuple[Alike, ...] = ()
    """The largest groups of such prompts."""
    lengths: dict[str, Lengths]
    graded: Graded | None = None
    """None when no row of the sample has a reference with an answer."""

    def metrics(self) -> dict[str, float]:
        """The figures that a limit can be set on: shares, and the rows that they are of; nothing without references."""
        if self.graded is None:
            return {}
        shares = {"drafts": self.graded.drafts_right, "refinements": self.graded.refinements_right}
        told = {f"right_{name}": round(one.share, 6) for name, one in shares.items()}
        return {**told, "right_verdicts": round(self.graded.verdicts_right.share, 6), "graded": float(self.graded.rows)}


@dataclass(frozen=True)
class Marks:
    """Whether a row's draft and its refinement are right; None where that is not known."""

    draft: bool | None = None
    refinement: bool | None = None


def share(count: int, n: int) -> Share:
    low, high = wilson(count, n)
    return Share(count=count, n=n, share=count / n if n else 0.0, low=low, high=high)


# --- over all rows -----------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts over all rows, one at a time; there remain 4 integers of a row, an id and half a kilobyte of a prompt."""

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
            self._signatures.add(row["id"], outline(row["prompt"]).split(" "))

    def quality(self, graded: Graded | None, prompts_of: Callable[[set[str]], dict[str, str]]) -> Quality:
        """`prompts_of` gives the prompts of some ids."""
        rows, groups = self.verdicts.total(), self._signatures.groups()
        largest = groups[:GROUPS]
        prompts = prompts_of({one for group in largest for one in group.pair})
        return Quality(
            rows=rows,
            missing=share(self.verdicts["missing"], rows),
            unchanged=share(self._unchanged, rows),
            near_duplicates=share(sum(len(group.ids) - 1 for group in groups), len(self._prompts)),
            alike=tuple(
                Alike(size=len(group.ids), examples=tuple(prompts[one] for one in group.pair)) for group in largest
            ),
            lengths={text: quantiles(lengths) for text, lengths in self._lengths.items()} if rows else {},
            graded=graded,
        )


def outline(prompt: str) -> str:
    """A prompt without numbers, case and punctuation. One of no words stands for itself."""
    return re.sub(r"\d+", "0", " ".join(words_of(prompt))) or prompt


def quantiles(values: Sequence[int]) -> Lengths:
    """Of at least one value."""
    ordered = sorted(values)
    low, median, high = (ordered[int(q * (len(ordered) - 1) + 0.5)] for q in (0.1, 0.5, 0.9))
    return Lengths(low=low, median=median, high=high, most=ordered[-1])


# --- over a sample with references ---------------------------------------------------------------------------------


def final_answer(reference: str) -> str | None:
    """The answer that a reference marks, or is as a whole; None for prose, which no grader compares."""
    told = reference_answer(reference)
    marked = told != reference.strip()
    return told if told and (marked or (len(told) <= SHORT and "\n" not in told)) else None


def grade_rows(rows: Sequence[Row], grader: Grader) -> tuple[Graded | None, list[Marks]]:
    """Figures of a sample, and the marks of each of its rows."""
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
    told = {draft: sum(confusion[verdict][draft] for verdict in ("right", "wrong")) for draft in ("right", "wrong")}
    given = sum(told.values())
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
        verdicts_right=share(confusion["right"]["right"] + confusion["wrong"]["wrong"], given),
        constant=max(told.values()) / given if given else 0.0,
        leaks=share(sum(leaked), len(leaked)),
        chance=share(sum(by_chance), len(by_chance)),
    )


def holds(text: str, answer: str) -> bool:
    """Whether an answer stands in a text, as a word of its own and in one of its spellings."""
    wanted = _plain(spell(answer))
    return bool(wanted) and re.search(rf"(?<![\w.]){re.escape(wanted)}(?!\w|[.,]\d)", _plain(text)) is not None


_SPACED = re.compile(r"\s*([=+*/^_,])\s*")
_DECORATION = re.compile(r"\\left|\\right|\\!|\\,|\\\$|\$|\*\*|(?<=\d),(?=\d{3}(?!\d))")


def _plain(text: str) -> str:
    text = _DECORATION.sub("", text.replace("\u2212", "-").replace("dfrac", "frac").replace("tfrac", "frac"))
    return _SPACED.sub(r"\1", " ".join(text.split())).casefold()


# --- in words ------------------------------------------------------------------------------------------------------


def cautions(quality: Quality) -> list[str]:
    """What is wrong with the rows, each in a sentence; nothing where nothing is."""
    found = []
    if quality.missing.share > 0.1:
        found.append(f"{percent(quality.missing.share)} of the critiques end without a verdict.")
    if quality.unchanged.share > 0.2:
        found.append(f"{percent(quality.unchanged.share)} of the refinements repeat the student's answer.")
    if quality.near_duplicates.share > 0.2:
        told = percent(quality.near_duplicates.share)
        found.append(f"{told} of the prompts nearly repeat another one.")
    if quality.graded:
        found += _graded_cautions(quality.graded)
    return found


def _graded_cautions(graded: Graded) -> list[str]:
    found = []
    verdicts, refinements, broken, leaks = graded.verdicts_right, graded.refinements_right, graded.broken, graded.leaks
    if verdicts.n and verdicts.share < 0.6:
        found.append(
            f"The verdict is right in only {percent(verdicts.share)} of {verdicts.n} drafts; calling all of them the "
            f"same would be in {percent(graded.constant)}."
        )
    if refinements.n and refinements.share < 0.7:
        wrong = percent(1 - refinements.share)
        found.append(f"{wrong} of {refinements.n} refinements are wrong: the student learns wrong answers from them.")
    if refinements.n and refinements.share < graded.drafts_right.share:
        before, after = percent(graded.drafts_right.share), percent(refinements.share)
        found.append(f"Refinements are right less often ({after}) than the drafts that they improve ({before}).")
    if broken.share > 0.1:
        found.append(f"{percent(broken.share)} of {broken.n} right drafts were broken by their refinement.")
    if leaks.share > 0.5:
        found.append(
            f"{percent(leaks.share)} of {leaks.n} critiques tell the reference's answer, which the draft does not have "
            f"(by chance: {percent(graded.chance.share)}): the student may learn to copy it."
        )
    return found
