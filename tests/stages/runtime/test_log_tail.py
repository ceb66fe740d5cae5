"""The end of a program's log in the store: what it has, and that it never decides anything."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.stage_builders import RUN, generate_work, task

from cgd_stages.contract import Clean, Exit, LastWords, Storage
from cgd_stages.runtime import log_tail, program
from cgd_stages.runtime.log_tail import LogTail
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.run import RunStore
from cgd_stages.text.printable import LogFormatter

log = logging.getLogger("cgd.test")


@pytest.fixture
def tail() -> Iterator[LogTail]:
    """Listens to this test's log alone."""
    made = LogTail()
    made.setFormatter(LogFormatter("%(message)s"))
    log.addHandler(made)
    log.setLevel(logging.INFO)
    yield made
    log.removeHandler(made)


def test_the_last_lines_are_kept_and_the_first_go(tail: LogTail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_tail, "KEPT", 30)
    for number in range(100):
        log.info("line %d", number)
    assert tail.text == b"line 97\nline 98\nline 99\n"
    log.info("x" * 100)
    assert tail.text == b"x" * 29 + b"\n"


def test_a_log_is_stored_beside_those_of_other_tries_and_read_oldest_first(bucket: Bucket, tail: LogTail) -> None:
    store = RunStore(bucket, RUN)
    log.info("once")
    tail.store(store, "train-cgd")
    log.info("again")
    tail.store(store, "train-cgd")
    tail.store(store, "check")
    assert sorted(text.partition(b"\n")[2] for _, text in store.logs("train-cgd")) == [b"once\n", b"once\nagain\n"]
    assert [name.partition("/")[0] for name, _ in store.logs()].count("check") == 1
    assert [name.rpartition("/")[2] for name, _ in store.logs()] == sorted(
        name.rpartition("/")[2] for name, _ in store.logs()
    )
    assert RunStore(bucket, RUN.model_copy(update={"uid": "uid-2"})).logs() == []
    assert store.stages() == set(), "a log is no stage"
    assert store.delete_logs() == 3
    assert list(bucket.list()) == []


def test_a_store_that_is_away_costs_one_try_and_a_line(
    tail: LogTail, storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away = Bucket(storage.model_copy(update={"endpoint": "http://127.0.0.1:1"}))
    tail.store(RunStore(away, RUN), "check")
    assert [record.message.partition(":")[0] for record in caplog.records] == ["the end of this log is not stored"]
    away.outage.since = 0.0
    caplog.clear()
    monkeypatch.setattr(RunStore, "keep_log", lambda *_: pytest.fail("it was known to be away"))
    tail.store(RunStore(away, RUN), "check")
    assert not caplog.records


class Left(Exception):
    """The program's end."""


@pytest.fixture
def ran(storage: Storage, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a program in this process; the result is its exit code and the run's store."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("CGD_TERMINATION_LOG", str(tmp_path / "words.json"))
    monkeypatch.setenv("CGD_SCRATCH", str(tmp_path / "scratch"))

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(program.os, "_exit", leave)

    def run(main: program.Main, work=None) -> tuple[int, RunStore]:
        root.handlers[:] = []  # as in a process that has just begun
        monkeypatch.setenv("CGD_TASK", task(storage, work or generate_work("/m", "answer")).to_json())
        with pytest.raises(Left) as left:
            program.run(main)
        return left.value.args[0], RunStore(bucket, RUN)

    yield run
    logging.captureWarnings(capture=False)
    root.handlers[:], root.level = before, level


def test_a_program_that_fails_leaves_its_traceback_without_keys(ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGD_TEACHER_API_KEY", "sk-0123456789abcdef")

    def fail(context: program.Context) -> dict:
        raise RuntimeError("the server said sk-0123456789abcdef")

    code, store = ran(fail)
    [(name, text)] = store.logs()
    assert code == Exit.RETRY
    assert name.startswith(f"{task(store.bucket.storage, generate_work('/m', 'answer')).stage}/")
    assert b"Traceback" in text
    assert b"the server said <CGD_TEACHER_API_KEY>" in text
    assert b"0123456789abcdef" not in text


def test_a_program_that_is_done_leaves_its_log_and_one_that_was_interrupted_none(ran) -> None:
    def done(context: program.Context) -> dict:
        logging.getLogger("cgd").warning("seen")
        return {}

    def interrupted(context: program.Context) -> dict:
        raise program.Interrupted("SIGTERM")

    assert ran(interrupted)[0] == Exit.INTERRUPTED
    code, store = ran(done)
    [(_, text)] = store.logs()
    assert (code, b"seen" in text) == (Exit.DONE, True)


def test_a_program_that_deletes_the_runs_data_leaves_none(ran) -> None:
    code, store = ran(lambda context: {}, Clean())
    assert (code, store.logs()) == (Exit.DONE, [])


def test_a_log_that_cannot_be_stored_changes_no_exit_code_and_no_word(
    ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise program.UserError("access denied")

    monkeypatch.setattr(RunStore, "keep_log", away)
    code, _ = ran(lambda context: {})
    assert code == Exit.DONE
    assert LastWords.model_validate(json.loads((tmp_path / "words.json").read_text())).outcome == "done"
