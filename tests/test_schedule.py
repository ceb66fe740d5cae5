"""How files are given to workers: fast ones to workers that have run nothing slow, and all end together."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from support.schedule import FileSchedule, has_slow_tests

SLOW, FAST = ("s1", "s2", "s3"), ("f1", "f2", "f3")


class Worker:
    """What the schedule asks of a worker."""

    def __init__(self) -> None:
        self.gateway = SimpleNamespace(id="gw")
        self.shutting_down = False
        self.given: list[int] = []

    def send_runtest_some(self, tests: list[int]) -> None:
        self.given += tests

    def shutdown(self) -> None:
        self.shutting_down = True


Start = Callable[..., tuple[FileSchedule, list[Worker]]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """A schedule for workers that have all collected these files, of two tests each."""
    monkeypatch.setattr("xdist.scheduler.loadscope.parse_tx_spec_config", lambda config: range(config.workers))

    def begin(workers: int, files: tuple[str, ...]) -> tuple[FileSchedule, list[Worker]]:
        config = SimpleNamespace(workers=workers, option=SimpleNamespace(loadscopereorder=False))
        schedule = FileSchedule(config, None, lambda file: file in SLOW)
        made = [Worker() for _ in range(workers)]
        for worker in made:
            schedule.add_node(worker)  # type: ignore[arg-type]
            schedule.add_node_collection(worker, [f"{file}::{test}" for file in files for test in "ab"])  # type: ignore[arg-type]
        schedule.schedule()
        return schedule, made

    return begin


def play(schedule: FileSchedule, workers: list[Worker]) -> list[list[str]]:
    """The files of each worker, when all run their tests at the same speed."""
    files: list[list[str]] = [[] for _ in workers]
    for turn in range(100):
        for worker, had in zip(workers, files, strict=True):
            if turn < len(worker.given):
                had.append(schedule.collection[worker.given[turn]].partition("::")[0])  # type: ignore[index]
                schedule.mark_test_complete(worker, worker.given[turn])  # type: ignore[arg-type]
    assert schedule.tests_finished
    assert all(worker.shutting_down for worker in workers)
    return [sorted(set(had), key=had.index) for had in files]


def test_workers_begin_with_slow_and_with_fast_files_and_end_with_slow_ones(start: Start) -> None:
    assert play(*start(2, (*FAST, *SLOW))) == [["s1", "s2", "s3"], ["f1", "f2", "f3"]]
    assert play(*start(3, (*SLOW, "f1"))) == [["s1", "s3"], ["f1"], ["s2"]]


def test_a_worker_that_has_run_a_slow_file_gets_no_fast_one(start: Start) -> None:
    assert play(*start(2, ("s1", *FAST))) == [["s1"], ["f1", "f2", "f3"]]
    assert play(*start(1, ("s1", *FAST))) == [["f1", "f2", "f3", "s1"]]


def test_fast_files_alone_are_shared_by_all(start: Start) -> None:
    assert play(*start(3, FAST)) == [["f1"], ["f2"], ["f3"]]


def test_a_file_is_slow_when_it_marks_a_test_so(tmp_path: Any) -> None:
    (tmp_path / "a.py").write_text("@pytest.mark." + "slow\ndef test(): ...")
    (tmp_path / "b.py").write_text("def test(): ...")
    is_slow = has_slow_tests(tmp_path)
    assert (is_slow("a.py"), is_slow("b.py")) == (True, False)
