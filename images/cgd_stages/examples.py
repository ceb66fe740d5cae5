"""One quadruple becomes one training example: token ids, and labels on the refinement alone.

The context is what `prompts.render` gives every model: the chat template up to the point where the reply begins. The
target is what the same template writes after that point for the refinement, up to the end-of-turn token, which is
learned too. Nothing is ever truncated: a row that cannot be used as it is raises `Unusable`, with a reason to count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from cgd_stages.folders import Row
from cgd_stages.prompts import Message, render, token_ids, training_context, without_system

IGNORE = -100
"""Label of a token that is not learned: the value that torch's cross entropy ignores."""

Reason = Literal["empty", "too_long", "template"]


class Unusable(ValueError):
    """Why a row makes no example: `empty` target, `too_long` for the model, or a `template` that does not hold."""

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


def cgd_example(tokenizer: Any, row: Row, *, max_length: int) -> Example:
    """The example of one quadruple: context (x, y', c), target the refinement. Raises Unusable."""
    context = training_context(row["prompt"], row["answer"], row["critique"])
    return example(tokenizer, context, row["refinement"], max_length=max_length)


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


def each_example(tokenizer: Any, rows: Iterator[Row], *, max_length: int) -> Iterator[tuple[Row, Example | Unusable]]:
    """Every row with its example, or with the reason why it has none."""
    for row in rows:
        try:
            yield row, cgd_example(tokenizer, row, max_length=max_length)
        except Unusable as error:
            yield row, error
