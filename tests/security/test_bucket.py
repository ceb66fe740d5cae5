"""Whoever can write to the bucket gives the pods data, and no code to run: nothing is played here."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_builders import RUN
from train_builders import STAGE, train_work

from cgd_stages import student
from cgd_stages.checkpoints import Checkpoints, file_sha256
from cgd_stages.contract import Rows, Storage
from cgd_stages.errors import UserError
from cgd_stages.saving import Saver
from cgd_stages.storage import Bucket
from cgd_stages.trainjob import CHECKPOINTS, Job

CURVE = [{"step": 1.0, "loss": 2.0}]


class Marker:
    """A pickle of it leaves a file where it is loaded with whatever it asks for."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self._path),)


# --- checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of one process, as the training loop joins it."""
    import torch.distributed as dist

    from cgd_stages import trainloop

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = dict(os.environ)
    os.environ.update(place)
    trainloop.join_group()
    yield
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def saver(storage: Storage, folder: Path, resume: int, **changes: Any) -> Saver:
    """Of a layer in training under DeepSpeed."""
    work = train_work(Path("x"), **changes)
    given: dict[str, Any] = {"student": "", "student_dtype": "float32", "first_rank": 0, "rows": Rows()}
    job = Job(run=RUN, stage=STAGE, digest="d1", storage=storage, work=work, resume=resume, **given)
    torch.manual_seed(resume)
    layer = torch.nn.Linear(8, 8).to(getattr(torch, work.dtype))
    return Saver(student.initialize(layer, student.deepspeed_config(work, 1, gpu=False)), job, folder)


def step(engine: Any) -> float:
    loss = engine(torch.ones(2, 8, dtype=next(engine.module.parameters()).dtype)).float().square().sum()
    engine.backward(loss)
    engine.step()
    return float(loss)


def stored(storage: Storage, folder: Path, **changes: Any) -> Saver:
    """A training after one step, whose checkpoint is in the bucket."""
    training = saver(storage, folder, 0, **changes)
    step(training._engine)
    training.save(1, CURVE)
    training.wait()
    return training


def resumed(storage: Storage, folder: Path, **changes: Any) -> Saver:
    later = saver(storage, folder, 1, **changes)
    later._checkpoints.fetch(folder / CHECKPOINTS, range(1))
    later.load()
    return later


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_checkpoint_is_loaded_as_data_alone_and_training_goes_on_as_it_would_have(
    group: None, storage: Storage, bucket: Bucket, tmp_path: Path, zero_stage: int, dtype: str
) -> None:
    first = stored(storage, tmp_path / "first", zero_stage=zero_stage, dtype=dtype)
    later = resumed(storage, tmp_path / "later", zero_stage=zero_stage, dtype=dtype)
    assert [step(later._engine) for _ in range(3)] == [step(first._engine) for _ in range(3)]


def replace(checkpoints: Checkpoints, name: str, marker: Marker, scratch: Path) -> None:
    """Put a pickle of the marker in the place of a checkpoint's file, with a promise that fits."""
    newest = checkpoints.newest()
    assert newest
    torch.save({"module": marker}, scratch / name)
    checkpoints.folder.bucket.upload(scratch / name, checkpoints._key(1, name))
    files = [
        part.model_copy(update={"sha256": file_sha256(scratch / name)}) if part.key == name else part
        for part in newest.files
    ]
    assert any(part.key == name for part in files)
    checkpoints.complete(1, files)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("zero_stage", "what"),
    [(0, "model_states"), (2, "model_states"), (2, "optim_states"), (3, "model_states"), (3, "optim_states")],
)
def test_a_checkpoint_that_holds_code_is_refused_and_the_code_is_not_run(
    group: None, storage: Storage, bucket: Bucket, tmp_path: Path, zero_stage: int, what: str
) -> None:
    first = stored(storage, tmp_path / "first", zero_stage=zero_stage)
    newest = first._checkpoints.newest()
    assert newest
    (name,) = (part.key for part in newest.files if what in part.key)
    ran = tmp_path / "ran"
    replace(first._checkpoints, name, Marker(ran), tmp_path)
    with pytest.raises(UserError, match="step-000001 holds more than data") as refused:
        resumed(storage, tmp_path / "later", zero_stage=zero_stage)
    assert not ran.exists()
    assert "who else can write to the bucket" in refused.value.hint
