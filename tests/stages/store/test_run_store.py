"""The store of a run: a stage's output is made once, promised, and pointed at."""

from importlib.metadata import version

import pytest
from support.stage_builders import RUN

from cgd_stages.contract import Rows, StageFacts
from cgd_stages.errors import TransientError
from cgd_stages.store import maker
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS, Folder, read_rows
from cgd_stages.store.maker import MADE_BY, PACKAGES
from cgd_stages.store.rows import digest_of, row_schema
from cgd_stages.store.run import Product, RunStore

INPUTS = {"stage": "prepare", "seed": 1}
ROW = {"id": "ab", "sample": 0, "prompt": "2 + 2?", "reference": None, "prompt_tokens": 4}
OTHER = RUN.model_copy(update={"name": "other", "uid": "uid-2"})


@pytest.fixture
def store(bucket: Bucket) -> RunStore:
    return RunStore(bucket, RUN)


def made(folder: Folder) -> Product:
    part = folder.put_rows(PARTS, [ROW], row_schema("prepare"))
    facts = StageFacts(rows=Rows(total=1, done=1))
    return Product(facts, [part], settings={"workers": 2}, notes={"pins": {"a": "b"}})


def never(folder: Folder) -> Product:
    pytest.fail(f"{folder.uri} is made again")


def test_an_output_is_made_promised_and_pointed_at(store: RunStore) -> None:
    done = store.produce("prepare", INPUTS, made)
    assert store.input("prepare") == store.place("prepare", INPUTS)
    assert store.pointer("prepare").facts == done.facts
    assert store.stages() == {"prepare"}
    assert list(read_rows(store.input("prepare"))) == [ROW]


def test_what_is_noted_is_stored_with_the_inputs_and_changes_no_digest(store: RunStore) -> None:
    done = store.produce("prepare", INPUTS, made)
    assert done.digest == digest_of(**INPUTS)
    assert done.inputs == INPUTS | {"pins": {"a": "b"}}
    assert done.settings["workers"] == 2


def test_a_promise_names_the_run_that_made_it_and_its_versions_whoever_uses_it(store: RunStore) -> None:
    RunStore(store.bucket, OTHER).produce("prepare", INPUTS, made)
    told = store.produce("prepare", INPUTS, never).settings[MADE_BY]
    assert (told["run"], told["uid"]) == (OTHER.name, OTHER.uid)
    assert told["versions"]["torch"] == version("torch")
    assert {"cgd-stages", "transformers", "deepspeed"} <= told["versions"].keys() <= set(PACKAGES)


def test_a_package_that_an_image_lacks_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maker, "PACKAGES", ("torch", "no-such-package"))
    maker.versions.cache_clear()
    assert maker.versions() == {"torch": version("torch")}
    maker.versions.cache_clear()


def test_another_attempt_and_another_run_with_the_same_inputs_use_what_is_there(store: RunStore) -> None:
    first = store.produce("prepare", INPUTS, made)
    assert store.produce("prepare", INPUTS, never) == first
    other = RunStore(store.bucket, OTHER)
    assert other.produce("prepare", INPUTS, never) == first
    folder = store.place("prepare", INPUTS)
    assert store.claims() == {RUN.uid: {folder}, OTHER.uid: {folder}}


def test_an_attempt_that_fails_promises_nothing_and_has_claimed_its_folder(store: RunStore) -> None:
    def fail(folder: Folder) -> Product:
        folder.put_rows(PARTS, [ROW], row_schema("prepare"))
        raise TransientError("the engine died")

    with pytest.raises(TransientError, match="died"):
        store.produce("prepare", INPUTS, fail)
    assert store.place("prepare", INPUTS).done() is None
    assert store.stages() == set()
    assert store.claims() == {RUN.uid: {store.place("prepare", INPUTS)}}


def test_what_is_made_but_not_pointed_at_is_no_input(store: RunStore) -> None:
    assert store.make_once("prepare", INPUTS, made).rows.done == 1
    with pytest.raises(TransientError, match="has no output of prepare"):
        store.input("prepare")
