"""A small chat server of real HTTP, whose answers a test makes."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cgd_stages.contract import Endpoint, Sampling
from cgd_stages.engines.base import Reply, Request, drive
from cgd_stages.engines.openai import EndpointEngine
from cgd_stages.engines.openai_server import Patience
from cgd_stages.method import prompts
from support.stage_builders import each

QUICK = Patience(timeout=60.0, tries=3, first_pause=0.01, longest_pause=0.05)
Answer = tuple[int, dict[str, str], Any]


def chat(text: str, finish: str = "stop") -> Answer:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


class Server:
    """Answers by a rule that sees the question and how often it was asked before."""

    def __init__(self, rule: Callable[[str, int], Answer]) -> None:
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    question = body["messages"][-1]["content"]
                    before, outer.asked[question] = outer.asked[question], outer.asked[question] + 1
                    outer.bodies.append(body)
                    outer.keys.add(self.headers.get("Authorization"))
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                status, headers, answer = rule(question, before)
                with outer._lock:
                    outer.at_once -= 1
                self._send(status, headers, answer)

            def do_GET(self) -> None:
                status, headers, answer = rule(self.path, 0)
                self._send(status, headers, answer)

            def _send(self, status: int, headers: dict[str, str], answer: Any) -> None:
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
                """Silence."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def ask(url: str, questions: list[str], *, concurrency: int = 4, patience: Patience = QUICK) -> dict[str, Reply]:
    engine = EndpointEngine(Endpoint(url=url, model="big", max_concurrency=concurrency), patience)
    sampling = Sampling(max_tokens=9, seed=7)
    requests = [Request(text, prompts.answer_messages(text), sampling) for text in questions]
    try:
        return {reply.name: reply for reply in drive(engine, each(requests), threading.Event())}
    finally:
        engine.close()
