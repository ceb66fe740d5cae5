"""Grades free text against a reference answer, exactly and within a deadline.

`find_answer` and `reference_answer` are pure; `compare` decides whether the two answers are the same. It uses sympy,
which a hostile expression can make run for ever or take all memory, and math-verify's own time-outs use `signal.alarm`,
which works in main threads only. So `Grader` compares in worker processes, with its own deadline. A missed deadline or
a lost worker is reported in `Grade.grade_error`, never as a wrong answer.
"""

import json
import logging
import multiprocessing
import queue
import re
import resource
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Literal, Self

from cgd_stages.errors import TransientError
from cgd_stages.grading.compare import Verdict, compare, same_spelling, same_value
from cgd_stages.text.references import right_answers

AnswerSource = Literal["boxed", "text", "none", "unfinished_thought"]

WORKER_MEMORY = 8 << 30
"""The most bytes of address space for a worker: an answer such as 9^{9^{9}} must not exhaust the machine."""
START_SECONDS = 120.0
"""The most seconds until a worker has imported sympy. The deadline of a comparison does not include them."""
START_HINT = "See the pod's log, and raise its memory limit if needed: a worker needs about 300 MB."

UNDECIDED = Verdict(False, "")


@dataclass(frozen=True)
class FoundAnswer:
    """The answer in an output, and where it was found."""

    text: str
    source: AnswerSource


@dataclass(frozen=True)
class Grade:
    """The verdict on one output. `correct` is False whenever `grade_error` says why nothing could be decided."""

    extracted: str
    answer_source: AnswerSource
    correct: bool
    rule: str = ""
    """The rule of `compare` that decided. Empty if there was no answer to compare or the grader failed."""
    grade_error: str = ""


# --- finding the answer -----------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\d\-])")
_BARE_BOX = re.compile(r"-?\d+(?:\.\d+)?")
_BETWEEN_BOXES = re.compile(r"[\s$.]*(?:\\text\{)?\s*(?:,|;|and|or|,\s*and|,\s*or)\s*\}?[\s$\\(\[]*", re.IGNORECASE)
_BETWEEN_VALUES = re.compile(r"\s*(?:,|;|,?\s*\b(?:and|or)\b)\s*", re.IGNORECASE)
_ANNOUNCED = re.compile(
    r"(?:answer|result|solution)s?\s*(?:to [^.:\n]{1,80}?)?(?:\s+is|\s+are|\s*:|\s*=)[\s:]*(?=(?P<answer>[^\n]+))",
    re.IGNORECASE,
)
_FINAL_MARK = re.compile(r"####\s*(?P<answer>[^\n]+)")
_MATH = re.compile(r"(?<!\\)\$\$?(?P<dollar>(?:\\.|[^$\\\n])+)\$\$?|\\\((?P<paren>.+?)\\\)|\\\[(?P<bracket>.+?)\\\]")
_NUMBER = re.compile(
    r"(?<![\w.])(?P<number>[-+\u2212]?\s?[$\u20ac\u00a3]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))"
    r"(?:\s*/\s*\d+)?(?:\s*(?:%|percent\b))?)"
)


def find_answer(output: str) -> FoundAnswer:
    """The answer at the end of a text: its last box, else the value that it announces, else its last number.

    Several boxes joined by a comma, "and" or "or" are one answer with several values. `source` tells a boxed answer
    from one that was found in the words.
    """
    if boxes := _last_boxes(output):
        return FoundAnswer(", ".join(boxes), "boxed")
    for pattern in (_FINAL_MARK, _ANNOUNCED):
        if announcements := list(pattern.finditer(output)):
            return FoundAnswer(_leading_value(announcements[-1]["answer"]), "text")
    if numbers := list(_NUMBER.finditer(output)):
        return FoundAnswer(_plain(numbers[-1]), "text")
    return FoundAnswer("", "none")


def reference_answer(reference: str) -> str:
    r"""The value in a reference: its last `\boxed{}`, the text after `####`, or the whole text. A JSON list of texts,
    which a source with `several: all` has, holds several values; a list of numbers such as `[1, 2]` is an interval."""
    if re.match(r"\s*\[\s*\"", reference):
        try:
            values = json.loads(reference)
        except ValueError:
            values = []
        if values and all(isinstance(value, str) for value in values):
            return ", ".join(values)
    if boxes := _last_boxes(reference):
        return ", ".join(boxes)
    if marks := list(_FINAL_MARK.finditer(reference)):
        return str(marks[-1]["answer"]).strip()
    return reference.strip()


def _last_boxes(text: str) -> list[str]:
    """The contents of the last box, and of the boxes before it that only a conjunction separates."""
    contents: list[str] = []
    next_start: int | None = None
    for start, end, content in reversed(list(_boxes(text))):
        if next_start is not None and not _BETWEEN_BOXES.fullmatch(text, end, next_start):
            break
        contents.insert(0, content)
        next_start = start
    return contents


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    r"""The start, end and content of every box that is closed and not empty. An inner box is part of the outer one.

    In `\boxed 5`, TeX takes one token; models mean the number.
    """
    position = 0
    while match := _BOX.search(text, position):
        position = match.end()
        braced = text[position] == "{"
        end = _closing_brace(text, position) if braced else position
        if end is None:
            continue
        number = None if braced else _BARE_BOX.match(text, position)
        content = text[position + 1 : end] if braced else number[0] if number else ""
        position = end + 1
        if content.strip():
            yield match.start(), position, _BOX.sub("", content).strip()


def _closing_brace(text: str, opening: int) -> int | None:
    """The place of the brace that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        if text[index] in "{}" and text[index - 1] != "\\":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return index
    return None


def _leading_value(sentence: str) -> str:
    """The value after "the answer is": the first formula, else the first number, each with those that "and" or a comma
    joins to it, else the words."""
    sentence = sentence.replace("**", "").strip()
    if formulas := _joined(list(_MATH.finditer(sentence)), sentence):
        return ", ".join(next(group for group in match.groups() if group).strip() for match in formulas)
    if numbers := _joined(list(_NUMBER.finditer(sentence)), sentence):
        return ", ".join(_plain(match) for match in numbers)
    return re.split(r"[.!?](?:\s|$)", sentence)[0].strip(" :`\"'")


def _joined(matches: list[re.Match[str]], sentence: str) -> list[re.Match[str]]:
    """The first match, and the next ones that only a conjunction separates."""
    joined = matches[:1]
    for match in matches[1:]:
        if not _BETWEEN_VALUES.fullmatch(sentence, joined[-1].end(), match.start()):
            break
        joined.append(match)
    return joined


def _plain(match: re.Match[str]) -> str:
    return match["number"].replace("\u2212", "-").strip()


# --- comparing, in a worker process -----------------------------------------------------------------------------


def _serve(pipe: Connection) -> None:
    """Run a worker: read a reference, an answer and a tolerance, send a verdict and an error, until the pipe closes."""
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    same_value("1", "1.0")
    pipe.send("ready")
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((compare(*question), ""))
        except Exception as error:  # noqa: BLE001 - any failure of the grader is a result to report
            pipe.send((UNDECIDED, f"{type(error).__name__}: {error}"[:200]))


class _Worker:
    """A worker process with a deadline. A process that misses it is killed, and the next question starts another.

    It is not a pool of pebble (5.2.3): one in 40 workers that die on a question just taken breaks the whole pool, and
    the other workers' questions are lost.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None

    def ask(self, reference: str, answer: str, tolerance: str) -> tuple[Verdict, str]:
        try:
            pipe = self._pipe or self._start()
            pipe.send((reference, answer, tolerance))
            if not pipe.poll(self._seconds):
                self.stop()
                return UNDECIDED, "timeout"
            verdict: tuple[Verdict, str] = pipe.recv()
        except (EOFError, OSError):
            self.stop()
            return UNDECIDED, "crash"
        return verdict

    def _start(self) -> Connection:
        # Spawned, because a fork of a program with threads and a vLLM engine may deadlock.
        context = multiprocessing.get_context("spawn")
        self._pipe, worker_pipe = context.Pipe()
        self._process = context.Process(target=_serve, args=(worker_pipe,), daemon=True)
        self._process.start()
        worker_pipe.close()
        try:
            if self._pipe.poll(START_SECONDS):
                self._pipe.recv()
                return self._pipe
            reason = f"it was not ready within {START_SECONDS:g} s"
        except (EOFError, OSError):
            self._process.join()
            reason = f"it ended with {self._process.exitcode}"
        self.stop()
        # The fault is this pod's, not the answer's: no other answer could be graded either.
        raise TransientError(f"a worker of the grader does not start: {reason}", hint=START_HINT)

    def stop(self) -> None:
        if self._pipe and self._process:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._pipe = self._process = None


class Grader:
    """Compares answers in a few worker processes. Use it as a context manager."""

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

    def grade(self, reference: str, output: str, tolerance: str = "") -> Grade:
        """Grade one output; `compare.compare` documents `tolerance`. Of several right answers it needs to have one.
        Safe to call from several threads."""
        answer = find_answer(output)
        if answer.source == "none":
            return Grade("", "none", correct=False)
        grades = []
        for right_answer in right_answers(reference):
            grades.append(self._grade(reference_answer(right_answer), answer, tolerance))
            if grades[-1].correct:
                return grades[-1]
        return next((grade for grade in grades if grade.grade_error), grades[-1])

    def _grade(self, expected: str, answer: FoundAnswer, tolerance: str) -> Grade:
        if same_spelling(expected, answer.text):
            return Grade(answer.text, answer.source, correct=True, rule="spelling")
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
