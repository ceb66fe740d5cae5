"""The first process of a program's container: it passes SIGTERM on, and waits.

A container's first process is PID 1 of its namespace, for which the kernel takes no signal that has no handler: there
SIGTERM would do nothing until a handler is installed, and Python runs handlers between two bytecodes of the main thread
alone, not while that loads a library or the weights of a model. So each program goes on in a child, which is not PID 1:
where it holds nothing (see `Context.holding`) it has no handler, and the kernel ends it whatever it is at. No exception
is raised for a signal, which foreign code could take for an error of its own.

Until Python itself has started, some 30 ms, PID 1 has no handler; the pod's preStop hook holds SIGTERM back so long. So
nothing is imported here that takes time, and the programs call this before all their other imports.
"""

import contextlib
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
HELD_NOTHING = "SIGTERM: nothing was finished that is not stored"
WORDS = f'{{"outcome": "interrupted", "error": "Interrupted", "message": "{HELD_NOTHING}"}}'
TERMINATION_LOG = "CGD_TERMINATION_LOG"
"""As in `contract`, whose import takes longer than a container that must go should."""
SIGNALLED = 128
"""An exit code above it tells the signal that ended a process, as shells and containers have it."""


def supervise() -> None:
    """Return in a child process; this one ends as the child does."""
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until it is known whom it is for
    child = os.fork()
    if child == 0:
        die_with_the_parent()
        if os.getppid() != parent:  # it died before the line above
            os._exit(SIGNALLED + signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return

    def pass_on(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the child's to handle
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    code = _end_of(child)
    if code == -signal.SIGTERM:
        _say_interrupted()
    os._exit(code if code >= 0 else SIGNALLED - code)


def die_with_the_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_of(child: int) -> int:
    """Wait for the child, and for the orphans that PID 1 inherits; the exit code, below zero for a signal."""
    while True:
        ended, status = os.wait()
        if ended == child:
            return os.waitstatus_to_exitcode(status)


def _say_interrupted() -> None:
    """The last words of a child that the signal has ended. One that stored something before has said its own."""
    print(HELD_NOTHING, file=sys.stderr, flush=True)
    file = os.environ.get(TERMINATION_LOG) or "/dev/termination-log"
    with contextlib.suppress(OSError), open(file, "w") as said:  # noqa: PTH123  pathlib takes long to import
        said.write(WORDS)
