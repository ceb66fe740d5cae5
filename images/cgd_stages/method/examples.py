"""The objectives: which texts of a stored row are context, and which is the target.

`conversation` is the table of all objectives. `chat.example` makes the tokens and labels of an example from it.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from cgd_stages.chat.example import Example, Unusable, example
from cgd_stages.chat.messages import Message, plain
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Critique, InstructionTurn, Learned, Lesson, Objective, Supervised
from cgd_stages.method.prompts import (
    GENERIC,
    answer_messages,
    cft_context,
    earlier_turns,
    training_context,
    verdict,
    with_verdict,
)
from cgd_stages.store.rows import Key, Row, key_of
from cgd_stages.text.references import right_answers


def conversation(
    objective: Supervised, row: Row, instruction_turn: InstructionTurn = "user"
) -> tuple[list[Message], str | None]:
    """The context and the target of a row, in which the supervised objectives differ; None: the row has no target.

    A context of x alone is the one that evaluation uses. If the critique is None, CGD's context has no slot for it. Of
    several right answers SFT learns the first.
    """
    x, turns = row["prompt"], earlier_turns(row)
    match objective:
        case "CGD":
            draft, critique = row["answer"], row["critique"]
            context = training_context(x, draft, critique, turns=turns, instruction_turn=instruction_turn)
            return context, row["refinement"]
        case "CFT":
            return cft_context(x, row["answer"], turns=turns, instruction_turn=instruction_turn), row["critique"]
        case "DistilledSFT":
            return answer_messages(x, turns=turns), row["distilled"]
        case "SFT":
            reference = row["reference"]
            return answer_messages(x, turns=turns), None if reference is None else right_answers(reference)[0]
        case "RefinedSFT":
            return answer_messages(x, turns=turns), row["refinement"]


def examples_of(lesson: Lesson) -> Supervised:
    """The supervised objective whose context and target a training has. It is the training's own objective, or the one
    whose text another loss is of: DPO prefers it, and a divergence is learned at its tokens, or at those that a student
    samples behind the same context."""
    match lesson.objective:
        case "DPO" | "ContextDistillation" | "GKD" | "OPD":
            return "RefinedSFT"
        case "SupervisedKD":
            return "DistilledSFT" if lesson.texts == "distilled" else "RefinedSFT"
        case supervised:
            return supervised


CONDITIONED: tuple[Objective, ...] = ("CGD", "CFT")
"""The objectives whose context has more than x."""
BARE: Supervised = "RefinedSFT"
"""What a row of them is learned or measured as where the context is that of inference: x alone, and the refinement."""


CONTEXTS: dict[Objective, str] = {
    "CGD": "the prompt, the student's own answer and the teacher's critique of it",
    "CFT": "the prompt and the student's own answer",
    "DistilledSFT": "the prompt",
    "SFT": "the prompt",
    "RefinedSFT": "the prompt",
    "DPO": "the prompt",
    "ContextDistillation": "the prompt",
    "SupervisedKD": "the prompt",
    "GKD": "the prompt",
    "OPD": "the prompt",
}
"""The contexts in words, for cards and messages; the next table has the targets."""
TARGETS: dict[Objective, str] = {
    "CGD": "the teacher's refinement",
    "CFT": "the teacher's critique",
    "DistilledSFT": "the teacher's own answer",
    "SFT": "the reference answer",
    "RefinedSFT": "the teacher's refinement",
    "DPO": "a preference for the teacher's refinement over the student's own answer",
    "ContextDistillation": "what it would write at each token of the refinement with answer and critique in view",
    "SupervisedKD": "the teacher's distribution at each token of a stored text",
    "GKD": "the teacher's distribution at each token of what the student samples, or of the refinement",
    "OPD": "the teacher's judgement of each token that the student samples",
}


_THOUGHTS: dict[Objective, str] = {
    "CGD": "refinement_thinking",
    "CFT": "critique_thinking",
    "DistilledSFT": "distilled_thinking",
    "RefinedSFT": "refinement_thinking",
}
"""The columns with the thoughts that the teacher had before it wrote the targets. A reference has none."""


def wording(objective: Supervised, critique: Critique, instruction_turn: InstructionTurn = "user") -> str:
    """A hash of the words around the slots of an objective's context: part of the digest of its training."""
    slots: Row = {"id": "", "sample": 0, "prompt": "{x}", "answer": "{y'}", "critique": "{c}"}
    slots |= dict.fromkeys(("refinement", "distilled", "reference"))
    if critique.kind in {"generic", "none"}:
        slots["critique"] = critic(critique, 0, ())(slots)
    context, _ = conversation(objective, slots, instruction_turn)
    return hashlib.sha256(repr((context, plain(context))).encode()).hexdigest()


# --- the text in the critique's place ----------------------------------------------------------------------------

Critic = Callable[[Row], str | None]
"""Returns the text for the critique's slot of a row; None leaves the slot out."""


def critic(critique: Critique, seed: int, rows: Iterable[Row]) -> Critic:
    """Choose the critique that CGD reads; targets do not change.

    - `matched`, `miscritique`: the row's own critique. `misled` puts a miscritique into rows before.
    - `shuffled`: the critique of another prompt, as specific but beside the point; each critique is used once.
    - `generic`: the same general text for every row.
    - `none`: no critique, and an instruction that does not mention one.
    - `corrupted`: a fraction `rate` of the rows gets a wrong critique: the one that `shuffled` gives the row, with the
      opposite of the row's own verdict. A higher rate corrupts the same rows and more.

    `rows` are all rows of the stage, with id, sample and critique. Only `shuffled` and `corrupted` read them, and keep
    the critiques in memory. Keys and seed decide which row gets which critique, not the order of the rows. Raises
    ValueError when too few prompts have critiques to exchange.
    """
    match critique.kind:
        case "matched" | "miscritique":
            return lambda row: str(row["critique"])
        case "generic":
            return lambda _: GENERIC
        case "none":
            return lambda _: None
    critiques: dict[Key, str] = {key_of(row): row["critique"] for row in rows}
    exchange = exchanged(critiques, seed)
    if critique.kind == "shuffled":
        return lambda row: critiques[exchange[key_of(row)]]
    corrupted_rows = chosen(critiques, critique.rate, seed, "corrupt")

    def corrupted(row: Row) -> str:
        if key_of(row) not in corrupted_rows:
            return str(row["critique"])
        other = critiques[exchange[key_of(row)]]
        match verdict(row["critique"]):
            case "right":
                return with_verdict(other, "wrong")
            case "wrong":
                return with_verdict(other, "right")
            case None:
                return other

    return corrupted


def misled(row: Row, critique: Critique) -> Row:
    """The columns that a miscritique changes in a row that it is chosen for: the critique, and the refinement where the
    target is refined. `row` is one of the stage misrefine."""
    columns = {"critique": row["miscritique"]}
    if critique.target == "refined":
        columns |= {"refinement": row["misrefinement"], "refinement_thinking": row["misrefinement_thinking"]}
    return columns


def exchanged(keys: Iterable[Key], seed: int) -> dict[Key, Key]:
    """Map every row to a row of another prompt, each used once. The seed orders the rows by prompt, and each row gets
    the row that is as many places further on as the most frequent prompt has samples. Raises ValueError when there are
    too few prompts."""
    order = sorted(keys, key=lambda key: (_lot(seed, "order", key[0]), key))
    shift = max(Counter(identity for identity, _ in order).values(), default=1)
    if len(order) < 2 * shift:
        raise ValueError(f"{len(order)} rows cannot exchange their critiques: too few of them have other prompts")
    return dict(zip(order, order[shift:] + order[:shift], strict=True))


def chosen(keys: Iterable[Key], rate: float, seed: int, purpose: Literal["corrupt", "bare"]) -> set[Key]:
    """The fraction `rate` of the rows, rounded. A higher rate chooses the same rows and more; the rows of one purpose
    say nothing about those of the other."""
    order = sorted(keys, key=lambda key: (_lot(seed, purpose, f"{key[0]}/{key[1]}"), key))
    return set(order[: round(rate * len(order))])


def _lot(seed: int, purpose: str, name: str) -> str:
    return hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).hexdigest()


# --- examples of rows -----------------------------------------------------------------------------------------------


def row_example(
    template: ChatTemplate,
    objective: Supervised,
    row: Row,
    *,
    max_length: int,
    thinking: Learned = "drop",
    instruction_turn: InstructionTurn = "user",
) -> Example:
    """The example of a row for an objective. With `learn`, the thought before the target is learned too; if the row has
    none, an empty one. Raises Unusable."""
    context, target = conversation(objective, row, instruction_turn)
    if target is None:
        raise Unusable("missing", f"the row does not have {TARGETS[objective]}")
    thought = (row.get(_THOUGHTS.get(objective, "")) or "") if thinking == "learn" else None
    return example(template, context, target, thought=thought, max_length=max_length)


def each_example(
    template: ChatTemplate,
    objective: Supervised,
    rows: Iterable[Row],
    critic: Critic | None = None,
    *,
    max_length: int,
    thinking: Learned = "drop",
    instruction_turn: InstructionTurn = "user",
) -> Iterator[tuple[Row, Example | Unusable]]:
    """Every row with its example, or with the reason why it has none. `critic` fills the critique's slot."""
    form: dict[str, Any] = {"max_length": max_length, "thinking": thinking, "instruction_turn": instruction_turn}
    for row in rows:
        try:
            with_critique = row | {"critique": critic(row)} if critic else row
            yield row, row_example(template, objective, with_critique, **form)
        except Unusable as error:
            yield row, error
