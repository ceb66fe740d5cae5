"""A checkpoint is stored while training goes on: one at a time, past outages, and what fails is not silent."""

import inspect
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.patience import PATIENCE
from support.stage_builders import RUN
from support.train_builders import STAGE, train_work

from cgd_stages.contract import Rows, Storage
from cgd_stages.errors import TransientError, UserError
from cgd_stages.store import bucket as storage_module
from cgd_stages.store.bucket import Bucket
from cgd_stages.train.saving import Saver
from cgd_stages.training.checkpoints import Checkpoints
from cgd_stages.training.job import CHECKPOINTS, Job

CURVE = [{"step": 1.0, "loss": 2.0}]


class Disk:
    """What the saver needs of DeepSpeed's engine: files of a step."""

    device = torch.device("cpu")

    def save_checkpoint(
        self, folder: str, *, tag: str, save_latest: bool, exclude_frozen_parameters: bool = False
    ) -> None:
        path = Path(folder) / tag
        path.mkdir(parents=True)
        (path / "mp_rank_00_model_states.pt").write_text(f"weights of {tag}")

    def load_checkpoint(self, folder: str, *, tag: str, custom_load_fn: Any = None) -> tuple[str, None]:
        return str(Path(folder) / tag), None


class Gate:
    """Uploads fail while `error` is set, and wait while it is closed."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate, upload = Gate(), inspect.unwrap(Bucket.upload)

    @storage_module.patient
    def guarded(self: Bucket, path: Path, key: str) -> None:
        gate.reached.set()
        gate.open.wait(PATIENCE)
        if gate.error:
            raise gate.error
        upload(self, path, key)

    monkeypatch.setattr(Bucket, "upload", guarded)
    monkeypatch.setattr(storage_module, "LONGEST_PAUSE", 0.01)
    return gate


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def job(storage: Storage) -> Job:
    given: dict[str, Any] = {"student": "", "student_dtype": "float32", "first_rank": 0, "resume": 0, "rows": Rows()}
    return Job(run=RUN, stage=STAGE, digest="d1", storage=storage, work=train_work(Path("x")), **given)


@pytest.fixture
def saver(group: None, job: Job, tmp_path: Path) -> Saver:
    return Saver(Disk(), job, tmp_path)


@pytest.fixture
def checkpoints(job: Job, bucket: Bucket) -> Checkpoints:
    return job.checkpoints(bucket)


def newest(checkpoints: Checkpoints) -> int:
    found = checkpoints.newest()
    return found.step if found else 0


def train_on(saver: Saver) -> None:
    """Make steps, and wait for nothing."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        saver.go_on()


def test_a_checkpoint_is_stored_with_the_curve_and_leaves_the_disk(
    saver: Saver, checkpoints: Checkpoints, bucket: Bucket, tmp_path: Path
) -> None:
    saver.save(5, CURVE)
    saver.wait()
    assert newest(checkpoints) == 5
    assert list((tmp_path / CHECKPOINTS).iterdir()) == []
    assert bucket.get(checkpoints.folder.key("metrics.jsonl")) == b'{"step": 1.0, "loss": 2.0}\n'


def test_training_goes_on_while_the_files_are_on_their_way(saver: Saver, checkpoints: Checkpoints, gate: Gate) -> None:
    gate.open.clear()
    saver.save(5, CURVE)
    assert gate.reached.wait(PATIENCE)
    for _ in range(3):
        saver.go_on()
    assert newest(checkpoints) == 0, "the marker must not come before the files"
    gate.open.set()
    saver.wait()
    assert newest(checkpoints) == 5


def test_the_next_checkpoint_waits_for_the_one_on_its_way(saver: Saver, checkpoints: Checkpoints, gate: Gate) -> None:
    gate.open.clear()
    saver.save(5, CURVE)
    opening = threading.Timer(0.2, gate.open.set)
    opening.start()
    saver.save(10, CURVE)
    assert newest(checkpoints) >= 5
    saver.wait()
    opening.join()
    assert newest(checkpoints) == 10


def test_while_the_store_is_away_training_goes_on_and_the_checkpoint_is_stored_later(
    saver: Saver, checkpoints: Checkpoints, gate: Gate
) -> None:
    gate.error = TransientError("the store is away")
    saver.save(5, CURVE)
    assert gate.reached.wait(PATIENCE)
    for _ in range(3):
        saver.go_on()
    gate.error = None
    saver.wait()
    assert newest(checkpoints) == 5


def test_what_fails_in_the_thread_fails_the_training(saver: Saver, gate: Gate) -> None:
    gate.error = UserError("S3 denies access", hint="Check the Secret.")
    saver.save(5, CURVE)
    with pytest.raises(UserError) as caught:
        train_on(saver)
    assert caught.value is gate.error


def test_who_is_in_a_hurry_does_not_wait_for_a_store_that_is_away(saver: Saver, gate: Gate) -> None:
    gate.error = TransientError("the store is away")
    saver.hurry()
    saver.save(5, CURVE)
    with pytest.raises(TransientError, match="the store is away"):
        saver.wait()


def test_a_later_attempt_loads_the_files_the_curve_and_nothing_stays_on_the_disk(
    saver: Saver, job: Job, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    saver.save(5, CURVE)
    saver.wait()
    resume = checkpoints.fetch(tmp_path / "later" / CHECKPOINTS, job.ranks)
    later = Saver(Disk(), job.model_copy(update={"resume": resume}), tmp_path / "later")
    assert later.load() == CURVE
    assert list((tmp_path / "later" / CHECKPOINTS).iterdir()) == []
