"""One pod's life as processes: volumes, its container, restarts, its end, and its status all along.

The container is a process tree below `launcher.py`, so that ending it ends all of it. Left out: further containers of
any sort, probes, lifecycle hooks, deadlines, limits (memory is neither reserved nor enforced, CPU only in whole cores),
growing pauses between restarts.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cgd_local.controllers import now, record, set_condition
from cgd_local.sandbox import NotMounted, NotReady, Sandbox
from cgd_operator.cluster import POD, ApiError, Cluster, Object

log = logging.getLogger(__name__)

LAUNCHER = Path(__file__).with_name("launcher.py")
MESSAGE_BYTES, LOG_MESSAGE_BYTES, LOG_MESSAGE_LINES = 4096, 2048, 80
EXIT_SECONDS = 0.03
PASSING = (0, 409, 429, 500, 503)  # what an API server answers, or does not, while it is in trouble
_turn = itertools.count()


@dataclass(frozen=True)
class Verdict:
    """Why the node itself disrupts a pod."""

    reason: str
    message: str


class PodRunner:
    """Runs one pod that is bound to this node, from its volumes to its last status."""

    def __init__(
        self, cluster: Cluster, pod: Object, sandbox: Sandbox, *, image: dict[str, str], backoff: float
    ) -> None:
        self.pod, self.sandbox, self.over = pod, sandbox, False
        self.namespace, self.name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        self._cluster, self._image, self._backoff = cluster, image, backoff
        self._container: Object = pod["spec"]["containers"][0]
        self._state: Object = {"waiting": {"reason": "ContainerCreating"}}
        self._last_state: Object = {}
        self._restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._conditions: list[Object] = []
        self._start_time = now()
        self._ending = asyncio.Event()
        self._verdict: Verdict | None = None
        self.task = asyncio.create_task(self._run(), name=f"pod {self.name}")

    def end(self, grace: float, verdict: Verdict | None = None) -> None:
        """SIGTERM now, SIGKILL after the grace period. Asked again, the earlier end wins."""
        self._verdict = self._verdict or verdict
        if not self._ending.is_set() and grace > 0:
            self._signal(signal.SIGTERM)
        self._ending.set()
        asyncio.get_running_loop().call_later(grace, self._signal, signal.SIGUSR1)

    def _signal(self, number: signal.Signals) -> None:
        if self._process:
            self._process.send_signal(number)

    async def _run(self) -> None:
        try:
            await self._publish()
            await self._live()
        except Exception:
            log.exception("pod %s/%s failed in the node itself", self.namespace, self.name)
        finally:
            self._signal(signal.SIGUSR1)
        self.over = True
        await self._publish()

    async def _live(self) -> None:
        """Run the container, and again as the restart policy says, until it is done or the pod ends."""
        policy = self.pod["spec"].get("restartPolicy", "Always")
        while ready := await self._prepared():
            await self._execute(*ready)
            if policy == "Never" or (policy == "OnFailure" and self._exit_code == 0):
                return
            if not self._ending.is_set():
                await self._back_off()

    async def _prepared(self) -> tuple[list[str], dict[str, str]] | None:
        """Command and environment, once all they refer to is there; None when the pod ends first."""
        while not self._ending.is_set():
            try:
                await self.sandbox.mount()
                env = await self.sandbox.environment(self._image)
                command = self.sandbox.command(env)
            except NotMounted as error:
                await record(self._cluster, self.pod, "Warning", "FailedMount", str(error), component="kubelet")
            except NotReady as error:
                await self._wait("CreateContainerConfigError", str(error))
            else:
                return None if self._ending.is_set() else (command, env)
            await self._pause()
        return None

    async def _execute(self, command: list[str], env: dict[str, str]) -> None:
        began, log_file = now(), self.sandbox.logs / f"{self._restarts}.log"
        self.sandbox.termination_file.write_bytes(b"")
        self._process = launch(command, env, self.sandbox.folder, log_file)
        confine(self._process, self._container)
        self._state = {"running": {"startedAt": began}}
        await self._publish()
        code = await exited(self._process)
        self._process = None
        message = last_words(self._container, self.sandbox.termination_file, log_file, code)
        end = {"exitCode": code, "reason": "Error" if code else "Completed", "message": message}
        self._state = {"terminated": {**end, "startedAt": began, "finishedAt": now()}}
        await self._publish()

    async def _back_off(self) -> None:
        self._last_state, self._restarts = self._state, self._restarts + 1
        await self._wait("CrashLoopBackOff", f"back-off {self._backoff:g}s restarting failed container")
        await self._pause()

    async def _wait(self, reason: str, message: str) -> None:
        self._state = {"waiting": {"reason": reason, "message": message}}
        await self._publish()

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), self._backoff)

    async def _publish(self) -> None:
        """Write the status. The pod lives on while the API is away; it ends when the API says the pod is gone."""
        while True:
            body = {"status": self._status()}
            try:
                found = await self._cluster.patch(POD, self.name, self.namespace, body, subresource="status")
            except ApiError as error:
                if error.status not in PASSING:
                    log.warning("status of pod %s/%s was refused: %s", self.namespace, self.name, error)
                    return
                await asyncio.sleep(0.5)
            else:
                if found is None:
                    self.end(0)
                return

    @property
    def _exit_code(self) -> int | None:
        code: int | None = self._state.get("terminated", {}).get("exitCode")
        return code

    def _phase(self) -> str:
        if self.over:
            return "Succeeded" if self._verdict is None and self._exit_code == 0 else "Failed"
        return "Pending" if "waiting" in self._state and not self._last_state else "Running"

    def _status(self) -> Object:
        phase, ready = self._phase(), "running" in self._state
        reason = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(phase, "ContainersNotReady")
        set_condition(self._conditions, "PodScheduled", "True", "", "")
        set_condition(self._conditions, "Ready", str(ready), "" if ready else reason, "")
        if self._verdict:
            set_condition(self._conditions, "DisruptionTarget", "True", "TerminationByKubelet", self._verdict.message)
        container = {
            "name": self._container["name"],
            "image": self._container.get("image", ""),
            "imageID": "",
            "ready": ready,
            "restartCount": self._restarts,
            "state": self._state,
            "lastState": self._last_state,
        }
        return {
            "phase": phase,
            "podIP": "127.0.0.1",
            "startTime": self._start_time,
            "conditions": self._conditions,
            "containerStatuses": [container],
        } | (vars(self._verdict) if self.over and self._verdict else {})


def launch(command: list[str], env: dict[str, str], folder: Path, log_file: Path) -> subprocess.Popen[bytes]:
    """Start a process that ends with this one. SIGTERM reaches the command; SIGUSR1 kills all that it has started."""
    launcher = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid())]
    with log_file.open("ab") as output:
        return subprocess.Popen(
            launcher + command,
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def confine(process: subprocess.Popen[bytes], container: Object) -> None:
    """A CPU limit of whole cores becomes as many cores, given out in turn: programs count theirs to set up threads."""
    limit = str(container.get("resources", {}).get("limits", {}).get("cpu", ""))
    cores = sorted(os.sched_getaffinity(0))
    if limit.isdigit() and 0 < int(limit) < len(cores):
        first = next(_turn) * int(limit)
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process.pid, {cores[(first + n) % len(cores)] for n in range(int(limit))})


async def exited(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process without a thread; 128 + signal for one that was killed."""
    while (code := process.poll()) is None:  # noqa: ASYNC110  it is no task of this loop that ends it
        await asyncio.sleep(EXIT_SECONDS)
    return code if code >= 0 else 128 - code


def last_words(container: Object, message_file: Path, log_file: Path, code: int) -> str:
    """The termination message: the file's content; the end of the log if asked for, failed, and the file is empty."""
    message = message_file.read_bytes()[:MESSAGE_BYTES] if message_file.is_file() else b""
    fallback = container.get("terminationMessagePolicy") == "FallbackToLogsOnError"
    if not message and fallback and code:
        tail = log_file.read_bytes()[-LOG_MESSAGE_BYTES:]
        message = b"".join(tail.splitlines(keepends=True)[-LOG_MESSAGE_LINES:])
    return message.decode(errors="replace")
