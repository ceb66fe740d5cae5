"""The turns of a conversation, and the plain text that stands for them where a model has no chat template. Pure."""

from typing import Literal, TypedDict


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


def plain(messages: list[Message]) -> str:
    """The text for a model without a chat template: the instruction, the slots, and the word that its reply follows. Of
    several turns each is marked as a question or an answer."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    if system and len(turns) == 1:
        return "\n\n".join([*system, turns[0]["content"], "Response:"])
    framed = [f"{'Question' if turn['role'] == 'user' else 'Answer'}: {turn['content']}" for turn in turns]
    return "\n\n".join([*system, *framed, "Answer:"])


def without_system(messages: list[Message]) -> list[Message]:
    """The messages with the system turn's text in front of the user's, for templates that refuse a system turn."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    first, *rest = [message for message in messages if message["role"] != "system"]
    return [{"role": first["role"], "content": "\n\n".join([*system, first["content"]])}, *rest]
