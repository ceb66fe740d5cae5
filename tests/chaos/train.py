"""The interruption suite of train: kills at every 5th step and while a checkpoint is stored.

    make chaos-train

Real launchers, torchrun, DeepSpeed and a real S3 server; a tiny model with dropout. A training that was interrupted
must end with the weights and the curve of one that was not: bit by bit with one process, to 1e-6 with two.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import numpy
from chaos.rank import CHAOS, EVERY, Kill, Plan
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load
from support import tiny
from support.stage_builders import Ended, Program
from support.train_builders import STAGE, places, quadruple, refined, stored_curve, train_task, train_work, until_gone

from cgd_local.s3 import SeaweedFS
from cgd_stages.contract import Exit, Storage
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Folder

ROWS = [quadruple(number) for number in range(20)]
EPOCHS, BATCH = 6, 4
STEPS = 30
SIDE_BY_SIDE = 2
TOLERANCE = 1e-6
"""Of weights and losses, with more than one process."""
EXPECTED = {-9, Exit.RETRY, Exit.INTERRUPTED}
CURVE = ("step", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens")


class Broken(Exception):
    """A pod ended as no interruption makes it end."""


@dataclass(frozen=True)
class Shape:
    """Where a training runs. What is interrupted is compared with an uninterrupted training of the same shape."""

    nodes: int
    processes: int
    zero_stage: int

    @property
    def tolerance(self) -> float:
        return 0.0 if self.nodes * self.processes == 1 else TOLERANCE

    def __str__(self) -> str:
        return f"{self.nodes} x {self.processes}, ZeRO {self.zero_stage}"


@dataclass(frozen=True)
class Scenario:
    """The n-th attempt is killed at the n-th of the steps, in one of these ways in turn; the last one may end."""

    shape: Shape
    kills: tuple[Kill, ...] = ()
    steps: tuple[int, ...] = (5, 10, 15, 20, 25)

    @property
    def name(self) -> str:
        ways = ", ".join(kill.value for kill in dict.fromkeys(self.kills))
        return f"{self.shape}: {ways or 'no interruption'}"


@dataclass(frozen=True)
class Trained:
    """The end of a training: its weights by name, and its curve."""

    weights: dict[str, tiny.Array]
    curve: list[dict[str, float]]


@dataclass
class Result:
    scenario: Scenario
    kills: int = 0
    again: int = 0
    """Steps that were made more than once."""
    recover: list[float] = field(default_factory=list)
    """Of each attempt after the first: seconds from its start to the end of its first step."""
    weights: float = 0.0
    """The largest difference to the weights of the uninterrupted training."""
    curve: float = 0.0
    """The largest relative difference to its curve."""
    seconds: float = 0.0
    broken: str = ""

    @property
    def good(self) -> bool:
        tolerance, planned = self.scenario.shape.tolerance, len(self.scenario.steps)
        return not self.broken and self.kills == planned and self.weights <= tolerance and self.curve <= tolerance


def student(folder: Path) -> Path:
    """The tiny model, with dropout: what is random must be the same after an interruption too."""
    model = tiny.make(folder)
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    return model


class Training:
    """One training in a place of its own in the store."""

    def __init__(self, storage: Storage, shape: Shape, model: Path, folder: Path) -> None:
        self._storage = storage.model_copy(update={"uri": f"{storage.uri}/{folder.name}"})
        self._shape, self._model, self._folder = shape, model, folder
        self._bucket = Bucket(self._storage)
        self._attempts = 0
        refined(self._bucket, ROWS)
        folder.mkdir(parents=True)

    def attempt(self, step: int = 0, kill: Kill | None = None) -> tuple[list[Ended], float]:
        """All pods once, to their end; and the seconds from their start to the end of their first step."""
        self._attempts += 1
        folder, shape = self._folder / str(self._attempts), self._shape
        work = train_work(
            self._model,
            workers=shape.nodes,
            processes_per_worker=shape.processes,
            zero_stage=shape.zero_stage,
            epochs=EPOCHS,
            global_batch_size=BATCH,
            checkpoint_every_steps=EVERY,
        )
        plan = Plan(notes=self._notes, step=step, kill=kill).model_dump_json()
        before, started = len(self.steps), time.time()
        pods = [
            Program(
                "trainpod",
                train_task(self._storage, work),
                folder / str(rank),
                package="chaos",
                OMP_NUM_THREADS="1",
                PYTHONPATH=os.pathsep.join(filter(None, sys.path)),
                **{CHAOS: plan},
                **place,
            )
            for rank, place in enumerate(places(shape.nodes))
        ]
        # All at once: a launcher that was killed is there, for its processes, until somebody has waited for it.
        with ThreadPoolExecutor(len(pods)) as waiting:
            ended = list(waiting.map(Program.wait, pods))
        until_gone(folder)
        made = self.steps[before:]
        return ended, made[0]["at"] - started if made else 0.0

    def killed(self, step: int, kill: Kill) -> float:
        """An attempt that must not come to its end; the seconds to the end of its first step."""
        ended, recover = self.attempt(step, kill)
        if any(pod.code not in EXPECTED for pod in ended):
            raise Broken(f"{kill.value} at step {step}: {_told(ended)}")
        return recover

    @property
    def _notes(self) -> Path:
        return self._folder / "notes"

    @property
    def steps(self) -> list[dict[str, float]]:
        """Every step that was made, over all attempts."""
        return [json.loads(line) for line in self._notes.read_text().splitlines()] if self._notes.exists() else []

    def trained(self, ended: Sequence[Ended]) -> Trained:
        if any(pod.code != Exit.DONE for pod in ended):
            raise Broken(_told(ended))
        folder = Folder(self._bucket, "team", STAGE, ended[0].words.stages[STAGE].digest)
        data = self._bucket.get(folder.key("model/model.safetensors"))
        assert data is not None
        return Trained(load(data), stored_curve(self._bucket, folder))


def uninterrupted(storage: Storage, shape: Shape, model: Path, folder: Path) -> Trained:
    training = Training(storage, shape, model, folder)
    ended, _ = training.attempt()
    return training.trained(ended)


def play(storage: Storage, scenario: Scenario, model: Path, folder: Path, expected: Trained) -> Result:
    """A training that is killed as the scenario says, against one that was not."""
    result, started = Result(scenario), time.monotonic()
    try:
        training = Training(storage, scenario.shape, model, folder)
        for step, kill in zip(scenario.steps, cycle(scenario.kills), strict=False):
            result.recover.append(training.killed(step, kill))
            result.kills += 1
        ended, recover = training.attempt()
        result.recover = [*result.recover[1:], recover]
        found = training.trained(ended)
        result.again = len(training.steps) - STEPS
        result.weights, result.curve = _weights_apart(found, expected), _curves_apart(found, expected)
    except Broken as error:
        result.broken = str(error)
    result.seconds = time.monotonic() - started
    return result


def _weights_apart(one: Trained, other: Trained) -> float:
    if one.weights.keys() != other.weights.keys():
        raise Broken(f"weights of other names: {sorted(one.weights.keys() ^ other.weights.keys())}")
    return max(float(numpy.abs(one.weights[name] - other.weights[name]).max()) for name in one.weights)


def _curves_apart(one: Trained, other: Trained) -> float:
    if len(one.curve) != STEPS or len(other.curve) != STEPS:
        raise Broken(f"curves of {len(one.curve)} and {len(other.curve)} steps, not of {STEPS}")
    pairs = [(mine[name], its[name]) for mine, its in zip(one.curve, other.curve, strict=True) for name in CURVE]
    return max(abs(mine - its) / max(abs(its), 1e-12) for mine, its in pairs)


def _told(ended: Sequence[Ended]) -> str:
    return "\n".join(f"exit code {pod.code}\n{pod.log[-3000:]}" for pod in ended)


ONE, TWO, NODES = Shape(1, 1, 2), Shape(1, 2, 2), Shape(2, 1, 3)
SCENARIOS = (
    Scenario(NODES, (Kill.RANK, Kill.ALL, Kill.LAUNCHER, Kill.UPLOAD, Kill.SIGTERM)),
    Scenario(TWO, (Kill.RANK, Kill.ALL, Kill.LAUNCHER, Kill.UPLOAD, Kill.PROMISE)),
    Scenario(ONE, (Kill.RANK, Kill.UPLOAD, Kill.PROMISE, Kill.SIGTERM, Kill.LAUNCHER)),
)


def suite(storage: Storage, folder: Path, console: Console) -> list[Result]:
    """Scenarios side by side: most of the time of an attempt is one core's, that imports."""
    model = student(folder / "student")

    def result_of(numbered: tuple[int, Scenario]) -> Result:
        number, scenario = numbered
        expected = uninterrupted(storage, scenario.shape, model, folder / f"whole-{number}")
        result = play(storage, scenario, model, folder / f"killed-{number}", expected)
        state = "as promised" if result.good else f"NOT as promised {result.broken}"
        console.print(f"{result.seconds:5.0f} s  {scenario.name}: {state}", markup=False)
        return result

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(pool.map(result_of, enumerate(SCENARIOS)))


def show(results: Sequence[Result]) -> Table:
    table = Table(title="Interruptions of train")
    table.add_column("nodes x processes: killed")
    for column in ("kills", "steps", "twice", "recover s", "weights differ", "curve differs"):
        table.add_column(column, justify="right")
    for result in results:
        recover = f"{statistics.median(result.recover):.1f} {max(result.recover):.1f}" if result.recover else "-"
        numbers = (str(result.kills), str(STEPS), str(result.again), recover)
        table.add_row(
            result.scenario.name,
            *numbers,
            f"{result.weights:.1e}" if result.weights else "0",
            f"{result.curve:.1e}" if result.curve else "0",
            style=None if result.good else "bold red",
        )
    table.caption = (
        f"A kill at every 5th step, a checkpoint every {EVERY}. twice: steps that were made again. recover: from the "
        "start of the pods to the end of their first step, median and longest. weights differ: the largest absolute "
        "difference to an uninterrupted training; curve: the largest relative one of losses, gradient norms and rates."
    )
    return table


def main() -> int:
    console, started = Console(width=None if sys.stdout.isatty() else 130), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cgd-chaos-") as name, asyncio.Runner() as runner:
        folder = Path(name)
        s3 = SeaweedFS(folder / "s3", access_key="test", secret_key="test-secret", bucket="data")
        keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
        os.environ.update(keys | {"AWS_EC2_METADATA_DISABLED": "true"})
        (folder / "s3").mkdir()
        runner.run(s3.start())
        try:
            results = suite(Storage(uri="s3://data", endpoint=s3.endpoint, path_style=True), folder, console)
        finally:
            runner.run(s3.stop())
    console.print(show(results))
    bad = [result.scenario.name for result in results if not result.good]
    console.print(f"{sum(result.kills for result in results)} kills in {time.monotonic() - started:.0f} s.")
    if bad:
        console.print(f"[bold red]Not as promised: {'; '.join(bad)}.")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
