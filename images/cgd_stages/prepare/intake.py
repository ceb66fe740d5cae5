"""The intake of the prompts: every row read is kept, rejected with its reason, or (of a sample) not drawn.

Memory does not grow with the texts: parts are stored as they fill up, and of each row there remains a fingerprint, by
which duplicates are known.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from jinja2.exceptions import TemplateError

from cgd_stages.contract import Fields, Prepare, Rows
from cgd_stages.engines.replies import rejection
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.method import prompts
from cgd_stages.prepare.sampling import FILE_CHARACTERS, Sample, characters
from cgd_stages.prepare.sources import Line, row_id
from cgd_stages.quality.contamination import Questions
from cgd_stages.runtime.program import Context
from cgd_stages.store.folder import PARTS, REJECTED, Folder
from cgd_stages.store.part_writer import PartWriter
from cgd_stages.store.rows import Row, row_schema

STAGE = "prepare"
PART_ROWS = 10_000
"""A part is stored when it has so many rows, or `FILE_CHARACTERS` of text."""
BATCH = 256
BATCH_CHARACTERS = 4 << 20
"""Rows, and characters, that are looked at together, so that their tokens are counted in one call."""
COLUMNS, LONGEST_COLUMN = 1000, 256
"""Fields of a source that are counted, and the characters of such a field's name, besides those that the run names."""
PIECE = 16
"""Characters for each token of the context that are tokenised at once; a token of English has 4."""
CLEANING = frozenset({"duplicate", "contaminated"})
"""Reasons that say nothing against a source: such rows are listed, but `maxRejected` is not about them."""

Fault = tuple[str, str]
"""Reason and detail."""


@dataclass
class Looked:
    """One line after the first look: its row, what is wrong with it, and the text the student would get."""

    where: str
    row: Row
    fault: Fault | None
    text: str = ""

    @property
    def characters(self) -> int:
        return len(self.text) + characters(self.row)


@dataclass
class Intake:
    """Rows of the source on their way into the folder. `context_length` is the student's, in tokens; 0: not known."""

    work: Prepare
    tokenizer: Any
    context_length: int
    folder: Folder
    sample: Sample | None = None
    benchmark_ids: frozenset[str] = frozenset()
    questions: Questions | None = None
    """What prompts may not overlap with."""
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """One detail for each reason."""
    columns: Counter[str] = field(default_factory=Counter)
    """Fields that the source has, and in how many rows."""
    read_rows: int = 0
    usable: int = 0
    kept: int = 0
    not_sampled: int = 0
    tokens: int = 0
    contaminated: int = 0
    """Kept prompts that are benchmark questions word for word."""
    _ids: set[int] = field(default_factory=set)
    """The first 64 bits of each row's id: 77 MB for a million rows, beside the libraries' 490 MB. Two of a million ids
    agree in those with a probability of 1 to 40 million; the later row is a `duplicate` then."""
    _characters: int = 0
    """Of the kept rows that wait to be stored."""

    def __post_init__(self) -> None:
        # The same source gives the same parts, so nothing of an earlier attempt is taken in.
        self.writer = PartWriter(self.folder, row_schema(STAGE), numbered=True, part_rows=PART_ROWS)

    def read(self, lines: Iterable[Line], context: Context) -> None:
        """Take the whole source, or as much of it as `limit` asks for."""
        lines = iter(lines)
        while batch := self._next(lines):
            self._take(batch)
            context.progress.report(STAGE, self._progress())
        if self.sample:
            self._draw(self.sample)
        self.writer.flush()

    @property
    def rejected(self) -> int:
        return self.reasons.total()

    @property
    def rows(self) -> Rows:
        return Rows(total=self.kept + self.rejected, done=self.kept, rejected=self.rejected)

    @property
    def metrics(self) -> dict[str, float]:
        counts = {"read": self.read_rows, "not_sampled": self.not_sampled, "contaminated": self.contaminated}
        counts |= {f"rejected_{reason}": count for reason, count in sorted(self.reasons.items())}
        return {name: float(count) for name, count in counts.items()}

    def summary(self) -> str:
        """The counts in one sentence."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
        text = f"read {self.read_rows} rows: kept {self.kept}, rejected {self.rejected}"
        return text + (f" ({reasons})" if reasons else "") + f", not sampled {self.not_sampled}"

    def check(self) -> None:
        """Raise UserError when what was read is not worth a GPU."""
        if self.read_rows != self.kept + self.rejected + self.not_sampled:
            raise RowsLost(f"prepare: {self.summary()}")
        source, fields = self.work.prompts.source, self.work.prompts.fields
        if not self.read_rows:
            raise UserError(f"{source} has no rows", hint="Give spec.prompts.source a file with rows.")
        for name, column in (("prompt", fields.prompt), ("reference", fields.reference)):
            if column is not None and self.columns and column not in self.columns:
                have = ", ".join(column for column, _ in self.columns.most_common(10))
                hint = f"Set spec.prompts.fields.{name} to one of the fields that exist: {have}."
                raise UserError(f"no row of {source} has the field {column!r}", hint=hint)
        bad = sum(count for reason, count in self.reasons.items() if reason not in CLEANING)
        if bad > self.work.max_rejected * self.read_rows:
            raise self._refusal(bad, CLEANING)
        if not self.kept:
            raise self._refusal(self.rejected)

    def _refusal(self, bad: int, apart: frozenset[str] = frozenset()) -> UserError:
        top = [(reason, count) for reason, count in self.reasons.most_common() if reason not in apart]
        counts = ", ".join(f"{reason} {count}" for reason, count in top)
        examples = "; ".join(self.examples[reason] for reason, _ in top[:2])
        source = self.work.prompts.source
        message = f"{source}: {bad} of {self.read_rows} rows cannot be used ({counts}). Examples: {examples}"
        hint = "Mend the file of spec.prompts.source"
        hint += ", raise spec.student.maxModelLen" if "too_long" in self.reasons else ""
        return UserError(message, hint=f"{hint}, or raise spec.generation.maxRejected.")

    def _batch_size(self) -> int:
        """Lines to look at next: never so many that more than `limit` could be kept."""
        limit = self.work.prompts.limit
        return BATCH if limit is None or self.sample else min(BATCH, limit - self.kept)

    def _progress(self) -> Rows:
        """How many rows there will be is known only where the first `limit` are taken."""
        limit = self.work.prompts.limit
        total = limit + self.rejected if limit and not self.sample else 0
        return Rows(total=total, done=self.usable, rejected=self.rejected)

    def _next(self, lines: Iterator[Line]) -> list[Looked]:
        """The next rows after the first look: few at a time where they are long."""
        batch: list[Looked] = []
        characters = 0
        for line in islice(lines, self._batch_size()):
            batch.append(self._look(line))
            characters += batch[-1].characters
            if characters >= BATCH_CHARACTERS:
                break
        return batch

    def _take(self, batch: list[Looked]) -> None:
        self.read_rows += len(batch)
        self._measure([looked for looked in batch if not looked.fault])
        for looked in batch:
            if looked.fault:
                self._reject(looked, *looked.fault)
            else:
                self._keep(looked.row)

    def _look(self, line: Line) -> Looked:
        row, fault = row_of(line, self.work.prompts.fields)
        self.columns.update(self._names(line))
        looked = Looked(line.where, row, fault or self._overlap(row))
        if not looked.fault:
            try:
                looked.text = prompts.render(self.tokenizer, prompts.answer_messages(row["prompt"]))
                if least := self._far_too_long(looked.text):
                    row["prompt_tokens"] = least
                    detail = f"{least} tokens or more, the student's context has {self.context_length}"
                    looked.fault = "too_long", detail
            except (TemplateError, ValueError, TypeError) as error:
                looked.fault = "template", str(error)
        return looked

    def _far_too_long(self, text: str) -> int:
        """How many tokens a text has at least, when that is twice the context or more; else 0. A long one is counted
        piece by piece: to tokenise millions of tokens at once would take a gigabyte."""
        width, count = PIECE * self.context_length, 0
        for start in range(0, len(text), width) if 0 < width < len(text) else ():
            count += len(self.tokenizer(text[start : start + width], add_special_tokens=False)["input_ids"])
            if count >= 2 * self.context_length:
                return count
        return 0

    def _names(self, line: Line) -> list[str]:
        """The fields of a line, to be counted: those that the run names, and of others no more than people look at."""
        named, names = self.work.prompts.fields.columns, line.value or {}
        others = [name for name in names if name not in named and len(name) < LONGEST_COLUMN]
        return [name for name in named if name in names] + others[: max(0, COLUMNS - len(self.columns))]

    def _overlap(self, row: Row) -> Fault | None:
        fingerprint = int(row["id"][:16], 16)
        if fingerprint in self._ids:
            return "duplicate", "the same text as an earlier row"
        self._ids.add(fingerprint)
        match = self.questions.match(row["prompt"]) if self.questions else None
        return ("contaminated", str(match)) if match else None

    def _measure(self, batch: list[Looked]) -> None:
        """Count the tokens of the rendered prompts; a fault where they leave no room for a reply."""
        if not batch:
            return
        texts = [looked.text for looked in batch]
        for looked, ids in zip(batch, self.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
            looked.row["prompt_tokens"] = len(ids)
            if self.context_length and len(ids) >= self.context_length:
                looked.fault = "too_long", f"{len(ids)} tokens, the student's context has {self.context_length}"

    def _reject(self, looked: Looked, reason: str, detail: str) -> None:
        detail = f"{looked.where}: {detail}"
        self.reasons[reason] += 1
        self.examples.setdefault(reason, f"{reason}, {detail}"[:300])
        tokens = looked.row.get("prompt_tokens", 0)
        self.writer.reject(rejection(STAGE, looked.row, reason, detail, prompt_tokens=tokens))
        if self.writer.waiting(REJECTED) >= PART_ROWS:
            self.writer.flush(REJECTED)

    def _keep(self, row: Row) -> None:
        self.usable += 1
        if self.sample:
            self.sample.add(row)
        else:
            self._take_in(row)

    def _take_in(self, row: Row) -> None:
        self.kept += 1
        self.tokens += row["prompt_tokens"]
        self.contaminated += row["id"] in self.benchmark_ids
        self.writer.keep(row)
        self._characters += characters(row)
        if self.writer.waiting(PARTS) >= PART_ROWS or self._characters >= FILE_CHARACTERS:
            self.writer.flush(PARTS)
            self._characters = 0

    def _draw(self, sample: Sample) -> None:
        for row, drawn in sample.drawn():
            if drawn:
                self._take_in(row)
            else:
                self.not_sampled += 1


def row_of(line: Line, fields: Fields) -> tuple[Row, Fault | None]:
    """The row of a line, with id "" where there is no prompt, and what is wrong with it."""
    row: Row = {"id": "", "sample": 0}
    if line.value is None:
        return row, ("malformed", line.fault)
    prompt = line.value.get(fields.prompt)
    if prompt is None:
        return row, ("missing_field", f"there is no field {fields.prompt!r}")
    if not isinstance(prompt, str):
        return row, ("malformed", f"the field {fields.prompt!r} is a {type(prompt).__name__}, not a text")
    reference = line.value.get(fields.reference) if fields.reference else None
    try:
        row |= {"id": row_id(prompt), "prompt": prompt, "reference": _text(reference)}
    except (TypeError, ValueError, RecursionError):
        return row, ("malformed", f"the field {fields.reference!r} is a {type(reference).__name__} that JSON has not")
    return row, None if prompt.strip() else ("empty", "the prompt is empty")


def _text(value: object) -> str | None:
    """A reference as text: numbers and lists are welcome. Raises TypeError for what JSON has not, such as bytes."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
