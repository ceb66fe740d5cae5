"""What a seed has shown, and the small file that keeps it, so that one page can be made of seeds of several machines.

The file is JSON, compressed: `outcome-<size>-seed<N>.json.gz`. Two runs of one seed write the same but for `machine`.
"""

import gzip
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cgd_stages.training.job import BARE_LOSS, VALIDATION_LOSS, Record
from replicate.arithmetic import read_question, stated

ASKED = ("hashes", "box")
"""Endings that the questions to learn from ask for: the product reads their value off a whole solution. The exam asks
for the others, too."""
KEPT = ("step", "loss", VALIDATION_LOSS, BARE_LOSS)
"""Figures of a training's record that are kept."""

Curve = list[Record]
"""The records of a training."""


class OutcomeError(Exception):
    """Files of outcomes that cannot be read, or do not belong together; says which, and what to do."""


@dataclass(frozen=True)
class Made:
    """What a seed was made of. All seeds of a size have the same, but for the seed itself."""

    size: str
    seed: int
    student: str
    arms: tuple[str, ...]
    rates: tuple[str, ...]
    rows: int
    exam: int
    several: int
    samples: int
    epochs: int
    batch: int
    manifest: str
    """The digest of the CGDRun that its runs were made from."""

    @property
    def file(self) -> str:
        return f"outcome-{self.size}-seed{self.seed}.json.gz"


@dataclass(frozen=True)
class Machine:
    """What its programs took, without those that were stopped."""

    cores: int | None
    seconds: float
    processor_seconds: float
    """Of all threads together: says how long it takes where nothing else runs."""


@dataclass(frozen=True)
class Mark:
    """One graded output of one model."""

    question: str
    output: str
    right: bool
    """By the product's grader, whatever the ending."""
    tokens: int
    ended: bool
    """False: cut by the limit."""

    @property
    def kept_form(self) -> bool:
        """The last line is as the question asks for it, whatever the number."""
        return stated(self.output)[0] == read_question(self.question).ending

    @property
    def new_form(self) -> bool:
        """The question asks for an ending that the fine-tuning never showed."""
        return read_question(self.question).ending not in ASKED


@dataclass(frozen=True)
class Rows:
    """What the rows of a seed are like, and shares of right texts among them."""

    count: int
    drafts: float
    verdicts: float
    """Verdicts that say of a draft what the grader says."""
    refinements: float
    distilled: float


@dataclass(frozen=True)
class Trainings:
    """Every arm trained with every learning rate, of which the held-out prompts choose one."""

    curves: dict[str, dict[str, Curve]]
    """Arm -> learning rate -> a record for each step, with the losses on the held-out prompts after the last one, in
    nats a token."""

    @property
    def losses(self) -> dict[str, dict[str, float]]:
        """Arm -> learning rate -> loss on the held-out prompts, given the prompt alone, after the last step."""
        return {arm: {rate: bare_loss(curve[-1]) for rate, curve in of.items()} for arm, of in self.curves.items()}

    @property
    def chosen(self) -> dict[str, str]:
        """Arm -> the rate of the least loss."""
        return {arm: min(losses, key=losses.__getitem__) for arm, losses in self.losses.items()}

    def last(self, arm: str) -> Record:
        """The record after the last step, with the chosen rate."""
        return self.curves[arm][self.chosen[arm]][-1]

    def first_loss(self, arm: str) -> float:
        """The untrained student's loss on the arm's first batch."""
        first, *_ = self.curves[arm].values()
        return first[0]["loss"]


def bare_loss(record: Record) -> float:
    """The loss on the held-out prompts, given the prompt alone."""
    return record.get(BARE_LOSS, record[VALIDATION_LOSS])


@dataclass(frozen=True)
class Outcome:
    """What a seed has shown. The outputs are by arm (or base), ordered by question; those of a question follow each
    other."""

    made: Made
    machine: Machine
    rows: Rows
    trainings: Trainings
    exam: dict[str, list[Mark]]
    several: dict[str, list[Mark]]

    def write(self, folder: Path) -> Path:
        """Write its file; the same bytes for the same outcome."""
        target = folder / self.made.file
        partial = target.with_suffix(".partial")
        partial.write_bytes(gzip.compress(json.dumps(asdict(self), separators=(",", ":")).encode(), mtime=0))
        return partial.replace(target)

    @classmethod
    def read(cls, path: Path) -> "Outcome":
        """Raises OutcomeError."""
        try:
            found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
            made = found["made"] | {name: tuple(found["made"][name]) for name in ("arms", "rates")}
            exam, several = (
                {name: [Mark(**mark) for mark in marks] for name, marks in found[part].items()}
                for part in ("exam", "several")
            )
            return cls(
                Made(**made),
                Machine(**found["machine"]),
                Rows(**found["rows"]),
                Trainings(**found["trainings"]),
                exam,
                several,
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise OutcomeError(f"{path} is no outcome of this version of the study: {error}") from error


def read_all(paths: Iterable[Path]) -> list[list[Outcome]]:
    """The outcomes of these files: a list for each size, in the order of the paths, its seeds in order. Raises
    OutcomeError when those of one size do not belong together."""
    sizes: dict[str, dict[int, Outcome]] = {}
    for path in paths:
        outcome = Outcome.read(path)
        seeds = sizes.setdefault(outcome.made.size, {})
        if outcome.made.seed in seeds:
            raise OutcomeError(f"{path}: seed {outcome.made.seed} of {outcome.made.size} is given twice; leave one out")
        first = next(iter(seeds.values()), outcome)
        if (what := _difference(first, outcome)) is not None:
            raise OutcomeError(
                f"{path}: {what} is another than that of seed {first.made.seed}; "
                "make both with the same version of the study"
            )
        seeds[outcome.made.seed] = outcome
    return [[seeds[seed] for seed in sorted(seeds)] for seeds in sizes.values()]


def _difference(one: Outcome, other: Outcome) -> str | None:
    """What two seeds of a size have not in common although they must; None: nothing."""
    ours, theirs = asdict(one.made), asdict(other.made)
    names = [f"its {name}" for name in ours if name != "seed" and ours[name] != theirs[name]]
    names += [
        f"a question of the {part}"
        for part, mine, yours in (("exam", one.exam, other.exam), ("repeated answers", one.several, other.several))
        if _asked(mine) != _asked(yours)
    ]
    return next(iter(names), None)


def _asked(marks: dict[str, list[Mark]]) -> dict[str, list[str]]:
    return {name: [mark.question for mark in of] for name, of in marks.items()}
