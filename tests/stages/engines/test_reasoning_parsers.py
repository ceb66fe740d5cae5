"""The formats of thoughts beside vLLM's own parsers of the same names."""

import warnings
from typing import Any

import pytest
from support import stand_in

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.chat.thoughts import PARSERS, split
from cgd_stages.contract import Chat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


PLAIN = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
OWN_TOKENIZER = {"mistral", "olmo3", "poolside_v1"}
"""Parsers that want words or control tokens of their own model's tokenizer."""
LEFT_OUT = {"hf", "hy_v4", "inkling", "k2_horizon", "kimi_k3", "minimax_m2_append_think"}
"""Names of vLLM's that are no markup: their markers come from the checkpoint, the effort or the template itself."""


def theirs(name: str) -> Any:
    """vLLM's parser, with a tokenizer that has the format's control tokens."""
    with warnings.catch_warnings(action="ignore"):
        from vllm.reasoning import ReasoningParserManager

        markup = PARSERS[name]
        tokens = (*stand_in.markers(markup.opening + markup.bridge), "<|im_end|>")
        return ReasoningParserManager.get_reasoning_parser(name)(stand_in.tokenizer("", tokens, end="<|im_end|>"))


@pytest.mark.parametrize("name", ["deepseek_r1", "glm45", "kimi_k2", "nemotron_v3", "qwen3"])
@pytest.mark.parametrize("reply", ["<think>add</think>It is 4.", "add</think>It is 4.", "<think>add"])
def test_a_reply_with_one_thought_is_split_as_vllm_splits_it(name: str, reply: str) -> None:
    thought, answer = theirs(name).extract_reasoning(reply, None)
    parts = split(reply, PARSERS[name], opened=None if reply.startswith("<") else True)
    assert ((thought or "").strip(), (answer or "").strip()) == (parts.thinking, parts.text)


def test_a_name_of_vllms_has_the_markers_that_vllm_has() -> None:
    from vllm.reasoning import ReasoningParserManager

    assert set(ReasoningParserManager.list_registered()) - set(PARSERS) == LEFT_OUT
    assert set(PARSERS) - set(ReasoningParserManager.list_registered()) == {"s1"}
    found = {name: theirs(name) for name in sorted(set(PARSERS) - OWN_TOKENIZER - {"s1"})}
    shown = {name: (one.reasoning_start_str, one.reasoning_end_str) for name, one in found.items()}
    shown = {name: pair for name, pair in shown.items() if None not in pair}
    for name, (start, end) in shown.items():
        assert PARSERS[name].start.startswith(start), name
        assert PARSERS[name].bridge.strip().startswith(end), name
    assert len(shown) > 10


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("granite", "Here is my thought process: add Here is my response: It is 4."),
        ("hunyuan_a13b", "<think>\nadd\n</think>\n<answer>\nIt is 4.\n</answer>"),
        ("ernie45", "add\n</think>\n\n<response>\nIt is 4.\n</response>\n"),
    ],
)
def test_a_form_that_needs_its_name_is_split_as_vllm_splits_it(name: str, reply: str) -> None:
    thought, answer = theirs(name).extract_reasoning(reply, None)
    parts = ChatTemplate(stand_in.tokenizer(PLAIN), Chat(reasoning_parser=name)).split_text(reply)
    assert ((thought or "").strip(), (answer or "").strip()) == (parts.thinking, parts.text) == ("add", "It is 4.")
