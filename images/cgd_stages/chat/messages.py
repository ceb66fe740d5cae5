"""The turns of a conversation, and the plain text that stands for them where a model has no chat template. Pure."""

import re
from typing import Literal, TypedDict


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


_MARKERS = re.compile(
    r"<\|(?:im_start|im_end|im_sep|start_header_id|end_header_id|begin_of_text|end_of_text|endoftext|eot_id|eom_id"
    r"|start|end|message|channel|return|call|constrain|system|user|assistant|observation|eot|eom"
    r"|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN|USER_TOKEN|CHATBOT_TOKEN|SYSTEM_TOKEN)\|>"
    r"|<(?:start|end)_of_turn>|<\|?turn\|?>|<\|?channel\|?>|\[/?(?:INST|SYSTEM_PROMPT)\]|<<SYS>>|<\uff5c[^\uff5c<>]{1,40}\uff5c>"
)
"""The texts by which widely used chat templates begin and end turns."""


def turn_markers(text: str) -> list[str]:
    """The texts in it by which known chat templates begin and end turns. A server whose tokenizer is not known may read
    them as such, so that the text forges a turn."""
    return sorted(set(_MARKERS.findall(text)))


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
    """The messages with the system turn's text in front of the first user turn's, for templates that take no system
    turn."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    first = next(place for place, message in enumerate(turns) if message["role"] == "user")
    asked: Message = {"role": "user", "content": "\n\n".join([*system, turns[first]["content"]])}
    return [*turns[:first], asked, *turns[first + 1 :]]
