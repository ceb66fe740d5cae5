"""The demo and what stays up behind it: what is up, what a user is told."""

import asyncio
import fcntl
import os
import sys
from pathlib import Path

import pytest

from cgd_local import __main__ as command
from cgd_local.background import LOCK, READY, down, holder, up
from cgd_local.demo import read
from cgd_local.kubectl import DemoError, configmaps

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart.yaml"


def test_nothing_is_up_in_a_new_folder_nor_where_a_process_has_died(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    (tmp_path / LOCK).write_text(str(os.getpid()))
    (tmp_path / READY).write_text("{}")
    assert holder(tmp_path) is None


def test_who_holds_the_lock_is_up(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        assert holder(tmp_path) == 4711


async def test_where_nothing_is_up_nothing_is_ended(tmp_path: Path) -> None:
    assert await down(tmp_path) is False


async def test_why_it_does_not_start_is_told(tmp_path: Path) -> None:
    (tmp_path / "s3").write_text("no folder")
    with pytest.raises(DemoError, match="s3"):
        await asyncio.wait_for(up(tmp_path), 120)
    assert holder(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("kind: CGDRun", "kind: Pod"), "holds no CGDRun"),
        (("name: quickstart\n", "name: quickstart\n  namespace: mine\n"), "leave out metadata.namespace"),
        (("learningRate", "learningrate"), "training.learningrate: there is no such field"),
        (('learningRate: "1e-4"', "learningRate: 1e-4"), "write it in quotes"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_told_before_anything_starts(
    tmp_path: Path, change: tuple[str, str], told: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(QUICKSTART.read_text().replace(*change))
    with pytest.raises(DemoError, match=told):
        read(path)


@pytest.mark.parametrize("file", ["name=path", "name/key", "name/key=nowhere"])
def test_a_file_that_cannot_be_put_is_named(file: str) -> None:
    with pytest.raises(DemoError, match=f"--file {file}"):
        configmaps([file])


@pytest.mark.parametrize(
    ("words", "again"), [([], "make demo"), (["--manifest", "my run.yaml"], " -m cgd_local --manifest 'my run.yaml'")]
)
def test_what_goes_on_is_what_was_typed(monkeypatch: pytest.MonkeyPatch, words: list[str], again: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cgd_local", *words])
    assert command.again().endswith(again)
