"""What many tests share: a real S3 server, the tiny model, a real browser."""

import asyncio
import os
import shutil
import sysconfig
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from support import tiny
from support.ports import free_port
from support.schedule import FileSchedule, has_slow_tests
from support.stage_builders import bucket_of

from cgd_local.s3 import SeaweedFS
from cgd_stages.contract import Storage
from cgd_stages.store.bucket import Bucket

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from xdist.remote import Producer

# Tests run side by side, where threads that wait for each other cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, however busy the machine is.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

LONG = (
    "pipeline/test_pipeline.py",
    "train/test_loop.py",
    "chaos/test_signals.py",
    "train/test_pods.py",
    "train/test_families.py",
    "engines/test_vllm_settings.py",
    "train/test_gradients.py",
    "chaos/test_interruptions.py",
    "harness/test_harness.py",
    "train/test_rounds.py",
    "generate/test_generate_vllm.py",
    "security/test_bucket.py",
    "train/test_early.py",
    "rollout/test_rollout.py",
)
"""The files whose slow tests take minutes, the longest first: each is one worker's, so they must not come last."""


def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> FileSchedule:
    return FileSchedule(config, log, has_slow_tests(config.rootpath))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(LONG)))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A SeaweedFS of this session."""
    server = SeaweedFS(tmp_path_factory.mktemp("s3"), access_key="test", secret_key="test-secret", bucket="data")
    with asyncio.Runner() as runner:
        runner.run(server.start())
        yield server
        runner.run(server.stop())


@pytest.fixture
def storage(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A place of the test's own in the server, with the keys in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return Storage(uri=f"s3://data/{uuid.uuid4().hex[:12]}", endpoint=s3.endpoint, path_style=True)


@pytest.fixture
def bucket(storage: Storage) -> Bucket:
    return bucket_of(storage)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model: context of 2,048 tokens, a chat template, replies of 1 to 20 tokens."""
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def stock_tasks() -> Iterator[None]:
    """lm-eval reads its own 14,000 task files once in a worker, not whenever it is asked for a task: that takes five
    seconds of a core."""
    from lm_eval.tasks._index import TaskIndex

    stock, read, build = Path(sysconfig.get_path("purelib"), "lm_eval", "tasks"), dict[Path, Any](), TaskIndex.build

    def once(paths: Iterable[Path], **how: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in paths:
            if path == stock and path not in read:
                read[path] = build([path], **how)
            found |= read[path] if path == stock else build([path], **how)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(once))
        yield
        assert read, "lm-eval reads its tasks elsewhere by now, so that this fixture saves nothing"


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of this process alone, as the training loop joins it: DeepSpeed runs in the test's own process.

    DeepSpeed ends it, and not torch: DeepSpeed keeps the groups that it has made, and the next module would get them.
    """
    import deepspeed
    import torch

    from cgd_stages.train.group import join_group

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (place | {"MASTER_PORT": str(free_port())}).items():
            environment.setenv(name, value)
        join_group()
        torch.set_num_threads(1)
        yield
        deepspeed.comm.destroy_process_group()


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """A real Chromium; where there is none, CI fails and others go without. Not for longer than a module: its driver
    keeps a loop running, and asyncio's tests want none."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        message = "there is no Chromium on the PATH: apt-get install chromium fonts-dejavu-core"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()
