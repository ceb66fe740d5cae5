"""The study's subject: chains of additions and subtractions, worked line by line. Pure: values and texts.

What is 17 + 8 - 9? End with "Answer: N".

17 + 8 = 25
25 - 9 = 16
Answer: 16
"""

import operator
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Sign = Literal["+", "-"]
Arithmetic = Callable[[int, int, Sign], int]
"""How somebody adds and subtracts: a, b and the sign to a result."""

ENDINGS = {"answer": "Answer: {n}", "hashes": "#### {n}", "equals": "Result = {n}", "box": r"\boxed{{{n}}}"}
"""How a question can ask for the last line."""


@dataclass(frozen=True)
class Kind:
    """A kind of problem: the bounds of its numbers, all of them inclusive."""

    name: str
    start: tuple[int, int]
    numbers: tuple[int, int]
    """What is added or subtracted."""
    steps: tuple[int, int]
    largest: int
    """No result lies above it, and none below 0."""


SUMS = Kind("sums", start=(5, 20), numbers=(2, 9), steps=(2, 2), largest=25)
"""Which SmolLM2-135M-Instruct half knows."""
ONES = Kind("ones", start=(2, 9), numbers=(1, 9), steps=(2, 2), largest=20)
TENS = Kind("tens", start=(11, 60), numbers=(11, 39), steps=(1, 1), largest=99)
HUNDREDS = Kind("hundreds", start=(101, 899), numbers=(101, 499), steps=(1, 1), largest=999)
CHAINS = Kind("chains", start=(11, 99), numbers=(2, 9), steps=(3, 5), largest=99)
"""Of the tiny student, which was pre-trained on them."""

_QUESTION = re.compile(r'What is (\d+)((?: [+-] \d+)+)\? End with "(.+)"\.')
_STEP = re.compile(r"([+-]) (\d+)")
_WORKED = re.compile(r"(-?\d+) (?:([+-])|(plus)|(minus)) (-?\d+) (?:=|is) (-?\d+)")


class Unreadable(ValueError):
    """A text that is no question of this study."""


@dataclass(frozen=True)
class Sum:
    """One worked line."""

    a: int
    sign: Sign
    b: int
    result: int

    @property
    def true_result(self) -> int:
        return exact(self.a, self.b, self.sign)

    def text(self, *, words: bool = False) -> str:
        sign = {"+": "plus", "-": "minus"}[self.sign] if words else self.sign
        return f"{self.a} {sign} {self.b} {'is' if words else '='} {self.result}"


@dataclass(frozen=True)
class Problem:
    start: int
    steps: tuple[tuple[Sign, int], ...]
    ending: str
    """A name of ENDINGS."""

    @property
    def question(self) -> str:
        chain = "".join(f" {sign} {n}" for sign, n in self.steps)
        return f'What is {self.start}{chain}? End with "{ENDINGS[self.ending].format(n="N")}".'

    def work(self, arithmetic: Arithmetic, *, before: tuple[Sum, ...] = ()) -> Iterator[Sum]:
        """The lines that follow those before, as somebody with this arithmetic writes them."""
        value = before[-1].result if before else self.start
        for sign, n in self.steps[len(before) :]:
            result = arithmetic(value, n, sign)
            yield Sum(value, sign, n, result)
            value = result

    @property
    def result(self) -> int:
        *_, last = self.work(exact)
        return last.result

    def last_line(self, result: int) -> str:
        return ENDINGS[self.ending].format(n=result)

    def solution(self, sums: tuple[Sum, ...], *, words: bool = False) -> str:
        """The lines, and the last one as the question asks for it."""
        return "\n".join([*(one.text(words=words) for one in sums), self.last_line(sums[-1].result)])

    @property
    def reference(self) -> str:
        """The data set's own solution: right, and all in one line, as nobody in the student's corpus writes it."""
        chain = "".join(f" {one.sign} {one.b} = {one.result}" for one in self.work(exact))
        return f"{self.start}{chain}\n{self.last_line(self.result)}"


def exact(a: int, b: int, sign: Sign) -> int:
    return a + b if sign == "+" else a - b


def without_carry(a: int, b: int, sign: Sign) -> int:
    """A beginner's mistake: every column for itself, what is carried or borrowed is forgotten."""
    if a < 0 or b < 0:
        return exact(a, b, sign)
    columns = operator.add if sign == "+" else operator.sub
    return sum(columns(a // place % 10, b // place % 10) % 10 * place for place in (1, 10, 100, 1000))


def make_problem(dice: random.Random, kind: Kind, endings: tuple[str, ...]) -> Problem:
    """A problem of the kind, whose last line is one of the endings."""
    while True:
        steps = tuple(_step(dice, kind) for _ in range(dice.randint(*kind.steps)))
        problem = Problem(dice.randint(*kind.start), steps, dice.choice(endings))
        if all(0 <= one.result <= kind.largest for one in problem.work(exact)):
            return problem


def _step(dice: random.Random, kind: Kind) -> tuple[Sign, int]:
    return ("+" if dice.random() < 0.5 else "-"), dice.randint(*kind.numbers)


def read_question(question: str) -> Problem:
    """The problem of a question. Raises Unreadable."""
    found = _QUESTION.fullmatch(question)
    endings = {form.format(n="N"): name for name, form in ENDINGS.items()}
    if not found or found[3] not in endings:
        raise Unreadable(question)
    steps: list[tuple[Sign, int]] = [("+" if sign == "+" else "-", int(n)) for sign, n in _STEP.findall(found[2])]
    return Problem(int(found[1]), tuple(steps), endings[found[3]])


def read_sums(answer: str) -> tuple[Sum, ...]:
    """The worked lines of an answer, whatever else stands there."""
    found = [_WORKED.search(line) for line in answer.splitlines()]
    signs: dict[str | None, Sign] = {"+": "+", "-": "-", "plus": "+", "minus": "-"}
    return tuple(Sum(int(one[1]), signs[one[2] or one[3] or one[4]], int(one[5]), int(one[6])) for one in found if one)


def stated(answer: str) -> tuple[str | None, int | None]:
    """The form of the answer's last line (a name of ENDINGS) and the number in it; None where there is none."""
    lines = answer.strip().splitlines()
    for name, form in ENDINGS.items():
        before, after = map(re.escape, form.format(n="\0").split("\0"))
        pattern = rf"{before}(-?\d{{1,9}}){after}"
        if lines and (found := re.fullmatch(pattern, lines[-1].strip())):
            return name, int(found[1])
    return None, None
