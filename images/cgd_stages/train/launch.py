"""This pod's processes: torchrun on loop.py as the job's environment says, to their end, whatever it is."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from cgd_stages.contract import Exit
from cgd_stages.errors import Interrupted, NoTransfer, StageError, TransientError, UserError
from cgd_stages.train.stage import Node, Stage
from cgd_stages.training.job import BEGUN, LAUNCHER, STOP, ProcessEnd, read_process_ends

log = logging.getLogger(__name__)

LOOP = "cgd_stages.train.loop"
"""The program that torchrun starts."""
PATIENCE = 0.2
"""Seconds between two looks at torchrun's process."""
LOOK_SECONDS = 2.0
"""Seconds between two looks for the first pod."""
ABSENT_SECONDS = 600.0
"""The other pods wait so long at most for the first pod's address."""


def find_first_pod(stage: Stage) -> None:
    """Wait until DNS knows the first pod, where the processes meet: its Service names it only while it runs."""
    node, deadline = stage.node, time.monotonic() + ABSENT_SECONDS
    while node.nodes > 1 and not is_known(node.master):
        if time.monotonic() > deadline:
            raise TransientError(
                f"the training's first pod was not found in {ABSENT_SECONDS:g} s: {node.master} has no address",
                hint="That pod does not run (`kubectl describe pod` says why), or the cluster's DNS does not know its "
                "Service. This pod tries again.",
            )
        log.info("waiting for the first pod, %s", node.master)
        time.sleep(LOOK_SECONDS)


def is_known(host: str) -> bool:
    """Whether DNS, or this machine, has an address for the name."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def torchrun(stage: Stage, folder: Path) -> None:
    """Run this pod's processes to their end, and raise their error. After SIGTERM they may store a checkpoint, if they
    have begun a step."""
    command = [sys.executable, "-m", "torch.distributed.run", *stage.node.torchrun()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    environment[LAUNCHER] = str(os.getpid())
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // stage.node.processes)))
    # A session of its own keeps SIGTERM from torchrun, which would kill processes that have a checkpoint to store.
    process = subprocess.Popen([*command, "-m", LOOP, str(folder)], env=environment, start_new_session=True)
    try:
        while process.poll() is None:
            if stage.context.stop.is_set():
                if not (folder / BEGUN).exists():
                    raise Interrupted("SIGTERM: no step was begun")
                (folder / STOP).touch()
            time.sleep(PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise failure(read_process_ends(folder), process.returncode, stage.node)


def failure(process_ends: list[ProcessEnd], code: int, node: Node) -> StageError:
    """The pod's error: what the user must change, else an interruption, else a reason to try again.

    A killed process does not write how it ended, and the others fail because it is gone.
    """
    kinds: dict[int, type[StageError]] = {Exit.PERMANENT: UserError, Exit.INTERRUPTED: Interrupted}
    for exit_code, kind in kinds.items():
        for end in process_ends:
            if end.code == exit_code:
                kind = NoTransfer if end.error == NoTransfer.__name__ else kind
                return kind(end.message, hint=end.hint)
    ranks = range(node.rank * node.processes, (node.rank + 1) * node.processes)
    silent = sorted(set(ranks) - {end.rank for end in process_ends})
    causes = [f"rank {', '.join(map(str, silent))} was killed or ended without a word"] if silent else []
    causes += [f"rank {end.rank}: {end.error}: {end.message}" for end in process_ends if end.code]
    hints = [end.hint for end in process_ends if end.code and end.hint]
    return TransientError(
        f"training in pod {node.rank} broke off (torchrun {code}): {'; '.join(causes)}"[:1500],
        hint=hints[0] if hints else "The next attempt continues from the newest checkpoint.",
    )
