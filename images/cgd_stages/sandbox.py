"""Runs programs that a model wrote, each in a process of its own that can do nothing but compute; see `jail`.

A stage's pod holds credentials and a network, so a program must not see its environment, its files, its processes or
its network. No privilege is needed for that, and no right that the `restricted` Pod Security Standard takes away.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cgd_stages.errors import UserError

JAIL = Path(__file__).with_name("jail.py")
SECONDS, MEGABYTES = 10.0, 2048
"""What a program may take: wall-clock time, and memory that it addresses."""
NEEDS = (
    "Executing what a model writes needs nodes with Linux 5.13 or newer whose kernel has Landlock switched on (in its "
    "lsm= list), and libseccomp in the image; or leave the task out of spec.evaluation.tasks."
)


@dataclass(frozen=True)
class Verdict:
    """How a program ended; `error` is empty when it came to its end, and names what happened otherwise."""

    passed: bool
    error: str = ""
    timed_out: bool = False


def execute(program: str, *, seconds: float = SECONDS, megabytes: int = MEGABYTES) -> Verdict:
    """Run one program to its end, or to the end of its time.

    Raises:
        UserError: this system cannot lock a process in; nothing was run.
    """
    nonce = secrets.token_hex(8)
    command = [sys.executable, "-I", "-S", str(JAIL), nonce, str(int(seconds) + 1), str(megabytes)]
    with tempfile.TemporaryFile() as text:
        text.write(program.encode(errors="replace"))
        text.seek(0)
        with subprocess.Popen(
            command, env={}, cwd="/", stdin=text, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:  # fmt: skip
            assert process.stdout
            timed_out = False
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            said = os.read(process.stdout.fileno(), 4096).decode(errors="replace")
    if timed_out or process.returncode == -signal.SIGXCPU:
        return Verdict(False, f"no end within {seconds:g} s", timed_out=True)
    mark, _, words = said.partition(" ")
    kind, _, detail = words.partition(" ")
    if mark != nonce:
        return Verdict(False, f"ended without a verdict: exit status {process.returncode}")
    if kind == "unavailable":
        raise UserError(f"programs cannot be locked in here: {detail}", hint=NEEDS)
    return Verdict(kind == "passed", detail)


def execute_all(programs: Iterable[str], *, seconds: float = SECONDS) -> list[Verdict]:
    """Run programs, as many at a time as there are processors."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: execute(program, seconds=seconds), programs))


def require() -> None:
    """Raise a UserError where programs cannot be locked in."""
    execute("")
