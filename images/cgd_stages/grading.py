"""Grade free text against a reference answer: exactly, out loud, and never for ever.

Finding the answer is ours and pure (`find_answer`, `reference_answer`); deciding whether two expressions are equal
is math-verify's, which parses LaTeX into sympy. Decimals become exact fractions before the comparison, so that
0.333 is not 1/3. Sympy can hang or eat all memory on a hostile expression, and math-verify's own time-outs use
`signal.alarm`, which works in main threads only: `Grader` compares in worker processes with a deadline of its own.
A deadline missed or a worker lost is an outcome of its own (`Grade.grade_error`), never a wrong answer.
"""

import itertools
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
from typing import Any, Literal, Self

AnswerSource = Literal["boxed", "text", "none"]

WORKER_MEMORY = 8 << 30
"""Bytes of address space that a worker may take: an answer such as 9^{9^{9}} must not take the machine."""
START_SECONDS = 120.0
"""A worker imports sympy before its first comparison: seconds, more on a busy machine. No deadline counts them."""


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
    grade_error: str = ""


# --- finding the answer -----------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\d\-])")
_BETWEEN_BOXES = re.compile(r"[\s$.]*(?:\\text\{)?\s*(?:,|;|and|or|,\s*and|,\s*or)\s*\}?[\s$\\(\[]*", re.IGNORECASE)
_ANNOUNCED = re.compile(
    r"(?:answer|result|solution)\s*(?:to [^.:\n]{1,80}?)?(?:\s+is|\s+are|\s*:|\s*=)[\s:]*(?=(?P<answer>[^\n]+))",
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
    r"""The value in a reference: its last `\boxed{}`, what follows `####`, or the whole text."""
    if boxes := _last_boxes(reference):
        return ", ".join(boxes)
    if marks := list(_FINAL_MARK.finditer(reference)):
        return str(marks[-1]["answer"]).strip()
    return reference.strip()


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
    """The value in what follows "the answer is": its first formula, else its first number, else its words."""
    sentence = sentence.replace("**", "").strip()
    formula, numbers = _MATH.search(sentence), _numbers(sentence)
    if formula:
        return next(group for group in formula.groups() if group).strip()
    return numbers[0] if numbers else re.split(r"[.!?](?:\s|$)", sentence)[0].strip(" :`\"'")


def _numbers(text: str) -> list[str]:
    return [match["number"].replace("\u2212", "-").strip() for match in _NUMBER.finditer(text)]


# --- one spelling for one value ---------------------------------------------------------------------------------

_WORDS = r"\\(?:text|mathrm|mbox|textbf|mathbf|textit|operatorname)"
_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r",\s*\\!\s*(?=\d{3}(?!\d))", ","),
        (r"(?<!\\)\\!", ""),
        (r"\{,\}", ","),
        (r",\s*\\[,;:]\s*(?=\d{3}(?!\d))", ","),
        (r"\\\$|\$|\\\(|\\\)|\\\[|\\\]|[\u20ac\u00a3]", ""),
        (r"\u2212", "-"),
        (r"(?<!\\)\\[,;: ]|~|\\(?:displaystyle|limits|qquad|quad)(?![a-zA-Z])", " "),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\(?:left|right)(?![a-zA-Z])", ""),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])|\u00b0", ""),
        (rf"(?<=\d)\s*{_WORDS}\{{\s*(?:and|or)\s*\}}|(?<=[\d\}})])\s+(?:and|or)\s+(?=[\\\d(\-])", ", "),
        (r",\s*,", ","),
        (rf"(?<=[\d\}})])\s*{_WORDS}\s*\{{[a-zA-Z. ]+\}}(?:\s*\^\s*\{{?[23]\}}?)?\s*$", ""),
        (r"_\{(\w+)\}", r"_\1"),
        (r"\\%|\s+percent\b", "%"),
        (r"\s+", " "),
    )
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_PLAIN_UNIT = re.compile(r"(?P<value>[-+]?\d+(?:\.\d+)?(?:/\d+)?) ?[a-zA-Z][a-zA-Z ./\-]+(?:\^\{?[23]\}?)?")
_CHOICE = re.compile(rf"(?:{_WORDS}\{{)?\s*\(?(?P<letter>[A-Z])\)?\s*\}}?")


def spell(expression: str) -> str:
    """One spelling of an answer: no dollar signs, spacing commands, degree signs, thousands commas or trailing unit."""
    for pattern, replacement in _SPELLINGS:
        expression = pattern.sub(replacement, expression)
    expression = expression.strip().rstrip(".,;:").strip()
    if not re.search(r"[(\[{]", expression):  # inside brackets a comma separates: (3,100) is a point
        expression = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), expression)
    unit = _PLAIN_UNIT.fullmatch(expression)
    return unit["value"] if unit else expression


def same_spelling(reference: str, answer: str) -> bool:
    """Whether two answers are the same text but for spacing, text commands and the brackets of a lettered choice."""
    choices = _CHOICE.fullmatch(reference.strip()), _CHOICE.fullmatch(answer.strip())
    if choices[0] and choices[1]:
        return choices[0]["letter"] == choices[1]["letter"]
    return _bare(reference) == _bare(answer) != ""


def _bare(expression: str) -> str:
    return re.sub(r"\s", "", re.sub(rf"{_WORDS}\s*\{{([^{{}}]*)\}}", r"\1", spell(expression)))


# --- comparing, in a worker process -----------------------------------------------------------------------------


def equal(reference: str, answer: str) -> bool:
    """Whether two expressions have exactly the same value. Slow, and sometimes endless: `Grader` sets the deadline.

    A percentage equals both its number and its fraction (25% = 25 = 0.25), because references are written either
    way; nothing else is rounded or scaled.

    Raises:
        Exception: whatever sympy or math-verify make of an expression that they cannot handle.
    """
    if same_spelling(reference, answer):
        return True
    references, answers = _readings(reference), _readings(answer)
    if len(references) == len(answers):
        return _verify(references[0], answers[0])
    return any(_verify(*pair) for pair in itertools.product(references, answers))


def _readings(expression: str) -> list[str]:
    """An expression as math-verify shall read it; a percentage as its number, then as its fraction."""
    expression = spell(expression)
    if not expression.endswith("%"):
        return [expression]
    number = expression.removesuffix("%").strip()
    return [number, rf"\frac{{{number}}}{{100}}"]


def _verify(reference: str, answer: str) -> bool:
    import math_verify

    # The time-outs are None because signal.alarm belongs to main threads; the errors are raised, not swallowed.
    parsed = [
        [
            _exact(value)
            for value in math_verify.parse(
                f"${text}$", fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True
            )
        ]
        for text in (reference, answer)
    ]
    return bool(
        math_verify.verify(
            parsed[0], parsed[1], allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True
        )
    )


def _exact(value: Any) -> Any:
    """A sympy value without floats: math-verify rounds floats to six decimals before it compares them."""
    import sympy  # type: ignore[import-untyped]

    floats = value.atoms(sympy.Float) if hasattr(value, "atoms") else set()
    return value.xreplace({number: sympy.Rational(str(number)) for number in floats}) if floats else value


def _serve(pipe: Connection) -> None:
    """Life of a worker: a pair of expressions in, `(equal, error)` out, until the pipe closes."""
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    _verify("1", "1.0")
    pipe.send("ready")
    while True:
        try:
            reference, answer = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((equal(reference, answer), ""))
        except Exception as error:  # noqa: BLE001 - any failure of the grader is an outcome to be told
            pipe.send((False, f"{type(error).__name__}: {error}"[:200]))


class _Worker:
    """One worker process and its deadline; a process that misses it is killed and replaced at the next question."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None

    def ask(self, reference: str, answer: str) -> tuple[bool, str]:
        try:
            pipe = self._pipe or self._start()
            pipe.send((reference, answer))
            if not pipe.poll(self._seconds):
                self.stop()
                return False, "timeout"
            verdict: tuple[bool, str] = pipe.recv()
        except (EOFError, OSError):
            self.stop()
            return False, "crash"
        return verdict

    def _start(self) -> Connection:
        # Spawned, because the program that grades holds threads and a vLLM engine: a fork of it may deadlock.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_SECONDS):
            raise OSError("the worker does not start")
        self._pipe.recv()
        return self._pipe

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

    def grade(self, reference: str, output: str) -> Grade:
        """Grade one output. Safe to call from several threads."""
        found, expected = find_answer(output), reference_answer(reference)
        if found.source == "none":
            return Grade("", "none", correct=False)
        if same_spelling(expected, found.text):
            return Grade(found.text, found.source, correct=True)
        worker = self._idle.get()
        try:
            correct, error = worker.ask(expected, found.text)
        finally:
            self._idle.put(worker)
        return Grade(found.text, found.source, correct, error)

    def grade_all(self, pairs: Iterable[tuple[str, str]]) -> list[Grade]:
        """Grade `(reference, output)` pairs, in their order."""
        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(lambda pair: self.grade(*pair), pairs))
