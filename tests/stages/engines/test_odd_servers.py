"""Servers that answer otherwise than OpenAI's: streams, parts, failures with status 200, odd counts, markers left."""

import json
from typing import Any

import pytest
from support.chat_server import Answer, ask, chat

from cgd_stages.contract import Chat, Endpoint, Repetition, Sampling
from cgd_stages.engines.base import Completion, Refused, Reply, Request
from cgd_stages.engines.openai_trial import try_request
from cgd_stages.engines.replies import fault
from cgd_stages.errors import TransientError, UserError
from cgd_stages.method import prompts


def stream(*pieces: Any, end: str = "data: [DONE]\n\n", line: str = "\n") -> Answer:
    """What a server sends that streams although nobody has asked it to."""
    events = "".join(f"data: {json.dumps(piece)}{line}{line}" for piece in pieces)
    return 200, {"Content-Type": "text/event-stream"}, (events + end).encode()


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


ENCRYPTED = {"type": "reasoning.encrypted", "data": "x"}
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
BEGIN = delta(role="assistant", content="")


def reply_to(serve: Any, answer: Answer) -> Reply:
    return ask(serve(lambda question, before: answer).url, ["q"])["q"]


@pytest.mark.parametrize(
    "answer",
    [
        stream(BEGIN, delta(content="It is "), delta(content="4.", finish="stop"), USAGE),
        stream(BEGIN, delta(content="It is 4."), delta(finish="stop"), USAGE, end=""),
        stream(BEGIN, delta(content="It is 4."), USAGE),  # no finish reason at all
        stream(BEGIN, delta(content="It is 4.", finish="stop"), USAGE, line="\r\n"),
        (200, {}, b": keep-alive\n\n" + stream(delta(content="It is 4.", finish="stop"), USAGE)[2]),
        (200, {}, b"event: message\n" + stream(delta(content="It is 4.", finish="stop"), USAGE)[2]),
        stream(delta(content=[{"type": "text", "text": "It is 4."}], finish="stop"), USAGE),
        (200, {}, b"\n\n  " + json.dumps(chat("It is 4.")[2]).encode()),  # blanks while the model is at work
    ],
)
def test_a_stream_that_nobody_has_asked_for_is_put_together(serve, answer):
    assert reply_to(serve, answer) == Completion("q", "It is 4.", "stop", 3, 2)


def test_a_stream_has_its_thought_in_a_field_of_its_own_or_in_the_text(serve):
    apart = stream(delta(reasoning_content="2 and"), delta(reasoning_content=" 2"), delta(content="4", finish="stop"))
    inside = stream(delta(content="<think>2 and 2</th"), delta(content="ink>4", finish="stop"))
    parts = stream(
        delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "2 and 2"}]}]),
        delta(content="4", finish="stop"),
    )
    for answer in (apart, inside, parts):
        assert reply_to(serve, answer) == Completion("q", "4", "stop", 0, 0, "2 and 2")


def test_a_stream_that_breaks_off_is_asked_for_again(serve):
    whole = stream(delta(content="It is 4.", finish="stop"), USAGE)
    broken = [
        stream(BEGIN, delta(content="It is "), end=""),
        stream(BEGIN, {"error": {"code": 500, "message": "oops"}}),
    ]
    server = serve(lambda question, before: broken[before] if before < len(broken) else whole)
    assert ask(server.url, ["q"])["q"] == Completion("q", "It is 4.", "stop", 3, 2)
    assert server.asked["q"] == 3


def failing(**body: Any) -> Answer:
    return 200, {}, body


@pytest.mark.parametrize(
    "answer",
    [
        failing(error={"code": "insufficient_quota", "message": "check your plan"}),
        failing(error={"code": "402", "message": "no"}),
        failing(error={"type": "billing_error", "message": "no"}),
        failing(error={"message": "Insufficient credits"}),
        failing(base_resp={"status_code": 1008, "status_msg": "insufficient balance"}, choices=None),
        (400, {}, {"error": {"type": "invalid_request_error", "message": "Your credit balance is too low to ..."}}),
        (403, {}, {"error": "Your team has used all available credits or reached its limit"}),
        (429, {}, {"error": {"type": "exceeded_current_quota_error", "message": "..."}}),
    ],
)
def test_a_credit_that_is_used_up_ends_the_run_whatever_the_server_calls_it(serve, answer):
    with pytest.raises(UserError, match="the credit at the endpoint"):
        reply_to(serve, answer)


@pytest.mark.parametrize(
    "answer",
    [
        (403, {}, {"error": {"message": "flagged", "metadata": {"flagged_input": "He has insufficient funds."}}}),
        (400, {}, {"detail": [{"msg": "too long", "input": "an insufficient balance"}]}),
        (400, {}, b"'insufficient funds' is refused"),
    ],
)
def test_words_of_a_prompt_that_a_server_echoes_are_no_word_of_the_credit(serve, answer):
    server = serve(lambda question, before: answer if question == "q" else chat("ok"))
    assert isinstance(ask(server.url, ["q", "other"])["q"], Refused)


@pytest.mark.parametrize(
    "answer",
    [
        failing(error={"code": "rate_limit_exceeded", "message": "slow down"}),
        failing(error={"code": "429"}),
        failing(error="overloaded"),
        failing(error={"type": "overloaded_error"}),
        failing(code=50000, message="internal"),
        failing(object="error", message="internal", code=50001),
        failing(type="error", error={"type": "api_error", "message": "internal"}),
        failing(choices=[]),
        failing(choices=None),
        failing(),
    ],
)
def test_a_failure_with_status_200_is_asked_again(serve, answer):
    server = serve(lambda question, before: chat("4") if before == 2 else answer)
    assert isinstance(ask(server.url, ["q"])["q"], Completion)
    assert server.asked["q"] == 3


@pytest.mark.parametrize(
    "error", [{"code": "context_length_exceeded"}, {"type": "invalid_request_error"}, {"code": 400}, {"status": 413}]
)
def test_a_refusal_with_status_200_rejects_its_row_alone_and_at_once(serve, error):
    server = serve(lambda question, before: failing(error=error) if question == "bad" else chat("4"))
    replies = ask(server.url, ["a", "bad", "b"])
    assert isinstance(replies["bad"], Refused)
    assert isinstance(replies["b"], Completion)
    assert server.asked["bad"] == 1


def test_a_wrong_key_with_status_200_is_the_keys_fault(serve):
    with pytest.raises(UserError, match="does not accept the key"):
        reply_to(serve, failing(error={"code": "invalid_api_key", "message": "who are you?"}))


def counting(usage: Any, **message: Any) -> Answer:
    answer = {"choices": [{"message": {"content": "4", **message}, "finish_reason": "stop"}], "usage": usage}
    return 200, {}, answer


@pytest.mark.parametrize(
    ("usage", "read", "written", "cached"),
    [
        (None, 0, 0, 0),
        ([], 0, 0, 0),
        ("many", 0, 0, 0),
        ({"prompt_tokens": "3", "completion_tokens": 2.0}, 3, 2, 0),
        ({"prompt_tokens": None, "completion_tokens": "some"}, 0, 0, 0),
        ({"prompt_tokens": -3, "completion_tokens": 10**30}, 0, 2**31 - 1, 0),
        ({"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": [1]}, 3, 2, 0),
        ({"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 2}}, 3, 2, 2),
        ({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}, 3, 2, 0),
        ({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 25}, 3, 22, 0),  # a thought in the total
        ({"completion_tokens": 2, "total_tokens": 25}, 0, 2, 0),
        ({"prompt_tokens": float("inf"), "completion_tokens": float("nan")}, 0, 0, 0),
    ],
)  # fmt: skip
def test_no_text_is_lost_for_the_way_in_which_a_server_counts(serve, usage, read, written, cached):
    server = serve(lambda question, before: counting(usage))
    assert ask(server.url, ["q"])["q"] == Completion("q", "4", "stop", read, written, cached_tokens=cached)
    assert server.asked["q"] == 1


@pytest.mark.parametrize(
    ("message", "text", "thinking"),
    [
        ({"content": ["It is ", {"type": "output_text", "text": "4."}]}, "It is 4.", ""),
        ({"content": "4", "reasoning": {"content": "hm"}}, "4", "hm"),
        ({"content": "4", "reasoning": ["h", "m"]}, "4", "hm"),
        ({"content": "4", "refusal": None, "reasoning_details": [ENCRYPTED]}, "4", ""),
        ({"content": "4", "refusal": "", "tool_calls": [], "annotations": []}, "4", ""),
        ({"content": "<think>a<think>b</think>c</think>\n\n4"}, "4", "a\nb\nc"),
        ({"content": "<think></think>4"}, "4", ""),
        ({"content": "<think>a</think>4", "reasoning": "a"}, "4", "a"),
        ({"content": "4<think>"}, "4<think>", ""),
        ({"content": "<reasoning>hm</reasoning>\n4"}, "4", "hm"),  # Bedrock's
        ({"content": "<thought>hm</thought>4 <b>"}, "4 <b>", "hm"),  # Google's
        ({"content": "\n<thinking>\nhm\n</thinking>\n\n4"}, "4", "hm"),
        ({"content": "I wrote <reasoning>."}, "I wrote <reasoning>.", ""),
        ({"content": "4", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}, ENCRYPTED]}, "4", "hm"),
        ({"content": "4", "reasoning_details": [{"type": "reasoning.summary", "summary": "hm"}]}, "4", "hm"),
        ({"content": "4", "reasoning": "hm", "reasoning_details": [{"text": "h"}, {"text": "m"}]}, "4", "hm"),
        ({"content": [{"type": "reasoning_text", "text": "hm"}, {"type": "output_text", "text": "4"}]}, "4", "hm"),
        ({"content": [{"text": "hm", "thought": True}, {"text": "4"}]}, "4", "hm"),
    ],
)  # fmt: skip
def test_text_and_thought_are_read_whatever_they_are_wrapped_into(serve, message, text, thinking):
    answer = 200, {}, {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert reply_to(serve, answer) == Completion("q", text, "stop", 0, 0, thinking)


@pytest.mark.parametrize("tag", ["reasoning", "thought", "thinking"])
def test_tags_that_the_prompt_asks_for_are_a_part_of_the_answer(serve, tag):
    """As in prompts that want an answer in two parts."""
    text = f"<{tag}>2 and 2</{tag}><answer>4</answer>"
    server = serve(lambda question, before: chat(text))
    asked = f"2 + 2? Write <{tag}> ... </{tag}>, then <answer> ... </answer>."
    assert ask(server.url, [asked])[asked] == Completion(asked, text, "stop", 3, 2)


def test_a_tag_that_does_not_end_is_a_thought_without_an_answer(serve):
    reply = reply_to(serve, chat("<reasoning>2 and 2 make \\boxed{4}"))
    assert isinstance(reply, Completion)
    assert reply.thinking == "2 and 2 make \\boxed{4}"
    assert (fault(reply, Repetition()) or ("",))[0] == "unfinished_thought"


@pytest.mark.parametrize(
    ("said", "kept"), [("token_limit", "length"), ("max_output_tokens", "length"), ("RECITATION", "RECITATION")]
)
def test_other_names_of_an_end(serve, said, kept):
    reply = reply_to(serve, chat("4", said))
    assert isinstance(reply, Completion)
    assert reply.finish_reason == kept


@pytest.mark.parametrize("said", ["time_limit", "cancelled", "not_finished", "TIMEOUT"])
def test_other_names_of_a_text_that_the_server_has_broken_off(serve, said):
    server = serve(lambda question, before: chat("4") if before else chat("2 and", said))
    assert ask(server.url, ["q"])["q"] == Completion("q", "4", "stop", 3, 2)


def test_an_encrypted_thought_is_one_that_the_server_hides(serve):
    endpoint = Endpoint(
        url=serve(lambda question, before: counting(None, reasoning_details=[ENCRYPTED])).url, model="big"
    )
    request = Request("r", prompts.answer_messages("q"), Sampling())
    assert try_request(endpoint, Chat(), request, "spec.generation.refine").thinks


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("It is 4.<|im_end|>", "<|im_end|>"),
        ("It is 4.<|im_end|>\n<|im_start|>user\nAnd 3 + 3?", "<|im_end|>, <|im_start|>"),
        ("It is 4.</s>", "</s>"),
        ("It is 4. [/INST] And?", "[/INST]"),
        ("It is 4.<|eot_id|><|start_header_id|>assistant", "<|eot_id|>, <|start_header_id|>"),
        ("It is 4.<|end_of_role|>", "<|end_of_role|>"),
        ("<think>hm<|im_start|></think>4", "<|im_start|>"),
        ("It is <s>5</s>", ""),
        ("A <turn> in XML, and |x| <|y|>", ""),
        ("assistantfinalIt is 4.", ""),
    ],
)
def test_a_text_in_which_a_server_has_left_control_tokens_is_rejected_with_that_reason(serve, text, left):
    reply = reply_to(serve, chat(text))
    assert isinstance(reply, Completion)
    assert reply.control_tokens == left
    found = fault(reply, Repetition())
    assert (found[0] if found else "") == ("control_tokens" if left else "")


def test_a_server_that_streams_without_an_end_is_no_fault_of_the_rows(serve):
    with pytest.raises(TransientError, match="the stream has no end"):
        reply_to(serve, stream(BEGIN, end=""))
