"""Tries the teacher's endpoint before the run asks for a GPU: what it would refuse of every request, whether it thinks,
and whether its thoughts can be told from its texts."""

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.alias_generators import to_camel

from cgd_stages.contract import Chat, Endpoint
from cgd_stages.engines.base import Completion, Request
from cgd_stages.engines.openai_server import (
    ENDPOINT_HINT,
    PROBE_SECONDS,
    Failed,
    Patience,
    call,
    ping,
    post,
    refuse_of_all,
)
from cgd_stages.engines.openai_texts import (
    SPECIAL_TOKENS,
    completion_of,
    hides_thought,
    request_body,
    shows_special_tokens,
)
from cgd_stages.errors import TransientError, UserError

log = logging.getLogger(__name__)

LONGEST_ID = 200
"""The most characters that are kept of a model's id."""
TRIAL = Patience(tries=4)


def probe(endpoint: Endpoint, timeout: float = PROBE_SECONDS) -> str:
    """Ask the server for its models, and say in a sentence that it serves the run's. Raises UserError or
    TransientError."""
    try:
        answer = call(endpoint, "/models", None, timeout)
    except Failed as failed:
        if failed.status != 404:
            refuse_of_all(endpoint, failed)
        if failed.status in {404, 405}:
            ping(endpoint, timeout)
            return f"{endpoint.url} answers as {endpoint.model}"
        raise TransientError(f"the endpoint {endpoint.url} does not answer: {failed}", hint=ENDPOINT_HINT) from failed
    models = answer.get("data") if isinstance(answer, dict) else None
    served = [str(model["id"])[:LONGEST_ID] for model in models or [] if isinstance(model, dict) and "id" in model]
    if served and endpoint.model not in served:
        message = f"the endpoint {endpoint.url} does not serve {endpoint.model}, but {', '.join(served[:5])}"
        raise UserError(message, hint="Correct spec.teacher.endpoint.model.")
    return f"{endpoint.url} serves {endpoint.model}"


@dataclass(frozen=True)
class Tried:
    """A reply of the trial, and whether the model has thought before it, be the thought shown or only counted."""

    completion: Completion
    thinks: bool


def try_request(endpoint: Endpoint, chat: Chat, request: Request, where: str, patience: Patience = TRIAL) -> Tried:
    """One whole completion with the body that the run is going to send. `where` is the place of its sampling in the
    spec.

    Raises UserError with the parameter that the server refuses, TransientError if it does not answer.
    """
    body = request_body(endpoint, chat, request)
    last: Failed | None = None
    for attempt in range(patience.tries):
        try:
            answer = post(endpoint, json.dumps(body).encode(), patience.seconds(endpoint))
            completion = completion_of(request, answer, shows_special_tokens=shows_special_tokens(endpoint))
            return Tried(completion, thinks=bool(completion.thinking) or hides_thought(answer))
        except Failed as failed:
            refuse_of_all(endpoint, failed)
            if failed.is_verdict:
                raise _refusal(endpoint, body, failed, where) from failed
            last = failed
            time.sleep(patience.pause(attempt, failed.retry_after) if attempt + 1 < patience.tries else 0)
    raise TransientError(f"the endpoint {endpoint.url} does not answer: {last}", hint=ENDPOINT_HINT) from last


def refuse_hidden_thoughts(endpoint: Endpoint, chat: Chat, request: Request, patience: Patience = TRIAL) -> None:
    """Raise UserError when the server leaves a thought in the text and takes its markers, which are special tokens, out
    of it. A server that can show special tokens is asked to; of another one, nothing can be known."""
    if SPECIAL_TOKENS in endpoint.extra_body:
        return
    shown = endpoint.model_copy(update={"extra_body": {**endpoint.extra_body, SPECIAL_TOKENS: False}})
    try:
        answer = post(shown, json.dumps(request_body(shown, chat, request)).encode(), patience.seconds(shown))
        completion = completion_of(request, answer, shows_special_tokens=True)
    except Failed as failed:
        log.info("the endpoint does not show special tokens: %s", failed)
        return
    if completion.thinking or completion.unfinished_thinking:
        raise UserError(
            f"{endpoint.model} at {endpoint.url} thinks, and the server leaves the thought in the text without its "
            "markers, where nothing tells it from the answer",
            hint=f"Start the server with a reasoning parser, or set spec.teacher.endpoint.extraBody to "
            f"{{{SPECIAL_TOKENS}: false}}.",
        )


def refuse_other_mode(chat: Chat, tried: Sequence[Tried]) -> None:
    """Raise UserError when a model behind an endpoint thinks although it must not, or never does although it must."""
    thinks = any(trial.thinks for trial in tried)
    if chat.thinking == "auto" or not tried or thinks == (chat.thinking == "on"):
        return
    shown = "no reply has a thought" if chat.thinking == "on" else "a reply has a thought"
    message = (
        f"spec.teacher.chat.thinking is {chat.thinking}, but {shown}: the server does not use chat_template_kwargs"
    )
    hint = (
        "Set spec.teacher.chat.thinking to auto, and write the parameter that the server has for it into "
        "spec.teacher.endpoint.extraBody, such as reasoning_effort."
    )
    raise UserError(message, hint=hint)


def refuse_unseen_thoughts(tried: Sequence[Tried]) -> None:
    """Raise UserError when thoughts are to be learned and the server counts them but does not give their text."""
    if any(trial.completion.thinking for trial in tried):
        return
    if any(trial.thinks for trial in tried):
        raise UserError(
            "spec.training.thinking is learn, but the endpoint does not give the text of its thoughts, so that every "
            "row would learn an empty one",
            hint="Set spec.training.thinking to drop, or use a server that returns its reasoning.",
        )
    if tried:
        log.warning("no reply of the trial has a thought: rows without one learn an empty thought")


def _refusal(endpoint: Endpoint, body: dict[str, Any], failed: Failed, where: str) -> UserError:
    answer = failed.answer
    try:  # servers name the parameter in the field for it
        error = json.loads(answer)["error"]
        named = [error["param"]] if error["param"] in body else []
    except (ValueError, LookupError, TypeError, RecursionError):
        named = []
    in_text = [name for name in body if re.search(rf"\b{re.escape(name)}\b", answer)]
    names = list(dict.fromkeys([*named, *(name for name in in_text if name not in ("model", "messages"))]))
    why = f", because of its {', '.join(names)}" if names else ""
    message = f"the endpoint {endpoint.url} refuses a request with the sampling of {where}{why}: {failed}"
    general = f"See what the server says of {endpoint.model}, and correct spec.teacher.endpoint."
    return UserError(message, hint=" Or: ".join(_mend(endpoint, name, where) for name in names) or general)


def _mend(endpoint: Endpoint, name: str, where: str) -> str:
    if name in endpoint.extra_body:
        return f"Correct {name} in spec.teacher.endpoint.extraBody."
    match name:
        case "max_tokens" | "max_completion_tokens":
            other = "max_tokens" if name == "max_completion_tokens" else "max_completion_tokens"
            return f"Set spec.teacher.endpoint.tokenField to {other}, or lower {where}.maxTokens."
        case "temperature":
            return (
                f"Add temperature to spec.teacher.endpoint.omit, which leaves it to the server, or change "
                f"{where}.temperature."
            )
        case "seed":
            return "Add seed to spec.teacher.endpoint.omit."
        case "top_p" | "top_k" | "min_p":
            return f"Remove {to_camel(name)} from {where}."
        case "thinking_token_budget":
            return "Remove spec.teacher.chat.thinkingBudget."
        case "chat_template_kwargs":
            return (
                "Remove thinking and templateKwargs from spec.teacher.chat, and write the server's own parameter into "
                "spec.teacher.endpoint.extraBody."
            )
        case _:
            return f"Correct {name} of the model or the messages: see what the server says."
