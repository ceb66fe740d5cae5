"""What the columns of a source hold: prompts, conversations, references and choices, in the shapes that data sets have.
Pure: a line goes in, a row or its fault comes out."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from cgd_stages.chat.messages import Message
from cgd_stages.chat.thoughts import split_text
from cgd_stages.contract import Fields
from cgd_stages.method.prompts import answer_messages, earlier_turns
from cgd_stages.prepare.sources import Line, row_id
from cgd_stages.prepare.values import as_text, kind, parse
from cgd_stages.store.rows import Row
from cgd_stages.text.references import any_of

Fault = tuple[str, str]
"""Reason and detail."""
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""The names that data sets give to the speakers of a conversation."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""The fields of a turn that hold its thought."""
TEXT_PARTS, THOUGHT_PARTS = ("text", "input_text", "output_text"), ("thinking", "reasoning", "redacted_thinking")
"""The types of the parts of a turn's content, as OpenAI, Anthropic and Mistral name them."""


class Faulty(ValueError):
    """A line makes no row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.fault: Fault = reason, detail


@dataclass(frozen=True)
class Found:
    """What a line has in a column; `exists` is false where it has no such column."""

    value: Any = None
    exists: bool = False


def value_at(line: Mapping[str, Any], column: str) -> Found:
    """The value of a column: of the column of that name, else of the place that its dots lead to."""
    if column in line:
        return Found(line[column], exists=True)
    value: Any = line
    for step in column.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return Found()
    return Found(value, exists=True)


def row_of(line: Line, fields: Fields) -> tuple[Row, Fault | None]:
    """The row of a line (its id is "" where it has no prompt), and what is wrong with it. Several right answers are
    stored as `any_of`; any other reference is stored as `values.as_text` writes it."""
    row: Row = {"id": "", "sample": 0}
    if line.value is None:
        return row, ("malformed", line.fault)
    try:
        row |= _asked(line.value, fields)
        row["id"] = identity_of(row)
    except Faulty as faulty:
        return row, faulty.fault
    except ValueError as error:  # half of a surrogate pair
        return {"id": "", "sample": 0}, ("malformed", f"a value cannot be stored: {error}")
    return row, None if row["prompt"].strip() else ("empty", "the prompt is empty")


def identity_of(row: Row, suffix: str = "") -> str:
    """The id of a row: of its prompt, or of its whole conversation. `suffix` makes the ids of equal rows differ."""
    if not row.get("turns"):
        return row_id(row["prompt"] + suffix)
    messages = answer_messages(row["prompt"] + suffix, turns=earlier_turns(row))
    return row_id(json.dumps(messages, ensure_ascii=False))


def _asked(value: Mapping[str, Any], fields: Fields) -> Row:
    """Prompt, reference and earlier turns of a line."""
    turns: list[Message] = []
    reply: str | None = None
    if fields.messages:
        turns, prompt, reply = conversation(_required(value, fields.messages), fields.messages)
    else:
        prompt = _required(value, fields.prompt)
        if not isinstance(prompt, str):
            hint = "; a list of messages belongs to fields.messages" if isinstance(prompt, list) else ""
            raise Faulty("malformed", f"the field {fields.prompt!r} is a {kind(prompt)}, not a text{hint}")
    reference = value_at(value, fields.reference).value if fields.reference else reply
    if fields.choices and prompt.strip():
        listed = list(choices(_required(value, fields.choices), fields.choices))
        prompt = f"{prompt}\n\n{lettered(listed)}"
        reference = None if reference is None else letter_of(reference, listed)
    row: Row = {"prompt": prompt, "reference": _reference(reference, fields)}
    return row | ({"turns": json.dumps(turns, ensure_ascii=False)} if turns else {})


def _required(value: Mapping[str, Any], column: str) -> Any:
    found = value_at(value, column).value
    if found is None:
        raise Faulty("missing_field", f"there is no field {column!r}")
    return found


def _reference(reference: Any, fields: Fields) -> str | None:
    """The text of a reference. Of a list, what is null is left out, an empty one is no reference, and one with one
    value is that value; but with `several: all` every list is stored as such."""
    if reference is None or isinstance(reference, str):
        return reference
    try:
        if not isinstance(reference, list) or fields.several == "all":
            return as_text(reference)
        given = [one for one in reference if one is not None]
        if not given:
            return None
        if len(given) == 1 and not isinstance(given[0], tuple):  # a pair is an entry of a Parquet map
            return _reference(given[0], fields)
        if fields.several == "any" or all(isinstance(one, str) for one in given):
            return any_of([as_text(one) for one in given])
        return as_text(given)
    except ValueError as error:
        raise Faulty("malformed", f"the field {fields.reference!r} is {error}") from error


def _first(value: Mapping[str, Any], *names: str) -> Any:
    """The first of these members that is there and not null: a table has every column for every row."""
    return next((found for name in names if (found := value.get(name)) is not None), None)


# --- conversations -----------------------------------------------------------------------------------------------


def conversation(value: Any, column: str) -> tuple[list[Message], str, str | None]:
    """The turns before the last user turn, that turn, and the assistant's reply to it where the conversation has one.

    It is a list of {role, content} or of {from, value}, or such a list as JSON. Left out are an empty system turn, and
    the thoughts of assistant turns before the prompt. Raises Faulty.
    """
    messages = list(_messages(value, column))
    last = max((place for place, turn in enumerate(messages) if turn["role"] == "user"), default=None)
    if last is None:
        raise Faulty("malformed", f"the conversation in {column!r} has no user turn")
    after = messages[last + 1 :]
    if len(after) > 1 or any(turn["role"] != "assistant" for turn in after):
        roles = ", ".join(turn["role"] for turn in after)
        raise Faulty("malformed", f"after the last user turn in {column!r} stand {roles}; one assistant turn may")
    earlier = [_without_thought(turn, column) for turn in messages[:last]]
    return earlier, messages[last]["content"], after[0]["content"] if after else None


def holds_earlier_thoughts(value: Mapping[str, Any], fields: Fields) -> bool:
    """Whether a conversation that makes a row has a thought in a turn before the prompt, in its text or in a field of
    its own."""
    if not fields.messages:
        return False
    given = _parsed(_required(value, fields.messages), fields.messages)
    last = max(place for place, turn in enumerate(given) if ROLES.get(str(_speaker(turn)).lower()) == "user")
    said = [turn for turn in given[:last] if ROLES.get(str(_speaker(turn)).lower()) == "assistant"]
    return any(
        any(turn.get(name) for name in THOUGHTS)
        or any(_is_thought(part) for part in _parts(turn))
        or (text := _content(turn, "")).strip() != split_text(text).text
        for turn in said
    )


def _without_thought(turn: Message, column: str) -> Message:
    """An earlier turn without its thought: chat templates leave it out of what a model reads. Raises Faulty."""
    parts = split_text(turn["content"])
    if turn["role"] != "assistant" or parts.text == turn["content"].strip():
        return turn
    if not parts.text:
        raise Faulty("empty", f"an assistant turn before the prompt in {column!r} holds nothing but a thought")
    return {"role": "assistant", "content": parts.text}


def _parsed(value: Any, column: str) -> Any:
    if isinstance(value, str):
        try:
            return parse(value.encode())
        except ValueError as error:
            detail = f"the field {column!r} is a text, not a list of messages; a text belongs to fields.prompt"
            raise Faulty("malformed", detail) from error
    return value


def _speaker(turn: Mapping[str, Any]) -> Any:
    return turn.get("role") or turn.get("from")


def _messages(value: Any, column: str) -> Iterator[Message]:
    value = _parsed(value, column)
    if not isinstance(value, list) or not value:
        raise Faulty("malformed", f"the field {column!r} is no list of messages")
    for number, turn in enumerate(value, start=1):
        where = f"turn {number} in {column!r}"
        if not isinstance(turn, Mapping):
            raise Faulty("malformed", f"{where} is a {kind(turn)}, not a message")
        said = _speaker(turn)
        role = ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise Faulty("malformed", f"{where} has the unknown role {said!r}")
        if role == "system" and number > 1:
            raise Faulty("malformed", f"{where} is a system turn; only the first turn may be")
        text = _content(turn, where)
        if text.strip():
            yield {"role": role, "content": text}
        elif role != "system":
            only_thought = any(_is_thought(part) for part in _parts(turn))
            raise Faulty("empty", f"{where} {'holds nothing but a thought' if only_thought else 'is empty'}")


def _content(turn: Mapping[str, Any], where: str) -> str:
    """The text of a turn. Its content is a text, or a list of parts of which each is a text; an assistant's may be
    thoughts as well, which are left out."""
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Faulty("malformed", f"{where} calls a tool")
    content = _first(turn, "content", "value")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Faulty("malformed", f"the content of {where} is a {kind(content)}, not a text")
    speaks = ROLES.get(str(_speaker(turn)).lower()) == "assistant"
    texts = []
    for part in content:
        if speaks and _is_thought(part):
            continue
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") in TEXT_PARTS else part
        if not isinstance(text, str):
            found = part.get("type") if isinstance(part, Mapping) else kind(part)
            raise Faulty("malformed", f"the content of {where} holds a part of the type {found!r}, not a text")
        texts.append(text)
    return "".join(texts)


def _parts(turn: Mapping[str, Any]) -> list[Any]:
    """The parts of a turn's content, where it is a list of them."""
    content = _first(turn, "content", "value")
    return content if isinstance(content, list) else []


def _is_thought(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in THOUGHT_PARTS


# --- choices -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    label: str
    """The data set's own name of the choice; its letter, if it has none."""
    text: str


def choices(value: Any, column: str) -> Iterator[Choice]:
    """The choices of a question: a list of texts, {text: [...], label: [...]}, a list of {label, text}, or {A: ...}.
    Raises Faulty."""
    labels: list[Any] = list(ascii_uppercase)
    match value:
        case {"text": list(texts), **rest}:
            given = rest.get("label")
            labels = given if isinstance(given, list) and given else labels
        case {**texts_by_label} if texts_by_label:
            named = [(label, text) for label, text in texts_by_label.items() if text is not None]
            labels, texts = [label for label, _ in named], [text for _, text in named]
        case [{"text": _}, *_] | [{"value": _}, *_]:
            texts = [_first(one, "text", "value") if isinstance(one, Mapping) else one for one in value]
            labels = [one.get("label") or one.get("key") for one in value if isinstance(one, Mapping)]
            labels = labels if all(labels) else list(ascii_uppercase)
        case list(texts):
            pass
        case _:
            texts = []
    if not 2 <= len(texts) <= len(ascii_uppercase) or len(labels) < len(texts):
        raise Faulty("malformed", f"the field {column!r} holds no list of 2 to {len(ascii_uppercase)} choices")
    for label, text in zip(labels, texts, strict=False):
        if isinstance(text, bool | list | dict) or text is None or not as_text(text).strip():
            raise Faulty("malformed", f"a choice in {column!r} is no text: {text!r}")
        yield Choice(as_text(label), as_text(text))


def lettered(listed: list[Choice]) -> str:
    """The choices as lines: `A. 12 km`."""
    return "\n".join(
        f"{letter}. {choice.text.strip()}" for letter, choice in zip(ascii_uppercase, listed, strict=False)
    )


def letter_of(reference: Any, listed: list[Choice]) -> str:
    """The letter of the right choice, which a data set names by its label, its index from 0, its letter or its text.
    The first of these that fits a choice counts. Raises Faulty."""
    letters = ascii_uppercase[: len(listed)]
    if isinstance(reference, bool | list | dict):
        raise Faulty("malformed", f"the reference is a {kind(reference)}, which names no choice")
    try:
        named, index = as_text(reference).strip(), None
    except ValueError as error:
        raise Faulty("malformed", f"the reference is {error}") from error
    labels = [choice.label.strip() for choice in listed]
    texts = [choice.text.strip() for choice in listed]
    if isinstance(reference, int) and labels == list(letters) and 0 <= reference < len(listed):
        index = reference
    elif names := next((names for names in (labels, list(letters), texts) if named in names), None):
        index = names.index(named)
    elif named.isdecimal() and len(named) <= 2:
        index = int(named)
    if index is None or not 0 <= index < len(listed):
        raise Faulty("malformed", f"the reference {named[:60]!r} is none of the {len(listed)} choices")
    return letters[index]
