"""The first process of a container: nothing it starts outlives it, and it does not outlive its node.

    python -I -S launcher.py NODE_PID COMMAND [ARGUMENT...]

Run by `cgd_local.pods`, one per container. The launcher is a subreaper: processes that leave their session (torchrun
gives each worker one of its own) come back to it when their parent dies. It ends with the command's exit code, or
128 + signal, after every other process is gone, as a container does.

SIGTERM is passed on to the command's process group. SIGUSR1 kills everything at once; the kernel sends the same signal
when the node dies, however it dies.
"""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
prctl = ctypes.CDLL(None, use_errno=True).prctl


def main() -> int:
    node, command = int(sys.argv[1]), sys.argv[2:]
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signals = {signal.SIGUSR1, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # none may arrive before the child is known
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the node's to handle
    prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() != node:  # it died before the line above
        return 128 + signal.SIGKILL
    child = os.fork()
    if child == 0:
        become(command)
    signal.signal(signal.SIGUSR1, lambda *_: kill())
    signal.signal(signal.SIGTERM, lambda *_: terminate(child))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    code = reap(child)
    kill()
    while reap(-1) >= 0:  # one that was born meanwhile is met when its parent is reaped
        kill()
    return code


def reap(pid: int) -> int:
    """Wait for a child, or for any (-1); its exit code, 128 + signal, or -1 when there is none."""
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return -1
    return code if code >= 0 else 128 - code


def terminate(child: int) -> None:
    try:
        os.killpg(child, signal.SIGTERM)
    except ProcessLookupError:  # not yet in a session of its own; or gone, which `reap` is about to see
        send(child, signal.SIGTERM)


def kill() -> None:
    for pid in descendants(os.getpid()):
        send(pid, signal.SIGKILL)


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def become(command: list[str]) -> None:
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        # As the node gave it. Not `os.environ`: Python adds LC_CTYPE to that when the locale is C.
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
        environment = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
        os.execvpe(command[0], command, environment)  # noqa: S606  no shell is wanted
    except OSError as error:
        print(f"exec {command[0]!r}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(128)


if __name__ == "__main__":
    sys.exit(main())
