"""The operator at scale: CGDRuns by the thousand, whose children start and end as told here: `make bench-operator`.

    PYTHONPATH=tests python tests/bench/scale.py [--runs 1000] [--stage-seconds 100]

The operator is a process of its own against the embedded API server, which with the player of the controllers has the
other core. Every child of a run gets a pod that is pulled, runs, says its last words and ends, with the writes that
kubelet and Job controller make meanwhile. Four phases: all runs are created at once; they live, each stage for a random
time; all stand still while their stages run and report; the operator is killed, stages end, and it is started again.
Nothing here is a test.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from builders import CHILDREN, ENDS, manifest, run
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cgd_local import pytorchjobs
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_local.ownership import Write
from cgd_operator.cluster import Cluster
from cgd_operator.crd import crd
from cgd_operator.manifests import STAGE_LABEL, UID_LABEL
from cgd_operator.plan import plan
from cgd_operator.progress import token

Json = dict[str, Any]

console = Console(highlight=False)
NAMESPACES = 10
RUNS, STAGE_SECONDS = 1000, 100.0
PULL_SECONDS = (1.0, 4.0)
STILL_SECONDS = 65.0
"""Two sweeps."""
REPORT_SECONDS = 3.0
"""As often as the stage programs report."""
KEY = "key of the benchmark"
AIMS = {"memory": "250", "latency": "1.00", "writes": "25", "still": "0"}
OTHERS = ("reads", "watches", "dry runs")
"""Calls that write nothing."""
CHILD_KINDS = {"Job": "jobs.batch", "PyTorchJob": "pytorchjobs.kubeflow.org"}
NEEDED = {child.stage: child.after for child in plan(run())}
"""For each child the stages that must have ended."""
GIVEN = {child.stage: child.stages for child in plan(run())}


# --- what plays the cluster ---------------------------------------------------------------------------------------


@dataclass
class Life:
    """A child while it is there."""

    child: Json
    pod: tuple[str, str]
    running: bool = False


@dataclass
class Player:
    """Kubelet and controllers: gives every child a pod, and ends it after its time, or when the player goes on."""

    api: ApiServer
    rng: random.Random
    stage_seconds: float
    paused: bool = False
    lives: dict[tuple[str, str], Life] = field(default_factory=dict)
    """By run's uid and stage."""
    held: list[Life] = field(default_factory=list)
    """Whose time was over while the player paused."""
    ended: dict[tuple[str, str], float] = field(default_factory=dict)
    """When each stage of each run ended, on the monotonic clock."""
    latencies: list[float] = field(default_factory=list)
    """Seconds from the end of the last child that a child waits for to its creation."""
    born: Counter[str] = field(default_factory=Counter)
    broken: BaseException | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def start(self) -> None:
        for plural in CHILD_KINDS.values():
            self._spawn(self._watch(plural))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            self.broken = task.exception()

    async def _watch(self, plural: str) -> None:
        registry = self.api.registry
        with registry.shelf(registry.resources[plural]).changes(registry.store.version) as feed:
            while change := await feed.get():
                if change.old is None:
                    self._spawn(self._live(change.new))

    async def _live(self, child: Json) -> None:
        labels = child["metadata"]["labels"]
        uid, stage = labels[UID_LABEL], labels[STAGE_LABEL]
        self.born[stage] += 1
        if waited := [self.ended[uid, one] for one in NEEDED[stage]]:
            self.latencies.append(time.monotonic() - max(waited))
        life = self.lives[uid, stage] = Life(child, self._pod(child))
        await asyncio.sleep(self.rng.uniform(*PULL_SECONDS))
        self._set_status("pods", life.pod, {"phase": "Running", "startTime": _now()})
        self._active(life, ready=1)
        life.running = True
        await asyncio.sleep(self.stage_seconds * self.rng.uniform(0.5, 1.5))
        if self.paused:
            self.held.append(life)
        else:
            self.end(life)

    def go_on(self, seconds: float) -> None:
        """End what was held within so many seconds, and pause no more."""
        self.paused = False
        for life in self.held:
            asyncio.get_running_loop().call_later(self.rng.uniform(0, seconds), self.end, life)
        self.held = []

    def end(self, life: Life) -> None:
        labels = life.child["metadata"]["labels"]
        uid, stage = labels[UID_LABEL], labels[STAGE_LABEL]
        facts = {"rows": {"total": 100, "done": 99, "rejected": 1}, "promptTokens": 9000, "generatedTokens": 8000}
        told = facts | {"seconds": self.stage_seconds}
        words = json.dumps({"outcome": "done", "stages": dict.fromkeys(GIVEN[stage], told)})
        over = {"exitCode": 0, "reason": "Completed", "startedAt": _now(), "finishedAt": _now(), "message": words}
        container = {"name": "stage", "image": "played", "imageID": "", "ready": False, "restartCount": 0}
        states = [container | {"state": {"terminated": over}}]
        self._set_status("pods", life.pod, {"phase": "Succeeded", "startTime": _now(), "containerStatuses": states})
        for name in GIVEN[stage]:
            self.ended[uid, name] = time.monotonic()
        kind = life.child["kind"]
        self._set_status(CHILD_KINDS[kind], _key(life.child), ENDS[kind]("Complete"))
        del self.lives[uid, stage]

    def _pod(self, child: Json) -> tuple[str, str]:
        """Make the child's pod, on a node already."""
        template = child["spec"].get("template") or child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        meta = {"name": child["metadata"]["name"] + "-0", "labels": template["metadata"]["labels"]}
        body = {"metadata": meta, "spec": {**template["spec"], "nodeName": "node"}}
        registry, namespace = self.api.registry, child["metadata"]["namespace"]
        write = Write(manager="kube-controller-manager", api_version="v1")
        registry.create(registry.resources["pods"], namespace, body, write)
        self._active(Life(child, ("", "")), ready=0)
        return namespace, meta["name"]

    def _active(self, life: Life, *, ready: int) -> None:
        if life.child["kind"] == "Job":
            status = {"active": 1, "ready": ready, "startTime": _now()}
            self._set_status(CHILD_KINDS["Job"], _key(life.child), status)

    def _set_status(self, plural: str, key: tuple[str, str], status: Json) -> None:
        resource = self.api.registry.resources[plural]
        write = Write(manager="player", api_version=resource.api_version, subresource="status")
        old = self.api.registry.get(resource, key).get("status", {})
        kept = {"startTime": old["startTime"]} if "startTime" in old else {}
        self.api.registry.update(resource, key, lambda live: live | {"status": {**status, **kept}}, write)


def _key(thing: Json) -> tuple[str, str]:
    return thing["metadata"]["namespace"], thing["metadata"]["name"]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- what is measured ---------------------------------------------------------------------------------------------


@dataclass
class Calls:
    """The operator's requests, by what they are for. Nobody else uses HTTP here."""

    counts: Counter[str] = field(default_factory=Counter)

    def note(self, request: web.Request) -> None:
        if request.method == "GET":
            watch = request.query.get("watch") == "true"
            self.counts["watches" if watch else "reads"] += 1
            return
        if "dryRun" in request.query:
            self.counts["dry runs"] += 1
            return
        last = request.path.rsplit("/", 1)[-1]
        subject = "status" if last == "status" else request.path.split("/namespaces/", 1)[-1].split("/")[1]
        self.counts["children" if subject in ("jobs", "pytorchjobs") else subject] += 1

    def reads(self) -> int:
        return self.counts["reads"]

    def writes(self) -> int:
        return sum(count for name, count in self.counts.items() if name not in OTHERS)


@dataclass
class Mark:
    """Where the counters stand."""

    seconds: float
    cpu: float
    calls: Counter[str]


@dataclass
class Operator:
    """The operator's process, started anew by every `start`."""

    kubeconfig: Path
    log: Path
    process: asyncio.subprocess.Process | None = None
    port: int = 0
    cpu_before: float = 0.0
    peak_mb: float = 0.0

    async def start(self) -> None:
        environment = os.environ | {"CGD_PROGRESS_BIND": "127.0.0.1:0", "CGD_PROGRESS_KEY": KEY}
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "cgd_operator", "--kubeconfig", str(self.kubeconfig)),
                env=environment,
                stdout=log,
                stderr=log,
            )
        told = len(self.log.read_bytes())
        while "progress server listens on" not in (text := self.log.read_text()[told:]):  # noqa: ASYNC110  a file
            await asyncio.sleep(0.05)
        self.port = int(text.split("progress server listens on 127.0.0.1:")[1].split()[0])

    async def kill(self) -> None:
        assert self.process
        self.look()
        self.cpu_before += self._cpu()
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    def look(self) -> float:
        """MB that the process has now."""
        assert self.process
        told = Path(f"/proc/{self.process.pid}/status").read_text()
        values = {line.split(":")[0]: line.split()[1] for line in told.splitlines() if line.startswith("Vm")}
        self.peak_mb = max(self.peak_mb, int(values["VmHWM"]) / 1024)
        return int(values["VmRSS"]) / 1024

    def cpu(self) -> float:
        """Seconds of processor that all its processes have used."""
        return self.cpu_before + self._cpu()

    def _cpu(self) -> float:
        assert self.process
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Bench:
    api: ApiServer
    player: Player
    operator: Operator
    calls: Calls
    runs: int
    table: Table = field(
        default_factory=lambda: Table("phase", "seconds", "reads/s", "writes/s", "CPU", "MB", title_justify="left")
    )

    def mark(self) -> Mark:
        return Mark(time.monotonic(), self.operator.cpu(), Counter(self.calls.counts))

    def phase(self, name: str, since: Mark) -> Counter[str]:
        """Put a phase into the table; the calls of it."""
        now = self.mark()
        seconds, calls = now.seconds - since.seconds, Calls(now.calls - since.calls)
        self.table.add_row(
            name,
            f"{seconds:.0f}",
            f"{calls.reads() / seconds:.1f}",
            f"{calls.writes() / seconds:.2f}",
            f"{100 * (now.cpu - since.cpu) / seconds:.0f} %",
            f"{self.operator.look():.0f}",
        )
        return calls.counts

    async def create(self) -> None:
        """All runs at once; over when each has its first child."""
        since, registry = self.mark(), self.api.registry
        resource = registry.resources["cgdruns.cgd.dev"]
        for number in range(self.runs):
            namespace = f"team-{number % NAMESPACES}"
            body = manifest(name=f"run-{number}", namespace=namespace)
            del body["metadata"]["uid"], body["metadata"]["generation"]
            registry.create(resource, namespace, body, Write(manager="user", api_version="cgd.dev/v1alpha1"))
            if number % 20 == 0:
                await asyncio.sleep(0)
        await self.until(lambda: self.player.born[CHILDREN[0]], self.runs, "first children")
        self.phase("creation", since)

    async def live(self, stage: str, share: float) -> None:
        """Until such a share of the runs has such a child."""
        await self.until(lambda: self.player.born[stage], int(self.runs * share), stage)

    async def stand_still(self) -> int:
        """Nothing changes for two sweeps; writes meanwhile."""
        self.player.paused = True
        lives = self.player.lives
        await self.until(lambda: sum(life.running for life in lives.values()), len(lives), "pods")
        await asyncio.sleep(15)
        since = self.mark()
        await asyncio.sleep(STILL_SECONDS)
        return Calls(self.phase("standing still", since)).writes()

    async def report(self) -> None:
        """Every running stage reports its progress, as often as the programs do."""
        since = self.mark()
        url, start = f"http://127.0.0.1:{self.operator.port}/progress", time.monotonic()
        runs = {one["metadata"]["uid"]: one["metadata"] for one in self._runs()}
        async with aiohttp.ClientSession() as session:
            while time.monotonic() - start < STILL_SECONDS:
                for uid, stage in list(self.player.lives):
                    meta = runs[uid]
                    done = int(time.monotonic() - start)
                    body = {"trainerStatus": {}, "rows": {"total": 1000, "done": done}, "tokensPerSecond": 1000 + done}
                    bearer = {"Authorization": f"Bearer {token(KEY.encode(), uid, stage)}"}
                    place = f"{url}/{meta['namespace']}/{meta['name']}/{uid}/{stage}"
                    async with session.post(place, json=body, headers=bearer) as answer:
                        assert answer.status == 200, await answer.text()
                await asyncio.sleep(REPORT_SECONDS)
        self.phase("stages report", since)

    async def restart(self) -> float:
        """The operator is killed, a tenth of the running stages ends, and it starts again; seconds to catch up."""
        await self.operator.kill()
        ending = list(self.player.lives.values())[: max(1, self.runs // 10)]
        before = self.player.born.total()
        for life in ending:
            if life in self.player.held:
                self.player.held.remove(life)
            self.player.end(life)
        wanted = before + len({one for life in ending for one in self._unlocked(life)})
        start, since = time.monotonic(), Mark(time.monotonic(), self.operator.cpu_before, Counter(self.calls.counts))
        self.player.latencies, kept = [], self.player.latencies
        await self.operator.start()
        await self.until(self.player.born.total, wanted, "children after the restart")
        seconds = time.monotonic() - start
        self.player.latencies = kept
        await asyncio.sleep(5)
        self.phase("restart", since)
        return seconds

    def _unlocked(self, life: Life) -> Iterator[tuple[str, str]]:
        """What waits for nothing any more, now that this child has ended."""
        labels = life.child["metadata"]["labels"]
        uid, stage = labels[UID_LABEL], labels[STAGE_LABEL]
        for name, needed in NEEDED.items():
            if set(needed) & set(GIVEN[stage]) and all((uid, one) in self.player.ended for one in needed):
                yield uid, name

    def _runs(self) -> Iterator[Json]:
        registry = self.api.registry
        yield from registry.shelf(registry.resources["cgdruns.cgd.dev"]).objects.values()

    def states(self) -> Counter[str]:
        return Counter(one.get("status", {}).get("state", "New") for one in self._runs())

    async def until(self, count: Any, wanted: int, what: str) -> None:
        with Progress(console=console, transient=True) as shown:
            task = shown.add_task(what, total=wanted)
            while (reached := count()) < wanted:
                shown.update(task, completed=reached)
                if self.player.broken:
                    raise self.player.broken
                if self.operator.process is None or self.operator.process.returncode is not None:
                    raise SystemExit(f"the operator has ended: {self.operator.log.read_text()[-2000:]}")
                await asyncio.sleep(0.2)


@asynccontextmanager
async def bench(runs: int, stage_seconds: float, folder: Path) -> AsyncIterator[Bench]:
    """A cluster with its player and the operator in it."""
    calls = Calls()
    api = ApiServer(fault=calls.note)
    await api.start()
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(api.kubeconfig())
    async with await Cluster.connect(str(kubeconfig), manager="bench") as client:
        for definition in (crd(), pytorchjobs.crd()):
            await install(client, definition)
    for number in range(NAMESPACES):
        body = {"metadata": {"name": f"team-{number}"}}
        api.registry.create(api.registry.resources["namespaces"], "", body, Write(manager="bench", api_version="v1"))
    player, operator = Player(api, random.Random(7), stage_seconds), Operator(kubeconfig, folder / "operator.log")
    player.start()
    await operator.start()
    calls.counts.clear()
    try:
        yield Bench(api, player, operator, calls, runs)
    finally:
        await operator.kill()
        await player.stop()
        await api.stop()


async def measure(runs: int, stage_seconds: float, folder: Path) -> None:
    async with bench(runs, stage_seconds, folder) as here:
        start = here.mark()
        await here.create()
        since = here.mark()
        await here.live("train-cgd", 0.5)
        here.phase("life, to training", since)
        still = await here.stand_still()
        before = Counter(here.calls.counts)
        await here.report()
        reporting = Counter(here.calls.counts) - before
        caught_up = await here.restart()
        here.player.go_on(stage_seconds)
        since = here.mark()
        await here.until(lambda: here.states()["Succeeded"] + here.states()["Failed"], runs, "runs ended")
        here.phase("life, to the end", since)
        assert here.states() == {"Succeeded": runs}, here.states()
        _print(here, here.mark(), start, still, caught_up, reporting)


def _print(here: Bench, now: Mark, start: Mark, still: int, caught_up: float, reporting: Counter[str]) -> None:
    runs, latencies = here.runs, sorted(here.player.latencies)
    here.table.title = f"{runs} CGDRuns, {here.player.born.total()} children, {NAMESPACES} namespaces"
    console.print(here.table)
    counts = now.calls - start.calls - reporting
    writes = {name: count for name, count in sorted(counts.items()) if name not in OTHERS}
    cuts = statistics.quantiles(latencies, n=100)
    per_run = ", ".join(f"{name} {count / runs:.1f}" for name, count in writes.items())
    figures = [
        ("memory, peak", f"{here.operator.peak_mb:.0f} MB", f"under {AIMS['memory']} MB"),
        ("CPU, in all", f"{now.cpu - start.cpu:.0f} s, {1000 * (now.cpu - start.cpu) / runs:.0f} ms a run", ""),
        (
            "a child's end to the next child",
            f"p50 {cuts[49]:.2f} s, p99 {cuts[98]:.2f} s, most {latencies[-1]:.2f} s",
            f"p99 under {AIMS['latency']} s",
        ),
        ("writes of a run", f"{sum(writes.values()) / runs:.1f} ({per_run})", f"at most {AIMS['writes']}"),
        ("reads of a run", f"{counts['reads'] / runs:.1f}, and {counts['dry runs'] / runs:.1f} dry runs", ""),
        ("writes while nothing changes", str(still), AIMS["still"]),
        ("status writes while all report", f"{reporting['status'] / STILL_SECONDS:.1f} a second", ""),
        ("caught up after a restart", f"{caught_up:.1f} s for {max(1, runs // 10)} ended children", ""),
    ]
    shown = Table("figure", "measured", "aim")
    for row in figures:
        shown.add_row(*row)
    console.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--stage-seconds", type=float, default=STAGE_SECONDS, help="how long a stage takes, on average")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(options.runs, options.stage_seconds, Path(folder)))


if __name__ == "__main__":
    main()
