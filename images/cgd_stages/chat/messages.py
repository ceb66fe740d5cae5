"""The turns of a conversation, and the plain text that stands for them where a model has no chat template. Pure."""

from typing import Literal, TypedDict


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


def plain(messages: list[Message]) -> str:
    """The text for a model without a chat template: the instruction, the slots, and the word that its reply follows."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    user = [message["content"] for message in messages if message["role"] == "user"]
    if system:
        return "\n\n".join([*system, *user, "Response:"])
    return "\n\n".join([f"Question: {text}" for text in user] + ["Answer:"])


def without_system(messages: list[Message]) -> list[Message]:
    """The messages with the system turn's text in front of the user's, for templates that refuse a system turn."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    first, *rest = [message for message in messages if message["role"] != "system"]
    return [{"role": first["role"], "content": "\n\n".join([*system, first["content"]])}, *rest]
