"""What the tests of the stages share: a real S3 server, and the tiny model."""

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from stage_builders import bucket_of

from cgd_local.s3 import SeaweedFS
from cgd_stages.contract import Storage
from cgd_stages.storage import Bucket


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
