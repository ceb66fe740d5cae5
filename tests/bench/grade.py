r"""The grader against other graders: `make bench-grade DATA="math500.jsonl gsm8k_test.jsonl"`. Nothing here is a test.

    PYTHONPATH=tests python tests/bench/grade.py [FILE...] [--others N]

Every file holds JSON lines with a worked `solution` and an `answer`, or an `answer` that ends on `#### value`. Every
grader is given (solution, its answer), which it should accept, and (solution, the answer of N other lines), which it
should refuse. Pairs whose answers are the same but for notation are left out; the test for that knows nothing of the
graders. First comes the set that our own tests hold (answer_pairs.py), which was made with our rules in view.

math-verify    `parse` and `verify` as its README has them
MATH           lm-eval's hendrycks_math: `is_equiv` of the last boxes
GSM8K strict   lm-eval's gsm8k filters, made for that benchmark alone: what follows ####
GSM8K flexible the last number
"""

import argparse
import importlib.util
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from support.answer_pairs import DIFFERENT, EQUAL, RULES

from cgd_stages.grading.grader import Grader, reference_answer

Decide = Callable[[str, str], bool]
"""Solution and answer in, accepted out."""

console = Console(highlight=False)


@dataclass(frozen=True)
class Pair:
    solution: str
    answer: str
    own: bool


@dataclass
class Count:
    """What a grader made of some pairs. A grader that fails accepts nothing."""

    accepted: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    failed: int = 0
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--others", type=int, default=5, help="answers of other lines for each solution")
    options = parser.parse_args()
    with Grader(workers=1) as grader:
        compared = {"our own set": own_pairs()}
        compared |= {file.name: list(pairs_of(file, options.others)) for file in options.files}
        for name, pairs in compared.items():
            show(name, pairs, {name: count(decide, pairs) for name, decide in graders(grader).items()})


def own_pairs() -> list[Pair]:
    equals = [*EQUAL, *((one, answer) for _, one, answers, _ in RULES for answer in answers)]
    others = [*DIFFERENT, *((one, answer) for _, one, _, answers in RULES for answer in answers)]
    return [
        Pair(rf"So it is $\boxed{{{answer}}}$.", reference, own=own)
        for own, pairs in ((True, equals), (False, others))
        for reference, answer in pairs
    ]


def pairs_of(file: Path, others: int) -> Iterator[Pair]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    solved = [(line.get("solution", line["answer"]), reference_answer(line["answer"])) for line in lines]
    dice = random.Random(0)
    for solution, answer in solved:
        yield Pair(solution, answer, own=True)
        for _, other in dice.sample(solved, others):
            if notation(other) != notation(answer):
                yield Pair(solution, other, own=False)


def notation(answer: str) -> str:
    """An answer without what is mere notation, so that equal strings are equal values."""
    text = re.sub(r"\\(?:text|mbox)\s*\{[^}]*\}\s*$|\\[!,;:$ %]|\^\\circ|[\s$,{}]|\\left|\\right", "", answer)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"\.0*$", "", text)


def graders(grader: Grader) -> dict[str, Decide]:
    strict, flexible = gsm8k_filters()
    return {
        "cgd": lambda solution, answer: grader.grade(answer, solution).correct,
        "math-verify": math_verify_alone,
        "MATH": hendrycks(),
        "GSM8K strict": strict,
        "GSM8K flexible": flexible,
    }


def math_verify_alone(solution: str, answer: str) -> bool:
    import math_verify

    return bool(math_verify.verify(math_verify.parse(f"${answer}$"), math_verify.parse(solution)))


def lm_eval_tasks() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent / "tasks"


def hendrycks() -> Decide:
    path = lm_eval_tasks() / "hendrycks_math" / "utils.py"
    spec = importlib.util.spec_from_file_location("hendrycks_math_utils", path)
    assert spec
    assert spec.loader
    utils: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)

    def decide(solution: str, answer: str) -> bool:
        boxed = utils.last_boxed_only_string(solution)
        return boxed is not None and bool(utils.is_equiv(utils.remove_boxed(boxed), answer))

    return decide


def gsm8k_filters() -> tuple[Decide, Decide]:
    """The two filters of the task's own file, with its exact match and what that ignores."""
    task = yaml.safe_load((lm_eval_tasks() / "gsm8k" / "gsm8k.yaml").read_text())
    ignored = task["metric_list"][0]["regexes_to_ignore"]
    found = {one["name"]: one["filter"][0] for one in task["filter_list"]}

    def matcher(name: str) -> Decide:
        pattern, pick = re.compile(found[name]["regex_pattern"]), found[name].get("group_select", 0)

        def decide(solution: str, answer: str) -> bool:
            matches = pattern.findall(solution)
            if not matches:
                return False
            taken = matches[pick]
            text = next(group for group in taken if group) if isinstance(taken, tuple) else taken
            for regex in ignored:
                text, answer = re.sub(regex, "", text), re.sub(regex, "", answer)
            return bool(text.strip().lower() == answer.strip().lower())

        return decide

    return matcher("strict-match"), matcher("flexible-extract")


def count(decide: Decide, pairs: list[Pair]) -> Count:
    counted, started = Count(), time.monotonic()
    for pair in pairs:
        try:
            counted.accepted[pair.own] += decide(pair.solution, pair.answer)
        except Exception:  # noqa: BLE001 - some graders raise where they cannot parse; that is a result
            counted.failed += 1
    counted.seconds = time.monotonic() - started
    return counted


def show(name: str, pairs: list[Pair], counts: dict[str, Count]) -> None:
    own = sum(pair.own for pair in pairs)
    others = len(pairs) - own
    table = Table(title=f"{name}: {own} pairs to accept, {others} to refuse")
    for column in ("grader", "accepted", "falsely accepted", "failed", "ms a pair"):
        table.add_column(column, justify="left" if column == "grader" else "right")
    for grader, counted in counts.items():
        table.add_row(
            grader,
            f"{counted.accepted[True]} ({100 * counted.accepted[True] / own:.1f} %)",
            f"{counted.accepted[False]} ({100 * counted.accepted[False] / others:.2f} %)",
            str(counted.failed),
            f"{1000 * counted.seconds / len(pairs):.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
