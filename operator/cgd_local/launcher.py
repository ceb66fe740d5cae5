"""The first process of a container: nothing it starts outlives it, and it does not outlive its node.

    python -I -S launcher.py NODE_PID HOSTS COMMAND [ARGUMENT...]

`cgd_local.pods` starts one for each container. The launcher is a subreaper: processes that leave their session
(torchrun gives each worker its own) become its children when their parent dies. It ends with the command's exit code,
or 128 + signal, after all other processes have ended, as a container does.

HOSTS is `shared`, or the path of a file. With a file, which needs root (see `pods.pod_namespace`), that file is
/etc/hosts, and the command is PID 1 of its own namespace, as in a container: the kernel withholds every signal for
which it has no handler.

The launcher passes SIGTERM on to the command, and to no process that the command has started. SIGUSR1 kills all of
them at once; the kernel sends it when the node dies, however it dies.
"""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
CLONE_NEWNS, CLONE_NEWPID = 0x20000, 0x20000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    node, command = int(sys.argv[1]), sys.argv[3:]
    hosts = None if sys.argv[2] == "shared" else os.fsencode(sys.argv[2])
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signals = {signal.SIGUSR1, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # none may arrive before the child exists
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the node handles Ctrl-C
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() != node:  # the node died before the line above
        return 128 + signal.SIGKILL
    if hosts:
        succeed(libc.unshare(CLONE_NEWPID))
    child = os.fork()
    if child == 0:
        become(command, hosts)
    signal.signal(signal.SIGUSR1, lambda *_: kill())
    signal.signal(signal.SIGTERM, lambda *_: send(child, signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    code = reap(child)
    kill()
    while reap(-1) >= 0:  # a process started meanwhile becomes a child when its parent is reaped
        kill()
    return code


def reap(pid: int) -> int:
    """Wait for a child, or for any (-1); its exit code, 128 + signal, or -1 without a child."""
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return -1
    return code if code >= 0 else 128 - code


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
            with contextlib.suppress(OSError):  # the process has ended meanwhile
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    pids = [root]
    for pid in pids:
        pids += children.get(pid, [])
    return pids[1:]


def become(command: list[str], hosts: bytes | None) -> None:
    try:
        if hosts:  # /proc shows the processes of this namespace, and other processes do not see these mounts
            succeed(libc.unshare(CLONE_NEWNS))
            succeed(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
            succeed(libc.mount(b"proc", b"/proc", b"proc", 0, None))
            succeed(libc.mount(hosts, b"/etc/hosts", None, MS_BIND, None))
        os.setsid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        # The environment from the node. Not `os.environ`: Python adds LC_CTYPE to that when the locale is C.
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
        environment = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
        os.execvpe(command[0], command, environment)  # noqa: S606  no shell is wanted
    except OSError as error:
        print(f"exec {command[0]!r}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(128)


def succeed(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    sys.exit(main())
