"""What the exams say: whether they say anything at all, and then shares, intervals and exact tests. Pure: marks in.

Intervals and tests are those of the product's report (`cgd_stages.results.statistics`), over questions: a question
counts with the mean over the seeds.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cgd_stages.report.summary import KNOWN
from cgd_stages.results import statistics as tests
from cgd_stages.training.job import VALIDATION_LOSS
from replicate.outcome import Mark, Outcome, Rows, bare_loss
from replicate.study import ARMS, BASE, MORE_ARMS, Arm, report_file

JUDGE = "cgd"
"""The arm that is compared with every other."""
RIVAL = "refinedsft"
"""The arm that learns the same targets, from the prompt alone."""
FITTING = 0.5
"""The least share of right targets."""
BASE_FROM, BASE_TO = 0.02, 0.40
BEST = 0.90
LEVEL = 0.05


@dataclass(frozen=True)
class Gate:
    """Something without which the study says nothing of the method."""

    name: str
    wanted: str
    found: tuple[str, ...]
    """One a seed."""
    passed: bool


def fits(rows: Rows) -> bool:
    """Whether the targets belong to their questions."""
    return min(rows.refinements, rows.distilled) >= FITTING


def gates(outcomes: Sequence[Outcome]) -> list[Gate]:
    """All gates; each has to hold for every seed."""
    targets = [min(one.rows.refinements, one.rows.distilled) for one in outcomes]
    bases = [right(one.exam[BASE]) for one in outcomes]
    bests = [max(right(marks) for name, marks in one.exam.items() if name != BASE) for one in outcomes]
    losses = [one.trainings.first_loss(JUDGE) for one in outcomes]
    return [
        Gate("targets do not fit", f"at least {FITTING:.0%} of the targets are right", percent(targets),
             min(targets) >= FITTING),
        Gate("the base solves too few or too many", f"the base solves {BASE_FROM:.0%} to {BASE_TO:.0%}", percent(bases),
             min(bases) >= BASE_FROM and max(bases) <= BASE_TO),
        Gate("the best model solves nearly all", f"the best model solves at most {BEST:.0%}", percent(bests),
             max(bests) <= BEST),
        Gate("the untrained student needs no training in CGD's context",
             f"its loss in CGD's context is at least {KNOWN} nats a token", tuple(f"{loss:.2f}" for loss in losses),
             min(losses) >= KNOWN),
    ]  # fmt: skip


def percent(shares: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"{share:.1%}" for share in shares)


def right(marks: Sequence[Mark]) -> float:
    return statistics.fmean(mark.right for mark in marks)


def figures(outcomes: Sequence[Outcome], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """A row for base and each arm: accuracy, forms kept, length, and what CGD is better by. Shares are fractions of
    1."""
    names = {BASE: BASE} | {arm.name: arm.label for arm in arms}
    solved = {name: by_question([one.exam[name] for one in outcomes], "right") for name in names}
    compared = against(solved, len(outcomes))
    rows = []
    for name, label in names.items():
        taken = [one.exam[name] for one in outcomes]
        new = [mark.new_form for mark in taken[0]]
        kept = by_question(taken, "kept_form")
        rows.append(
            {
                "label": label,
                "accuracy": share(solved[name]),
                "seeds": [right(marks) for marks in taken],
                "right_seen": share(part(solved[name], new, wanted=False)),
                "right_new": share(part(solved[name], new, wanted=True)),
                "form_seen": share(part(kept, new, wanted=False)),
                "form_new": share(part(kept, new, wanted=True)),
                "tokens": statistics.fmean(by_question(taken, "tokens")),
                "cut": sum(not mark.ended for marks in taken for mark in marks),
                "rates": [one.trainings.chosen[name] for one in outcomes] if name != BASE else [],
                "gain": compared.get(name),
            }
        )
    return rows


def several(outcomes: Sequence[Outcome], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """A row for each model that answers several times: the share of right outputs, the share of questions with one at
    least (Pass@k for as many outputs as there are), and what CGD's is better by."""
    names = {BASE: BASE} | {arm.name: arm.label for arm in arms if arm.name in outcomes[0].several}
    groups = {name: [grouped(one.several[name]) for one in outcomes] for name in names}
    each = {name: mean_of([[right(group) for group in taken] for taken in of]) for name, of in groups.items()}
    one = {
        name: mean_of([[float(any(mark.right for mark in group)) for group in taken] for taken in of])
        for name, of in groups.items()
    }
    compared = against(one, len(outcomes))
    return [
        {"label": label, "each": share(each[name]), "one": share(one[name]), "gain": compared.get(name)}
        for name, label in names.items()
    ]


def grouped(marks: Sequence[Mark]) -> list[list[Mark]]:
    """The outputs of each question, which follow each other."""
    return [list(group) for _, group in itertools.groupby(marks, key=lambda mark: mark.question)]


def by_question(taken: Sequence[Sequence[Mark]], name: str) -> list[float]:
    """For each question, the mean over seeds of a property of its output."""
    return mean_of([[float(getattr(mark, name)) for mark in marks] for marks in taken])


def mean_of(seeds: Sequence[Sequence[float]]) -> list[float]:
    """The mean over seeds of a value for each question."""
    return [statistics.fmean(values) for values in zip(*seeds, strict=True)]


def part(values: Sequence[float], chosen: Sequence[bool], *, wanted: bool) -> list[float]:
    return [value for value, chose in zip(values, chosen, strict=True) if chose is wanted]


def share(values: Sequence[float]) -> dict[str, float]:
    """The mean of a value for each question, with its 95 % interval: Wilson's for one seed, as in the product's report
    for one output; for the means of several seeds by resampling questions."""
    single = set(values) <= {0.0, 1.0}
    low, high = tests.wilson(sum(values), len(values)) if single else tests.share_interval(values)
    return {"mean": statistics.fmean(values), "low": low, "high": high}


def against(values: Mapping[str, Sequence[float]], unit: int) -> dict[str, dict[str, Any]]:
    """What the judge is better by than each other model: mean, 95 % interval, exact p-value of the test over all flips
    of the questions' signs, that p-value corrected for the number of models (Holm), and the smallest difference that
    would have `shown` (None: none). `unit` times a question's value is a whole number."""
    gaps = {
        name: [round(ours - theirs, 12) for ours, theirs in zip(values[JUDGE], of, strict=True)]
        for name, of in values.items()
        if name != JUDGE
    }
    found = [tests.mean_flip(np.array(gap), unit)[0] for gap in gaps.values()]
    holm = tests.holm(found)
    level = LEVEL / max(1, sum(p >= LEVEL for p in holm))
    compared = {}
    for (name, gap), p, corrected in zip(gaps.items(), found, holm, strict=True):
        low, high = _difference_interval(gap)
        single = set(gap) <= {-1.0, 0.0, 1.0}
        changed = sum(value != 0 for value in gap) / len(gap)
        shown = (
            tests.detectable(len(gap), changed, level) if single else tests.detectable_mean(len(gap), low, high, level)
        )
        compared[name] = {
            "mean": statistics.fmean(gap),
            "low": low,
            "high": high,
            "p": p,
            "corrected": corrected,
            "n": len(gap),
            "shown": shown,
        }
    return compared


def sentences(rows: Sequence[Mapping[str, Any]], found: Sequence[Gate]) -> list[str]:
    """The result in words; nothing is said to differ that may be chance, and nothing at all where a gate is shut."""
    if shut := [gate for gate in found if not gate.passed]:
        return [f"not informative: {gate.name} ({', '.join(gate.found)}; wanted: {gate.wanted})" for gate in shut]
    by_label = {row["label"]: row for row in rows}
    base, ours = by_label[BASE]["accuracy"]["mean"], by_label["CGD"]["accuracy"]["mean"]
    told = [f"The base solves {base:.1%}, CGD {ours:.1%}."]
    for label, row in by_label.items():
        if row["gain"] is None:
            continue
        gain, p = row["gain"]["mean"], row["gain"]["corrected"]
        if p >= LEVEL:
            told.append(
                f"CGD and {label} cannot be told apart with {row['gain']['n']} questions: {gain * 100:+.1f} points, "
                f"{spoken(p)}; {_would_have_shown(row['gain']['shown'])}."
            )
        else:
            word = "better" if gain > 0 else "worse"
            told.append(f"CGD is {word} than {label}: {gain * 100:+.1f} points, {spoken(p)}.")
    return told


def _would_have_shown(difference: float | None) -> str:
    if difference is None:
        return "no difference could have shown with so few"
    return f"a difference of {100 * difference:.1f} points would have shown in 80 % of cases"


def _difference_interval(gap: Sequence[float]) -> tests.Interval:
    """As `share`: Bonett and Price's for one seed."""
    if set(gap) <= {-1.0, 0.0, 1.0}:
        return tests.paired_interval(gap.count(1.0), gap.count(-1.0), len(gap))
    return tests.difference_interval(gap)


def reasons(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What may explain the result, a figure for each seed: `what` is measured, `found`, and what it `means`."""
    made = [one.trainings for one in outcomes]
    learned = [(one.last(JUDGE)[VALIDATION_LOSS], bare_loss(one.last(JUDGE))) for one in made]
    rows = [one.rows for one in outcomes]
    return [
        {
            "what": "loss of the untrained student on the refinements of the first batch: in CGD's context, on the "
            "prompt alone",
            "found": [f"{one.first_loss(JUDGE):.2f}, {one.first_loss(RIVAL):.2f}" for one in made],
            "means": "what draft and critique already tell the student. The more they tell, the less CGD has to learn, "
            "and the less of it is about the prompt.",
        },
        {
            "what": "loss of CGD on held-out refinements, trained: in its context, on the prompt alone",
            "found": [f"{inside:.2f}, {outside:.2f}" for inside, outside in learned],
            "means": "the distance between the two is what was learned for a context that the exam does not give.",
        },
        {
            "what": "loss of RefinedSFT on the same, trained on the prompt alone",
            "found": [f"{bare_loss(one.last(RIVAL)):.2f}" for one in made],
            "means": "what these refinements can teach where they are asked for.",
        },
        {
            "what": "right drafts; right refinements; the tutor's own right answers",
            "found": ["; ".join(percent((one.drafts, one.refinements, one.distilled))) for one in rows],
            "means": "how many drafts a critique can mend, and how good the targets are, of CGD and RefinedSFT, and of "
            "DistilledSFT.",
        },
        {
            "what": "right verdicts; what one verdict for every draft would reach",
            "found": ["; ".join(percent((one.verdicts, max(one.drafts, 1 - one.drafts)))) for one in rows],
            "means": "how far a critique can be trusted. Near the second figure, a verdict says little of its draft.",
        },
    ]


def spoken(p: float) -> str:
    """A p-value in words: none is ever 0."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def chapter(outcomes: Sequence[Outcome], folder: Path) -> dict[str, Any]:
    """Everything that the page says of one size. `folder`: where the page and, for seeds of this machine, the reports
    of their runs are."""
    arms = [arm for arm in (*ARMS, *MORE_ARMS) if arm.name in outcomes[0].made.arms]
    rows, found = figures(outcomes, arms), gates(outcomes)
    name, example = JUDGE, outcomes[0].exam
    at = next((place for place, mark in enumerate(example[BASE]) if not mark.right), 0)
    return {
        "title": outcomes[0].made.size,
        "seeds": [one.made.seed for one in outcomes],
        "machines": [asdict(one.machine) for one in outcomes],
        "gates": [asdict(gate) for gate in found],
        "said": sentences(rows, found),
        "reasons": reasons(outcomes),
        "rows": rows,
        "several": several(outcomes, arms),
        "samples": len(grouped(outcomes[0].several[name])[0]),
        "made": [asdict(one.rows) for one in outcomes],
        "losses": {arm.label: [one.trainings.losses[arm.name] for one in outcomes] for arm in arms},
        "example": {
            "question": example[BASE][at].question,
            "outputs": {row["label"]: marks[at].output for row, marks in zip(rows, example.values(), strict=True)},
        },
        "reports": {
            one.made.seed: {
                run: file for run in ("exam", "several") if (folder / (file := report_file(one.made, run))).exists()
            }
            for one in outcomes
        },
    }


def markdown(chapter: Mapping[str, Any]) -> str:
    """The result in words, and the exam's table, for a Markdown document."""
    seeds = chapter["seeds"]
    lines = [f"**{chapter['title']}**, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}:", ""]
    lines += [f"- {one}" for one in chapter["said"]]
    if len(seeds) == 1:
        lines.append(
            "- One seed is one seed: the intervals are over questions, and do not say what another would give."
        )
    head = ("model", "right, % (95 %)", "CGD is better by (95 %)", "p, corrected", "known, new ending right",
            "known, new ending kept", "tokens", "rates")  # fmt: skip
    lines += ["", _line(head), _line(["---"] * len(head))]
    lines += [_line(_cells(row)) for row in chapter["rows"]]
    return "\n".join([*lines, ""])


def _cells(row: Mapping[str, Any]) -> list[str]:
    gain = row["gain"]
    return [
        row["label"],
        _points(row["accuracy"]),
        _points(gain, sign="+") if gain else "",
        spoken(gain["corrected"]).removeprefix("p ").removeprefix("= ") if gain else "",
        *(
            f"{100 * row[f'{what}_seen']['mean']:.1f}, {100 * row[f'{what}_new']['mean']:.1f} %"
            for what in ("right", "form")
        ),
        f"{row['tokens']:.1f}",
        ", ".join(row["rates"]),
    ]


def _points(share: Mapping[str, float], *, sign: str = "") -> str:
    """A mean and its interval, in percent or points."""
    mean, low, high = (f"{100 * share[name]:{sign}.1f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_page(target: Path, found: Mapping[str, Any]) -> None:
    """`found` is what results.json holds."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["spoken"] = spoken
    target.write_text(environment.get_template("page.html.j2").render(found))
