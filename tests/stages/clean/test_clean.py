"""Deleting what a run has stored, on a real store: all of its own, nothing of another's."""

from pathlib import Path

import pytest
from support.stage_builders import RUN, context

from cgd_stages.clean import __main__ as clean
from cgd_stages.contract import Clean, RunRef, Storage
from cgd_stages.errors import TransientError
from cgd_stages.runtime.program import Context
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import DONE, PARTS, Folder
from cgd_stages.store.rows import now, row_schema
from cgd_stages.store.run import RunStore

OTHER = RunRef(namespace=RUN.namespace, name="other", uid="uid-2")
ROW = {"id": "ab", "sample": 0, "prompt": "2 + 2?", "reference": None, "prompt_tokens": 4}


class Killed(Exception):
    """The process is gone."""


def begun(storage: Storage, scratch: Path, run: RunRef, name: str) -> Folder:
    """A folder of the run with a part in it and no promise yet."""
    made = context(storage, Clean(), scratch, run=run).store.folder("prepare", {"name": name})
    made.put_rows(PARTS, [ROW], row_schema("prepare"))
    return made


def finished(storage: Storage, scratch: Path, run: RunRef, name: str) -> Folder:
    folder = begun(storage, scratch, run, name)
    parts = [folder.put_rows(PARTS, [ROW], row_schema("prepare"))]
    RunStore(folder.bucket, run).point_at(
        folder.finish(facts=clean.StageFacts(), parts=parts, started=now(), inputs={})
    )
    return folder


def cleaned(storage: Storage, scratch: Path, run: RunRef = RUN) -> dict[str, float]:
    made: Context = context(storage, Clean(), scratch, run=run)
    return clean.main(made)[made.task.stage].metrics


def keys(bucket: Bucket) -> list[str]:
    return [stored.key for stored in bucket.list()]


def test_finished_and_unfinished_folders_pointers_and_claims_go(storage, bucket, tmp_path):
    finished(storage, tmp_path, RUN, "done")
    begun(storage, tmp_path, RUN, "under way")
    assert cleaned(storage, tmp_path) == {"folders": 2, "shared": 0, "objects": 3}
    assert keys(bucket) == []


def test_the_runs_logs_go_and_no_other_runs(storage, bucket, tmp_path):
    for run in (RUN, OTHER):
        RunStore(bucket, run).keep_log("answer", b"line")
    assert cleaned(storage, tmp_path) == {"folders": 0, "shared": 0, "objects": 1}
    assert [text for _, text in RunStore(bucket, OTHER).logs()] == [b"line"]
    assert RunStore(bucket, RUN).logs() == []


def test_a_folder_that_another_run_claims_stays_whole(storage, bucket, tmp_path):
    finished(storage, tmp_path, RUN, "both")
    finished(storage, tmp_path, OTHER, "both")
    finished(storage, tmp_path, RUN, "own")
    assert cleaned(storage, tmp_path) == {"folders": 1, "shared": 1, "objects": 2}
    assert RunStore(bucket, OTHER).input("prepare").require().digest
    assert list(RunStore(bucket, RUN).claims()) == [OTHER.uid]
    assert cleaned(storage, tmp_path, OTHER) == {"folders": 1, "shared": 0, "objects": 2}
    assert keys(bucket) == []


def test_a_folder_that_another_run_has_only_begun_to_use_stays(storage, bucket, tmp_path):
    folder = finished(storage, tmp_path, RUN, "both")
    RunStore(bucket, OTHER).claim(Folder(bucket, RUN.namespace, folder.stage, folder.digest))
    assert cleaned(storage, tmp_path)["shared"] == 1
    assert folder.done() is not None


def test_what_an_earlier_run_of_the_name_has_made_stays(storage, bucket, tmp_path):
    former = RUN.model_copy(update={"uid": "uid-0"})
    finished(storage, tmp_path, former, "former")
    begun(storage, tmp_path, RUN, "now")
    assert cleaned(storage, tmp_path)["folders"] == 1
    assert RunStore(bucket, former).input("prepare").require().digest


def test_another_namespace_is_not_looked_at(storage, bucket, tmp_path):
    elsewhere = RunRef(namespace="team-2", name=RUN.name, uid=RUN.uid)
    finished(storage, tmp_path, elsewhere, "elsewhere")
    assert cleaned(storage, tmp_path)["folders"] == 0
    assert RunStore(bucket, elsewhere).input("prepare").require().digest


def test_a_killed_attempt_leaves_no_promise_and_the_next_one_ends_it(storage, bucket, tmp_path, monkeypatch):
    folder = finished(storage, tmp_path, RUN, "done")
    delete = Bucket.delete

    def delete_one_object(self: Bucket, key: str) -> None:
        if folder.done() is None and key.startswith(folder.key()):
            raise Killed
        delete(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "delete", delete_one_object)
        with pytest.raises(Killed):
            clean.main(context(storage, Clean(), tmp_path))
    assert folder.done() is None
    with pytest.raises(TransientError, match="has no output"):
        RunStore(bucket, RUN).input("prepare")
    assert f"{folder.key(DONE)}" not in keys(bucket)
    assert cleaned(storage, tmp_path) == {"folders": 1, "shared": 0, "objects": 1}
    assert keys(bucket) == []


def test_a_run_that_has_stored_nothing_is_cleaned_at_once(storage, bucket, tmp_path):
    assert cleaned(storage, tmp_path) == {"folders": 0, "shared": 0, "objects": 0}
