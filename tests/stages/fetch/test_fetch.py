"""The cluster's cache of models: filled once, whole, and read by pods that cannot write there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support import tiny
from support.hub import COMMIT, Hub, serving
from support.stage_builders import RUN, context

from cgd_stages.contract import MODEL_CACHE, Fetch, Model, RunRef, StageFacts, Storage
from cgd_stages.errors import TransientError, UserError
from cgd_stages.fetch import __main__ as fetch
from cgd_stages.models import resolve
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.rows import now
from cgd_stages.store.run import RunStore

OTHER = RunRef(namespace=RUN.namespace, name="other", uid="uid-2")
ON_HUB = Model(name="team/sums", revision=COMMIT)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models-of-the-cluster"
    folder.mkdir()
    monkeypatch.setenv(MODEL_CACHE, str(folder))
    return folder


@pytest.fixture
def stored(bucket: Bucket, tmp_path: Path) -> str:
    """A model in S3."""
    for path in tiny.make(tmp_path / "made").iterdir():
        bucket.upload(path, f"m/{path.name}")
    return bucket.uri("m")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"words"}
    with serving(Hub(kind="models", files=files), tmp_path / "hub", monkeypatch) as given:
        yield given


def prepared(bucket: Bucket, run: RunRef = RUN, **pins: str) -> None:
    """A run whose prepare has pinned these models."""
    store = RunStore(bucket, run)
    folder = store.folder("prepare", {"pins": pins})
    store.point_at(folder.finish(facts=StageFacts(), parts=[], started=now(), inputs={"pins": pins}))


def fetched(storage: Storage, scratch: Path, *models: Model, run: RunRef = RUN) -> dict[str, float]:
    given = context(storage, Fetch(models=models), scratch, run=run)
    return fetch.main(given)["fetch"].metrics


def test_a_stored_model_is_kept_once_and_read_from_there(storage, bucket, stored, cache, tmp_path):
    prepared(bucket)
    told = fetched(storage, tmp_path, Model(name=stored))
    (folder,) = (cache / "s3").iterdir()
    assert told == {"models": 1, "bytes": sum(path.stat().st_size for path in folder.iterdir())}
    weights = folder / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    prepared(bucket, OTHER)
    assert fetched(storage, tmp_path, Model(name=stored), run=OTHER) == told
    assert weights.stat().st_mtime_ns == stamp
    scratch = tmp_path / "pod"
    assert resolve.fetch(Model(name=stored), RunStore(bucket, RUN), scratch) == folder
    assert not scratch.exists(), "a pod with a GPU downloads nothing"


def test_a_download_that_was_interrupted_is_not_taken_for_the_model(
    storage, bucket, stored, cache, tmp_path, monkeypatch
):
    prepared(bucket)
    download = Bucket.download

    def dies(self: Bucket, key: str, path: Path) -> None:
        if path.name == "model.safetensors":
            raise TransientError("the store is away")
        download(self, key, path)

    monkeypatch.setattr(Bucket, "download", dies)
    with pytest.raises(TransientError):
        fetched(storage, tmp_path, Model(name=stored))
    monkeypatch.setattr(Bucket, "download", download)
    pod = resolve.fetch(Model(name=stored), RunStore(bucket, RUN), tmp_path / "pod")
    assert pod.is_relative_to(tmp_path / "pod"), "as without a cache"
    fetched(storage, tmp_path, Model(name=stored))
    (folder,) = (cache / "s3").iterdir()
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "made/model.safetensors").read_bytes()


def test_a_model_of_the_hub_is_kept_at_the_commit_that_prepare_has_found(
    storage, bucket, hub, cache, tmp_path, monkeypatch
):
    prepared(bucket, **{ON_HUB.name: COMMIT})
    told = fetched(storage, tmp_path, Model(name=ON_HUB.name))
    assert told == {"models": 1, "bytes": len(b"{}") + len(b"weights")}, "the files that programs read, no others"
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = resolve.fetch(ON_HUB, RunStore(bucket, RUN), tmp_path / "pod")
    assert folder.is_relative_to(cache)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert resolve.resolve(ON_HUB, RunStore(bucket, RUN)).revision == COMMIT, "a digest does not know the cache"
    assert hub.asked == []


def test_a_cache_without_the_model_is_left_alone_by_pods(bucket, hub, cache, tmp_path):
    folder = resolve.fetch(ON_HUB, RunStore(bucket, RUN), tmp_path / "pod")
    assert not folder.is_relative_to(cache)
    assert list(cache.iterdir()) == []


def test_a_model_of_the_hub_of_which_a_file_is_missing_is_not_taken(storage, bucket, hub, cache, tmp_path):
    prepared(bucket, **{ON_HUB.name: COMMIT})
    fetched(storage, tmp_path, Model(name=ON_HUB.name))
    (weights,) = cache.rglob("snapshots/*/model.safetensors")
    weights.unlink()
    assert not resolve.fetch(ON_HUB, RunStore(bucket, RUN), tmp_path / "pod").is_relative_to(cache)
    fetched(storage, tmp_path, Model(name=ON_HUB.name))
    assert resolve.fetch(ON_HUB, RunStore(bucket, RUN), tmp_path / "pod").is_relative_to(cache)


def test_a_cache_that_is_not_there_names_the_field(storage, bucket, stored, tmp_path, monkeypatch):
    prepared(bucket)
    monkeypatch.setenv(MODEL_CACHE, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="the model cache is not mounted") as error:
        fetched(storage, tmp_path, Model(name=stored))
    assert "spec.modelCache" in error.value.hint


def test_a_model_in_the_image_is_not_copied(storage, bucket, cache, tmp_path):
    prepared(bucket)
    made = tiny.make(tmp_path / "image")
    assert fetched(storage, tmp_path, Model(name=str(made)))["models"] == 1
    assert list(cache.iterdir()) == []
