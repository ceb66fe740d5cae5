"""Thoughts: where a reply is split, from ids and from texts, and where it has no answer."""

from typing import Literal

import pytest
from support import stand_in

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.chat.thoughts import FAMILIES, HARMONY, Markers, Split, split_text
from cgd_stages.contract import Chat

JSON = "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>"
"""As gpt-oss begins an answer whose format it names."""


@pytest.mark.parametrize(
    ("output", "text", "thinking", "unfinished"),
    [
        (" 4 \n", "4", "", False),
        ("<think>2 and 2</think>\n\n4", "4", "2 and 2", False),
        ("2 and 2</think>4", "4", "2 and 2", False),
        ("<think>a</think>b</think>c", "c", "a\nb", False),
        ("<think>2 and", "", "2 and", True),
        ("<think>2</think>  ", "", "2", False),
    ],
)
def test_only_what_follows_the_thinking_counts(output, text, thinking, unfinished):
    assert split_text(output) == Split(text, thinking, unfinished)


# --- from token ids ---------------------------------------------------------------------------------------------------

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that says nothing of thoughts, as S1.1's."""


def of(name: str, *, listed: bool = True, **chat: object) -> ChatTemplate:
    return ChatTemplate(
        stand_in.tokenizer(stand_in.template(name), listed=listed), Chat.model_validate(chat), name=name
    )


def bare(*tokens: str, **chat: object) -> ChatTemplate:
    given = ("<|im_start|>", "<|im_end|>", *tokens)
    return ChatTemplate(stand_in.tokenizer(PLAIN, given, end="<|im_end|>"), Chat.model_validate(chat))


def said(template: ChatTemplate, text: str) -> Split:
    """How a reply is split that the model has written with these control tokens."""
    ids = stand_in.ids(template.tokenizer, text)
    return template.split(ids, template.tokenizer.decode(ids, skip_special_tokens=True))


ENDED = "\n</think>\n\nIt is 4."


@pytest.mark.parametrize(
    ("reply", "split"),
    [
        (f"2+2 is 4.{ENDED}", Split("It is 4.", "2+2 is 4.")),
        (f"<think>2+2 is 4.{ENDED}", Split("It is 4.", "2+2 is 4.")),
        ("So I answer 4.", Split("", "So I answer 4.", unfinished_thinking=True)),
        (r"Perhaps \boxed{4}. But", Split("", r"Perhaps \boxed{4}. But", unfinished_thinking=True)),
        (f"I close with </think> now.{ENDED}", Split("It is 4.", "I close with\nnow.")),
        (f"hm\n</think>\n{ENDED}", Split("It is 4.", "hm")),
        (f"<tool_call> would do it.{ENDED}", Split("It is 4.", "<tool_call> would do it.")),
        ("<think>one</think>4?<think>two</think>It is 4.", Split("It is 4.", "one\n4?\ntwo")),
        ("one<think>two", Split("", "one\ntwo", unfinished_thinking=True)),
        ("</think>It is 4.", Split("It is 4.", "")),
        ("", Split("", "", unfinished_thinking=True)),
    ],
)
@pytest.mark.parametrize("name", ["deepseekv3", "qwen3_5_think"])
def test_a_thought_that_the_prompt_opens_ends_at_its_last_marker_or_not_at_all(
    name: str, reply: str, split: Split
) -> None:
    template = of(name, listed=False, thinking="on")
    assert said(template, reply) == split


@pytest.mark.parametrize(
    ("reply", "split"),
    [
        ("It is 4.", Split("It is 4.")),
        ("The tag </think> ends a thought.", Split("The tag </think> ends a thought.")),
        ("</think>\n\nIt is 4.", Split("It is 4.")),
        ("<think>hm</think>It is 4.", Split("It is 4.", "hm")),
        ("<think>hm", Split("", "hm", unfinished_thinking=True)),
    ],
)
def test_where_the_prompt_has_closed_the_thought_all_is_answer_unless_the_reply_opens_another(
    reply: str, split: Split
) -> None:
    tokenizer = stand_in.tokenizer(stand_in.template("qwen3"), listed=False)
    assert said(ChatTemplate(tokenizer, Chat(thinking="off")), reply) == split


@pytest.mark.parametrize(
    ("reply", "split"),
    [
        (HARMONY.opening + "Add." + HARMONY.bridge + "It is 4.<|return|>", Split("It is 4.", "Add.")),
        (HARMONY.header + "It is 4.<|return|>", Split("It is 4.")),
        (HARMONY.opening + "Add.<|return|>", Split("", "Add.", unfinished_thinking=True)),
        (
            HARMONY.opening + "One.<|end|><|start|>assistant" + HARMONY.opening + "Two." + HARMONY.bridge + "4",
            Split("4", "One.\nTwo."),
        ),
        (HARMONY.header + "4<|end|><|start|>assistant<|channel|>commentary<|message|>Done.", Split("4")),
        (
            HARMONY.opening
            + "One.<|end|><|start|>assistant<|channel|>commentary<|message|>Two."
            + HARMONY.bridge
            + "4",
            Split("4", "One.\nTwo."),
        ),
        (
            "<|channel|>commentary<|message|>One.<|end|><|start|>assistant" + HARMONY.opening + "Two." + HARMONY.bridge,
            Split("", "One.\nTwo."),
        ),
        (HARMONY.opening + "One." + JSON + '{"sum": 4}<|return|>', Split('{"sum": 4}', "One.")),
        (HARMONY.opening + "One." + JSON.replace("<|constrain|>", "") + "4", Split("4", "One.")),
        (HARMONY.opening + "One.<|end|><|start|>assistant<|channel|>final", Split("", "One.\nfinal", True)),
        ("It is 4.", Split("It is 4.")),
        ("analysisWe add.assistantfinalIt is 4.", Split("analysisWe add.assistantfinalIt is 4.")),
    ],
)
def test_channels_are_split_by_their_tokens_and_never_by_their_words(reply: str, split: Split) -> None:
    assert said(of("gptoss"), reply) == split


@pytest.mark.parametrize(
    ("reply", "split"),
    [
        ("<|im_start|>think\nadd\n<|im_start|>answer\nIt is 4.<|im_end|>", Split("It is 4.", "add")),
        ("<|im_start|>think\nadd", Split("", "add", unfinished_thinking=True)),
        ("<|im_start|>answer\nIt is 4.", Split("It is 4.")),
        ("<|im_start|>think\nadd\n<|im_start|>answer\n4<|im_start|>user\nMore?", Split("4", "add")),
        ("think\nadd\nanswer\nIt is 4.", Split("think\nadd\nanswer\nIt is 4.")),
        ("think twice: it is 4.", Split("think twice: it is 4.")),
    ],
)
def test_s1s_turns_are_split_although_its_template_says_nothing_of_them(reply: str, split: Split) -> None:
    assert said(bare(), reply) == split
    assert said(bare(reasoning_parser="s1"), reply) == split


@pytest.mark.parametrize("markup", FAMILIES)
def test_a_reply_that_begins_with_a_familys_token_is_split_whatever_the_template_says(markup: Markers) -> None:
    template = bare(*stand_in.markers(markup.opening + markup.bridge))
    assert said(template, f"{markup.opening}add{markup.bridge}It is 4.") == Split("It is 4.", "add")
    assert said(template, f"{markup.opening}add").unfinished_thinking


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("mode", "reply", "text"),
    [
        ("on", "<think>hm</think>4<think>or 5", "4<think>or 5"),
        ("off", "4 <think>hm</think>", "4 <think>hm</think>"),
        ("off", "4</think>", "4</think>"),
    ],
)
def test_a_marker_in_an_answer_is_seen_also_where_it_is_a_special_token(
    mode: Literal["on", "off"], reply: str, text: str, listed: bool
) -> None:
    """Without it, the words of a second thought would be words of the answer."""
    template = ChatTemplate(stand_in.tokenizer(stand_in.template("qwen3"), listed=listed), Chat(thinking=mode))
    assert said(template, reply).text == text
    assert template.thought_markers(text)


def test_an_end_marker_in_the_answer_of_a_model_without_thoughts_is_a_part_of_it() -> None:
    tokenizer = stand_in.tokenizer(stand_in.template("qwen3_instruct_2507"), ("<think>", "</think>"), listed=False)
    reply = "The tag </think> ends a thought."
    assert said(ChatTemplate(tokenizer), reply) == Split(reply)


def test_a_model_without_tokens_for_thoughts_may_spell_them_out() -> None:
    assert said(bare(), "<think>hm</think>It is 4.") == Split("It is 4.", "hm")
    assert said(bare(), "The tag </think> ends a thought.") == Split("The tag </think> ends a thought.")


# --- from texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<|im_start|>think\nadd\n<|im_start|>answer\nIt is 4.<|im_end|>", Split("It is 4.", "add")),
        (HARMONY.opening + "Add." + HARMONY.bridge + "It is 4.<|return|>", Split("It is 4.", "Add.")),
        (HARMONY.header + "It is 4.<|return|>", Split("It is 4.")),
        (HARMONY.opening + "Add." + JSON + '{"sum": 4}<|return|>', Split('{"sum": 4}', "Add.")),
        ("<|channel|>final <|constrain|>json<|message|>4<|return|>", Split("4")),
        ("[THINK]hm[/THINK]It is 4.</s>", Split("It is 4.", "hm")),
        ("[THINK]hm", Split("", "hm", unfinished_thinking=True)),
        ("<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>4<|END_RESPONSE|>", Split("4", "hm")),
        ("<|START_THINKING|>hm<|END_THINKING|><|START_TEXT|>4<|END_TEXT|>", Split("4", "hm")),
        ("<|inner_prefix|>hm<|inner_suffix|>4", Split("4", "hm")),
        ("analysisWe add.assistantfinalIt is 4.", Split("analysisWe add.assistantfinalIt is 4.")),
        ("think\nadd\nanswer\nIt is 4.", Split("think\nadd\nanswer\nIt is 4.")),
        ("It is 4.</s>", Split("It is 4.</s>")),
    ],
)
def test_a_server_that_shows_special_tokens_is_split_by_them(text: str, parts: Split) -> None:
    assert split_text(text) == parts


# --- surplus markers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("markup", FAMILIES)
def test_no_thought_of_any_family_holds_a_marker_however_often_the_model_writes_them(markup: Markers) -> None:
    given = ("<|im_start|>", "<|im_end|>", *stand_in.markers(markup.opening + markup.bridge))
    end = markup.bridge
    template = ChatTemplate(stand_in.tokenizer(PLAIN, given, end="<|im_end|>", listed=False))
    parts = said(template, f"{markup.opening}one{end}two{markup.opening}three{end}{end}It is 4.")
    assert (parts.text, parts.thinking.split()) == ("It is 4.", ["one", "two", "three"])
