"""A few SIGTERMs of `make chaos-signals`, which has them all: every program as PID 1, at instants drawn by a seed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from chaos import signals
from chaos.programs import PROGRAMS, Program
from chaos.signals import World, instants, left_of, play

from cgd_local.pods import pod_namespace

SEED = int(os.environ.get("CGD_SIGNALS_SEED") or time.time())
INSTANTS, HEAVY_INSTANTS = 5, 3
"""Of a program without vLLM and torch, and of one with, whose every start takes ten seconds of a core."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if pod_namespace() != "own":
        message = "only root can make a program PID 1 of a namespace"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    with pytest.MonkeyPatch.context() as patch, World(tmp_path_factory.mktemp("signals")) as started:
        # How fast a program goes at once, only a machine that does nothing else can say: `make chaos-signals`.
        patch.setattr(signals, "AT_ONCE", signals.GRACE)
        yield started


def named(program: Program) -> object:
    return pytest.param(program, id=program.name, marks=[pytest.mark.slow] if program.heavy else [])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("program", [named(one) for one in PROGRAMS if not one.by_hand])
def test_a_program_that_is_asked_to_go_leaves_in_time_and_can_go_on(world: World, program: Program) -> None:
    print(f"CGD_SIGNALS_SEED={SEED}")
    count = HEAVY_INSTANTS if program.heavy else INSTANTS
    result = play(world, program, count, SEED)
    assert not result.faults, f"CGD_SIGNALS_SEED={SEED}\n" + "\n".join(result.faults)
    assert len(result.attempts) == count


def test_half_of_the_instants_are_before_the_first_log_line() -> None:
    drawn = instants(Random(1), 40, 2.0, 9.0)
    assert sum(one < 2.0 for one in drawn) == 20
    assert drawn != sorted(drawn)
    assert all(0.0 <= one <= 9.0 for one in drawn)
    assert drawn == instants(Random(1), 40, 2.0, 9.0)


def test_the_folder_of_an_attempt_tells_its_processes(tmp_path: Path) -> None:
    """What `orphans` counts by."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={"A": str(tmp_path)}) as other:
        try:
            assert left_of(tmp_path) == [other.pid]
        finally:
            other.kill()
    assert left_of(tmp_path) == []
