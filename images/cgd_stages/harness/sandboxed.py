"""Runs programs that a model wrote, each in a process of its own that can do nothing but compute; see `sandbox`.

A stage's pod has credentials and a network, so a program must not see the pod's environment, files, processes or
network. The sandbox needs no privilege, and works under the `restricted` Pod Security Standard. A second process of the
same kind checks what the program returns, so a program cannot claim its own success.
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

SANDBOX = Path(__file__).with_name("sandbox.py")
SECONDS, MEGABYTES = 10.0, 2048
"""A program's limits: wall-clock time, and address space."""
NEEDS = (
    "Executing a model's programs needs nodes with Linux 5.13 or newer whose kernel has Landlock switched on (in its "
    "lsm= list), and libseccomp in the image. Use such nodes, or remove the task from spec.evaluation.tasks."
)


@dataclass(frozen=True)
class Trial:
    """A program, and the checks of its function `entry`."""

    program: str
    entry: str = ""
    head: str = ""
    """Code that the checks may use beside `entry`; it ends with the head of a function, without a body."""
    checks: str = ""
    """Code that calls `entry` and raises where an answer is wrong. Without it the trial passes when the program says
    that it has ended, which it could say at any time."""


@dataclass(frozen=True)
class Verdict:
    """How a program ended. `error` says why it did not pass; it is empty when it passed."""

    passed: bool
    error: str = ""
    timed_out: bool = False


def execute(trial: Trial, *, seconds: float = SECONDS, megabytes: int = MEGABYTES) -> Verdict:
    """Run one program and its checks to their end, or to the end of their time.

    Raises:
        UserError: this system cannot lock a process in; the program was not run.
    """
    limits = (str(int(seconds) + 1), str(megabytes))
    no_end = Verdict(False, f"no end within {seconds:g} s", timed_out=True)
    program_code = {"program": trial.program, "entry": trial.entry}
    checks_code = {"head": trial.head, "entry": trial.entry, "checks": trial.checks}
    with ExitStack() as processes:
        # Only the two processes keep the pipes, so that each sees the end of the other.
        with ExitStack() as ends:
            (read_question, write_question), (read_answer, write_answer) = os.pipe(), os.pipe()
            for end in (read_question, write_question, read_answer, write_answer):
                ends.callback(os.close, end)
            program = processes.enter_context(_process(program_code, "program", *limits, read_question, write_answer))
            checks = processes.enter_context(_process(checks_code, "checks", *limits, read_answer, write_question))
        try:
            checks.wait(seconds)
        except subprocess.TimeoutExpired:
            return no_end
        assert checks.stdout
        words = os.read(checks.stdout.fileno(), 4096).decode(errors="replace")
    kind, _, detail = words.partition(" ")
    if -signal.SIGXCPU in (program.returncode, checks.returncode):
        return no_end
    if kind == "unavailable":
        raise UserError(f"programs cannot be locked in here: {detail}", hint=NEEDS)
    if kind not in ("passed", "failed"):
        code = program.returncode if kind == "lost" else checks.returncode
        return Verdict(False, f"ended without a verdict: exit status {code}")
    return Verdict(kind == "passed", detail)


@contextmanager
def _process(
    code: dict[str, str], part: str, seconds: str, megabytes: str, reads: int, writes: int
) -> Iterator["subprocess.Popen[Any]"]:
    """One process of the sandbox. It gets its code and two ends of pipes, and is killed at the end in any case."""
    command = [sys.executable, "-I", "-S", str(SANDBOX), part, seconds, megabytes, str(reads), str(writes)]
    with tempfile.TemporaryFile() as text:
        text.write(json.dumps(code).encode())
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
    """Run programs, one for each processor at a time."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda trial: execute(trial, seconds=seconds), trials))


def require() -> None:
    """Raise a UserError where this system cannot lock programs in."""
    execute(Trial(""))
