"""Runs programs that a model wrote, each in a process of its own that can do nothing but compute; see `jail`.

A stage's pod holds credentials and a network, so a program must not see its environment, its files, its processes or
its network. No privilege is needed for that, and no right that the `restricted` Pod Security Standard takes away. What
a program returns is checked in another process of the same kind: the program can say nothing of its own success.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgd_stages.errors import UserError

JAIL = Path(__file__).with_name("sandbox.py")
SECONDS, MEGABYTES = 10.0, 2048
"""What a program may take: wall-clock time, and memory that it addresses."""
NEEDS = (
    "Executing what a model writes needs nodes with Linux 5.13 or newer whose kernel has Landlock switched on (in its "
    "lsm= list), and libseccomp in the image; or leave the task out of spec.evaluation.tasks."
)


@dataclass(frozen=True)
class Trial:
    """A program, and the checks of its function `entry`."""

    program: str
    entry: str = ""
    head: str = ""
    """What the checks may use beside `entry`: code that ends with the head of a function, whose body is left out."""
    checks: str = ""
    """Code that calls `entry` and raises where an answer is wrong. None: it passes when the program says that it has
    come to its end, which it could say at any time."""


@dataclass(frozen=True)
class Verdict:
    """How a program ended; `error` is empty when it came to its end and passed, and names what happened otherwise."""

    passed: bool
    error: str = ""
    timed_out: bool = False


def execute(trial: Trial, *, seconds: float = SECONDS, megabytes: int = MEGABYTES) -> Verdict:
    """Run one program and its checks to their end, or to the end of their time.

    Raises:
        UserError: this system cannot lock a process in; nothing was run.
    """
    limits = (str(int(seconds) + 1), str(megabytes))
    program_given = {"program": trial.program, "entry": trial.entry}
    checks_given = {"head": trial.head, "entry": trial.entry, "checks": trial.checks}
    with ExitStack() as processes:
        # Only the two processes keep the pipes, so that each sees the end of the other.
        with ExitStack() as ends:
            (asked, ask), (told, tell) = os.pipe(), os.pipe()
            for end in (asked, ask, told, tell):
                ends.callback(os.close, end)
            program = processes.enter_context(_process(program_given, "program", *limits, reads=asked, writes=tell))
            checks = processes.enter_context(_process(checks_given, "checks", *limits, reads=told, writes=ask))
        try:
            checks.wait(seconds)
        except subprocess.TimeoutExpired:
            return _no_end(seconds)
        assert checks.stdout
        said = os.read(checks.stdout.fileno(), 4096).decode(errors="replace")
    kind, _, detail = said.partition(" ")
    if -signal.SIGXCPU in (program.returncode, checks.returncode):
        return _no_end(seconds)
    if kind == "unavailable":
        raise UserError(f"programs cannot be locked in here: {detail}", hint=NEEDS)
    if kind not in ("passed", "failed"):
        code = program.returncode if kind == "lost" else checks.returncode
        return Verdict(False, f"ended without a verdict: exit status {code}")
    return Verdict(kind == "passed", detail)


def _no_end(seconds: float) -> Verdict:
    return Verdict(False, f"no end within {seconds:g} s", timed_out=True)


@contextmanager
def _process(
    given: dict[str, str], part: str, *limits: str, reads: int, writes: int
) -> Iterator["subprocess.Popen[Any]"]:
    """A part of the jail, given its code and two ends of pipes. It is killed at the end, whatever it does."""
    command = [sys.executable, "-I", "-S", str(JAIL), part, *limits, str(reads), str(writes)]
    with tempfile.TemporaryFile() as text:
        text.write(json.dumps(given).encode())
        text.seek(0)
        with subprocess.Popen(
            command, env={}, cwd="/", stdin=text, stderr=subprocess.DEVNULL, start_new_session=True,
            stdout=subprocess.PIPE if part == "checks" else subprocess.DEVNULL, pass_fds=(reads, writes),
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def execute_all(trials: Iterable[Trial], *, seconds: float = SECONDS) -> list[Verdict]:
    """Run programs, as many at a time as there are processors."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda trial: execute(trial, seconds=seconds), trials))


def require() -> None:
    """Raise a UserError where programs cannot be locked in."""
    execute(Trial(""))
