"""Grade free text against a reference answer: exactly, out loud, and never for ever.

Finding the answer is pure (`find_answer`, `reference_answer`); whether it is the reference's is `compare`'s to say.
That ends in sympy, which can hang or eat all memory on a hostile expression, and math-verify's own time-outs use
`signal.alarm`, which works in main threads only: `Grader` compares in worker processes with a deadline of its own.
A deadline missed or a worker lost is an outcome of its own (`Grade.grade_error`), never a wrong answer.
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

AnswerSource = Literal["boxed", "text", "none"]

WORKER_MEMORY = 8 << 30
"""Bytes of address space that a worker may take: an answer such as 9^{9^{9}} must not take the machine."""
START_SECONDS = 120.0
"""A worker imports sympy before its first comparison: seconds, more on a busy machine. No deadline counts them."""
START_HINT = "See the pod's log, and its limits: a worker needs some 300 MB of memory."

UNDECIDED = Verdict(False, "")


@dataclass(frozen=True)
class Found:
    """What was taken as the answer, and from where."""

    text: str
    source: AnswerSource


@dataclass(frozen=True)
class Grade:
    """The verdict on one output. `correct` is False whenever `grade_error` says why nothing could be decided."""

    extracted: str
    answer_source: AnswerSource
    correct: bool
    rule: str = ""
    """What decided: see `compare`. Empty where there was nothing to compare, or the grader failed."""
    grade_error: str = ""


# --- finding the answer -----------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\d\-])")
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


def find_answer(output: str) -> Found:
    """The answer that a text ends on: its last box, else what it announces as the answer, else its last number.

    Several boxes joined by a comma, "and" or "or" are one answer with several values. `source` keeps the
    difference, so that an answer guessed from the last number is never mistaken for one that was marked.
    """
    if boxes := _last_boxes(output):
        return Found(", ".join(boxes), "boxed")
    for pattern in (_FINAL_MARK, _ANNOUNCED):
        if announced := list(pattern.finditer(output)):
            return Found(_leading_value(announced[-1]["answer"]), "text")
    if numbers := _numbers(output):
        return Found(numbers[-1], "text")
    return Found("", "none")


def reference_answer(reference: str) -> str:
    r"""The value in a reference: its last `\boxed{}`, what follows `####`, or the whole text. A JSON list of texts, as
    data sets on the hub have it, is several values."""
    if listed := _json_texts(reference):
        return ", ".join(listed)
    if boxes := _last_boxes(reference):
        return ", ".join(boxes)
    if marks := list(_FINAL_MARK.finditer(reference)):
        return str(marks[-1]["answer"]).strip()
    return reference.strip()


def _json_texts(reference: str) -> list[str]:
    """The members of a JSON list of nothing but texts; `[1, 2]` is an interval."""
    if not re.match(r"\s*\[\s*\"", reference):
        return []
    try:
        found = json.loads(reference)
    except ValueError:
        return []
    return found if all(isinstance(one, str) for one in found) else []


def _last_boxes(text: str) -> list[str]:
    """Contents of the last box, and of those that lead up to it with only a conjunction between."""
    last: list[str] = []
    following: int | None = None
    for start, end, content in reversed(list(_boxes(text))):
        if following is not None and not _BETWEEN_BOXES.fullmatch(text, end, following):
            break
        last.insert(0, content)
        following = start
    return last


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and content of every box that is closed and not empty; an inner box belongs to the outer one."""
    position = 0
    while match := _BOX.search(text, position):
        position = match.end()
        end = _closing_brace(text, position) if text[position] == "{" else position
        if end is None:
            continue
        content = text[position + 1 : end] if text[position] == "{" else _bare_box(text, position)
        position = end + 1
        if content.strip():
            yield match.start(), position, _BOX.sub("", content).strip()


def _bare_box(text: str, start: int) -> str:
    r"""`\boxed 5`: TeX takes one token; models mean the number."""
    match = re.compile(r"-?\d+(?:\.\d+)?").match(text, start)
    return match[0] if match else ""


def _closing_brace(text: str, opening: int) -> int | None:
    depth = 0
    for index in range(opening, len(text)):
        if text[index] in "{}" and text[index - 1] != "\\":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return index
    return None


def _leading_value(sentence: str) -> str:
    """The value in what follows "the answer is": its first formula, else its first number, with those that "and" or a
    comma join to it; else its words."""
    sentence = sentence.replace("**", "").strip()
    if formulas := _joined(list(_MATH.finditer(sentence)), sentence):
        return ", ".join(next(group for group in match.groups() if group).strip() for match in formulas)
    if numbers := _joined(list(_NUMBER.finditer(sentence)), sentence):
        return ", ".join(_plain(match) for match in numbers)
    return re.split(r"[.!?](?:\s|$)", sentence)[0].strip(" :`\"'")


def _joined(matches: list[re.Match[str]], sentence: str) -> list[re.Match[str]]:
    """The first match and those that follow it with only a conjunction between."""
    found = matches[:1]
    for match in matches[1:]:
        if not _BETWEEN_VALUES.fullmatch(sentence, found[-1].end(), match.start()):
            break
        found.append(match)
    return found


def _numbers(text: str) -> list[str]:
    return [_plain(match) for match in _NUMBER.finditer(text)]


def _plain(match: re.Match[str]) -> str:
    return match["number"].replace("\u2212", "-").strip()


# --- comparing, in a worker process -----------------------------------------------------------------------------


def _serve(pipe: Connection) -> None:
    """Life of a worker: reference, answer and tolerance in, verdict and error out, until the pipe closes."""
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
        except Exception as error:  # noqa: BLE001 - any failure of the grader is an outcome to be told
            pipe.send((UNDECIDED, f"{type(error).__name__}: {error}"[:200]))


class _Worker:
    """One worker process and its deadline; a process that misses it is killed and replaced at the next question.

    Not a pool of pebble's (5.2.3): of workers that die on the question that they have just taken, one in 40 breaks it
    as a whole, and the others' questions with it.
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
        # Spawned, because the program that grades holds threads and a vLLM engine: a fork of it may deadlock.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        try:
            if self._pipe.poll(START_SECONDS):
                self._pipe.recv()
                return self._pipe
            reason = f"it was not ready within {START_SECONDS:g} s"
        except (EOFError, OSError):
            self._process.join()
            reason = f"it ended with {self._process.exitcode}"
        self.stop()
        # A reason of this pod's, not of the answer: every other would be left ungraded as well.
        raise TransientError(f"a worker of the grader does not start: {reason}", hint=START_HINT)

    def stop(self) -> None:
        if self._pipe and self._process:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._pipe = self._process = None


class Grader:
    """A few worker processes that compare answers. Use it as a context manager."""

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
        """Grade one output. `tolerance` as `compare.compare` has it. Safe to call from several threads."""
        found, expected = find_answer(output), reference_answer(reference)
        if found.source == "none":
            return Grade("", "none", correct=False)
        if same_spelling(expected, found.text):
            return Grade(found.text, found.source, correct=True, rule="spelling")
        worker = self._idle.get()
        try:
            verdict, error = worker.ask(expected, found.text, tolerance)
        finally:
            self._idle.put(worker)
        return Grade(found.text, found.source, verdict.equal, verdict.rule, error)

    def grade_all(self, pairs: Iterable[tuple[str, str]]) -> list[Grade]:
        """Grade `(reference, output)` pairs, in their order."""
        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(lambda pair: self.grade(*pair), pairs))
