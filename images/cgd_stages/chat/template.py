"""Renders messages with a model's chat template into the text and the tokens that the model reads."""

from typing import Any

from jinja2.exceptions import TemplateError

from cgd_stages.chat.messages import Message, plain, without_system


def render(tokenizer: Any, messages: list[Message]) -> str:
    """The text that a model reads, up to where its reply begins, special tokens included.

    Tokenise it with `token_ids`. Raises jinja2's TemplateError when the model's template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        first = tokenizer("")["input_ids"][:1]
        starts_with_bos = first and first == [tokenizer.bos_token_id]
        return (str(tokenizer.bos_token) if starts_with_bos else "") + plain(messages)
    system = "".join(message["content"] for message in messages if message["role"] == "system")
    if not system:
        return _templated(tokenizer, messages)
    try:
        text = _templated(tokenizer, messages)
    except TemplateError:
        return _templated(tokenizer, without_system(messages))
    # Some templates drop a system turn and raise no error.
    return text if system.strip() in text else _templated(tokenizer, without_system(messages))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a rendered text; `render` has already written the special ones."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _templated(tokenizer: Any, messages: list[Message]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
