"""Engines turn messages into text. They share one protocol: vLLM in this process, or an OpenAI-compatible server.

The caller submits requests while the engine has room, and collects replies with `step`. A bad request has the reply
`Refused`; an exception means that the engine as a whole cannot go on.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from threading import Event
from typing import Any, Protocol

from cgd_stages.chat.messages import Message
from cgd_stages.contract import Sampling
from cgd_stages.errors import StageError
from cgd_stages.text.normal import valid_unicode

log = logging.getLogger(__name__)

MOST_TOKENS = 2**31 - 1
"""A row has 32 bits for a number of tokens."""


@dataclass(frozen=True)
class Request:
    """One question. The caller chooses `name`, which is unique among the requests under way."""

    name: str
    messages: list[Message]
    sampling: Sampling
    """The engine uses its `seed`, which differs by request, only at a temperature above 0."""


@dataclass(frozen=True)
class Completion:
    """A model's output, split into its answer (`text`) and its thought, why it ended (`stop`, `length` or
    `repetition`), and its cost in tokens."""

    name: str
    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int
    thinking: str = ""
    unfinished_thinking: bool = False
    """Whether the output ends in a thought: it has no answer."""
    cached_tokens: int = 0
    """The tokens of the prompt that the prefix cache held."""
    control_tokens: str = ""
    """The control tokens of other templates that a server has left in the text: it may go on behind the reply."""


@dataclass(frozen=True)
class Refused:
    """A request without an output; `reason` is `template`, `control_tokens`, `too_long`, `engine` or `endpoint`."""

    name: str
    reason: str
    detail: str
    prompt_tokens: int = 0


Reply = Completion | Refused


class Engine(Protocol):
    """A warm model. Not safe to share between threads."""

    settings: dict[str, Any]
    """The settings that the engine runs with, for logs and markers. No output depends on them."""

    @property
    def room(self) -> int:
        """How many more requests the engine can use now."""

    @property
    def busy(self) -> bool:
        """Whether replies are still to come."""

    def submit(self, request: Request) -> None: ...

    def step(self) -> list[Reply]:
        """Work for a moment and return the replies since the last step. Raises TransientError if the engine died."""

    def end(self, error: StageError) -> None:
        """Take no more requests, and raise the error in a step to come: when the replies under way have come, if they
        are paid for either way; else at once."""

    def metrics(self) -> dict[str, float]:
        """The engine's figures while it runs: `generated_tokens`, if possible with those of unfinished requests, and
        others such as `preemptions`."""

    def close(self) -> None: ...


def drive(
    engine: Engine, take: Callable[[], Request | None], stop: Event, *, on_step: Callable[[], None] = lambda: None
) -> Iterator[Reply]:
    """Keep the engine full until every request has a reply, or until `stop`, which drops unfinished requests.

    `take` returns the next request, or None if it has none now. It is called again after every step, because replies
    may lead to more requests. `on_step` is called after every step, with or without replies.
    """
    while not stop.is_set():
        while engine.room > 0 and (request := take()) is not None:
            engine.submit(request)
        if not engine.busy:
            return
        yield from map(_storable, engine.step())
        on_step()


def _storable(reply: Reply) -> Reply:
    """The reply within the bounds of a row: a server's JSON may hold half of a character, and any number."""
    values: dict[str, Any] = {field.name: getattr(reply, field.name) for field in fields(reply)}
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = valid_unicode(value)
        elif not isinstance(value, bool):
            values[name] = max(0, min(value, MOST_TOKENS))
    return replace(reply, **values)
