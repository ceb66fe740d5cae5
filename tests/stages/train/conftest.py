"""Where the training loop runs in tests: in the test's own process, or in two that stand by."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.standing_ranks import StandingRanks

from cgd_local.s3 import SeaweedFS
from cgd_stages.train import launch
from cgd_stages.train.stage import Stage


@pytest.fixture(scope="session")
def standing_ranks(s3: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandingRanks]:
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    ranks = StandingRanks(tmp_path_factory.mktemp("ranks"), **keys, AWS_EC2_METADATA_DISABLED="true")
    yield ranks
    ranks.end()


@pytest.fixture
def two_ranks(standing_ranks: StandingRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher gives every training to two real processes that are there already."""
    monkeypatch.setattr(launch, "torchrun", standing_ranks.run)


@pytest.fixture
def launcher(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher runs the loop in this process and lets its errors through; the folder stays."""
    from cgd_stages.train import loop as trainloop

    def run(stage: Stage, folder: Path) -> None:
        trainer = trainloop.start(folder)
        trainer.run()
        trainer.export()

    monkeypatch.setattr(launch, "torchrun", run)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
