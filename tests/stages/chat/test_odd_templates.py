"""Templates that nobody of the tables has: what is odd about each either works or is refused, and nothing is lost."""

from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from support import stand_in

from cgd_stages.chat.example import IGNORE, Unusable, example
from cgd_stages.chat.messages import Message
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Chat
from cgd_stages.errors import UserError

ASKED: list[Message] = [{"role": "user", "content": "2 + 2?"}]
LONG: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say one."},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "Say two."},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Say three."},
]
TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<s>", "</s>", "[THINK]", "[/THINK]")
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA2 = (
    "{% set s = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if s else messages %}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set c = s ~ m.content if loop.first else m.content %}"
    "{% if m.role == 'user' %}<s>[INST] {{ c | trim }} [/INST]{% else %} {{ c | trim }} </s>{% endif %}{% endfor %}"
)
ROUNDS = (
    "{% for m in messages %}{% if m.role == 'user' %}[Round {{ loop.index0 // 2 + 1 }}]\n\n\u95ee\uff1a{{ m.content }}"
    "\n\n\u7b54\uff1a{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
)
MISTRAL1 = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[INST] {% if loop.last and s %}{{ s }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
BETWEEN = (
    HEAD + "{{ m.content }}{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}"
)


def of(source: str, end: str = "<|im_end|>", **chat: Any) -> ChatTemplate:
    return ChatTemplate(stand_in.tokenizer(source, TOKENS, end=end), Chat(**chat), name="team/model")


WORK = {
    "a system turn inside the first user's, and a count of turns": (LLAMA2, "</s>", " 4 </s>"),
    "rounds that are counted": (ROUNDS, "<|endoftext|>", "4\n\n<|endoftext|>"),
    "a number in each turn's head": (
        "{% for m in messages %}<|im_start|>{{ loop.index }} {{ m.role }}\n" + TAIL
        + "{% if add_generation_prompt %}<|im_start|>{{ messages|length + 1 }} assistant\n{% endif %}",
        "<|im_end|>",
        "4<|im_end|>",
    ),
    "a system turn inside the last user's": (MISTRAL1, "</s>", " 4</s>"),
    "an end of a turn that only stands between turns": (BETWEEN, "<|im_end|>", "4<|im_end|>"),
    "a block for the tokens to be learned": (
        HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT,
        "<|im_end|>",
        "4<|im_end|>",
    ),
    "a beginning of the text": ("{{ bos_token }}" + HEAD + TAIL + PROMPT, "<|im_end|>", "4<|im_end|>"),
    "tools that nobody gives": ("{{ tools | tojson }}" + HEAD + TAIL + PROMPT, "<|im_end|>", "4<|im_end|>"),
    "a word that the model writes first": (
        HEAD + "{% if m.role == 'assistant' %}Answer: {% endif %}" + TAIL + PROMPT, "<|im_end|>", "Answer: 4<|im_end|>"
    ),
    "an end of the text after the last turn alone": (
        HEAD + "{{ m.content }}{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}" + PROMPT,
        "<|im_end|>",
        "4<|im_end|>",
    ),
    "a loop that goes on": (
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}<|im_start|>{{ m.role }}\n"
        + TAIL + PROMPT,
        "<|im_end|>",
        "4<|im_end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("source", "end", "learned"), WORK.values(), ids=WORK)
@pytest.mark.parametrize("asked", [ASKED, LONG])
def test_what_is_odd_about_a_template_changes_neither_context_nor_target(
    source: str, end: str, learned: str, asked: list[Message]
) -> None:
    template = of(source, end)
    made = example(template, asked, "4", max_length=9999)
    context = template.token_ids(template.render(asked))
    assert made.input_ids[: made.start] == context
    assert all(turn["content"] in template.tokenizer.decode(context) for turn in asked)
    assert template.tokenizer.decode([label for label in made.labels if label != IGNORE]) == learned


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages[-3:] %}<|im_start|>{{ m.role }}\n" + TAIL + PROMPT,
        HEAD.replace("<|", "{% if m.role != 'assistant' or loop.last %}<|", 1)
        + "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT,
        HEAD + "{{ m.content if loop.revindex < 4 else m.content[:4] }}<|im_end|>\n{% endfor %}" + PROMPT,
    ],
    ids=["the last turns alone", "no earlier replies", "earlier turns shortened"],
)  # fmt: skip
def test_a_template_that_leaves_out_turns_refuses_the_conversations_that_have_them(source: str) -> None:
    """They would be asked, and learned, without the words that they are about."""
    template = of(source)
    assert template.render(ASKED).text
    with pytest.raises(TemplateError, match=r"it leaves out words of the \w+'s turn"):
        template.render(LONG)
    with pytest.raises(Unusable, match="template: it leaves out"):
        example(template, LONG, "4", max_length=9999)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ messages|length }} turns\n" + HEAD + TAIL + PROMPT, "begins differently when a reply follows"),
        ("{{ tools|length }}" + HEAD + TAIL + PROMPT, "fails: TypeError"),
        ("{{ datetime.now() }}" + HEAD + TAIL + PROMPT, "fails: 'datetime' is undefined"),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('who am I?') }}{% endif %}" + HEAD + TAIL, "who am"),
        ("{% if messages[-1].role != 'user' %}{{ raise_exception('ask!') }}{% endif %}" + HEAD + TAIL, "fails: ask!"),
        ("{% for m in messages[-1:] %}<|im_start|>{{ m.role }}\n" + TAIL + PROMPT, "begins differently"),
        (
            HEAD + "{{ m.content|upper if m.role == 'assistant' else m.content }}<|im_end|>{% endfor %}",
            "does not write",
        ),
        (HEAD + "{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>{% endfor %}" + PROMPT, "does not write"),
    ],
)
def test_a_template_that_cannot_be_trained_is_refused_by_the_models_name(source: str, why: str) -> None:
    with pytest.raises(UserError, match=f"the chat template of team/model .*{why}"):
        of(source)
