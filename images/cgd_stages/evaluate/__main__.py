"""Give a model every benchmark question alone, and grade what it says.

    CGD_TASK='{...}' python -m cgd_stages.evaluate

The model sees the question, and the benchmark's instruction after a blank line; no draft, no critique, no reference.
Every question ends as one row for each of the benchmark's samples, with the output, what was taken as the answer, and
the verdict. A rival lets the model then criticise its own answer and give another. Interrupt it at any moment: the next
attempt asks only for what is not stored.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cgd_stages.contract import Evaluate, Rows, StageFacts
from cgd_stages.engines.base import Completion, Engine, Outcome, VllmEngine, drive
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.evaluate.multi_pass import Dialogue, Dialogues
from cgd_stages.grading.grader import Grade, Grader, find_answer
from cgd_stages.method import prompts
from cgd_stages.method.prompts import answer_messages, read_reply
from cgd_stages.models import resolve
from cgd_stages.results import model as records
from cgd_stages.results import scores
from cgd_stages.results.model import Key
from cgd_stages.results.outputs import SCHEMA, metrics
from cgd_stages.runtime.pace import Pace
from cgd_stages.runtime.program import Context, run, storing
from cgd_stages.store.benchmarks import read_benchmarks
from cgd_stages.store.folder import PARTS, Folder, Part
from cgd_stages.store.rows import Row, digest_of, from_parquet, now, sha256
from cgd_stages.store.run import open_input, write_pointer

log = logging.getLogger(__name__)

FLUSH_SECONDS = 60.0
FLUSH_ROWS = 512
REPORT_SECONDS = 3.0
GRADERS = 2
GRADE_SECONDS = 10.0


def main(context: Context) -> dict[str, StageFacts]:
    work, stage = context.work_of(Evaluate), context.task.stage
    questions = _questions(context, work)
    folder, inputs = _folder(context, work, questions)
    done = folder.done()
    if done is None:
        started, clock = now(), time.monotonic()
        with Grader(workers=GRADERS, seconds=GRADE_SECONDS) as grader:
            book = Book(folder, grader)
            settings = _ask(context, work, questions, book)
        facts = context.facts[stage] = _facts(book, len(questions), time.monotonic() - clock)
        stored = sum(part.rows for part in book.parts)
        if not len(questions) == len(book.samples) == stored:
            raise RowsLost(f"{stage}: {len(questions)} outputs wanted, {len(book.samples)} graded, {stored} stored")
        done = folder.finish(facts=facts, parts=book.parts, started=started, inputs=inputs, settings=settings)
    else:
        log.info("%s is done already: %s", stage, folder.uri)
    write_pointer(context.bucket, context.task.run, done)
    for name, value in sorted(done.facts.metrics.items()):
        log.info("%s: %g", name, value)
    return {stage: done.facts}


def _questions(context: Context, work: Evaluate) -> list[Row]:
    """The benchmarks' questions as prepare has stored them, each with the prompt that the model is given, once for each
    sample of its benchmark."""
    stored = read_benchmarks(open_input(context.bucket, context.task.run, "prepare"))
    benchmarks = {benchmark.name: benchmark for benchmark in work.benchmarks}
    missing = benchmarks.keys() - {row["benchmark"] for row in stored}
    if missing:
        raise UserError(
            f"prepare has stored no questions of {', '.join(sorted(missing))}",
            hint="Delete the run and apply it again: its evaluation does not belong to its preparation.",
        )
    chosen = [(row, benchmark) for row in stored if (benchmark := benchmarks.get(row["benchmark"]))]
    # The samples of a question share the text of its prompt.
    questions = [(row | {"prompt": asked(row["prompt"], one.instruction)}, one.samples) for row, one in chosen]
    return [row | {"sample": sample} for row, samples in questions for sample in range(samples)]


def asked(question: str, instruction: str) -> str:
    """The one user turn: the question, and the benchmark's instruction after a blank line."""
    return f"{question}\n\n{instruction}" if instruction else question


def _folder(context: Context, work: Evaluate, questions: list[Row]) -> tuple[Folder, dict[str, Any]]:
    run_ref = context.task.run
    resolved = resolve.resolve(resolve.pinned(work.model, context.bucket, run_ref), context.bucket, run_ref)
    inputs: dict[str, Any] = {
        "stage": context.task.stage,
        "model": {"name": resolved.name, "revision": resolved.revision},
        "questions": digest_of(rows=questions, frame=answer_messages("{x}")),
        "sampling": work.sampling.model_dump(by_alias=True),
        "engine": {"maxModelLen": work.engine.max_model_len, "dtype": work.engine.dtype},
    }
    if work.rival:
        again = (
            prompts.retry_messages("{x}", ["{c}"]) if work.rival.kind == "Reflexion" else prompts.fingerprint("refine")
        )
        inputs["rival"] = work.rival.model_dump() | {"prompts": [prompts.fingerprint("critique"), again]}
    return context.folder(context.task.stage, inputs), inputs


# --- asking -----------------------------------------------------------------------------------------------------


def _ask(context: Context, work: Evaluate, questions: list[Row], book: "Book") -> dict[str, Any]:
    """Ask whatever is not stored, and store what comes, until all is there or SIGTERM. The engine's settings."""
    waiting = [question for question in questions if key_of(question) not in book.keys]
    log.info("%d outputs wanted, %d to ask for", len(questions), len(waiting))
    if not waiting:
        book.flush()  # rows of a part that held others' as well
        return {}
    engine = _engine(context, work)
    named = ((name_of(question), question) for question in waiting)
    dialogues = Dialogues(named, work.sampling, work.rival)
    speed = Speed(context, len(questions), book, dialogues)
    with context.holding(), storing(book.flush):
        for outcome in drive(engine, dialogues.take, context.stop):
            if ended := dialogues.note(outcome):
                book.take(ended)
            speed.note(outcome)
    context.check()
    engine.close()
    return engine.settings


def _engine(context: Context, work: Evaluate) -> Engine:
    model = resolve.pinned(work.model, context.bucket, context.task.run)
    return VllmEngine(resolve.fetch(model, context.bucket, context.task.run, context.scratch), work.engine)


def key_of(row: Row) -> Key:
    return row["benchmark"], row["id"], row["sample"]


def name_of(row: Row) -> str:
    return f"{row['benchmark']}/{row['id']}/{row['sample']}"


# --- grading and storing ----------------------------------------------------------------------------------------


@dataclass
class Book:
    """What is stored, what is being graded, and what that cost. Opening it reads everything stored so far. Texts are
    held until they are stored."""

    folder: Folder
    grader: Grader
    samples: list[records.Sample] = field(default_factory=list)
    prompt_tokens: int = 0
    parts: list[Part] = field(default_factory=list)
    keys: set[Key] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(GRADERS)
        self._grading: list[tuple[Row, Future[Grade]]] = []
        self._fresh: list[Row] = []
        self._stored_at = time.monotonic()
        for found in self.folder.bucket.list(self.folder.key(PARTS)):
            self._take_part(found.key)

    def take(self, dialogue: Dialogue) -> None:
        """Have one answer graded, and store it with the next part. A question refused is a question not solved."""
        row = dialogue.question | _said(dialogue.outcome) | {"passes": dialogue.passes}
        self.keys.add(key_of(row))
        self._grading.append((row, self._threads.submit(grade, self.grader, row)))
        if len(self._grading) >= FLUSH_ROWS or time.monotonic() - self._stored_at >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Wait for the grader, and store what waits."""
        for row, verdict in self._grading:
            self._add(row | vars(verdict.result()))
        self._grading = []
        if self._fresh:
            self.parts.append(self.folder.put_rows(PARTS, self._fresh, SCHEMA))
            self._fresh = []
        self._stored_at = time.monotonic()

    def _add(self, row: Row) -> None:
        self._count(row)
        self._fresh.append(row)

    def _count(self, row: Row) -> None:
        sample = records.Sample.of(row)
        self.keys.add(sample.key)
        self.samples.append(sample)
        self.prompt_tokens += row["prompt_tokens"]

    def _take_part(self, key: str) -> None:
        """Count a stored part in. Of one that another pod has stored at the same time, only what is new is kept."""
        data = self.folder.bucket.get(key) or b""
        rows = from_parquet(data)
        fresh = [row for row in rows if key_of(row) not in self.keys]
        if len(fresh) < len(rows):
            for row in fresh:
                self._add(row)
            return
        self.parts.append(Part(key=key.removeprefix(self.folder.key()), sha256=sha256(data), rows=len(rows)))
        for row in rows:
            self._count(row)


def _said(outcome: Outcome) -> Row:
    if isinstance(outcome, Completion):
        tokens, reason, output = outcome.tokens, outcome.finish_reason, outcome.text
    else:
        log.warning("%s was not asked: %s, %s", outcome.name, outcome.reason, outcome.detail)
        tokens, reason, output = 0, outcome.reason, ""
    return {"output": output, "finish_reason": reason, "prompt_tokens": outcome.prompt_tokens, "tokens": tokens}


def grade(grader: Grader, row: Row) -> Grade:
    """The grade of a row's output. Thinking does not count; of an output without an end only a box does, because the
    last number of a sentence that was cut off is no answer."""
    text = read_reply(row["output"]).text
    if row["finish_reason"] in scores.UNFINISHED and find_answer(text).source != "boxed":
        return Grade("", "none", correct=False)
    return grader.grade(row["reference"], text, row["tolerance"] or "")


# --- figures ----------------------------------------------------------------------------------------------------


def _facts(book: Book, total: int, seconds: float) -> StageFacts:
    return StageFacts(
        rows=Rows(total=total, done=len(book.samples)),
        prompt_tokens=book.prompt_tokens,
        generated_tokens=sum(sample.tokens for sample in book.samples),
        seconds=round(seconds, 3),
        metrics=metrics(book.samples),
    )


class Speed:
    """How fast this attempt goes, from when the engine is warm: told to the operator and to the log every few
    seconds."""

    def __init__(self, context: Context, total: int, book: Book, dialogues: Dialogues) -> None:
        self._context, self._total, self._book, self._dialogues = context, total, book, dialogues
        self._before, self._tokens, self._pace = len(book.keys), 0, Pace()
        self._reported = time.monotonic()

    def note(self, outcome: Outcome) -> None:
        self._tokens += outcome.tokens if isinstance(outcome, Completion) else 0
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._reported = time.monotonic()
            self._report()

    def _report(self) -> None:
        done, speed = len(self._book.keys), self._tokens / self._pace.seconds
        eta = self._pace.remaining(done - self._before, self._total - done, under_way=self._dialogues.under_way)
        left = "?" if eta is None else round(eta)
        log.info("%d of %d outputs, %.0f tokens/s, %s s to go", done, self._total, speed, left)
        rows = Rows(total=self._total, done=done)
        self._context.progress.report(self._context.task.stage, rows, tokens_per_second=speed, eta=eta)


if __name__ == "__main__":
    run(main)
