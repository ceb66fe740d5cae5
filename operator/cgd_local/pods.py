"""One pod's life as processes: volumes, init containers, containers, sidecars, its end, and its status all along.

Each container is a process tree below `launcher.py`, which ends as a whole. Where this machine allows it, the command
is PID 1 of its own namespace, with the pod's names (see `names`); elsewhere it is an ordinary process. Init containers
run one after another. An init container with `restartPolicy: Always` is a sidecar: it keeps running beside the next
containers, and ends after them. The containers run together, and the pod is over when all of them are over: a container
that somebody has injected keeps the pod alive.

Life and status are separate, as in a kubelet: the pod continues while its status is under way (`status_lag`), and of
several changes only the last may reach the API. A deleted pod disappears after the status of its end is written.

Left out: probes, postStart hooks, deadlines, limits (memory is neither reserved nor enforced, CPU only in whole cores),
growing pauses between restarts, an order among ending sidecars.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from cgd_local.controllers import now, record, set_condition, stop_task
from cgd_local.sandbox import NotMounted, NotReady, Sandbox
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import POD, ApiError

log = logging.getLogger(__name__)

LAUNCHER = Path(__file__).with_name("launcher.py")
MESSAGE_BYTES, LOG_MESSAGE_BYTES, LOG_MESSAGE_LINES = 4096, 2048, 80
EXIT_SECONDS, RETRY_SECONDS = 0.03, 0.5
OWN_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "mount", "--bind", "/etc/hosts", "/etc/hosts"]
"""Succeeds where a process may be PID 1 of its own namespace and mount there, which needs root."""
PASSING = (0, 409, 429, 500, 503)  # codes of an API server in trouble; 0: no answer
ANOTHER_POD = "UID in precondition"
"""Text in the answer about a deleted pod whose name another pod has taken."""
DISRUPTION = "DisruptionTarget"
UNKNOWN: Object = {
    "exitCode": 137,
    "reason": "ContainerStatusUnknown",
    "message": "The container could not be located when the pod was terminated",
}
"""The end of a container that never started, in a pod that is over."""
Namespace = Literal["own", "shared"]
"""The namespace of a command's process ids, see `launcher`."""
_turn = itertools.count()


@dataclass(frozen=True)
class Verdict:
    """Why the node itself ends a pod."""

    reason: str
    message: str
    is_disruption: bool = True
    """Whether the pod gets the condition DisruptionTarget: not if it has used more than it may."""


class Container:
    """One container of a pod: its process, its restarts, and its part of the status."""

    def __init__(self, spec: Object, sandbox: Sandbox, publish: Callable[[], None], waits: str) -> None:
        self.spec, self.name = spec, str(spec["name"])
        self.started = asyncio.Event()
        """Set when the container runs, or will never run."""
        self.over = False
        self.state: Object = {"waiting": {"reason": waits}}
        self.last_state: Object = {}
        self._restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._env: dict[str, str] = {}
        self._goodbye: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()
        self._sandbox, self._publish = sandbox, publish

    @property
    def exit_code(self) -> int | None:
        code: int | None = self.state.get("terminated", {}).get("exitCode")
        return code

    @property
    def is_sidecar(self) -> bool:
        return self.spec.get("restartPolicy") == "Always"

    @property
    def never_ran(self) -> bool:
        return "waiting" in self.state and not self.last_state

    async def live(self, policy: str, image: dict[str, str], backoff: float) -> None:
        """Run, and restart as the restart policy says, until the container is done or somebody ends it."""
        try:
            while ready := await self._prepared(image, backoff):
                await self._execute(*ready)
                if policy == "Never" or (policy == "OnFailure" and self.exit_code == 0):
                    return
                if not self._ending.is_set():
                    self.last_state, self._restarts = self.state, self._restarts + 1
                    self._wait("CrashLoopBackOff", f"back-off {backoff:g}s restarting failed container")
                    await pause(self._ending, backoff)
        finally:
            self.over = True
            self.started.set()

    def terminate(self) -> None:
        """Ask the container to end, without a restart."""
        if not self._ending.is_set() and self._process:
            self._goodbye = asyncio.create_task(self._ask(self._process))
        self._ending.set()

    async def _ask(self, process: subprocess.Popen[bytes]) -> None:
        """Send SIGTERM after the preStop hook."""
        hook = self.spec.get("lifecycle", {}).get("preStop", {}).get("exec")
        if hook and (entrance := await find_entrance(process)):
            command = [*entrance, *hook["command"]]
            execution = await asyncio.create_subprocess_exec(*command, env=self._env, cwd=self._sandbox.folder)
            await execution.wait()
        process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._ending.set()
        if self._process:
            self._process.send_signal(signal.SIGUSR1)

    async def vanish(self) -> None:
        """End at once, without a change of the status."""
        self.kill()
        if self._process:
            await exited(self._process)

    def status(self) -> Object:
        return {
            "name": self.name,
            "image": self.spec.get("image", ""),
            "imageID": "",
            "ready": "running" in self.state,
            "restartCount": self._restarts,
            "state": self.state,
            "lastState": self.last_state,
        }

    async def _prepared(self, image: dict[str, str], backoff: float) -> tuple[list[str], dict[str, str]] | None:
        """Command and environment, as soon as all objects exist that they refer to; None if somebody ends the container
        before that."""
        while not self._ending.is_set():
            try:
                env = await self._sandbox.environment(self.spec, image)
                self._sandbox.refuse_root(self.spec)
                command = self._sandbox.command(self.spec, env)
            except NotReady as error:
                self._wait("CreateContainerConfigError", str(error))
            else:
                return None if self._ending.is_set() else (command, env)
            await pause(self._ending, backoff)
        return None

    async def _execute(self, command: list[str], env: dict[str, str]) -> None:
        began, log_file = now(), self._sandbox.logs(self.name) / f"{self._restarts}.log"
        message_file = self._sandbox.termination_file(self.name)
        message_file.write_bytes(b"")
        self._env = env
        hosts = self._sandbox.hosts if pod_namespace() == "own" else None
        self._process = launch(command, env, self._sandbox.folder, log_file, hosts=hosts)
        confine(self._process, self.spec)
        self.state = {"running": {"startedAt": began}}
        self.started.set()
        self._publish()
        code = await exited(self._process)
        self._process = None
        message = last_words(self.spec, message_file, log_file, code)
        end = {"exitCode": code, "reason": "Error" if code else "Completed", "message": message}
        self.state = {"terminated": {**end, "startedAt": began, "finishedAt": now()}}
        self._publish()

    def _wait(self, reason: str, message: str) -> None:
        self.state = {"waiting": {"reason": reason, "message": message}}
        self._publish()

    def settle(self) -> None:
        """Give a container that waits for a start or a restart its end: its pod is over."""
        if "terminated" not in self.state:
            self.state = self.last_state or {"terminated": UNKNOWN}


class PodRunner:
    """Runs a pod of this node, from its volumes to its last status."""

    def __init__(
        self,
        cluster: Cluster,
        pod: Object,
        sandbox: Sandbox,
        *,
        image: dict[str, str],
        backoff: float,
        status_lag: float = 0,
    ) -> None:
        self.pod, self.sandbox, self.over = pod, sandbox, False
        self.reported = False
        """Whether the API has the status of the pod's end, or will never have it."""
        self.namespace, self.name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        self._cluster, self._image, self._backoff = cluster, image, backoff
        self._policy = str(pod["spec"].get("restartPolicy", "Always"))
        self._status_lag, self._changed = status_lag, asyncio.Event()
        first = pod["spec"].get("initContainers") or []
        waits = "PodInitializing" if first else "ContainerCreating"
        self._init = [Container(spec, sandbox, self._changed.set, waits) for spec in first]
        self._main = [Container(spec, sandbox, self._changed.set, waits) for spec in pod["spec"]["containers"]]
        self._sidecars: list[asyncio.Task[None]] = []
        self._conditions: list[Object] = []
        self._start_time = now()
        self._ending = asyncio.Event()
        self._verdict: Verdict | None = None
        self._writer = asyncio.create_task(self._write_statuses(), name=f"status of pod {self.name}")
        self.task = asyncio.create_task(self._run(), name=f"pod {self.name}")

    def container(self, name: str) -> Container | None:
        return next((container for container in self._all if container.name == name), None)

    @property
    def _all(self) -> list[Container]:
        return [*self._init, *self._main]

    def end(self, grace: float, verdict: Verdict | None = None) -> None:
        """Send SIGTERM now, SIGKILL after the grace period; of two calls the earlier end wins. Sidecars get their
        SIGTERM when the other containers are over."""
        self._verdict = self._verdict or verdict
        if not self._ending.is_set() and grace > 0:
            for container in self._all:
                if not container.is_sidecar:
                    container.terminate()
        self._ending.set()
        asyncio.get_running_loop().call_later(grace, self._kill)

    def heed(self, pod: Object) -> None:
        """Keep a disruption that somebody else has written into the status, as a kubelet does."""
        for entry in pod.get("status", {}).get("conditions") or []:
            if entry["type"] == DISRUPTION and not any(own["type"] == DISRUPTION for own in self._conditions):
                self._conditions.append(entry)
                self._changed.set()

    async def crash(self) -> None:
        """End the processes, as when the node loses its power, and leave the status as it is."""
        for task in (self.task, self._writer, *self._sidecars):
            await stop_task(task)
        for container in self._all:
            await container.vanish()

    def _kill(self) -> None:
        for container in self._all:
            container.kill()

    async def _run(self) -> None:
        try:
            self._changed.set()
            if await self._mounted() and await self._initialize():
                lives = (container.live(self._policy, self._image, self._backoff) for container in self._main)
                await asyncio.gather(*lives)
            for container in self._init:
                if container.is_sidecar:
                    container.terminate()
            if self._sidecars:
                grace = float(self.pod["spec"].get("terminationGracePeriodSeconds", 30))
                asyncio.get_running_loop().call_later(grace, self._kill)
                await asyncio.gather(*self._sidecars)
        except Exception:
            log.exception("the node could not run pod %s/%s", self.namespace, self.name)
        finally:
            self._kill()
        self._settle()
        self.over = True
        self._changed.set()
        await self._writer

    def _settle(self) -> None:
        """Give an end to containers that have none: to each init container that the pod has reached, and to the main
        containers if the pod has passed its init containers."""
        started = [number for number, container in enumerate(self._init) if not container.never_ran]
        for container in self._init[: max(started, default=0) + 1]:
            container.settle()
        main_started = not all(container.never_ran for container in self._main)
        past_init = not self._init or self._init[-1].exit_code == 0 or main_started
        for container in self._main if past_init else ():
            container.settle()

    async def _mounted(self) -> bool:
        """Wait until the volumes are mounted. False if the pod ends before that."""
        while not self._ending.is_set():
            try:
                await self.sandbox.mount()
            except NotMounted as error:
                await record(self._cluster, self.pod, "Warning", "FailedMount", str(error), component="kubelet")
                await pause(self._ending, self._backoff)
            else:
                return not self._ending.is_set()
        return False

    async def _initialize(self) -> bool:
        """Run the init containers one after another, sidecars beside the next ones. True if the others may start."""
        for container in self._init:
            if self._ending.is_set():
                return False
            if container.is_sidecar:
                life = container.live("Always", self._image, self._backoff)
                self._sidecars.append(asyncio.create_task(life))
                await container.started.wait()
            else:
                policy = "Never" if self._policy == "Never" else "OnFailure"
                await container.live(policy, self._image, self._backoff)
                if container.exit_code != 0:
                    return False
        return not self._ending.is_set()

    async def _write_statuses(self) -> None:
        """Write the current status some time after each change. After the last status, remove a deleted pod."""
        while not self.reported:
            await self._changed.wait()
            await asyncio.sleep(self._status_lag)
            self._changed.clear()
            self.reported = await self._write()
        try:  # the node removes a pod whose deletion comes later
            pod = await self._cluster.get(POD, self.name, self.namespace)
            if pod and pod["metadata"]["uid"] == self.pod["metadata"]["uid"] and "deletionTimestamp" in pod["metadata"]:
                await remove(self._cluster, pod)
        except ApiError as error:
            log.warning("pod %s/%s stays until the node sees it again: %s", self.namespace, self.name, error)

    async def _write(self) -> bool:
        """Write the status until the API takes it. True if it was the status of the pod's end. The pod continues while
        the API is away, and ends when the API says that it no longer exists."""
        while True:
            body, last = {"metadata": {"uid": self.pod["metadata"]["uid"]}, "status": self._status()}, self.over
            try:
                stored = await self._cluster.patch(POD, self.name, self.namespace, body, subresource="status")
            except ApiError as error:
                stored = None
                if ANOTHER_POD not in error.message:
                    if error.status not in PASSING:
                        log.warning("the API refused the status of pod %s/%s: %s", self.namespace, self.name, error)
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
            if stored is None:
                self.end(0)
            return last

    def _status(self) -> Object:
        if self.over:
            succeeded = self._verdict is None and all(container.exit_code == 0 for container in self._main)
            phase = "Succeeded" if succeeded else "Failed"
        else:
            phase = "Pending" if any(container.never_ran for container in self._main) else "Running"
        ready = all("running" in container.state for container in self._main)
        reason = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(phase, "ContainersNotReady")
        set_condition(self._conditions, "PodScheduled", "True", "", "")
        set_condition(self._conditions, "Ready", str(ready), "" if ready else reason, "")
        if self._verdict and self._verdict.is_disruption and self.over:
            set_condition(self._conditions, DISRUPTION, "True", "TerminationByKubelet", self._verdict.message)
        init = {"initContainerStatuses": [container.status() for container in self._init]} if self._init else {}
        return {
            "phase": phase,
            "podIP": "127.0.0.1",
            "startTime": self._start_time,
            "conditions": self._conditions,
            **init,
            "containerStatuses": [container.status() for container in self._main],
        } | ({"reason": self._verdict.reason, "message": self._verdict.message} if self.over and self._verdict else {})


async def remove(cluster: Cluster, pod: Object) -> None:
    """Delete the object, the last step of a deletion: the pod has no processes any more."""
    meta = pod["metadata"]
    try:
        await cluster.delete(POD, meta["name"], meta["namespace"], uid=meta["uid"], grace=0)
    except ApiError as error:
        if error.status != 409:  # 409: somebody has deleted it, and another pod has its name
            raise


async def pause(ending: asyncio.Event, seconds: float) -> None:
    """Wait, but not beyond the end of the pod."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(ending.wait(), seconds)


@lru_cache
def pod_namespace() -> Namespace:
    """Own, so that a container's command is PID 1, where this machine allows it; shared elsewhere."""
    try:
        allowed = not subprocess.run(OWN_NAMESPACE, stderr=subprocess.DEVNULL, check=False).returncode
    except FileNotFoundError:
        return "shared"
    return "own" if allowed else "shared"


def launch(
    command: list[str], env: dict[str, str], folder: Path, log_file: Path, *, hosts: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that ends with this one. SIGTERM reaches the command; SIGUSR1 kills it and all processes that it
    has started. With `hosts` it gets its own namespace, where that file is /etc/hosts."""
    launcher = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), str(hosts or "shared")]
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
    """Pin a container with a CPU limit of whole cores to as many cores, in turn: programs count them for threads."""
    limit = str(container.get("resources", {}).get("limits", {}).get("cpu", ""))
    cores = sorted(os.sched_getaffinity(0))
    if limit.isdigit() and 0 < int(limit) < len(cores):
        first = next(_turn) * int(limit)
        with contextlib.suppress(ProcessLookupError):  # the process has ended already
            os.sched_setaffinity(process.pid, {cores[(first + n) % len(cores)] for n in range(int(limit))})


async def find_entrance(process: subprocess.Popen[bytes]) -> list[str] | None:
    """The prefix that runs a command in a container's namespaces; None if it has none of its own, or has ended."""
    while pod_namespace() == "own" and process.poll() is None:
        if first := first_process(process.pid):
            return ["nsenter", "--target", first, "--pid", "--mount"]
        await asyncio.sleep(EXIT_SECONDS)
    return None


def first_process(launcher: int) -> str | None:
    """The id, in our namespace, of a container's PID 1, as soon as it has its own /proc."""
    with contextlib.suppress(OSError, IndexError):
        first = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()[0]
        if Path(f"/proc/{first}/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink():
            return first
    return None


async def exited(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process without a thread; 128 + signal for one that was killed."""
    while (code := process.poll()) is None:  # noqa: ASYNC110  no task of this loop ends it
        await asyncio.sleep(EXIT_SECONDS)
    return code if code >= 0 else 128 - code


def last_words(container: Object, message_file: Path, log_file: Path, code: int) -> str:
    """The termination message: the file's content. If that is empty, the container has failed and its spec asks for the
    log, the end of the log."""
    message = message_file.read_bytes()[:MESSAGE_BYTES] if message_file.is_file() else b""
    fallback = container.get("terminationMessagePolicy") == "FallbackToLogsOnError"
    if not message and fallback and code:
        tail = log_file.read_bytes()[-LOG_MESSAGE_BYTES:]
        message = b"".join(tail.splitlines(keepends=True)[-LOG_MESSAGE_LINES:])
    return message.decode(errors="replace")
