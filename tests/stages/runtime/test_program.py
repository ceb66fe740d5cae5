"""The frame of the programs: exit codes, last words, SIGTERM, a full disk, and progress that never hurts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.patience import PATIENCE
from support.stage_builders import ProgressServer, generate_work, task

from cgd_stages.contract import LAST_WORDS_LIMIT, Exit, LastWords, Rows, StageFacts, Storage
from cgd_stages.errors import Interrupted, TransientError, UserError
from cgd_stages.runtime.program import shortened
from cgd_stages.runtime.progress import INTERVAL, Reporter

BODY = """
from cgd_stages.runtime.supervisor import supervise
supervise()
{first}
import errno, sys, time
from cgd_stages.contract import StageFacts, Rows
from cgd_stages.errors import *
from cgd_stages.runtime.program import run

def main(context):
    context.facts["answer"] = StageFacts(rows=Rows(total=3, done=2))
{body}
    return context.facts

run(main)
"""
STORAGE = Storage(uri="s3://data/x", endpoint="http://127.0.0.1:1")


class Started:
    """A program with this body, in a process of its own."""

    def __init__(self, folder: Path, body: str, first: str = "", **env: str) -> None:
        self._words = folder / "words.json"
        given = {"CGD_TASK": task(STORAGE, generate_work("/m", "answer")).to_json(), "CGD_SCRATCH": str(folder)}
        text = BODY.format(first=first, body="\n".join(f"    {line}" for line in body.splitlines()))
        self.process = subprocess.Popen(
            [sys.executable, "-c", text],
            env={**os.environ, "CGD_TERMINATION_LOG": str(self._words), **given, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def interrupt(self, line: str) -> None:
        """Send SIGTERM once it has printed this line."""
        assert self.process.stdout
        assert self.process.stdout.readline() == f"{line}\n"
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> tuple[int, LastWords, str]:
        log, _ = self.process.communicate()
        return self.process.returncode, LastWords.model_validate_json(self._words.read_text()), log


def gone(process: Path) -> bool:
    """Whether it ends."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if not process.exists() or "State:\tZ" in (process / "status").read_text():
            return True
        time.sleep(0.05)
    return False


WRAPPED = """
try:
    raise OSError(errno.ENOSPC, "full")
except OSError as error:
    raise RuntimeError("saving failed") from error
"""


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("pass", Exit.DONE, ""),
        ("raise UserError('no such field', hint='Correct spec.x.')", Exit.PERMANENT, "UserError"),
        ("raise TransientError('away')", Exit.RETRY, "TransientError"),
        ("raise RowsLost('read 3')", Exit.RETRY, "RowsLost"),
        ("raise ZeroDivisionError('bug')", Exit.RETRY, "ZeroDivisionError"),
        ("raise OSError(errno.ENOSPC, 'No space left on device')", Exit.PERMANENT, "UserError"),
        (WRAPPED, Exit.PERMANENT, "UserError"),
    ],
)
def test_the_exit_code_and_the_last_words_say_who_must_act(tmp_path, body, code, error):
    found, words, log = Started(tmp_path, body).end()
    assert found == code, log
    assert words.error == error
    assert words.stages["answer"].rows == Rows(total=3, done=2)
    assert words.outcome == ("done" if code == 0 else "failed")
    assert ("Traceback" in log) == (error == "ZeroDivisionError")


def test_a_full_disk_names_the_scratch_volume(tmp_path):
    _, words, _ = Started(tmp_path, "raise OSError(errno.ENOSPC, 'No space left on device', '/scratch/x')").end()
    assert "the disk is full" in words.message
    assert "ephemeral-storage" in words.hint


def test_a_disk_that_is_really_full_ends_for_good(tmp_path):
    body = "with open('/dev/full', 'wb') as file:\n    file.write(b'x' * 100000)"
    code, words, _ = Started(tmp_path, body).end()
    assert (code, words.error) == (Exit.PERMANENT, "UserError")


@pytest.mark.parametrize(
    "held",
    [
        "while not context.stop.wait(0.05): pass\n    context.check()",
        "while not context.stop.wait(0.05): pass\n    raise UserError('no such field')",
        "while not context.stop.wait(0.05): pass\n    raise ValueError('a validator met a signal')",
    ],
)
def test_sigterm_where_something_is_held_ends_with_143_and_what_is_known(tmp_path, held):
    started = Started(tmp_path, f"with context.holding():\n    print('ready', flush=True)\n    {held}")
    started.interrupt("ready")
    code, words, log = started.end()
    assert (code, words.outcome, words.error) == (143, "interrupted", "Interrupted"), log
    assert words.stages["answer"].rows.done == 2


SOON = "import threading; threading.Timer(0.3, print, ['ready'], {'flush': True}).start()"
"""It says so when it is in the midst of what follows."""
SWALLOWED = """
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""
IN_C = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2 ** 31 - 1)"
VALIDATED = """
from pydantic import BaseModel, field_validator

class Config(BaseModel):
    model: str

    @field_validator("model")
    def read(cls, value):
        try:
            time.sleep(60)
        except Exception as error:
            raise ValueError(f"no such model: {error}") from error

try:
    Config(model="m")
except ValueError as error:
    raise UserError(str(error)) from error
"""
"""As vLLM reads a model's config, and as we translate what it says."""


@pytest.mark.parametrize(
    "body", ["time.sleep(60)", SWALLOWED, IN_C, VALIDATED], ids=["asleep", "swallowed", "in C", "in a validator"]
)
def test_sigterm_where_nothing_is_held_ends_with_143_at_once_whatever_runs(tmp_path, body):
    started = Started(tmp_path, f"{SOON}\n{body}")
    started.interrupt("ready")
    code, words, log = started.end()
    assert (code, words.outcome, words.error) == (143, "interrupted", "Interrupted"), log


def test_sigterm_before_the_imports_ends_with_143(tmp_path):
    started = Started(tmp_path, "pass", first="print('importing', flush=True); import time; time.sleep(60)")
    started.interrupt("importing")
    assert started.end()[0] == 143


def test_a_program_does_not_outlive_the_one_that_waits_for_it(tmp_path):
    started = Started(tmp_path, "import os; print(os.getpid(), flush=True); time.sleep(60)")
    assert started.process.stdout
    program = Path("/proc", started.process.stdout.readline().strip())
    started.process.kill()
    assert gone(program)
    started.process.communicate()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "not one that this image understands"), ('{"format": 2}', "not one that this image understands")],
)
def test_a_task_of_another_version_is_refused(tmp_path, text, message):
    code, words, _ = Started(tmp_path, "pass", CGD_TASK=text).end()
    assert code == Exit.PERMANENT
    assert message in words.message
    assert "same version" in words.hint


def test_a_storage_that_makes_no_sense_is_refused(tmp_path):
    bad = task(Storage(uri="s3://data/x", endpoint="nonsense"), generate_work("/m", "answer")).to_json()
    code, words, _ = Started(tmp_path, "pass", CGD_TASK=bad).end()
    assert code == Exit.PERMANENT
    assert "spec.storage" in words.hint


def test_last_words_fit_whatever_they_say():
    stages = {f"stage-{n}": StageFacts(metrics={f"metric_{m}": m / 7 for m in range(40)}) for n in range(9)}
    words = LastWords(outcome="failed", stages=stages, error="E", message="é" * 9000, hint="ü" * 9000)
    short = shortened(words)
    assert len(short.to_json().encode()) <= LAST_WORDS_LIMIT
    assert short.message.startswith("é")
    assert set(short.stages) == set(stages)
    assert shortened(LastWords(outcome="done")) == LastWords(outcome="done")


def test_last_words_keep_the_beginning_and_the_end_of_a_message():
    words = shortened(LastWords(outcome="failed", message=f"first {'x' * 9000} last"))
    assert words.message.startswith("first ")
    assert words.message.endswith(" last")


def test_progress_is_sent_with_the_token_of_the_moment(tmp_path, monkeypatch):
    server = ProgressServer()
    token = tmp_path / "token"
    token.write_text("one\n")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(token))
    reporter = Reporter(3, server.url)
    reporter.report("answer", Rows(total=8, done=3, rejected=1), tokens_per_second=12.5, eta=61.2, metrics={"a": 0.5})
    sent = server.wait(PATIENCE)
    reporter.close()
    server.close()
    assert sent
    assert server.headers[0]["Authorization"] == "Bearer one"
    assert (sent.stage, sent.shard, sent.rows) == ("answer", 3, Rows(total=8, done=3, rejected=1))
    status = sent.trainer_status
    assert (status.progress_percentage, status.estimated_remaining_seconds) == (50, 61)
    assert json.loads(sent.to_json())["trainerStatus"]["metrics"] == [{"name": "a", "value": "0.5"}]


def test_only_the_newest_state_of_a_stage_is_sent():
    server = ProgressServer()
    reporter = Reporter(0, server.url)
    for done in range(1000):
        reporter.report("answer", Rows(total=1000, done=done))
    reporter.close()
    received = []
    while report := server.wait(0.05):
        received.append(report.rows.done if report.rows else None)
    server.close()
    assert received[-1] == 999
    assert len(received) <= 3


def test_the_operator_says_when_it_wants_the_next_report_but_a_stage_that_begins_or_is_through_is_told_at_once():
    server = ProgressServer(pause=3600)
    reporter = Reporter(0, server.url)
    for stage, done in (("critique", 1), ("refine", 1), ("critique", 8)):
        reporter.report(stage, Rows(total=8, done=done))
        report = server.wait(PATIENCE)
        assert report
        assert (report.stage, report.rows) == (stage, Rows(total=8, done=done))
    reporter.report("refine", Rows(total=8, done=2))
    assert server.wait(INTERVAL + 1) is None
    reporter.close()
    server.close()


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9/", "nonsense"])
def test_progress_that_cannot_be_sent_hurts_nobody(url):
    reporter = Reporter(0, url)
    reporter.report("answer", Rows(total=1))
    time.sleep(0.05)
    reporter.close()


def test_errors_carry_their_exit_code():
    assert [UserError("").exit, TransientError("").exit, Interrupted("").exit] == [3, 201, 143]
