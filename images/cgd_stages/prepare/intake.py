"""The intake of the prompts: every row read is kept, rejected with its reason, or (where a sample is drawn) not drawn.

Memory does not grow with the texts: full parts are stored at once, and of each row only a fingerprint stays, by which
duplicates are found.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa
from jinja2.exceptions import TemplateError

from cgd_stages.chat.messages import turn_markers
from cgd_stages.chat.template import ChatTemplate, ControlTokens
from cgd_stages.contract import Fields, Prepare, Prompts, Rows
from cgd_stages.engines.replies import rejection
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.method import prompts
from cgd_stages.prepare.columns import Fault, holds_earlier_thoughts, row_of, value_at
from cgd_stages.prepare.sampling import FILE_CHARACTERS, Sample, characters
from cgd_stages.prepare.sources import Line
from cgd_stages.quality.contamination import Questions
from cgd_stages.quality.near_duplicates import Signatures, outline
from cgd_stages.quality.paraphrases import Findings
from cgd_stages.runtime.pace import Pace
from cgd_stages.runtime.program import Context
from cgd_stages.store.folder import PARTS, REJECTED, Folder
from cgd_stages.store.part_writer import PartWriter
from cgd_stages.store.rows import Row, row_schema

STAGE = "prepare"
PART_ROWS = 10_000
"""A part is stored when it has this many rows, or `FILE_CHARACTERS` of text."""
BATCH = 256
BATCH_CHARACTERS = 4 << 20
"""The most rows, and characters, of a batch; the tokens of a batch are counted in one call."""
COLUMNS, LONGEST_COLUMN = 1000, 256
"""Fields that are counted beside those that the run names: so many at most, with names shorter than this."""
PIECE = 16
"""Characters that are tokenised at once, for each token of the context; a token of English has 4."""
CLEANING = frozenset({"duplicate", "near_duplicate", "contaminated"})
"""Reasons that say nothing against a source: such rows are listed, and `maxRejected` does not count them."""


def schema_of(source: Prompts) -> pa.Schema:
    """The columns of the prompts that are stored."""
    return row_schema(STAGE, conversations=source.fields.messages is not None)


def groups_of(lines: Iterable[Line], fields: Fields) -> dict[str, int]:
    """The number of its group for each prompt, by id, that nearly repeats another one of the source, as the stage
    check counts them. Memory holds a kilobyte of each prompt meanwhile."""
    signatures, seen = Signatures(), set[str]()
    for line in lines:
        row, fault = row_of(line, fields)
        if not fault and row["id"] not in seen:
            seen.add(row["id"])
            signatures.add(row["id"], outline(row))
    return {identity: number for number, group in enumerate(signatures.groups()) for identity in group.ids}


@dataclass
class Candidate:
    """A line on its way in: its row, what is wrong with it, and the text that the student would read."""

    where: str
    row: Row
    fault: Fault | None
    thoughts: bool = False
    """Whether thoughts of turns before the prompt are left out of it."""
    text: str = ""
    tokens: int = 0
    """Of a text that is not tokenised in one piece: see `chat.template.Rendered`."""


@dataclass
class Intake:
    """Rows of the source on their way into the folder."""

    work: Prepare
    template: ChatTemplate
    context_length: int
    """The student's, in tokens; 0: not known."""
    folder: Folder
    sample: Sample | None = None
    benchmark_ids: frozenset[str] = frozenset()
    questions: Questions | None = None
    """Prompts must not overlap with these."""
    findings: Findings | None = None
    """The questions that the rows paraphrase; None: this is not looked for."""
    groups: Mapping[str, int] = field(default_factory=dict)
    """Of each of these groups of prompts, by their ids, one is kept."""
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """One detail for each reason."""
    columns: Counter[str] = field(default_factory=Counter)
    """The fields of the source, and how many rows have each."""
    read_rows: int = 0
    usable: int = 0
    kept: int = 0
    not_sampled: int = 0
    tokens: int = 0
    thoughts_left_out: int = 0
    """Usable rows with thoughts in turns before the prompt, which are left out."""
    contaminated: int = 0
    """Kept prompts that are benchmark questions word for word."""
    _firsts: dict[int, str] = field(default_factory=dict)
    """The prompt of each group that is kept."""
    _ids: set[int] = field(default_factory=set)
    """The first 64 bits of each row's id: 77 MB for a million rows, beside the libraries' 490 MB. Two of a million ids
    agree in them with a probability of 1 to 40 million; the later row is then a `duplicate`."""
    _characters: int = 0
    """Characters of the kept rows that are not stored yet."""

    def __post_init__(self) -> None:
        # The same source gives the same parts, so an earlier attempt leaves nothing to take over.
        self.writer = PartWriter(self.folder, schema_of(self.work.prompts), numbered=True, part_rows=PART_ROWS)

    def read(self, lines: Iterable[Line], context: Context) -> None:
        """Take the whole source, or as much of it as `limit` asks for."""
        lines, limit = iter(lines), self.work.prompts.limit
        first_rows, pace = limit if limit and not self.sample else None, Pace()
        # Never so many lines that more than the first `limit` rows could be kept.
        while batch := self._next(lines, BATCH if first_rows is None else min(BATCH, first_rows - self.kept)):
            self._take(batch)
            total = first_rows + self.rejected if first_rows else 0
            eta = pace.remaining(self.usable, first_rows - self.usable) if first_rows else None
            context.progress.report(STAGE, Rows(total=total, done=self.usable, rejected=self.rejected), eta=eta)
        for row, drawn in self.sample.drawn() if self.sample else ():
            if drawn:
                self._keep(row)
            else:
                self.not_sampled += 1
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
        counts |= {"thoughts_left_out": self.thoughts_left_out} if self.thoughts_left_out else {}
        counts |= {f"rejected_{reason}": count for reason, count in sorted(self.reasons.items())}
        found = self.findings.metrics if self.findings else {}
        return {name: float(count) for name, count in counts.items()} | found

    def summary(self) -> str:
        """The counts in one sentence."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
        text = f"read {self.read_rows} rows: kept {self.kept}, rejected {self.rejected}"
        return text + (f" ({reasons})" if reasons else "") + f", not sampled {self.not_sampled}"

    def check(self) -> None:
        """Raise UserError when the rows are not worth a GPU."""
        if self.read_rows != self.kept + self.rejected + self.not_sampled:
            raise RowsLost(f"prepare: {self.summary()}")
        source, fields = self.work.prompts.source, self.work.prompts.fields
        if not self.read_rows:
            raise UserError(f"{source} has no rows", hint="Give spec.prompts.source a file with rows.")
        for name, column in fields.named.items():
            if self.columns and column not in self.columns:
                existing = ", ".join(column for column, _ in self.columns.most_common(10))
                hint = f"Set spec.prompts.fields.{name} to one of the fields that exist: {existing}."
                raise UserError(f"no row of {source} has the field {column!r}", hint=hint)
        bad = sum(count for reason, count in self.reasons.items() if reason not in CLEANING)
        if bad > self.work.max_rejected * self.read_rows:
            raise self._refusal(bad, CLEANING)
        if not self.kept:
            raise self._refusal(self.rejected)

    def _refusal(self, bad: int, without: frozenset[str] = frozenset()) -> UserError:
        top = [(reason, count) for reason, count in self.reasons.most_common() if reason not in without]
        counts = ", ".join(f"{reason} {count}" for reason, count in top)
        examples = "; ".join(self.examples[reason] for reason, _ in top[:2])
        source = self.work.prompts.source
        message = f"{source}: {bad} of {self.read_rows} rows cannot be used ({counts}). Examples: {examples}"
        hint = "Mend the file of spec.prompts.source"
        hint += ", raise spec.student.maxModelLen" if "too_long" in self.reasons else ""
        return UserError(message, hint=f"{hint}, or raise spec.generation.maxRejected.")

    def _next(self, lines: Iterator[Line], most: int) -> list[Candidate]:
        """The next lines, checked but for their number of tokens; fewer than `most` where they are long."""
        batch: list[Candidate] = []
        size = 0
        for line in islice(lines, most):
            self._count_fields(line)
            row, fault = row_of(line, self.work.prompts.fields)
            candidate = Candidate(line.where, row, fault or self._overlap(row))
            candidate.thoughts = not fault and holds_earlier_thoughts(line.value or {}, self.work.prompts.fields)
            if not candidate.fault:
                self._render(candidate)
            batch.append(candidate)
            size += len(candidate.text) + characters(row)
            if size >= BATCH_CHARACTERS:
                break
        return batch

    def _count_fields(self, line: Line) -> None:
        """Count the fields that the run names, and of others no more than people would read."""
        named, value = self.work.prompts.fields.named.values(), line.value or {}
        others = [name for name in value if name not in named and len(name) < LONGEST_COLUMN]
        room = max(0, COLUMNS - len(self.columns))
        self.columns.update([name for name in named if value_at(value, name).exists] + others[:room])

    def _overlap(self, row: Row) -> Fault | None:
        fingerprint = int(row["id"][:16], 16)
        if fingerprint in self._ids:
            return "duplicate", "the same text as an earlier row"
        self._ids.add(fingerprint)
        asked = [turn["content"] for turn in prompts.answer_messages(row["prompt"], turns=prompts.earlier_turns(row))]
        matches = (self.questions.match(text) for text in reversed(asked)) if self.questions else iter(())
        if match := next(filter(None, matches), None):
            return "contaminated", str(match)
        detail = self._paraphrase(row) if self.removes else ""
        return ("contaminated", detail) if detail else None

    @property
    def removes(self) -> bool:
        """Whether rows that paraphrase a question are rejected."""
        decontaminate = self.work.prompts.decontaminate
        return decontaminate is not None and decontaminate.paraphrases == "remove"

    def _paraphrase(self, row: Row) -> str:
        """The closest question that the row paraphrases, in words; empty if there is none."""
        texts = {"prompt": prompts.whole_prompt(row), "reference": row["reference"]}
        return self.findings.add(row, texts) if self.findings else ""

    def _near_duplicate(self, row: Row) -> Fault | None:
        """A fault where an earlier prompt of the same group is usable."""
        group = self.groups.get(row["id"])
        first = row["id"] if group is None else self._firsts.setdefault(group, row["id"])
        return None if first == row["id"] else ("near_duplicate", f"nearly repeats the prompt {first}")

    def _render(self, candidate: Candidate) -> None:
        """Render the prompt with the student's template; a fault where that fails or the text is far too long."""
        row = candidate.row
        try:
            messages = prompts.role_messages("answer", row)
            rendered = self.template.render(messages)
            candidate.text = rendered.text
            if self.work.endpoint:  # whose server tokenises: the prompt could forge a turn
                candidate.fault = self._forging("\n".join(message["content"] for message in messages))
            if len(rendered.pieces) > 1:
                candidate.tokens = len(self.template.token_ids(rendered))
            if least := self._far_too_long(candidate.text):
                row["prompt_tokens"] = least
                detail = f"{least} tokens or more, the student's context has {self.context_length}"
                candidate.fault = "too_long", detail
        except TemplateError as error:
            candidate.fault = "template", str(error)
        except ControlTokens as error:
            candidate.fault = "control_tokens", str(error)

    def _forging(self, text: str) -> Fault | None:
        """A fault where a server might read control tokens in the text: the student's, or those of other templates."""
        markers = sorted({*self.template.control_tokens(text), *turn_markers(text)})
        detail = f"the teacher's server may read {', '.join(markers)} as a control token"
        return ("control_tokens", detail) if markers else None

    def _far_too_long(self, text: str) -> int:
        """The least number of tokens of a text that has twice the context or more; else 0. A long text is counted piece
        by piece, because tokenising millions of tokens at once takes a gigabyte."""
        width, count = PIECE * self.context_length, 0
        for start in range(0, len(text), width) if 0 < width < len(text) else ():
            count += len(self.template.tokenizer(text[start : start + width], add_special_tokens=False)["input_ids"])
            if count >= 2 * self.context_length:
                return count
        return 0

    def _take(self, batch: list[Candidate]) -> None:
        """Count the tokens of the rendered prompts, then keep or reject every row of the batch."""
        self.read_rows += len(batch)
        rendered = [candidate for candidate in batch if not candidate.fault]
        texts = [candidate.text for candidate in rendered]
        token_ids = self.template.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for candidate, ids in zip(rendered, token_ids, strict=True):
            tokens = candidate.row["prompt_tokens"] = candidate.tokens or len(ids)
            if self.context_length and tokens >= self.context_length:
                candidate.fault = "too_long", f"{tokens} tokens, the student's context has {self.context_length}"
        for candidate in batch:
            candidate.fault = candidate.fault or self._near_duplicate(candidate.row)
            if candidate.fault:
                reason, detail = candidate.fault[0], f"{candidate.where}: {candidate.fault[1]}"
                self.reasons[reason] += 1
                self.examples.setdefault(reason, f"{reason}, {detail}"[:300])
                tokens = candidate.row.get("prompt_tokens", 0)
                self.writer.reject(rejection(STAGE, candidate.row, reason, detail, prompt_tokens=tokens))
                if self.writer.waiting(REJECTED) >= PART_ROWS:
                    self.writer.flush(REJECTED)
                continue
            self.usable += 1
            self.thoughts_left_out += candidate.thoughts
            if self.sample:
                self.sample.add(candidate.row)
            else:
                self._keep(candidate.row)

    def _keep(self, row: Row) -> None:
        self.kept += 1
        self.tokens += row["prompt_tokens"]
        self.contaminated += row["id"] in self.benchmark_ids
        if not self.removes:
            self._paraphrase(row)
        self.writer.keep(row)
        self._characters += characters(row)
        if self.writer.waiting(PARTS) >= PART_ROWS or self._characters >= FILE_CHARACTERS:
            self.writer.flush(PARTS)
            self._characters = 0
