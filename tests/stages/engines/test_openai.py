"""The endpoint engine against a small server of real HTTP: retries, refusals, keys, and nothing asked twice."""

import threading
import time
from collections import Counter

import pytest
from support.chat_server import QUICK, Answer, ask, chat
from support.patience import PATIENCE
from support.stage_builders import context, each, generate_work, prepared

from cgd_stages.contract import Endpoint, Repetition, Sampling
from cgd_stages.engines.base import Completion, Refused, Reply, Request, drive
from cgd_stages.engines.openai import EndpointEngine
from cgd_stages.engines.openai_server import Patience
from cgd_stages.engines.openai_trial import probe
from cgd_stages.engines.replies import fault
from cgd_stages.errors import StageError, TransientError, UserError
from cgd_stages.generate import __main__ as generate
from cgd_stages.method import prompts


def test_every_question_is_asked_once_and_answered(serve):
    server = serve(lambda question, before: chat(f"re: {question}"))
    questions = [f"q{n}" for n in range(30)]
    replies = ask(server.url, questions)
    assert replies["q7"] == Completion("q7", "re: q7", "stop", 3, 2)
    assert server.asked == dict.fromkeys(questions, 1)


@pytest.mark.parametrize("word", ["reasoning", "reasoning_content"])
def test_a_thought_that_the_server_tells_apart_and_cached_tokens_are_kept(serve, word):
    answer = chat("4")
    answer[2]["choices"][0]["message"][word] = "2 and 2"
    answer[2]["usage"]["prompt_tokens_details"] = {"cached_tokens": 2}
    server = serve(lambda question, before: answer)
    (reply,) = ask(server.url, ["2 + 2?"]).values()
    assert reply == Completion("2 + 2?", "4", "stop", 3, 2, thinking="2 and 2", cached_tokens=2)


def test_no_more_requests_are_under_way_than_allowed(serve):
    def slow(question: str, before: int) -> Answer:
        time.sleep(0.02)
        return chat("ok")

    server = serve(slow)
    ask(server.url, [f"q{n}" for n in range(20)], concurrency=3)
    assert server.most_at_once == 3


def test_the_request_says_what_the_task_says(serve, monkeypatch):
    monkeypatch.setenv("CGD_TEACHER_API_KEY", "secret-key")
    server = serve(lambda question, before: chat("ok"))
    ask(server.url, ["q"])
    assert server.bodies == [
        {
            "model": "big",
            "messages": [{"role": "user", "content": "q"}],
            "max_tokens": 9,
            "temperature": 0.0,
        }
    ]
    assert server.keys == {"Bearer secret-key"}


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_tried_again(serve, status):
    server = serve(lambda question, before: chat("ok") if before == 2 else (status, {}, b"later"))
    assert isinstance(ask(server.url, ["q"])["q"], Completion)
    assert server.asked["q"] == 3


def test_retry_after_is_obeyed(serve, monkeypatch):
    waits: list[float | None] = []
    pause = Patience.pause
    monkeypatch.setattr(Patience, "pause", lambda self, *given: waits.append(given[1]) or pause(self, 0, 0.0))
    headers = iter([{"Retry-After": "7"}, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, {"Retry-After": "soon"}])
    server = serve(lambda question, before: chat("ok") if before == 3 else (429, next(headers), b"later"))
    ask(server.url, ["q"], patience=Patience(tries=4))
    assert waits == [7.0, 0.0, None]


def test_pauses_double_with_jitter_up_to_the_longest():
    patience = Patience(first_pause=1.0, longest_pause=60.0)
    assert patience.pause(0, 12.0) == 12.0
    for attempt, most in ((0, 1), (3, 8), (20, 60), (2000, 60)):
        pauses = {patience.pause(attempt, None) for _ in range(50)}
        assert most / 2 <= min(pauses) < max(pauses) <= most


def test_a_request_that_the_server_refuses_rejects_its_row_alone(serve):
    server = serve(lambda question, before: (400, {}, b"too long for me") if question == "bad" else chat("ok"))
    replies = ask(server.url, ["a", "bad", "b"])
    assert replies["bad"] == Refused("bad", "endpoint", "HTTP 400: too long for me")
    assert isinstance(replies["a"], Completion)
    assert server.asked["bad"] == 1


def test_a_request_that_breaks_the_server_rejects_its_row_when_others_are_served(serve):
    def rule(question: str, before: int) -> Answer:
        if question == "poison":
            time.sleep(0.05)
            return 500, {}, b"oops"
        return chat("ok")

    replies = ask(serve(rule).url, ["poison", *[f"q{n}" for n in range(20)]], concurrency=2)
    assert isinstance(replies["poison"], Refused)
    assert len(replies) == 21


PAID = {
    "no credit": (402, {}, b"Insufficient Balance"),
    "no quota": (429, {}, {"error": {"code": "insufficient_quota", "message": "check your plan"}}),
    "no credit, in an answer": (200, {}, {"error": {"code": 402, "message": "Insufficient credits"}}),
    "no credit, in a choice": (200, {}, {"choices": [{"error": {"code": 402}, "finish_reason": "error"}]}),
}


@pytest.mark.parametrize("answer", PAID.values(), ids=PAID)
def test_a_credit_that_is_used_up_rejects_no_row_and_what_is_under_way_is_not_lost(serve, answer):
    used_up = threading.Event()

    def rule(question: str, before: int) -> Answer:
        if question == "long":  # is answered after others have been refused, and is paid for
            used_up.wait(PATIENCE)
            time.sleep(0.3)
            return chat("a long thought")
        if question in {"q0", "q1"}:
            return chat("ok")
        used_up.set()
        return answer

    server = serve(rule)
    engine = EndpointEngine(Endpoint(url=server.url, model="big", max_concurrency=2), QUICK)
    texts = ("long", *[f"q{n}" for n in range(9)])
    asked = each([Request(text, prompts.answer_messages(text), Sampling(max_tokens=9)) for text in texts])
    replies: dict[str, Reply] = {}

    def drain() -> None:
        for reply in drive(engine, asked, threading.Event()):
            replies[reply.name] = reply

    with pytest.raises(UserError, match="the credit at the endpoint") as caught:
        drain()
    engine.close()
    assert "Top up" in caught.value.hint
    assert {name: type(reply) for name, reply in replies.items()} == dict.fromkeys(("q0", "q1", "long"), Completion)


def test_after_the_credit_is_topped_up_only_the_rest_is_asked_for_and_nothing_is_rejected(
    serve, bucket, storage, tiny_model, tmp_path
):
    credit = [5]

    def rule(question: str, before: int) -> Answer:
        credit[0] -= 1
        return chat(f"re: {question}") if credit[0] >= 0 else (402, {}, b"Insufficient Balance")

    server, texts = serve(rule), [f"How many are {n} apples?" for n in range(12)]
    prepared(bucket, texts)
    endpoint = Endpoint(url=server.url, model="big", max_concurrency=2)
    work = generate_work(tiny_model, "distill", endpoint=endpoint, max_rejected=0.02)
    with pytest.raises(UserError, match="is used up"):
        generate.main(context(storage, work, tmp_path))
    credit[0] = 100
    facts = generate.main(context(storage, work, tmp_path))["distill"]
    assert (facts.rows.done, facts.rows.rejected) == (12, 0)
    assert credit[0] == 100 - 7


def test_replies_under_way_are_paid_for_and_stored_when_too_many_rows_are_rejected(
    serve, bucket, storage, tiny_model, tmp_path, monkeypatch
):
    arrived, ended, end = Counter[str](), threading.Event(), EndpointEngine.end

    def rule(question: str, before: int) -> Answer:
        arrived["questions"] += 1
        if arrived["questions"] == 3:
            return 400, {}, b"no"
        assert ended.wait(120.0)
        return chat(f"re: {question}")

    def end_and_tell(engine: EndpointEngine, error: StageError) -> None:
        end(engine, error)
        ended.set()

    monkeypatch.setattr(EndpointEngine, "end", end_and_tell)
    server = serve(rule)
    prepared(bucket, [f"How many are {n} apples?" for n in range(12)])
    endpoint = Endpoint(url=server.url, model="big", max_concurrency=3)
    work = generate_work(tiny_model, "distill", endpoint=endpoint, max_rejected=0.02)
    told = context(storage, work, tmp_path)
    with pytest.raises(UserError, match="1 of 12 rows rejected"):
        generate.main(told)
    assert server.asked.total() == 3
    assert (told.facts["distill"].rows.done, told.facts["distill"].rows.rejected) == (2, 1)


def test_a_proxy_that_asks_for_a_login_rejects_no_row(serve):
    with pytest.raises(UserError, match="a proxy in front of"):
        ask(serve(lambda question, before: (407, {}, b"who are you")).url, ["a"])


@pytest.mark.parametrize("status", [408, 409, 425, 429])
def test_a_row_that_is_put_off_is_waited_for_while_others_are_answered_and_is_not_rejected(serve, status):
    def busy(question: str, before: int) -> Answer:
        time.sleep(0.02)
        return (status, {}, b"later") if question == "unlucky" and before < 12 else chat("ok")

    server = serve(busy)
    replies = ask(server.url, ["unlucky", *[f"q{n}" for n in range(60)]], concurrency=2)
    assert all(isinstance(reply, Completion) for reply in replies.values())
    assert server.asked["unlucky"] == 13


def test_a_server_that_only_puts_off_ends_the_program_for_a_retry(serve):
    server = serve(lambda question, before: (429, {}, b"later") if question != "Hi" else chat("H"))
    with pytest.raises(TransientError, match="puts a request off again and again: HTTP 429") as caught:
        ask(server.url, ["q"])
    assert "maxConcurrency" in caught.value.hint


@pytest.mark.parametrize("status", [520, 522, 524, 530])
def test_a_gateway_that_does_not_reach_the_server_is_asked_again(serve, status):
    server = serve(lambda question, before: chat("ok") if before == 2 else (status, {}, b"no origin"))
    assert isinstance(ask(server.url, ["q"])["q"], Completion)


@pytest.mark.parametrize("status", [403, 404])
def test_a_prompt_that_is_moderated_rejects_its_row_alone_even_as_the_only_one(serve, status):
    server = serve(lambda question, before: (status, {}, b"flagged") if question == "bad" else chat("ok"))
    replies = ask(server.url, ["a", "bad", "b"])
    assert replies["bad"] == Refused("bad", "endpoint", f"HTTP {status}: flagged")
    assert isinstance(replies["b"], Completion)
    assert isinstance(ask(server.url, ["bad"])["bad"], Refused)


def test_a_key_that_is_withdrawn_rejects_no_row(serve):
    withdrawn = threading.Event()

    def rule(question: str, before: int) -> Answer:
        if withdrawn.is_set():
            return 403, {}, b"revoked"
        withdrawn.set()
        return chat("ok")

    with pytest.raises(UserError, match="does not accept the key: HTTP 403"):
        ask(serve(rule).url, [f"q{n}" for n in range(9)], concurrency=1)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        *[(word, "stop") for word in ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "STOP", "COMPLETE")],
        *[(word, "length") for word in ("length", "max_tokens", "MAX_TOKENS", "model_length")],
        ("content_filter", "content_filter"),
        ("tool_calls", "tool_calls"),
    ],
)
def test_the_ends_of_a_text_have_one_name_whatever_the_server_calls_them(serve, said, kept):
    (reply,) = ask(serve(lambda question, before: chat("4", said)).url, ["q"]).values()
    assert isinstance(reply, Completion)
    assert reply.finish_reason == kept


@pytest.mark.parametrize("said", ["insufficient_system_resource", "error", "abort"])
def test_a_text_that_the_server_has_broken_off_is_asked_for_again(serve, said):
    server = serve(lambda question, before: chat("4") if before else chat("2 and", said))
    assert ask(server.url, ["q"])["q"] == Completion("q", "4", "stop", 3, 2)


@pytest.mark.parametrize(
    ("message", "text", "thinking"),
    [
        ({"content": "4", "reasoning_content": "\nOkay, let me see.\n"}, "4", "Okay, let me see."),
        ({"content": "4", "reasoning": "\n\n"}, "4", ""),
        ({"content": "4", "reasoning": "\n\n", "reasoning_content": "2 and 2"}, "4", "2 and 2"),
        ({"content": "4", "reasoning": "<think>\na</think>b\n</think>"}, "4", "a\nb"),
        ({"content": "4", "reasoning": "[THINK]a[/THINK]"}, "4", "a"),
        ({"content": "<think>a</think>4", "reasoning": " "}, "4", "a"),
        ({"content": [{"type": "thinking", "thinking": "\na\n"}, {"type": "text", "text": "4"}]}, "4", "a"),
        ({"content": [{"type": "redacted_thinking", "data": "xyz"}, {"type": "text", "text": "4"}]}, "4", ""),
    ],
)
def test_a_thought_is_clean_wherever_the_server_puts_it(serve, message, text, thinking):
    answer = 200, {}, {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert ask(serve(lambda question, before: answer).url, ["q"])["q"] == Completion("q", text, "stop", 0, 0, thinking)


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "refusal": "I cannot help."},
        {"content": [{"type": "refusal", "refusal": "I cannot help."}]},
    ],
)
def test_a_model_that_declines_is_rejected_in_its_own_words(serve, message):
    answer = 200, {}, {"choices": [{"message": message, "finish_reason": "stop"}]}
    (reply,) = ask(serve(lambda question, before: answer).url, ["q"]).values()
    assert isinstance(reply, Completion)
    assert fault(reply, Repetition()) == ("endpoint", "the reply ended with 'refusal': ...'I cannot help.'")


@pytest.mark.parametrize("usage", [None, {}, {"completion_tokens": None, "prompt_tokens": None}])
def test_a_server_that_counts_nothing_is_believed(serve, usage):
    answer = chat("4")
    answer[2]["usage"] = usage
    assert ask(serve(lambda question, before: answer).url, ["q"])["q"] == Completion("q", "4", "stop", 0, 0)


@pytest.mark.parametrize("end", ["<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end_of_text|>", "</s>"])
def test_the_end_of_a_turn_is_dropped_where_the_server_is_asked_to_show_it(serve, end):
    server = serve(lambda question, before: chat(f"Conclusion: wrong{end}"))
    shown = Endpoint(url=server.url, model="big", extra_body={"skip_special_tokens": False})
    for endpoint, text in (
        (shown, "Conclusion: wrong"),
        (Endpoint(url=server.url, model="big"), f"Conclusion: wrong{end}"),
    ):
        engine = EndpointEngine(endpoint, QUICK)
        request = Request("q", prompts.answer_messages("q"), Sampling(max_tokens=9))
        (reply,) = drive(engine, each([request]), threading.Event())
        engine.close()
        assert isinstance(reply, Completion)
        assert reply.text == text


def test_an_answer_that_is_no_completion_is_not_believed(serve):
    server = serve(lambda question, before: chat("ok") if before else (200, {}, {"choices": []}))
    assert isinstance(ask(server.url, ["q"])["q"], Completion)


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_ends_the_program_for_good(serve, status):
    server = serve(lambda question, before: (status, {}, b"who are you"))
    with pytest.raises(UserError) as caught:
        ask(server.url, ["a", "b"])
    assert "apiKeySecretRef" in caught.value.hint
    assert "secret" not in caught.value.message


def test_a_server_that_is_away_ends_the_program_for_a_retry():
    with pytest.raises(TransientError, match="does not answer"):
        ask("http://127.0.0.1:9/v1", ["a"])


def test_a_server_that_dies_rejects_nothing_of_what_was_under_way(serve):
    """Answers from before it died do not prove that the server answers others."""
    slow, died = threading.Event(), threading.Event()

    def rule(question: str, before: int) -> Answer:
        if question == "slow":
            slow.set()
            died.wait(PATIENCE)
        elif slow.wait(PATIENCE) and not died.is_set():
            threading.Timer(0.1, died.set).start()
            return chat("ok")
        return 502, {}, b"gone"

    with pytest.raises(TransientError, match="does not answer"):
        ask(serve(rule).url, ["slow", "q0"], concurrency=2)


def test_what_was_answered_beside_a_failure_is_handed_out_first(serve):
    server = serve(lambda question, before: (401, {}, b"no") if question == "bad" else chat("ok"))
    engine = EndpointEngine(Endpoint(url=server.url, model="big"), QUICK)
    for text in ("a", "b"):
        engine.submit(Request(text, prompts.answer_messages(text), Sampling(max_tokens=9)))
    seen: list[str] = []
    while engine._replies.qsize() < 2:
        time.sleep(0.01)
    engine.submit(Request("bad", prompts.answer_messages("bad"), Sampling(max_tokens=9)))
    while len(seen) < 2:
        seen += [reply.name for reply in engine.step()]
    with pytest.raises(UserError):
        list(drive(engine, each([]), threading.Event()))
    engine.close()
    assert sorted(seen) == ["a", "b"]


def test_the_probe_says_what_is_served(serve):
    server = serve(lambda path, before: (200, {}, {"data": [{"id": "big"}]}))
    assert "serves big" in probe(Endpoint(url=server.url, model="big"))
    with pytest.raises(UserError, match="does not serve small, but big"):
        probe(Endpoint(url=server.url, model="small"))


def test_the_probe_asks_for_a_token_where_models_are_not_listed(serve):
    server = serve(lambda asked, before: (404, {}, b"") if asked == "/v1/models" else chat("H", "length"))
    assert "answers as big" in probe(Endpoint(url=server.url, model="big"))
    assert server.asked["Hi"] == 1


def test_the_probe_tells_a_wrong_key_from_a_server_that_is_away(serve):
    server = serve(lambda path, before: (401, {}, b"no"))
    with pytest.raises(UserError, match="does not accept the key"):
        probe(Endpoint(url=server.url, model="big"))
    with pytest.raises(TransientError, match="does not answer"):
        probe(Endpoint(url="http://127.0.0.1:9/v1", model="big"))
