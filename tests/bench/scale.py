"""The operator at scale: CGDRuns by the thousand, whose children start and end as told here: `make bench-operator`.

    PYTHONPATH=tests python tests/bench/scale.py [--runs 1000] [--stage-seconds 100] [--base COMMIT]

The operator is a process of its own against the embedded API server, which with the player of the controllers has the
other core. Every child of a run gets a pod that is pulled, runs, says its last words and ends, with the writes that
kubelet and Job controller make meanwhile. All runs are created at once; they live, each stage for a random time; all
stand still; they go on and report; the operator is killed, stages end, and it is started again, then once more with a
Lease that it releases; they live until most have ended. More than a thousand runs have stages that are longer in
proportion, so that as many end in a second, and are watched until half of them have had their second child.

With a commit the operator of that commit is measured by the same harness and server afterwards. Nothing here is a test.
"""

import argparse
import asyncio
import base64
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from rich.console import Console
from rich.table import Table
from support.builders import CHILDREN, ENDS, manifest, run
from telling import at, begin

from cgd_local import pytorchjobs
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_local.ownership import Write
from cgd_operator.api.crd import crd
from cgd_operator.kube.client import Cluster
from cgd_operator.planning.dag import plan
from cgd_operator.planning.manifests import RUN_LABEL, STAGE_LABEL, UID_LABEL

Json = dict[str, Any]

console = Console(highlight=False, width=140)
logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # that a client was killed is no news here
NAMESPACES = 10
RUNS, STAGE_SECONDS = 1000, 100.0
"""For more runs the seconds grow in proportion."""
PULL_SECONDS = (1.0, 4.0)
STILL_SECONDS = 40.0
"""More than a sweep."""
REPORT_SECONDS = 3.0
"""A stage program reports no more often, and more rarely where the operator asks for that."""
REPORTING_SECONDS = 60.0
"""Where a thousand stages report, the operator asks each for a report every 30 s."""
ENDED_SHARE = 0.8
"""Of the runs, when the measurement ends: the slowest would take as long again as they all wait for."""
RESTART_ENDS = 100
KEY = "key of the benchmark, of 32 bytes and more"
LEASE = "default/cgd-operator"
OTHERS = ("reads", "watches", "dry runs", "leases")
"""Calls that write nothing of a run."""
COUNTS = {"rows", "percent", "tokensPerSecond", "etaSeconds", "progress", "eta", "gpuSeconds", "podGpuSeconds", "usage"}
"""Fields of a status that may be older than the rest."""
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
    made: set[tuple[str, str]] = field(default_factory=set)
    """Run's uid and stage of every child."""
    running: dict[tuple[str, str], float] = field(default_factory=dict)
    """When the pod of each child began to run."""
    endless: set[tuple[str, str]] = field(default_factory=set)
    """Namespace and name of runs whose children never end."""
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
        self.made.add((uid, stage))
        if waited := [self.ended[uid, one] for one in NEEDED[stage]]:
            self.latencies.append(time.monotonic() - max(waited))
        life = self.lives[uid, stage] = Life(child, self._pod(child))
        await asyncio.sleep(self.rng.uniform(*PULL_SECONDS))
        self._set_status("pods", life.pod, {"phase": "Running", "startTime": _now()})
        self._active(life, ready=1)
        life.running = True
        for name in GIVEN[stage]:
            self.running[uid, name] = time.monotonic()
        if (child["metadata"]["namespace"], labels[RUN_LABEL]) in self.endless:
            return
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
        if not self.lives.pop((uid, stage), None):  # a restart has ended it before its time
            return
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

    def _pod(self, child: Json) -> tuple[str, str]:
        """Make the child's pod, on a node already."""
        replicas = child["spec"].get("pytorchReplicaSpecs", {})  # with a Master before commit d30bb03
        template = child["spec"].get("template") or (replicas.get("Master") or replicas["Worker"])["template"]
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
class Reader:
    """Reads every status that is written, as a user who watches would."""

    api: ApiServer
    player: Player
    operator: "Operator"
    lags: list[float] = field(default_factory=list)
    """Seconds from a stage's beginning to run, or its end, to a status that says so; where no operator ran meanwhile,
    from its start."""
    at_creation: list[float] = field(default_factory=list)
    shown: set[str] = field(default_factory=set)
    """The uids of the runs whose first child was told to run."""
    news: Counter[str] = field(default_factory=Counter)
    """By run's uid: statuses that say more than row counts."""
    counts: int = 0
    """Statuses that say nothing else."""
    statuses: Counter[str] = field(default_factory=Counter)
    """All of them, by run's uid."""

    async def read(self) -> None:
        registry = self.api.registry
        with registry.shelf(registry.resources["cgdruns.cgd.dev"]).changes(registry.store.version) as feed:
            while change := await feed.get():
                if change.old and "status" in change.new:
                    self._compare(change.new["metadata"]["uid"], change.old.get("status", {}), change.new["status"])

    def _compare(self, uid: str, old: Json, new: Json) -> None:
        self.statuses[uid] += old != new
        before = {stage["name"]: stage["state"] for stage in old.get("stages", [])}
        begun = {"Running": self.player.running, "Succeeded": self.player.ended}
        if new["stages"][0]["state"] in begun:
            self.shown.add(uid)
        for stage in new["stages"]:
            name, state = stage["name"], stage["state"]
            if state in begun and before.get(name) != state and (uid, name) in begun[state]:
                self.lags.append(time.monotonic() - max(begun[state][uid, name], self.operator.since))
        if _without_counts(old) == _without_counts(new):
            self.counts += 1
        else:
            self.news[uid] += 1


def _without_counts(status: Json) -> Json:
    stages = [{name: value for name, value in one.items() if name not in COUNTS} for one in status.get("stages", [])]
    return {name: value for name, value in status.items() if name not in COUNTS} | {"stages": stages}


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
    own_cpu: float
    """Of the API server and the player."""
    calls: Counter[str]


@dataclass
class Operator:
    """The operator's process, started anew by every `start`."""

    kubeconfig: Path
    log: Path
    source: Path | None = None
    """Of another commit."""
    process: asyncio.subprocess.Process | None = None
    port: int = 0
    since: float = 0.0
    """When it was up, on the monotonic clock."""
    cpu_before: float = 0.0
    peak_mb: float = 0.0

    async def start(self, lease: str = "") -> None:
        environment = os.environ | {"CGD_PROGRESS_BIND": "127.0.0.1:0", "CGD_PROGRESS_KEY": KEY, "CGD_LEASE": lease}
        if self.source:
            environment["PYTHONPATH"] = f"{self.source / 'operator'}:{self.source / 'images'}"
        told = len(self.log.read_bytes()) if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "cgd_operator", "--kubeconfig", str(self.kubeconfig)),
                env=environment,
                stdout=log,
                stderr=log,
            )
        while "progress server listens on" not in (text := self.log.read_text()[told:]):  # noqa: ASYNC110  a file
            await asyncio.sleep(0.05)
        self.port = int(text.split("progress server listens on 127.0.0.1:")[1].split()[0])
        self.since = time.monotonic()

    async def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process
        self.look()
        self.cpu_before += self._cpu()
        self.process.send_signal(number)
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


@dataclass(frozen=True)
class Figure:
    """A line of the table at the end."""

    name: str
    value: float
    text: str
    aim: str = ""


@dataclass
class Bench:
    api: ApiServer
    player: Player
    reader: Reader
    operator: Operator
    calls: Calls
    runs: int
    table: Table = field(
        default_factory=lambda: Table(
            "phase", "seconds", "reads/s", "writes/s", "operator's CPU", "server's CPU", "MB", title_justify="left"
        )
    )

    def mark(self) -> Mark:
        return Mark(time.monotonic(), self.operator.cpu(), time.process_time(), Counter(self.calls.counts))

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
            f"{100 * (now.own_cpu - since.own_cpu) / seconds:.0f} %",
            f"{self.operator.look():.0f}",
        )
        return calls.counts

    async def create(self) -> None:
        """All runs at once; over when the status of each tells its first child. How late these are is no part of the
        other figures: they all come at once."""
        at(f"creating {self.runs} runs")
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
        await self.until(lambda: len(self.reader.shown), self.runs, "first statuses")
        self.phase("creation", since)
        self.reader.at_creation, self.reader.lags = self.reader.lags, []

    async def live(self, stage: str, share: float) -> None:
        """Until such a share of the runs has such a child."""
        since = self.mark()
        await self.until(lambda: self.player.born[stage], int(self.runs * share), stage)
        self.phase(f"life, to {stage}", since)

    async def stand_still(self) -> int:
        """Nothing changes for more than a sweep; writes meanwhile."""
        self.player.paused = True
        lives = self.player.lives
        await self.until(lambda: sum(life.running for life in lives.values()), len(lives), "pods")
        at("standing still")
        await asyncio.sleep(10)
        since = self.mark()
        await asyncio.sleep(STILL_SECONDS)
        writes = Calls(self.phase("standing still", since)).writes()
        self.player.go_on(self.player.stage_seconds)
        return writes

    async def report(self) -> float:
        """Every running stage reports as its program would: at once, and then when the operator has asked for the next
        report. Returns the statuses a second that tell row counts alone."""
        at("running stages report")
        since, before, start = self.mark(), self.reader.counts, time.monotonic()
        runs = {run["metadata"]["uid"]: run["metadata"] for run in self._runs()}
        tokens, due = self.tokens(), dict[tuple[str, str], float]()
        async with aiohttp.ClientSession() as session:
            while (done := time.monotonic() - start) < REPORTING_SECONDS:
                for uid, stage in list(self.player.lives):
                    if due.get((uid, stage), 0.0) <= done:
                        pause = await self._post(session, runs[uid], stage, tokens[uid, stage], int(done))
                        due[uid, stage] = done + max(REPORT_SECONDS, pause)
                await asyncio.sleep(0.1)
        self.phase("life, stages report", since)
        return (self.reader.counts - before) / (time.monotonic() - start)

    def tokens(self) -> dict[tuple[str, str], str]:
        """The progress tokens, as the operator has stored them, by run's uid and stage."""
        registry = self.api.registry
        stored = registry.shelf(registry.resources["secrets"]).objects.values()
        return {
            (one["metadata"]["ownerReferences"][0]["uid"], stage): base64.b64decode(text).decode()
            for one in stored
            for stage, text in one["data"].items()
        }

    async def _post(self, session: aiohttp.ClientSession, meta: Json, stage: str, bearer: str, done: int) -> float:
        """Send a report; the seconds after which the next one is wanted."""
        body = {"trainerStatus": {}, "rows": {"total": 1000, "done": done}, "tokensPerSecond": 1000 + done}
        place = f"/progress/{meta['namespace']}/{meta['name']}/{meta['uid']}/{stage}"
        headers = {"Authorization": f"Bearer {bearer}"}
        async with session.post(f"http://127.0.0.1:{self.operator.port}{place}", json=body, headers=headers) as answer:
            text = await answer.text()
            assert answer.status in (200, 404), text  # 404: the child has ended meanwhile
            return float(json.loads(text).get("nextReportSeconds", 0)) if answer.status == 200 and text else 0.0

    async def restart(self, name: str, number: signal.Signals, lease: str = "") -> float:
        """The operator is ended, stages end, and it starts again; seconds from then to the last child that may start
        now. Ends meanwhile are no part of the other figures."""
        kept = self.player.latencies, self.reader.lags
        self.player.latencies, self.reader.lags = [], []
        await self.operator.stop(number)
        ending = [life for life in self.player.lives.values() if life.running and life not in self.player.held]
        ending = ending[: min(RESTART_ENDS, max(1, self.runs // 10))]
        for life in ending:
            self.player.end(life)
        wanted = {one for life in ending for one in self._unlocked(life)}
        start, own_cpu = time.monotonic(), time.process_time()
        since = Mark(start, self.operator.cpu_before, own_cpu, Counter(self.calls.counts))
        await self.operator.start(lease)
        await self.until(lambda: len(wanted & self.player.made), len(wanted), "children after the restart")
        seconds = time.monotonic() - start
        await asyncio.sleep(10)
        self.player.latencies, self.reader.lags = kept
        self.phase(name, since)
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

    def writes(self) -> dict[str, float]:
        """Of a run that has ended, on average, without those for row counts."""
        ended = {one["metadata"]["uid"] for one in self._runs() if one["status"]["state"] == "Succeeded"}
        events = self.api.registry.shelf(self.api.registry.resources["events"]).objects.values()
        written = {
            "children": len(ended) * len(CHILDREN),
            "events": sum(one["involvedObject"]["uid"] in ended for one in events),
            "statuses": sum(self.reader.news[uid] for uid in ended),
        }
        of_each = {name: count / len(ended) for name, count in written.items()}
        return of_each | {"secrets": self.calls.counts["secrets"] / self.runs}

    async def until(self, count: Any, wanted: int, what: str) -> None:
        while (reached := count()) < wanted:
            at(f"{what}: {reached} of {wanted}")
            if self.player.broken:
                raise self.player.broken
            if self.operator.process is None or self.operator.process.returncode is not None:
                raise SystemExit(f"the operator has ended: {self.operator.log.read_text()[-2000:]}")
            await asyncio.sleep(0.1)


@asynccontextmanager
async def bench(runs: int, stage_seconds: float, folder: Path, source: Path | None = None) -> AsyncIterator[Bench]:
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
    player = Player(api, random.Random(7), stage_seconds)
    operator = Operator(kubeconfig, folder / "operator.log", source)
    reader = Reader(api, player, operator)
    player.start()
    reading = asyncio.create_task(reader.read())
    await operator.start()
    calls.counts.clear()
    try:
        yield Bench(api, player, reader, operator, calls, runs)
    finally:
        await operator.stop()
        await player.stop()
        reading.cancel()
        await api.stop()


async def measure(runs: int, stage_seconds: float, source: Path | None = None) -> list[Figure]:
    """The figures of an operator, this tree's or that of another source."""
    with tempfile.TemporaryDirectory() as folder:
        async with bench(runs, stage_seconds, Path(folder), source) as here:
            start, many = here.mark(), runs > RUNS
            await here.create()
            await here.live(CHILDREN[1] if many else "train-cgd", 0.5)
            still = None if many else await here.stand_still()
            reported = await here.report()
            killed = await here.restart("kill -9, restart", signal.SIGKILL)
            here.table.title = f"{runs} CGDRuns, stages of {stage_seconds:.0f} s on average"
            if still is None:
                return [*_figures(here, start, reported, killed)]
            await here.operator.stop(signal.SIGTERM)
            await here.operator.start(LEASE)
            leased = await here.restart("SIGTERM, restart with a Lease", signal.SIGTERM, LEASE)
            since = here.mark()
            await here.until(lambda: here.states()["Succeeded"], int(ENDED_SHARE * runs), "runs ended")
            here.phase("life, to the end", since)
            assert not here.states()["Failed"]
            return [*_figures(here, start, reported, killed), *_of_whole_runs(here, still, leased)]


def _figures(here: Bench, start: Mark, reported: float, killed: float) -> Iterator[Figure]:
    console.print(here.table)
    now, latencies, lags = here.mark(), sorted(here.player.latencies), sorted(here.reader.lags)
    cpu, ends = now.cpu - start.cpu, len(here.player.ended)
    yield Figure("memory, peak", here.operator.peak_mb, f"{here.operator.peak_mb:.0f} MB", "under 200 MB at 1,000 runs")
    yield Figure("CPU of an end and what follows", 1000 * cpu / ends, f"{1000 * cpu / ends:.0f} ms of {ends}")
    cuts, shown = statistics.quantiles(latencies, n=100), statistics.quantiles(lags, n=100)
    text = f"p50 {cuts[49]:.2f} s, p99 {cuts[98]:.2f} s, most {latencies[-1]:.2f} s"
    yield Figure("a child's end to the next child", cuts[98], text, "p99 under 1 s")
    text = f"p50 {shown[49]:.1f} s, p99 {shown[98]:.1f} s, most {lags[-1]:.1f} s"
    yield Figure("a stage's start or end to the status", lags[-1], text, "10 s")
    first = max(here.reader.at_creation)
    yield Figure("the same, of the first children", first, f"most {first:.1f} s: all runs are created at once")
    yield Figure("row counts while all report", reported, f"{reported:.1f} statuses a second", "at most 10")
    yield Figure("caught up after kill -9", killed, f"{killed:.1f} s from the process's start", "under 5 s")


def _of_whole_runs(here: Bench, still: int, leased: float) -> Iterator[Figure]:
    yield Figure("caught up after SIGTERM, with a Lease", leased, f"{leased:.1f} s from the process's start", "5 s")
    writes = here.writes()
    of_each = ", ".join(f"{name} {count:.1f}" for name, count in writes.items())
    total = sum(writes.values())
    yield Figure("writes of a run", total, f"{total:.1f} ({of_each})", "at most 25")
    yield Figure("writes while nothing changes", still, str(still), "0")
    reads, dry_runs = (here.calls.counts[name] / here.runs for name in ("reads", "dry runs"))
    yield Figure("reads of a run, until now", reads, f"{reads:.1f}, and {dry_runs:.1f} dry runs")


def show(ours: list[Figure], others: list[Figure], base: str) -> None:
    shown = Table("figure", "measured", *([base, "ratio"] if base else []), "aim")
    for figure, other in zip_longest(ours, others):
        ratio = f"{figure.value / other.value:.2f}" if other and other.value else ""
        shown.add_row(figure.name, figure.text, *([other.text, ratio] if base else []), figure.aim)
    console.print(shown)


@contextmanager
def source_of(commit: str) -> Iterator[Path]:
    """The files of a commit, in a worktree that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--stage-seconds", type=float, help="how long a stage takes, on average")
    parser.add_argument("--base", default="", help="a commit whose operator is measured as well")
    options = parser.parse_args()
    begin()
    seconds = options.stage_seconds or STAGE_SECONDS * max(1, options.runs / RUNS)
    ours = asyncio.run(measure(options.runs, seconds))
    others: list[Figure] = []
    if options.base:
        with source_of(options.base) as tree:
            others = asyncio.run(measure(options.runs, seconds, tree))
    show(ours, others, options.base)


if __name__ == "__main__":
    main()
