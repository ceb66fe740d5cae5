"""How one model is spoken to: its tokenizer, its chat template and its mode, and what it writes around a reply.

`ChatTemplate.load` finds out once, with the model's own template, what stands around a thought and a reply (`probe`).
After that every program speaks through the same object: the engine, which renders and splits; the examples, whose
context is the engine's prompt token for token; and the digests.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from cgd_stages.chat import probe
from cgd_stages.chat.messages import Message, plain, without_system
from cgd_stages.chat.thoughts import (
    FAMILIES,
    PARSERS_OF_TYPES,
    THINK,
    Markers,
    Opened,
    Seen,
    Split,
    split,
    split_text,
)
from cgd_stages.chat.tokenizer import OLD_TEMPLATE, TEKKEN, WHOLE, load_tokenizer
from cgd_stages.contract import Chat
from cgd_stages.errors import UserError
from cgd_stages.store.rows import digest_of

_BREAKS = [chr(0xFDD0 + number) for number in range(32)]
"""Characters that Unicode keeps out of texts: a rendered text is tokenised apart at one of them."""
_SOME_DAY, _ANOTHER_DAY = "2001-02-03", "2002-03-04"


class ControlTokens(ValueError):
    """A text holds a control token of the model, which its tokenizer cannot write as plain text."""


@dataclass(frozen=True)
class Rendered:
    """A text that is tokenised in pieces, so that no text of a user or a model becomes a control token. Nearly always
    it is one piece."""

    pieces: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def then(self, other: "Rendered") -> "Rendered":
        joint = self.pieces[-1] + other.pieces[0]
        return Rendered((*self.pieces[:-1], joint, *other.pieces[1:]))


class ChatTemplate:
    """A model's tokenizer, chat template and mode. `chat.template`, if any, is the template's own text.

    `name` names the model in errors; `stops` are the ids at which its generation ends; `files` is a folder with the
    tokenizer's files, where that is not the model's own (see `load_tokenizer`). Raises UserError for what the template
    cannot do.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat: Chat | None = None,
        *,
        name: str = "the model",
        stops: frozenset[int] = frozenset(),
        files: Path | None = None,
    ) -> None:
        self.tokenizer, self.chat, self.name, self.files = tokenizer, chat or Chat(), name, files
        self._stops = stops | ({tokenizer.eos_token_id} - {None})
        self._values: dict[str, Any] = dict(self.chat.template_kwargs)
        self._source = self.chat.template or _own(tokenizer)
        try:
            self.turn = (
                probe.turn(self._speak, tokenizer, self.chat, self._stops) if self._source else self._bare_turn()
            )
        except TemplateError as error:
            hint = "Take another model or revision, or mend its template by chat.template."
            raise UserError(f"the chat template of {name} fails: {error}", hint=hint) from error
        except probe.Unfit as unfit:
            raise UserError(f"the chat template of {name} {unfit.what}", hint=unfit.hint) from unfit
        self._values |= self.turn.values

    @classmethod
    def load(cls, folder: Path, chat: Chat | None = None, *, name: str | None = None) -> "ChatTemplate":
        """Of a model's folder, weights or not. Raises what `load_tokenizer` raises, too."""
        name, chat = name or str(folder), chat or Chat()
        loaded = load_tokenizer(folder, name)
        files = loaded.folder if loaded.mended else None
        if not (chat.template or _own(loaded.tokenizer)):
            chat = chat.model_copy(update={"template": _of_processor(folder, name)})
        if chat.reasoning_parser is None and THINK.start in (chat.template or _own(loaded.tokenizer) or ""):
            chat = chat.model_copy(update={"reasoning_parser": PARSERS_OF_TYPES.get(_model_type(folder))})
        return cls(loaded.tokenizer, chat, name=name, stops=_stops(folder), files=files)

    # --- what the model is and does ---------------------------------------------------------------------------------

    @property
    def markup(self) -> Markers | None:
        """The markers of the model's thoughts; None if it has none that are known."""
        return self.turn.markup

    @property
    def opened(self) -> Opened:
        return self.turn.opened

    @property
    def thinks(self) -> bool:
        """Whether the model thinks, or may think, before it answers in this mode."""
        return self.markup is not None and self.opened is not False and self.chat.thinking != "off"

    @property
    def templated(self) -> bool:
        """Whether the model has a chat template, its own or the run's."""
        return bool(self._source)

    def without_thoughts(self) -> "ChatTemplate":
        """The same model, asked to answer at once. Raises UserError for a model that always thinks."""
        if not self.thinks:
            return self
        off = self.chat.model_copy(update={"thinking": "off"})
        return ChatTemplate(self.tokenizer, off, name=self.name, stops=self._stops, files=self.files)

    @property
    def extra_stops(self) -> list[int]:
        """The id that ends a turn by the template, where the model's own generation would go on after it."""
        return [number for number in self.turn.end[-1:] if number not in self._stops]

    @property
    def stops(self) -> frozenset[int]:
        """The ids at which a reply ends."""
        return self._stops.union(self.extra_stops)

    @cached_property
    def dated(self) -> bool:
        """Whether the template writes the day on which it is asked."""
        one, other = (self._prompts(self._source, self._values, day) for day in (_SOME_DAY, _ANOTHER_DAY))
        return one != other

    @property
    def end_marker(self) -> str | None:
        """The text after which the answer begins, where a reply's text shows it: control tokens that are special do not
        appear in the texts of lm-eval and of most servers."""
        if self.markup is None:
            return None
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return None if any(content in self.markup.end for content in special) else self.markup.end

    @property
    def summary(self) -> str:
        """How the model is spoken to, in a sentence for a log."""
        if not self._source:
            return f"{self.name} has no chat template; it gets a plain question and answer frame"
        mode = f"thinking {self.chat.thinking}, thoughts end with {self.markup.end}" if self.markup else "no thoughts"
        return f"{self.name}: {mode}" + (f", the template is told {self.chat.date}" if self.dated else "")

    # --- rendering --------------------------------------------------------------------------------------------------

    def render(self, messages: list[Message]) -> Rendered:
        """What the model reads, up to where its reply begins, special tokens included. Raises jinja2's TemplateError
        when the template refuses the messages, and ControlTokens."""
        messages, mark = self._broken(messages)
        text = self._prompt(messages)
        if self.markup and probe.mode_of(text, self.markup) != self._mode:
            raise TemplateError("words in the prompt, such as /no_think, switch thinking against the run's mode")
        if lost := next((turn for turn in messages if turn["content"].strip() not in text), None):
            raise TemplateError(f"it leaves out words of the {lost['role']}'s turn {lost['content'][:50]!r}")
        return Rendered(tuple(text.split(mark)) if mark else (text,))

    def token_ids(self, rendered: Rendered) -> list[int]:
        """The ids of a rendered text. Raises ControlTokens where its pieces cannot be written as plain text."""
        ids = [number for piece in rendered.pieces for number in token_ids(self.tokenizer, piece)]
        if len(rendered.pieces) > 1:
            whole = token_ids(self.tokenizer, rendered.text)
            if self.tokenizer.decode(ids) != self.tokenizer.decode(whole):
                raise ControlTokens("the tokenizer cannot write a control token as plain text")
        return ids

    def control_tokens(self, text: str) -> list[str]:
        """The texts in it that the tokenizer would read as control tokens."""
        return sorted(set(self._control.findall(text)))

    def thought_markers(self, text: str) -> list[str]:
        """The markers of the model's own thoughts in a text: learned there, they would begin or end a thought in the
        middle of a reply."""
        return [marker for marker in self.markup.marks if marker in text] if self.markup else []

    def plainly(self, text: str) -> Rendered:
        """A text of a user or a model, in pieces of which none holds a control token. Raises ControlTokens."""
        mark = next(character for character in _BREAKS if character not in text)
        return Rendered(tuple(self._broken_text(text, mark).split(mark)))

    @cached_property
    def _mode(self) -> Opened:
        """How the prompts of this mode end: see `probe.mode_of`."""
        return probe.mode_of(self._prompt(probe.QUESTION), self.markup) if self.markup else None

    def _prompt(self, messages: list[Message]) -> str:
        return prompt_of(self._speak, messages) if self._source else self._opening + plain(messages)

    def _speak(self, messages: Sequence[Any], *, prompt: bool, date: str | None = None, **more: Any) -> str:
        """The rendered messages; `more` replaces variables of the template. Raises TemplateError."""
        values = self._values | more
        if day := date or self.chat.date:
            values["strftime_now"] = datetime.fromisoformat(day).strftime
        return self._rendered(messages, prompt, self._source, values)

    def _rendered(self, messages: Sequence[Any], prompt: bool, source: str | None, values: dict[str, Any]) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), chat_template=source, tokenize=False, add_generation_prompt=prompt, **values
                )
            )
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from error

    @cached_property
    def _opening(self) -> str:
        """The token with which the tokenizer begins a text, for a model without a template."""
        first = self.tokenizer("")["input_ids"][:1]
        return str(self.tokenizer.bos_token) if first and first == [self.tokenizer.bos_token_id] else ""

    def _bare_turn(self) -> probe.Turn:
        if self.chat.thinking == "on":
            raise probe.Unfit("is missing, so nothing asks for a thought", probe.NO_THOUGHTS)
        return probe.Turn(header=" ", end=probe.end_of_text(self.tokenizer))

    # --- control tokens in texts ------------------------------------------------------------------------------------

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Finds the special tokens, and other added tokens by which the template or a thought of any family is marked:
        Qwen3-2507 has the markers of thoughts, and a template without any. (Some tokenizers have added tokens for
        ordinary text, such as three blanks.)"""
        made = self.turn.made + (self.markup.opening + self.markup.bridge if self.markup else "")
        added = self.tokenizer.added_tokens_decoder
        marks = {marker for markup in FAMILIES for marker in markup.marks}
        texts = {token.content: token.special for token in added.values()}
        contents = {content for content, special in texts.items() if special or content in marks or content in made}
        contents = {content for content in contents | set(self.tokenizer.all_special_tokens) if content.strip()}
        ends = {added[number].content for number in self._stops.union(self.turn.end) if number in added}
        contents = {content for content in contents if len(content) > 1 or content in ends}  # no "!" that fills batches
        return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or r"(?!)")

    def _broken(self, messages: list[Message]) -> tuple[list[Message], str]:
        """The messages with a mark in every control token of their texts, and the mark; "" if they need none."""
        if not any(self._control.search(message["content"]) for message in messages):
            return messages, ""
        texts = "".join(message["content"] for message in messages)
        mark = next(character for character in _BREAKS if character not in texts)
        return [{**message, "content": self._broken_text(message["content"], mark)} for message in messages], mark

    def _broken_text(self, text: str, mark: str) -> str:
        def broken(found: re.Match[str]) -> str:
            middle = len(found[0]) // 2
            if not middle:
                raise ControlTokens(f"{found[0]!r} is a control token of one character")
            return found[0][:middle] + mark + found[0][middle:]

        while self._control.search(text):  # a second one may overlap the first
            text = self._control.sub(broken, text)
        return text

    # --- replies ----------------------------------------------------------------------------------------------------

    def split(self, ids: Sequence[int], text: str) -> Split:
        """A reply's thought and answer, from its ids. `text`: the engine's own text of them, for a reply without any
        marker."""
        head, end = self._header_ids, self.turn.end
        if head and tuple(ids[: len(head)]) == head:
            ids = ids[len(head) :]
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
        one = not self._stops.union(end[-1:]).isdisjoint(ids[-1:])
        ended = len(end) if end and tuple(ids[-len(end) :]) == end else one
        seen = self._seen.text(ids[: len(ids) - ended])
        if self.markup is not None:
            return self._bare(self._seen.restored(split(seen, self._seen.markup(self.markup), self.opened)))
        for markup in self._marked_by_tokens:
            if seen.strip().startswith((markup.start, markup.header.strip() or markup.start)):
                return self._seen.restored(split(seen, markup))
        return self._bare(split_text(text, lone_end=False))

    def split_text(self, text: str) -> Split:
        """A reply's thought and answer, from a text that shows the model's markers. See `end_marker`."""
        return self._bare(split(text, self.markup, self.opened) if self.markup else split_text(text, lone_end=False))

    def _bare(self, parts: Split) -> Split:
        """The parts without the words between an answer and the end of its turn."""
        tails = self.turn.tail.strip(), self.markup.foot.strip() if self.markup else ""
        text = reduce(str.removesuffix, tails, parts.text)
        return replace(parts, text=text.strip())

    @cached_property
    def _header_ids(self) -> tuple[int, ...]:
        """What the model writes itself because the template has no beginning of a reply for a prompt; nearly always
        nothing."""
        header = self.turn.header if self.markup is None and self._control.search(self.turn.header) else ""
        return tuple(token_ids(self.tokenizer, header)) if header else ()

    @cached_property
    def _seen(self) -> Seen:
        return Seen(self.tokenizer, [*FAMILIES, *([self.markup] if self.markup else [])])

    @cached_property
    def _marked_by_tokens(self) -> list[Markers]:
        """The markups, in coded form, whose markers are control tokens of this model: a reply that begins with one is a
        thought of that form, whatever the template says. S1.1's template says nothing."""
        return [self._seen.markup(markup) for markup in FAMILIES if self._seen.holds(markup)]

    # --- digests ----------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, dict[str, str]]:
        """Its part of a digest's inputs, with the mode and the date in words for the report. Empty where mode,
        template, variables and date change nothing of what the bare template makes, and the model has no thoughts;
        earlier builds followed a tokenizer's class also where its file says otherwise."""
        mended = {"tokenizer": {"rules": WHOLE}} if self.files else {}
        dated = self.dated and self.chat.date is not None
        mine = self._prompts(self._source, self._values, self.chat.date if dated else None)
        bare = self._prompts(_own(self.tokenizer), {}, None)
        if self.markup is None and not dated and not self.extra_stops and mine == bare:
            return mended
        marks = (self.markup.opening, self.markup.bridge, self.markup.header) if self.markup else None
        rendering = digest_of(prompts=mine, marks=marks, opened=self.opened, stops=self.extra_stops)
        thinking = {"thinking": "on" if self.thinks else "off"} if self.markup else {}
        date = {"date": str(self.chat.date)} if dated else {}
        return {"chat": {"rendering": rendering, **thinking, **date}} | mended

    def ending(self) -> dict[str, list[int]]:
        """The part of a training's digest for the ids that end a reply: empty where they are the first special token
        that the template writes, or the end of the text, as in earlier builds."""
        special = set(self.tokenizer.all_special_ids)
        first = next((place for place, number in enumerate(self.turn.end) if number in special), None)
        return {} if first == len(self.turn.end) - 1 or not self.turn.end else {"end": list(self.turn.end)}

    def _prompts(self, source: str | None, values: dict[str, Any], day: str | None) -> list[str]:
        """What a template makes of the probes' conversations; nothing where the model has no template, or the template
        does not work without the variables of the mode."""
        clock = {"strftime_now": datetime.fromisoformat(day or _SOME_DAY).strftime}

        def speak(messages: Sequence[Any], *, prompt: bool, **more: Any) -> str:
            return self._rendered(messages, prompt, source, values | clock | more)

        try:
            return [prompt_of(speak, messages) for messages in probe.CONVERSATIONS] if source else []
        except TemplateError:
            return []


def prompt_of(speak: probe.Speak, messages: list[Message]) -> str:
    """The text of the messages up to where the reply begins. Where the template refuses a system turn, or drops it, its
    text stands in front of the user's. Raises TemplateError."""
    system = "".join(message["content"] for message in messages if message["role"] == "system")
    if not system:
        return speak(messages, prompt=True)
    try:
        text = speak(messages, prompt=True)
    except TemplateError:
        return speak(without_system(messages), prompt=True)
    drops = system.strip() not in text
    if not drops and any(system.strip() in message["content"] for message in messages if message["role"] != "system"):
        drops = _drops_system(speak, messages)
    return speak(without_system(messages), prompt=True) if drops else text


def _drops_system(speak: probe.Speak, messages: list[Message]) -> bool:
    """Whether the template leaves out the system turn of such messages, where its words stand in another turn, too."""
    marked: list[Message] = [
        {"role": "system", "content": probe.WORD} if message["role"] == "system" else message for message in messages
    ]
    return probe.WORD not in speak(marked, prompt=True)


def _own(tokenizer: Any) -> str | None:
    """The text of the model's own template; of several named ones the default."""
    return str(tokenizer.get_chat_template()) if getattr(tokenizer, "chat_template", None) else None


def _of_processor(folder: Path, name: str) -> str | None:
    """The text of a template that no tokenizer loads. Raises UserError where the model has one in no form that is read
    here: it would be asked in a plain frame."""
    if (path := folder / OLD_TEMPLATE).is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["chat_template"])
    if (folder / TEKKEN).is_file() and not (folder / WHOLE).is_file():
        raise UserError(
            f"{name} has no chat template: its {TEKKEN} leaves the prompts to mistral-common",
            hint="Set chat.template to its maker's Jinja template, or take a revision with a tokenizer.json and a "
            "chat_template.jinja.",
        )
    return None


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a rendered text, in which the special ones are written already."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _model_type(folder: Path) -> str:
    path = folder / "config.json"
    return str(json.loads(path.read_text()).get("model_type")) if path.is_file() else ""


def _stops(folder: Path) -> frozenset[int]:
    """The ids at which vLLM and transformers end a generation: those of the generation config, else of the config."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file() and (ids := json.loads(path.read_text()).get("eos_token_id")) is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()
