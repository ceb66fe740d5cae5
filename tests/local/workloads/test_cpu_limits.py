"""A CPU limit, as a program sees it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.patience import PATIENCE

from cgd_local.pods import confine, launch

COUNT = "import os; print(sorted(os.sched_getaffinity(0)))"
CORES = sorted(os.sched_getaffinity(0))


def cores_of(folder: Path, container: dict[str, Any]) -> list[int]:
    log = folder / "log"
    log.unlink(missing_ok=True)
    confined = folder / "confined"
    confined.unlink(missing_ok=True)
    script = f"import pathlib, time\nwhile not pathlib.Path({str(confined)!r}).exists(): time.sleep(0.02)\n{COUNT}"
    process: subprocess.Popen[bytes] = launch([sys.executable, "-c", script], dict(os.environ), folder, log)
    confine(process, container)
    confined.touch()
    assert process.wait(PATIENCE) == 0
    found: list[int] = eval(log.read_text())  # noqa: S307 (a list of numbers that this test printed)
    return found


@pytest.mark.skipif(len(CORES) < 2, reason="one core cannot be divided")
def test_two_containers_of_one_core_each_get_different_cores(tmp_path: Path) -> None:
    limited = {"resources": {"limits": {"cpu": "1"}}}
    first, second = cores_of(tmp_path, limited), cores_of(tmp_path, limited)
    assert len(first) == len(second) == 1
    assert first != second


@pytest.mark.parametrize("limit", [None, "500m", str(len(CORES)), "1000"])
def test_a_limit_that_is_no_smaller_whole_number_leaves_every_core(tmp_path: Path, limit: str | None) -> None:
    assert cores_of(tmp_path, {"resources": {"limits": {"cpu": limit}} if limit else {}}) == CORES
