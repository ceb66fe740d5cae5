"""How models mark their thoughts, and the one place that splits a reply into its thought and its answer. Pure.

A reply is split by markers of its model, never by ordinary words. From this process the token ids are at hand, and each
control token of a marker becomes one character that no text holds (`Seen`); from a server there is only a text.

The rule, for all families:

- A thought begins where the prompt has opened it, or where the reply begins with the marker that opens it.
- It ends at the *last* marker that ends it, as olmo3's parser in vLLM, lm-eval and the templates themselves have it:
  a marker that is only quoted in a thought, or is written twice, stays out of the answer. Out of the thought it is
  dropped, as the newer parsers of vLLM drop it: a line break takes its place.
- A thought without an end is unfinished: the reply has no answer, whatever the thought holds.
- Where the prompt has closed the thought, and the reply opens none, all of it is the answer.
- Nothing else ends a thought: `<tool_call>` in a thought is a word of the thought.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from cgd_stages.contract import ReasoningParser

_WORD = re.compile(r"\[[^\]]*\]|\S+")
"""A marker in square brackets may hold blanks: Apriel's `[BEGIN FINAL RESPONSE]`."""
Opened = bool | None
"""Whether the prompt has opened a thought (True), or opened and closed one (False); None: it has done neither."""


@dataclass(frozen=True)
class Split:
    """A model's output in two parts, without blanks at the ends: its thinking, and the text that counts."""

    text: str
    thinking: str = ""
    unfinished_thinking: bool = False


@dataclass(frozen=True)
class Markers:
    """The texts that a model writes around a thought.

    A whole reply is `opening`, thought, `bridge`, answer; a reply without a thought is `header`, answer. Blanks at the
    ends of the markers are written, and do not matter where a reply is read.
    """

    opening: str
    bridge: str
    header: str = ""
    """What a model writes before an answer even if it does not think; `bridge` ends in it."""

    @property
    def start(self) -> str:
        return self.opening.strip()

    @property
    def end(self) -> str:
        """The marker after which the answer begins."""
        return self.header.strip() or _WORD.findall(self.bridge)[0]

    @property
    def marks(self) -> tuple[str, ...]:
        """Every marker of a thought."""
        return tuple(filter(None, dict.fromkeys((self.start, self.closing, self.end))))

    @property
    def frame(self) -> str:
        """A word that opens the answer after that marker, as ERNIE's `<response>`; nearly always empty."""
        return "" if self.header else self.bridge.strip().removeprefix(self.end).strip()

    @property
    def foot(self) -> str:
        """What a model writes after an answer that it has opened with the frame."""
        blank = self.bridge[len(self.bridge.rstrip()) :]
        return blank + self.frame.replace("<", "</", 1) if self.frame.startswith("<") else ""

    @property
    def closing(self) -> str:
        """The marker that ends the thought itself, if it is not the answer's header that does."""
        return self.bridge.removesuffix(self.header).strip() if self.header else self.end


THINK = Markers("<think>\n", "\n</think>\n\n")
HARMONY = Markers(
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|channel|>final<|message|>",
)
S1 = Markers("<|im_start|>think\n", "\n<|im_start|>answer\n", "<|im_start|>answer\n")
COHERE = Markers("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>", "<|START_RESPONSE|>")
COHERE4 = Markers("<|START_THINKING|>", "<|END_THINKING|><|START_TEXT|>", "<|START_TEXT|>")
ERNIE = Markers("<think>\n", "\n</think>\n\n<response>\n")
HUNYUAN = Markers("<think>\n", "\n</think>\n<answer>\n")
GRANITE = Markers("Here is my thought process:\n\n", "\n\nHere is my response:\n\n", "Here is my response:\n\n")
KIMI = Markers("\u25c1think\u25b7", "\u25c1/think\u25b7")
MISTRAL = Markers("[THINK]", "[/THINK]")
SEED = Markers("<seed:think>", "</seed:think>")
GEMMA = Markers("<|channel>thought\n", "\n<channel|>")
MUSE = Markers(" to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>", " to=user<|message|>")
LLAMA = Markers("<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>")
APERTUS = Markers("<|inner_prefix|>", "<|inner_suffix|>")
SKY = Markers(
    "<|begin_of_thought|>\n\n",
    "\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n",
    "<|begin_of_solution|>\n\n",
)
PLAMO = Markers("<|plamo:begin_think:plamo|>", "<|plamo:end_think:plamo|>")
MINIMAX = Markers("<mm:think>", "</mm:think>")
FAMILIES = (HARMONY, S1, COHERE, COHERE4, MISTRAL, SEED, GEMMA, MUSE, LLAMA, APERTUS, SKY, MINIMAX, PLAMO, KIMI, THINK)
"""The markups of families whose templates do not show them; no ordinary text begins with one of their markers. A
template that shows another one is read instead."""
TAGS = tuple(Markers(f"<{word}>", f"</{word}>") for word in ("reasoning", "thought", "thinking"))
"""What servers write around a thought that they leave in the text, whatever its model writes: Bedrock's, Google's and
proxies. A model that runs here writes such words only where it is asked to."""

PARSERS: dict[str, Markers] = {
    **dict.fromkeys(
        (
            *("deepseek_r1", "deepseek_v3", "deepseek_v4", "deepseek_v41", "glm45", "glm47", "granite_thinking_parser"),
            *("holo2", "hy_v3", "kimi_k2", "ling3", "mimo", "minicpmv", "minimax_m2", "nemotron_v3", "olmo3"),
            *("poolside_v1", "qwen3", "step3", "step3p5"),
        ),
        THINK,
    ),
    "cohere_command3": COHERE,
    "cohere_command4": COHERE4,
    "ernie45": ERNIE,
    "gemma4": GEMMA,
    "granite": GRANITE,
    "hunyuan_a13b": HUNYUAN,
    "minimax_m3": MINIMAX,
    "mistral": MISTRAL,
    "muse_glimmer": MUSE,
    "openai_gptoss": HARMONY,
    "plamo3": PLAMO,
    "s1": S1,
    "seed_oss": SEED,
}
"""What each name of `chat.reasoningParser` stands for."""
PARSERS_OF_TYPES: dict[str, ReasoningParser] = {
    "hunyuan_v1_dense": "hunyuan_a13b",
    "hunyuan_v1_moe": "hunyuan_a13b",
}
"""Types of models that write thoughts in a form that their templates do not show whole."""

_ENDS = re.compile(
    r"(?:\s*(?:<\|(?:im_end|endoftext|end_of_text|return|eot_id|eot|eom|end|user|observation|role_end"
    r"|END_RESPONSE|END_TEXT|END_OF_TURN_TOKEN|end_of_solution)\|>|</s>|<turn\|>|<end_of_turn>|<eos>|<seed:eos>|\[e~\["
    r"|<\uff5cend\u2581of\u2581sentence\uff5c>))+\s*\Z"
)
"""The ends of turns in a text that a server gives with its special tokens."""
_CONTROL = 0xF0000
"""The first of the private characters that stand for control tokens."""
_ANY_CONTROL = rf"[{chr(_CONTROL)}-{chr(sys.maxunicode)}]"
_NAMED_LIKE_THOUGHT = re.compile(r"think|thought|reason|analysis|channel", re.IGNORECASE)


def split(text: str, markup: Markers, opened: Opened = None) -> Split:
    """Split a reply by its model's markup. `opened`: see `Opened`."""
    body = _with_plain_headers(text.strip(), markup)
    started = opened is True or body.startswith(markup.start)
    if opened is False and not started and not markup.header:
        while body.startswith(markup.end):  # the model closes once more what the prompt has closed
            body = body.removeprefix(markup.end).strip()
        return Split(_answer(body, markup))
    before, found, after = body.rpartition(markup.end)
    if found:
        return Split(_answer(after, markup), _thought(before, markup))
    if started or (markup.header and any(_is_control(character) for character in body)):
        return Split("", _thought(body, markup), unfinished_thinking=True)
    return Split(body)


def _with_plain_headers(text: str, markup: Markers) -> str:
    """The text with the header of an answer as the markup has it: gpt-oss may name a format between its tokens, as in
    `<|channel|>final <|constrain|>json<|message|>`."""
    header = markup.header.strip()
    if not (parts := re.fullmatch(rf"((?:<\||{_ANY_CONTROL}).*?)(<\|\w+\|>|{_ANY_CONTROL})", header)):
        return text
    name, last = map(re.escape, parts.groups())
    return re.sub(rf"{name}[ \w]*(?:<\|constrain\|>)?\w*{last}", lambda _: header, text)


def _answer(text: str, markup: Markers) -> str:
    """The answer's text. Where answers have a header, a control token after it begins another turn."""
    end = next((place for place, character in enumerate(text) if markup.header and _is_control(character)), len(text))
    return text[:end].strip().removeprefix(markup.frame).strip()


def _thought(text: str, markup: Markers) -> str:
    """The thought without any marker, in a text up to the answer's marker."""
    text = text.strip()
    if markup.header:
        text = markup.closing + text.removesuffix(markup.closing)
        text = _between(markup).sub("\n", text).removeprefix(markup.closing)
    parts = re.split("|".join(map(re.escape, markup.marks)), text)
    return "\n".join(filter(None, map(str.strip, parts)))


def _between(markup: Markers) -> re.Pattern[str]:
    """What stands between two messages of one reply, where each has a header in control tokens: the channel may be
    another one than that of thoughts, such as gpt-oss's commentary."""
    again = re.split(rf"({_ANY_CONTROL})", (markup.closing + markup.opening).strip())
    if len(again) < 5:  # fewer than two control tokens
        return re.compile(re.escape(markup.closing + markup.opening))
    *fixed, _, last, rest = again
    return re.compile("".join(map(re.escape, fixed)) + rf"[^{_ANY_CONTROL[1:-1]}]*" + re.escape(last + rest))


def split_text(text: str, *, lone_end: bool = True, with_end: bool = False, tags: Iterable[Markers] = ()) -> Split:
    """Split the text of a server that has not done so, or of a model whose tokenizer has no markers: it may begin with
    the opening marker of a family, or of one of the `tags`. `lone_end`: a `</think>` that nothing has opened ends a
    thought too, because the server's template may have opened it. `with_end`: the server shows special tokens, so that
    the text may end in the end of a turn, which is dropped."""
    body = text.strip()
    markup = _family(body, *tags)
    if markup or with_end:
        body = _ENDS.sub("", body)
    if markup:
        return split(body, markup)
    return split(body, THINK) if lone_end else Split(body)


def given_thought(text: str) -> str:
    """The thought that a server gives apart from the text, clean as one that is split off a text: without blanks at
    its ends, and without markers."""
    body = text.strip()
    return _thought(_ENDS.sub("", body), _family(body) or THINK)


def _family(body: str, *more: Markers) -> Markers | None:
    """The family with whose marker the text begins."""
    begun = [
        markup
        for markup in (*FAMILIES, *more)
        for text in [_with_plain_headers(body, markup)]
        if any(marker and text.startswith(marker) for marker in (markup.start, markup.header.strip()))
    ]
    # two families may open a thought alike, and end it differently
    return next((markup for markup in begun if markup.end in body), begun[0] if begun else None)


def _is_control(character: str) -> bool:
    return ord(character) >= _CONTROL


class Seen:
    """Token ids as a text in which each control token of some markers is one character that no text holds."""

    def __init__(self, tokenizer: Any, markups: Iterable[Markers]) -> None:
        added = {token.content: (number, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
        self._tokenizer = tokenizer
        self._shown: dict[int, str] = {}
        self._written: dict[str, str] = {}
        self._hidden: dict[str, str] = {}
        markups = list(markups)
        texts = "".join(markup.opening + markup.bridge for markup in markups)
        marks = {mark for markup in markups for mark in markup.marks}
        for content in sorted(added, key=len, reverse=True):
            if content in texts:
                number, special = added[content]
                character = chr(_CONTROL + number)
                self._shown[number], self._written[content] = character, character
                # a marker in an answer is seen, and so not learned as if it were none
                self._hidden[character] = "" if special and content not in marks else content

    def text(self, ids: Sequence[int]) -> str:
        """The text of the ids without special tokens, and with a character for each control token."""
        runs: list[list[int]] = [[]]
        shown: list[str] = []
        for number in ids:
            if number in self._shown:
                shown.append(self._shown[number])
                runs.append([])
            else:
                runs[-1].append(number)
        texts = [self._tokenizer.decode(run, skip_special_tokens=True) if run else "" for run in runs]
        return texts[0] + "".join(character + text for character, text in zip(shown, texts[1:], strict=True))

    def markup(self, markup: Markers) -> Markers:
        """The markup as it looks in such a text."""
        return Markers(*(self._coded(text) for text in (markup.opening, markup.bridge, markup.header)))

    def holds(self, markup: Markers) -> bool:
        """Whether the tokenizer has a control token for the markup's opening and its end."""
        return all(
            any(character in self._hidden for character in self._coded(text)) for text in (markup.start, markup.end)
        )

    def restored(self, parts: Split) -> Split:
        """The parts with the markers of thoughts, and the control tokens that are no special tokens, as text again."""
        text, thinking = (_replaced(text, self._hidden) for text in (parts.text, parts.thinking))
        return replace(parts, text=text.strip(), thinking=thinking.strip())

    def _coded(self, text: str) -> str:
        return _replaced(text, self._written)


def _replaced(text: str, table: dict[str, str]) -> str:
    return reduce(lambda done, pair: done.replace(*pair), table.items(), text)


def unknown_markers(tokenizer: Any) -> list[str]:
    """The tokenizer's control tokens that look like the markers of a thought, a pair of them or a channel's, and belong
    to no known family."""
    known = "".join(markup.opening + markup.bridge for markup in FAMILIES)
    contents = {token.content for token in tokenizer.added_tokens_decoder.values()}
    named = {content for content in contents if _NAMED_LIKE_THOUGHT.search(content) and content not in known}
    pairs = {content: _partners(content) & named for content in named}
    channels = {content for content in named if "channel" in content.lower()}
    return sorted(channels.union(*({content, *opens} for content, opens in pairs.items() if opens)))


def _partners(marker: str) -> set[str]:
    """The markers that this one may close."""
    ends = {"/": ("",), "end": ("start", "begin"), "END": ("START", "BEGIN"), "End": ("Start", "Begin")}
    return {marker.replace(end, start, 1) for end, starts in ends.items() if end in marker for start in starts}
