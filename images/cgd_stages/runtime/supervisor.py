"""The first process of a program's container: it passes SIGTERM on, and waits.

A container's first process is PID 1 of its namespace, and the kernel drops every signal for which PID 1 has no
handler. A handler alone does not help: Python runs handlers between two bytecodes of the main thread, so not while that
thread loads a library or the weights of a model. So each program runs in a child, which is not PID 1. Where it holds
nothing (see `Context.holding`) it has no handler, and the kernel ends it whatever it is doing. No signal raises an
exception, because foreign code could take the exception for an error of its own.

Until Python itself has started, some 30 ms, PID 1 has no handler; the pod's preStop hook holds SIGTERM back until then.
So this module imports nothing that takes time, and the programs call it before all their other imports.
"""

import contextlib
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
HELD_NOTHING = "SIGTERM: nothing was finished that is not stored"
WORDS = f'{{"outcome": "interrupted", "error": "Interrupted", "message": "{HELD_NOTHING}"}}'
TERMINATION_LOG = "CGD_TERMINATION_LOG"
"""As in `contract`, whose import would take too long here."""
SIGNALLED = 128
"""An exit code is this plus the signal that ended a process, as in shells and containers."""


def supervise() -> None:
    """Return in a child process; this process waits, and ends as the child does."""
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until this process can pass it on
    child = os.fork()
    if child == 0:
        die_with_the_parent()
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(SIGNALLED + signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return

    def pass_on(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the child's to handle
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    ended, status = os.wait()
    while ended != child:  # PID 1 inherits the orphans of others
        ended, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGTERM:  # a child with something to store has a handler, and writes its own last words
        print(HELD_NOTHING, file=sys.stderr, flush=True)
        path = os.environ.get(TERMINATION_LOG) or "/dev/termination-log"
        with contextlib.suppress(OSError), open(path, "w") as file:  # noqa: PTH123  pathlib takes long to import
            file.write(WORDS)
    os._exit(code if code >= 0 else SIGNALLED - code)


def die_with_the_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that ends."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
