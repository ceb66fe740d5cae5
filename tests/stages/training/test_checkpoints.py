"""Checkpoints in the store: complete ones are found, damaged ones are not used, old ones go."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cgd_stages.errors import UserError
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import DONE, Folder
from cgd_stages.training.checkpoints import UPLOADS, Checkpoints, Layout, needed_by, owner

LAYOUT = Layout(processes=2, zero_stage=2, dtype="float32")
MODEL, ONE, TWO = "mp_rank_00_model_states.pt", *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))


@pytest.fixture
def checkpoints(bucket: Bucket) -> Checkpoints:
    return Checkpoints(Folder(bucket, "team", "train-cgd", "d1"), LAYOUT, keep=2)


def key(checkpoints: Checkpoints, step: int, name: str) -> str:
    return checkpoints.folder.key(f"checkpoints/step-{step:06d}/{name}")


def written(folder: Path, step: int, *names: str) -> Path:
    """The files that a node's processes have written."""
    folder = folder / f"written-{step}"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(f"{name} after {step}")
    return folder


def stored(checkpoints: Checkpoints, tmp_path: Path, *steps: int) -> None:
    """Whole checkpoints of one node with two processes."""
    for step in steps:
        files = checkpoints.upload(step, written(tmp_path, step, MODEL, ONE, TWO), range(2))
        checkpoints.complete(step, files)


def test_every_node_stores_its_own_files_and_fetches_what_its_ranks_need(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    first = checkpoints.upload(5, written(tmp_path / "a", 5, MODEL, ONE), range(1))
    second = checkpoints.upload(5, written(tmp_path / "b", 5, MODEL, TWO), range(1, 2))
    assert [[part.key for part in parts] for parts in (first, second)] == [[MODEL, ONE], [TWO]]
    checkpoints.complete(5, first + second)
    assert checkpoints.fetch(tmp_path / "c", range(1, 2)) == 5
    assert sorted(path.name for path in (tmp_path / "c" / "step-000005").iterdir()) == [MODEL, TWO]
    assert (tmp_path / "c" / "step-000005" / TWO).read_text() == f"{TWO} after 5"


def test_files_are_stored_side_by_side_and_a_bounded_number_at_a_time(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2 * UPLOADS)]
    together, begun, upload = threading.Barrier(UPLOADS, timeout=30), [], Bucket.upload

    def meet(self: Bucket, path: Path, key: str) -> None:
        begun.append(path.name)
        together.wait()
        upload(self, path, key)

    monkeypatch.setattr(Bucket, "upload", meet)
    parts = checkpoints.upload(5, written(tmp_path, 5, *names), range(2 * UPLOADS))
    assert [part.key for part in parts] == sorted(names)
    assert sorted(begun[:UPLOADS]) == sorted(names)[:UPLOADS]


def test_without_its_marker_a_checkpoint_does_not_exist(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert checkpoints.fetch(tmp_path / "none", range(2)) == 0
    stored(checkpoints, tmp_path, 5)
    checkpoints.upload(10, written(tmp_path, 10, MODEL, ONE, TWO), range(2))
    assert checkpoints.fetch(tmp_path / "down", range(2)) == 5


def corrupt(checkpoints: Checkpoints) -> None:
    checkpoints.folder.bucket.put(key(checkpoints, 10, TWO), f"{TWO} after 1O".encode())


def truncate(checkpoints: Checkpoints) -> None:
    checkpoints.folder.bucket.put(key(checkpoints, 10, TWO), b"")


def lose(checkpoints: Checkpoints) -> None:
    checkpoints.folder.bucket.delete(key(checkpoints, 10, TWO))


def cut_the_marker(checkpoints: Checkpoints) -> None:
    data = checkpoints.folder.bucket.get(key(checkpoints, 10, DONE))
    assert data is not None
    checkpoints.folder.bucket.put(key(checkpoints, 10, DONE), data[: len(data) // 2])


def empty_the_marker(checkpoints: Checkpoints) -> None:
    checkpoints.folder.bucket.put(key(checkpoints, 10, DONE), b"")


@pytest.mark.parametrize("damage", [corrupt, truncate, lose, cut_the_marker, empty_the_marker])
def test_of_a_damaged_checkpoint_the_one_before_is_used(
    checkpoints: Checkpoints, tmp_path: Path, damage: Callable[[Checkpoints], None], caplog: pytest.LogCaptureFixture
) -> None:
    stored(checkpoints, tmp_path, 5, 10)
    damage(checkpoints)
    assert checkpoints.fetch(tmp_path / "down", range(2)) == 5
    assert (tmp_path / "down" / "step-000005" / TWO).read_text() == f"{TWO} after 5"
    assert "step-000010 is damaged" in caplog.text
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 5, "a pod that comes later must not choose another one"


def test_when_all_are_damaged_training_begins_anew(checkpoints: Checkpoints, tmp_path: Path) -> None:
    stored(checkpoints, tmp_path, 10)
    lose(checkpoints)
    assert checkpoints.fetch(tmp_path / "down", range(2)) == 0


def test_what_is_there_already_and_whole_is_not_fetched_again(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(checkpoints, tmp_path, 5)
    checkpoints.fetch(tmp_path / "down", range(2))
    (tmp_path / "down" / "step-000005" / ONE).write_text("half")
    fetched, download = [], Bucket.download

    def note(self: Bucket, name: str, path: Path) -> None:
        fetched.append(path.name)
        download(self, name, path)

    monkeypatch.setattr(Bucket, "download", note)
    assert checkpoints.fetch(tmp_path / "down", range(2)) == 5
    assert fetched == [ONE]


def test_only_the_newest_are_kept_and_remains_of_attempts_go(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.upload(3, written(tmp_path, 3, MODEL), range(2))
    stored(checkpoints, tmp_path, 5, 10, 15)
    prefix = checkpoints.folder.key("checkpoints/")
    left = {found.key.removeprefix(prefix).split("/")[0] for found in checkpoints.folder.bucket.list(prefix)}
    assert left == {"step-000010", "step-000015"}


@pytest.mark.parametrize("change", [{"processes": 4}, {"zero_stage": 3}, {"dtype": "bfloat16"}])
def test_another_layout_is_refused_with_what_to_change(
    checkpoints: Checkpoints, tmp_path: Path, change: dict[str, object]
) -> None:
    stored(checkpoints, tmp_path, 5)
    other = replace(checkpoints, layout=LAYOUT.model_copy(update=change))
    with pytest.raises(UserError, match="was written with 2 processes, ZeRO 2 and float32; this run has") as caught:
        other.newest()
    assert "workers, zeroStage, dtype" in caught.value.hint


def test_a_marker_of_another_version_is_refused_and_stays(checkpoints: Checkpoints) -> None:
    checkpoints.folder.bucket.put(key(checkpoints, 5, DONE), b'{"format": 99}')
    with pytest.raises(UserError, match="no marker of this format"):
        checkpoints.newest()
    assert checkpoints.folder.bucket.get(key(checkpoints, 5, DONE)) is not None


def test_a_file_belongs_to_the_rank_in_its_name_and_others_to_the_first() -> None:
    names = ("bf16_zero_pp_rank_13_mp_rank_00_optim_states.pt", MODEL, "metrics.jsonl")
    assert [owner(name) for name in names] == [13, 0, 0]
    assert [needed_by(name, range(4)) for name in names] == [False, True, True]
