"""What a teacher's endpoint can do with the key that it is sent, and with the program that waits for its answer."""

import gzip
import html
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from support.patience import PATIENCE
from support.stage_builders import each, generate_work, task

from cgd_stages.contract import PROGRESS_TOKEN, TEACHER_API_KEY, Endpoint, Exit, LastWords, Rows, Sampling, Storage
from cgd_stages.engines import openai_server
from cgd_stages.engines.base import Completion, Refused, Reply, Request, drive
from cgd_stages.engines.openai import EndpointEngine
from cgd_stages.engines.openai_server import Patience
from cgd_stages.engines.openai_trial import probe
from cgd_stages.errors import TransientError, UserError
from cgd_stages.keys import SHORTEST, hide_in_log, without_keys
from cgd_stages.method import prompts
from cgd_stages.runtime.progress import Reporter

KEY = "sk-of/the+teacher=="
QUICK = Patience(timeout=60.0, tries=2, first_pause=0.01, longest_pause=0.01)


class Server(ThreadingHTTPServer):
    """Answers every request by a rule that writes what it likes; remembers what it was sent."""

    daemon_threads = True

    def __init__(self, rule: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.keys.append(self.headers["Authorization"])
                rule(self)

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
                """Silence."""

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A client that does not wait for the end is what is tried."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[BaseHTTPRequestHandler], None]], Server]]:
    monkeypatch.setenv(TEACHER_API_KEY, KEY)
    servers: list[Server] = []

    def start(rule: Callable[[BaseHTTPRequestHandler], None]) -> Server:
        servers.append(Server(rule))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answering(status: int, body: bytes, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def ask(url: str, patience: Patience = QUICK) -> Reply:
    engine = EndpointEngine(Endpoint(url=url, model="big"), patience)
    try:
        request = Request("q", prompts.answer_messages("q"), Sampling(max_tokens=9))
        (reply,) = drive(engine, each([request]), threading.Event())
        return reply
    finally:
        engine.close()


# --- where the key goes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("call", [ask, lambda url: probe(Endpoint(url=url, model="big"))], ids=["question", "probe"])
def test_a_redirect_is_not_followed_and_the_error_says_which_url_to_set(serve, status, call):
    other = serve(answering(200, b"{}"))

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        answering(status, b"", Location=f"{other.url}{handler.path.removeprefix('/v1')}")(handler)

    server = serve(redirect)
    with pytest.raises(UserError, match=f"redirects to {other.url}/") as refused:
        call(server.url)
    assert f"Set spec.teacher.endpoint.url to {other.url} if" in refused.value.hint
    assert (set(server.keys), other.keys) == ({f"Bearer {KEY}"}, [])


def test_the_token_of_progress_does_not_follow_a_redirect(serve, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("token-of-the-pod")
    monkeypatch.setenv(PROGRESS_TOKEN, str(tmp_path / "token"))
    other = serve(answering(200, b"{}"))
    server = serve(answering(302, b"", Location=other.url))
    reporter = Reporter(0, server.url)
    reporter.report("answer", Rows(total=1, done=1))
    reporter.close()
    assert (set(server.keys), other.keys) == ({"Bearer token-of-the-pod"}, [])


# --- what the server says ---------------------------------------------------------------------------------------

ECHO = f"no such key: Bearer {KEY}"
SPELLED = {
    "plain": KEY,
    "json": json.dumps(KEY),
    "json with its slashes escaped": "sk-of\\/the+teacher==",
    "json in json": "sk-of\\\\\\/the+teacher==",
    "json by number": "sk-of\\u002Fthe\\u002bteacher\\u003D=",
    "url": "sk-of%2Fthe%2Bteacher%3D%3D",
    "url in small letters": "sk-of%2fthe%2bteacher%3d%3d",
    "url with its slashes": "sk-of/the%2Bteacher%3D%3D",
    "url in a url": "sk-of%252Fthe%252Bteacher%253D%253D",
    "html": "sk-of&#x2F;the&#43;teacher&#61;=",
}
FORMS = {name: f"no such key: Bearer {key}" for name, key in SPELLED.items()} | {"at the cut": f"{'x' * 275}{ECHO}"}


@pytest.mark.parametrize("said", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("status", "error"), [(401, UserError), (403, UserError), (404, UserError), (503, TransientError)]
)
def test_an_error_that_echoes_the_key_does_not_show_it(serve, said, status, error):
    server = serve(answering(status, said.encode()))
    with pytest.raises(error) as told:
        ask(server.url)
    assert told.value.message == str(told.value)
    assert "sk-of" not in told.value.message + told.value.hint


@pytest.mark.parametrize(
    "key", ["a\"b\\\\c'd<e>", "(a|b)*[c]$.^{2}+?", "\\\\d+\\\\d+", "\xfcber-key", "\U0001f511-key-ring", "&%\\\\/u002f"]
)
def test_a_key_of_odd_characters_is_known_as_such_and_as_libraries_spell_it(key, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", key)
    spelled = [key, json.dumps(key)[1:-1], json.dumps(key, ensure_ascii=False)[1:-1], quote(key), quote(key, safe="")]
    for said in [*spelled, html.escape(key), repr(key)[1:-1], json.dumps(json.dumps(key))[3:-3]]:
        assert without_keys(f"x {said} y") == "x <HF_TOKEN> y", said
    assert without_keys("no key: d+ 12 aaaaaaaa") == "no key: d+ 12 aaaaaaaa"


@pytest.mark.parametrize("key", [8 * "\\\\" + "x", 8 * "%", "/abc/def+", 20 * "a" + "b", 8 * "&"])
@pytest.mark.parametrize("piece", ["\\\\", "%25", "&#000", "a", "/abc/def"])
def test_a_text_that_almost_holds_a_key_many_times_is_searched_to_its_end(key, piece, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", key)
    assert without_keys(piece * 50_000 + "\n" + key).endswith("\n<HF_TOKEN>")


LONG = "ey" + "ab0" * 600
"""As long as tokens that say who somebody is."""


@pytest.mark.parametrize("before", [0, 150, 299])
def test_the_beginning_of_a_key_at_the_end_of_an_excerpt_is_not_shown(serve, monkeypatch, before):
    monkeypatch.setenv(TEACHER_API_KEY, LONG)
    server = serve(answering(401, f"{'x' * before}{LONG} {LONG}".encode()))
    with pytest.raises(UserError) as told:
        ask(server.url)
    assert LONG[:10] not in told.value.message


def test_a_redirect_to_a_url_with_the_key_does_not_show_the_key_s_beginning(serve, monkeypatch):
    monkeypatch.setenv(TEACHER_API_KEY, LONG)
    with pytest.raises(UserError, match="redirects to") as told:
        ask(serve(answering(302, b"", Location=f"/login?token={LONG}")).url)
    assert LONG[:10] not in told.value.message + told.value.hint


def test_a_row_that_is_refused_with_an_echo_of_the_key_does_not_store_it(serve):
    reply = ask(serve(answering(400, ECHO.encode())).url)
    assert reply == Refused("q", "endpoint", f"HTTP 400: no such key: Bearer <{TEACHER_API_KEY}>")


def test_an_answer_that_echoes_the_key_does_not_store_it(serve):
    message = {"content": f"you sent {KEY}", "reasoning": KEY}
    reply = ask(serve(answering(200, json.dumps({"choices": [{"message": message}]}).encode())).url)
    assert isinstance(reply, Completion)
    assert (reply.text, reply.thinking) == (f"you sent <{TEACHER_API_KEY}>", f"<{TEACHER_API_KEY}>")


def test_an_answer_keeps_what_is_a_key_of_others(serve, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "minioadmin")
    body = json.dumps({"choices": [{"message": {"content": "log in as minioadmin"}}]}).encode()
    reply = ask(serve(answering(200, body)).url)
    assert isinstance(reply, Completion)
    assert reply.text == "log in as minioadmin"
    assert "is stored in its place" not in caplog.text


def test_an_answer_that_is_changed_is_told_of(serve, monkeypatch, caplog):
    monkeypatch.setenv(TEACHER_API_KEY, "not-needed")
    body = json.dumps({"choices": [{"message": {"content": "a key is not-needed"}}]}).encode()
    assert isinstance(ask(serve(answering(200, body)).url), Completion)
    assert f"an answer holds the endpoint's key; <{TEACHER_API_KEY}> is stored in its place" in caplog.text


def test_a_key_with_a_line_feed_at_its_end_is_the_key(serve, monkeypatch):
    monkeypatch.setenv(TEACHER_API_KEY, f"{KEY}\n")
    server = serve(answering(200, json.dumps({"choices": [{"message": {"content": "4"}}]}).encode()))
    assert isinstance(ask(server.url), Completion)
    assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("key", ["two\nlines-of-key", "dots-of-a-copy-\u2026"])
def test_a_key_that_no_header_can_hold_is_refused_with_its_secret_named(serve, monkeypatch, key):
    monkeypatch.setenv(TEACHER_API_KEY, key)
    server = serve(answering(200, b"{}"))
    with pytest.raises(UserError, match="an HTTP header cannot hold") as told:
        ask(server.url)
    assert "apiKeySecretRef" in told.value.hint
    assert server.keys == []


PROGRAM = """
from cgd_stages.runtime.supervisor import supervise
supervise()
import logging, os
from cgd_stages.errors import UserError
from cgd_stages.runtime.program import run

def main(context):
    secret = os.environ[{name!r}]
    logging.getLogger("any").warning("with %s in it", secret)
    try:
        raise ValueError(secret)
    except ValueError as error:
        raise {error}(1900 * "x" + secret + 200 * "y") from error

run(main)
"""


@pytest.mark.parametrize("error", ["UserError", "RuntimeError"])
@pytest.mark.parametrize("name", [TEACHER_API_KEY, "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"])
def test_no_key_of_the_pod_is_in_its_last_words_or_its_log(tmp_path: Path, name: str, error: str) -> None:
    words = tmp_path / "words.json"
    storage = Storage(uri="s3://data/x", endpoint="http://127.0.0.1:1")
    given = {"CGD_TASK": task(storage, generate_work("/m", "answer")).to_json(), "CGD_SCRATCH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(name=name, error=error)],
        env={**os.environ, **given, "CGD_TERMINATION_LOG": str(words), name: KEY},
        capture_output=True,
        text=True,
    )
    said = LastWords.model_validate_json(words.read_text())
    assert (done.returncode, said.error) == (Exit.PERMANENT if error == "UserError" else Exit.RETRY, error), done.stderr
    assert f"with <{name}> in it" in done.stderr
    assert KEY not in done.stderr + done.stdout + words.read_text()
    assert f"<{name}>" in said.message


def test_the_log_of_a_process_hides_keys_whatever_its_format_is(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", KEY)
    root = logging.getLogger()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("own style: %(message)s"))
    monkeypatch.setattr(root, "handlers", [handler])
    hide_in_log()
    root.warning("a %s", KEY)
    assert capsys.readouterr().err == "own style: a <HF_TOKEN>\n"


def test_words_that_stand_in_for_a_key_stay_words(monkeypatch):
    monkeypatch.setenv(TEACHER_API_KEY, "EMPTY")
    assert len("EMPTY") < SHORTEST
    assert without_keys("EMPTY is the answer") == "EMPTY is the answer"


# --- how much, and for how long -------------------------------------------------------------------------------


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65536)


def test_an_answer_without_an_end_is_read_up_to_a_bound(serve, monkeypatch):
    monkeypatch.setattr(openai_server, "MOST_BYTES", 1 << 20)
    with pytest.raises(TransientError, match="the answer has more than 1048576 bytes"):
        ask(serve(endless).url)


@pytest.mark.parametrize(("concurrency", "most"), [(64, 8 << 20), (256, 2 << 20), (4096, 1 << 20)])
def test_the_more_answers_are_under_way_the_smaller_each_must_be(serve, concurrency, most):
    endpoint = Endpoint(url=serve(endless).url, model="big", max_concurrency=concurrency)
    with pytest.raises(TransientError, match=f"the answer has more than {most} bytes"):
        probe(endpoint)


def packed(handler: BaseHTTPRequestHandler) -> None:
    body = gzip.compress(b" " * (1 << 20) + json.dumps({"data": [{"id": "big"}]}).encode())
    answering(200, body, **{"Content-Encoding": "gzip", "Content-Type": "application/json"})(handler)


def test_an_answer_is_not_unpacked(serve):
    with pytest.raises(TransientError, match="UnicodeDecodeError"):
        probe(Endpoint(url=serve(packed).url, model="big"))


def dripping(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.01)


def test_an_answer_that_comes_in_drips_has_the_time_of_one_answer(serve):
    with pytest.raises(TransientError, match="the answer comes too slowly"):
        ask(serve(dripping).url, Patience(timeout=0.2, tries=1))


def dripping_head(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nA: ")
    for _ in range(500):
        handler.wfile.write(b"x")
        time.sleep(0.01)


def continuing(handler: BaseHTTPRequestHandler) -> None:
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")


@pytest.mark.parametrize("rule", [dripping_head, continuing])
def test_the_head_of_an_answer_has_no_time_of_its_own(serve, rule):
    with pytest.raises(TransientError, match="the answer comes too slowly"):
        ask(serve(rule).url, Patience(timeout=0.2, tries=1))


BROKEN = {
    "a piece too short": b"Transfer-Encoding: chunked\r\n\r\nff\r\nabc",
    "no length of a piece": b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc",
    "a length below zero": b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc",
    "fewer bytes than told": b"Content-Length: 9\r\n\r\nabc",
    "no number of seconds": b"Retry-After: \xb2\r\n\r\n",
    "a time zone far away": b"Retry-After: Mon, 01 Jan 2024 00:00:00 +99999999999999\r\n\r\n",
    "no URL": b"Location: http://[::1\r\n\r\n",
}


@pytest.mark.parametrize("call", [ask, lambda url: probe(Endpoint(url=url, model="big"))], ids=["question", "probe"])
@pytest.mark.parametrize("rest", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(401, UserError, "accept the key: HTTP 401"), (503, TransientError, "not answer: HTTP 503")],
)
def test_a_refusal_is_its_status_however_broken_the_rest_is(serve, status, error, words, rest, call):
    def rule(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(f"HTTP/1.1 {status} No\r\n".encode() + rest)

    with pytest.raises(error, match=words):
        call(serve(rule).url)


def test_a_redirect_to_what_is_no_url_is_one(serve):
    with pytest.raises(UserError, match="redirects to http://\\[::1, which"):
        ask(serve(answering(302, b"", Location="http://[::1")).url)


def test_an_answer_that_breaks_off_is_no_answer(serve):
    body = json.dumps({"choices": [{"message": {"content": "whole?"}}]}).encode()
    rule = answering(200, body, **{"Content-Length": str(len(body) + 1)})
    with pytest.raises(TransientError, match="received 49 bytes, expected 50"):
        ask(serve(rule).url)


def test_a_server_that_keeps_the_connection_open_is_not_waited_for(serve):
    body = json.dumps({"choices": [{"message": {"content": "4"}}]}).encode()
    held = threading.Event()

    def rule(handler: BaseHTTPRequestHandler) -> None:
        answering(200, body)(handler)
        handler.wfile.flush()
        held.wait(PATIENCE)

    reply = ask(serve(rule).url, Patience(timeout=60.0, tries=1))
    held.set()
    assert isinstance(reply, Completion)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"choices": [{"message": {"content": [4]}}]}', b"\xff"])
def test_an_answer_that_is_no_completion_fails_its_own_request_alone(serve, body):
    def rule(handler: BaseHTTPRequestHandler) -> None:
        good = json.dumps({"choices": [{"message": {"content": "4"}}]}).encode()
        answering(200, body if len(server.keys) == 1 else good)(handler)

    server = serve(rule)
    assert isinstance(ask(server.url), Completion)
    assert len(server.keys) == 2


def test_http_is_spoken_in_one_place_and_tracebacks_go_through_the_log():
    sources = {path.name: path.read_text() for path in (Path(__file__).parents[2] / "images").rglob("*.py")}
    speakers = re.compile(r"urlopen|build_opener|HTTPS?Connection\(|httpx2?\.(Async)?Client|OpenAI\(")
    speaking = {name for name, text in sources.items() if speakers.search(text)}
    assert speaking == {"web.py"}
    assert [name for name, text in sources.items() if "traceback.print" in text] == []
