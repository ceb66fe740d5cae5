"""Grades free text against a reference answer, exactly and within a deadline.

`extraction` finds the answer and `compare` decides whether two answers are the same. That may need sympy, which a
hostile expression can make run for ever or take all memory, and math-verify's own time-outs use `signal.alarm`, which
works in main threads only. So `Grader` compares in worker processes. A comparison has a number of seconds of its own
*processor time*, which the kernel counts, so a busy machine gives the same verdicts as an idle one. A missed deadline
or a lost worker is reported in `Grade.grade_error`, never as a wrong answer.
"""

import logging
import multiprocessing
import queue
import resource
import signal
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Self

from cgd_stages.errors import TransientError
from cgd_stages.grading.compare import Verdict, compare, compare_at_once
from cgd_stages.grading.expressions import load
from cgd_stages.grading.extraction import AnswerSource, FoundAnswer, find_answer
from cgd_stages.grading.reference import is_in_words, reference_answer
from cgd_stages.text.references import right_answers

WORKER_MEMORY = 8 << 30
"""The most bytes of address space for a worker: an answer such as 9^{9^{9}} must not exhaust the machine."""
START_SECONDS = 600.0
"""The most seconds until a worker has imported sympy. The deadline of a comparison does not include them."""
STUCK_SECONDS = 600.0
"""The most seconds on the clock for one comparison, whatever processor time it was given."""
START_HINT = "See the pod's log, and raise its memory limit if needed: a worker needs about 300 MB."

UNDECIDED = Verdict(False, "")


@dataclass(frozen=True)
class Grade:
    """The verdict on one output. `correct` is False whenever `grade_error` says why nothing could be decided."""

    extracted: str
    answer_source: AnswerSource
    correct: bool
    rule: str = ""
    """The rule of `compare` that decided. Empty if there was no answer to compare or the grader failed."""
    grade_error: str = ""


# --- comparing, in a worker process -----------------------------------------------------------------------------


def _serve(pipe: Connection, seconds: float) -> None:
    """Run a worker: read a reference, an answer and a tolerance, send a verdict and an error, until the pipe closes.

    The kernel ends it with SIGPROF when a comparison has used its processor time; a handler in Python would wait for
    the end of a multiplication of two huge numbers.
    """
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    load()
    pipe.send("ready")
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reply = compare(*question), ""
        except Exception as error:  # noqa: BLE001 - any failure of the grader is a result to report
            reply = UNDECIDED, f"{type(error).__name__}: {error}"[:200]
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(reply)


class _Worker:
    """A worker process with a deadline. A process that misses it is ended, and the next question starts another.

    It is not a pool of pebble (5.2.3): one in 40 workers that die on a question just taken breaks the whole pool, and
    the other workers' questions are lost.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None

    def ask(self, reference: str, answer: str, tolerance: str) -> tuple[Verdict, str]:
        pipe = self._pipe or self._start()
        try:
            pipe.send((reference, answer, tolerance))
            if not pipe.poll(STUCK_SECONDS):
                self.stop()
                return UNDECIDED, "timeout"
            verdict: tuple[Verdict, str] = pipe.recv()
        except (EOFError, OSError):
            return UNDECIDED, "timeout" if self.stop() == -signal.SIGPROF else "crash"
        return verdict

    def _start(self) -> Connection:
        # Spawned, because a fork of a program with threads and a vLLM engine may deadlock.
        context = multiprocessing.get_context("spawn")
        pipe, worker_pipe = context.Pipe()
        process = context.Process(target=_serve, args=(worker_pipe, self._seconds), daemon=True)
        try:
            process.start()
        except OSError as error:
            pipe.close()
            raise TransientError(f"a worker of the grader does not start: {error}", hint=START_HINT) from error
        finally:
            worker_pipe.close()
        self._pipe, self._process = pipe, process
        try:
            if pipe.poll(START_SECONDS):
                pipe.recv()
                return pipe
            reason = f"it was not ready within {START_SECONDS:g} s"
        except (EOFError, OSError):
            process.join()
            reason = f"it ended with {process.exitcode}"
        self.stop()
        # The fault is this pod's, not the answer's: no other answer could be graded either.
        raise TransientError(f"a worker of the grader does not start: {reason}", hint=START_HINT)

    def stop(self) -> int | None:
        """End the process. Returns its exit code, which is its own if it has ended before."""
        code = None
        if self._pipe and self._process:
            self._pipe.close()
            self._process.join(1.0)
            self._process.kill()
            self._process.join()
            code = self._process.exitcode
        self._pipe = self._process = None
        return code


class Grader:
    """Compares answers in a few worker processes, `seconds` of processor time each. Use it as a context manager."""

    def __init__(self, *, workers: int = 2, seconds: float = 10.0) -> None:
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(seconds) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    def grade(self, reference: str, output: str, tolerance: str = "", *, cut: bool = False) -> Grade:
        """Grade one output; `compare.compare` documents `tolerance`. Of several right answers it needs to have one. In
        an output that was `cut` only a box counts as an answer, because the last number of an unfinished sentence is
        none. Safe to call from several threads."""
        grades = []
        for right_answer in right_answers(reference):
            expected = reference_answer(right_answer)
            answer = find_answer(output, in_words=is_in_words(expected))
            if answer.source == "none" or (cut and answer.source != "boxed"):
                grades.append(Grade("", "none", correct=False))
            else:
                grades.append(self._grade(expected, answer, tolerance))
            if grades[-1].correct:
                return grades[-1]
        return next((grade for grade in grades if grade.grade_error), grades[-1])

    def _grade(self, expected: str, answer: FoundAnswer, tolerance: str) -> Grade:
        if verdict := compare_at_once(expected, answer.text, tolerance):
            return Grade(answer.text, answer.source, verdict.equal, verdict.rule)
        worker = self._idle.get()
        try:
            verdict, error = worker.ask(expected, answer.text, tolerance)
        finally:
            self._idle.put(worker)
        return Grade(answer.text, answer.source, verdict.equal, verdict.rule, error)

    def grade_all(self, pairs: Iterable[tuple[str, str]]) -> list[Grade]:
        """Grade `(reference, output)` pairs, in their order."""
        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(lambda pair: self.grade(*pair), pairs))
