"""The body of a chat completion, and the model's text in a server's answer, in the forms that servers have for it.

Pure, but for the endpoint's key, which no text may hold.
"""

import logging
from typing import Any

from cgd_stages.chat.messages import left_over_markers
from cgd_stages.chat.thoughts import TAGS, Split, given_thought, split_text
from cgd_stages.contract import TEACHER_API_KEY, Chat, Endpoint
from cgd_stages.engines.base import Completion, Request
from cgd_stages.engines.openai_server import Failed
from cgd_stages.keys import without_keys

log = logging.getLogger(__name__)

LONGEST_REASON = 40
"""The most characters that are kept of a finish reason."""
SPECIAL_TOKENS = "skip_special_tokens"
"""A parameter of vLLM's and SGLang's servers: false leaves special tokens in the text."""
_FINISHED = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens", "token_limit", "model_length"), "length"),
    "model_context_window_exceeded": "length",
}
"""What servers call the two ends of a text, in small letters -> what a row has. The names are those of OpenAI,
Together, Text Generation Inference, Anthropic, Google (in capitals), Cohere, Mistral and watsonx."""
_BROKEN_OFF = {"error", "abort", "cancelled", "insufficient_system_resource", "not_finished", "time_limit", "timeout"}
"""Finish reasons of a text that the server itself has broken off: another try may end otherwise."""
REFUSAL = "refusal"
"""The finish reason of a reply in which the model declines, and the field and the part that OpenAI has for it."""
_THOUGHTS = {"thinking", "reasoning", "reasoning_text", "summary_text"}
"""The types of a content's part that holds a thought: Anthropic's and Mistral's, and those of OpenAI's responses."""
REDACTED = "redacted_thinking"
ENCRYPTED = "reasoning.encrypted"
"""The type of Anthropic's part, and of OpenRouter's detail, with an encrypted thought."""


def request_body(endpoint: Endpoint, chat: Chat, request: Request) -> dict[str, Any]:
    """The body of a chat completion. It leaves out every parameter that changes nothing, because servers refuse some
    parameters, and some pairs of them, whatever their values are."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": request.messages,
        endpoint.token_field: sampling.max_tokens,
        "temperature": sampling.temperature,
    }
    if sampling.temperature > 0 or "temperature" in endpoint.omit:
        neutral = {"top_p": 1.0, "top_k": None, "min_p": 0.0, "seed": None}
        drawn = {name: getattr(sampling, name) for name in neutral}
        body |= {name: value for name, value in drawn.items() if value not in (None, neutral[name])}
    body = {name: value for name, value in body.items() if name not in endpoint.omit}
    # The mode in the words of vLLM's server, which SGLang and others share. Templates have two names for the switch; a
    # template that does not use a name ignores it.
    switch = {} if chat.thinking == "auto" else dict.fromkeys(("enable_thinking", "thinking"), chat.thinking == "on")
    if kwargs := switch | chat.template_kwargs:
        body["chat_template_kwargs"] = kwargs
    if chat.thinking_budget is not None:
        body["thinking_token_budget"] = chat.thinking_budget
    extra = endpoint.extra_body
    if isinstance(given := extra.get("chat_template_kwargs"), dict):  # it wins by its fields, and keeps the others
        extra = extra | {"chat_template_kwargs": kwargs | given}
    return body | extra


def shows_special_tokens(endpoint: Endpoint) -> bool:
    """Whether the server is asked to leave special tokens, such as the end of the turn, in the text."""
    return endpoint.extra_body.get(SPECIAL_TOKENS) is False


def completion_of(request: Request, answer: Any, *, shows_special_tokens: bool) -> Completion:
    """The reply in a server's answer. Raises Failed when there is none, or when the server has broken it off."""
    asked = "".join(message["content"] for message in request.messages)
    tags = [tag for tag in TAGS if tag.start not in asked]  # a prompt may ask for an answer in such tags
    try:
        choice, usage = answer["choices"][0], answer.get("usage")
        message = choice["message"]
        text, thought = map(_without_key, _texts(message))
        thought = given_thought(thought)
        parts = split_text(text, lone_end=not thought, with_end=shows_special_tokens, tags=tags)
        if thought:
            parts = Split(parts.text, thought, unfinished_thinking=not parts.text)
        reason = REFUSAL if _declines(message) else _without_key(str(choice.get("finish_reason") or "stop"))
        if reason.lower() in _BROKEN_OFF:
            raise Failed(f"the server has broken off a text with {reason!r}", text[-100:])
        return Completion(
            name=request.name,
            text=parts.text,
            thinking=parts.thinking,
            unfinished_thinking=parts.unfinished_thinking,
            finish_reason=_FINISHED.get(reason.lower(), reason[:LONGEST_REASON]),
            prompt_tokens=_count(usage, "prompt_tokens"),
            tokens=_written(usage),
            cached_tokens=_count(usage, "prompt_tokens_details", "cached_tokens"),
            control_tokens=", ".join(left_over_markers(parts.text) or left_over_markers(parts.thinking)),
        )
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise Failed("the answer is not a chat completion", answer) from error


def _count(usage: Any, *path: str) -> int:
    """A number of tokens; 0 where the server does not count, or counts oddly: no text is lost for that."""
    for name in path:
        usage = usage.get(name) if isinstance(usage, dict) else None
    try:
        return int(usage or 0)
    except (TypeError, ValueError, OverflowError):
        return 0


def _written(usage: Any) -> int:
    """Tokens that the model has written, with its thought: some servers (xAI's, Google's) count that in the total
    alone."""
    written, read = _count(usage, "completion_tokens"), _count(usage, "prompt_tokens")
    return max(written, _count(usage, "total_tokens") - read if read else 0)


def _texts(message: Any) -> tuple[str, str]:
    """The text and the thought of a message. The thought has a field of its own (vLLM's server and OpenRouter say
    `reasoning`, DeepSeek and older servers `reasoning_content`, MiniMax has `reasoning_details` alone), or is a part of
    the content, as Mistral, Anthropic and Google have it."""
    texts, thoughts = list[str](), list[str]()
    for part in _parts(message):
        if part.get("type") != REDACTED:
            is_thought = part.get("type") in _THOUGHTS or part.get("thought") is True
            (thoughts if is_thought else texts).append(_flat(part))
    details = [detail.get("text") or detail.get("summary") for detail in _details(message)]
    fields = (message.get("reasoning"), message.get("reasoning_content"), thoughts, details)
    return "".join(texts) or _flat(message.get(REFUSAL)), next(filter(str.strip, map(_flat, fields)), "")


def _parts(message: Any) -> list[dict[str, Any]]:
    """The parts of a message's content, of which a plain text is one."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    return [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]


def _details(message: Any) -> list[dict[str, Any]]:
    """OpenRouter's and MiniMax's list of a thought's parts, some of which may be encrypted."""
    details = message.get("reasoning_details")
    return [one for one in details if isinstance(one, dict)] if isinstance(details, list) else []


def _declines(message: Any) -> bool:
    """Whether the message is the model's refusal, in the field or in a part for it."""
    return bool(_flat(message.get(REFUSAL))) or any(part.get("type") == REFUSAL for part in _parts(message))


def hides_thought(answer: Any) -> bool:
    """Whether a completion counts the tokens of a thought, or holds one that is encrypted."""
    match answer:
        case {"usage": {"completion_tokens_details": {"reasoning_tokens": int(counted)}}} | {
            "usage": {"reasoning_tokens": int(counted)}
        } if counted > 0:
            return True
    message = answer["choices"][0]["message"]
    return any(one.get("type") in (REDACTED, ENCRYPTED) for one in (*_parts(message), *_details(message)))


def _flat(part: Any) -> str:
    """The text of a part of a message, whatever it is wrapped into. Raises TypeError for what holds none."""
    match part:
        case None:
            return ""
        case str():
            return part
        case list():
            return "".join(map(_flat, part))
        case (
            {"thinking": inner}
            | {"reasoning": inner}
            | {"text": inner}
            | {"summary": inner}
            | {"content": inner}
            | {"refusal": inner}
        ):
            return _flat(inner)
    raise TypeError(f"a part of a message that holds no text: {part!r:.100}")


def _without_key(text: str | None) -> str:
    """A server's text without the endpoint's key, the only key that it knows. A change is logged, because a key that
    is an ordinary word would change many texts."""
    stored_text = without_keys(text or "", only=TEACHER_API_KEY)
    if stored_text != (text or ""):
        log.warning("an answer holds the endpoint's key; <%s> is stored in its place", TEACHER_API_KEY)
    return stored_text
