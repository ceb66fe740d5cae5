"""Templates that would ask a model something else, or teach it more than its reply, are refused when they load."""

import pytest
from support import stand_in, tiny

from cgd_stages.chat.example import Unusable, example
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Chat
from cgd_stages.errors import UserError

LATER = "{% if add_generation_prompt %}### Response:\n{% endif %}"
ALPACA = (
    "{% for m in messages %}{{ '### Response:' if m.role == 'assistant' else '### Instruction:' }}\n"
    "{{ m.content }}\n\n{% endfor %}" + LATER
)
ROLES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def of(source: str) -> ChatTemplate:
    tokenizer = stand_in.tokenizer(source, (tiny.START, tiny.END, "<|reply|>"), end=tiny.END)
    return ChatTemplate(tokenizer, Chat(), name="team/model")


def with_content(expression: str) -> str:
    """The tiny model's template with another expression for the content of a message."""
    changed = tiny.TEMPLATE.replace("message['content']", expression)
    assert changed != tiny.TEMPLATE
    return changed


def test_a_template_without_an_end_marker_learns_the_reply_and_the_end_of_the_text() -> None:
    template = of(ALPACA)
    made = example(template, [{"role": "user", "content": "2 + 2?"}], "It is 4.", max_length=999)
    assert template.tokenizer.decode(made.input_ids[made.start :]) == f"It is 4.\n\n{tiny.END}"


@pytest.mark.parametrize(
    "source",
    [
        ALPACA.replace(LATER, "### Response:\n"),
        ROLES,
        ROLES.replace("{% endfor %}", f"{{{{ '{tiny.END}' if m.role == 'assistant' }}}}{{% endfor %}}"),
        "{% for m in messages %}{{ '<|reply|>' if m.role == 'assistant' }}{{ m.content }}\n{% endfor %}<|reply|>",
    ],
    ids=["alpaca", "roles", "roles and an end", "a token"],
)
def test_a_template_that_begins_another_reply_behind_every_reply_is_refused(source: str) -> None:
    with pytest.raises(UserError, match=r"begins another reply .* behind a reply") as refused:
        of(source)
    assert "add_generation_prompt" in refused.value.hint


def test_a_template_that_writes_a_reply_twice_is_refused() -> None:
    with pytest.raises(UserError, match="writes the assistant's turn more than once"):
        of(with_content("message['content'] ~ message['content']"))


@pytest.mark.parametrize(
    "expression",
    [
        "('' if message['role'] == 'user' else message['content'])",
        "message['content'][:100]",
        "message['content'][:10000]",
        "message['content'] | lower",
        "message['content'] | e",
        "message['content'] | tojson",
        "message['content'].split('###')[0]",
        "message['content'] | replace('\\\\boxed', 'boxed')",
        "message['content'].split() | join(' ')",
    ],
)
def test_a_template_that_changes_a_users_text_is_refused(expression: str) -> None:
    with pytest.raises(UserError, match="team/model does not write the user's text whole"):
        of(with_content(expression))


def test_a_template_may_trim_the_texts() -> None:
    assert of(with_content("message['content'] | trim")).turn.end


BROKEN = {
    "division": "{{ 1 // 0 }}",
    "power": "{{ 10.0 ** 999 }}",
    "range": "{% for i in range(10 ** 7) %}{% endfor %}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_whatever_jinja_cannot_compute_is_the_templates_fault(broken: str) -> None:
    with pytest.raises(UserError, match="the chat template of team/model fails: "):
        of(BROKEN[broken] + tiny.TEMPLATE)
    once = "{% if messages[-1].content == 'Go.' %}" + BROKEN[broken] + "{% endif %}"
    template = of(once + tiny.TEMPLATE)
    with pytest.raises(Unusable) as refused:
        example(template, [{"role": "user", "content": "Go."}], "4", max_length=99)
    assert refused.value.reason == "template"
