"""The turns of a conversation, and the plain text that stands for them where a model has no chat template. Pure."""

import re
from typing import Literal, TypedDict


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


_NAMES = (
    r"im_(?:start|end|sep|user|assistant|system|middle|msg_end)|(?:start|end)_header_id|header_(?:start|end)"
    r"|begin_of_text|end_of_text|startoftext|endoftext|eot_id|eom_id|eot|eom|bom|eos|separator|end_of_msg|end_message"
    r"|end_of_turn|endofturn|endofsystem|message_(?:user|model|system|tool)|(?:start|end)_of_role|role_(?:start|end)"
    r"|begin|start|end|open|close|sep|message|content|channel|final|return|call|constrain|python_tag"
    r"|[Ss]ystem|[Uu]ser|[Aa]ssistant|human|bot|tool|observation|(?:user|assistant|system|developer)_(?:start|end)"
    r"|inner_(?:prefix|suffix)|(?:START_OF_TURN|END_OF_TURN|USER|CHATBOT|SYSTEM)_TOKEN"
    r"|(?:START|END)_(?:RESPONSE|TEXT|THINKING)|reserved_special_token_\d+|extra_\d+|plamo:[^|]{1,40}"
)
_MARKERS = re.compile(
    rf"<\|(?:{_NAMES})\|>"
    r"|<(?:start|end)_of_turn>|<end_of_utterance>|<\|(?:turn|channel)>|<(?:turn|channel)\|>|</?ifm\|\w{1,40}>|<seed:[be]os>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<<SYS>>|\[gMASK\]|\]~!?b[\[\]]|\[e~\["
    r"|\[\|(?:system|user|assistant|tool|endofturn)\|\]|<role>(?:SYSTEM|HUMAN|ASSISTANT|OBSERVATION)</role>"
    r"|<SPECIAL_\d+>|<extra_id_\d+>|<reserved_10[67]>|<\uff5c[^\uff5c<>]{1,40}\uff5c>"
)
"""The texts by which the chat templates of models begin and end turns, whoever's model a server has."""
_LAST = re.compile(r"(?:</s>|<eos>)\s*\Z")


def turn_markers(text: str) -> list[str]:
    """The texts in it by which known chat templates begin and end turns. A server whose tokenizer is not known may read
    them as such, so that the text forges a turn."""
    return sorted(set(_MARKERS.findall(text)))


def left_over_markers(text: str) -> list[str]:
    """The control tokens that a server has left in a model's text: those of turns, and an end of the text."""
    ends = _LAST.findall(text) if text.count("</s>") > text.count("<s>") or text.rstrip().endswith("<eos>") else []
    return [*turn_markers(text), *map(str.strip, ends)]


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
