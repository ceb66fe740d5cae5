"""Reads off a chat template what stands around a reply and its thought, by rendering conversations with it. Pure.

Nothing is guessed from a template's source: words that no template holds stand for question, thought and answer, and
what the template writes between them is what the model writes there. Where a template never writes a thought, the
prompt that opens one shows the family, or the template's habit of cutting the family's thoughts from its replies; else
the user names the format (`chat.reasoningParser`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from cgd_stages.chat.messages import Message
from cgd_stages.chat.thoughts import FAMILIES, PARSERS, Markers, Opened, unknown_markers
from cgd_stages.contract import Chat

_USER, _ANSWER, _THOUGHT, _NEXT = "qzxvuone", "qzxvatwo", "qzxvtthree", "qzxvnfour"
WORD = _NEXT
"""A word that no template holds."""
QUESTION: list[Message] = [{"role": "user", "content": _USER}]
CONVERSATIONS: list[list[Message]] = [QUESTION, [{"role": "system", "content": _NEXT}, *QUESTION]]
_LONG = "The QUICK  fox jumps:\n\n\tover \\boxed{\"lazy\"} <b>dogs</b> & 'Ünï' ### 中文 (1/2) " * 300 + "Whole?"
"""A text of a user: of 20,000 characters, with all that templates might cut, replace or escape."""
_LEAST_EFFORTS = ("none", "no_think", "minimal")
_SWITCHES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    *(({name: True}, {name: False}) for name in ("enable_thinking", "thinking", "reasoning")),
    ({}, {"thinking_budget": 0}),
    *(({"reasoning_effort": "high"}, {"reasoning_effort": idle}) for idle in _LEAST_EFFORTS),
)
"""The variables by which templates switch thinking: Seed-OSS has a budget; Mistral, Hunyuan 3 and Solar Open
have an effort."""
NO_THOUGHTS = (
    "Set chat.thinking to off and spec.training.thinking to drop, or name the format of its thoughts in "
    "chat.reasoningParser."
)
MEND = "Take another model, or mend its template by chat.template."
CANNOT_STOP = (
    "Set spec.training.thinking to learn, so that the student thinks in answer, training and evaluation; or give its "
    "chat.template a prompt that ends behind an empty thought."
)


class Unfit(ValueError):
    """What a template cannot do; `what` follows the words "the chat template of ..."."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


class Speak(Protocol):
    """Renders messages; keyword arguments are variables of the template. Raises TemplateError."""

    def __call__(self, messages: Sequence[Any], *, prompt: bool, **more: Any) -> str: ...


@dataclass(frozen=True)
class Turn:
    """What stands around a reply in one mode."""

    end: tuple[int, ...]
    """The ids with which the model ends its reply."""
    header: str = ""
    """What the model writes before an answer without a thought."""
    opening: str = ""
    """What the model writes before a thought; empty where the prompt has opened it."""
    tail: str = ""
    """Plain text between an answer and the ids that end it."""
    markup: Markers | None = None
    opened: Opened = None
    values: dict[str, Any] = field(default_factory=dict)
    """The variables of the template that set the mode."""
    keeps: tuple[bool, bool] = (True, True)
    """Whether the template keeps blanks before and after an answer."""
    made: str = ""
    """Everything that the template itself has written around the probes."""

    foot: str = ""
    """What ends the frame of an answer, where the template does not."""

    def tail_after(self, head: str) -> str:
        """The plain text after an answer that follows `head`."""
        framed = self.markup and self.markup.frame and head.rstrip().endswith(self.markup.frame)
        return (self.foot if framed else "") + self.tail


def turn(speak: Speak, tokenizer: Any, chat: Chat, stops: frozenset[int]) -> Turn:
    """What stands around a reply of this model in this mode. Raises TemplateError, and Unfit."""
    thinking, idle = _switch(speak, chat)
    markup = _markup(speak, chat, thinking, idle)
    if markup is None and (unknown := unknown_markers(tokenizer)):
        raise Unfit(
            f"does not show how the model writes its thoughts, whose markers seem to be {', '.join(unknown)}",
            "Name the format of its thoughts in chat.reasoningParser, or give it a chat.template that writes a "
            "reply's reasoning_content.",
        )
    values = {"auto": {}, "on": thinking, "off": idle}[chat.thinking]
    prompt = speak(QUESTION, prompt=True, **values)
    _refuse_changed(speak, values)
    opened = _opened(_after_question(prompt), markup)
    _refuse_mode(chat, markup, opened, switched=thinking != idle)
    reply = speak(_replied(_ANSWER), prompt=False, **values)
    if _ANSWER not in reply:
        raise Unfit("does not write the assistant's turn", "Take another model, or give it another chat.template.")
    if reply.count(_ANSWER) > 1:
        raise Unfit("writes the assistant's turn more than once", MEND)
    head, tail = _around(reply, _ANSWER)
    if markup and opened is not None:  # some templates write the thought of a prompt after a reply, too
        tail = tail.removesuffix(prompt[_thought_at(prompt, markup) :])
    _refuse_next_reply(tokenizer, head, tail, _following(speak, values), stops)
    plain_tail, end = _end(speak, tokenizer, tail, stops, values)
    header = _header(prompt, head, markup, opened)
    if chat.reasoning_parser and markup and markup.frame and opened is False:  # the template shows no frame
        header = header or markup.bridge.partition(markup.end)[2].lstrip()
    return Turn(
        end=end,
        header=header,
        opening=markup.opening if markup and not opened else "",
        tail=plain_tail,
        markup=markup,
        opened=opened,
        values=values,
        keeps=_keeps(speak, values),
        made=prompt + head + tail,
        foot=markup.foot if markup and markup.foot.strip() not in tail else "",
    )


def end_of_text(tokenizer: Any) -> tuple[int, ...]:
    """Empty where the tokenizer has no such token: the model can be asked, and no example can be made."""
    return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)


def _refuse_changed(speak: Speak, values: dict[str, Any]) -> None:
    """Raise Unfit for a template that drops, cuts or changes a user's text: the model would be asked something else."""
    try:
        text = speak([{"role": "user", "content": _LONG}], prompt=True, **values)
    except TemplateError:  # it refuses such texts, and so the rows that have one
        return
    if _LONG not in text:
        raise Unfit("does not write the user's text whole and as it is", MEND)


def _refuse_next_reply(tokenizer: Any, head: str, tail: str, following: str, stops: frozenset[int]) -> None:
    """Raise Unfit for a template that begins another reply behind every reply: it would be learned as the end of one.
    `following` is what it writes where a question follows."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tail, following, strict=False)))
    begun = tail[shared:].strip()
    if begun and head.rstrip().endswith(begun) and not stops.issuperset(_ids(tokenizer, begun)):
        raise Unfit(
            f"begins another reply ({begun!r}) behind a reply",
            "Let its chat.template write that where add_generation_prompt is true alone.",
        )


def _replied(content: Any, **more: str) -> list[dict[str, Any]]:
    return [*map(dict, QUESTION), {"role": "assistant", "content": content, **more}]


def _around(text: str, word: str) -> tuple[str, str]:
    before, _, after = text.rpartition(word)
    return before, after


def _after_question(text: str) -> str:
    return text.rpartition(_USER)[2]


# --- thoughts ---------------------------------------------------------------------------------------------------------


def _switch(speak: Speak, chat: Chat) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables of both modes, if any change what the template makes of a question. A template that copies whatever
    effort it is given, as gpt-oss's, has no switch in it. The user's own effort stays where the model thinks."""
    for thinking, idle in _SWITCHES:
        given = {name: chat.template_kwargs[name] for name in thinking.keys() & chat.template_kwargs.keys()}
        thinking = thinking if set(given.values()) & set(_LEAST_EFFORTS) else thinking | given
        try:
            differ = speak(QUESTION, prompt=True, **thinking) != speak(QUESTION, prompt=True, **idle)
        except TemplateError:  # this value is none of the template's
            continue
        if differ and not _copies(speak, idle):
            return thinking, idle
    return {}, {}


def _copies(speak: Speak, values: dict[str, Any]) -> bool:
    """Whether the template writes any text that one of these variables may have."""
    texts = {name: _NEXT for name, value in values.items() if isinstance(value, str)}
    try:
        return _NEXT in speak(QUESTION, prompt=True, **texts)
    except TemplateError:
        return False


def _markup(speak: Speak, chat: Chat, thinking: dict[str, Any], idle: dict[str, Any]) -> Markers | None:
    """The markers of the model's thoughts: as the template writes them, else those of the family that it handles or
    that the run names. Raises Unfit where the run names another form than the template's."""
    named = PARSERS[chat.reasoning_parser] if chat.reasoning_parser else None
    prompt = speak(QUESTION, prompt=True, **thinking)
    shown = _shown(speak, prompt, thinking)
    stored = _around(_after_question(speak(_replied(_ANSWER), prompt=False, **idle)), _ANSWER)[0]
    made = [_after_question(prompt), _after_question(speak(QUESTION, prompt=True, **idle)), stored]
    own = shown or _handled(speak, FAMILIES, made, thinking)
    if named and own and named.end != own.end:
        raise Unfit(
            f"has thoughts that end with {own.end}, and those of chat.reasoningParser {chat.reasoning_parser} end with "
            f"{named.end}",
            "Leave chat.reasoningParser out: the template shows the form.",
        )
    if shown or named is None:
        return own
    return _handled(speak, [named], made, thinking) or named


def _handled(speak: Speak, families: Sequence[Markers], made: Sequence[str], values: dict[str, Any]) -> Markers | None:
    """The first of the families whose thoughts the template opens in a text that it has `made` (the last one is that of
    a stored reply), or cuts from a reply."""
    for family in families:
        for text in made:
            if family.start in text:
                return _as_opened(family, text, made[-1])
        if _cuts(speak, family, values):
            return family
    return None


def _shown(speak: Speak, prompt: str, values: dict[str, Any]) -> Markers | None:
    """The markers, if the template writes a thought that a reply has in a field of its own."""
    fields = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _THOUGHT)
    parts: Any = [{"type": "thinking", "thinking": _THOUGHT}, {"type": "text", "text": _ANSWER}]
    blocks = {"blocks": [{"type": "thoughts", "text": _THOUGHT}, {"type": "response", "text": _ANSWER}]}  # Apertus
    for reply in (_replied(_ANSWER, **fields), _replied(parts), _replied(blocks)):
        try:
            text = speak(reply, prompt=False, **values)
        except TemplateError:
            continue
        if any(f"{quote}{_THOUGHT}{quote}" in text for quote in "'\""):
            continue  # the list of parts itself, written as text
        before, found, rest = text.partition(_THOUGHT)
        bridge, answered, _ = rest.partition(_ANSWER)
        if found and answered and bridge.strip():
            return _read(prompt, before, bridge, speak(_replied(_ANSWER), prompt=False, **values))
    return None


def _read(prompt: str, before: str, bridge: str, without: str) -> Markers:
    """The markup of a reply that has `before` its thought and `bridge` behind it, where a reply without a thought is
    `without`."""
    header = ""
    answered = without.rpartition(_ANSWER)[0]
    if answered.startswith(prompt) and bridge.endswith(rest := answered[len(prompt) :]) and rest != bridge:
        header = rest if rest.strip() else ""
    if before.startswith(prompt) and (rest := before[len(prompt) :]).strip():
        return Markers(rest, bridge, header)
    if prompt.startswith(before) and (rest := prompt[len(before) :]).strip() and Markers("", bridge).end not in rest:
        return Markers(rest, bridge, header)  # the prompt opens thoughts by a text that stored replies do not have
    made = _after_question(before)
    for family in FAMILIES:
        if family.header and family.bridge == bridge and family.start in made:
            return Markers(made[made.rindex(family.start) :], bridge, family.header)
    start = _start_of(bridge, header)
    return Markers(made[made.rindex(start) :] if start in made else made.lstrip(), bridge, header)


def _start_of(bridge: str, header: str) -> str:
    """The marker that opens what the bridge ends: of the family with this end, or the end without its slash."""
    end = Markers("", bridge, header).end
    return next((family.start for family in FAMILIES if family.end == end), end.replace("/", "", 1))


def _as_opened(family: Markers, made: str, stored: str) -> Markers:
    """The family's markup with the blanks that the template writes: after the marker that opens a thought, in a prompt,
    and before an answer, in a stored reply."""
    if family.header:
        return family
    inner, closed, _ = made[made.rindex(family.start) + len(family.start) :].partition(family.end)
    inner = "" if inner.strip() else inner
    middle = (len(inner) + 1) // 2 if closed else len(inner)  # an empty thought has the blanks of both sides
    lead, trail = inner[:middle], inner[middle:] if closed else inner
    _, ended, after = stored.rpartition(family.end)
    rest = after if ended and not after.strip() else family.bridge.partition(family.end)[2]
    return Markers(family.start + lead, trail + family.end + rest)


def _cuts(speak: Speak, family: Markers, values: dict[str, Any]) -> bool:
    """Whether the template cuts a thought of this family from a reply."""
    try:
        content = f"{family.opening}{_THOUGHT}{family.bridge}{_ANSWER}"
        text = speak(_replied(content), prompt=False, **values)
    except TemplateError:
        return False
    return _ANSWER in text and _THOUGHT not in text


def _opened(made: str, markup: Markers | None) -> Opened:
    if markup is None:
        return None
    start, end = made.rfind(markup.start), made.rfind(markup.end)
    if start > end and markup.closing:  # a thought may end before the header of an answer
        end = made.rfind(markup.closing, start)
    return None if start == end == -1 else start > end


def mode_of(prompt: str, markup: Markers) -> Opened:
    """Whether a prompt of any conversation ends with a marker that opens a thought, or ends it."""
    text = prompt.rstrip()
    if text.endswith(markup.start):
        return True
    ends = [marker for marker in (markup.end, markup.closing) if marker]
    return False if text.endswith(tuple(ends)) else None


def _refuse_mode(chat: Chat, markup: Markers | None, opened: Opened, *, switched: bool) -> None:
    if chat.thinking == "on":
        if markup is None:
            raise Unfit("has no thoughts, but thinking is on", NO_THOUGHTS)
        if opened is False:
            raise Unfit("closes the thought in the prompt although thinking is on", NO_THOUGHTS)
    if chat.thinking == "off" and markup and (opened or (markup.header and not switched and opened is None)):
        raise Unfit(f"cannot switch thinking off: a reply begins with {markup.start}", CANNOT_STOP)


# --- the reply --------------------------------------------------------------------------------------------------------


def _header(prompt: str, head: str, markup: Markers | None, opened: Opened) -> str:
    """What the model itself writes between the prompt and an answer without a thought. `head`: what the template writes
    before a stored answer."""
    if head.startswith(prompt):
        rest = head[len(prompt) :]
        return "" if markup and markup.start in rest else rest  # an empty thought is the template's
    base = prompt
    if markup and opened is not None:
        base = prompt[: _thought_at(prompt, markup)]
        header = markup.header.strip()
        if header and head.startswith(base) and (rest := head[len(base) :]).strip() == header:
            return rest
        base = base.rstrip()
    if head.startswith(base) or (base.startswith(head) and not base[len(head) :].strip()):
        return ""
    raise Unfit(
        "begins differently when a reply follows the context, so that its examples would differ from its prompts",
        "Take another model or revision, or mend its template by chat.template.",
    )


def _thought_at(prompt: str, markup: Markers) -> int:
    """The place where the first marker of a thought stands in what a prompt has behind its question."""
    made = _after_question(prompt)
    first = min(place for place in map(made.find, (markup.start, markup.end)) if place != -1)
    return len(prompt) - len(made) + first


def _keeps(speak: Speak, values: dict[str, Any]) -> tuple[bool, bool]:
    pad = " \n "
    text = speak(_replied(f"{pad}{_ANSWER}{pad}"), prompt=False, **values)
    before, after = _around(text, _ANSWER)
    return before.endswith(pad), after.startswith(pad)


def _end(
    speak: Speak, tokenizer: Any, tail: str, stops: frozenset[int], values: dict[str, Any]
) -> tuple[str, tuple[int, ...]]:
    """Plain text after an answer, and the ids that end the reply.

    The end of a turn is what follows an answer whether or not another turn follows: some templates write the end of the
    text as well where the conversation ends. Else it is what the template writes there, or begins the next turn with
    and the model stops at, or the end of the text.
    """
    added = set(tokenizer.added_tokens_decoder)
    ids = _ids(tokenizer, tail)
    following = _ids(tokenizer, _following(speak, values))
    shared = [number for number, _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, following, strict=False))]
    ends = [place for place, number in enumerate(shared) if number in added]
    ends = [place for place in ends if shared[place] in stops][:1] or ends[-1:]  # the model stops before it goes on
    ends = ends or [place for place, number in enumerate(ids) if number in stops or number in added]
    if ends:
        first = next(place for place, number in enumerate(ids) if number in added or number in stops)
        rest = [number for number in ids[ends[0] + 1 :] if number not in added]
        if tokenizer.decode(rest).strip():
            raise Unfit("writes text after the end of the reply", "Mend the template by chat.template.")
        mark = tokenizer.decode([ids[first]], skip_special_tokens=False).strip()
        return tail.partition(mark)[0], tuple(ids[first : ends[0] + 1])  # some tokenizers decode blanks as nothing
    begins = next((number for number in following if number in added), None)
    return tail, (begins,) if begins in stops and begins is not None else end_of_text(tokenizer)


def _following(speak: Speak, values: dict[str, Any]) -> str:
    """What the template writes between an answer and the next question."""
    try:
        text = speak([*_replied(_ANSWER), {"role": "user", "content": _NEXT}], prompt=False, **values)
    except TemplateError:
        return ""
    return text.rpartition(_ANSWER)[2].partition(_NEXT)[0]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
