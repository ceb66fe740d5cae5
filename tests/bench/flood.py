"""What a flood of reports from one run's token costs the other runs: `make bench-flood`.

    PYTHONPATH=tests python tests/bench/flood.py [--runs 50] [--reports 10000] [--stage-seconds 6] [--base COMMIT]

Runs live as in scale.py, each followed by another, and one more stands still at its first child, whose token a
process of its own uses: so many connections send reports one after another, of stages and shards at will, with numbers
of every size, and short and long bodies, until all are sent. Quiet and flood take turns, so that both are measured in
one run: the end of a child belongs to the one that it falls into. Nothing here is a test.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from scale import Bench, bench, console, source_of
from support.builders import CHILDREN, manifest

from cgd_local.ownership import Write

TURN_SECONDS = 15.0
"""Of the first quiet. The others are as long as the flood before."""
CONNECTIONS = 32
WORD = "x" * 50_000
HOSTILE = ("default", "hostile")


def reports(seed: int, count: int) -> list[bytes]:
    """Bodies that fill and break whatever does not look at them."""
    rng, bodies = random.Random(seed), list[bytes]()
    for number in range(count):
        body: dict[str, Any] = {"trainerStatus": {}, "rows": {"total": 10, "done": rng.randrange(11)}}
        match number % 5:
            case 0:
                body |= {"stage": f"stage-{number}", "shard": number}
            case 1:
                body |= {"shard": number}
            case 2:
                body |= {"tokensPerSecond": 1e300}
            case 3:
                body["trainerStatus"] = {"metrics": [{"name": f"m{number}", "value": WORD}]}
        bodies.append(json.dumps(body).encode())
    return bodies


async def _send(port: int, head: str, bodies: list[bytes], answers: Counter[str]) -> None:
    for body in bodies:
        told = b""
        with suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            told = await reader.read()
            writer.close()
        answers[told[9:12].decode() or "none"] += 1


async def _send_all(port: int, head: str, seed: int, count: int) -> Counter[str]:
    answers, bodies = Counter[str](), reports(seed, count)
    await asyncio.gather(*(_send(port, head, bodies[one::CONNECTIONS], answers) for one in range(CONNECTIONS)))
    return answers


def _attack(port: int, head: str, seed: int, count: int, told: Any) -> None:
    told.put(dict(asyncio.run(_send_all(port, head, seed, count))))


@dataclass
class Measured:
    quiet: list[float] = field(default_factory=list)
    """Latencies, in seconds."""
    flood: list[float] = field(default_factory=list)
    rest_mb: float = 0.0
    most_mb: float = 0.0
    """Memory of the operator, at the end of the last quiet and at most in a flood."""
    grown_mb: float = 0.0
    """By how much it was at most larger in a flood than at the end of the quiet before."""
    seconds: float = 0.0
    """Of all floods."""
    writes: int = 0
    """Statuses of the hostile run."""
    answers: Counter[str] = field(default_factory=Counter)


async def _turns(here: Bench, head: str, count: int, turns: int) -> Measured:
    measured, player, quiet = Measured(), here.player, TURN_SECONDS
    context = multiprocessing.get_context("spawn")
    for turn in range(turns):
        before = len(player.latencies)
        await asyncio.sleep(quiet)
        measured.quiet += player.latencies[before:]
        rest = measured.rest_mb = here.operator.look()
        before, told, since = len(player.latencies), context.Queue(), time.monotonic()
        share = count // turns
        attacker = context.Process(target=_attack, args=(here.operator.port, head, turn, share, told))
        attacker.start()
        while told.empty():
            now = here.operator.look()
            measured.most_mb, measured.grown_mb = max(measured.most_mb, now), max(measured.grown_mb, now - rest)
            await asyncio.sleep(0.1)
        measured.answers.update(told.get())
        attacker.join()
        quiet = time.monotonic() - since
        measured.seconds += quiet
        measured.flood += player.latencies[before:]
    return measured


def _create(here: Bench, namespace: str, name: str) -> None:
    registry, body = here.api.registry, manifest(name=name, namespace=namespace)
    del body["metadata"]["uid"], body["metadata"]["generation"]
    write = Write(manager="user", api_version="cgd.dev/v1alpha1")
    registry.create(registry.resources["cgdruns.cgd.dev"], namespace, body, write)


async def _succeed(here: Bench) -> None:
    """For every run that has had its last child another one is made, so that the number of runs stays."""
    for number in range(10**6):
        known = here.player.born[CHILDREN[-1]]
        while here.player.born[CHILDREN[-1]] == known:  # noqa: ASYNC110  a count
            await asyncio.sleep(0.1)
        for one in range(here.player.born[CHILDREN[-1]] - known):
            _create(here, f"team-{number % 10}", f"next-{number}-{one}")


async def measure(runs: int, count: int, turns: int, stage_seconds: float, source: Path | None = None) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        async with bench(runs, stage_seconds, Path(folder), source) as here:
            here.player.endless.add(HOSTILE)
            _create(here, *HOSTILE)
            await here.create()
            (hostile,) = (one for one in here._runs() if one["metadata"]["name"] == HOSTILE[1])
            uid = hostile["metadata"]["uid"]
            await here.until(lambda: (uid, "prepare") in here.player.running, 1, "the hostile run's child")
            await here.live(CHILDREN[2], 0.9)  # the runs were created at once, and are apart by now
            path = f"/progress/{HOSTILE[0]}/{HOSTILE[1]}/{uid}/prepare"
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {here.tokens()[uid, 'prepare']}\r\n"
            succession = asyncio.create_task(_succeed(here))
            before = here.reader.statuses[uid]
            try:
                measured = await _turns(here, head, count, turns)
            finally:
                succession.cancel()
            measured.writes = here.reader.statuses[uid] - before
            return measured


def show(name: str, measured: Measured) -> None:
    table = Table("figure", "quiet", "flood", "ratio", "aim", title=name, title_justify="left")
    quiet, flood = (statistics.quantiles(one, n=100) for one in (measured.quiet, measured.flood))
    for cut, aim in ((49, ""), (98, "at most 1.2")):
        values = quiet[cut], flood[cut]
        shown = [f"{value:.3f} s" for value in values]
        table.add_row(f"a child's end to the next child, p{cut + 1}", *shown, f"{values[1] / values[0]:.2f}", aim)
    table.add_row("ends", str(len(measured.quiet)), str(len(measured.flood)))
    grown = f"{measured.grown_mb:.1f} MB more"
    table.add_row("memory", f"{measured.rest_mb:.0f} MB", f"{measured.most_mb:.0f} MB", grown, "at most 20 MB more")
    sent = sum(measured.answers.values())
    table.add_row("reports", "", f"{sent} in {measured.seconds:.0f} s")
    table.add_row("answers", "", ", ".join(f"{code}: {number}" for code, number in sorted(measured.answers.items())))
    table.add_row("statuses of the hostile run", "", str(measured.writes), "", "one in 2 s")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--reports", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--stage-seconds", type=float, default=6.0)
    parser.add_argument("--base", default="", help="a commit whose operator is measured as well")
    options = parser.parse_args()
    given = options.runs, options.reports, options.turns, options.stage_seconds
    show("this tree", asyncio.run(measure(*given)))
    if options.base:
        with source_of(options.base) as tree:
            show(options.base, asyncio.run(measure(*given, tree)))


if __name__ == "__main__":
    main()
