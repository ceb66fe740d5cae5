"""The examples of one training: every stored row once, with its example or the reason why it has none, and the counts.

Every objective learns from the rows that refine has kept, so that two models differ by their objective and not by their
prompts. `check` makes all examples before the run asks for a GPU, `train` right before it trains.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cgd_stages.chat.example import Example, Unusable
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import LENGTH, Objective, Rows, Train, train_stage
from cgd_stages.engines.replies import rejection
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.method import examples
from cgd_stages.method.examples import TARGETS, Critic
from cgd_stages.store.folder import Folder, read_rows
from cgd_stages.store.rows import KEY, Row, key_of
from cgd_stages.store.run import RunStore
from cgd_stages.training.validation_split import held_out

HINTS = {
    "too_long": "Raise spec.training.maxSequenceLength, or lower the generation's maxTokens.",
    "template": "The student's chat template does not show where a reply ends: use another student or revision.",
    "control_tokens": "These texts hold control tokens of the student: remove them from the prompts.",
    "empty": "Look at the stored rows: there is nothing to learn in {target}.",
    "missing": "These rows do not have {target}: mend the source of spec.prompts, or take {objective} out of "
    "spec.training.objectives.",
}


@dataclass(frozen=True)
class Dataset:
    """The stored rows of a training. `distill` holds the teacher's own answers; None for objectives without them."""

    work: Train
    refine: Folder
    distill: Folder | None = None

    @classmethod
    def of(cls, store: RunStore, work: Train) -> "Dataset":
        """The dataset in the finished stages that the objective learns from."""
        distill = store.input("distill") if work.objective == "DistilledSFT" else None
        return cls(work, store.input("refine"), distill)

    @property
    def total(self) -> int:
        """Rows of every training of the run."""
        return self.refine.require().rows.done

    def identity(self, template: ChatTemplate) -> dict[str, Any]:
        """Everything but the student that determines the examples; part of a digest. `template`: the student's."""
        work = self.work
        return (
            {
                "objective": work.objective,
                "critique": work.critique.model_dump(by_alias=True),
                "prompts": examples.wording(work.objective, work.critique),
                "upstream": self.refine.digest,
                "heldOut": work.validation.fraction,
            }
            | template.identity()
            | template.ending()
            | self._learned()
            | ({"distill": self.distill.digest} if self.distill else {})
        )

    def _learned(self) -> dict[str, str]:
        """What is learned of thoughts, where it is not what a student without thoughts learns."""
        return {"thinking": self.work.thinking} if self.work.thinking == "learn" else {}

    def held_out(self) -> frozenset[str]:
        """Ids of the prompts that are measured instead of learned."""
        if self.work.validation.fraction == 0:
            return frozenset()
        prompts = (row["id"] for row in read_rows(self.refine, ["id"]))
        return held_out(prompts, self.work.validation.fraction, self.work.seed)

    def examples(self, template: ChatTemplate) -> Iterator[tuple[Row, Example | Unusable]]:
        """Every row with its example, or the reason why it has none, in no promised order."""
        work = self.work
        critic: Critic | None = None
        if work.objective == "CGD":
            try:
                critic = examples.critic(work.critique, work.seed, read_rows(self.refine, [*KEY, "critique"]))
            except ValueError as error:
                hint = "Give the run more prompts, or another spec.training.critique."
                raise UserError(str(error), hint=hint) from error
        return examples.each_example(
            template,
            work.objective,
            self._rows(),
            critic,
            max_length=work.max_sequence_length,
            thinking=work.thinking,
        )

    def _rows(self) -> Iterator[Row]:
        if self.distill is None:
            yield from read_rows(self.refine)
            return
        missing = {key_of(row) for row in read_rows(self.refine, KEY)}
        for row in read_rows(self.distill):
            if key_of(row) in missing:
                missing.remove(key_of(row))
                yield row
        for identity, sample in sorted(missing):
            yield {"id": identity, "sample": sample, "prompt": "", "distilled": None}


@dataclass
class ExampleCounts:
    """Counts of a training's rows: learned, held out, rejected."""

    stage: str
    objective: Objective
    held_out: frozenset[str] = frozenset()
    """Ids of the prompts that are measured instead of learned."""
    kept: int = 0
    """Examples, with those that are held out."""
    validation: int = 0
    """Examples that are held out."""
    learned: int = 0
    """Tokens with a loss in the examples that are learned."""
    tokens: int = 0
    validation_tokens: int = 0
    """Tokens with a loss in the examples that are held out."""
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Histogram: a power of two -> examples of at most so many tokens."""
    without_thought: int | None = None
    """Examples with an empty thought, because the teacher had none; None where no thoughts are learned."""
    rejected: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, work: Train, held_out: frozenset[str]) -> "ExampleCounts":
        """The counts of a training before its first row."""
        none = 0 if work.thinking == "learn" else None
        return cls(train_stage(work.objective), work.objective, held_out, without_thought=none)

    def add(self, row: Row, example: Example | Unusable) -> None:
        if isinstance(example, Unusable):
            self.rejected.append(rejection(self.stage, row, example.reason, example.detail))
            return
        length = len(example.input_ids)
        self.kept += 1
        if self.without_thought is not None:
            self.without_thought += not example.thought
        if row["id"] in self.held_out:
            self.validation += 1
            self.validation_tokens += length - example.start
        else:
            self.learned += length - example.start
            self.tokens += length
        self.longest = max(self.longest, length)
        self.lengths[1 << (length - 1).bit_length()] += 1

    @property
    def rows(self) -> Rows:
        return Rows(total=self.kept + len(self.rejected), done=self.kept, rejected=len(self.rejected))

    def metrics(self) -> dict[str, float]:
        """Examples and tokens that one epoch learns and a validation measures, and the histogram of lengths."""
        metrics = {
            "example_tokens": self.tokens,
            "learned_tokens": self.learned,
            "longest_example": self.longest,
            "train_examples": self.kept - self.validation,
            "validation_examples": self.validation,
            "validation_tokens": self.validation_tokens,
        } | ({} if self.without_thought is None else {"without_thought": self.without_thought})
        return {
            **{name: float(value) for name, value in metrics.items()},
            **{f"{LENGTH}{length}": float(count) for length, count in sorted(self.lengths.items())},
        }

    def refuse_unless_enough(self, expected: int, max_rejected: float) -> None:
        """Raise RowsLost when rows are missing, UserError when too many rows have no example, or when prompts are held
        out and one side of the split has no example."""
        if self.rows.total != expected:
            raise RowsLost(f"{self.stage}: {self.rows.total} of the {expected} rows of refine were read")
        if self.kept and len(self.rejected) <= max_rejected * expected:
            if self.held_out and not 0 < self.validation < self.kept:
                nothing = "measure" if self.validation == 0 else "learn"
                raise UserError(
                    f"{self.objective}: of {self.kept} examples {self.validation} are held out, none is left to "
                    f"{nothing}",
                    hint="Change spec.training.validation.fraction, or spec.training.seed, which selects the prompts "
                    "that are held out.",
                )
            return
        reasons = Counter(str(row["reason"]) for row in self.rejected).most_common()
        counts = ", ".join(f"{reason} {count}" for reason, count in reasons) or "there are no rows"
        first = "; ".join(f"{row['id']} {row['reason']}: {row['detail'][:200]}" for row in self.rejected[:2])
        hint = HINTS[reasons[0][0]] if reasons else "The stages before have kept nothing: look at their rejected rows."
        raise UserError(
            f"{self.objective}: {len(self.rejected)} of {expected} rows make no example, {max_rejected:.1%} may "
            f"({counts}). {first}",
            hint=hint.format(target=TARGETS[self.objective], objective=self.objective),
        )
