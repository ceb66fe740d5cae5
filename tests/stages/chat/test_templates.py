"""The chat templates that the world uses, as TRL's package has them from the models: what a student reads and learns.

Every example's context is the prompt of the same conversation at inference, token for token; what is learned is what
the model itself writes from there on, and nothing else. The values expected are written here by hand, from the
templates' sources and the families' own outputs.
"""

import re
from itertools import product
from typing import Literal, NamedTuple, get_args

import pytest
from support import stand_in
from support.stand_in import PICTURES

from cgd_stages.chat.example import IGNORE, Example, Unusable, example
from cgd_stages.chat.messages import Message
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Chat, Supervised
from cgd_stages.errors import UserError
from cgd_stages.method.examples import conversation, row_example
from cgd_stages.method.prompts import TEACHER, TRAINING
from cgd_stages.prepare.tryout import ROW

THOUGHT, TARGET = "1 and 1 make 2.", "1 + 1 = 2."
HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>"
MUSE = " to=self<|message|>{}<|eom|><|start|>assistant to=user<|message|>"
CANNOT = None


class Form(NamedTuple):
    """What is learned of a reply besides thought and target."""

    end: str
    """How the reply ends."""
    off: str | None = ""
    """What the model writes before a target without a thought; CANNOT: its thinking cannot be switched off."""
    on: str | None = CANNOT
    """What the model writes around a thought; CANNOT: it has none."""
    closed: str = ""
    """The end of the prompt of a model that does not think, where it shows."""
    opened: str = ""
    """The end of the prompt of a model that thinks, where it shows."""


COHERE = Form("<|END_OF_TURN_TOKEN|>")
GEMMA = Form("<turn|>", on="<|channel>thought\n{}\n<channel|>")
LFM = Form("<|im_end|>", on="<think>{}</think>")
LLAMA = Form("<|eot_id|>")
DEEPSEEK = Form("<\uff5cend\u2581of\u2581sentence\uff5c>", off=CANNOT, on="{}\n</think>\n\n", opened="<think>\n")
NEMOTRON = Form("<|im_end|>", on="{}\n</think>\n", closed="<think></think>", opened="<think>\n")
QWEN = Form("<|im_end|>")
EMPTY = "<think>\n\n</think>\n\n"
QWEN3 = Form("<|im_end|>", on="<think>\n{}\n</think>\n\n", closed=EMPTY, opened="assistant\n")
QWEN35 = Form("<|im_end|>", on="{}\n</think>\n\n", closed=EMPTY, opened="<think>\n")
FORMS = {
    "cohere": COHERE,
    "cohere2": Form("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill": DEEPSEEK,
    "deepseekv3": DEEPSEEK,
    "diffusion_gemma": GEMMA,
    "gemma": Form("<end_of_turn>"),
    "gemma3": Form("<end_of_turn>"),
    **dict.fromkeys(("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"), GEMMA),
    "glm4moe": Form("<|endoftext|>", off="\n", on="\n<think>{}</think>\n", closed="\n<think></think>"),
    "gptoss": Form("<|return|>", off=CANNOT, on=HARMONY),
    "lfm2": QWEN,
    "lfm2_2_5": LFM,
    "lfm2_2_5_v2": LFM,
    "lfm2_2_5_vl": LFM,
    "lfm2_v2": QWEN,
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), LLAMA),
    "muse_glimmer": Form("<|eot|>", off=CANNOT, on=MUSE),
    "nemotron_3_5_lightning": NEMOTRON._replace(on="{}</think>"),
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": NEMOTRON._replace(on="{}</think>"),
    "phi3": Form("<|end|>"),
    "phi3_5": Form("<|end|>"),
    "qwen2_5": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3": QWEN3,
    "qwen3_5_nothink": QWEN35,
    "qwen3_5_think": QWEN35,
    "qwen3_6": QWEN35,
    "qwen3_8": QWEN35,
    "qwen3_instruct_2507": QWEN,
    "qwen3_vl": QWEN,
}
DATED = {"gptoss", "llama3_2", "muse_glimmer"}


def spoken(name: str, thinking: Literal["auto", "on", "off"] = "auto", *, listed: bool = True) -> ChatTemplate:
    tokenizer = stand_in.tokenizer(stand_in.template(name), listed=listed)
    return ChatTemplate(tokenizer, Chat(thinking=thinking, date="2026-11-29"), name=name)


def learned(template: ChatTemplate, made: Example) -> str:
    return str(template.tokenizer.decode([label for label in made.labels if label != IGNORE]))


def test_every_template_of_trl_has_its_form_here_but_those_for_pictures() -> None:
    assert sorted([*FORMS, *PICTURES]) == stand_in.originals()
    assert len(FORMS) == 38


@pytest.mark.parametrize(("name", "listed"), [*product(FORMS, (True, False))])
@pytest.mark.parametrize("objective", get_args(Supervised))
def test_a_student_that_does_not_think_learns_target_and_end_of_turn(
    name: str, listed: bool, objective: Supervised
) -> None:
    form = FORMS[name]
    if form.off is CANNOT:
        with pytest.raises(UserError, match=f"{name} cannot switch thinking off") as caught:
            spoken(name, "off", listed=listed)
        assert "spec.training.thinking to learn" in caught.value.hint
        return
    template = spoken(name, "off", listed=listed)
    context, target = conversation(objective, ROW)
    made = row_example(template, objective, ROW, max_length=100_000)
    assert made.input_ids[: made.start] == template.token_ids(template.render(context))
    assert learned(template, made) == f"{form.off}{target}{form.end}"
    assert template.render(context).text.endswith(form.closed)
    assert not template.thinks


@pytest.mark.parametrize(("name", "listed"), [*product(FORMS, (True, False))])
@pytest.mark.parametrize("objective", get_args(Supervised))
@pytest.mark.parametrize("with_thought", [True, False])
def test_a_student_that_thinks_learns_thought_and_markers_too(
    name: str, listed: bool, objective: Supervised, with_thought: bool
) -> None:
    form = FORMS[name]
    if form.on is CANNOT:
        with pytest.raises(UserError, match=f"{name} has no thoughts"):
            spoken(name, "on", listed=listed)
        return
    template = spoken(name, "on", listed=listed)
    thoughts = ("refinement_thinking", "critique_thinking", "distilled_thinking")
    row = ROW | dict.fromkeys(thoughts, THOUGHT if with_thought else None)
    context, target = conversation(objective, row)
    made = row_example(template, objective, row, max_length=100_000, thinking="learn")
    thought = THOUGHT if with_thought and objective != "SFT" else ""
    assert made.input_ids[: made.start] == template.token_ids(template.render(context))
    assert learned(template, made) == f"{form.on.format(thought)}{target}{form.end}"
    assert template.render(context).text.endswith(form.opened)
    assert made.thought == bool(thought)
    assert template.thinks


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.on])
def test_what_is_learned_is_split_again_as_it_was_put_together(name: str) -> None:
    template = spoken(name, "on")
    made = row_example(template, "CGD", ROW, max_length=100_000, thinking="learn")
    parts = template.split(made.input_ids[made.start :], "")
    assert (parts.thinking, parts.text, parts.unfinished_thinking) == (THOUGHT, TARGET, False)


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.on])
def test_a_thought_that_is_cut_has_no_answer(name: str) -> None:
    template = spoken(name, "on")
    made = row_example(template, "CGD", ROW, max_length=100_000, thinking="learn")
    reply = made.input_ids[made.start :]
    whole = template.tokenizer.decode(reply)
    cut = stand_in.ids(template.tokenizer, whole[: whole.index(THOUGHT) + len(THOUGHT) - 3])
    parts = template.split(cut, "")
    assert (parts.text, parts.unfinished_thinking) == ("", True)
    assert parts.thinking == THOUGHT[:-3]


@pytest.mark.parametrize("name", FORMS)
def test_a_system_turn_reaches_the_model_and_an_earlier_turn_does_too(name: str) -> None:
    template = spoken(name)
    for turn in ("user", "system"):
        context, _ = conversation("CGD", ROW, turn)
        assert template.render(context).text.count(TRAINING) == 1
    turns: list[Message] = [
        {"role": "user", "content": "Say one."},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Say two."},
    ]
    text = template.render([{"role": "system", "content": TEACHER}, *turns]).text
    assert [part in text for part in (TEACHER, "Say one.", "One.", "Say two.")] == [True] * 4
    if not template.opened:
        made = example(template, turns, "Two.", max_length=100_000)
        assert made.input_ids[: made.start] == template.token_ids(template.render(turns))


@pytest.mark.parametrize("name", FORMS)
def test_the_date_is_the_runs_and_counts_in_a_digest_only_where_a_template_asks_for_it(name: str) -> None:
    tokenizer = stand_in.tokenizer(stand_in.template(name))
    one, other = (ChatTemplate(tokenizer, Chat(date=day), name=name) for day in ("2026-11-29", "2026-11-30"))
    context, _ = conversation("SFT", ROW)
    assert (one.render(context) != other.render(context)) == (name in DATED)
    assert one.dated == (name in DATED)
    assert (one.identity() != other.identity()) == (name in DATED)
    assert one.identity() == ChatTemplate(tokenizer, Chat(date="2026-11-29"), name=name).identity()


PLAIN = sorted(name for name, form in FORMS.items() if form.on is CANNOT and name not in DATED)


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_without_thoughts_has_the_digests_that_it_had(name: str) -> None:
    tokenizer = stand_in.tokenizer(stand_in.template(name), end=FORMS[name].end[FORMS[name].end.rindex("<") :])
    assert ChatTemplate(tokenizer, Chat(thinking="off", date="2026-11-29"), name=name).identity() == {}
    other = Chat(template="Note. " + stand_in.template(name))
    assert ChatTemplate(tokenizer, other, name=name).identity() != {}


@pytest.mark.parametrize("name", sorted(name for name, form in FORMS.items() if form.on))
def test_modes_of_a_thinking_model_have_digests_of_their_own(name: str) -> None:
    modes: list[Literal["on", "off"]] = ["on"] if FORMS[name].off is CANNOT else ["on", "off"]
    found = [spoken(name, mode).identity()["chat"]["rendering"] for mode in modes]
    assert len(set(found)) == len(found) or name.startswith("lfm")


@pytest.mark.parametrize("name", PICTURES)
def test_a_template_for_pictures_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(UserError, match=f"the chat template of {name} "):
        spoken(name)


ASKED: list[Message] = [{"role": "user", "content": "?"}]


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.on])
@pytest.mark.parametrize(("target", "thought"), [("It is {} 4.", "hm"), ("4", "hm {} hm")])
def test_nothing_that_holds_a_marker_of_the_students_thoughts_is_learned(name: str, target: str, thought: str) -> None:
    template = spoken(name, "on")
    assert template.markup is not None
    for marker in (template.markup.start, template.markup.end):
        with pytest.raises(Unusable, match=f"markers: what is learned holds .*{re.escape(marker)}"):
            example(template, ASKED, target.format(marker), thought=thought.format(marker), max_length=10_000)


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.on and form.off is not CANNOT])
def test_a_student_that_does_not_think_learns_no_marker_of_a_thought_either(name: str) -> None:
    template = spoken(name, "off")
    assert template.markup is not None
    with pytest.raises(Unusable, match="markers"):
        example(template, ASKED, f"hm {template.markup.end} 4", max_length=10_000)


def test_a_student_without_thoughts_may_learn_to_spell_them_out() -> None:
    made = example(spoken("llama3"), ASKED, "<think>hm</think>4", max_length=10_000)
    assert learned(spoken("llama3"), made) == "<think>hm</think>4<|eot_id|>"
