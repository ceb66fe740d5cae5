"""Builders for the tests of the stage programs: tasks, contexts, and an engine that answers by rule."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cgd_stages.chat.thoughts import split_text
from cgd_stages.contract import Engine as EngineSettings
from cgd_stages.contract import (
    Fields,
    Generate,
    LastWords,
    Model,
    Prepare,
    Progress,
    ProgressAnswer,
    Prompts,
    Role,
    RunRef,
    Sampling,
    StageFacts,
    StageTask,
    Storage,
    Train,
    Work,
)
from cgd_stages.engines.base import Completion, Engine, Reply, Request
from cgd_stages.errors import StageError
from cgd_stages.generate import __main__ as generate
from cgd_stages.prepare.sources import row_id
from cgd_stages.runtime.program import Context
from cgd_stages.runtime.progress import Reporter
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS, REJECTED, Folder, read_rows
from cgd_stages.store.rows import Row, digest_of, from_parquet, now, row_schema
from cgd_stages.store.run import RunStore
from support.forked import Forked

RUN = RunRef(namespace="team", name="run", uid="uid-1")
GREEDY = Sampling(max_tokens=48)


@lru_cache(maxsize=4)
def bucket_of(storage: Storage) -> Bucket:
    """Clients take a while to build; a test needs one."""
    return Bucket(storage)


def task(storage: Storage, work: Work, run: RunRef = RUN) -> StageTask:
    return StageTask(run=run, stage=work.kind, storage=storage, work=work)


def context(
    storage: Storage, work: Work, scratch: Path, *, shard: int = 0, inputs: Path | None = None, run: RunRef = RUN
) -> Context:
    """What `program.run` would hand to `main`."""
    return Context(
        task=task(storage, work, run),
        store=RunStore(bucket_of(storage), run),
        progress=Reporter(shard),
        scratch=scratch,
        inputs=inputs,
        shard=shard,
    )


def prepare_work(model: Path | str, source: str, **changes: Any) -> Prepare:
    taken = {
        name: changes.pop(name) for name in ("limit", "seed", "decontaminate", "near_duplicates") if name in changes
    }
    prompts = Prompts(source=source, fields=Fields(prompt="question", reference="answer"), **taken)
    engine = changes.pop("engine", EngineSettings())
    student = Model(name=str(model))
    training = Train(
        student=student, global_batch_size=4, learning_rate=1e-3, max_sequence_length=64, checkpoint_every_steps=3,
        max_rejected=0.02,
    )  # fmt: skip
    given: dict[str, Any] = {"prompts": prompts, "student": student, "student_engine": engine, "training": training}
    return Prepare(**(given | {"max_rejected": 0.02} | changes))


def generate_work(model: Path | str, *roles: Role, **changes: Any) -> Generate:
    given: dict[str, Any] = {
        "roles": roles,
        "sampling": tuple(GREEDY for _ in roles),
        "model": Model(name=str(model)),
        "engine": EngineSettings(dtype="float32"),
        "max_rejected": 0.02,
    }
    return Generate(**(given | changes))


def prepared(bucket: Bucket, texts: Sequence[str], run: RunRef = RUN, part_rows: int = 10_000) -> Folder:
    """A finished prepare stage with these prompts, which must differ."""
    rows: list[Row] = [
        {"id": row_id(text), "sample": 0, "prompt": text, "reference": None, "prompt_tokens": 5} for text in texts
    ]
    folder = Folder(bucket, run.namespace, "prepare", digest_of(texts=list(texts)))
    schema = row_schema("prepare")
    parts = [folder.put_rows(PARTS, rows[at : at + part_rows], schema) for at in range(0, len(rows), part_rows)]
    facts = StageFacts.model_validate({"rows": {"total": len(rows), "done": len(rows)}})
    RunStore(bucket, run).point_at(folder.finish(facts=facts, parts=parts, started=now(), inputs={}))
    return folder


class RuleEngine:
    """An engine without a model: `rule` makes the reply of a request. It finishes `batch` requests a step, the
    newest first, so that no order can be relied on, and it remembers what it was asked."""

    def __init__(self, rule: Callable[[Request], Reply] | None = None, *, batch: int = 3, room: int = 8) -> None:
        self.asked: list[Request] = []
        self.settings: dict[str, Any] = {"engine": "rule"}
        self.before_step: Callable[[], None] = lambda: None
        self._rule = rule or echo
        self._batch, self._most = batch, room
        self._waiting: list[Request] = []
        self._failure: StageError | None = None

    @property
    def room(self) -> int:
        return 0 if self._failure else self._most - len(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or self._failure is not None

    def submit(self, request: Request) -> None:
        self.asked.append(request)
        self._waiting.append(request)

    def step(self) -> list[Reply]:
        self.before_step()
        if self._failure:
            raise self._failure
        done = [self._waiting.pop() for _ in range(min(self._batch, len(self._waiting)))]
        return [self._rule(request) for request in done]

    def end(self, error: StageError) -> None:
        self._failure = self._failure or error

    def metrics(self) -> dict[str, float]:
        return {"generated_tokens": 0.0}

    def close(self) -> None:
        self._waiting.clear()


def each(requests: Iterable[Request]) -> Callable[[], Request | None]:
    """Requests that are all known before, for `drive`."""
    waiting = iter(requests)
    return lambda: next(waiting, None)


def said(request: Request, text: str, finish_reason: str = "stop") -> Completion:
    """The reply of a model that writes a thought between <think> and </think>."""
    parts = split_text(text)
    return Completion(
        request.name,
        parts.text,
        finish_reason,
        prompt_tokens=10,
        tokens=len(text.split()),
        thinking=parts.thinking,
        unfinished_thinking=parts.unfinished_thinking,
    )


def echo(request: Request) -> Completion:
    """A reply that tells what was asked, so that a test can see who saw what."""
    return said(request, f"re: {request.messages[-1]['content']}")


def stop_after(engine: RuleEngine, steps: int, stop: threading.Event) -> None:
    """Let SIGTERM come before the engine's step of this number."""
    count = iter(range(steps))

    def before() -> None:
        if next(count, None) is None:
            stop.set()

    engine.before_step = before


@dataclass(frozen=True)
class Ended:
    """How a program ended: exit code, last words, and its log."""

    code: int
    words: LastWords
    log: str


class Program:
    """A stage program as a process of its own, as a pod runs it."""

    def __init__(
        self, module: str, task: StageTask, folder: Path, *, package: str = "cgd_stages", shard: int = 0, **env: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._words = folder / "last-words.json"
        self._log = folder / "log"
        self._words.unlink(missing_ok=True)
        self.progress = ProgressServer()
        given = {
            "CGD_TASK": task.to_json(),
            "CGD_TERMINATION_LOG": str(self._words),
            "CGD_SCRATCH": str(folder / "scratch"),
            "JOB_COMPLETION_INDEX": str(shard),
            "KUBEFLOW_TRAINER_SERVER_URL": self.progress.url,
            "HF_HUB_OFFLINE": "1",
        }
        self._process = self._start(f"{package}.{module}", {**os.environ, **given, **env})

    def _start(self, module: str, environment: dict[str, str]) -> "subprocess.Popen[bytes] | Forked":
        with self._log.open("wb") as log:
            return subprocess.Popen([sys.executable, "-m", module], env=environment, stdout=log, stderr=log)

    def send_once(self, true: Callable[[], object], number: signal.Signals) -> None:
        """Send a signal as soon as something is true of what is stored. Progress reports come every two seconds: in
        that time a fast machine ends a test's work."""
        while self._process.poll() is None:
            if true():
                self._process.send_signal(number)
                return
            time.sleep(0.02)
        raise AssertionError(f"it ended before the signal:\n{self._log.read_text()}")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> Ended:
        code = self._process.wait()
        self.progress.close()
        words = self._words.read_text() if self._words.exists() else '{"outcome": "failed"}'
        return Ended(code, LastWords.model_validate_json(words), self._log.read_text())


class VllmProgram(Program):
    """A stage program that runs vLLM, as a process of its own that need not import vLLM again, which takes ten seconds
    of a core. The tests of chaos have SIGTERM during the imports of `python -m`."""

    def _start(self, module: str, environment: dict[str, str]) -> "Forked":
        return Forked(module, environment, self._log)


class ProgressServer:
    """The operator's end of the progress channel; it wants the next report after `pause` seconds."""

    def __init__(self, pause: float = 0) -> None:
        answer = ProgressAnswer(next_report_seconds=pause).to_json().encode()
        self.reports: queue.Queue[Progress] = queue.Queue()
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.headers.append(dict(self.headers))
                outer.reports.put(Progress.model_validate_json(body))
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
                """Silence."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/progress"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def wait(self, seconds: float) -> Progress | None:
        try:
            return self.reports.get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def generate_with(engine: Engine, given: Context) -> dict[str, StageFacts]:
    """The generate program on an engine of the test's."""
    work = given.work_of(Generate)
    return generate.generate(given, work, lambda: engine)


def stored_rows(bucket: Bucket, stage: str, run: RunRef = RUN) -> list[Row]:
    """Every row of a finished stage, in the order of keys."""
    return sorted(read_rows(RunStore(bucket, run).input(stage)), key=lambda row: (row["id"], row["sample"]))


def stored_rejections(bucket: Bucket, stage: str, run: RunRef = RUN) -> list[Row]:
    folder = RunStore(bucket, run).input(stage)
    return [row for part in folder.require().under(REJECTED) for row in from_parquet(folder.read(part))]
