"""Data sets on the Hugging Face hub, read through its own library from a server that speaks its protocol."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub import COMMIT, OLDER, Hub, serving
from support.stage_builders import context, prepare_work

from cgd_operator.api.benchmarks import BENCHMARKS
from cgd_stages.contract import Benchmark, BenchmarkFields, Source
from cgd_stages.errors import StageError, TransientError, UserError
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.prepare.sources import File, open_source
from cgd_stages.store.folder import read_rows
from cgd_stages.store.run import RunStore

ROWS = b'{"question": "Why is the sky blue?", "answer": "It scatters."}\n'


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub(), tmp_path / "cache", monkeypatch) as given:
        yield given


@pytest.fixture
def fetch(storage, tmp_path):
    """Open a source, as prepare does for `spec.prompts`."""

    def opened(uri: str) -> list[File]:
        given = context(storage, prepare_work("/model", uri), tmp_path)
        return open_source(given, Source(source=uri), "spec.prompts")

    return opened


def refusal(fetch, uri: str) -> StageError:
    with pytest.raises(StageError) as caught:
        fetch(uri)
    return caught.value


def test_a_star_takes_the_files_of_its_folder_and_fetches_no_others(hub, fetch):
    hub.files = dict.fromkeys(["data/a-1.jsonl", "data/a-2.jsonl", "data/b.jsonl", "data/a-more/3.jsonl"], ROWS)
    files = fetch("hf://datasets/team/sums/data/a-*.jsonl")
    assert [file.name for file in files] == [f"hf://datasets/team/sums/data/a-{n}.jsonl" for n in (1, 2)]
    assert not [path for path in hub.asked if "resolve" in path and ("/b.jsonl" in path or "/a-more/" in path)]


def test_a_file_at_the_root_is_found(hub, fetch):
    hub.files = {"p.jsonl": ROWS, "more/p.jsonl": b"other"}
    (file,) = fetch("hf://datasets/team/sums/p.jsonl")
    assert file.path.read_bytes() == ROWS


@pytest.mark.parametrize(
    ("revision", "commit"), [("", COMMIT), ("@v1", OLDER), ("@refs/convert/parquet", COMMIT), (f"@{OLDER}", OLDER)]
)
def test_a_revision_is_pinned_to_its_commit(hub, fetch, revision, commit):
    hub.files, hub.older = {"p.jsonl": ROWS}, {"p.jsonl": ROWS + ROWS}
    (file,) = fetch(f"hf://datasets/team/sums{revision}/p.jsonl")
    assert file.revision == commit
    assert file.path.read_bytes() == hub.at(commit)["p.jsonl"]


def test_the_token_of_the_environment_is_used(hub, fetch, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    hub.files = {"p.jsonl": ROWS}
    fetch("hf://datasets/team/sums/p.jsonl")
    assert hub.tokens == {"Bearer hf_test"}


def test_what_is_in_the_cache_needs_no_hub(hub, fetch, monkeypatch):
    hub.files = {"p.jsonl": ROWS}
    first = fetch("hf://datasets/team/sums/p.jsonl")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("hf://datasets/team/sums/p.jsonl") == first


@pytest.mark.parametrize(
    ("uri", "message", "hint"),
    [
        ("hf://datasets/team/nothing/p.jsonl", "no such data set", "spec.hubTokenSecretRef"),
        ("hf://datasets/team/sums@v9/p.jsonl", "no such revision", "Correct spec.prompts.source"),
        ("hf://datasets/team/sums/q-*.jsonl", "has no file q-*.jsonl", "Correct spec.prompts.source"),
        ("hf://datasets/only-a-name", "names no data set", "hf://datasets/owner/name@revision/path"),
        ("hf://datasets/te!am/sums/p.jsonl", "names no data set", "hf://datasets/owner/name@revision/path"),
        ("hf://models/team/sums/p.jsonl", "not a source of rows", "hf://datasets/owner/name@revision/path"),
    ],
)
def test_a_data_set_that_is_not_there_is_refused_with_the_mend(hub, fetch, uri, message, hint):
    hub.files = {"p.jsonl": ROWS}
    error = refusal(fetch, uri)
    assert isinstance(error, UserError)
    assert message in error.message
    assert hint in error.hint


def test_a_gated_data_set_asks_for_access_and_a_token(hub, fetch):
    hub.files = {"p.jsonl": ROWS}
    hub.refused = {"/datasets/team/sums/resolve": (403, "GatedRepo", "Access is restricted.")}
    error = refusal(fetch, "hf://datasets/team/sums/p.jsonl")
    assert isinstance(error, UserError)
    assert "is gated" in error.message
    assert "spec.hubTokenSecretRef" in error.hint


def test_a_token_that_the_hub_does_not_know_is_refused(hub, fetch):
    hub.refused = {"/api": (401, "", "Invalid credentials in Authorization header")}
    error = refusal(fetch, "hf://datasets/team/sums/p.jsonl")
    assert isinstance(error, UserError)
    assert "Check the Hugging Face token of spec.hubTokenSecretRef" in error.hint


def test_a_hub_that_is_switched_off_is_the_users_to_mend(hub, fetch, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refusal(fetch, "hf://datasets/team/sums/p.jsonl")
    assert isinstance(error, UserError)
    assert "put the files in S3 for spec.prompts.source" in error.hint


def test_a_hub_that_is_away_is_asked_again_later(hub, fetch, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = refusal(fetch, "hf://datasets/team/sums/p.jsonl")
    assert isinstance(error, TransientError)
    assert "cannot be fetched from the hub" in error.message


def test_prompts_and_benchmarks_of_the_hub_are_prepared_and_their_commits_recorded(
    hub, storage, tiny_model, tmp_path, bucket
):
    hub.files, hub.older = {"p.jsonl": ROWS}, {"b.jsonl": ROWS}
    prompts, questions = "hf://datasets/team/sums/p.jsonl", "hf://datasets/team/sums@v1/b.jsonl"
    benchmark = Benchmark(name="b", source=questions, fields=BenchmarkFields(prompt="question", reference="answer"))
    given = context(storage, prepare_work(tiny_model, prompts, benchmarks=(benchmark,)), tmp_path)
    prepare.main(given)
    folder = RunStore(bucket, given.task.run).input("prepare")
    assert [row["prompt"] for row in read_rows(folder)] == ["Why is the sky blue?"]
    assert folder.require().inputs["pins"] == {prompts: COMMIT, questions: OLDER}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_known_by_name_is_found_where_the_hub_keeps_its_own_conversion(hub, fetch, name):
    known = BENCHMARKS[name]
    hub.repository = known.repository
    hub.files = {f"{known.config}/{known.split}/0000.parquet": b"rows", f"{known.config}/other/0000.parquet": b"no"}
    (file,) = fetch(known.source)
    assert file.path.read_bytes() == b"rows"
    assert file.revision == COMMIT
