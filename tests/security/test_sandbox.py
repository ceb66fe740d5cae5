"""What a model's program can do to be counted as right, and to processes beside it. Nothing is played here."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as any_

from cgd_stages.contract import HarnessTask
from cgd_stages.harness import __main__ as harness
from cgd_stages.harness import sandbox as jail
from cgd_stages.harness import sandboxed

HUMANEVAL = HarnessTask(name="HumanEval", task="humaneval", metric="pass@1", executes=True)
HEAD = "def add(a, b):\n"
TESTS = "def check(candidate):\n    assert candidate(2, 3) == 5\ncheck(add)"
FRAMES = """\
    import os, re, sys
    frame = sys._getframe()
    while frame:
        {each}
        frame = frame.f_back
    os._exit(0)
"""
VERDICT = (
    "found = frame.f_locals; 'nonce' in found and os.write(found['verdict'], f\"{found['nonce']} passed\".encode())"
)
EXPECTED = "for found in re.findall(r'== ([0-9]+)', str(frame.f_locals)): return int(found)"


def judged(reply: str) -> dict[str, Any]:
    """The verdict on a reply to a document of HumanEval."""
    document = {"prompt": HEAD, "entry_point": "add"}
    sample = {"doc": document, "resps": [[reply]], "target": TESTS}
    results: dict[str, Any] = harness.graded_by_tests(HUMANEVAL, {"samples": {"humaneval": [sample]}})["samples"][
        "humaneval"
    ][0]
    return results


@pytest.mark.parametrize(
    "reply",
    [
        FRAMES.format(each=VERDICT),
        FRAMES.format(each=EXPECTED),
        "    class Yes:\n        __eq__ = lambda *_: True\n    return Yes()\n",
        "    return 0\nclass Yes(int):\n    __eq__ = lambda *_: True\nadd = lambda *_: Yes(0)\n",
        "    return 0\nimport sys\nsys.exit = sys.excepthook = lambda *_: None\nsys.exit(0)\n",
        "    import os\n    os._exit(0)\n",
        "    import os\n    for n in range(3, 9):\n        try: os.write(n, b'passed')\n        except OSError: pass\n",
    ],
    ids=["frames", "expected", "equal to all", "a number equal to all", "no exit", "exit", "every descriptor"],
)
def test_a_program_is_not_right_because_it_says_so(reply: str) -> None:
    assert judged(reply)["pass@1"] == 0, judged(reply)
    assert judged("    return a + b\n")["pass@1"] == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Odd", "Odd"),
        ("passed", "Exception"),
        ("timed out", "Exception"),
        ("\x1b[2J\n", "Exception"),
        ("N" * 10_000, "N" * 50),
        ("\ud800", "Exception"),
    ],
    ids=["name", "passed", "timed out", "control", "long", "half"],
)
def test_a_rule_is_no_text_of_the_program(name: str, told: str) -> None:
    results = judged(f"    raise type({name!r}, (Exception,), {{}})()\n" if name != "\ud800" else TELLING)
    assert (results["pass@1"], results["rule"]) == (0, f"sandbox: {told}")


TELLING = """\
    import os
    for place in range(3, 64):
        try: os.write(place, b'{"kind": "\\\\ud800", "words": ""}\\n')
        except OSError: pass
"""
"""Writes to the checks itself, as an error whose name is half of a character."""


@pytest.fixture
def neighbour() -> Iterator["subprocess.Popen[bytes]"]:
    """Another process of the same user."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def older_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 6.12, whose Landlock has no scope for signals."""
    older = tmp_path / "older.py"
    folder = str(Path(jail.__file__).parent)
    older.write_text(
        f"import sys; sys.path.insert(0, {folder!r})\nimport sandbox as jail\njail.SCOPES = 0\njail.main()\n"
    )
    monkeypatch.setattr(sandboxed, "SANDBOX", older)


@pytest.mark.parametrize(
    "call",
    ["62, OTHER, 15", "200, OTHER, 15", "234, OTHER, OTHER, 15", "129, OTHER, 15, bytes(128)", "424, 3, 15, 0, 0"],
    ids=["kill", "tkill", "tgkill", "rt_sigqueueinfo", "pidfd_send_signal"],
)
def test_a_program_signals_nobody_itself(call: str, neighbour: "subprocess.Popen[bytes]", older_kernel: None) -> None:
    program = (
        "import ctypes, os\nsent = ctypes.CDLL(None, use_errno=True).syscall("
        f"{call.replace('OTHER', str(neighbour.pid))})\nassert sent == 0\n"
    )
    assert judged("    return a + b\n" + program)["rule"] == "sandbox: AssertionError"
    assert neighbour.poll() is None


@pytest.mark.parametrize(
    "command",
    [
        "fcntl(place, fcntl.F_SETOWN, OTHER)",
        "fcntl(place, 15, struct.pack('ii', 1, OTHER))",
        "ioctl(place, 0x8901, OTHER)",
    ],
    ids=["F_SETOWN", "F_SETOWN_EX", "FIOSETOWN"],
)
def test_a_program_has_the_kernel_signal_nobody_where_landlock_does_not_stop_it(
    command: str, neighbour: "subprocess.Popen[bytes]", older_kernel: None
) -> None:
    program = (
        "import fcntl as calls, os, struct\nfrom fcntl import fcntl, ioctl\n"
        "place = os.open(os.path.dirname(os.__file__), os.O_RDONLY)\n"
        f"{command.replace('fcntl.F', 'calls.F').replace('OTHER', str(neighbour.pid))}\n"
        f"fcntl(place, calls.F_SETSIG, {int(signal.SIGTERM)})\n"
        "fcntl(place, calls.F_NOTIFY, calls.DN_ACCESS | calls.DN_MULTISHOT)\nopen(os.__file__).read()\n"
    )
    reply = "    return a + b\n" + program
    assert judged(reply)["rule"] == "sandbox: PermissionError"
    assert neighbour.poll() is None


VALUES = any_.recursive(
    any_.none() | any_.booleans() | any_.integers() | any_.floats(allow_nan=False) | any_.text(),
    lambda inner: (
        any_.lists(inner)
        | any_.tuples(inner, inner)
        | any_.sets(any_.text() | any_.integers())
        | any_.dictionaries(any_.text() | any_.integers() | any_.tuples(any_.booleans()), inner)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_data_arrive_as_they_were(value: Any) -> None:
    arrived = jail.made(jail.json.loads(jail.json.dumps(jail.plain(value))))
    assert arrived == value
    assert type(arrived) is type(value)


def test_what_is_more_than_data_does_not_arrive() -> None:
    with pytest.raises(TypeError, match="a value of type complex cannot be checked"):
        jail.plain([1j])
