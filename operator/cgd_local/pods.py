"""One pod's life as processes: volumes, containers, restarts, its end, and its status all along.

Each container is a process tree below `launcher.py`, so that ending it ends all of it. Left out: init, sidecar and
ephemeral containers, probes, lifecycle hooks, deadlines, limits (memory is neither reserved nor enforced, CPU only in
whole cores), growing pauses between restarts.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cgd_local.controllers import now, record, set_condition
from cgd_local.sandbox import NotMounted, NotReady, Sandbox
from cgd_operator.cluster import POD, ApiError, Cluster, Object

log = logging.getLogger(__name__)

LAUNCHER = Path(__file__).with_name("launcher.py")
MESSAGE_BYTES, LOG_MESSAGE_BYTES, LOG_MESSAGE_LINES = 4096, 2048, 80
PASSING = (0, 409, 429, 500, 503)  # what an API server answers, or does not, while it is in trouble
_turn = itertools.count()


@dataclass(frozen=True)
class Verdict:
    """Why the node itself ends a pod; a disruption unless `disruption` is empty, which is that condition's reason."""

    reason: str
    message: str
    disruption: str = "TerminationByKubelet"


@dataclass
class Container:
    spec: Object
    state: Object = field(default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}})
    last: Object = field(default_factory=dict)
    restarts: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    @property
    def exit_code(self) -> int | None:
        code: int | None = self.state.get("terminated", {}).get("exitCode")
        return code

    def status(self) -> Object:
        return {
            "name": self.name,
            "image": self.spec.get("image", ""),
            "imageID": "",
            "ready": "running" in self.state,
            "restartCount": self.restarts,
            "state": self.state,
            "lastState": self.last,
        }


class PodRunner:
    """Runs one pod that is bound to this node, from its volumes to its last status."""

    def __init__(
        self, cluster: Cluster, pod: Object, sandbox: Sandbox, *, image: dict[str, str], backoff: float
    ) -> None:
        self.pod, self.sandbox, self.over = pod, sandbox, False
        self.namespace, self.name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        self._cluster, self._image, self._backoff = cluster, image, backoff
        self._containers = [Container(spec) for spec in pod["spec"]["containers"]]
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
        for container in self._containers:
            if container.process:
                container.process.send_signal(number)

    async def _run(self) -> None:
        try:
            await self._publish()
            async with asyncio.TaskGroup() as group:
                for container in self._containers:
                    group.create_task(self._keep(container))
        except Exception:
            log.exception("pod %s/%s failed in the node itself", self.namespace, self.name)
            self._verdict = self._verdict or Verdict("NodeError", "the local node failed; see its log", "")
        finally:
            self._signal(signal.SIGUSR1)
        self.over = True
        await self._publish()

    async def _keep(self, container: Container) -> None:
        """Run a container, and again as the restart policy says, until it is done or the pod ends."""
        policy = self.pod["spec"].get("restartPolicy", "Always")
        while ready := await self._prepared(container):
            await self._execute(container, *ready)
            if policy == "Never" or (policy == "OnFailure" and container.exit_code == 0):
                return
            if not self._ending.is_set():
                await self._back_off(container)

    async def _prepared(self, container: Container) -> tuple[list[str], dict[str, str]] | None:
        """Command and environment, once all they refer to is there; None when the pod ends first."""
        while not self._ending.is_set():
            try:
                await self.sandbox.mount()
                env = await self.sandbox.environment(container.spec, self._image)
                return self.sandbox.command(container.spec, env), env
            except NotMounted as error:
                await self._event("Warning", "FailedMount", str(error))
            except NotReady as error:
                container.state = {"waiting": {"reason": "CreateContainerConfigError", "message": str(error)}}
                await self._publish()
            await self._pause()
        return None

    async def _execute(self, container: Container, command: list[str], env: dict[str, str]) -> None:
        if self._ending.is_set():  # it began while we prepared; nothing is awaited from here to the launch
            return
        began, message_file = now(), self.sandbox.termination_file(container.spec)
        log_file = self.sandbox.own(container.name) / f"{container.restarts}.log"
        message_file.write_bytes(b"")
        container.process = launch(command, env, self.sandbox.folder, log_file)
        confine(container.process, container.spec)
        container.state = {"running": {"startedAt": began}}
        await self._publish()
        await self._event("Normal", "Started", f"Started container {container.name}")
        code = await exited(container.process)
        container.process = None
        message = last_words(container.spec, message_file, log_file, code)
        end = {"exitCode": code, "reason": "Error" if code else "Completed", "message": message}
        container.state = {"terminated": {**end, "startedAt": began, "finishedAt": now()}}
        await self._publish()

    async def _back_off(self, container: Container) -> None:
        container.last, container.restarts = container.state, container.restarts + 1
        message = f"back-off {self._backoff:g}s restarting failed container={container.name}"
        container.state = {"waiting": {"reason": "CrashLoopBackOff", "message": message}}
        await self._publish()
        await self._pause()

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), self._backoff)

    async def _event(self, kind: str, reason: str, message: str) -> None:
        await record(self._cluster, self.pod, kind, reason, message, component="kubelet")

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

    def _status(self) -> Object:
        phase = self._phase()
        self._set_conditions(phase)
        why = {"reason": self._verdict.reason, "message": self._verdict.message} if self.over and self._verdict else {}
        return {
            "phase": phase,
            "hostIP": "127.0.0.1",
            "podIP": "127.0.0.1",
            "startTime": self._start_time,
            "conditions": self._conditions,
            "containerStatuses": [container.status() for container in self._containers],
            **why,
        }

    def _phase(self) -> str:
        if self.over:
            done = self._verdict is None and all(c.exit_code == 0 for c in self._containers)
            return "Succeeded" if done else "Failed"
        return "Running" if all("waiting" not in c.state or c.last for c in self._containers) else "Pending"

    def _set_conditions(self, phase: str) -> None:
        unready = " ".join(c.name for c in self._containers if "running" not in c.state)
        reason = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(phase, "ContainersNotReady")
        message = f"containers with unready status: [{unready}]" if unready else ""
        set_condition(self._conditions, "PodScheduled", "True", "", "")
        set_condition(self._conditions, "Ready", str(not unready), reason if unready else "", message)
        if self._verdict and self._verdict.disruption:
            set_condition(self._conditions, "DisruptionTarget", "True", self._verdict.disruption, self._verdict.message)


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
    if process.poll() is None:  # from here it is ours to reap, so its id stays its own
        loop, done, pidfd = asyncio.get_running_loop(), asyncio.Event(), os.pidfd_open(process.pid)
        loop.add_reader(pidfd, done.set)
        try:
            await done.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
    code = process.wait()
    return code if code >= 0 else 128 - code


def last_words(container: Object, message_file: Path, log_file: Path, code: int) -> str:
    """The termination message: the file's content; the end of the log if asked for, failed, and the file is empty."""
    message = message_file.read_bytes()[:MESSAGE_BYTES] if message_file.is_file() else b""
    fallback = container.get("terminationMessagePolicy") == "FallbackToLogsOnError"
    if not message and fallback and code:
        tail = log_file.read_bytes()[-LOG_MESSAGE_BYTES:]
        message = b"".join(tail.splitlines(keepends=True)[-LOG_MESSAGE_LINES:])
    return message.decode(errors="replace")
