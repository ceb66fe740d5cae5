"""Models: which exact one is meant, and that its files are the ones that were promised."""

from pathlib import Path

import pytest
from support import tiny
from support.stage_builders import RUN

from cgd_stages.contract import Model, StageFacts
from cgd_stages.errors import TransientError, UserError
from cgd_stages.models import resolve
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Folder
from cgd_stages.store.rows import now
from cgd_stages.store.run import RunStore


def revision(name: object, bucket: Bucket) -> str:
    return resolve.resolve(Model(name=str(name)), RunStore(bucket, RUN)).revision


def upload(bucket: Bucket, folder: Path, key: str) -> str:
    for path in folder.iterdir():
        bucket.upload(path, f"{key}/{path.name}")
    return bucket.uri(key)


def test_a_folder_is_known_by_its_content_and_not_by_its_sizes(bucket, tmp_path):
    one, same, other = (tiny.make(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert (one / "model.safetensors").stat().st_size == (other / "model.safetensors").stat().st_size
    assert revision(one, bucket) == revision(same, bucket) != revision(other, bucket)


def test_a_large_file_is_sampled_to_its_very_end(tmp_path):
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(70 << 20)
    before = resolve._sampled(path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert resolve._sampled(path) != before


def test_a_stored_model_is_fetched_once_and_anew_when_it_changes(bucket, tmp_path):
    uri = upload(bucket, tiny.make(tmp_path / "a", seed=1), "m")
    first = resolve.fetch(Model(name=uri), RunStore(bucket, RUN), tmp_path)
    before = revision(uri, bucket)
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve.fetch(Model(name=uri), RunStore(bucket, RUN), tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    upload(bucket, tiny.make(tmp_path / "b", seed=2), "m")
    second = resolve.fetch(Model(name=uri), RunStore(bucket, RUN), tmp_path)
    assert (second / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert revision(uri, bucket) != before


def test_a_namesake_with_a_longer_name_is_another_model(bucket, tmp_path):
    upload(bucket, tiny.make(tmp_path / "a"), "m-large")
    with pytest.raises(UserError, match=r"has no config\.json"):
        revision(bucket.uri("m"), bucket)


def test_without_weights_only_the_small_files_come(bucket, tmp_path):
    uri = upload(bucket, tiny.make(tmp_path / "a"), "m")
    folder = resolve.fetch(Model(name=uri), RunStore(bucket, RUN), tmp_path, weights=False)
    assert not (folder / "model.safetensors").exists()
    assert (folder / "tokenizer.json").exists()


@pytest.fixture
def trained(bucket, tmp_path) -> Folder:
    """A train stage that is done, with a model in its folder."""
    folder = Folder(bucket, RUN.namespace, "train-cgd", "d1")
    parts = [folder.put(f"model/{path.name}", path.read_bytes()) for path in tiny.make(tmp_path / "t").iterdir()]
    RunStore(bucket, RUN).point_at(folder.finish(facts=StageFacts(), parts=parts, started=now(), inputs={}))
    return folder


def test_the_model_of_a_stage_comes_through_the_runs_pointer(trained, bucket, tmp_path):
    assert revision("stage://train-cgd", bucket) == "d1"
    folder = resolve.fetch(Model(name="stage://train-cgd"), RunStore(bucket, RUN), tmp_path)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "t" / "model.safetensors").read_bytes()


def test_a_model_that_is_not_what_its_stage_promised_is_not_used(trained, bucket, tmp_path):
    bucket.put(trained.key("model/model.safetensors"), b"something else")
    with pytest.raises(TransientError, match="is not what its marker promises"):
        resolve.fetch(Model(name="stage://train-cgd"), RunStore(bucket, RUN), tmp_path)
    assert not list((tmp_path / "models").rglob("model.safetensors"))


def test_a_stage_that_has_not_ended_has_no_model(bucket):
    with pytest.raises(TransientError, match="has no output of train-cgd"):
        revision("stage://train-cgd", bucket)


@pytest.mark.parametrize(
    ("name", "message"),
    [("/nowhere", "does not exist"), ("not a hub id!", "there is no model"), ("nobody/nothing", "HF_HUB_OFFLINE")],
)
def test_a_model_that_is_not_there_is_refused_by_name(bucket, monkeypatch, name, message):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message) as caught:
        revision(name, bucket)
    assert "spec.student or spec.teacher" in caught.value.hint


def test_an_empty_folder_is_no_model(bucket, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        revision(tmp_path, bucket)


def test_only_hub_ids_are_pinned():
    names = ["org/model", "/path", "./path", "s3://b/k", "stage://train-cgd"]
    assert [resolve.is_hub(Model(name=name)) for name in names] == [True, False, False, False, False]
