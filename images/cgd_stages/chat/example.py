"""Makes one training example of a conversation: token ids, and labels on the target alone.

`template.render` writes the context as every model reads it: the chat template up to the point where the reply begins.
The same template writes the target after that point, up to the end-of-turn token, which is learned too. No text is
truncated: a conversation that cannot be used whole raises `Unusable`, with a reason to count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from cgd_stages.chat.messages import Message, without_system
from cgd_stages.chat.template import render, token_ids

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
