"""DPO's pairs (Rafailov et al. 2023, arXiv 2305.18290): the refinement is preferred to the student's own answer.

Every row has such a pair for free: y^ is what the teacher made of y'. A row has none where nothing says that y^ is the
better text: both are the same, or the teacher has found y' right.
"""

from dataclasses import dataclass
from typing import Literal

from cgd_stages.chat.example import Example, Unusable, example
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Learned
from cgd_stages.method.examples import conversation, row_example
from cgd_stages.store.rows import Row

NoPair = Literal["same_text", "right_draft", "no_pair"]
DETAILS: dict[NoPair, str] = {
    "same_text": "the refinement is the student's own answer",
    "right_draft": "the teacher has found the student's own answer right",
    "no_pair": "the student's own answer makes no example",
}


@dataclass(frozen=True)
class Pair(Example):
    """The example of the refinement, and the tokens of the one that is not preferred, which has the same context."""

    rejected: tuple[int, ...] = ()


def unpaired(row: Row) -> NoPair | None:
    """Why a row has no pair."""
    if row["answer"].strip() == row["refinement"].strip():
        return "same_text"
    return "right_draft" if row["verdict"] == "right" else None


def pair(template: ChatTemplate, row: Row, *, max_length: int, thinking: Learned = "drop") -> Pair | NoPair:
    """The pair of a row, or why it has none. Raises Unusable where the refinement makes no example.

    An answer that was cut, or loops, has not ended: the end of its turn is no part of it.
    """
    if reason := unpaired(row):
        return reason
    chosen = row_example(template, "RefinedSFT", row, max_length=max_length, thinking=thinking)
    context, _ = conversation("RefinedSFT", row)
    thought = (row.get("answer_thinking") or "") if thinking == "learn" else None
    try:
        rejected = example(template, context, row["answer"], thought=thought, max_length=max_length)
    except Unusable:
        return "no_pair"
    ids = rejected.input_ids
    if row["answer_finish_reason"] not in (None, "stop"):
        ids = ids[: len(ids) - len(template.turn.end)]
    if ids[: chosen.start] != chosen.input_ids[: chosen.start] or len(ids) <= chosen.start:
        return "no_pair"
    return Pair(chosen.input_ids, chosen.labels, chosen.thought, tuple(ids))
