"""Make the quick start's arithmetic word problems: 48 to learn from, 32 others to evaluate on.

    python examples/make_problems.py        writes quickstart-problems.jsonl and quickstart-heldout.jsonl beside itself

Seeded: the same files every time. Every kind of problem is in both files; no problem of one file has the kind and the
numbers of a problem in the other. A line is {"id", "question", "answer"}; the answer is worked and ends in its
value behind "####", as GSM8K writes it.
"""

import json
import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 7
PROBLEMS_PER_KIND = 3
HELDOUT_PER_KIND = 2

NAMES = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Leo",
    "Mia",
    "Noah",
)
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}


@dataclass(frozen=True)
class Kind:
    """A kind of problem. Texts have slots: name, other (another name), thing, and the numbers a, b, c.

    A step such as "a + b" works with numbers of the question and with x, the result of the step before.
    """

    question: str
    told: str
    """The facts that the answer starts from."""
    steps: tuple[str, ...]
    a: range
    b: range
    c: range = range(1, 2)
    things: tuple[str, ...] = ("",)


KINDS = (
    Kind(
        question="{name} has {a} {thing}. {other} gives {name} {b} more. How many {thing} does {name} have now?",
        told="{name} starts with {a} {thing} and gets {b} more.",
        steps=("a + b",),
        a=range(2, 20),
        b=range(2, 10),
        things=("marbles", "stickers", "apples", "shells"),
    ),
    Kind(
        question="{name} has {a} dollars and spends {b} dollars on a {thing}. How many dollars does {name} have left?",
        told="{name} has {a} dollars and pays {b} of them.",
        steps=("a - b",),
        a=range(10, 30),
        b=range(2, 10),
        things=("book", "ticket", "scarf", "sandwich"),
    ),
    Kind(
        question="One {thing} costs {b} dollars. {name} buys {a} of them. How many dollars does {name} pay?",
        told="{name} pays {b} dollars {a} times.",
        steps=("a * b",),
        a=range(2, 6),
        b=range(2, 10),
        things=("notebook", "mug", "ball", "pizza"),
    ),
    Kind(
        question="{a} {thing} are shared equally among {b} children. How many {thing} does each child get?",
        told="The {a} {thing} go to {b} children in equal parts.",
        steps=("a / b",),
        a=range(6, 31),
        b=range(2, 6),
        things=("grapes", "cookies", "pencils", "cards"),
    ),
    Kind(
        question="{name} is {a} years old. {other} is {b} years older than {name}. How old is {other}?",
        told="{other} is {b} years older than {name}, who is {a}.",
        steps=("a + b",),
        a=range(4, 20),
        b=range(2, 10),
    ),
    Kind(
        question="{name} is {a} years old and {other} is {b} years old. How many years older is {name} than {other}?",
        told="The difference of their ages is asked.",
        steps=("a - b",),
        a=range(11, 25),
        b=range(3, 11),
    ),
    Kind(
        question=(
            "{name} walks {a} kilometers in the morning and {b} kilometers in the afternoon. "
            "How many kilometers does {name} walk in all?"
        ),
        told="{name} walks {a} kilometers and then {b} more.",
        steps=("a + b",),
        a=range(2, 12),
        b=range(2, 10),
    ),
    Kind(
        question="A {thing} goes {a} kilometers every hour. How many kilometers does it go in {b} hours?",
        told="It goes {a} kilometers in each of {b} hours.",
        steps=("a * b",),
        a=range(10, 60, 10),
        b=range(2, 5),
        things=("bus", "train", "boat", "truck"),
    ),
    Kind(
        question="There are {a} people on a {thing}. At the next stop {b} people get off and {c} people get on. "
        "How many people are on the {thing} now?",
        told="{a} people, less {b}, and {c} more.",
        steps=("a - b", "x + c"),
        a=range(10, 25),
        b=range(2, 9),
        c=range(2, 9),
        things=("bus", "tram", "ferry"),
    ),
    Kind(
        question="{name} has {a} boxes with {b} {thing} in each box, and {c} more {thing} on the table. "
        "How many {thing} does {name} have in all?",
        told="{a} boxes hold {b} {thing} each, and {c} are on the table.",
        steps=("a * b", "x + c"),
        a=range(2, 5),
        b=range(3, 8),
        c=range(2, 9),
        things=("crayons", "buttons", "markers", "coins"),
    ),
    Kind(
        question="A book has {a} pages. {name} has read {b} pages. How many pages are left to read?",
        told="Of {a} pages {b} are read.",
        steps=("a - b",),
        a=range(20, 60, 5),
        b=range(5, 20, 5),
    ),
    Kind(
        question="A garden has {a} rows with {b} {thing} in each row. How many {thing} are in the garden?",
        told="Each of the {a} rows has {b} {thing}.",
        steps=("a * b",),
        a=range(2, 7),
        b=range(3, 10),
        things=("tulips", "roses", "trees", "cabbages"),
    ),
    Kind(
        question="{name} buys a {thing} for {a} dollars and a cake for {b} dollars, and pays with a {c}-dollar bill. "
        "How many dollars does {name} get back?",
        told="Together they cost {a} and {b} dollars, and {name} pays with {c} dollars.",
        steps=("a + b", "c - x"),
        a=range(2, 10),
        b=range(2, 10),
        c=range(20, 21),
        things=("toy", "kite", "lamp", "pen"),
    ),
    Kind(
        question="{name} bakes {a} {thing} on Monday and {b} {thing} on Tuesday. The family eats {c} of them. "
        "How many {thing} are left?",
        told="{name} bakes {a} and {b} {thing}, and {c} are eaten.",
        steps=("a + b", "x - c"),
        a=range(5, 12),
        b=range(5, 12),
        c=range(2, 9),
        things=("muffins", "rolls", "cookies"),
    ),
    Kind(
        question="{name} has {a} {thing}. {other} has {b} times as many. How many {thing} do they have together?",
        told="{other} has {b} times {a} {thing}, and {name} has {a}.",
        steps=("a * b", "x + a"),
        a=range(2, 9),
        b=range(3, 5),
        things=("marbles", "stamps", "pencils", "shells"),
    ),
    Kind(
        question=(
            "A bag of rice weighs {a} kilograms and a bag of {thing} weighs {b} kilograms. "
            "How many kilograms do the two bags weigh together?"
        ),
        told="The bags weigh {a} and {b} kilograms.",
        steps=("a + b",),
        a=range(3, 20),
        b=range(2, 10),
        things=("flour", "sugar", "beans", "salt"),
    ),
)


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str


def make() -> tuple[list[Problem], list[Problem]]:
    """The problems to learn from and the held-out ones, each in an order that mixes the kinds."""
    rng = random.Random(SEED)
    problems: list[Problem] = []
    heldout: list[Problem] = []
    for kind in KINDS:
        drawn = distinct(kind, rng)
        problems += [next(drawn) for _ in range(PROBLEMS_PER_KIND)]
        heldout += [next(drawn) for _ in range(HELDOUT_PER_KIND)]
    rng.shuffle(problems)
    rng.shuffle(heldout)
    return problems, heldout


def distinct(kind: Kind, rng: random.Random) -> Iterator[Problem]:
    """Problems of a kind, no two with the same numbers."""
    seen: set[tuple[int, int, int]] = set()
    while True:
        numbers = (rng.choice(kind.a), rng.choice(kind.b), rng.choice(kind.c))
        values = dict(zip("abc", numbers, strict=True))
        if numbers not in seen and is_whole(kind, values):
            seen.add(numbers)
            yield write(kind, values, rng)


def is_whole(kind: Kind, values: dict[str, int]) -> bool:
    """Whether every division comes out even and every result is above one, so that plurals are right."""
    values = dict(values)
    for step in kind.steps:
        left, symbol, right = step.split()
        if symbol == "/" and values[left] % values[right]:
            return False
        values["x"] = compute(step, values)
        if values["x"] < 2:
            return False
    return True


def write(kind: Kind, values: dict[str, int], rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "thing": rng.choice(kind.things), **values}
    sentences = [kind.told.format(**words)]
    values = dict(values)
    for step in kind.steps:
        left, symbol, right = step.split()
        result = compute(step, values)
        sentences.append(f"{values[left]} {symbol} {values[right]} = {result}.")
        values["x"] = result
    return Problem(kind.question.format(**words), " ".join(sentences) + f"\n#### {values['x']}")


def compute(step: str, values: dict[str, int]) -> int:
    left, symbol, right = step.split()
    return OPERATIONS[symbol](values[left], values[right])


def to_jsonl(problems: list[Problem], prefix: str) -> str:
    lines = [
        {"id": f"{prefix}-{i:02d}", "question": problem.question, "answer": problem.answer}
        for i, problem in enumerate(problems, 1)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    problems, heldout = make()
    folder = Path(__file__).parent
    (folder / "quickstart-problems.jsonl").write_text(to_jsonl(problems, "problem"))
    (folder / "quickstart-heldout.jsonl").write_text(to_jsonl(heldout, "heldout"))


if __name__ == "__main__":
    main()
