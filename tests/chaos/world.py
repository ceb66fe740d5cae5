"""The world of the interruption suite: a real store behind the proxy, the model, and pods that are started again."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self

from chaos.model import ModelServer, name, reply
from chaos.pod import FLUSH_SECONDS
from chaos.proxy import Moment, Proxy, no_fault, no_watch
from support.stage_builders import GREEDY, prepared

from cgd_local.s3 import SeaweedFS
from cgd_stages.chat.thoughts import split_text
from cgd_stages.contract import Endpoint, Exit, Generate, Role, RunRef, StageTask, Storage
from cgd_stages.method.prompts import role_messages
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import REJECTED, read_rows
from cgd_stages.store.rows import Row, from_parquet, text_column
from cgd_stages.store.run import RunStore

ROLES: tuple[Role, ...] = ("answer", "critique", "refine")
UPSTREAM: dict[Role, str] = {"answer": "prepare", "critique": "answer", "refine": "critique"}
JOBS: tuple[tuple[Role, ...], ...] = (("answer",), ("critique", "refine"))
"""The student's job, and the fused teacher's."""
CONCURRENCY = 8
MOST_ATTEMPTS = 80
"""More attempts of one shard than any scenario needs: who needs more does not end."""
SLACK = 3.0
"""Seconds that noticing that rows are due, and putting them, may take on a busy machine."""
EXPECTED = {-signal.SIGKILL, -signal.SIGTERM, Exit.RETRY, Exit.INTERRUPTED}


class Broken(Exception):
    """A pod ended as no interruption makes it end, or never."""


@dataclass
class Pod:
    """One process of the program."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    started: float
    ended: float = 0.0

    def send(self, number: signal.Signals) -> bool:
        """Whether it was alive to get the signal."""
        if self.process.returncode is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return True


class Kills:
    """Decides when pods die. This one lets them live."""

    def __init__(self) -> None:
        self.done = 0

    async def haunt(self, world: "World", pod: Pod) -> None:
        """Runs beside the pod, and is cancelled at its end."""

    async def at_write(self, world: "World", pod: Pod, moment: Moment) -> bool:
        """Awaited before and after each of its writes; False: the write never comes to the store."""
        return True


class RandomKills(Kills):
    """At random instants: a quarter while the program starts, the rest while it generates; SIGKILL and SIGTERM."""

    def __init__(self, random: Random, most: int, within: float = 0.5) -> None:
        super().__init__()
        self._random, self._left, self._within = random, most, within

    async def haunt(self, world: "World", pod: Pod) -> None:
        starting, number = self._random.random() < 0.25, self._random.choice([signal.SIGKILL, signal.SIGTERM])
        delay = self._random.uniform(0.1, 1.3) if starting else self._random.uniform(0.0, self._within)
        if not starting:
            await world.model.first_request(pod.name)
        await asyncio.sleep(delay)
        if self._left > 0 and pod.send(number):
            self._left -= 1
            self.done += 1


class WriteKills(Kills):
    """At the n-th write of every attempt (or of the first `most` ones), right before or right after the store has it.

    A program that dies right before its second write has added one; so has one that dies right after its first. The
    attempts of one shard are therefore killed at every write of the whole run, one after the other.
    """

    def __init__(self, moment: Moment, nth: int, number: signal.Signals = signal.SIGKILL, most: int = 1000) -> None:
        super().__init__()
        self._moment, self._nth, self._number, self._left = moment, nth, number, most
        self._writes: Counter[str] = Counter()

    async def at_write(self, world: "World", pod: Pod, moment: Moment) -> bool:
        if moment is not self._moment:
            return True
        self._writes[pod.name] += 1
        if self._writes[pod.name] != self._nth or self._left <= 0 or not pod.send(self._number):
            return True
        self._left -= 1
        self.done += 1
        if self._number == signal.SIGKILL:
            await pod.process.wait()
            return False
        return True


@dataclass
class Verdict:
    """What the store and the model say about a run at its end. Counts are over its three stages."""

    rows: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    """Rejected, or with a text that the model never said to this row."""
    again: int = 0
    late: int = 0
    """Of those generated again, how many had been finished for longer than rows may wait to be stored."""
    starts: int = 0
    kills: int = 0
    gave_up: int = 0
    """Attempts that ended by themselves, for a retry."""
    recover: list[float] = field(default_factory=list)
    """Of each attempt after the first that asked anything: seconds from its start to its first request."""


class World:
    """The store, the proxy and the model of every run of the suite."""

    def __init__(self, folder: Path) -> None:
        self.s3 = SeaweedFS(folder / "s3", access_key="test", secret_key="test-secret", bucket="data")
        self.proxy = Proxy(lambda: self.s3.endpoint)
        self.model = ModelServer()
        self.pods: dict[str, Pod] = {}
        self.folder = folder

    async def __aenter__(self) -> Self:
        keys = {"AWS_ACCESS_KEY_ID": self.s3.access_key, "AWS_SECRET_ACCESS_KEY": self.s3.secret_key}
        os.environ.update(keys | {"AWS_EC2_METADATA_DISABLED": "true"})
        (self.folder / "s3").mkdir(parents=True, exist_ok=True)
        await self.s3.start()
        await self.proxy.start()
        await self.model.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for pod in self.pods.values():
            if pod.send(signal.SIGKILL):
                await pod.process.wait()
        await self.proxy.stop()
        await self.model.stop()
        await self.s3.stop()

    def clear_sky(self) -> None:
        """No faults, no one who watches."""
        self.proxy.choose, self.proxy.at_write = no_fault, no_watch
        self.model.away = self.model.failing = False


class Run:
    """One CGDRun of so many prompts, in a place of its own in the store."""

    def __init__(self, world: World, title: str, rows: int) -> None:
        self._world, self._title = world, title
        self._ref = RunRef(namespace="team", name="run", uid="uid-1")
        self._storage = Storage(uri=f"s3://data/{title}", endpoint=world.s3.endpoint, path_style=True)
        self._texts = [f"{title}: how many apples are {n} apples?" for n in range(rows)]
        self._pods: list[Pod] = []
        self._killed = 0
        self._codes: Counter[int] = Counter()

    async def prepare(self) -> None:
        await asyncio.to_thread(lambda: prepared(Bucket(self._storage), self._texts, self._ref))

    async def job(self, roles: tuple[Role, ...], shards: int, kills: Kills, *, seconds: float | None = None) -> bool:
        """A job of so many shards, side by side, each started again until it is done; whether all are.

        After `seconds`, every pod that still runs is killed: that is how the number of shards changes.
        """
        pods = {}

        async def at_write(name: str, moment: Moment) -> bool:
            return await kills.at_write(self._world, pods[name], moment)

        self._world.proxy.at_write = at_write
        done_before = kills.done
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(self._shard(roles, shard, shards, kills, pods) for shard in range(shards)))
        except TimeoutError:
            return False
        finally:
            self._world.proxy.at_write = no_watch
            self._killed += kills.done - done_before
        return True

    async def _shard(
        self, roles: tuple[Role, ...], shard: int, shards: int, kills: Kills, pods: dict[str, Pod]
    ) -> None:
        for attempt in range(MOST_ATTEMPTS):
            pod = await self._start(roles, shard, shards)
            pods[pod.name] = pod
            haunting = asyncio.create_task(kills.haunt(self._world, pod))
            try:
                code = await pod.process.wait()
            finally:
                haunting.cancel()
                if pod.send(signal.SIGKILL):
                    self._killed += 1
                    await pod.process.wait()
                pod.ended = time.monotonic()
            self._codes[code] += 1
            if code == Exit.DONE:
                return
            if code not in EXPECTED:
                raise Broken(f"{pod.name}, attempt {attempt}: exit code {code}\n{pod.log.read_text()[-3000:]}")
        raise Broken(f"shard {shard} of {shards} of {self._title} does not end\n{pod.log.read_text()[-3000:]}")

    async def _start(self, roles: tuple[Role, ...], shard: int, shards: int) -> Pod:
        world = self._world
        name = f"{self._title}-{roles[0]}-{shard}-of-{shards}-{len(world.pods)}"
        folder = world.folder / "pods" / name
        folder.mkdir(parents=True)
        work = Generate(
            roles=roles,
            sampling=tuple(GREEDY for _ in roles),
            endpoint=Endpoint(url=world.model.url, model="chaos", max_concurrency=CONCURRENCY),
            shards=shards,
            max_rejected=0.02,
        )
        storage = self._storage.model_copy(update={"endpoint": world.proxy.endpoint})
        task = StageTask(run=self._ref, stage=roles[0], storage=storage, work=work)
        # The proxy learns from the User-Agent who writes, and the model from the key who asks.
        env = {
            "CGD_TASK": task.to_json(),
            "CGD_TERMINATION_LOG": str(folder / "last-words.json"),
            "CGD_SCRATCH": str(folder),
            "CGD_TEACHER_API_KEY": name,
            "AWS_EXECUTION_ENV": name,
            "JOB_COMPLETION_INDEX": str(shard),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        with (folder / "log").open("wb") as log:
            started = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "chaos.pod", env={**os.environ, **env}, stdout=log, stderr=log
            )
        pod = world.pods[name] = Pod(name, process, folder / "log", started)
        self._pods.append(pod)
        return pod

    async def verdict(self, *, store_was_up: bool = True) -> Verdict:
        """Read everything back from the store, past the proxy, and compare it with what the model said."""
        found = await asyncio.to_thread(self._read)
        found.starts, found.kills = len(self._pods), self._killed
        found.gave_up = self._codes[Exit.RETRY]
        first_asked = self._world.model.first_asked
        firsts = {pod.name.rsplit("-", 1)[0]: pod for pod in reversed(self._pods)}.values()
        later = [pod for pod in self._pods if pod not in firsts and pod.name in first_asked]
        found.recover = [first_asked[pod.name] - pod.started for pod in later]
        if not store_was_up:
            found.late = 0
        return found

    def _read(self) -> Verdict:
        bucket, found = Bucket(self._storage), Verdict()
        for role in ROLES:
            source = list(read_rows(RunStore(bucket, self._ref).input(UPSTREAM[role])))
            folder = RunStore(bucket, self._ref).input(role)
            done = folder.require()
            rows = list(read_rows(folder))
            rejected = [row for part in done.under(REJECTED) for row in from_parquet(folder.read(part))]
            ids = Counter(row["id"] for row in rows + rejected)
            found.rows += len(source)
            found.lost += len({row["id"] for row in source} - set(ids))
            found.doubled += sum(ids.values()) - len(ids)
            found.wrong += len(rejected) + sum(not _is_right(role, row) for row in rows)
            counted = done.rows
            found.wrong += (counted.total, counted.done, counted.rejected) != (len(source), len(rows), len(rejected))
            for row in source:
                answers = self._world.model.answers[name(role_messages(role, row))]
                found.again += len(answers) - 1
                found.late += sum(
                    self._world.pods[answer.pod].ended - answer.at > FLUSH_SECONDS + SLACK for answer in answers[:-1]
                )
        return found


def _is_right(role: Role, row: Row) -> bool:
    return bool(row[text_column(role)] == split_text(reply(role_messages(role, row))).text)


async def whole_run(
    run: Run, shards: Sequence[int], kills: Sequence[Kills], random: Random, seconds: tuple[float, float] = (2.0, 3.5)
) -> None:
    """Every job of a run, each with its kills; the number of shards changes from attempt to attempt as listed."""
    await run.prepare()
    for roles, killer in zip(JOBS, kills, strict=True):
        for count in shards[:-1]:
            if await run.job(roles, count, killer, seconds=random.uniform(*seconds)):
                break
        else:
            await run.job(roles, shards[-1], killer)
