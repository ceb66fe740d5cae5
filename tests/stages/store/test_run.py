"""The store and its folders: promises are written last and believed only when they hold; errors name the mend."""

import pytest
from botocore.exceptions import ClientError
from support.lying_store import Lie, lying
from support.stage_builders import RUN

from cgd_stages.contract import Rows, StageFacts, Storage
from cgd_stages.errors import StageError, TransientError, UserError
from cgd_stages.prepare.sources import row_id
from cgd_stages.store.benchmarks import BENCHMARK_SCHEMA, read_benchmarks
from cgd_stages.store.bucket import Bucket, places
from cgd_stages.store.folder import DONE, PARTS, Done, Folder, read_rows
from cgd_stages.store.rows import digest_of, from_parquet, now, row_schema, sha256, to_parquet
from cgd_stages.store.run import RunStore
from cgd_stages.store.shards import may_hold, owns

ROW = {"id": "ab", "sample": 0, "prompt": "2 + 2?", "reference": None, "prompt_tokens": 4}


@pytest.fixture
def folder(bucket):
    return Folder(bucket, "team", "prepare", "d1")


def finished(folder: Folder, rows: list[dict[str, object]]) -> Done:
    part = folder.put_rows(PARTS, rows, row_schema("prepare"))
    facts = StageFacts(rows=Rows(total=len(rows), done=len(rows)))
    return folder.finish(facts=facts, parts=[part], started=now(), inputs={})


def test_rows_come_back_as_they_were_stored(folder):
    finished(folder, [ROW, ROW | {"id": "cd", "reference": "4"}])
    assert list(read_rows(folder)) == [ROW, ROW | {"id": "cd", "reference": "4"}]
    assert list(read_rows(folder, ["id", "sample"])) == [{"id": "ab", "sample": 0}, {"id": "cd", "sample": 0}]


def test_a_folder_without_its_promise_is_not_read(folder):
    folder.put_rows(PARTS, [ROW], row_schema("prepare"))
    with pytest.raises(TransientError, match="is not complete"):
        list(read_rows(folder))


def test_parts_that_the_promise_does_not_list_are_not_read(folder):
    finished(folder, [ROW])
    folder.put_rows(PARTS, [ROW | {"id": "late"}], row_schema("prepare"))
    assert [row["id"] for row in read_rows(folder)] == ["ab"]


def test_a_part_that_changed_after_the_promise_is_an_error(folder, bucket):
    done = finished(folder, [ROW])
    bucket.put(folder.key(done.parts[0].key), to_parquet([ROW | {"prompt": "3?"}], row_schema("prepare")))
    with pytest.raises(TransientError, match="is not what its marker promises"):
        list(read_rows(folder))


def test_the_first_promise_holds(folder):
    first = finished(folder, [ROW])
    assert finished(folder, [ROW, ROW | {"id": "cd"}]) == first


def test_a_promise_of_another_folder_is_an_error(folder, bucket):
    finished(Folder(bucket, "team", "prepare", "d2"), [ROW])
    bucket.put(folder.key(DONE), bucket.get("team/prepare/d2/DONE.json") or b"")
    with pytest.raises(UserError, match="is the marker of prepare/d2"):
        folder.done()


@pytest.mark.parametrize("data", [b"", b"{}", b'{"format": 2}', b"\xff"])
def test_a_broken_promise_is_an_error(folder, bucket, data):
    bucket.put(folder.key(DONE), data)
    with pytest.raises(UserError, match="is not a marker of this format"):
        folder.done()


def test_a_file_is_never_overwritten_with_something_else(folder):
    assert folder.put("x", b"1") == folder.put("x", b"1")
    with pytest.raises(TransientError, match="another content"):
        folder.put("x", b"2")


def test_a_file_of_a_folder_that_nobody_else_writes_replaces_that_of_an_earlier_attempt(folder, bucket):
    folder.put("x", b"1")
    assert folder.put("x", b"2", alone=True).sha256 == sha256(b"2")
    assert bucket.get(folder.key("x")) == b"2"


def test_benchmark_questions_are_found_under_their_earlier_name_too(folder):
    question = {"benchmark": "b", "id": "1", "prompt": "q", "reference": "4", "tolerance": ""}
    part = folder.put("benchmarks.parquet", to_parquet([question], BENCHMARK_SCHEMA))
    folder.finish(facts=StageFacts(), parts=[part], started=now(), inputs={})
    assert read_benchmarks(folder) == [question]


def test_a_pointer_leads_to_the_folder_of_this_life_of_the_run(folder, bucket):
    RunStore(bucket, RUN).point_at(finished(folder, [ROW]))
    assert RunStore(bucket, RUN).input("prepare") == folder
    assert RunStore(bucket, RUN).pointer("prepare").uri == folder.uri
    with pytest.raises(TransientError, match="belongs to an earlier run"):
        RunStore(bucket, RUN.model_copy(update={"uid": "uid-2"})).input("prepare")
    with pytest.raises(TransientError, match="has no output of answer"):
        RunStore(bucket, RUN).input("answer")


def test_a_digest_depends_on_every_value_and_not_on_their_order():
    assert digest_of(a=1, b=[2]) == digest_of(b=[2], a=1)
    assert len({digest_of(a=1), digest_of(a=2), digest_of(b=1), digest_of(a="1")}) == 4


def test_an_id_depends_on_the_normalised_text_only():
    assert row_id("Why  is\n it?") == row_id(" Why is it? ")
    assert row_id("caf\u00e9") == row_id("cafe\u0301")
    assert row_id("why is it?") != row_id("Why is it?")
    assert len(row_id("x")) == 20


def test_every_row_has_exactly_one_shard():
    for n in range(200):
        assert sum(owns(row_id(str(n)), shard, 7) for shard in range(7)) == 1


def test_a_shard_skips_the_parts_of_others_of_its_kind():
    name = "parts/00001-of-00004-" + "a" * 32 + ".parquet"
    assert may_hold(name, 1, 4)
    assert not may_hold(name, 2, 4)
    assert may_hold(name, 2, 3)
    assert may_hold("parts/other.parquet", 2, 4)


def test_the_schema_grows_by_a_stage():
    assert row_schema("prepare").names == ["id", "sample", "prompt", "reference", "prompt_tokens"]
    assert row_schema("refine").names[:5] == row_schema("prepare").names
    assert {"answer", "critique", "verdict", "refinement"} <= set(row_schema("refine").names)


def test_a_column_that_a_file_does_not_have_is_left_out():
    assert from_parquet(to_parquet([ROW], row_schema("prepare")), ["id", "answer"]) == [{"id": "ab"}]


def test_bytes_come_and_go(bucket, tmp_path):
    assert bucket.get("a/b") is None
    assert bucket.put("a/b", b"1", if_absent=True)
    assert not bucket.put("a/b", b"2", if_absent=True)
    assert bucket.get("a/b") == b"1"
    (tmp_path / "big").write_bytes(b"x" * 9_000_000)
    bucket.upload(tmp_path / "big", "a/c")
    assert [(found.key, found.size) for found in bucket.list("a/")] == [("a/b", 1), ("a/c", 9_000_000)]
    bucket.download("a/c", tmp_path / "deep" / "back")
    assert (tmp_path / "deep" / "back").read_bytes() == (tmp_path / "big").read_bytes()
    bucket.delete("a/b")
    assert bucket.get("a/b") is None
    assert bucket.at(bucket.uri("a")).get("c") is not None


def test_a_new_object_that_another_writer_is_at_is_tried_again(bucket, monkeypatch):
    """As AWS answers; the store of the tests has no such moment."""
    put, answers = bucket._client.put_object, ["ConditionalRequestConflict", "ConditionalRequestConflict"]

    def contended(**request):
        if answers:
            code = answers.pop()
            raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 409}}, "PutObject")
        return put(**request)

    monkeypatch.setattr(bucket._client, "put_object", contended)
    monkeypatch.setattr("cgd_stages.store.bucket.random.uniform", lambda *_: 0.0)
    assert bucket.put("contended", b"1", if_absent=True)
    answers += ["ConditionalRequestConflict"] * 2
    assert not bucket.put("contended", b"2", if_absent=True)
    assert bucket.get("contended") == b"1"


def test_a_store_without_conditional_writes_is_refused_by_what_it_lacks(bucket, monkeypatch):
    """As a store answers that does not know the header; the store of the tests knows it."""

    def unknown(**_):
        error = {"Code": "NotImplemented", "Message": "A header you provided implies functionality that is missing"}
        raise ClientError({"Error": error, "ResponseMetadata": {"HTTPStatusCode": 501}}, "PutObject")

    monkeypatch.setattr(bucket._client, "put_object", unknown)
    with pytest.raises(UserError, match=r"does not implement this request: .*PutObject") as refused:
        bucket.put("new", b"1", if_absent=True)
    assert "If-None-Match" in refused.value.hint


def test_a_download_that_fails_leaves_nothing(bucket, tmp_path):
    with pytest.raises(UserError, match="there is no object"):
        bucket.download("nowhere", tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_the_probe_tells_who_the_caller_is_and_leaves_nothing(bucket):
    assert bucket.probe() == "access key ...test (env)"
    assert not list(bucket.list(".probe"))


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        (Lie.NO_CONDITION, "ignores If-None-Match"),
        (Lie.LOOKS_FIRST, "does not let exactly one of two writers win"),
        (Lie.NO_WINNER, "does not let exactly one of two writers win"),
        (Lie.WRONG_WINNER, "does not let exactly one of two writers win"),
        (Lie.LONGER_NAME, "refuses a new object while one with a longer name exists"),
    ],
    ids=lambda given: given.name if isinstance(given, Lie) else "",
)
def test_a_store_whose_conditional_writes_do_not_hold_is_refused_before_a_gpu_is_asked_for(
    s3, storage, bucket, lie, told
):
    with lying(s3, lie) as endpoint:
        error = failing(storage.model_copy(update={"endpoint": endpoint}))
    assert isinstance(error, UserError)
    assert f"the store behind {storage.uri} {told}, so that parts could" in error.message
    assert "spec.storage" in error.hint
    assert not list(bucket.list())


def test_a_store_that_lists_in_an_order_of_its_own_passes_the_probe(s3, storage):
    with lying(s3, Lie.SHUFFLED) as endpoint:
        assert Bucket(storage.model_copy(update={"endpoint": endpoint})).probe()


KEYS = ["A", "a-b", "a.b", "a/b", "a/b/c.d", "a/b/c/d", "a0", "b", "z", "\u00e9/x", "\ufffdx", "\U00010000"]


@pytest.mark.parametrize("seed", range(5))
def test_a_list_is_in_the_order_of_keys_and_has_each_once_whatever_the_store_makes_of_it(s3, storage, bucket, seed):
    for key in KEYS:
        bucket.put(f"in/{key}", key.encode())
    with lying(s3, Lie.SHUFFLED, seed) as endpoint:
        found = list(Bucket(storage.model_copy(update={"endpoint": endpoint})).list("in/"))
    assert [stored.key for stored in found] == [f"in/{key}" for key in KEYS]
    assert found == list(bucket.list("in/"))


def test_keys_of_which_a_folder_can_hold_only_one_are_both_named(tmp_path):
    assert places(tmp_path, ["a/b", "a/c", "a.b", "ab"])["a/c"] == tmp_path / "a" / "c"
    for keys in (["a", "a/b"], ["a/b/c", "a"], ["x", "a/b", "a/b/c/d"]):
        with pytest.raises(UserError, match="cannot lie below one folder") as refused:
            places(tmp_path, keys)
        first, second = sorted(keys)[:2]
        assert f"{first!r} and {second!r}" in refused.value.message


def failing(storage: Storage) -> StageError:
    with pytest.raises(StageError) as caught:
        Bucket(storage).probe()
    return caught.value


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("AWS_ACCESS_KEY_ID", "S3 does not know the access key"),
        ("AWS_SECRET_ACCESS_KEY", "the secret key does not belong to it"),
    ],
)
def test_a_wrong_key_is_the_users_to_mend(storage, monkeypatch, name, told):
    monkeypatch.setenv(name, "wrong-value")
    error = failing(storage)
    assert isinstance(error, UserError)
    assert told in error.message
    assert "spec.storage.credentialsSecretRef" in error.hint
    assert "wrong-value" not in error.message


def test_missing_keys_are_the_users_to_mend(storage, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    error = failing(storage)
    assert isinstance(error, UserError)
    assert "no usable S3 credentials" in error.message


def test_a_store_that_is_away_is_worth_a_retry(storage):
    error = failing(storage.model_copy(update={"endpoint": "http://127.0.0.1:1"}))
    assert isinstance(error, TransientError)
    assert "cannot be reached" in error.message
    assert "spec.storage.endpoint" in error.hint


@pytest.mark.parametrize(
    "change", [{"endpoint": "nonsense"}, {"uri": "s3://Not_A_Bucket/x"}, {"uri": "file:///x"}, {"uri": "s3://"}]
)
def test_settings_that_make_no_sense_are_the_users_to_mend(storage, change):
    error = failing(storage.model_copy(update=change))
    assert isinstance(error, UserError)
    assert error.hint
