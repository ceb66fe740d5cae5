"""The interruption suite of generate: kills at random instants and at every write, faults of the store and the model.

    make chaos-generate

Real processes, a real S3 server behind a proxy of ours, and a model whose answers are a pure function of the prompt.
At the end the store alone must hold every row of every stage exactly once, with its right text. Seeds make the
schedules the same each time; how far a program is at an instant depends on the machine.
"""

import asyncio
import contextlib
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from random import Random

from aiohttp import web
from chaos.pod import FLUSH_SECONDS
from chaos.proxy import Fault, Moment
from chaos.world import SLACK, Broken, Kills, RandomKills, Run, Verdict, World, WriteKills, whole_run
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cgd_stages.errors import StageError

Weather = Callable[[World], Coroutine[None, None, None]]
LEAST_KILLS = 200


@dataclass(frozen=True)
class Scenario:
    """A run of `rows` prompts; `shards` lists their number from attempt to attempt; `kills` makes those of one job."""

    name: str
    rows: int
    shards: tuple[int, ...]
    kills: Callable[[Random], Kills] = lambda random: Kills()
    weather: Weather | None = None
    """What happens to the store and the model meanwhile."""
    quiet: bool = False
    """No pod may end before its work does, and no row may be generated twice."""


@dataclass(frozen=True)
class Result:
    scenario: Scenario
    verdict: Verdict
    faults: int
    seconds: float
    broken: str = ""
    """Why there is no verdict."""

    @property
    def good(self) -> bool:
        v = self.verdict
        restless = self.scenario.quiet and (v.gave_up or v.again)
        return not (self.broken or v.lost or v.doubled or v.wrong or v.late or restless)


async def play(world: World, scenario: Scenario, seed: int) -> Result:
    """One scenario, from an empty place in the store to the verdict."""
    random, started = Random(f"{seed}/{scenario.name}"), time.monotonic()
    faults = _faults(world)
    title = f"{seed:03d}-" + "".join(letter if letter.isalnum() else "-" for letter in scenario.name.lower())
    run = Run(world, title, scenario.rows)
    kills, broken = [scenario.kills(random) for _ in range(2)], ""
    try:
        async with _under(world, scenario.weather):
            await whole_run(run, scenario.shards, kills, random)
        verdict = await run.verdict(store_was_up=scenario.weather is None)
    except (Broken, StageError) as error:
        verdict, broken = Verdict(), str(error)
    return Result(scenario, verdict, _faults(world) - faults, time.monotonic() - started, broken)


def _faults(world: World) -> int:
    return sum(world.proxy.faults.values()) + world.model.faults


@contextlib.asynccontextmanager
async def _under(world: World, weather: Weather | None) -> AsyncIterator[None]:
    task = asyncio.create_task(weather(world)) if weather else None
    try:
        yield
    finally:
        if task:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        world.clear_sky()


def some_fail(share: float, seed: int, *faults: Fault, methods: str = "GET PUT") -> Weather:
    """So many of the requests to the store fail, each in one of these ways."""
    random = Random(seed)

    def choose(request: web.Request) -> Fault | None:
        return random.choice(faults) if request.method in methods and random.random() < share else None

    async def weather(world: World) -> None:
        world.proxy.choose = choose

    return weather


def away(seconds: float, every: float, *faults: Fault) -> Weather:
    """The store is away for some seconds, again and again, from the first write of a pod on."""

    async def weather(world: World) -> None:
        writes = world.proxy.writes.total()
        while True:
            await _write(world, writes)
            for fault in faults:
                world.proxy.choose = lambda request, fault=fault: fault
                await asyncio.sleep(seconds / len(faults))
            world.proxy.choose = lambda request: None
            writes = world.proxy.writes.total()
            await asyncio.sleep(every)

    return weather


async def store_restarts(world: World) -> None:
    """The S3 server itself ends and comes back, once in each job."""
    for _ in range(2):
        await _write(world, world.proxy.writes.total())
        # Shielded: a restart that was begun is ended, whatever becomes of the scenario.
        await asyncio.shield(_restart(world))
        await asyncio.sleep(3.0)


async def _write(world: World, before: int) -> None:
    """Wait for a write after so many."""
    while world.proxy.writes.total() <= before:  # noqa: ASYNC110 (a look every 20 ms is plain)
        await asyncio.sleep(0.02)


async def _restart(world: World) -> None:
    await world.s3.stop()
    await asyncio.sleep(1.0)
    await world.s3.start()


async def model_crashes(world: World) -> None:
    """The model drops every connection for longer than a pod has patience, comes back, is overloaded, and so on."""
    while True:
        for state in ("away", "failing"):
            await asyncio.sleep(5.0)
            setattr(world.model, state, True)
            await asyncio.sleep(2.5)
            setattr(world.model, state, False)


ANY = tuple(Fault)


def random_kills(most: int) -> Callable[[Random], Kills]:
    return lambda random: RandomKills(random, most)


def at_write(
    moment: Moment, nth: int, number: signal.Signals = signal.SIGKILL, most: int = 1000
) -> Callable[[Random], Kills]:
    return lambda random: WriteKills(moment, nth, number, most)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("no interruption, 2 shards", 120, (2,), quiet=True),
    Scenario("20% of requests fail", 160, (2,), weather=some_fail(0.2, 1, *ANY)),
    Scenario("10% fail, and random kills", 160, (2,), random_kills(6), some_fail(0.1, 2, *ANY)),
    Scenario(
        "half of the writes lose their answer, kills",
        200,
        (2, 1),
        random_kills(6),
        some_fail(0.5, 3, Fault.LOST_ANSWER, methods="PUT"),
    ),
    Scenario("store away 3 s, again and again", 400, (1,), weather=away(3.0, 2.0, *ANY), quiet=True),
    Scenario("store away 3 s, and random kills", 160, (2,), random_kills(6), away(3.0, 1.0, *ANY)),
    Scenario("store restarts", 400, (2,), weather=store_restarts, quiet=True),
    Scenario("model crashes, is overloaded", 160, (2,), weather=model_crashes),
    *(
        Scenario(f"random instants, {shown}", 200, plan, random_kills(most))
        for plan, shown, most in (
            ((1,), "1 shard", 7),
            ((2,), "2 shards", 8),
            ((3,), "3 shards", 8),
            ((1, 3, 2), "shards 1, 3, 2", 7),
            ((3, 1), "shards 3, 1", 7),
            ((2, 3), "shards 2, 3", 7),
        )
    ),
    Scenario("before each write, 1 shard", 96, (1,), at_write(Moment.BEFORE, 2)),
    Scenario("after each write, 1 shard", 96, (1,), at_write(Moment.AFTER, 1)),
    Scenario("before each write, 2 shards", 96, (2,), at_write(Moment.BEFORE, 2)),
    Scenario("after each write, shards 2, 3", 96, (2, 3), at_write(Moment.AFTER, 1)),
    Scenario("SIGTERM at each write, 1 shard", 96, (1,), at_write(Moment.BEFORE, 1, signal.SIGTERM, most=15)),
    *(
        Scenario(f"at write {n} of a fresh run", 48, (1,), at_write(moment, n, most=1))
        for n in range(1, 7)
        for moment in ((Moment.BEFORE, Moment.AFTER)[n % 2],)
    ),
)


async def suite(folder: Path, console: Console) -> list[Result]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: list[Result] = []
    async with World(folder) as world:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=len(SCENARIOS))
            for seed, scenario in enumerate(SCENARIOS):
                progress.update(bar, description=scenario.name)
                result = await play(world, scenario, seed)
                results.append(result)
                progress.advance(bar)
                state = "as promised" if result.good else f"NOT as promised {result.broken}"
                progress.console.print(f"{result.seconds:5.0f} s  {scenario.name}: {state}", markup=False)
    return results


def show(results: list[Result]) -> Table:
    """The verdict as a table, a line for each scenario and one for all."""
    numbers = ("kills", "gave up", "faults", "rows", "lost", "doubled", "wrong", "twice", "late")
    table = Table(title="Interruptions of generate")
    table.add_column("scenario")
    for column in (*numbers, "recover s"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(*_line(result.scenario.name, [result]), style=None if result.good else "bold red")
    table.add_section()
    table.add_row(*_line("all", results), style="bold")
    table.caption = (
        "rows: of three stages. gave up: attempts that ended by themselves, for a retry. twice: rows generated again, "
        f"counted at the model; late: those of them finished more than {FLUSH_SECONDS + SLACK:.0f} s before the end of "
        f"their pod (rows wait {FLUSH_SECONDS:.0f} s here, 60 s as shipped). recover: from the start of a process to "
        "its first request, median and longest."
    )
    return table


def _line(name: str, results: list[Result]) -> list[str]:
    verdicts = [result.verdict for result in results]
    fields = ("rows", "lost", "doubled", "wrong", "again", "late")
    sums = [sum(getattr(verdict, field) for verdict in verdicts) for field in fields]
    recover = [seconds for verdict in verdicts for seconds in verdict.recover]
    return [
        name,
        str(sum(verdict.kills for verdict in verdicts)),
        str(sum(verdict.gave_up for verdict in verdicts)),
        str(sum(result.faults for result in results)),
        *map(str, sums),
        f"{statistics.median(recover):.1f} {max(recover):.1f}" if recover else "-",
    ]


def main() -> int:
    console, started = Console(width=None if sys.stdout.isatty() else 130), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cgd-chaos-") as folder:
        results = asyncio.run(suite(Path(folder), console))
    console.print(show(results))
    kills = sum(result.verdict.kills for result in results)
    bad = [result.scenario.name for result in results if not result.good]
    console.print(f"{kills} kills in {time.monotonic() - started:.0f} s.")
    if bad:
        console.print(f"[bold red]Not as promised: {'; '.join(bad)}.")
    if kills < LEAST_KILLS:
        console.print(f"[bold red]Fewer than {LEAST_KILLS} kills: the suite does not show what it should.")
    return int(bool(bad) or kills < LEAST_KILLS)


if __name__ == "__main__":
    sys.exit(main())
