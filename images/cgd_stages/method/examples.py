"""Makes one training example of one stored row: token ids, and labels on the target alone.

`conversation` is the table of all objectives: which texts are context, which is the target. `prompts.render` writes the
context as every model reads it: the chat template up to the point where the reply begins. The same template writes the
target after that point, up to the end-of-turn token, which is learned too. No text is truncated: a row that cannot be
used whole raises `Unusable`, with a reason to count.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from cgd_stages.contract import Critique, Objective
from cgd_stages.method.prompts import (
    GENERIC,
    Message,
    answer_messages,
    critique_messages,
    plain,
    render,
    token_ids,
    training_context,
    verdict,
    with_verdict,
    without_system,
)
from cgd_stages.store.rows import Key, Row, key_of

IGNORE = -100
"""The label of a token that is not learned: torch's cross entropy ignores it."""

Reason = Literal["missing", "empty", "too_long", "template"]


class Unusable(ValueError):
    """A row makes no example: its target is `missing` or `empty`, its example is `too_long`, or the model's chat
    `template` does not work."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Example:
    """The token ids of context and target, and a label for each: IGNORE in the context, the token in the target."""

    input_ids: list[int]
    labels: list[int]

    @property
    def start(self) -> int:
        """The index of the first token that is learned."""
        return next(index for index, label in enumerate(self.labels) if label != IGNORE)


def conversation(objective: Objective, row: Row) -> tuple[list[Message], str | None]:
    """The context and the target of a row, in which the objectives differ. The target is None if the row has none.

    CFT's context is the teacher's request for a critique; a context of x alone is the one that evaluation uses. If the
    critique is None, CGD's context has no slot for it.
    """
    x = row["prompt"]
    match objective:
        case "CGD":
            return training_context(x, row["answer"], row["critique"]), row["refinement"]
        case "CFT":
            return critique_messages(x, row["answer"]), row["critique"]
        case "DistilledSFT":
            return answer_messages(x), row["distilled"]
        case "SFT":
            return answer_messages(x), row["reference"]
        case "RefinedSFT":
            return answer_messages(x), row["refinement"]


CONTEXTS: dict[Objective, str] = {
    "CGD": "the prompt, the student's own answer and the teacher's critique of it",
    "CFT": "the prompt and the student's own answer",
    "DistilledSFT": "the prompt",
    "SFT": "the prompt",
    "RefinedSFT": "the prompt",
}
"""The contexts in words, for cards and messages; the next table has the targets."""
TARGETS: dict[Objective, str] = {
    "CGD": "the teacher's refinement",
    "CFT": "the teacher's critique",
    "DistilledSFT": "the teacher's own answer",
    "SFT": "the reference answer",
    "RefinedSFT": "the teacher's refinement",
}


def wording(objective: Objective, critique: Critique) -> str:
    """A hash of the words around the slots of an objective's context: part of the digest of its training."""
    slots: Row = {"id": "", "sample": 0, "prompt": "{x}", "answer": "{y'}", "critique": "{c}"}
    slots |= dict.fromkeys(("refinement", "distilled", "reference"))
    if critique.kind in {"generic", "none"}:
        slots["critique"] = critic(critique, 0, ())(slots)
    context, _ = conversation(objective, slots)
    return hashlib.sha256(repr((context, plain(context))).encode()).hexdigest()


# --- the text in the critique's place ----------------------------------------------------------------------------

Critic = Callable[[Row], str | None]
"""Returns the text for the critique's slot of a row; None leaves the slot out."""


def critic(critique: Critique, seed: int, rows: Iterable[Row]) -> Critic:
    """Choose the critique that CGD reads; targets do not change.

    - `matched`: the row's own critique.
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
        case "matched":
            return lambda row: str(row["critique"])
        case "generic":
            return lambda _: GENERIC
        case "none":
            return lambda _: None
    critiques: dict[Key, str] = {key_of(row): row["critique"] for row in rows}
    exchange = exchanged(critiques, seed)
    if critique.kind == "shuffled":
        return lambda row: critiques[exchange[key_of(row)]]
    corrupted_rows = chosen(critiques, critique.rate, seed)

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


def exchanged(keys: Iterable[Key], seed: int) -> dict[Key, Key]:
    """Map every row to a row of another prompt, each used once. The seed orders the rows by prompt, and each row gets
    the row that is as many places further on as the most frequent prompt has samples. Raises ValueError when there are
    too few prompts."""
    order = sorted(keys, key=lambda key: (_lot(seed, "order", key[0]), key))
    shift = max(Counter(identity for identity, _ in order).values(), default=1)
    if len(order) < 2 * shift:
        raise ValueError(f"{len(order)} rows cannot exchange their critiques: too few of them have other prompts")
    return dict(zip(order, order[shift:] + order[:shift], strict=True))


def chosen(keys: Iterable[Key], rate: float, seed: int) -> set[Key]:
    """The fraction `rate` of the rows, rounded. A higher rate chooses the same rows and more."""
    order = sorted(keys, key=lambda key: (_lot(seed, "corrupt", f"{key[0]}/{key[1]}"), key))
    return set(order[: round(rate * len(order))])


def _lot(seed: int, purpose: str, name: str) -> str:
    return hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).hexdigest()


# --- tokens and labels -------------------------------------------------------------------------------------------


def row_example(tokenizer: Any, objective: Objective, row: Row, *, max_length: int) -> Example:
    """The example of a row for an objective. Raises Unusable."""
    context, target = conversation(objective, row)
    if target is None:
        raise Unusable("missing", f"the row does not have {TARGETS[objective]}")
    return example(tokenizer, context, target, max_length=max_length)


def example(tokenizer: Any, context: list[Message], target: str, *, max_length: int) -> Example:
    """The example of a conversation whose next assistant turn is `target`. Raises Unusable."""
    if not target.strip():
        raise Unusable("empty", "the target holds no text")
    try:
        context_ids, target_ids = _split(tokenizer, context, target)
    except TemplateError as error:
        raise Unusable("template", str(error)) from error
    target_ids = _ended(tokenizer, target_ids)
    if (length := len(context_ids) + len(target_ids)) > max_length:
        raise Unusable("too_long", f"{length} tokens, {len(target_ids)} of them learned, limit {max_length}")
    return Example(context_ids + target_ids, [IGNORE] * len(context_ids) + target_ids)


def show(tokens: Sequence[str], labels: Sequence[int]) -> str:
    """The mask for people, with learned tokens in brackets: `2+2 =5 wrong [4] [</s>]`."""
    return " ".join(token if label == IGNORE else f"[{token}]" for token, label in zip(tokens, labels, strict=True))


def _split(tokenizer: Any, context: list[Message], target: str) -> tuple[list[int], list[int]]:
    """The token ids of the context, and the ids of the text that follows it.

    A tokenizer may merge characters across the border. Then the two sides are tokenised apart, as at inference, where
    the context's ids are fixed before the model writes a token.
    """
    context_text = render(tokenizer, context)
    text = _with_target(tokenizer, context, target, context_text)
    context_ids, ids = token_ids(tokenizer, context_text), token_ids(tokenizer, text)
    if ids[: len(context_ids)] == context_ids:
        return context_ids, ids[len(context_ids) :]
    target_ids = token_ids(tokenizer, text[len(context_text) :])
    if tokenizer.decode(context_ids + target_ids) != tokenizer.decode(ids):
        raise Unusable("template", "the context's tokens are not a prefix of the example's")
    return context_ids, target_ids


def _with_target(tokenizer: Any, context: list[Message], target: str, context_text: str) -> str:
    """The text of context and target, which begins with `context_text`."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{context_text} {target}"
    reply: Message = {"role": "assistant", "content": target}
    for messages in (context, without_system(context)):
        try:
            text = str(tokenizer.apply_chat_template([*messages, reply], tokenize=False))
        except TemplateError:
            continue
        if text.startswith(context_text):
            return text
    raise Unusable("template", "the chat template begins differently when a reply follows the context")


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """The target up to its end-of-turn token, or with the tokenizer's end of text if the template writes none."""
    special = set(tokenizer.all_special_ids)
    ends = [index for index, token in enumerate(ids) if token in special]
    if not ends:
        if tokenizer.eos_token_id is None:
            raise Unusable("template", "the model has neither an end-of-turn nor an end-of-text token")
        return [*ids, int(tokenizer.eos_token_id)]
    if len(ends) > 1:
        token = tokenizer.convert_ids_to_tokens(ids[ends[0]])
        raise Unusable("template", f"the target holds the special token {token}")
    if tokenizer.decode(ids[ends[0] + 1 :]).strip():
        raise Unusable("template", "the template writes text after the end of the reply")
    return ids[: ends[0] + 1]


def each_example(
    tokenizer: Any, objective: Objective, rows: Iterable[Row], critic: Critic | None = None, *, max_length: int
) -> Iterator[tuple[Row, Example | Unusable]]:
    """Every row with its example, or with the reason why it has none. `critic` fills the critique's slot."""
    for row in rows:
        try:
            with_critique = row | {"critique": critic(row)} if critic else row
            yield row, row_example(tokenizer, objective, with_critique, max_length=max_length)
        except Unusable as error:
            yield row, error
