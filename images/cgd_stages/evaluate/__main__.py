"""Ask a model every benchmark question, with nothing else in view, and grade its outputs.

    CGD_TASK='{...}' python -m cgd_stages.evaluate

The model sees the question and, after a blank line, the benchmark's instruction; no draft, no critique, no reference.
Each sample of each question becomes one row, with the output, the extracted answer and the grade. A rival lets the
model criticise its own answer and give another. The program may be interrupted at any moment: the next attempt asks
only for outputs that are not stored.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Evaluate, RivalKind, Rows, StageFacts
from cgd_stages.engines.base import Completion, Engine, Reply, drive
from cgd_stages.engines.vllm import VllmEngine
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.evaluate.multi_pass import Dialogue, Dialogues
from cgd_stages.grading.grader import Grade, Grader
from cgd_stages.method import prompts
from cgd_stages.method.prompts import answer_messages, asked
from cgd_stages.models import resolve
from cgd_stages.results import scores
from cgd_stages.results.model import Key
from cgd_stages.results.outputs import SCHEMA, Totals
from cgd_stages.runtime.pace import Pace
from cgd_stages.runtime.program import Context, run, storing
from cgd_stages.store.benchmarks import read_benchmarks
from cgd_stages.store.folder import Folder
from cgd_stages.store.part_writer import PartWriter
from cgd_stages.store.rows import Row, digest_of
from cgd_stages.store.run import Product

log = logging.getLogger(__name__)

REPORT_SECONDS = 3.0
GRADERS = 2
GRADE_SECONDS = 10.0
UNGRADED_ROWS = 512
"""The most answers that wait for the grader; when there are more, the engine waits."""


def main(context: Context) -> dict[str, StageFacts]:
    context.store = context.store.waiting(context.stop)
    work, stage = context.work_of(Evaluate), context.task.stage
    questions = _questions(context, work)

    def evaluate(folder: Folder) -> Product:
        clock, totals = time.monotonic(), Totals()
        writer = PartWriter(folder, SCHEMA, count=totals.add, key=key_of)
        writer.recover()
        settings = _ask(context, work, questions, writer)
        facts = context.facts[stage] = totals.facts(len(questions), time.monotonic() - clock)
        if not len(questions) == len(totals.samples) == writer.stored_rows:
            graded, stored = len(totals.samples), writer.stored_rows
            raise RowsLost(f"{stage}: {len(questions)} questions, {graded} graded, {stored} stored")
        return Product(facts, writer.parts, settings)

    done = context.store.produce(stage, _inputs(context, work, questions), evaluate)
    for name, value in sorted(done.facts.metrics.items()):
        log.info("%s: %g", name, value)
    return {stage: done.facts}


def _questions(context: Context, work: Evaluate) -> list[Row]:
    """The questions that prepare has stored, with the prompt that the model reads; one row for each sample."""
    stored = read_benchmarks(context.store.input("prepare"))
    benchmarks = {benchmark.name: benchmark for benchmark in work.benchmarks}
    missing = benchmarks.keys() - {row["benchmark"] for row in stored}
    if missing:
        raise UserError(
            f"prepare has stored no questions of {', '.join(sorted(missing))}",
            hint="Delete the run and apply it again: its evaluation does not belong to its preparation.",
        )
    questions: list[Row] = []
    for row in stored:
        if benchmark := benchmarks.get(row["benchmark"]):
            row["prompt"] = asked(row["prompt"], benchmark.instruction)  # one text in memory for all samples
            questions += [row | {"sample": sample} for sample in range(benchmark.samples)]
    return questions


def _inputs(context: Context, work: Evaluate, questions: list[Row]) -> dict[str, Any]:
    model = resolve.resolve(resolve.pinned(work.model, context.store), context.store)
    inputs: dict[str, Any] = _template(context, work).identity() | {
        "stage": context.task.stage,
        "model": model.identity(),
        "questions": digest_of(rows=questions, frame=answer_messages("{x}")),
        "sampling": work.sampling.identity(),
        "engine": work.engine.identity(),
    }
    if work.rival:
        inputs["rival"] = work.rival.identity() | {"prompts": _further_prompts(work.rival.kind)}
    return inputs


def _further_prompts(kind: RivalKind) -> list[Any]:
    """What the model is asked after its first answer."""
    critique = prompts.fingerprint("critique")
    match kind:
        case "SelfRefine":
            return [critique, prompts.fingerprint("refine")]
        case "Reflexion":
            return [critique, prompts.retry_messages("{x}", ["{c}"])]
        case "BestOfN":
            return [critique]
        case "Majority":
            return []


# --- asking -----------------------------------------------------------------------------------------------------


def _ask(context: Context, work: Evaluate, questions: list[Row], writer: PartWriter) -> dict[str, Any]:
    """Ask all questions whose output is not stored, and store the rows. Returns the engine's settings."""
    waiting = [question for question in questions if key_of(question) not in writer]
    log.info("%d outputs to make, %d of them are stored", len(questions), len(questions) - len(waiting))
    if not waiting:
        writer.flush()  # rows taken over from a part that is not listed may wait
        return {}
    engine = _engine(context, work)
    dialogues = Dialogues(((name_of(question), question) for question in waiting), work.sampling, work.rival)
    with Grader(workers=GRADERS, seconds=GRADE_SECONDS) as grader, ThreadPoolExecutor(GRADERS) as threads:
        grading = Grading(writer, lambda row: threads.submit(grade, grader, row))
        speed = Speed(context, len(questions), grading, dialogues)
        with context.holding(), storing(grading.flush):
            for reply in drive(engine, dialogues.take, context.stop, on_step=grading.store_when_due):
                if ended := dialogues.note(reply):
                    grading.take(ended)
                speed.note(reply)
    context.check()
    engine.close()
    return engine.settings


def _engine(context: Context, work: Evaluate) -> Engine:
    fetch = partial(resolve.fetch_pinned, store=context.store, scratch=context.scratch)
    return VllmEngine(fetch(work.model), resolve.with_drafts(work.engine, fetch), _template(context, work))


def _template(context: Context, work: Evaluate) -> ChatTemplate:
    return resolve.spoken(resolve.pinned(work.model, context.store), work.chat, context.store, context.scratch)


def key_of(row: Row) -> Key:
    return row["benchmark"], row["id"], row["sample"]


def name_of(row: Row) -> str:
    return f"{row['benchmark']}/{row['id']}/{row['sample']}"


# --- grading ----------------------------------------------------------------------------------------------------


class Grading:
    """Takes answers through the grader to the writer, in the order in which they came."""

    def __init__(self, writer: PartWriter, submit: Callable[[Row], Future[Grade]]) -> None:
        self._writer, self._submit = writer, submit
        self._under_way: deque[tuple[Row, Future[Grade]]] = deque()

    @property
    def answered(self) -> int:
        """Questions that have an answer, graded or not."""
        return len(self._writer.kept) + len(self._under_way)

    def take(self, dialogue: Dialogue) -> None:
        """Submit one answer to the grader. An output that the engine refused to make is graded too, as empty."""
        reply = dialogue.reply
        if isinstance(reply, Completion):
            tokens, reason, output, thinking = reply.tokens, reply.finish_reason, reply.text, reply.thinking
        else:
            log.warning("%s was not asked: %s, %s", reply.name, reply.reason, reply.detail)
            tokens, reason, output, thinking = 0, reply.reason, "", ""
        row = dialogue.question | {
            "output": output,
            "finish_reason": reason,
            "prompt_tokens": reply.prompt_tokens,
            "tokens": tokens,
            "passes": dialogue.passes,
            "thinking": thinking or None,
        }
        unfinished = isinstance(reply, Completion) and reply.unfinished_thinking
        self._under_way.append((row, _no_answer() if unfinished else self._submit(row)))

    def store_when_due(self) -> None:
        while self._under_way and (self._under_way[0][1].done() or len(self._under_way) >= UNGRADED_ROWS):
            self._keep_first()
        if self._writer.due:
            self._writer.try_flush()

    def flush(self) -> None:
        """Wait for the grader, and store all answers."""
        while self._under_way:
            self._keep_first()
        self._writer.flush()

    def _keep_first(self) -> None:
        row, grade = self._under_way.popleft()
        self._writer.keep(row | vars(grade.result()))


def _no_answer() -> Future[Grade]:
    """The grade of an output whose thought has no end."""
    grade: Future[Grade] = Future()
    grade.set_result(Grade("", "unfinished_thought", correct=False))
    return grade


def grade(grader: Grader, row: Row) -> Grade:
    """The grade of a row's output."""
    cut = row["finish_reason"] in scores.UNFINISHED
    return grader.grade(row["reference"], row["output"], row["tolerance"] or "", cut=cut)


# --- progress ---------------------------------------------------------------------------------------------------


class Speed:
    """How fast this attempt goes, counted from the moment when the engine is warm. It is reported to the operator and
    logged every `REPORT_SECONDS`."""

    def __init__(self, context: Context, total: int, grading: Grading, dialogues: Dialogues) -> None:
        self._context, self._total, self._grading, self._dialogues = context, total, grading, dialogues
        self._before, self._tokens, self._pace = grading.answered, 0, Pace()
        self._reported = time.monotonic()

    def note(self, reply: Reply) -> None:
        self._tokens += reply.tokens if isinstance(reply, Completion) else 0
        if time.monotonic() - self._reported < REPORT_SECONDS:
            return
        self._reported = time.monotonic()
        done, speed = self._grading.answered, self._tokens / self._pace.seconds
        eta = self._pace.remaining(done - self._before, self._total - done, under_way=self._dialogues.under_way)
        left = "?" if eta is None else round(eta)
        log.info("%d of %d outputs, %.0f tokens/s, %s s to go", done, self._total, speed, left)
        rows = Rows(total=self._total, done=done)
        self._context.progress.report(self._context.task.stage, rows, tokens_per_second=speed, eta=eta)


if __name__ == "__main__":
    run(main)
