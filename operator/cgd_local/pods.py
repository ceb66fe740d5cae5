"""One pod's life as processes: volumes, init containers, containers, restarts, its end, and its status all along.

Each container is a process tree below `launcher.py`, so that ending it ends all of it. Left out: probes, lifecycle
hooks, limits (memory is neither reserved nor enforced, CPU only in whole cores), ephemeral and sidecar containers.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from cgd_local.controllers import forever, now, record, set_condition
from cgd_local.sandbox import NotReady, Sandbox
from cgd_operator.cluster import POD, ApiError, Cluster, Object

log = logging.getLogger(__name__)

LAUNCHER = Path(__file__).with_name("launcher.py")
RESTART_BACKOFF_LIMIT = 300.0
MESSAGE_BYTES, LOG_MESSAGE_BYTES, LOG_MESSAGE_LINES = 4096, 2048, 80


_turn = itertools.count()


@dataclass(frozen=True)
class Pace:
    """How long the node waits before it looks or tries again, in seconds."""

    retry: float = 1.0  # for what a pod waits for: a Secret, a ConfigMap
    housekeeping: float = 1.0  # between looks at deadlines and the size of emptyDirs
    restart: float = 10.0  # the second restart of a container; the first comes at once, each further one after double


@dataclass(frozen=True)
class Verdict:
    """Why the node itself ends a pod. `disruption` is the reason of the DisruptionTarget condition, if it is one."""

    reason: str
    message: str
    disruption: str = ""


@dataclass
class Container:
    spec: Object
    state: Object
    last: Object = field(default_factory=dict)
    restarts: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    @property
    def exit_code(self) -> int | None:
        terminated = self.state.get("terminated")
        return None if terminated is None else int(terminated["exitCode"])

    @property
    def started(self) -> bool:
        return "waiting" not in self.state or bool(self.last)

    def status(self) -> Object:
        return {
            "name": self.name,
            "image": self.spec.get("image", ""),
            "imageID": "",
            "containerID": f"process://{self.process.pid}" if self.process else "",
            "ready": "running" in self.state,
            "started": "running" in self.state,
            "restartCount": self.restarts,
            "state": self.state,
            "lastState": self.last,
        }


class PodRunner:
    """Runs one pod that is bound to this node, from its volumes to its last status."""

    def __init__(self, cluster: Cluster, pod: Object, sandbox: Sandbox, image: dict[str, str], pace: Pace) -> None:
        self.cluster, self.pod, self.sandbox = cluster, pod, sandbox
        self._image, self._pace = image, pace
        spec, waiting = pod["spec"], "PodInitializing" if pod["spec"].get("initContainers") else "ContainerCreating"
        self._init = [Container(c, {"waiting": {"reason": waiting}}) for c in spec.get("initContainers") or []]
        self._main = [Container(c, {"waiting": {"reason": waiting}}) for c in spec["containers"]]
        self._restart_policy = str(spec.get("restartPolicy", "Always"))
        self._start_time = now()
        self._ending = asyncio.Event()
        self._verdict: Verdict | None = None
        self._kill_at: float | None = None
        self._over = False
        self._initialized = not self._init
        self._enders: set[asyncio.Task[None]] = set()
        self.task = asyncio.create_task(self._run(), name=f"pod {self.name}")

    @property
    def name(self) -> str:
        return str(self.pod["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.pod["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        return str(self.pod["metadata"]["uid"])

    @property
    def over(self) -> bool:
        return self._over

    def container(self, name: str) -> Container | None:
        return next((c for c in self._init + self._main if c.name == name), None)

    def seen(self, pod: Object) -> None:
        """Take notice of a change of the pod; a deletion starts its end."""
        self.pod = pod
        if "deletionTimestamp" in pod["metadata"]:
            grace = pod["metadata"].get("deletionGracePeriodSeconds")
            self.end(float(pod["spec"].get("terminationGracePeriodSeconds", 30) if grace is None else grace))

    def end(self, grace: float, verdict: Verdict | None = None) -> None:
        """SIGTERM now, SIGKILL after the grace period. Asked again, the earlier end wins."""
        kill_at = time.monotonic() + grace
        if self._kill_at is not None and kill_at >= self._kill_at:
            return
        self._kill_at, self._verdict = kill_at, self._verdict or verdict
        ender = asyncio.create_task(self._end(grace))
        self._enders.add(ender)
        ender.add_done_callback(self._enders.discard)

    async def _end(self, grace: float) -> None:
        first = not self._ending.is_set()
        self._ending.set()
        if first and grace > 0:
            self._signal(signal.SIGTERM)
            for container in self._init + self._main:
                if container.process:
                    await self._event("Normal", "Killing", f"Stopping container {container.name}")
        await asyncio.wait([self.task], timeout=grace)
        self._signal(signal.SIGUSR1)

    def _signal(self, number: signal.Signals) -> None:
        for container in self._init + self._main:
            if container.process:
                container.process.send_signal(number)

    async def _run(self) -> None:
        guard = asyncio.create_task(forever(f"guard of pod {self.name}", self._guard))
        try:
            await self._live()
        except Exception:
            log.exception("pod %s/%s failed in the node itself", self.namespace, self.name)
            self._verdict = self._verdict or Verdict("NodeError", "the local node failed; see its log")
        finally:
            guard.cancel()
            self._signal(signal.SIGUSR1)
        self._over = True
        await self._publish()
        if "deletionTimestamp" in self.pod["metadata"]:
            await remove(self.cluster, self.pod)

    async def _live(self) -> None:
        await self._publish()
        if not await self._eventually(self.sandbox.mount, self._mount_failed):
            return
        for container in self._init:
            await self._keep(container, init=True)
            if container.exit_code != 0:
                return
        self._initialized = True
        for container in self._main:
            container.state = {"waiting": {"reason": "ContainerCreating"}}
        async with asyncio.TaskGroup() as group:
            for container in self._main:
                group.create_task(self._keep(container, init=False))

    async def _mount_failed(self, message: str) -> None:
        await self._event("Warning", "FailedMount", message)

    async def _eventually(
        self, attempt: Callable[[], Awaitable[None]], failed: Callable[[str], Awaitable[None]]
    ) -> bool:
        """Try until it works; False when the pod ends first."""
        while not self._ending.is_set():
            try:
                await attempt()
            except NotReady as error:
                await failed(str(error))
                await self._pause(self._pace.retry)
            else:
                return True
        return False

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), seconds)

    async def _keep(self, container: Container, *, init: bool) -> None:
        """Run a container, and again as the restart policy says, until it is done or the pod ends."""
        while not self._ending.is_set():
            await self._once(container)
            code = container.exit_code
            policy = "OnFailure" if init and self._restart_policy == "Always" else self._restart_policy
            if code is None or policy == "Never" or (policy == "OnFailure" and code == 0):
                return
            if not self._ending.is_set():
                await self._back_off(container)

    async def _back_off(self, container: Container) -> None:
        container.last, container.restarts = container.state, container.restarts + 1
        if container.restarts == 1:
            return
        delay = min(self._pace.restart * 2.0 ** (container.restarts - 2), RESTART_BACKOFF_LIMIT)
        where = f"container={container.name} pod={self.name}_{self.namespace}({self.uid})"
        container.state = {
            "waiting": {"reason": "CrashLoopBackOff", "message": f"back-off {delay:g}s restarting failed {where}"}
        }
        await self._publish()
        await self._event(
            "Warning", "BackOff", f"Back-off restarting failed container {container.name} in pod {self.name}"
        )
        await self._pause(delay)
        if self._ending.is_set():
            container.state = container.last

    async def _once(self, container: Container) -> None:
        env: dict[str, str] = {}

        async def configure() -> None:
            env.update(await self.sandbox.environment(container.spec, self._image))

        async def failed(message: str) -> None:
            container.state = {"waiting": {"reason": "CreateContainerConfigError", "message": message}}
            await self._publish()
            await self._event("Warning", "Failed", f"Error: {message}")

        if await self._eventually(configure, failed):
            await self._execute(container, env)

    async def _execute(self, container: Container, env: dict[str, str]) -> None:
        began, command = now(), self.sandbox.command(container.spec, env)
        folder, message_file = (
            self.sandbox.working_folder(container.spec),
            self.sandbox.termination_file(container.spec),
        )
        message_file.write_bytes(b"")
        if problem := unstartable(command, env, folder):
            container.state = _terminated("StartError", 128, began, problem)
            await self._publish()
            await self._event("Warning", "Failed", f"Error: {problem}")
            return
        if self._ending.is_set():  # it began while we prepared; nothing is awaited from here to the launch
            return
        log_file = self.sandbox.own(container.name) / f"{container.restarts}.log"
        container.process = launch(command, env, folder, log_file)
        confine(container.process, container.spec)
        container.state = {"running": {"startedAt": began}}
        ended = asyncio.create_task(exited(container.process))
        try:
            await self._publish()
            await self._event("Normal", "Started", f"Started container {container.name}")
            code = await ended
        finally:
            ended.cancel()
        container.process = None
        message = last_words(container.spec, message_file, log_file, code)
        container.state = _terminated("Completed" if code == 0 else "Error", code, began, message)
        await self._publish()

    async def _guard(self) -> None:
        """End the pod when a volume outgrows its limit or the pod its deadline."""
        deadline = self.pod["spec"].get("activeDeadlineSeconds")
        due = time.monotonic() + float(deadline) if deadline is not None else None
        while not self._ending.is_set():
            await self._pause(self._pace.housekeeping)
            if due is not None and time.monotonic() >= due:
                message = "Pod was active on the node longer than the specified deadline"
                self.end(0, Verdict("DeadlineExceeded", message))
            elif problem := await asyncio.to_thread(self.sandbox.overfull):
                self.end(0, Verdict("Evicted", problem, "TerminationByKubelet"))
                await self._event("Warning", "Evicted", problem)

    async def _event(self, kind: str, reason: str, message: str) -> None:
        try:
            await record(self.cluster, self.pod, kind, reason, message, component="kubelet")
        except ApiError as error:  # an Event is a courtesy; the status is the promise
            log.warning("no event %s for pod %s: %s", reason, self.name, error)

    async def _publish(self) -> None:
        """Write the status. The pod lives on while the API is away; it ends when the API says the pod is gone."""
        while True:
            body = {"status": self._status()}
            try:
                found = await self.cluster.patch(POD, self.name, self.namespace, body, subresource="status")
            except ApiError as error:
                if self._over or error.status not in (0, 409, 429, 500, 503):
                    log.warning("status of pod %s/%s was refused: %s", self.namespace, self.name, error)
                    return
                await asyncio.sleep(0.5)
            else:
                if found is None:
                    self.end(0)
                return

    def _status(self) -> Object:
        status: Object = {
            "phase": self._phase(),
            "hostIP": "127.0.0.1",
            "podIP": "127.0.0.1",
            "podIPs": [{"ip": "127.0.0.1"}],
            "startTime": self._start_time,
            "conditions": self._conditions(),
            "containerStatuses": [c.status() for c in self._main],
        }
        if self._init:
            status["initContainerStatuses"] = [c.status() for c in self._init]
        if self._over and self._verdict:
            status |= {"reason": self._verdict.reason, "message": self._verdict.message}
        return status

    def _phase(self) -> str:
        if self._over:
            done = self._verdict is None and all(c.exit_code == 0 for c in self._main)
            return "Succeeded" if done else "Failed"
        return "Running" if self._initialized and all(c.started for c in self._main) else "Pending"

    def _conditions(self) -> list[Object]:
        conditions = [dict(c) for c in self.pod.get("status", {}).get("conditions") or []]
        unready = " ".join(c.name for c in self._main if "running" not in c.state)
        set_condition(conditions, "PodScheduled", "True", "", "")
        if self._initialized:
            set_condition(conditions, "Initialized", "True", "PodCompleted" if self._over else "", "")
        else:
            names = " ".join(c.name for c in self._init if c.exit_code != 0)
            message = f"containers with incomplete status: [{names}]"
            set_condition(conditions, "Initialized", "False", "ContainersNotInitialized", message)
        reason = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(self._phase(), "ContainersNotReady")
        for kind in ("ContainersReady", "Ready"):
            if unready:
                set_condition(conditions, kind, "False", reason, f"containers with unready status: [{unready}]")
            else:
                set_condition(conditions, kind, "True", "", "")
        if self._verdict and self._verdict.disruption:
            set_condition(conditions, "DisruptionTarget", "True", self._verdict.disruption, self._verdict.message)
        self.pod.setdefault("status", {})["conditions"] = conditions
        return conditions


async def remove(cluster: Cluster, pod: Object) -> None:
    """The last step of a deletion: its processes are gone, so the object goes too."""
    meta = pod["metadata"]
    try:
        await cluster.delete(POD, meta["name"], meta["namespace"], uid=meta["uid"], grace=0)
    except ApiError as error:
        if error.status != 409:  # 409: gone already, and another pod has its name
            raise


def _terminated(reason: str, code: int, began: str, message: str) -> Object:
    state: Object = {"exitCode": code, "reason": reason, "startedAt": began, "finishedAt": now()}
    if code > 128 and reason == "Error":
        state["signal"] = code - 128
    return {"terminated": state | ({"message": message} if message else {})}


def unstartable(command: list[str], env: dict[str, str], folder: Path) -> str:
    """Why a command cannot be started, in the words of the container runtime; empty when it can."""
    if not command:
        return "no command specified"
    name = command[0]
    if "/" not in name:
        if shutil.which(name, path=env.get("PATH", os.defpath)):
            return ""
        problem = f'exec: "{name}": executable file not found in $PATH'
    elif not (folder / name).exists():
        problem = f'exec: "{name}": stat {name}: no such file or directory'
    elif os.access(folder / name, os.X_OK) and not (folder / name).is_dir():
        return ""
    else:
        problem = f'exec: "{name}": permission denied'
    return f"failed to create containerd task: unable to start container process: {problem}: unknown"


def launch(command: list[str], env: dict[str, str], folder: Path, log_file: Path) -> subprocess.Popen[bytes]:
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
