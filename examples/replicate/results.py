"""What the exams say: shares, intervals, differences and p-values, and the page that shows them. Pure: marks in."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from replicate.arithmetic import read_question, stated
from replicate.study import ASKED, BASE

Z = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Mark:
    """One output of one model."""

    question: str
    output: str
    tokens: int
    ended: bool
    """False: cut by the limit."""

    @property
    def right(self) -> bool:
        """The last line states the result, in whichever of the endings."""
        return stated(self.output)[1] == read_question(self.question).result

    @property
    def kept_form(self) -> bool:
        """The last line is as the question asks for it, whatever the number."""
        return stated(self.output)[0] == read_question(self.question).ending

    @property
    def new_form(self) -> bool:
        """The question asks for an ending that the fine-tuning never showed."""
        return read_question(self.question).ending not in ASKED


Exams = Mapping[str, Sequence[Sequence[Mark]]]
"""Label of a model -> its exams, one a seed (the base has one), each with the same questions in the same order."""


@dataclass(frozen=True)
class Share:
    """A mean over questions, with its 95 % interval."""

    mean: float
    low: float
    high: float


def read_marks(path: Path) -> list[Mark]:
    return [Mark(**json.loads(line)) for line in path.read_text().splitlines()]


def share(values: Sequence[float]) -> Share:
    """The mean of one value a question, and its interval by the central limit theorem."""
    mean = statistics.fmean(values)
    half = Z * statistics.stdev(values) / math.sqrt(len(values))
    return Share(mean, mean - half, mean + half)


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value that the mean of a value a question is 0: a z-test, for hundreds of questions."""
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.fmean(differences)
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * (1 - statistics.NormalDist().cdf(abs(mean) / spread))


def by_question(exams: Sequence[Sequence[Mark]], name: str) -> list[float]:
    """For each question, the mean over seeds of a property of its marks."""
    return [statistics.fmean(getattr(mark, name) for mark in marks) for marks in zip(*exams, strict=True)]


def figures(exams: Exams, *, against: str = "CGD") -> list[dict[str, Any]]:
    """A row for each model: accuracy, form kept, length, and what `against` is better by. Shares are fractions of 1."""
    judge = by_question(exams[against], "right")
    rows = []
    for label, taken in exams.items():
        right, new = by_question(taken, "right"), [mark.new_form for mark in taken[0]]
        kept = by_question(taken, "kept_form")
        gain = [ours - theirs for ours, theirs in zip(judge, right, strict=True)]
        rows.append(
            {
                "label": label,
                "accuracy": share(right).__dict__,
                "seeds": [statistics.fmean(mark.right for mark in marks) for marks in taken],
                "form_seen": share([one for one, is_new in zip(kept, new, strict=True) if not is_new]).__dict__,
                "form_new": share([one for one, is_new in zip(kept, new, strict=True) if is_new]).__dict__,
                "tokens": statistics.fmean(by_question(taken, "tokens")),
                "cut": sum(not mark.ended for marks in taken for mark in marks),
                "gain": None if label == against else {**share(gain).__dict__, "p": paired_p(gain)},
            }
        )
    return rows


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The result in words; nothing is said to differ that may be chance."""
    by_label = {row["label"]: row for row in rows}
    base, ours = by_label[BASE]["accuracy"]["mean"], by_label["CGD"]["accuracy"]["mean"]
    told = [f"The base model solves {base:.1%}, CGD {ours:.1%} (mean of the seeds)."]
    for label, row in by_label.items():
        if row["gain"] is None or label == BASE:
            continue
        gain, p = row["gain"]["mean"], row["gain"]["p"]
        if p >= 0.05:
            told.append(f"CGD and {label} may be alike: {gain * 100:+.1f} points, {spoken(p)}.")
        else:
            word = "better" if gain > 0 else "worse"
            told.append(f"CGD is {word} than {label}: {gain * 100:+.1f} points, {spoken(p)}.")
    return told


def spoken(p: float) -> str:
    """A p-value in words: none is ever 0."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def write_page(target: Path, found: Mapping[str, Any]) -> None:
    """`found` is what results.json holds."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["spoken"] = spoken
    target.write_text(environment.get_template("page.html.j2").render(found))
