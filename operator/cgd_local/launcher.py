"""The first process of a container: nothing it starts outlives it, and it does not outlive its node.

    python -I -S launcher.py NODE_PID COMMAND [ARGUMENT...]

Run by `cgd_local.node`, one per container. The launcher is a subreaper: processes that leave their session (torchrun
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
    container = Container()
    signal.signal(signal.SIGUSR1, lambda *_: container.kill())
    signal.signal(signal.SIGTERM, lambda *_: container.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the node's to handle
    prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() != node:  # it died before the line above
        return 128 + signal.SIGKILL
    return container.run(command)


class Container:
    def __init__(self) -> None:
        self._main = 0
        self._doomed = False

    def run(self, command: list[str]) -> int:
        signals = {signal.SIGUSR1, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # none may arrive between the fork and knowing the child
        self._main = os.fork()
        if self._main == 0:
            _become(command)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        code = 0
        while True:
            try:
                pid, status = os.waitpid(-1, 0)
            except ChildProcessError:
                return code
            if pid == self._main:
                code, self._doomed = _exit_code(status), True
            if self._doomed:
                self.kill()

    def terminate(self) -> None:
        if not self._main:
            os._exit(128 + signal.SIGTERM)
        try:
            os.killpg(self._main, signal.SIGTERM)
        except ProcessLookupError:  # not yet in a session of its own; or gone, which the main loop is about to see
            _signal(self._main, signal.SIGTERM)

    def kill(self) -> None:
        """Kill every descendant; one that is born meanwhile is met when its parent is reaped."""
        self._doomed = True
        for pid in descendants(os.getpid()):
            _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended while we looked
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _become(command: list[str]) -> None:
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.execvpe(command[0], command, environment())  # noqa: S606  no shell is wanted
    except OSError as error:
        print(f"exec {command[0]!r}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(128)


def environment() -> dict[bytes, bytes]:
    """The environment as the node gave it. Not `os.environ`: Python adds LC_CTYPE to that when the locale is C."""
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    return dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
