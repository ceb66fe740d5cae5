"""One stored row becomes one training example: token ids, and labels on the target alone.

`conversation` is the table of all objectives: who is context, who is target. The context is what `prompts.render` gives
every model: the chat template up to the point where the reply begins. The target is what the same template writes
after that point, up to the end-of-turn token, which is learned too. Nothing is ever truncated: a row that cannot be
used as it is raises `Unusable`, with a reason to count.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
"""Label of a token that is not learned: the value that torch's cross entropy ignores."""

Reason = Literal["missing", "empty", "too_long", "template"]


class Unusable(ValueError):
    """Why a row makes no example: a target that is `missing` or `empty`, a row `too_long` for the model, or a chat
    `template` that does not hold."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Example:
    """Token ids of context and target, and as many labels: IGNORE on the context, the token itself on the target."""

    input_ids: list[int]
    labels: list[int]

    @property
    def start(self) -> int:
        """Index of the first token that is learned."""
        return next(index for index, label in enumerate(self.labels) if label != IGNORE)


def conversation(objective: Objective, row: Row) -> tuple[list[Message], str | None]:
    """Context and target of a row: all that the objectives differ in. None: the row has no such target.

    CFT has the words that the teacher was asked for its critique with; a context of x alone is the one that evaluation
    gives. A critique of None is left out of CGD's context.
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
"""The contexts in words, and below the targets: for cards and messages."""
TARGETS: dict[Objective, str] = {
    "CGD": "the teacher's refinement",
    "CFT": "the teacher's critique",
    "DistilledSFT": "the teacher's own answer",
    "SFT": "the reference answer",
    "RefinedSFT": "the teacher's refinement",
}


def wording(objective: Objective, critique: Critique) -> str:
    """Hash of the words around the slots of an objective's context: part of the digest of its training."""
    slots: Row = {"id": "", "sample": 0, "prompt": "{x}", "answer": "{y'}", "critique": "{c}"}
    slots |= dict.fromkeys(("refinement", "distilled", "reference"))
    if critique.kind in {"generic", "none"}:
        slots["critique"] = critic(critique, 0, ())(slots)
    context, _ = conversation(objective, slots)
    return hashlib.sha256(repr((context, plain(context))).encode()).hexdigest()


# --- what stands in the critique's place -------------------------------------------------------------------------

Critic = Callable[[Row], str | None]
"""What a row has in the slot of its critique; None: the slot is left out."""


def critic(critique: Critique, seed: int, rows: Iterable[Row]) -> Critic:
    """The critique that CGD is conditioned on; targets stay as they are.

    - `matched`: the row's own.
    - `shuffled`: another prompt's, as specific as the own but beside the point; every critique is used once.
    - `generic`: one placeholder text.
    - `none`: no critique, and no word of one.
    - `corrupted`: of a fraction `rate` of the rows a wrong one, of the others their own. Wrong is what `shuffled` gives
      the row, under the opposite of the row's own verdict. A higher rate corrupts the same rows and more.

    `rows` are all rows of the stage, with id, sample and critique; they are read only where critiques change places,
    and then these texts are in memory. Who gets what follows from keys and seed, not from the rows' order. Raises
    ValueError when there are no critiques to change places with.
    """
    match critique.kind:
        case "matched":
            return lambda row: str(row["critique"])
        case "generic":
            return lambda _: GENERIC
        case "none":
            return lambda _: None
        case "shuffled":
            texts = _texts(rows)
            others = exchanged(texts.keys(), seed)
            return lambda row: texts[others[key_of(row)]]
        case "corrupted":
            return _corrupting(_texts(rows), critique.rate, seed)


def _corrupting(texts: Mapping[Key, str], rate: float, seed: int) -> Critic:
    others, wrong = exchanged(texts.keys(), seed), chosen(texts.keys(), rate, seed)

    def corrupted(row: Row) -> str:
        own = str(row["critique"])
        if key_of(row) not in wrong:
            return own
        other = texts[others[key_of(row)]]
        match verdict(own):
            case "right":
                return with_verdict(other, "wrong")
            case "wrong":
                return with_verdict(other, "right")
            case None:
                return other

    return corrupted


def exchanged(keys: Iterable[Key], seed: int) -> dict[Key, Key]:
    """To every row one of another prompt, each of them once: everyone moves on by as many places as the most frequent
    prompt has samples, in an order that the seed determines. Raises ValueError when there are too few prompts."""
    order = sorted(keys, key=lambda key: (_lot(seed, "order", key[0]), key))
    reach = max(Counter(identity for identity, _ in order).values(), default=1)
    if len(order) < 2 * reach:
        raise ValueError(f"critiques of {len(order)} rows cannot change places: there must be rows of other prompts")
    return dict(zip(order, order[reach:] + order[:reach], strict=True))


def chosen(keys: Iterable[Key], rate: float, seed: int) -> set[Key]:
    """The fraction `rate` of the rows, rounded to whole ones. Those of a lower rate are among those of a higher one."""
    order = sorted(keys, key=lambda key: (_lot(seed, "corrupt", f"{key[0]}/{key[1]}"), key))
    return set(order[: round(rate * len(order))])


def _lot(seed: int, purpose: str, name: str) -> str:
    return hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).hexdigest()


def _texts(rows: Iterable[Row]) -> dict[Key, str]:
    return {key_of(row): row["critique"] for row in rows}


# --- tokens and labels -------------------------------------------------------------------------------------------


def row_example(tokenizer: Any, objective: Objective, row: Row, *, max_length: int) -> Example:
    """The example that an objective makes of a row. Raises Unusable."""
    context, target = conversation(objective, row)
    if target is None:
        raise Unusable("missing", f"the row does not have {TARGETS[objective]}")
    return example(tokenizer, context, target, max_length=max_length)


def example(tokenizer: Any, context: list[Message], target: str, *, max_length: int) -> Example:
    """The example of a conversation whose next assistant turn is `target`. Raises Unusable."""
    if not target.strip():
        raise Unusable("empty", "the target holds no text")
    try:
        start, ids = _split(tokenizer, context, target)
    except TemplateError as error:
        raise Unusable("template", str(error)) from error
    ids = start + _ended(tokenizer, ids)
    if len(ids) > max_length:
        raise Unusable("too_long", f"{len(ids)} tokens, {len(ids) - len(start)} of them learned, limit {max_length}")
    return Example(ids, [IGNORE] * len(start) + ids[len(start) :])


def show(tokens: Sequence[str], labels: Sequence[int]) -> str:
    """The mask, for people: learned tokens in brackets. `2+2 =5 wrong [4] [</s>]`."""
    return " ".join(token if label == IGNORE else f"[{token}]" for token, label in zip(tokens, labels, strict=True))


def _split(tokenizer: Any, context: list[Message], target: str) -> tuple[list[int], list[int]]:
    """Token ids of the context, and of what follows it.

    A tokenizer may merge characters across the border. Then the two sides are tokenised apart, because that is what
    the model meets at inference: the context's ids are fixed before it writes a token.
    """
    before = render(tokenizer, context)
    whole = _whole(tokenizer, context, target, before)
    start, ids = token_ids(tokenizer, before), token_ids(tokenizer, whole)
    if ids[: len(start)] == start:
        return start, ids[len(start) :]
    rest = token_ids(tokenizer, whole[len(before) :])
    if tokenizer.decode(start + rest) != tokenizer.decode(ids):
        raise Unusable("template", "the context's tokens are not a prefix of the example's")
    return start, rest


def _whole(tokenizer: Any, context: list[Message], target: str, before: str) -> str:
    """Text of context and target; it starts with `before`, the context as a model is given it."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{before} {target}"
    reply: Message = {"role": "assistant", "content": target}
    for messages in (context, without_system(context)):
        try:
            whole = str(tokenizer.apply_chat_template([*messages, reply], tokenize=False))
        except TemplateError:
            continue
        if whole.startswith(before):
            return whole
    raise Unusable("template", "with a reply, the chat template does not begin as it does without one")


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """The target up to and with its end-of-turn token; the tokenizer's end of text where the template writes none."""
    special = set(tokenizer.all_special_ids)
    ends = [index for index, token in enumerate(ids) if token in special]
    if not ends:
        if tokenizer.eos_token_id is None:
            raise Unusable("template", "the model has neither an end-of-turn nor an end-of-text token")
        return [*ids, int(tokenizer.eos_token_id)]
    if len(ends) > 1:
        raise Unusable(
            "template", f"the target holds the special token {tokenizer.convert_ids_to_tokens(ids[ends[0]])}"
        )
    if tokenizer.decode(ids[ends[0] + 1 :]).strip():
        raise Unusable("template", "the template writes text after the end of the reply")
    return ids[: ends[0] + 1]


def each_example(
    tokenizer: Any, objective: Objective, rows: Iterable[Row], critic: Critic | None = None, *, max_length: int
) -> Iterator[tuple[Row, Example | Unusable]]:
    """Every row with its example, or with the reason why it has none. The `critic` fills the slot of the critique."""
    for row in rows:
        try:
            conditioned = row | {"critique": critic(row)} if critic else row
            yield row, row_example(tokenizer, objective, conditioned, max_length=max_length)
        except Unusable as error:
            yield row, error
