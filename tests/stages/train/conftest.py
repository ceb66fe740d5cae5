"""Two training processes for the tests that ask nothing of their start and end."""

from collections.abc import Iterator

import pytest
from support.standing_ranks import StandingRanks

from cgd_local.s3 import SeaweedFS
from cgd_stages.train import __main__ as train


@pytest.fixture(scope="session")
def standing_ranks(s3: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandingRanks]:
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    ranks = StandingRanks(tmp_path_factory.mktemp("ranks"), **keys, AWS_EC2_METADATA_DISABLED="true")
    yield ranks
    ranks.end()


@pytest.fixture
def two_ranks(standing_ranks: StandingRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher gives every training to two real processes that are there already."""
    monkeypatch.setattr(train, "_torchrun", standing_ranks.run)
