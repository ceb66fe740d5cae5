"""The quick start's problems: the committed files are what the script makes, and every reference is right."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PROBLEMS = EXAMPLES / "quickstart-problems.jsonl"
HELDOUT = EXAMPLES / "quickstart-heldout.jsonl"

# Read off the questions' words, not off the script: what the numbers of a question, in their order, come to.
SOLVERS: dict[str, Callable[..., int]] = {
    r"has (\d+) \w+\. \w+ gives \w+ (\d+) more": lambda a, b: a + b,
    r"has (\d+) dollars and spends (\d+) dollars": lambda a, b: a - b,
    r"costs (\d+) dollars\. \w+ buys (\d+) of them": lambda a, b: a * b,
    r"^(\d+) \w+ are shared equally among (\d+) children": lambda a, b: a // b,
    r"is (\d+) years old\. \w+ is (\d+) years older": lambda a, b: a + b,
    r"is (\d+) years old and \w+ is (\d+) years old": lambda a, b: a - b,
    r"walks (\d+) kilometers in the morning and (\d+) kilometers": lambda a, b: a + b,
    r"goes (\d+) kilometers every hour\..* in (\d+) hours": lambda a, b: a * b,
    r"are (\d+) people.* (\d+) people get off and (\d+) people get on": lambda a, b, c: a - b + c,
    r"has (\d+) boxes with (\d+) \w+ in each box, and (\d+) more": lambda a, b, c: a * b + c,
    r"has (\d+) pages\. \w+ has read (\d+) pages": lambda a, b: a - b,
    r"has (\d+) rows with (\d+) \w+ in each row": lambda a, b: a * b,
    r"for (\d+) dollars and a cake for (\d+) dollars, and pays with a (\d+)-dollar": lambda a, b, c: c - a - b,
    r"bakes (\d+) \w+ on Monday and (\d+) \w+ on Tuesday.* eats (\d+) of them": lambda a, b, c: a + b - c,
    r"has (\d+) \w+\. \w+ has (\d+) times as many": lambda a, b: a + a * b,
    r"rice weighs (\d+) kilograms and a bag of \w+ weighs (\d+) kilograms": lambda a, b: a + b,
}


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def solve(question: str) -> tuple[str, int]:
    """The one pattern that fits the question, and what it comes to."""
    fitting = [(pattern, match) for pattern in SOLVERS if (match := re.search(pattern, question))]
    assert len(fitting) == 1, question
    pattern, match = fitting[0]
    return pattern, SOLVERS[pattern](*map(int, match.groups()))


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "make_problems.py"))


@pytest.fixture(scope="module")
def everything() -> list[dict[str, str]]:
    return read(PROBLEMS) + read(HELDOUT)


def test_the_files_are_what_the_script_makes(script: dict[str, Any]) -> None:
    problems, heldout = script["make"]()
    assert PROBLEMS.read_text() == script["to_jsonl"](problems, "problem")
    assert HELDOUT.read_text() == script["to_jsonl"](heldout, "heldout")


def test_there_are_48_problems_to_learn_from_and_32_held_out() -> None:
    assert (len(read(PROBLEMS)), len(read(HELDOUT))) == (48, 32)


def test_every_reference_ends_in_the_value_that_the_question_asks_for(everything: list[dict[str, str]]) -> None:
    for row in everything:
        _, value = solve(row["question"])
        assert row["answer"].endswith(f"\n#### {value}"), row


def test_every_step_of_a_reference_is_right(everything: list[dict[str, str]]) -> None:
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}
    for row in everything:
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", row["answer"])
        assert 1 <= len(steps) <= 2, row
        for left, symbol, right, result in steps:
            assert operations[symbol](int(left), int(right)) == int(result), row
        assert steps[-1][-1] == re.findall(r"\d+", row["answer"])[-1]


def test_no_question_and_no_id_comes_twice(everything: list[dict[str, str]]) -> None:
    assert len({row["question"] for row in everything}) == len({row["id"] for row in everything}) == len(everything)


def test_no_held_out_question_asks_for_numbers_that_were_learnt() -> None:
    def kind_and_numbers(row: dict[str, str]) -> tuple[str, ...]:
        return solve(row["question"])[0], *re.findall(r"\d+", row["question"])

    assert {kind_and_numbers(row) for row in read(PROBLEMS)}.isdisjoint(map(kind_and_numbers, read(HELDOUT)))


def test_every_kind_of_problem_is_in_both_files() -> None:
    for path in (PROBLEMS, HELDOUT):
        assert {solve(row["question"])[0] for row in read(path)} == set(SOLVERS)
