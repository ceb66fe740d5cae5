"""A thought that reaches its budget is ended by the real vLLM, and what follows is the answer."""

import threading

import pytest
from support import tiny
from support.stage_builders import each

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Chat, Engine, Sampling
from cgd_stages.engines.base import Completion, Request, drive
from cgd_stages.engines.vllm import VllmEngine
from cgd_stages.method.prompts import answer_messages

# vLLM and torch warn about themselves while they are imported.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


SLACK = 5
"""Tokens past the budget: vLLM 0.32 ended this one, whose markers are several ordinary tokens each, after 9 of 5."""


@pytest.mark.parametrize(("budget", "longest"), [(5, 5 + SLACK), (None, 40)])
def test_a_thought_ends_with_its_budget(tmp_path, budget, longest):
    model = tiny.make(tmp_path / "model", always="7", template=THINKING)
    chat = Chat(thinking="on", thinking_budget=budget)
    engine = VllmEngine(model, Engine(dtype="float32"), ChatTemplate.load(model, chat))
    try:
        request = Request("q", answer_messages("How many?"), Sampling(max_tokens=40))
        (reply,) = drive(engine, each([request]), threading.Event())
    finally:
        engine.close()
    assert isinstance(reply, Completion)
    assert set(reply.thinking) == {"7"}
    assert (budget or longest) <= len(reply.thinking) <= longest
    assert reply.unfinished_thinking == (budget is None)
    assert set(reply.text) == (set() if budget is None else {"7"})
