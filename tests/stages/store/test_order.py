"""Whatever order a store lists its objects in, over pages that overlap: who reads a list makes the same of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.lying_store import Lie, lying
from support.stage_builders import RUN, context, prepare_work

from cgd_local.s3 import SeaweedFS
from cgd_stages.clean import __main__ as clean
from cgd_stages.contract import Clean, Model, StageFacts, Storage
from cgd_stages.errors import UserError
from cgd_stages.models import resolve
from cgd_stages.prepare.sources import open_source
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS, Folder
from cgd_stages.store.part_writer import PartWriter
from cgd_stages.store.rows import Row, now, row_schema
from cgd_stages.store.run import RunStore

FILES = ["a-b.json", "a.b/x.json", "a/b.json", "a/b/c.json", "config.json", "z.json"]


@pytest.fixture(params=[0, 1, 2])
def shuffled(s3: SeaweedFS, storage: Storage, request: pytest.FixtureRequest) -> Iterator[Storage]:
    """The test's place, in a store that lists it in another order."""
    with lying(s3, Lie.SHUFFLED, request.param) as endpoint:
        yield storage.model_copy(update={"endpoint": endpoint})


def uploaded(bucket: Bucket, *keys: str) -> None:
    for key in keys:
        bucket.put(key, b"{}")


def test_a_stored_model_is_the_same_one_and_comes_whole(bucket: Bucket, shuffled: Storage, tmp_path: Path) -> None:
    uploaded(bucket, *(f"m/{name}" for name in FILES))
    store, model = RunStore(Bucket(shuffled), RUN), Model(name=bucket.uri("m"))
    assert resolve.resolve(model, store) == resolve.resolve(model, RunStore(bucket, RUN))
    folder = resolve.fetch(model, store, tmp_path)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json")) == FILES


def test_two_objects_of_a_model_that_no_folder_holds_together_are_named(bucket: Bucket, tmp_path: Path) -> None:
    uploaded(bucket, "m/config.json", "m/onnx/model.json", "m/onnx")
    with pytest.raises(UserError, match=r"the objects .onnx. and .onnx/model\.json. cannot lie below one folder"):
        resolve.fetch(Model(name=bucket.uri("m")), RunStore(bucket, RUN), tmp_path)


def test_the_files_of_a_source_are_read_in_the_order_of_their_names(
    bucket: Bucket, shuffled: Storage, tmp_path: Path
) -> None:
    names = [f"in/p{number}.jsonl" for number in (1, 10, 2, 3, 4, 5)]
    uploaded(bucket, *names)
    work = prepare_work("m", bucket.uri("in/*.jsonl"))
    files = open_source(context(shuffled, work, tmp_path), work.prompts, "spec.prompts")
    assert [file.name for file in files] == [bucket.uri(name) for name in names]


def row(number: int) -> Row:
    return {"id": f"{number:020x}", "sample": 0, "prompt": str(number), "reference": None, "prompt_tokens": 1}


def test_parts_of_an_earlier_attempt_are_recovered_in_one_order(bucket: Bucket, shuffled: Storage) -> None:
    folder = Folder(bucket, RUN.namespace, "answer", "d1")
    for number in range(7):
        folder.put_rows(PARTS, [row(number)], row_schema("prepare"))

    def recovered(found: Bucket) -> list[str]:
        writer = PartWriter(
            Folder(found, RUN.namespace, "answer", "d1"), row_schema("prepare"), key=lambda found: found["id"]
        )
        writer.recover()
        return [part.key for part in writer.parts]

    assert recovered(Bucket(shuffled)) == recovered(bucket)
    assert len(recovered(bucket)) == 7


def test_clean_deletes_all_that_a_run_has_stored(bucket: Bucket, shuffled: Storage, tmp_path: Path) -> None:
    store = RunStore(bucket, RUN)
    for stage in ("prepare", "answer", "critique", "refine"):
        folder = store.folder(stage, {"stage": stage})
        parts = [folder.put_rows(PARTS, [row(number)], row_schema("prepare")) for number in range(3)]
        store.point_at(folder.finish(facts=StageFacts(), parts=parts, started=now(), inputs={}))
    clean.main(context(shuffled, Clean(), tmp_path))
    assert list(bucket.list()) == []
