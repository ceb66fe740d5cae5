"""One pod's life as processes: volumes, init containers, containers, sidecars, its end, and its status all along.

Each container is a process tree below `launcher.py`, so that ending it ends all of it; its command is PID 1 of a
namespace of its own where this machine allows that, with names of its own (see `names`), and a process like any other
elsewhere. Init containers run one after another; one with `restartPolicy: Always` is a sidecar, which runs on beside
what follows and is ended after it. The containers run together, and the pod is over when all of them are: one that
somebody has put beside ours keeps it.

Life and status are apart, as in a kubelet: what happens goes on while its status is on the way (`status_lag`), and of
several changes the last one alone may reach the API. A pod that is deleted goes when the status of its end is written.

Left out: probes, postStart hooks, deadlines, limits (memory is neither reserved nor enforced, CPU only in whole cores),
growing pauses between restarts, the end of sidecars one after another.
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
"""Succeeds where a process may be PID 1 of a namespace of its own and mount there, for which one must be root."""
PASSING = (0, 409, 429, 500, 503)  # what an API server answers, or does not, while it is in trouble
ANOTHER_POD = "UID in precondition"
"""In the answer about a pod that is gone while another has its name."""
UNKNOWN: Object = {
    "exitCode": 137,
    "reason": "ContainerStatusUnknown",
    "message": "The container could not be located when the pod was terminated",
}
"""The end of a container that never began, of a pod that is over."""
Namespace = Literal["own", "shared"]
"""Of a command's process ids, see `launcher`."""
_turn = itertools.count()


@dataclass(frozen=True)
class Verdict:
    """Why the node itself disrupts a pod."""

    reason: str
    message: str


class Container:
    """One container of a pod: its process, its restarts, and what the status says of it."""

    def __init__(self, spec: Object, sandbox: Sandbox, publish: Callable[[], None], waits: str) -> None:
        self.spec, self.name = spec, str(spec["name"])
        self.started = asyncio.Event()
        """It runs, or never will."""
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
        """Run, and again as the restart policy says, until it is done or is ended."""
        try:
            while ready := await self._prepared(image, backoff):
                await self._execute(*ready)
                if policy == "Never" or (policy == "OnFailure" and self.exit_code == 0):
                    return
                if not self._ending.is_set():
                    await self._back_off(backoff)
        finally:
            self.over = True
            self.started.set()

    def terminate(self) -> None:
        """Ask it to end, which is no failure to begin again after."""
        if not self._ending.is_set() and self._process:
            self._goodbye = asyncio.create_task(self._ask(self._process))
        self._ending.set()

    async def _ask(self, process: subprocess.Popen[bytes]) -> None:
        """SIGTERM, once the preStop hook is over."""
        hook = self.spec.get("lifecycle", {}).get("preStop", {}).get("exec")
        if hook and (inside := await entrance(process)):
            ran = await asyncio.create_subprocess_exec(
                *inside, *hook["command"], env=self._env, cwd=self._sandbox.folder
            )
            await ran.wait()
        process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._ending.set()
        self.signal(signal.SIGUSR1)

    def signal(self, number: signal.Signals) -> None:
        if self._process:
            self._process.send_signal(number)

    async def vanish(self) -> None:
        """Gone at once, and nothing is said of it."""
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
        """Command and environment, once all they refer to is there; None when it is ended first."""
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

    async def _back_off(self, backoff: float) -> None:
        self.last_state, self._restarts = self.state, self._restarts + 1
        self._wait("CrashLoopBackOff", f"back-off {backoff:g}s restarting failed container")
        await pause(self._ending, backoff)

    def _wait(self, reason: str, message: str) -> None:
        self.state = {"waiting": {"reason": reason, "message": message}}
        self._publish()

    def settle(self) -> None:
        """Its pod is over: what waits, or waited to begin again, will not."""
        if "terminated" not in self.state:
            self.state = self.last_state or {"terminated": UNKNOWN}


class PodRunner:
    """Runs one pod that is bound to this node, from its volumes to its last status."""

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
        self.told = False
        """The API has the status of its end, or never will."""
        self.namespace, self.name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        self._cluster, self._image, self._backoff = cluster, image, backoff
        first = pod["spec"].get("initContainers") or []
        waits = "PodInitializing" if first else "ContainerCreating"
        self._init = [Container(one, sandbox, self._publish, waits) for one in first]
        self._main = [Container(one, sandbox, self._publish, waits) for one in pod["spec"]["containers"]]
        self._sidecars: list[asyncio.Task[None]] = []
        self._conditions: list[Object] = []
        self._start_time = now()
        self._ending = asyncio.Event()
        self._verdict: Verdict | None = None
        self._status_lag, self._changed = status_lag, asyncio.Event()
        self._teller = asyncio.create_task(self._tell(), name=f"status of pod {self.name}")
        self.task = asyncio.create_task(self._run(), name=f"pod {self.name}")

    def container(self, name: str) -> Container | None:
        return next((one for one in self._all if one.name == name), None)

    @property
    def _all(self) -> list[Container]:
        return [*self._init, *self._main]

    def end(self, grace: float, verdict: Verdict | None = None) -> None:
        """SIGTERM now, SIGKILL after the grace period. Asked again, the earlier end wins. Sidecars have theirs when
        the others are over."""
        self._verdict = self._verdict or verdict
        if not self._ending.is_set() and grace > 0:
            for container in self._all:
                if not container.is_sidecar:
                    container.terminate()
        self._ending.set()
        asyncio.get_running_loop().call_later(grace, self._kill)

    async def crash(self) -> None:
        """The pod of a node that has lost its power: its processes are gone, and its status stays as it was."""
        for task in (self.task, self._teller, *self._sidecars):
            await stop_task(task)
        for container in self._all:
            await container.vanish()

    def _kill(self) -> None:
        for container in self._all:
            container.kill()

    async def _run(self) -> None:
        try:
            self._publish()
            if await self._mounted() and await self._initialize():
                await asyncio.gather(*(self._live(one, self._policy) for one in self._main))
            await self._end_sidecars()
        except Exception:
            log.exception("pod %s/%s failed in the node itself", self.namespace, self.name)
        finally:
            self._kill()
        self._settle()
        self.over = True
        self._publish()
        await self._teller

    def _settle(self) -> None:
        """Give an end to containers that have none: to the others unless the pod never came past its init containers,
        and to init containers as far as it came."""
        begun = [number for number, container in enumerate(self._init) if not container.never_ran]
        for container in self._init[: max(begun, default=0) + 1]:
            container.settle()
        past_init = not self._init or self._init[-1].exit_code == 0 or not all(one.never_ran for one in self._main)
        for container in self._main if past_init else ():
            container.settle()

    @property
    def _policy(self) -> str:
        return str(self.pod["spec"].get("restartPolicy", "Always"))

    async def _live(self, container: Container, policy: str) -> None:
        await container.live(policy, self._image, self._backoff)

    async def _mounted(self) -> bool:
        """Whether the volumes are there, for which it waits; not when the pod ends first."""
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
        """Run the init containers one after another, sidecars beside what follows. Whether the others may start."""
        for container in self._init:
            if self._ending.is_set():
                return False
            if container.is_sidecar:
                self._sidecars.append(asyncio.create_task(self._live(container, "Always")))
                await container.started.wait()
            else:
                await self._live(container, "Never" if self._policy == "Never" else "OnFailure")
                if container.exit_code != 0:
                    return False
        return not self._ending.is_set()

    async def _end_sidecars(self) -> None:
        grace = float(self.pod["spec"].get("terminationGracePeriodSeconds", 30))
        for container in self._init:
            if container.is_sidecar:
                container.terminate()
        if self._sidecars:
            asyncio.get_running_loop().call_later(grace, self._kill)
            await asyncio.gather(*self._sidecars)

    def _publish(self) -> None:
        self._changed.set()

    async def _tell(self) -> None:
        """Write the status some time after it has changed, as it is by then. After the last one the pod may go."""
        while not self.told:
            await self._changed.wait()
            await asyncio.sleep(self._status_lag)
            self._changed.clear()
            self.told = await self._write()
        try:  # its node does so where the deletion comes later
            pod = await self._cluster.get(POD, self.name, self.namespace)
            if pod and pod["metadata"]["uid"] == self.pod["metadata"]["uid"] and "deletionTimestamp" in pod["metadata"]:
                await remove(self._cluster, pod)
        except ApiError as error:
            log.warning("pod %s/%s was not removed, and is when it is seen again: %s", self.namespace, self.name, error)

    async def _write(self) -> bool:
        """Write the status, again until it is taken; whether it was that of the pod's end. The pod lives on while the
        API is away; it ends when the API says that it is gone."""
        while True:
            body, last = {"metadata": {"uid": self.pod["metadata"]["uid"]}, "status": self._status()}, self.over
            try:
                is_there = await self._cluster.patch(POD, self.name, self.namespace, body, subresource="status")
            except ApiError as error:
                is_there = None
                if ANOTHER_POD not in error.message:
                    if error.status not in PASSING:
                        log.warning("status of pod %s/%s was refused: %s", self.namespace, self.name, error)
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
            if is_there is None:
                self.end(0)
            return last

    def _phase(self) -> str:
        if self.over:
            done = self._verdict is None and all(one.exit_code == 0 for one in self._main)
            return "Succeeded" if done else "Failed"
        return "Pending" if any(one.never_ran for one in self._main) else "Running"

    def _status(self) -> Object:
        phase = self._phase()
        ready = all("running" in one.state for one in self._main)
        reason = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(phase, "ContainersNotReady")
        set_condition(self._conditions, "PodScheduled", "True", "", "")
        set_condition(self._conditions, "Ready", str(ready), "" if ready else reason, "")
        if self._verdict and self.over:
            set_condition(self._conditions, "DisruptionTarget", "True", "TerminationByKubelet", self._verdict.message)
        init = {"initContainerStatuses": [one.status() for one in self._init]} if self._init else {}
        return {
            "phase": phase,
            "podIP": "127.0.0.1",
            "startTime": self._start_time,
            "conditions": self._conditions,
            **init,
            "containerStatuses": [one.status() for one in self._main],
        } | (vars(self._verdict) if self.over and self._verdict else {})


async def remove(cluster: Cluster, pod: Object) -> None:
    """The last step of a deletion: its processes are gone, so the object goes too."""
    meta = pod["metadata"]
    try:
        await cluster.delete(POD, meta["name"], meta["namespace"], uid=meta["uid"], grace=0)
    except ApiError as error:
        if error.status != 409:  # 409: gone already, and another pod has its name
            raise


async def pause(ending: asyncio.Event, seconds: float) -> None:
    """So long, unless the end comes first."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(ending.wait(), seconds)


@lru_cache
def pod_namespace() -> Namespace:
    """A container's command is PID 1 where this machine lets it, and else a process like any other."""
    try:
        allowed = not subprocess.run(OWN_NAMESPACE, stderr=subprocess.DEVNULL, check=False).returncode
    except FileNotFoundError:
        return "shared"
    return "own" if allowed else "shared"


def launch(
    command: list[str], env: dict[str, str], folder: Path, log_file: Path, *, hosts: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that ends with this one. SIGTERM reaches the command; SIGUSR1 kills all that it has started. With
    `hosts` it has a namespace of its own, where that file is /etc/hosts."""
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
    """A CPU limit of whole cores becomes as many cores, given out in turn: programs count theirs to set up threads."""
    limit = str(container.get("resources", {}).get("limits", {}).get("cpu", ""))
    cores = sorted(os.sched_getaffinity(0))
    if limit.isdigit() and 0 < int(limit) < len(cores):
        first = next(_turn) * int(limit)
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process.pid, {cores[(first + n) % len(cores)] for n in range(int(limit))})


async def entrance(process: subprocess.Popen[bytes]) -> list[str] | None:
    """What runs a command beside a container's, in its namespaces; None where it has none of its own, or has ended."""
    while pod_namespace() == "own" and process.poll() is None:
        if first := first_process(process.pid):
            return ["nsenter", "--target", first, "--pid", "--mount"]
        await asyncio.sleep(EXIT_SECONDS)
    return None


def first_process(launcher: int) -> str | None:
    """PID 1 of a container as we number it, once it has its own /proc."""
    with contextlib.suppress(OSError, IndexError):
        first = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()[0]
        if Path(f"/proc/{first}/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink():
            return first
    return None


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
