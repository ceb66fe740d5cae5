"""What the columns of a source hold: prompts, conversations, references and choices, in the shapes that data sets have.
Pure: a line goes in, a row or its fault comes out."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from cgd_stages.chat.messages import Message
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
    if reference is None or isinstance(reference, str):
        return reference
    try:
        if isinstance(reference, list) and len(reference) > 1:
            several = fields.several or ("any" if all(isinstance(one, str) for one in reference) else "all")
            if several == "any":
                return any_of([as_text(one) for one in reference])
        return as_text(reference)
    except ValueError as error:
        raise Faulty("malformed", f"the field {fields.reference!r} is {error}") from error


# --- conversations -----------------------------------------------------------------------------------------------


def conversation(value: Any, column: str) -> tuple[list[Message], str, str | None]:
    """The turns before the last user turn, that turn, and the assistant's reply to it where the conversation has one.

    It is a list of {role, content} or of {from, value}, or such a list as JSON. An empty system turn is left out.
    Raises Faulty.
    """
    messages = list(_messages(value, column))
    last = max((place for place, turn in enumerate(messages) if turn["role"] == "user"), default=None)
    if last is None:
        raise Faulty("malformed", f"the conversation in {column!r} has no user turn")
    after = messages[last + 1 :]
    if len(after) > 1 or any(turn["role"] != "assistant" for turn in after):
        roles = ", ".join(turn["role"] for turn in after)
        raise Faulty("malformed", f"after the last user turn in {column!r} stand {roles}; one assistant turn may")
    return messages[:last], messages[last]["content"], after[0]["content"] if after else None


def _messages(value: Any, column: str) -> Iterator[Message]:
    if isinstance(value, str):
        try:
            value = parse(value.encode())
        except ValueError as error:
            detail = f"the field {column!r} is a text, not a list of messages; a text belongs to fields.prompt"
            raise Faulty("malformed", detail) from error
    if not isinstance(value, list) or not value:
        raise Faulty("malformed", f"the field {column!r} is no list of messages")
    for number, turn in enumerate(value, start=1):
        where = f"turn {number} in {column!r}"
        if not isinstance(turn, Mapping):
            raise Faulty("malformed", f"{where} is a {kind(turn)}, not a message")
        said = turn.get("role") or turn.get("from")
        role = ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise Faulty("malformed", f"{where} has the unknown role {said!r}")
        if role == "system" and number > 1:
            raise Faulty("malformed", f"{where} is a system turn; only the first turn may be")
        text = _content(turn, where)
        if text.strip():
            yield {"role": role, "content": text}
        elif role != "system":
            raise Faulty("empty", f"{where} is empty")


def _content(turn: Mapping[str, Any], where: str) -> str:
    """The text of a turn. Its content is a text, or a list of parts of which each is a text."""
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Faulty("malformed", f"{where} calls a tool")
    content = turn.get("content", turn.get("value"))
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Faulty("malformed", f"the content of {where} is a {kind(content)}, not a text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") in ("text", "input_text") else part
        if not isinstance(text, str):
            found = part.get("type") if isinstance(part, Mapping) else kind(part)
            raise Faulty("malformed", f"the content of {where} holds a part of the type {found!r}, not a text")
        texts.append(text)
    return "".join(texts)


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
            texts = [one.get("text", one.get("value")) if isinstance(one, Mapping) else one for one in value]
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
