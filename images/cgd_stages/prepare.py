"""Read, check and store the prompts; refuse here whatever would fail later on a GPU.

    CGD_TASK='{...}' python -m cgd_stages.prepare

Probes the store, the endpoint, both models, tokenizers and templates. Then reads the source row by row: what can be
used becomes a row, what cannot becomes a rejection with its reason, and every row read is one of the two.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from jinja2.exceptions import TemplateError

from cgd_stages import endpoint, models, prompts
from cgd_stages.contract import Benchmark, Engine, Fields, Model, Prepare, Rows, StageFacts
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.folders import (
    PARTS,
    REJECTED,
    REJECTION_SCHEMA,
    Folder,
    Part,
    Row,
    digest_of,
    from_parquet,
    now,
    row_schema,
    to_parquet,
    write_pointer,
)
from cgd_stages.outcomes import rejection
from cgd_stages.program import Context, run
from cgd_stages.sources import File, Line, open_source, read_lines, row_id

log = logging.getLogger(__name__)

STAGE = "prepare"
BENCHMARKS = "benchmarks.parquet"
PART_ROWS = 10_000
_BENCHMARK: list[tuple[str, Any]] = [
    ("benchmark", pa.string()),
    ("id", pa.string()),
    ("prompt", pa.string()),
    ("reference", pa.string()),
]
BENCHMARK_SCHEMA = pa.schema([pa.field(column, kind) for column, kind in _BENCHMARK])


def main(context: Context) -> dict[str, StageFacts]:
    work = context.work_of(Prepare)
    with context.interruptible():
        log.info("storage: %s as %s", context.task.storage.uri, context.bucket.probe())
        if work.endpoint:
            log.info("teacher: %s", endpoint.probe(work.endpoint))
        student = check_model(context, work.student, work.student_engine, "spec.student")
        teacher = check_model(context, work.teacher, work.teacher_engine, "spec.teacher") if work.teacher else None
        _compare_contexts(student, teacher)
        files = open_source(context, work.prompts, "spec.prompts")
        questions = [question for benchmark in work.benchmarks for question in read_benchmark(context, benchmark)]
        folder, inputs = _folder(context, work, files, questions, [student, teacher])
        done = folder.done()
        if done is None:
            started = now()
            reading = Reading(work, student, folder)
            reading.read(read_lines(files, "spec.prompts"), context)
            reading.check()
            facts = _facts(reading, questions)
            benchmarks = folder.put(BENCHMARKS, to_parquet(questions, BENCHMARK_SCHEMA), rows=len(questions))
            done = folder.finish(facts=facts, parts=[*reading.parts, benchmarks], started=started, inputs=inputs)
        else:
            log.info("the prompts are prepared already: %s", folder.uri)
        write_pointer(context.bucket, context.task.run, done)
    return {STAGE: done.facts}


def read_benchmarks(folder: Folder) -> list[Row]:
    """The questions that prepare has stored: benchmark, id, prompt, reference."""
    (part,) = folder.require().under(BENCHMARKS)
    return from_parquet(folder.read(part))


@dataclass(frozen=True)
class Checked:
    """A model that has been looked at: its exact identity, tokenizer, and context in tokens."""

    resolved: models.Resolved
    tokenizer: Any
    context: int


def check_model(context: Context, model: Model, engine: Engine, where: str) -> Checked:
    """Load all but the weights. Raises UserError when the model is not there or does not suit the spec."""
    from transformers import AutoConfig, AutoTokenizer

    resolved = models.resolve(model, context.bucket, context.task.run)
    exact = model.model_copy(update={"revision": resolved.revision}) if models.is_hub(model) else model
    folder = models.fetch(exact, context.bucket, context.task.run, context.scratch, weights=False)
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        hint = f"Correct {where}.model: config and tokenizer must load in transformers."
        raise UserError(f"the model {model.name} cannot be loaded: {error}", hint=hint) from error
    checked = Checked(resolved, tokenizer, _context_length(config, engine, model, where))
    _try_template(checked, model, where)
    log.info("%s: %s at %s, context %d tokens", where, model.name, resolved.revision, checked.context)
    return checked


def _context_length(config: Any, engine: Engine, model: Model, where: str) -> int:
    """Tokens that prompt and reply may have together."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if own is None or (engine.max_model_len or 0) <= own:
        return int(engine.max_model_len or own or 0)
    if (getattr(config.get_text_config(), "rope_parameters", None) or {}).get("factor", 1) != 1:
        log.warning("%s: maxModelLen %d needs the model's rope scaling (%d)", where, engine.max_model_len, own)
        return int(engine.max_model_len or own)
    message = f"maxModelLen is {engine.max_model_len}, but {model.name} takes {own} tokens"
    raise UserError(message, hint=f"Lower maxModelLen in spec.generation to {own}, or take another {where}.model.")


def _try_template(checked: Checked, model: Model, where: str) -> None:
    try:
        prompts.render(checked.tokenizer, prompts.critique_messages("1 + 1?", "2"))
    except (TemplateError, ValueError, TypeError) as error:
        hint = f"Take another {where}.model or revision, or mend its chat_template."
        raise UserError(f"the chat template of {model.name} fails: {error}", hint=hint) from error
    if not getattr(checked.tokenizer, "chat_template", None):
        log.warning("%s: %s has no chat template; it gets a plain question and answer frame", where, model.name)


def _compare_contexts(student: Checked, teacher: Checked | None) -> None:
    if teacher and teacher.context < student.context:
        log.warning(
            "the teacher's context (%d tokens) is smaller than the student's (%d): long answers will be rejected",
            teacher.context,
            student.context,
        )


def _folder(
    context: Context, work: Prepare, files: list[File], questions: list[Row], checked: list[Checked | None]
) -> tuple[Folder, dict[str, Any]]:
    known = [model for model in checked if model]
    inputs: dict[str, Any] = {
        "stage": STAGE,
        "prompts": work.prompts.model_dump(by_alias=True),
        "files": [file.sha256 for file in files],
        "benchmarks": digest_of(questions=questions),
        "models": [{"name": model.resolved.name, "revision": model.resolved.revision} for model in known],
        "context": known[0].context,
        "frame": prompts.fingerprint("answer"),
    }
    folder = Folder(context.bucket, context.task.run.namespace, STAGE, digest_of(**inputs))
    given = [model for model in (work.student, work.teacher) if model]
    pins = {
        model.name: resolved.resolved.revision
        for model, resolved in zip(given, known, strict=True)
        if models.is_hub(model)
    }
    return folder, inputs | {"pins": pins}


@dataclass
class Reading:
    """The books of the source: every line read is kept or rejected."""

    work: Prepare
    student: Checked
    folder: Folder
    parts: list[Part] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """One detail for each reason."""
    ids: set[str] = field(default_factory=set)
    columns: Counter[str] = field(default_factory=Counter)
    """Fields that the source has, and in how many rows."""
    lines: int = 0
    tokens: int = 0
    _rows: list[Row] = field(default_factory=list)
    _rejected: list[Row] = field(default_factory=list)

    def read(self, lines: Iterable[Line], context: Context) -> None:
        limit = self.work.prompts.limit
        for line in lines:
            if limit is not None and len(self.ids) >= limit:
                break
            self.lines += 1
            self._take(line)
            if len(self._rows) >= PART_ROWS or len(self._rejected) >= PART_ROWS:
                self._store()
            if self.lines % 1000 == 0:
                done = Rows(total=limit or 0, done=len(self.ids), rejected=self.rejected)
                context.progress.report(STAGE, done)
        self._store()

    @property
    def rejected(self) -> int:
        return self.reasons.total()

    @property
    def rows(self) -> Rows:
        return Rows(total=self.lines, done=len(self.ids), rejected=self.rejected)

    def check(self) -> None:
        """Raise UserError when what was read is not worth a GPU."""
        if self.lines != len(self.ids) + self.rejected:
            raise RowsLost(f"prepare: read {self.lines}, kept {len(self.ids)}, rejected {self.rejected}")
        source, fields = self.work.prompts.source, self.work.prompts.fields
        if not self.lines:
            raise UserError(f"{source} has no rows", hint="Give spec.prompts.source a file with rows.")
        for name, column in (("prompt", fields.prompt), ("reference", fields.reference)):
            if column is not None and self.columns and column not in self.columns:
                have = ", ".join(column for column, _ in self.columns.most_common(10))
                hint = f"Set spec.prompts.fields.{name} to one of the fields that exist: {have}."
                raise UserError(f"no row of {source} has the field {column!r}", hint=hint)
        bad = self.rejected - self.reasons["duplicate"]
        if not self.ids or bad > self.work.max_rejected * self.lines:
            raise self._refusal(bad)

    def _refusal(self, bad: int) -> UserError:
        top = [(reason, count) for reason, count in self.reasons.most_common() if reason != "duplicate"]
        told = ", ".join(f"{reason} {count}" for reason, count in top)
        examples = "; ".join(self.examples[reason] for reason, _ in top[:2])
        message = (
            f"{self.work.prompts.source}: {bad} of {self.lines} rows cannot be used ({told}). Examples: {examples}"
        )
        hint = "Mend the file of spec.prompts.source"
        hint += ", raise maxModelLen in spec.generation.answer" if "too_long" in self.reasons else ""
        return UserError(message, hint=f"{hint}, or raise spec.generation.maxRejected.")

    def _take(self, line: Line) -> None:
        row, fault = _row(line, self.work.prompts.fields)
        self.columns.update(list(line.value or ()))
        if not fault and row["id"] in self.ids:
            fault = "duplicate", "the same text as an earlier row"
        if not fault:
            fault = self._measure(row)
        if fault:
            reason, detail = fault
            detail = f"{line.where}: {detail}"
            self.reasons[reason] += 1
            self.examples.setdefault(reason, f"{reason}, {detail}"[:300])
            tokens = row.get("prompt_tokens", 0)
            self._rejected.append(rejection(STAGE, row, reason, detail, prompt_tokens=tokens))
        else:
            self.ids.add(row["id"])
            self.tokens += row["prompt_tokens"]
            self._rows.append(row)

    def _measure(self, row: Row) -> tuple[str, str] | None:
        """Count the tokens of the rendered prompt into the row; a fault when it leaves no room for a reply."""
        try:
            text = prompts.render(self.student.tokenizer, prompts.answer_messages(row["prompt"]))
        except (TemplateError, ValueError, TypeError) as error:
            return "template", str(error)
        row["prompt_tokens"] = len(prompts.token_ids(self.student.tokenizer, text))
        if self.student.context and row["prompt_tokens"] >= self.student.context:
            return "too_long", f"{row['prompt_tokens']} tokens, the student's context has {self.student.context}"
        return None

    def _store(self) -> None:
        number = f"{len(self.parts):05d}-"
        if self._rows:
            self.parts.append(self.folder.put_rows(PARTS + number, self._rows, row_schema(STAGE)))
        if self._rejected:
            self.parts.append(self.folder.put_rows(REJECTED + number, self._rejected, REJECTION_SCHEMA))
        self._rows, self._rejected = [], []


def _row(line: Line, fields: Fields) -> tuple[Row, tuple[str, str] | None]:
    """The row of a line, with id "" where there is no prompt, and what is wrong with it."""
    row: Row = {"id": "", "sample": 0}
    if line.value is None:
        return row, ("malformed", line.fault)
    prompt = line.value.get(fields.prompt)
    if prompt is None:
        return row, ("missing_field", f"there is no field {fields.prompt!r}")
    if not isinstance(prompt, str):
        return row, ("malformed", f"the field {fields.prompt!r} is a {type(prompt).__name__}, not a text")
    if not _is_unicode(prompt):
        return row, ("malformed", f"the field {fields.prompt!r} holds half of a surrogate pair")
    reference = line.value.get(fields.reference) if fields.reference else None
    row |= {"id": row_id(prompt), "prompt": prompt, "reference": _text(reference)}
    return row, None if prompt.strip() else ("empty", "the prompt is empty")


def _is_unicode(text: str) -> bool:
    """JSON can spell halves of surrogate pairs, which no file and no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _text(value: object) -> str | None:
    """A reference as text: numbers and lists are welcome."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_benchmark(context: Context, benchmark: Benchmark) -> Iterator[Row]:
    """A benchmark's questions. They are counted against other people's, so one bad row is a UserError."""
    where = f"spec.evaluation.benchmarks {benchmark.name}"
    count = 0
    seen: Counter[str] = Counter()
    for line in read_lines(open_source(context, benchmark, where), where):
        if benchmark.limit is not None and count >= benchmark.limit:
            break
        row, fault = _row(line, benchmark.fields)
        if not fault and row["reference"] is None:
            fault = "missing_field", f"there is no reference (fields.reference is {benchmark.fields.reference!r})"
        if fault:
            raise UserError(f"{line.where}: {fault[1]}", hint=f"Mend the file or fields of {where}.")
        count += 1
        repeated, seen[row["id"]] = seen[row["id"]], seen[row["id"]] + 1
        identity = row_id(f"{row['prompt']} #{repeated}") if repeated else row["id"]
        yield {"benchmark": benchmark.name, "id": identity, "prompt": row["prompt"], "reference": row["reference"]}
    if not count:
        raise UserError(f"the benchmark {benchmark.name} has no questions", hint=f"Check the source of {where}.")


def _facts(reading: Reading, questions: list[Row]) -> StageFacts:
    contaminated = sorted({question["id"] for question in questions} & reading.ids)
    if contaminated:
        log.warning(
            "%d prompts are benchmark questions word for word, such as %s",
            len(contaminated),
            ", ".join(contaminated[:3]),
        )
    if reading.rejected:
        log.warning("%d of %d rows are rejected: %s", reading.rejected, reading.lines, dict(reading.reasons))
    metrics = {f"rejected_{reason}": float(count) for reason, count in sorted(reading.reasons.items())}
    metrics |= {"contaminated": float(len(contaminated)), "benchmark_questions": float(len(questions))}
    return StageFacts(rows=reading.rows, prompt_tokens=reading.tokens, metrics=metrics)


if __name__ == "__main__":
    run(main)
