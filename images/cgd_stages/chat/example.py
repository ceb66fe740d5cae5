"""Makes one training example of a conversation: token ids, and labels on what the model itself must write.

The context is what the engine gives a model (`ChatTemplate.render`), token for token. Learned is exactly what the model
writes from there on: the target and the end of its turn and, with a thought, the thought with its markers. No text is
truncated: a conversation that cannot be used whole raises `Unusable`, with a reason to count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2.exceptions import TemplateError

from cgd_stages.chat.messages import Message
from cgd_stages.chat.template import ChatTemplate, ControlTokens, Rendered

IGNORE = -100
"""The label of a token that is not learned: torch's cross entropy ignores it."""

Reason = Literal["missing", "empty", "too_long", "template", "markers", "control_tokens"]


class Unusable(ValueError):
    """A row makes no example: its target is `missing` or `empty`, its example is `too_long`, the model's chat
    `template` does not work, what is learned holds `markers` of the model's thoughts, or a text holds `control_tokens`
    that the tokenizer cannot write as plain text."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Example:
    """The token ids of context and target, and a label for each: IGNORE in the context, the token in the target."""

    input_ids: list[int]
    labels: list[int]
    thought: bool = False
    """Whether a thought that is not empty is learned."""

    @property
    def start(self) -> int:
        """The index of the first token that is learned."""
        return next(index for index, label in enumerate(self.labels) if label != IGNORE)


def example(
    template: ChatTemplate, context: list[Message], target: str, *, thought: str | None = None, max_length: int
) -> Example:
    """The example of a conversation whose next assistant turn is `target`. `thought` is learned before it, even if it
    is empty; None: the reply has no thought. Raises Unusable."""
    if not target.strip():
        raise Unusable("empty", "the target holds no text")
    if not template.turn.end:
        raise Unusable("template", "the model has neither an end-of-turn nor an end-of-text token")
    if markers := template.thought_markers(f"{thought or ''}\n{target}"):
        raise Unusable(
            "markers", f"what is learned holds markers of the thoughts of {template.name}: {', '.join(markers)}"
        )
    try:
        context_ids, target_ids = _split(template, template.render(context), _reply(template, target, thought))
    except TemplateError as error:
        raise Unusable("template", str(error)) from error
    except ControlTokens as error:
        raise Unusable("control_tokens", str(error)) from error
    if (length := len(context_ids) + len(target_ids)) > max_length:
        raise Unusable("too_long", f"{length} tokens, {len(target_ids)} of them learned, limit {max_length}")
    return Example(context_ids + target_ids, [IGNORE] * len(context_ids) + target_ids, thought=bool(thought))


def show(tokens: Sequence[str], labels: Sequence[int]) -> str:
    """The mask for people, with learned tokens in brackets: `2+2 =5 wrong [4] [</s>]`."""
    return " ".join(token if label == IGNORE else f"[{token}]" for token, label in zip(tokens, labels, strict=True))


def _reply(template: ChatTemplate, target: str, thought: str | None) -> Rendered:
    """What the model writes up to the ids that end its turn."""
    turn, markup = template.turn, template.markup
    lead, trail = turn.keeps
    target = target if lead else target.lstrip()
    target = target if trail else target.rstrip()
    if thought is None:
        if turn.opened:
            raise Unusable("template", "the prompt opens a thought, and the example has none")
        head = _made(turn.header)
    elif markup is None or turn.opened is False:
        raise Unusable("template", "the chat template has no place for a thought in this mode")
    else:
        head = _made(turn.opening).then(template.plainly(thought)).then(_made(markup.bridge))
    return head.then(template.plainly(target)).then(_made(turn.tail_after(head.pieces[-1])))


def _made(text: str) -> Rendered:
    return Rendered((text,))


def _split(template: ChatTemplate, context: Rendered, reply: Rendered) -> tuple[list[int], list[int]]:
    """The token ids of the context, and the ids of the reply that follows it, with those that end it.

    A tokenizer may merge characters across the border. Then the two sides are tokenised apart, as at inference, where
    the context's ids are fixed before the model writes a token.
    """
    context_ids, ids = template.token_ids(context), template.token_ids(context.then(reply))
    if ids[: len(context_ids)] == context_ids:
        return context_ids, [*ids[len(context_ids) :], *template.turn.end]
    target_ids = template.token_ids(reply)
    if template.tokenizer.decode(context_ids + target_ids) != template.tokenizer.decode(ids):
        raise Unusable("template", "the context's tokens are not a prefix of the example's")
    return context_ids, [*target_ids, *template.turn.end]
