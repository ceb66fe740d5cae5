"""The study's teacher: a checker behind the door of an OpenAI-compatible server.

It works every line of the student's answer again. A critique names the first wrong step and why it is wrong; it never
holds the result of that step, nor of a later one, so the student has to work it out. The checker is better than the
student, and it is not perfect: in OVERLOOKED of the problems it overlooks every mistake, and in as many its own
solution has a slip. Which ones is a function of the question, so that it says the same twice.
"""

import hashlib
import json
import random
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cgd_stages.method import prompts
from replicate.arithmetic import (
    ENDINGS,
    Problem,
    Sum,
    Unreadable,
    exact,
    read_question,
    read_sums,
    stated,
    without_carry,
)

MODEL, MOVED = "tutor", "tutor-moved"
OVERLOOKED = 0.1
UNKNOWN = "This is not a question of the study."
"""What it says to any other question: `prepare` asks one, to see whether the server answers."""
FAULTLESS = "Every step is right, and the last line is as the question asks for it."

_SLOT = re.compile(r"^(Question|Student's Initial Answer|Critique): ", re.MULTILINE)
_NAMES = {"Question": "question", "Student's Initial Answer": "answer", "Critique": "critique"}


def reply(messages: Sequence[Mapping[str, Any]], *, moved: bool = False) -> str:
    """What the tutor says, by the task in the last line; a question alone is answered. `moved`: a refinement and an
    answer are another question's. Raises Unreadable."""
    text = messages[-1]["content"]
    body, _, task = text.rpartition("\n\n")
    match task:
        case prompts.CRITIQUE:
            slots = _slots(body)
            return critique(read_question(slots["question"]), slots["answer"])
        case prompts.REFINE:
            slots = _slots(body)
            problem = read_question(slots["question"])
            return answer(_other(problem)) if moved else refinement(problem, slots["answer"], slots["critique"])
        case _:
            problem = read_question(text)
            return answer(_other(problem) if moved else problem)


def _other(problem: Problem) -> Problem:
    """The problem that begins with one more."""
    return replace(problem, start=problem.start + 1)


def _slots(body: str) -> dict[str, str]:
    _, *parts = _SLOT.split(body)
    return {_NAMES[name]: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def critique(problem: Problem, draft: str) -> str:
    """The first wrong step of a draft, and what else is wrong with it; then the verdict, which is on the last line's
    form and number alone."""
    found = [] if _overlooks(problem, "critique") else list(faults(problem, draft))
    if not found:
        return f"{FAULTLESS}\nConclusion: right"
    is_right = stated(draft) == (problem.ending, problem.result)
    return "\n".join([*found, f"Conclusion: {'right' if is_right else 'wrong'}"])


def faults(problem: Problem, draft: str) -> Iterator[str]:
    sums, wanted = read_sums(draft), tuple(problem.work(exact))
    good = right_lines(problem, sums)
    if not sums:
        yield f"No step is shown. Begin with {_asked(wanted[0])}, and write a line for each step."
    elif good < len(wanted) and good < len(sums):
        yield _wrong_step(good + 1, sums[good], wanted[good])
    elif good < len(wanted):
        yield f"Step {good + 1} is missing: {_asked(wanted[good])}."
    elif len(sums) > len(wanted):
        yield f"Step {len(wanted) + 1} is too much: the question asks for {len(wanted)}."
    form, number = stated(draft)
    if form != problem.ending:
        yield f'The last line must have the form "{ENDINGS[problem.ending].format(n="N")}".'
    elif sums and number != sums[-1].result:
        yield "The last line does not state the result of the last step."


def _asked(one: Sum) -> str:
    """A step without its result."""
    return f"{one.a} {one.sign} {one.b}"


def _wrong_step(number: int, written: Sum, wanted: Sum) -> str:
    if _asked(written) != _asked(wanted):
        return f'"{written.text()}" is not step {number}, which is {_asked(wanted)}.'
    kind = "carry" if written.sign == "+" else "borrow"
    reason = f" The {kind} is forgotten." if written.result == without_carry(written.a, written.b, written.sign) else ""
    return (
        f"Step {number} is wrong: {_asked(written)} is not {written.result}.{reason} Work it again, and what follows."
    )


def right_lines(problem: Problem, sums: tuple[Sum, ...]) -> int:
    """How many of the first lines are right."""
    good = 0
    for written, wanted in zip(sums, problem.work(exact), strict=False):
        if written != wanted:
            break
        good += 1
    return good


def refinement(problem: Problem, draft: str, said: str) -> str:
    """The student's own right lines, in the student's own writing, and the rest worked again. A draft in which the
    critique finds nothing stays as it is."""
    if said.startswith(FAULTLESS):
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
    """The tutor as a server on this machine; its base URL. Its model MOVED writes every refinement and every solution
    of its own for another question. Raises OSError when the port is taken."""
    server = ThreadingHTTPServer(("127.0.0.1", port), _Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    """python -m replicate.tutor PORT: serve until the process ends."""
    with served(int(sys.argv[1])):
        threading.Event().wait()


class _Door(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": MODEL}, {"id": MOVED}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        messages = asked["messages"]
        try:
            text = reply(messages, moved=asked["model"] == MOVED)
        except Unreadable:
            text = UNKNOWN
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


if __name__ == "__main__":
    main()
