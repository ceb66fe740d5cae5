"""The examples of one training: every stored row once, with its example or the reason why it has none, and the counts.

Every objective learns from the same rows, so that two models differ by their objective and not by their prompts: rows
that refine has kept, that the run's choice of refinements keeps, and that every objective of the run can use. `check`
makes all examples before the run asks for a GPU, and stores which rows it leaves out; `train` makes the others again
right before it trains.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cgd_stages.chat.example import Example, Unusable
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import LENGTH, Lesson, Rows, StageName, Supervised, Train
from cgd_stages.engines.replies import rejection
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.method import examples, pairs
from cgd_stages.method.examples import TARGETS, Critic, examples_of
from cgd_stages.store.folder import REJECTED, Folder, read_rows
from cgd_stages.store.rows import KEY, Key, Row, digest_of, from_parquet, key_of
from cgd_stages.store.run import RunStore
from cgd_stages.training.scores import text_digest
from cgd_stages.training.validation_split import held_out

HINTS = {
    "too_long": "Raise spec.training.maxSequenceLength, or lower the generation's maxTokens.",
    "template": "The student's chat template does not show where a reply ends: use another student or revision.",
    "markers": "What is learned holds the markers of the student's thoughts: take them out of {target} and of the "
    "thoughts before it, or take {training} out of spec.training.",
    "control_tokens": "These texts hold control tokens of the student: remove them from the prompts.",
    "empty": "Look at the stored rows: there is nothing to learn in {target}.",
    "missing": "These rows do not have {target}: mend the source of spec.prompts, or take {training} out of "
    "spec.training.",
}


CHECK = "check"
"""The stage of the rows that no objective learns, whatever it can use."""
UNUSABLE = "unusable"
"""The reason of a row that this objective could use and another one of the run cannot."""
UNSCORED = "unscored"
"""The reason of a row whose log-probabilities this objective lacks: its context has no room for them."""
SOURCE_SAMPLE = "source_sample"
"""In a row of the teacher's own answers: its sample there. `sample` is that of the row of refine in whose place it is
learned."""


@dataclass(frozen=True)
class LeftOut:
    """Why a training leaves out a row that its objective may be able to use."""

    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Dataset:
    """The stored rows of a training. `distill` holds the teacher's own answers, `misrefine` its miscritiques and what
    followed from them; None for trainings without them."""

    work: Train
    template: ChatTemplate
    """How the student is spoken to."""
    refine: Folder
    distill: Folder | None = None
    misrefine: Folder | None = None
    scores: Folder | None = None
    """The log-probabilities that the objective learns from; None also where they are not asked for yet."""
    left_out: Mapping[Key, LeftOut] = field(default_factory=dict)
    """Rows that the objective may be able to use and that no training of the run learns."""

    @classmethod
    def of(cls, store: RunStore, work: Train, template: ChatTemplate, *, scored: bool = True) -> "Dataset":
        """The dataset in the finished stages that the objective learns from; `scored`: with the log-probabilities that
        it needs, which come after `check`."""
        distill = store.input("distill") if examples_of(work) == "DistilledSFT" else None
        scores = store.input(work.scores) if scored and work.scores else None
        misrefine = store.input("misrefine") if work.critique.kind == "miscritique" else None
        left_out = read_left_out(store.input(CHECK), work.stage) if work.common_rows else {}
        return cls(work, template, store.input("refine"), distill, misrefine, scores, left_out)

    @property
    def total(self) -> int:
        """Rows of every training of the run, with those that it leaves out."""
        return self.refine.require().rows.done

    @property
    def draws(self) -> int:
        """How many refinements were drawn of each answer."""
        return draws_of(self.refine)

    def identity(self) -> dict[str, Any]:
        """Everything but the student that determines the examples; part of a digest."""
        work, given = self.work, self.work.model_dump(by_alias=True, include={"beta", "top_k", "form"})
        return {
            "objective": work.objective,
            "critique": work.critique.identity(),
            "prompts": examples.wording(examples_of(work), work.critique, work.context),
            "upstream": self.refine.digest,
            "heldOut": work.validation.fraction,
            **({"bareShare": work.bare_share} if work.bare_share else {}),
            **({"distill": self.distill.digest} if self.distill else {}),
            **({"misrefine": self.misrefine.digest} if self.misrefine else {}),
            **({"scores": self.scores.digest} if self.scores else {}),
            **{name: value for name in ("beta", "topK", "form") if (value := given.get(name)) is not None},
            **({"leftOut": digest_of(keys=sorted(self.left_out))} if self.left_out else {}),
            **self.template.identity(),
            **self.template.ending(),
            **({"thinking": work.thinking} if work.thinking == "learn" else {}),
        }

    @cached_property
    def held_out(self) -> frozenset[str]:
        """Ids of the prompts that are measured instead of learned."""
        if self.work.validation.fraction == 0:
            return frozenset()
        prompts = (row["id"] for row in read_rows(self.refine, ["id"]))
        return held_out(prompts, self.work.validation.fraction, self.work.seed)

    @property
    def measures_bare(self) -> bool:
        """Whether held-out rows are measured given the prompt alone as well: elsewhere that is their own context."""
        return self.work.objective in examples.CONDITIONED and self.work.bare_share < 1

    @cached_property
    def bare(self) -> frozenset[Key]:
        """The rows whose context is the prompt alone."""
        if not self.work.bare_share:
            return frozenset()
        keys = (key_of(row) for row in read_rows(self.refine, KEY))
        return frozenset(examples.chosen(keys, self.work.bare_share, self.work.seed, "bare"))

    @cached_property
    def misled(self) -> Mapping[Key, Row]:
        """The columns that a miscritique changes, by the rows that learn with one: those that `corrupted` would choose
        at this rate. A held-out row, and one that has no miscritique, stays as it is, and so does one that reads the
        prompt alone and keeps its target."""
        if self.misrefine is None:
            return {}
        critique, seed = self.work.critique, self.work.seed
        rows = examples.chosen((key_of(row) for row in read_rows(self.refine, KEY)), critique.rate, seed, "corrupt")
        rows -= self.bare if critique.target == "kept" else frozenset()
        return {
            key_of(row): examples.misled(row, critique)
            for row in read_rows(self.misrefine, [*KEY, "miscritique", "misrefinement", "misrefinement_thinking"])
            if key_of(row) in rows and row["id"] not in self.held_out
        }

    def examples(self) -> Iterator[tuple[Row, Example | Unusable | LeftOut]]:
        """Every row with its example, or the reason why it has none, in no promised order. A held-out row that cannot
        be measured in both contexts has none."""
        critic = self._critic()
        for stored in self._rows():
            key = key_of(stored)
            row = stored | self.misled.get(key, {})
            if left_out := self.left_out.get(key):
                yield row, left_out
                continue
            own = self.bare_example(row) if key in self.bare else self._own_example(row, critic)
            if isinstance(own, LeftOut):
                yield row, own
                continue
            example = own
            if self.measures_bare and row["id"] in self.held_out and isinstance(example, Example):
                bare = self.bare_example(row)
                example = bare if isinstance(bare, Unusable) else example
            yield row, example

    def bare_example(self, row: Row) -> Example | Unusable:
        """The example of a row as inference asks it: the prompt alone, and the refinement as the target."""
        return self._example(row, examples.BARE)

    def _own_example(self, row: Row, critic: Critic | None) -> Example | Unusable | LeftOut:
        """The example of a row for the objective. LeftOut: this objective alone cannot learn from the row, and the
        others may."""
        if self.work.objective == "DPO":
            return self._pair(row)
        example = self._example(row, examples_of(self.work), critic)
        if self.scored is None or not isinstance(example, Example):
            return example
        sample = row[SOURCE_SAMPLE] if SOURCE_SAMPLE in row else row["sample"]
        tokens = self.scored.get((row["id"], sample))
        if tokens is None:
            return LeftOut(UNSCORED, f"{self.work.scores} has no log-probabilities of it")
        if tokens != text_digest(example.input_ids[example.start :]):
            return LeftOut(UNSCORED, f"{self.work.scores} has log-probabilities of other tokens")
        return example

    def _pair(self, row: Row) -> pairs.Pair | Unusable | LeftOut:
        work = self.work
        try:
            made = pairs.pair(self.template, row, max_length=work.max_sequence_length, thinking=work.thinking)
        except Unusable as error:
            return error
        return made if isinstance(made, pairs.Pair) else LeftOut(made, pairs.DETAILS[made])

    @cached_property
    def scored(self) -> Mapping[Key, str] | None:
        """`text_digest` of each row's scored tokens, where it has log-probabilities; None: the objective needs none."""
        if self.scores is None:
            return None
        return {key_of(row): row["text"] for row in read_rows(self.scores, [*KEY, "text"])}

    def _example(self, row: Row, objective: Supervised, critic: Critic | None = None) -> Example | Unusable:
        work = self.work
        [(_, example)] = examples.each_example(
            self.template,
            objective,
            [row],
            critic,
            max_length=work.max_sequence_length,
            thinking=work.thinking,
            instruction_turn=work.context,
        )
        return example

    def _critic(self) -> Critic | None:
        work = self.work
        if work.objective != "CGD":
            return None
        try:
            return examples.critic(work.critique, work.seed, read_rows(self.refine, [*KEY, "critique"]))
        except ValueError as error:
            hint = "Give the run more prompts, or another spec.training.critique."
            raise UserError(str(error), hint=hint) from error

    def _rows(self) -> Iterator[Row]:
        if self.distill is None:
            yield from read_rows(self.refine)
            return
        own_answers, wanted = draws_of(self.distill), defaultdict[Key, list[int]](list)
        for row in read_rows(self.refine, KEY):
            answer = row["sample"] // self.draws
            # With fewer own answers than the student has written for a prompt, some are learned more than once.
            wanted[row["id"], answer % own_answers].append(row["sample"])
        for row in read_rows(self.distill):
            for sample in wanted.pop(key_of(row), []):
                yield row | {"sample": sample, SOURCE_SAMPLE: row["sample"]}
        for (identity, _), samples in sorted(wanted.items()):
            for sample in samples:
                yield {"id": identity, "sample": sample, "prompt": "", "distilled": None}


def draws_of(folder: Folder) -> int:
    """How many texts a stage has drawn for each row that it read."""
    return int(folder.require().inputs.get("samples", 1))


def read_left_out(check: Folder, training: StageName) -> dict[Key, LeftOut]:
    """The rows that a training leaves out because of the run's choice of rows, or because another training cannot use
    them; without those that it cannot use itself. `training` is its stage."""
    own, others = set[Key](), dict[Key, LeftOut]()
    for part in check.require().under(REJECTED):
        for row in from_parquet(check.read(part)):
            if row["stage"] == training:
                own.add(key_of(row))
            elif row["stage"] == CHECK:
                others[key_of(row)] = LeftOut(row["reason"], row["detail"])
            else:
                detail = f"{row['stage']} cannot use it: {row['reason']}, {row['detail']}"
                others.setdefault(key_of(row), LeftOut(UNUSABLE, detail))
    return {key: left_out for key, left_out in others.items() if key not in own}


@dataclass
class ExampleCounts:
    """Counts of a training's rows: learned, held out, rejected, left out."""

    work: Train
    held_out: frozenset[str] = frozenset()
    """Ids of the prompts that are measured instead of learned."""
    bare: frozenset[Key] = frozenset()
    """Rows whose context is the prompt alone."""
    misled: Set[Key] = frozenset()
    """Rows that learn with a miscritique."""
    kept: int = 0
    """Examples, with those that are held out."""
    validation: int = 0
    """Examples that are held out."""
    learned: int = 0
    """Tokens with a loss in the examples that are learned."""
    kept_bare: int = 0
    """Examples of `bare`."""
    kept_misled: int = 0
    """Examples of `misled`."""
    tokens: int = 0
    validation_tokens: int = 0
    """Tokens with a loss in the examples that are held out."""
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Histogram: a power of two -> examples of at most so many tokens."""
    without_thought: int | None = None
    """Examples with an empty thought, because the teacher had none; None where no thoughts are learned."""
    rejected: list[Row] = field(default_factory=list)
    """Rows that the objective cannot use."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Other rows that the training leaves out, by reason."""

    @classmethod
    def of(cls, dataset: Dataset) -> "ExampleCounts":
        """The counts of a training before its first row."""
        none = 0 if dataset.work.thinking == "learn" else None
        return cls(dataset.work, dataset.held_out, dataset.bare, dataset.misled.keys(), without_thought=none)

    def add(self, row: Row, example: Example | Unusable | LeftOut) -> None:
        match example:
            case Example():
                self.keep(key_of(row), len(example.input_ids), example.start, thought=example.thought)
            case Unusable():
                self.rejected.append(rejection(self.work.stage, row, example.reason, example.detail))
            case LeftOut():
                self.left_out[example.reason] += 1

    def keep(self, key: Key, length: int, start: int, *, thought: bool) -> None:
        """Count an example of so many tokens, which are learned from `start`, with a thought or without."""
        self.kept += 1
        self.kept_bare += key in self.bare
        self.kept_misled += key in self.misled
        if self.without_thought is not None:
            self.without_thought += not thought
        if key[0] in self.held_out:
            self.validation += 1
            self.validation_tokens += length - start
        else:
            self.learned += length - start
            self.tokens += length
        self.longest = max(self.longest, length)
        self.lengths[1 << (length - 1).bit_length()] += 1

    @property
    def rows(self) -> Rows:
        rejected = len(self.rejected) + self.left_out.total()
        return Rows(total=self.kept + rejected, done=self.kept, rejected=rejected)

    def metrics(self) -> dict[str, float]:
        """Examples and tokens that one epoch learns and a validation measures, and the histogram of lengths."""
        metrics: dict[str, int] = {
            "example_tokens": self.tokens,
            "learned_tokens": self.learned,
            "longest_example": self.longest,
            "train_examples": self.kept - self.validation,
            "validation_examples": self.validation,
            "validation_tokens": self.validation_tokens,
        }
        metrics |= {"bare_examples": self.kept_bare} if self.work.bare_share else {}
        metrics |= {"misled_examples": self.kept_misled} if self.work.critique.kind == "miscritique" else {}
        metrics |= {} if self.without_thought is None else {"without_thought": self.without_thought}
        return {
            **{name: float(value) for name, value in metrics.items()},
            **{f"{LENGTH}{length}": float(count) for length, count in sorted(self.lengths.items())},
        }

    def refuse_unless_enough(self, expected: int, max_rejected: float) -> None:
        """Raise RowsLost when rows are missing, UserError when too many rows have no example, when none is left, or
        when prompts are held out and one side of the split has no example."""
        if self.rows.total != expected:
            raise RowsLost(f"{self.work.stage}: {self.rows.total} of the {expected} rows of refine were read")
        if self.kept and len(self.rejected) <= max_rejected * expected:
            if self.held_out and not 0 < self.validation < self.kept:
                nothing = "measure" if self.validation == 0 else "learn"
                raise UserError(
                    f"{self.work.title}: of {self.kept} examples {self.validation} are held out, none is left to "
                    f"{nothing}",
                    hint="Change spec.training.validation.fraction, or spec.training.seed, which selects the prompts "
                    "that are held out.",
                )
            return
        if self.left_out and len(self.rejected) <= max_rejected * expected:
            counts = ", ".join(f"{reason} {count}" for reason, count in self.left_out.most_common())
            raise UserError(
                f"{self.work.title}: none of {expected} rows is left to learn from ({counts})",
                hint="Look at the rejected rows of check: a better teacher, more samples, or another "
                "spec.training.keep keeps more rows; an objective that cannot use its rows may be taken out.",
            )
        reasons = Counter(str(row["reason"]) for row in self.rejected)
        first = [f"{row['id']} {row['reason']}: {row['detail']}" for row in self.rejected[:2]]
        raise no_examples(self.work, reasons, first, expected, max_rejected)


def no_examples(
    lesson: Lesson, reasons: Counter[str], first: Sequence[str], expected: int, max_rejected: float
) -> UserError:
    """The refusal of a training of which more rows make no example than may. `reasons` counts them, and `first`
    describes some; `expected` is the number of all rows."""
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "there are no rows"
    examples = "; ".join(text[:250] for text in first)
    hint = "The stages before have kept nothing: look at their rejected rows."
    if reasons:
        hint = HINTS[reasons.most_common(1)[0][0]].format(target=TARGETS[examples_of(lesson)], training=lesson.title)
    message = f"{reasons.total()} of {expected} rows make no example, {max_rejected:.1%} may ({counts}). {examples}"
    return UserError(f"{lesson.title}: {message}", hint=hint)
