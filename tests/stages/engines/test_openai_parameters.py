"""What a request to an endpoint holds, what servers refuse of it, and that a run learns of it before it has used a GPU.

The server of these tests refuses parameters as newer hosted models do: HTTP 400 with the parameter's name, or with a
sentence alone.
"""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from support.stage_builders import bucket_of, context, prepare_work

from cgd_stages.contract import Chat, Endpoint, Sampling
from cgd_stages.engines.base import Refused, Request
from cgd_stages.engines.openai import EndpointEngine
from cgd_stages.engines.openai_server import Patience
from cgd_stages.engines.openai_texts import request_body
from cgd_stages.engines.openai_trial import (
    Tried,
    refuse_hidden_thoughts,
    refuse_other_mode,
    refuse_unseen_thoughts,
    try_request,
)
from cgd_stages.errors import TransientError, UserError
from cgd_stages.method import prompts
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.prepare.tryout import check_endpoint

Json = dict[str, Any]
Rule = Callable[[Json], tuple[int, Json]]
QUICK = Patience(timeout=60.0, tries=2, first_pause=0.01, longest_pause=0.01)
MESSAGES = prompts.answer_messages("q")


class Picky(ThreadingHTTPServer):
    """Lists the model `big`, and answers completions by a rule."""

    daemon_threads = True

    def __init__(self, rule: Rule) -> None:
        self.bodies: list[Json] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": "big"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                self._send(*rule(body))

            def _send(self, status: int, answer: Json) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
                """Silence."""

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(url=f"http://127.0.0.1:{self.server_port}/v1", model="big")


@pytest.fixture
def serve() -> Iterator[Callable[[Rule], Picky]]:
    servers: list[Picky] = []

    def start(rule: Rule) -> Picky:
        servers.append(Picky(rule))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def says(text: str | list[Json], usage: Json | None = None, **message: Any) -> tuple[int, Json]:
    return 200, {"choices": [{"message": {"content": text} | message, "finish_reason": "stop"}], "usage": usage or {}}


def refuses(message: str, param: str | None = None) -> tuple[int, Json]:
    return 400, {"error": {"message": message, "type": "invalid_request_error", "param": param}}


def body_of(sampling: Sampling, chat: Chat | None = None, **endpoint: Any) -> Json:
    found = request_body(Endpoint(url="u", model="big", **endpoint), chat or Chat(), Request("r", MESSAGES, sampling))
    assert (found.pop("model"), found.pop("messages")) == ("big", MESSAGES)
    return found


# --- what a request holds


@pytest.mark.parametrize(
    ("sampling", "body"),
    [
        (Sampling(max_tokens=9), {"max_tokens": 9, "temperature": 0.0}),
        (Sampling(max_tokens=9, top_p=0.5, top_k=3, min_p=0.1), {"max_tokens": 9, "temperature": 0.0}),
        (Sampling(max_tokens=9, temperature=0.5, seed=7), {"max_tokens": 9, "temperature": 0.5, "seed": 7}),
        (
            Sampling(max_tokens=9, temperature=1, top_p=0.9, top_k=3, min_p=0.1, seed=7),
            {"max_tokens": 9, "temperature": 1.0, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 7},
        ),
    ],
)
def test_a_parameter_that_changes_nothing_is_not_sent(sampling: Sampling, body: Json) -> None:
    assert body_of(sampling) == body


def test_the_name_of_the_limit_and_more_fields_are_the_manifests() -> None:
    found = body_of(Sampling(max_tokens=9), token_field="max_completion_tokens", extra_body={"reasoning_effort": "low"})
    assert found == {"max_completion_tokens": 9, "temperature": 0.0, "reasoning_effort": "low"}
    assert body_of(Sampling(max_tokens=9, temperature=1), extra_body={"top_p": 1})["top_p"] == 1


def test_what_is_omitted_is_left_to_the_server_which_then_samples() -> None:
    assert body_of(Sampling(max_tokens=9, top_p=0.9), omit=("temperature",)) == {
        "max_tokens": 9, "top_p": 0.9, "seed": 0,
    }  # fmt: skip
    assert body_of(Sampling(max_tokens=9), omit=("temperature", "seed")) == {"max_tokens": 9}


@pytest.mark.parametrize(
    ("chat", "told"),
    [
        (Chat(), {}),
        (Chat(thinking="on"), {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}}),
        (Chat(thinking="off"), {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}),
        (Chat(template_kwargs={"effort": "low"}), {"chat_template_kwargs": {"effort": "low"}}),
        (
            Chat(thinking="on", template_kwargs={"thinking": "deep"}, thinking_budget=50),
            {"chat_template_kwargs": {"enable_thinking": True, "thinking": "deep"}, "thinking_token_budget": 50},
        ),
    ],
)
def test_the_mode_is_told_in_the_words_of_vllms_server(chat: Chat, told: Json) -> None:
    assert body_of(Sampling(max_tokens=9), chat) == {"max_tokens": 9, "temperature": 0.0} | told


# --- what a reply holds


@pytest.mark.parametrize(
    ("content", "message", "text", "thought"),
    [
        ("4", {"reasoning": "2 and 2"}, "4", "2 and 2"),
        ("4", {"reasoning_content": "2 and 2"}, "4", "2 and 2"),
        ([{"type": "text", "text": "The answer "}, {"type": "text", "text": "is 4."}], {}, "The answer is 4.", ""),
        ([{"type": "thinking", "thinking": "2 and 2"}, {"type": "text", "text": "4"}], {}, "4", "2 and 2"),
        (
            [{"type": "thinking", "thinking": [{"type": "text", "text": "2 and 2"}]}, {"type": "text", "text": "4"}],
            {},
            "4",
            "2 and 2",
        ),
        (
            [{"type": "reasoning", "summary": [{"text": "2 and 2"}]}, {"type": "output_text", "text": "4"}],
            {},
            "4",
            "2 and 2",
        ),
        (None, {"reasoning": "2 and"}, "", "2 and"),
        ("4", {"reasoning": None, "reasoning_content": ""}, "4", ""),
    ],
)
def test_text_and_thought_are_taken_apart_as_the_server_has_them(serve, content, message, text, thought):
    server = serve(lambda body: says(content, **message))
    reply = try_request(server.endpoint, Chat(), Request("r", MESSAGES, Sampling()), "spec.x").completion
    assert (reply.text, reply.thinking) == (text, thought)


# --- what servers refuse


def rename(body: Json) -> tuple[int, Json]:
    if "max_tokens" in body:
        return refuses("Unsupported parameter: use max_completion_tokens.", "max_tokens")
    return says("4")


def no_temperature(body: Json) -> tuple[int, Json]:
    if body.get("temperature", 1) != 1:
        return refuses("Unsupported value: only the default (1) is supported.", "temperature")
    return says("4")


def not_both(body: Json) -> tuple[int, Json]:
    if "temperature" in body and "top_p" in body:
        return refuses("temperature and top_p cannot both be specified.")
    return says("4")


def unknown(body: Json) -> tuple[int, Json]:
    extra = body.keys() - {"model", "messages", "max_tokens", "temperature", "top_p", "seed"}
    return refuses(f"Unrecognized request argument supplied: {', '.join(sorted(extra))}") if extra else says("4")


def no_seed(body: Json) -> tuple[int, Json]:
    return refuses("seed is not supported", "seed") if "seed" in body else says("4")


WARM = Sampling(temperature=0.6, top_p=0.95)


@pytest.mark.parametrize(
    ("rule", "sampling", "chat", "named", "mend", "change"),
    [
        (rename, Sampling(), Chat(), "max_tokens", "tokenField to max_completion_tokens",
         {"token_field": "max_completion_tokens"}),
        (no_temperature, Sampling(), Chat(), "temperature", "Add temperature to spec.teacher.endpoint.omit",
         {"omit": ("temperature",)}),
        (not_both, WARM, Chat(), "temperature, top_p", "Remove topP from spec.generation.refine",
         {"omit": ("temperature",)}),
        (no_seed, WARM, Chat(), "seed", "Add seed to spec.teacher.endpoint.omit", {"omit": ("seed",)}),
        (unknown, Sampling(temperature=1, top_k=5), Chat(), "top_k", "Remove topK from spec.generation.refine", None),
        (unknown, Sampling(temperature=1, min_p=0.1), Chat(), "min_p", "Remove minP from spec.generation.refine", None),
        (unknown, Sampling(), Chat(thinking="on"), "chat_template_kwargs", "Remove thinking and templateKwargs", None),
        (unknown, Sampling(), Chat(thinking_budget=5), "thinking_token_budget", "thinkingBudget", None),
    ],
)  # fmt: skip
def test_a_refusal_names_the_parameter_and_the_field_to_change(serve, rule, sampling, chat, named, mend, change):
    server, request = serve(rule), Request("r", MESSAGES, sampling)
    with pytest.raises(UserError, match=f"its {named}: HTTP 400") as raised:
        try_request(server.endpoint, chat, request, "spec.generation.refine", QUICK)
    assert mend in raised.value.hint
    assert len(server.bodies) == 1, "a refusal is not asked for again"
    if change:
        changed = server.endpoint.model_copy(update=change)
        assert try_request(changed, chat, request, "spec.generation.refine", QUICK).completion.text == "4"


def test_a_field_of_the_users_own_is_named_with_its_place(serve):
    endpoint = serve(unknown).endpoint.model_copy(update={"extra_body": {"reasoning_effort": "maximal"}})
    with pytest.raises(UserError, match="its reasoning_effort") as raised:
        try_request(endpoint, Chat(), Request("r", MESSAGES, Sampling()), "spec.generation.refine", QUICK)
    assert "Correct reasoning_effort in spec.teacher.endpoint.extraBody" in raised.value.hint


def test_a_refusal_that_names_nothing_is_shown_as_it_is(serve):
    with pytest.raises(UserError, match=r"with the sampling of w: HTTP 422.*no") as raised:
        try_request(
            serve(lambda body: (422, {"detail": "no"})).endpoint, Chat(), Request("r", MESSAGES, WARM), "w", QUICK
        )
    assert "spec.teacher.endpoint" in raised.value.hint


def test_a_server_that_fails_is_asked_again_and_is_no_fault_of_the_users(serve):
    server = serve(lambda body: (503, {"error": "later"}))
    with pytest.raises(TransientError, match="does not answer: HTTP 503"):
        try_request(server.endpoint, Chat(), Request("r", MESSAGES, WARM), "w", QUICK)
    assert len(server.bodies) == QUICK.tries


def test_a_server_that_refuses_a_single_token_is_there_all_the_same(serve):
    """A live server keeps a row's failure the row's own."""
    server = serve(lambda body: refuses("max_tokens must be at least 16") if body["max_tokens"] == 1 else (500, {}))
    engine = EndpointEngine(server.endpoint, QUICK)
    reply = engine._answer(Request("r", MESSAGES, Sampling()))
    assert isinstance(reply, Refused)


# --- whether it thinks


@pytest.mark.parametrize(
    ("reply", "thinks"),
    [
        (says("4"), False),
        (says("4", reasoning="2 and 2"), True),
        (says("4", reasoning=" \n"), False),
        (says("<think>2 and 2</think>4"), True),
        (says("2 and 2</think>4"), True),
        (says("<think>\n\n</think>\n\n4"), False),
        (says("4", {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 7}}), True),
        (says("4", {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 0}}), False),
        (says("4", {"completion_tokens": 9, "completion_tokens_details": ["odd"]}), False),
        (says([{"type": "redacted_thinking", "data": "xyz"}, {"type": "text", "text": "4"}]), True),
    ],
)
def test_a_mode_that_the_server_does_not_keep_is_refused(serve, reply, thinks):
    tried = try_request(serve(lambda body: reply).endpoint, Chat(), Request("r", MESSAGES, WARM), "w", QUICK)
    assert tried.thinks == thinks
    right, wrong = (
        (Chat(thinking="on"), Chat(thinking="off")) if thinks else (Chat(thinking="off"), Chat(thinking="on"))
    )
    refuse_other_mode(right, [tried])
    refuse_other_mode(Chat(), [tried])
    with pytest.raises(UserError, match=f"spec.teacher.chat.thinking is {wrong.thinking}") as raised:
        refuse_other_mode(wrong, [tried])
    assert "extraBody" in raised.value.hint


def test_thoughts_that_the_server_counts_and_hides_cannot_be_learned(serve, caplog):
    def tried(reply: tuple[int, Json]) -> Tried:
        return try_request(serve(lambda body: reply).endpoint, Chat(), Request("r", MESSAGES, WARM), "w", QUICK)

    counted = tried(says("4", {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 7}}))
    shown, none = tried(says("<think>2 and 2</think>4")), tried(says("4"))
    with pytest.raises(UserError, match="does not give the text of its thoughts") as raised:
        refuse_unseen_thoughts([none, counted])
    assert "spec.training.thinking to drop" in raised.value.hint
    refuse_unseen_thoughts([counted, shown])
    assert caplog.text == ""
    refuse_unseen_thoughts([none])
    assert "learn an empty thought" in caplog.text


def test_a_reply_may_take_as_long_as_the_endpoint_says():
    slow = Endpoint(url="u", model="m", timeout_seconds=7200)
    assert Patience().seconds(slow) == 7200
    assert Patience(timeout=5).seconds(slow) == 5
    assert Endpoint(url="u", model="m").timeout_seconds == 1800


def test_a_model_may_answer_a_simple_question_without_a_thought(serve):
    """Of several replies one thought is enough to see that the mode is on."""
    completion = try_request(
        serve(lambda body: says("4")).endpoint, Chat(), Request("r", MESSAGES, WARM), "w"
    ).completion
    refuse_other_mode(Chat(thinking="on"), [Tried(completion, False), Tried(completion, True)])
    with pytest.raises(UserError):
        refuse_other_mode(Chat(thinking="off"), [Tried(completion, False), Tried(completion, True)])


HARMONY = "<|channel|>analysis<|message|>We add.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"


def gpt_oss(body: Json) -> tuple[int, Json]:
    """Leaves thoughts in the text, as vLLM's server does without a reasoning parser."""
    return says(HARMONY if body.get("skip_special_tokens") is False else "analysisWe add.assistantfinal4")


def hidden_thoughts(endpoint: Endpoint) -> None:
    refuse_hidden_thoughts(endpoint, Chat(), Request("r", MESSAGES, WARM), QUICK)


def test_a_thought_whose_markers_the_server_takes_out_of_the_text_is_refused(serve):
    server = serve(gpt_oss)
    with pytest.raises(UserError, match="without its markers") as raised:
        hidden_thoughts(server.endpoint)
    assert "reasoning parser" in raised.value.hint
    shown = server.endpoint.model_copy(update={"extra_body": {"skip_special_tokens": False}})
    hidden_thoughts(shown)
    reply = try_request(shown, Chat(), Request("r", MESSAGES, WARM), "w", QUICK).completion
    assert (reply.text, reply.thinking) == ("4", "We add.")


def test_a_blank_thought_is_none_and_hides_nothing(serve):
    hidden_thoughts(serve(lambda body: says("4", reasoning="\n\n")).endpoint)


def test_a_thinking_mode_is_kept_beside_the_users_own_variables_of_the_template():
    chat, own = Chat(thinking="on"), {"chat_template_kwargs": {"thinking": False, "effort": "low"}}
    body = body_of(Sampling(), chat, extra_body=own)
    assert body["chat_template_kwargs"] == {"enable_thinking": True, "thinking": False, "effort": "low"}
    assert body_of(Sampling(), extra_body=own)["chat_template_kwargs"] == own["chat_template_kwargs"]


def test_words_alone_and_servers_that_show_no_special_tokens_are_believed(serve):
    """Nothing is guessed from words."""
    for rule in (lambda body: says("analysisWe add.assistantfinal4"), unknown, lambda body: (500, {})):
        hidden_thoughts(serve(rule).endpoint)


# --- prepare


def test_prepare_asks_one_request_of_each_kind_and_refuses_before_it_reads_a_prompt(
    serve, storage, tiny_model, tmp_path
):
    server = serve(lambda body: says("<think>hm</think>4"))
    bucket_of(storage).put("in/p.jsonl", b'{"question": "1 + 1?", "answer": "2"}\n')

    def run(**changes: Any) -> None:
        of = {
            "answer": Sampling(),
            "critique": Sampling(max_tokens=7),
            "refine": WARM,
            "distill": Sampling(max_tokens=9),
        }
        asked = {"roles": tuple(of), "sampling": tuple(of.values())}
        work = prepare_work(
            tiny_model, bucket_of(storage).uri("in/p.jsonl"), endpoint=server.endpoint, **asked, **changes
        )
        prepare.main(context(storage, work, tmp_path))

    run(teacher_chat=Chat(thinking="on"))
    assert [body.get("max_tokens") for body in server.bodies] == [7, 16384, 9]
    assert [message["role"] for message in server.bodies[0]["messages"]] == ["system", "user"]
    assert all(body["chat_template_kwargs"]["enable_thinking"] for body in server.bodies)
    with pytest.raises(UserError, match="thinking is off, but a reply has a thought"):
        run(teacher_chat=Chat(thinking="off"))


def ends(text: str, finish: str, **message: Any) -> Rule:
    answer = {"choices": [{"message": {"content": text} | message, "finish_reason": finish}], "usage": {}}
    return lambda body: (200, answer)


@pytest.mark.parametrize(
    ("rule", "reason", "mend"),
    [
        (ends("", "stop"), "empty", "no text"),
        (ends("4", "content_filter"), "endpoint: the reply ended with 'content_filter'", "spec.teacher.endpoint"),
        (ends("4", "tool_calls"), "endpoint: the reply ended with 'tool_calls'", "spec.teacher.endpoint"),
        (ends("", "length", reasoning="1 and 1"), "truncated", "Raise spec.generation.critique.maxTokens"),
        (ends("<think>1 and 1", "eos"), "unfinished_thought", "thinking to off"),
        (ends("no " * 3000, "stop"), "repetition", "temperature"),
    ],
)
def test_a_server_whose_replies_would_all_be_rejected_is_refused_by_the_reason(serve, tiny_model, rule, reason, mend):
    server = serve(rule)

    def tried(max_rejected: float) -> None:
        asked = {"roles": ("critique",), "sampling": (Sampling(max_tokens=7),), "max_rejected": max_rejected}
        check_endpoint(
            prepare_work(tiny_model, "s3://data/p.jsonl", endpoint=server.endpoint, **asked), server.endpoint
        )

    with pytest.raises(
        UserError, match=f"requests of critique, but the run would reject its replies as {reason}"
    ) as no:
        tried(0.02)
    assert mend in no.value.hint
    assert len(server.bodies) == 2, "once more, as a model may fail by chance"
    tried(0.5)


def test_a_server_that_fails_once_and_counts_no_tokens_is_only_warned_of(serve, tiny_model, caplog):
    server = serve(lambda body: ends("4", "eos")(body) if len(server.bodies) > 1 else ends("", "eos")(body))
    asked = {"roles": ("critique",), "sampling": (Sampling(max_tokens=7),)}
    check_endpoint(prepare_work(tiny_model, "s3://data/p.jsonl", endpoint=server.endpoint, **asked), server.endpoint)
    assert "would be rejected as empty" in caplog.text
    assert "counts no tokens" in caplog.text


def test_a_credit_that_is_used_up_is_said_in_these_words_before_the_run(serve):
    server = serve(lambda body: (402, {"error": {"message": "Insufficient Balance"}}))
    with pytest.raises(UserError, match="the credit at the endpoint"):
        try_request(server.endpoint, Chat(), Request("r", MESSAGES, WARM), "w", QUICK)
