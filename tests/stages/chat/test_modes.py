"""Modes and forms: what a template is found to do, what is refused, how a reply ends, and what enters a digest."""

from typing import Any, get_args

import pytest
from jinja2.exceptions import TemplateError
from support import stand_in

from cgd_stages.chat.example import IGNORE, Unusable, example
from cgd_stages.chat.messages import Message
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.chat.thoughts import PARSERS
from cgd_stages.contract import Chat, ReasoningParser
from cgd_stages.errors import UserError

ASKED: list[Message] = [{"role": "user", "content": "2 + 2?"}]
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n"
PLAIN = HEAD + TAIL + PROMPT + "{% endif %}"
TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")


def of(
    source: str | None, *tokens: str, end: str = "<|im_end|>", stops: tuple[str, ...] = (), **chat: Any
) -> ChatTemplate:
    tokenizer = stand_in.tokenizer(source, (*TOKENS, *tokens), end=end)
    ids = frozenset(tokenizer.convert_tokens_to_ids(list(stops)))
    return ChatTemplate(tokenizer, Chat(**chat), name="team/model", stops=ids)


def learned(template: ChatTemplate, thought: str | None = None) -> str:
    made = example(template, ASKED, "4", thought=thought, max_length=1000)
    return str(template.tokenizer.decode([label for label in made.labels if label != IGNORE]))


# --- thoughts ---------------------------------------------------------------------------------------------------------


def test_a_form_that_nobody_knows_is_read_off_a_template_that_writes_it() -> None:
    shown = "{% if m.reasoning_content %}<|muse_a|>{{ m.reasoning_content }}<|muse_b|>\n{% endif %}"
    template = of(HEAD + shown + TAIL + PROMPT + "{% endif %}", "<|muse_a|>", "<|muse_b|>", thinking="on")
    assert learned(template, "hm") == "<|muse_a|>hm<|muse_b|>\n4<|im_end|>"
    ids = stand_in.ids(template.tokenizer, "<|muse_a|>hm<|muse_b|>\n4<|im_end|>")
    parts = template.split(ids, "")
    assert (parts.thinking, parts.text) == ("hm", "4")


@pytest.mark.parametrize(
    "tokens", [("<|thought_begin|>", "<|thought_end|>"), ("<my_think>", "</my_think>"), ("<|channels|>",)]
)
def test_tokens_of_an_unknown_form_are_refused_with_their_names(tokens: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="team/model does not show how the model writes its thoughts") as caught:
        of(PLAIN, *tokens)
    assert all(token in caught.value.message for token in tokens)
    assert "chat.reasoningParser" in caught.value.hint


@pytest.mark.parametrize("tokens", [("<|reasoning_reserved_0|>",), ("<|thinker|>",), ("<|reasoning_thinking_start|>",)])
def test_tokens_that_only_sound_like_thoughts_refuse_nothing(tokens: tuple[str, ...]) -> None:
    assert of(PLAIN, *tokens).markup is None


def test_a_form_can_be_named() -> None:
    template = of(PLAIN, "[THINK]", "[/THINK]", thinking="on", reasoning_parser="mistral")
    assert learned(template, "hm") == "[THINK]hm[/THINK]4<|im_end|>"


@pytest.mark.parametrize(
    ("name", "parser"), [("qwen3", "mistral"), ("deepseekv3", "seed_oss"), ("gptoss", "qwen3"), ("glm4moe", "granite")]
)
def test_the_form_of_another_family_is_refused(name: str, parser: ReasoningParser) -> None:
    tokenizer = stand_in.tokenizer(stand_in.template(name))
    assert ChatTemplate(tokenizer, name=name).markup is not None
    with pytest.raises(UserError, match=f"{name} has thoughts that end with .* chat.reasoningParser {parser} end"):
        ChatTemplate(tokenizer, Chat(reasoning_parser=parser), name=name)


def test_every_name_that_a_manifest_may_give_has_its_markers() -> None:
    assert set(PARSERS) == set(get_args(ReasoningParser))


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_thinking_is_switched_by_the_variable_that_the_template_reads(name: str) -> None:
    switched = f"{{% if {name} is defined and not {name} %}}<think>\n\n</think>\n\n{{% endif %}}{{% endif %}}"
    source = HEAD + TAIL + PROMPT + switched
    assert of(source, thinking="off").render(ASKED).text.endswith("<think>\n\n</think>\n\n")
    assert of(source, thinking="on").render(ASKED).text.endswith("assistant\n")
    assert learned(of(source, thinking="off")) == "4<|im_end|>"
    assert learned(of(source, thinking="on"), "hm") == "<think>\nhm\n</think>\n\n4<|im_end|>"


def test_a_switch_between_an_opened_thought_and_a_lone_end_is_read_with_its_blanks() -> None:
    """As DeepSeek-V3.1 has it."""
    replies = "{% if m.role == 'assistant' %}</think>{{ m.content.split('</think>')[-1] }}"
    replies += "{% else %}{{ m.content }}{% endif %}"
    source = HEAD + replies + "<|im_end|>\n{% endfor %}" + PROMPT
    source += "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
    off, on = of(source, thinking="off"), of(source, thinking="on")
    assert off.render(ASKED).text.endswith("assistant\n</think>")
    assert learned(off) == "4<|im_end|>"
    assert on.render(ASKED).text.endswith("assistant\n<think>")
    assert learned(on, "hm") == "hm</think>4<|im_end|>"


def test_a_variable_of_the_manifest_reaches_the_template() -> None:
    source = "{{ mood }}" + PLAIN
    assert "cheerful" in of(source, template_kwargs={"mood": "cheerful"}).render(ASKED).text
    assert of(source, template_kwargs={"mood": "cheerful"}).identity() != of(source).identity() == {}


def test_a_template_of_the_manifest_replaces_the_models() -> None:
    template = of(PLAIN, template=HEAD + TAIL + PROMPT + "<think>\n{% endif %}", thinking="on")
    assert template.render(ASKED).text.endswith("<think>\n")
    assert learned(template, "hm") == "hm\n</think>\n\n4<|im_end|>"


def test_a_broken_template_is_refused_by_the_models_name() -> None:
    with pytest.raises(UserError, match="the chat template of team/model fails"):
        of(PLAIN, template="{% if %}")
    with pytest.raises(UserError, match="the chat template of team/model fails: TypeError"):
        of("{{ messages[0].content + 1 }}")


def test_a_prompt_that_opens_a_thought_makes_no_example_without_one() -> None:
    template = of(HEAD + TAIL + PROMPT + "<think>\n{% endif %}")
    with pytest.raises(Unusable, match="opens a thought"):
        learned(template)


def test_an_empty_thought_that_the_template_writes_before_a_reply_is_never_learned() -> None:
    empty = "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    source = HEAD + empty + TAIL + PROMPT + "{% endif %}"
    assert learned(of(source)) == "4<|im_end|>"
    assert learned(of(stand_in.template("qwen3"))) == "4<|im_end|>"


def test_a_template_that_has_no_place_for_a_thought_makes_no_example_with_one() -> None:
    with pytest.raises(Unusable, match="no place for a thought"):
        learned(of(PLAIN), "hm")


def test_a_thought_that_the_prompt_ends_before_the_header_of_an_answer_is_off() -> None:
    """As Command A's: the prompt writes both markers of a thought, the model the header of its answer."""
    reply = "{% if m.role == 'assistant' %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% else %}{{ m.content }}"
    closed = "{% if reasoning is defined and not reasoning %}<|START_THINKING|><|END_THINKING|>{% endif %}{% endif %}"
    source = HEAD + TAIL.replace("{{ m.content }}", reply + "{% endif %}") + PROMPT + closed
    tokens = stand_in.markers(source)
    off = of(source, *tokens, thinking="off")
    assert off.render(ASKED).text.endswith("<|END_THINKING|>")
    assert learned(off) == "<|START_RESPONSE|>4<|END_RESPONSE|><|im_end|>"
    head = "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>"
    assert learned(of(source, *tokens, thinking="on"), "hm") == head + "4<|END_RESPONSE|><|im_end|>"


def test_a_budget_of_no_token_switches_thinking_off_where_a_template_has_nothing_else() -> None:
    """As Seed-OSS has it."""
    closed = "{% if thinking_budget is defined and thinking_budget == 0 %}<seed:think>None.</seed:think>{% endif %}"
    shown = "{% if m.reasoning_content %}<seed:think>{{ m.reasoning_content }}</seed:think>{% endif %}"
    source = HEAD + shown + TAIL + PROMPT + closed + "{% endif %}"
    tokens = ("<seed:think>", "</seed:think>")
    assert of(source, *tokens, thinking="off").render(ASKED).text.endswith("None.</seed:think>")
    assert learned(of(source, *tokens, thinking="off")) == "4<|im_end|>"
    assert of(source, *tokens, thinking="on").render(ASKED).text.endswith("assistant\n")
    budget = of(source, *tokens, thinking="on", template_kwargs={"thinking_budget": 64})
    assert learned(budget, "hm") == "<seed:think>hm</seed:think>4<|im_end|>"
    with pytest.raises(UserError, match="closes the thought in the prompt although thinking is on"):
        of(source, *tokens, thinking="on", template_kwargs={"thinking_budget": 0})


@pytest.mark.parametrize("tokens", [("<response>", "</response>"), ("<response>",)])
def test_a_frame_around_the_answer_belongs_to_the_markers(tokens: tuple[str, ...]) -> None:
    """As ERNIE's thinking models write it, with the thought opened by the prompt."""
    shown = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    framed = "{% if m.role == 'assistant' %}" + shown + "<response>\n{{ m.content }}\n</response>\n{% else %}"
    source = HEAD + TAIL.replace("{{ m.content }}", framed + "{{ m.content }}{% endif %}")
    template = of(source + PROMPT + "<think>\n{% endif %}", *tokens, thinking="on")
    reply = learned(template, "hm")
    assert reply == "hm\n</think>\n\n<response>\n4\n</response>\n<|im_end|>"
    assert template.markup is not None
    assert template.markup.opening == "<think>\n"
    for text in (reply, "hm\n</think>\n\n4<|im_end|>"):
        parts = template.split(stand_in.ids(template.tokenizer, text), "")
        assert (parts.thinking, parts.text) == ("hm", "4")
    with pytest.raises(UserError, match="a reply begins with <think>"):
        of(source + PROMPT + "<think>\n{% endif %}", *tokens, thinking="off")


FLAGGED = "{% set ns = namespace(on=enable_thinking is not defined or enable_thinking) %}"
FLAGGED += "{% if '/no_think' in messages[0].content %}{% set ns.on = false %}{% endif %}"
FLAGGED += "{% if '/think' in messages[0].content %}{% set ns.on = true %}{% endif %}" + HEAD + TAIL + PROMPT


@pytest.mark.parametrize(
    ("opens", "mode", "flag"), [("", "on", "/no_think"), ("<think>\n", "on", "/no_think"), ("", "off", "/think")]
)
def test_a_prompt_whose_words_switch_thinking_against_the_run_is_refused(opens: str, mode: str, flag: str) -> None:
    """As in system turns for SmolLM3 and Nemotron: its example and its reply would be of another mode."""
    source = FLAGGED + f"{{% if ns.on %}}{opens}{{% else %}}<think>\n\n</think>\n{{% endif %}}{{% endif %}}"
    template = of(source, thinking=mode)
    flagged: list[Message] = [{"role": "system", "content": flag}, *ASKED]
    with pytest.raises(TemplateError, match="switch thinking against the run's mode"):
        template.render(flagged)
    with pytest.raises(Unusable, match="switch thinking"):
        example(template, flagged, "4", thought="hm" if mode == "on" else None, max_length=1000)
    same: list[Message] = [{"role": "system", "content": "/think" if mode == "on" else "/no_think"}, *ASKED]
    assert template.render(same).text


# --- the end ----------------------------------------------------------------------------------------------------------

PHI = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
PHI += "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"


def test_a_reply_ends_once_where_a_template_writes_the_end_of_text_as_well() -> None:
    for stops in ((), ("<|endoftext|>", "<|end|>")):
        template = of(PHI, "<|user|>", "<|end|>", "<|assistant|>", end="<|endoftext|>", stops=stops)
        assert learned(template) == "4<|end|>"


def test_a_model_that_would_go_on_after_the_end_of_a_turn_is_stopped_there_and_its_digest_says_so() -> None:
    template = of(PLAIN, end="<|endoftext|>")
    assert template.extra_stops == [template.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert template.identity() != {}
    assert of(PLAIN, end="<|endoftext|>", stops=("<|im_end|>",)).extra_stops == []
    assert of(PLAIN, end="<|endoftext|>", stops=("<|im_end|>",)).identity() == {}


def test_a_template_without_an_end_ends_as_the_next_turn_begins_if_the_model_stops_there() -> None:
    source = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    tokens = ("<|user|>", "<|assistant|>")
    assert learned(of(source, *tokens, end="<|endoftext|>", stops=("<|user|>",))) == "4<|user|>"
    assert learned(of(source, *tokens, end="<|endoftext|>")) == "4<|endoftext|>"


def test_the_head_of_a_turn_that_the_model_writes_itself_is_no_part_of_its_answer() -> None:
    """A template that does not know add_generation_prompt leaves the head of the turn to the model."""
    template = of(HEAD + TAIL)
    assert learned(template) == "<|im_start|>assistant\n4<|im_end|>"
    for reply in ("<|im_start|>assistant\n4<|im_end|>", "4<|im_end|>"):
        ids = stand_in.ids(template.tokenizer, reply)
        assert template.split(ids, template.tokenizer.decode(ids, skip_special_tokens=True)).text == "4"


def test_the_ids_at_which_a_generation_ends_are_those_of_the_models_folder(tmp_path: Any) -> None:
    from support import tiny

    folder = tiny.make(tmp_path / "model", template=PLAIN)
    assert ChatTemplate.load(folder).extra_stops == []
    config = folder / "generation_config.json"
    config.write_text('{"eos_token_id": [0, 1, 2]}')
    assert len(ChatTemplate.load(folder)._stops) == 3


def test_words_that_end_a_reply_are_no_part_of_its_answer() -> None:
    """As in templates without tokens of their own."""
    source = "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n### End\n{% endfor %}"
    template = of(source + "{% if add_generation_prompt %}### assistant\n{% endif %}", end="<|endoftext|>")
    assert learned(template) == "4\n### End\n<|endoftext|>"
    ids = stand_in.ids(template.tokenizer, learned(template))
    text = template.tokenizer.decode(ids, skip_special_tokens=True)
    assert template.split(ids, text).text == template.split_text(text).text == "4"


# --- blanks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "text"), [("m.content", " 4\n"), ("m.content | trim", "4")])
def test_a_target_keeps_the_blanks_that_the_template_keeps(content: str, text: str) -> None:
    template = of(PLAIN.replace("m.content", content))
    made = example(template, ASKED, " 4\n", max_length=1000)
    assert template.tokenizer.decode(made.input_ids[made.start :]) == f"{text}<|im_end|>"


# --- digests ----------------------------------------------------------------------------------------------------------


def test_a_plain_model_has_no_part_in_a_digest_and_a_thinking_one_has() -> None:
    assert of(PLAIN, thinking="off", date="2026-11-29").identity() == {}
    assert of(None).identity() == {}
    shown = HEAD + "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}" + TAIL + PROMPT
    assert of(shown + "{% endif %}").identity() != {}


# --- families whose templates TRL does not have -----------------------------------------------------------------------


def test_thinking_is_switched_by_an_effort_where_the_template_has_words_of_its_own_for_it() -> None:
    """As Mistral Small 4 has it. gpt-oss's template copies any effort: it is in test_templates."""
    effort = "{% set effort = reasoning_effort or 'none' %}{% if effort not in ['none', 'high'] %}"
    effort += "{{ raise_exception('an effort is none or high') }}{% endif %}[MODEL_SETTINGS]{{ effort }}"
    shown = "{% if m.reasoning_content %}[THINK]{{ m.reasoning_content }}[/THINK]{% endif %}"
    source = effort + "{% for m in messages %}[INST]" + shown + "{{ m.content }}<|im_end|>{% endfor %}"
    tokens = ("[INST]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]")
    on, off = of(source, *tokens, thinking="on"), of(source, *tokens, thinking="off")
    assert on.render(ASKED).text.startswith("[MODEL_SETTINGS]high")
    assert off.render(ASKED).text.startswith("[MODEL_SETTINGS]none")
    assert learned(on, "hm") == "[INST][THINK]hm[/THINK]4<|im_end|>"


def test_an_effort_of_the_users_stays_where_the_model_thinks() -> None:
    """As Hunyuan 3 has it, whose efforts are high, low and no_think."""
    checked = "{% if reasoning_effort not in ['high', 'low', 'no_think'] %}"
    checked += "{{ raise_exception('?') }}{% endif %}{{ reasoning_effort }}" + HEAD + TAIL + PROMPT
    checked += "{% if reasoning_effort == 'no_think' %}<think></think>{% else %}<think>{% endif %}{% endif %}"
    low = of(checked, thinking="on", template_kwargs={"reasoning_effort": "low"})
    assert low.render(ASKED).text.startswith("low")
    assert of(checked, thinking="on").render(ASKED).text.startswith("high")
    off = of(checked, thinking="off", template_kwargs={"reasoning_effort": "low"})
    assert off.render(ASKED).text.startswith("no_think")
    assert off.render(ASKED).text.endswith("<think></think>")
    none = of(checked, template_kwargs={"reasoning_effort": "no_think"})
    assert (none.opened, none.markup and none.markup.start) == (False, "<think>")


def test_a_prompt_may_open_a_thought_by_words_that_no_stored_reply_has() -> None:
    """As Apriel has it, with a marker of several words in brackets."""
    shown = "{% if m.reasoning_content %}{{ m.reasoning_content }}\n[BEGIN FINAL RESPONSE]\n{% endif %}"
    source = HEAD + shown + TAIL + PROMPT + "Here are my reasoning steps:\n{% endif %}"
    template = of(source, thinking="on")
    assert template.opened
    assert learned(template, "hm") == "hm\n[BEGIN FINAL RESPONSE]\n4<|im_end|>"
    for text, parts in ((learned(template, "hm"), ("hm", "4")), ("hm [BEGIN<|im_end|>", ("hm [BEGIN", ""))):
        split = template.split(stand_in.ids(template.tokenizer, text), "")
        assert (split.thinking, split.text) == parts
    with pytest.raises(UserError, match="a reply begins with Here are my reasoning steps:"):
        of(source, thinking="off")


def test_an_answer_in_a_channel_of_its_own_is_split_and_learned_with_both_of_its_tags() -> None:
    """As Kimi K3 has it."""
    tags = "{% macro tag(kind, name) %}<|{{ kind }}|>{{ name }}<|sep|>{% endmacro %}"
    thought = "{% if thinking is not defined or thinking %}{{ tag('open', 'think') }}{{ m.reasoning_content or '' }}"
    thought += "{{ tag('close', 'think') }}{% endif %}"
    reply = thought + "{{ tag('open', 'response') }}{{ m.content }}{{ tag('close', 'response') }}"
    source = tags + "{% for m in messages %}{{ tag('open', m.role) }}{% if m.role == 'assistant' %}" + reply
    source += "{% else %}{{ m.content }}{% endif %}<|end_of_msg|>{% endfor %}{% if add_generation_prompt %}"
    source += "{{ tag('open', 'assistant') }}{% if thinking is not defined or thinking %}{{ tag('open', 'think') }}"
    source += "{% else %}{{ tag('open', 'response') }}{% endif %}{% endif %}"
    tokens, end = ("<|open|>", "<|close|>", "<|sep|>"), "<|end_of_msg|>"
    on, off = (of(source, *tokens, end=end, thinking=mode) for mode in ("on", "off"))
    answer = "4<|close|>response<|sep|><|end_of_msg|>"
    assert learned(on, "hm") == "hm<|close|>think<|sep|><|open|>response<|sep|>" + answer
    assert learned(off) == answer
    for template, text, parts in ((on, learned(on, "hm"), ("hm", "4")), (off, answer, ("", "4"))):
        split = template.split(stand_in.ids(template.tokenizer, text), "")
        assert (split.thinking, split.text) == parts


HUNYUAN = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}<|extra_0|>{% else %}<|im_end|>{% endif %}"
HUNYUAN += "{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}"


def test_a_frame_that_no_template_shows_is_the_named_forms() -> None:
    """As Hunyuan-A13B has it, whose template writes a closed thought after a stored reply, too."""
    on, off = (of(HUNYUAN, "<|extra_0|>", thinking=mode, reasoning_parser="hunyuan_a13b") for mode in ("on", "off"))
    assert learned(on, "hm") == "<think>\nhm\n</think>\n<answer>\n4\n</answer><|im_end|>"
    assert off.render(ASKED).text.endswith("<think>\n\n</think>\n")
    assert learned(off) == "<answer>\n4\n</answer><|im_end|>"
    for template, text, parts in ((on, learned(on, "hm"), ("hm", "4")), (off, learned(off), ("", "4"))):
        split = template.split(stand_in.ids(template.tokenizer, text), "")
        assert (split.thinking, split.text) == parts
    assert off.split(stand_in.ids(off.tokenizer, "4<|im_end|>"), "").text == "4"


def test_the_type_of_a_model_names_the_form_that_its_template_does_not_show_whole(tmp_path: Any) -> None:
    from support import tiny

    folder = tiny.make(tmp_path / "model", template=HUNYUAN)
    config = folder / "config.json"
    assert "<answer>" not in str(ChatTemplate.load(folder).markup)
    config.write_text(config.read_text().replace('"llama"', '"hunyuan_v1_moe"'))
    assert "<answer>" in str(ChatTemplate.load(folder).markup)


def test_thoughts_between_ordinary_words_are_split_where_their_form_is_named() -> None:
    """As Granite 3.2 writes them. Without the name such words split nothing."""
    asks = "{% if thinking %}Write down your thoughts after 'Here is my thought process:'.{% endif %}"
    reply = "Here is my thought process:\n\nhm\n\nHere is my response:\n\n4<|im_end|>"
    on = of(asks + PLAIN, thinking="on", reasoning_parser="granite")
    assert learned(on, "hm") == reply
    assert learned(of(asks + PLAIN, thinking="off", reasoning_parser="granite")) == "4<|im_end|>"
    split = on.split(stand_in.ids(on.tokenizer, reply), "")
    assert (split.thinking, split.text) == ("hm", "4")
    with pytest.raises(UserError, match="has no thoughts, but thinking is on"):
        of(asks + PLAIN, thinking="on")
    plain = of(asks + PLAIN)
    ids = stand_in.ids(plain.tokenizer, reply)
    assert plain.split(ids, plain.tokenizer.decode(ids, skip_special_tokens=True)).thinking == ""


def test_a_reply_ends_where_the_model_stops_although_the_template_begins_the_next_turn() -> None:
    """As Command R7B's template for tools does after every message."""
    source = "{% for m in messages %}{{ m.role }}{{ m.content }}<|im_end|><|im_start|>{% endfor %}"
    source += "{% if add_generation_prompt %}assistant{% endif %}"
    assert learned(of(source)) == "4<|im_end|>"
    assert learned(of(source, end="<|endoftext|>", stops=("<|im_end|>",))) == "4<|im_end|>"


def test_an_empty_thought_in_a_stored_reply_shows_the_form_of_thoughts() -> None:
    """As Kimi-K2-Thinking's, which cuts the thought of every reply that asks for no tool."""
    stored = "{% if m.role == 'assistant' %}<think></think>{% endif %}"
    source = HEAD + stored + TAIL + PROMPT + "{% endif %}"
    assert learned(of(source, thinking="on"), "hm") == "<think>hm</think>4<|im_end|>"
    assert learned(of(source, thinking="off")) == "4<|im_end|>"


def test_a_thought_may_be_a_block_of_a_reply() -> None:
    """As Apertus has it."""
    blocks = "{% if m.content is mapping %}<|inner_prefix|>{{ m.content.blocks[0].text }}<|inner_suffix|>"
    blocks += "{{ m.content.blocks[1].text }}{% else %}{{ m.content }}{% endif %}"
    source = HEAD + TAIL.replace("{{ m.content }}", blocks) + PROMPT + "{% endif %}"
    template = of(source, "<|inner_prefix|>", "<|inner_suffix|>", thinking="on")
    assert learned(template, "hm") == "<|inner_prefix|>hm<|inner_suffix|>4<|im_end|>"


def test_a_prompt_that_opens_a_thought_shows_its_marker_although_an_answer_has_a_header_too() -> None:
    """As Command A Reasoning's, whose replies without a thought begin with the header."""
    reply = "{% if m.reasoning_content %}<|START_THINKING|>{{ m.reasoning_content }}<|END_THINKING|>{% endif %}"
    reply = "{% if m.role == 'assistant' %}" + reply + "<|START_TEXT|>{{ m.content }}<|END_TEXT|>{% else %}"
    source = HEAD + TAIL.replace("{{ m.content }}", reply + "{{ m.content }}{% endif %}") + PROMPT
    source += "<|START_THINKING|>{% if reasoning is defined and not reasoning %}<|END_THINKING|>{% endif %}{% endif %}"
    tokens = stand_in.markers(source)
    on, off = (of(source, *tokens, thinking=mode) for mode in ("on", "off"))
    assert learned(on, "hm") == "hm<|END_THINKING|><|START_TEXT|>4<|END_TEXT|><|im_end|>"
    assert learned(off) == "<|START_TEXT|>4<|END_TEXT|><|im_end|>"


def test_a_prompt_with_a_message_for_an_empty_thought_is_off() -> None:
    """As Solar Open writes it at its least effort; the model writes the header of its answer."""
    thought = "{% if m.reasoning %}<|begin|>assistant<|think|>{{ m.reasoning }}<|end|>{% endif %}"
    source = "{% for m in messages %}" + thought + "<|begin|>{{ m.role }}<|content|>{{ m.content }}<|end|>{% endfor %}"
    source += "{% if add_generation_prompt %}{% if reasoning_effort == 'minimal' %}<|begin|>assistant<|think|><|end|>"
    source += "{% endif %}<|begin|>assistant{% endif %}"
    tokens = stand_in.markers(source)
    on, off = (of(source, *tokens, end="<|end|>", thinking=mode) for mode in ("on", "off"))
    assert learned(on, "hm") == "<|think|>hm<|end|><|begin|>assistant<|content|>4<|end|>"
    assert off.render(ASKED).text.endswith("<|think|><|end|><|begin|>assistant")
    assert learned(off) == "<|content|>4<|end|>"
    least = of(source, *tokens, end="<|end|>", template_kwargs={"reasoning_effort": "minimal"})
    assert (least.opened, least.markup) == (False, on.markup)


# --- system turns -----------------------------------------------------------------------------------------------------

DROPS = "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n" + (
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT + "{% endif %}"
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
SYSTEM: list[Message] = [{"role": "system", "content": "Be brief."}]
BEGUN: list[Message] = [{"role": "assistant", "content": "Hello!"}]


@pytest.mark.parametrize("source", [DROPS, REFUSES])
def test_a_system_turn_that_a_template_does_not_take_stands_in_the_first_turn_of_the_user(source: str) -> None:
    begun = of(source).render([*SYSTEM, *BEGUN, *ASKED]).text
    assert begun == of(source).render([*BEGUN, {"role": "user", "content": "Be brief.\n\n2 + 2?"}]).text
    said = [{"role": "user", "content": "Why say 'Be brief.'?"}, *BEGUN, *ASKED]
    whole = of(source).render([*SYSTEM, *said]).text
    assert whole == of(source).render([{**said[0], "content": f"Be brief.\n\n{said[0]['content']}"}, *said[1:]]).text


def test_a_system_turn_that_the_user_repeats_stays_where_the_template_has_one() -> None:
    asked: list[Message] = [{"role": "user", "content": "Why say 'Be brief.'?"}]
    text = of(PLAIN).render([*SYSTEM, *asked]).text
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy say")
