"""The suite that asks every stage program to go: SIGTERM at random instants, half of them before its first log line.

    make chaos-signals
    make chaos-signals PROGRAMS="prepare report" INSTANTS=50 SEED=1

Each program is PID 1 of a namespace of its own, as in a container, against a real S3 server; those of the second half
start vLLM or torch. It must end with exit code 143 (or 0, when it had done its work already): within two seconds when
it was asked in its first second, else within the grace period. No process may be left, and no attempt may hurt the
next: all attempts work in one place of the store until one comes to its end; then the next place is begun.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Self

from chaos.model import ModelServer
from chaos.programs import PROGRAMS, Place, Program
from rich.console import Console
from rich.table import Table
from support import tiny

from cgd_local.pods import pod_namespace
from cgd_local.s3 import SeaweedFS
from cgd_stages.contract import Exit, Storage

INSTANTS, HEAVY_INSTANTS = 200, 40
"""Of a program without vLLM and torch, and of one with."""
SIDE_BY_SIDE = 2
AT_ONCE, GRACE = 2.0, 60.0
"""Seconds to leave in: for a program in its first second, and for any other."""
NO_END = 600.0
ISOLATED = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
LISTENS = 1 << (signal.SIGTERM - 1)


@dataclass(frozen=True)
class Ended:
    """How an attempt ended. `asked` and `took` are seconds: from its start to SIGTERM, and from there to its end."""

    code: int
    asked: float
    took: float
    first_line: float | None
    """Seconds from its start to its first log line, if it came to that before SIGTERM."""
    deaf: float
    """Seconds from its start until it had a handler for SIGTERM: what comes before, the kernel keeps from PID 1."""
    log: str
    orphans: int = 0

    @property
    def fault(self) -> str:
        """What is wrong with that, if anything is."""
        limit = AT_ONCE if self.asked < 1.0 else GRACE
        if self.code not in {Exit.INTERRUPTED, Exit.DONE}:
            return f"exit code {self.code}, asked after {self.asked:.2f} s"
        if self.took > limit:
            return f"{self.took:.1f} s to go, asked after {self.asked:.2f} s"
        return f"{self.orphans} processes are left" if self.orphans else ""


class Attempt:
    """A stage program as PID 1 of a namespace of its own."""

    def __init__(self, program: Program, task: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder, self._log = folder, folder / "log"
        given = {
            "CGD_TASK": task,
            "CGD_TERMINATION_LOG": str(folder / "last-words.json"),
            "CGD_SCRATCH": str(folder / "scratch"),
            "CGD_TEACHER_API_KEY": folder.name,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [*ISOLATED, sys.executable, "-m", f"cgd_stages.{program.module}"]
        with self._log.open("wb") as log:
            self._unshare = subprocess.Popen(command, env={**os.environ, **given}, stdout=log, stderr=log)
        self._pid = self._first_process()
        self._started = time.monotonic()
        self._deaf = self._until_it_listens()

    def _first_process(self) -> Path:
        """PID 1 of the namespace as seen from here, from when it is Python."""
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        while self._unshare.poll() is None:
            with suppress(OSError, IndexError):
                pid = Path("/proc", children.read_text().split()[0])
                if (pid / "comm").read_text() != "unshare\n":
                    return pid
            time.sleep(0.001)
        raise AssertionError(f"unshare ended by itself: {self._log.read_text()}")

    def _until_it_listens(self) -> float:
        while self._unshare.poll() is None:
            with suppress(OSError):
                status = dict(line.split(":\t") for line in (self._pid / "status").read_text().splitlines())
                if int(status["SigCgt"], 16) & LISTENS:
                    break
            time.sleep(0.001)
        return time.monotonic() - self._started

    def ask(self, after: float) -> Ended:
        """Send SIGTERM so many seconds after the start, or as soon as it has a handler, and wait for the end."""
        first_line = self._wait(after)
        asked = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(int(self._pid.name), signal.SIGTERM)
        return self._end(asked, first_line)

    def leave_alone(self) -> Ended:
        """Wait for its own end."""
        first_line = self._wait(NO_END)
        return self._end(time.monotonic(), first_line)

    def _wait(self, seconds: float) -> float | None:
        """When its first log line came, if it did in this time."""
        first_line = None
        while self._unshare.poll() is None and (now := time.monotonic() - self._started) < seconds:
            if first_line is None and self._log.stat().st_size:
                first_line = now
            time.sleep(0.002)
        return first_line

    def _end(self, asked: float, first_line: float | None) -> Ended:
        try:
            code = self._unshare.wait(NO_END)
        except subprocess.TimeoutExpired:
            self._unshare.kill()
            code = self._unshare.wait()
        took = time.monotonic() - asked
        orphans = len(left_of(self._folder))
        log = self._log.read_text(errors="replace")
        return Ended(code, asked - self._started, took, first_line, self._deaf, log, orphans)


def left_of(folder: Path) -> list[int]:
    """Processes that were started with this folder in their environment, and live."""
    mark, paths = str(folder).encode(), Path("/proc").glob("[0-9]*/environ")
    return [int(path.parent.name) for path in paths if mark in _environment(path)]


def _environment(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


@dataclass
class Result:
    program: Program
    attempts: list[Ended] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, ended: Ended) -> None:
        self.attempts.append(ended)
        if ended.fault:
            self.faults.append(f"{self.program.name}: {ended.fault}\n{ended.log[-2000:]}")


class World:
    """A store, an endpoint and a model; `with` starts and ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._s3 = SeaweedFS(folder / "s3", access_key="test", secret_key="test-secret", bucket="data")
        self._model = ModelServer()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._places = 0

    def __enter__(self) -> Self:
        keys = {"AWS_ACCESS_KEY_ID": self._s3.access_key, "AWS_SECRET_ACCESS_KEY": self._s3.secret_key}
        os.environ.update(keys | {"AWS_EC2_METADATA_DISABLED": "true"})
        (self.folder / "s3").mkdir(parents=True)
        self._tiny = tiny.make(self.folder / "model")
        self._thread.start()
        for server in (self._s3, self._model):
            asyncio.run_coroutine_threadsafe(server.start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._model, self._s3):
            asyncio.run_coroutine_threadsafe(server.stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def attempts(self, program: Program) -> Iterator[Attempt]:
        """Attempts in one place of the store, from an empty one on."""
        self._places += 1
        name = f"{program.name}-{self._places}"
        storage = Storage(uri=f"s3://data/{name}", endpoint=self._s3.endpoint, path_style=True)
        task = program.task(Place(storage, self._tiny, self._model.url)).to_json()
        number = 0
        while True:
            number += 1
            yield Attempt(program, task, self.folder / "attempts" / name / str(number))


def instants(random: Random, count: int, first_line: float, end: float) -> list[float]:
    """Seconds after the start, half of them before the first log line, in no order. A program that has nothing to say
    is asked at any time."""
    early = [random.uniform(0.0, first_line) for _ in range((count + 1) // 2)]
    late = [random.uniform(first_line, end) for _ in range(count // 2)]
    return random.sample(early + late, count)


def play(world: World, program: Program, count: int, seed: int) -> Result:
    """An attempt that is left alone tells how long it takes; then one for each instant; the last must come to its
    end."""
    result, started = Result(program), time.monotonic()
    whole = next(world.attempts(program)).leave_alone()
    if whole.code != Exit.DONE:
        result.faults.append(f"{program.name}: exit code {whole.code} without any signal\n{whole.log[-2000:]}")
        return result
    attempts = world.attempts(program)
    for after in instants(Random(f"{seed}/{program.name}"), count, whole.first_line or whole.asked, whole.asked):
        ended = next(attempts).ask(after)
        result.add(ended)
        if ended.code == Exit.DONE:
            attempts = world.attempts(program)
    last = next(attempts).leave_alone()
    if last.code != Exit.DONE:
        result.faults.append(f"{program.name}: exit code {last.code} after the interruptions\n{last.log[-2000:]}")
    result.seconds = time.monotonic() - started
    return result


def show(results: Sequence[Result], seed: int) -> Table:
    table = Table(title=f"SIGTERM at random instants, seed {seed}")
    table.add_column("program")
    for column in ("instants", "143", "0", "before a line", "in the first second", "longest to go s", "deaf ms"):
        table.add_column(column, justify="right")
    for result in results:
        codes = Counter(ended.code for ended in result.attempts)
        early = [ended for ended in result.attempts if ended.asked < 1.0]
        longest = [f"{max((one.took for one in some), default=0.0):.2f}" for some in (early, result.attempts)]
        deaf = max((ended.deaf for ended in result.attempts), default=0.0)
        table.add_row(
            result.program.name,
            str(len(result.attempts)),
            str(codes[Exit.INTERRUPTED]),
            str(codes[Exit.DONE]),
            str(sum(ended.first_line is None for ended in result.attempts)),
            str(len(early)),
            " / ".join(longest),
            f"{deaf * 1000:.0f}",
            style="bold red" if result.faults else None,
        )
    table.caption = (
        "Longest to go: of those asked in their first second, and of all. Deaf: at most so long after its start PID 1 "
        "had no handler yet; an instant before that is taken right after it."
    )
    return table


@contextmanager
def world_in_a_folder() -> Iterator[World]:
    if pod_namespace() != "own":
        raise SystemExit("This suite needs namespaces of processes: run it as root, where unshare --pid is allowed.")
    with tempfile.TemporaryDirectory(prefix="cgd-chaos-") as folder, World(Path(folder)) as world:
        yield world


def main() -> int:
    parser = argparse.ArgumentParser(description="SIGTERM at random instants of every stage program.")
    parser.add_argument("--programs", nargs="*", choices=[one.name for one in PROGRAMS], default=[])
    parser.add_argument("--instants", type=int, help=f"default {INSTANTS}; {HEAVY_INSTANTS} with vLLM or torch")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    chosen = [one for one in PROGRAMS if one.name in given.programs or not given.programs]
    console, started = Console(width=None if sys.stdout.isatty() else 130), time.monotonic()
    console.print(f"seed {given.seed}")
    with world_in_a_folder() as world:

        def result_of(program: Program) -> Result:
            count = given.instants or (HEAVY_INSTANTS if program.heavy else INSTANTS)
            result = play(world, program, count, given.seed)
            state = "as promised" if not result.faults else f"{len(result.faults)} times NOT as promised"
            console.print(f"{result.seconds:5.0f} s  {program.name}: {state}", *result.faults, sep="\n", markup=False)
            return result

        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            results = list(pool.map(result_of, chosen))
    console.print(show(results, given.seed))
    console.print(f"{sum(len(one.attempts) for one in results)} instants in {time.monotonic() - started:.0f} s.")
    return int(any(result.faults for result in results))


if __name__ == "__main__":
    sys.exit(main())
