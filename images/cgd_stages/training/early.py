"""The early questions of a training: benchmark questions that the student is asked before its training has ended.

The launcher chooses and tokenises them, the processes ask them. Their answers change no weight, so they have no part in
a training's digest. Needs no torch.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from random import Random

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Contract, Early, StopUnless, Train
from cgd_stages.errors import UserError
from cgd_stages.method.prompts import asked, role_messages
from cgd_stages.store.rows import Row
from cgd_stages.training.job import Record

LOOKS = (0.1, 0.25, 0.5)
"""The shares of the steps after which the questions are asked; before the first step they are asked, too."""
EARLY = "early_accuracy"
"""In a record: the share of the early questions that the student answers right after this step."""
BEFORE = "early_accuracy_before"
"""In every record with EARLY, and in that of the first step: the same before the training."""
ASKED = "early_questions"
"""In a record with EARLY: how many questions were asked."""
CUT = "early_cut"
"""In a record: the share of the early outputs that reached their most tokens."""


class EarlyQuestion(Contract):
    """A question as the student reads it, and its reference answer."""

    name: str
    """Its benchmark and id."""
    ids: tuple[int, ...]
    """The tokens of the prompt, up to where the reply begins."""
    reference: str
    tolerance: str = ""


def choose(stored: Iterable[Row], work: Train, early: Early, template: ChatTemplate) -> list[EarlyQuestion]:
    """The early questions, of those that prepare has stored: from each benchmark as many as from the others while it
    has some, the same in every attempt. Raises UserError if no question leaves room for a reply."""
    of_benchmark: dict[str, list[Row]] = defaultdict(list)
    for row in stored:
        if row["benchmark"] in early.instructions:
            of_benchmark[row["benchmark"]].append(row)
    for name, rows in of_benchmark.items():
        Random(f"{work.seed}/early/{name}").shuffle(rows)  # noqa: S311 (an order, not a secret)
    in_turn = (row for row in chain.from_iterable(zip_longest(*of_benchmark.values())) if row)
    chosen: list[EarlyQuestion] = []
    for row in in_turn:
        if len(chosen) == early.questions:
            break
        prompt = asked(row["prompt"], early.instructions[row["benchmark"]])
        ids = template.token_ids(template.render(role_messages("answer", row | {"prompt": prompt})))
        if len(ids) < work.max_sequence_length:
            name, tolerance = f"{row['benchmark']}/{row['id']}", row["tolerance"] or ""
            chosen.append(EarlyQuestion(name=name, ids=tuple(ids), reference=row["reference"], tolerance=tolerance))
    if not chosen:
        raise UserError(
            "no question of the benchmarks leaves room for a reply",
            hint="Raise spec.training.maxSequenceLength, or leave out spec.evaluation.early.",
        )
    return chosen


def write_questions(path: Path, questions: Sequence[EarlyQuestion]) -> None:
    path.write_text("".join(question.to_json() + "\n" for question in questions))


def read_questions(path: Path) -> list[EarlyQuestion]:
    """The questions in the file; none if the launcher has written no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [EarlyQuestion.model_validate_json(line) for line in lines]


def looks(early: Early, steps: int) -> frozenset[int]:
    """The steps, counted from 1, after which the questions are asked. Not the last: the evaluation follows it."""
    shares = (*LOOKS, *([early.stop_unless.after] if early.stop_unless else []))
    return frozenset(step for share in shares if (step := _step(share, steps)) < steps)


def falls_short(records: Sequence[Record], stop: StopUnless, steps: int) -> Record | None:
    """The record of the step that judges the training, if it shows too small a gain; None before that step."""
    after = _step(stop.after, steps)
    judged = next((record for record in records if EARLY in record and record["step"] >= after), None)
    if judged is None or round(judged[EARLY] - judged[BEFORE], 9) >= stop.gain:
        return None
    return judged


def _step(share: float, steps: int) -> int:
    return max(1, math.ceil(round(share * steps, 9)))  # 0.07 * 100 is above 7 in floats
