"""The study's teacher: a checker behind the door of an OpenAI-compatible server.

It works every line of the student's answer again, so it is better than the student, and it is not perfect: in
OVERLOOKED of the problems it overlooks every mistake, and in as many its own solution has a slip. Which ones is a
function of the question, so that it says the same twice.
"""

import hashlib
import json
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cgd_stages.method import prompts
from replicate.arithmetic import Problem, Sum, Unreadable, exact, read_question, read_sums, stated, without_carry

MODEL = "tutor"
OVERLOOKED = 0.1

_SLOT = re.compile(r"^(Question|Student's Initial Answer|Critique): ", re.MULTILINE)
_NAMES = {"Question": "question", "Student's Initial Answer": "answer", "Critique": "critique"}


def reply(messages: list[dict[str, str]]) -> str:
    """What the tutor says, by the task in the last line; a question alone is answered. Raises Unreadable."""
    text = messages[-1]["content"]
    body, _, task = text.rpartition("\n\n")
    match task:
        case prompts.CRITIQUE:
            slots = _slots(body)
            return critique(read_question(slots["question"]), slots["answer"])
        case prompts.REFINE:
            slots = _slots(body)
            return refinement(read_question(slots["question"]), slots["answer"], slots["critique"])
        case _:
            return answer(read_question(text))


def _slots(body: str) -> dict[str, str]:
    _, *parts = _SLOT.split(body)
    return {_NAMES[name]: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def critique(problem: Problem, draft: str) -> str:
    """The first thing that is wrong with a draft, why, and what is needed; then the verdict."""
    found = [] if _overlooks(problem, "critique") else list(faults(problem, draft))
    if not found:
        return "Every line is right, and the last line is as the question asks for it.\nConclusion: right"
    return "\n".join([*found, "Conclusion: wrong"])


def faults(problem: Problem, draft: str) -> Iterator[str]:
    sums, wanted = read_sums(draft), tuple(problem.work(exact))
    good = right_lines(problem, sums)
    if not sums:
        yield f"The work is missing. Begin with {wanted[0].text()}, and go on step by step."
    elif good < len(wanted) and good < len(sums):
        yield f"Line {good + 1} is wrong. {_wrong_line(sums[good], wanted[good])} What follows must be worked again."
    elif good < len(wanted):
        yield f"A step is missing after line {good}: {wanted[good].text()}."
    elif len(sums) > len(wanted):
        yield f"Line {len(wanted) + 1} is too much: the question asks for {len(wanted)} steps."
    form, number = stated(draft)
    if form != problem.ending:
        yield f'The last line must be "{problem.last_line(problem.result)}".'
    elif sums and number != sums[-1].result:
        yield "The last line does not say the result of the last step."


def _wrong_line(written: Sum, wanted: Sum) -> str:
    if (written.a, written.sign, written.b) != (wanted.a, wanted.sign, wanted.b):
        return f"The step is {wanted.text()}."
    kind = "carry" if written.sign == "+" else "borrow"
    reason = f" You forgot the {kind}." if written.result == without_carry(written.a, written.b, written.sign) else ""
    return f"{written.a} {written.sign} {written.b} is {wanted.result}, not {written.result}.{reason}"


def right_lines(problem: Problem, sums: tuple[Sum, ...]) -> int:
    """How many of the first lines are right."""
    good = 0
    for written, wanted in zip(sums, problem.work(exact), strict=False):
        if written != wanted:
            break
        good += 1
    return good


def refinement(problem: Problem, draft: str, said: str) -> str:
    """The student's own right lines, in the student's own writing, and the rest worked again. A draft that the
    critique finds right stays as it is."""
    if prompts.verdict(said) == "right":
        return draft
    sums = read_sums(draft)
    kept = sums[: right_lines(problem, sums)]
    return problem.solution((*kept, *problem.work(exact, before=kept)), words=" plus " in draft or " minus " in draft)


def answer(problem: Problem) -> str:
    """The tutor's own solution, in its own writing."""
    slips = _overlooks(problem, "answer")
    sums = tuple(problem.work(without_carry if slips else exact))
    told = [f"{'Then' if at else 'First'}, {one.text()}." for at, one in enumerate(sums)]
    return "\n".join([*told, problem.last_line(sums[-1].result)])


def _overlooks(problem: Problem, role: str) -> bool:
    seed = hashlib.sha256(f"{role} {problem.question}".encode()).digest()
    return random.Random(seed).random() < OVERLOOKED


@contextmanager
def served(port: int = 0) -> Iterator[str]:
    """The tutor as a server on this machine; its base URL. Raises OSError when the port is taken."""
    server = ThreadingHTTPServer(("127.0.0.1", port), _Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


class _Door(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": MODEL}]})

    def do_POST(self) -> None:
        messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        try:
            text = reply(messages)
        except Unreadable as error:
            self._send(400, {"error": {"message": f"not a question of this study: {error}"}})
            return
        words = [sum(len(message["content"].split()) for message in messages), len(text.split())]
        usage = {"prompt_tokens": words[0], "completion_tokens": words[1]}
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self._send(200, {"choices": [choice], "usage": usage})

    def _send(self, code: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Silence: 3,000 requests are no news."""
