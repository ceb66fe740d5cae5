"""prepare: every line read is a row or a rejection, and what would fail on a GPU is refused with the mend."""

import gzip
import io
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support import families, tiny
from support.stage_builders import context, prepare_work

from cgd_stages.contract import (
    Adapter,
    Benchmark,
    BenchmarkFields,
    Decontaminate,
    Endpoint,
    Engine,
    Fields,
    Model,
    Prompts,
    Published,
    Rows,
    Storage,
)
from cgd_stages.errors import RowsLost, TransientError, UserError
from cgd_stages.models import resolve
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.prepare import intake
from cgd_stages.prepare.sources import row_id
from cgd_stages.runtime.progress import Reporter
from cgd_stages.store.benchmarks import read_benchmarks
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import REJECTED, Folder, read_rows
from cgd_stages.store.rows import from_parquet

QUESTIONS = [{"question": f"Ann has {n} apples. How many?", "answer": str(n)} for n in range(60)]


def lines(rows: list[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def put(bucket: Bucket, key: str, data: bytes) -> str:
    bucket.put(key, data)
    return bucket.uri(key)


class Prepared:
    """The outcome of a run of prepare, read back from the store."""

    def __init__(self, storage: Storage, work: object, scratch: Path, inputs: Path | None = None) -> None:
        self.context = context(storage, work, scratch, inputs=inputs)
        self.facts = prepare.main(self.context)["prepare"]
        self.folder = self.context.store.input("prepare")
        self.rows = sorted(read_rows(self.folder), key=lambda row: row["prompt"])
        done = self.folder.require()
        self.rejected = [row for part in done.under(REJECTED) for row in from_parquet(self.folder.read(part))]
        self.done = done


def test_rows_keep_prompt_reference_and_token_count(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    found = Prepared(storage, prepare_work(tiny_model, source), tmp_path)
    assert [row["prompt"] for row in found.rows] == sorted(row["question"] for row in QUESTIONS)
    assert {row["reference"] for row in found.rows} == {str(n) for n in range(60)}
    assert all(row["id"] == row_id(row["prompt"]) and row["prompt_tokens"] > 10 for row in found.rows)
    assert (found.facts.rows.total, found.facts.rows.done, found.facts.rows.rejected) == (60, 60, 0)


def test_a_student_that_could_not_be_stored_at_the_end_is_refused(bucket, storage, tmp_path):
    work = prepare_work(model := tiny.make(tmp_path / "model"), put(bucket, "in/p.jsonl", lines(QUESTIONS)))
    (model / "generation_config.json").write_text('{"temperature": 0.6}')
    assert Prepared(storage, work, tmp_path).facts.rows.done == 60
    (model / "generation_config.json").write_text('{"max_new_tokens": 0}')
    with pytest.raises(UserError, match=r"could not be stored after its training: .*max_new_tokens"):
        Prepared(storage, work, tmp_path)


def with_published(work, folder, figures):
    """The work, and the folder where the ConfigMap with its published figures is mounted."""
    asked = Published(uri="configmap://paper/figures.json", student="s", benchmarks=("MATH-500",))
    (folder / "paper").mkdir(exist_ok=True)
    rows = [{"method": "base", "figures": figures}, {"method": "CGD", "figures": {"MATH-500": 50.0}}]
    (folder / "paper" / "figures.json").write_text(json.dumps({"tables": [{"source": "Table 1", "rows": rows}]}))
    return work.model_copy(update={"published": asked})


def test_wrong_published_figures_are_refused_before_a_gpu_is_asked_for(bucket, storage, tiny_model, tmp_path):
    plain = prepare_work(tiny_model, put(bucket, "in/p.jsonl", lines(QUESTIONS)))
    work = with_published(plain, tmp_path, {"MATH500": 50.0})
    with pytest.raises(UserError, match=r"Table 1, row 1: there is no benchmark MATH500 \(did you mean MATH-500\?\)"):
        Prepared(storage, work, tmp_path, inputs=tmp_path)


def test_rows_do_not_depend_on_published_figures(bucket, storage, tiny_model, tmp_path):
    plain = prepare_work(tiny_model, put(bucket, "in/p.jsonl", lines(QUESTIONS)))
    asking = Prepared(storage, with_published(plain, tmp_path, {"MATH-500": 50.0}), tmp_path, inputs=tmp_path)
    assert asking.folder.uri == Prepared(storage, plain, tmp_path).folder.uri


def test_packing_is_refused_before_a_gpu_is_asked_for(bucket, storage, tmp_path):
    model = families.make(tmp_path / "model", "gpt-oss")
    work = prepare_work(model, put(bucket, "in/p.jsonl", lines(QUESTIONS)))
    Prepared(storage, work, tmp_path)
    packed = work.model_copy(update={"training": work.training.model_copy(update={"packing": True})})
    with pytest.raises(UserError, match="in a gpt_oss, examples that share a row see each other"):
        Prepared(storage, packed, tmp_path)


def test_how_large_a_checkpoint_will_be_is_told_and_not_stored(bucket, storage, tiny_model, tmp_path):
    """Other runs share the rows, and may train them in another layout."""
    work = prepare_work(tiny_model, put(bucket, "in/p.jsonl", lines(QUESTIONS)))
    layouts = (work.training.model_copy(update={"workers": nodes, "zero_stage": 2}) for nodes in (1, 2))
    whole, half = (Prepared(storage, work.model_copy(update={"training": layout}), tmp_path) for layout in layouts)
    assert whole.folder.uri == half.folder.uri
    told = [found.facts.metrics["checkpoint_bytes"] for found in (whole, half)]
    tensors = resolve.tensors(Model(name=str(tiny_model)), bucket, tmp_path)
    parameters, stored = sum(one.parameters for one in tensors), sum(one.size for one in tensors)
    assert told == [14 * parameters + stored, 8 * parameters + stored]
    assert "checkpoint_bytes" not in half.done.facts.metrics


def adapted(work, **changes):
    training = work.training.model_copy(update={"adapter": Adapter(**changes)})
    return work.model_copy(update={"training": training})


def test_of_an_adapter_the_checkpoint_is_its_own_and_the_rows_are_shared(bucket, storage, tiny_model, tmp_path, caplog):
    work = prepare_work(tiny_model, put(bucket, "in/p.jsonl", lines(QUESTIONS)))
    whole = Prepared(storage, work, tmp_path)
    with caplog.at_level("INFO"):
        found = Prepared(storage, adapted(work, rank=8), tmp_path)
    assert found.folder.uri == whole.folder.uri
    learned = 8 * 2 * (4 * (64 + 64) + 3 * (64 + 128))
    assert found.facts.metrics["checkpoint_bytes"] == (14 + 2) * learned, "parameters, optimizer, and the best so far"
    assert f"adapter: {learned} parameters" in caplog.text
    assert "adapter learns little" not in caplog.text


def test_an_adapter_that_cannot_be_is_refused_before_a_gpu_is_asked_for(bucket, storage, tiny_model, tmp_path):
    work = prepare_work(tiny_model, put(bucket, "in/p.jsonl", lines(QUESTIONS)))
    with pytest.raises(UserError, match="'lm_head': the student has no linear module of this name in its layers"):
        Prepared(storage, adapted(work, targets=("lm_head",)), tmp_path)


def test_the_learning_rate_of_a_full_training_is_too_low_for_an_adapter(bucket, storage, tiny_model, tmp_path, caplog):
    work = adapted(prepare_work(tiny_model, put(bucket, "in/p.jsonl", lines(QUESTIONS))))
    low = work.model_copy(update={"training": work.training.model_copy(update={"learning_rate": 1e-6})})
    Prepared(storage, low, tmp_path)
    assert "spec.training.learningRate is 1e-06: an adapter learns little" in caplog.text


def table(rows: list[dict[str, object]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.jsonl", lines(QUESTIONS)),
        ("p.jsonl.gz", gzip.compress(lines(QUESTIONS))),
        ("p.jsonl.zst", zstandard.compress(lines(QUESTIONS))),
        ("p.jsonl.zst", zstandard.compress(lines(QUESTIONS[:9])) + zstandard.compress(lines(QUESTIONS[9:]))),
        ("p.json", lines(QUESTIONS)),
        ("p.json.gz", gzip.compress(lines(QUESTIONS))),
        ("p.json.zst", zstandard.compress(lines(QUESTIONS))),
        ("p.parquet", table(QUESTIONS)),
    ],
)
def test_every_format_gives_the_same_rows(bucket, storage, tiny_model, tmp_path, name, data):
    found = Prepared(storage, prepare_work(tiny_model, put(bucket, f"in/{name}", data)), tmp_path)
    assert len(found.rows) == 60


def test_a_star_takes_all_files_of_its_folder_and_no_others(bucket, storage, tiny_model, tmp_path):
    put(bucket, "in/a-1.jsonl", lines(QUESTIONS[:3]))
    put(bucket, "in/a-2.jsonl", lines(QUESTIONS[3:5]))
    put(bucket, "in/b.jsonl", lines(QUESTIONS[5:]))
    put(bucket, "in/deeper/a-3.jsonl", lines(QUESTIONS[5:]))
    found = Prepared(storage, prepare_work(tiny_model, bucket.uri("in/a-*.jsonl")), tmp_path)
    assert len(found.rows) == 5


def test_a_config_map_is_read_where_it_is_mounted(storage, tiny_model, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "p.jsonl").write_bytes(lines(QUESTIONS))
    found = Prepared(storage, prepare_work(tiny_model, "configmap://words/p.jsonl"), tmp_path, inputs=tmp_path)
    assert len(found.rows) == 60


def test_a_config_map_that_is_not_there_may_still_come(storage, tiny_model, tmp_path):
    work = prepare_work(tiny_model, "configmap://words/p.jsonl")
    with pytest.raises(TransientError) as caught:
        prepare.main(context(storage, work, tmp_path, inputs=tmp_path))
    assert "ConfigMap words with the key p.jsonl" in caught.value.hint


def test_the_limit_counts_rows_that_are_kept(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines([QUESTIONS[0], QUESTIONS[0], *QUESTIONS[1:]]))
    found = Prepared(storage, prepare_work(tiny_model, source, limit=5), tmp_path)
    assert (found.facts.rows.total, found.facts.rows.done, found.facts.rows.rejected) == (6, 5, 1)


class Recorder(Reporter):
    """Keeps what is reported."""

    def __init__(self):
        super().__init__()
        self.told = []

    def report(self, stage, rows, *, eta=None, **figures):
        self.told.append((rows.total, rows.done, eta))


@pytest.mark.parametrize(("changes", "known"), [({"limit": 15}, True), ({"limit": 15, "seed": 1}, False), ({}, False)])
def test_what_remains_is_told_where_the_number_of_rows_is_known(
    bucket, storage, tiny_model, tmp_path, monkeypatch, changes, known
):
    monkeypatch.setattr(intake, "BATCH", 5)
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS[:20]))
    attempt = context(storage, prepare_work(tiny_model, source, **changes), tmp_path)
    attempt.progress = Recorder()
    prepare.main(attempt)
    told = attempt.progress.told
    if not known:
        assert {(total, eta) for total, _, eta in told} == {(0, None)}
        return
    assert [(total, done) for total, done, _ in told] == [(15, 5), (15, 10), (15, 15)]
    assert [eta > 0 for _, _, eta in told] == [True, True, False]


def test_a_second_try_stores_the_benchmarks_again_whatever_bytes_the_first_has_left(
    bucket, storage, tiny_model, tmp_path, monkeypatch
):
    """As an image with another version of pyarrow does."""
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    work = prepare_work(tiny_model, source, benchmarks=(held_out(bucket, "2 + 2?"),))
    finish = Folder.finish

    def killed(self, **facts):
        (stored,) = bucket.list(self.key("benchmarks"))
        bucket.put(stored.key, b"other bytes")
        raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.main(context(storage, work, tmp_path))
    monkeypatch.setattr(Folder, "finish", finish)
    assert [row["prompt"] for row in read_benchmarks(Prepared(storage, work, tmp_path).folder)] == ["2 + 2?"]


def test_duplicates_are_listed_but_never_refuse_the_run(bucket, storage, tiny_model, tmp_path):
    again = {"question": "  Ann has 1   apples. How many?\n", "answer": "1"}
    source = put(bucket, "in/p.jsonl", lines([*QUESTIONS, again]))
    found = Prepared(storage, prepare_work(tiny_model, source, max_rejected=0.0), tmp_path)
    assert [(row["reason"], row["id"]) for row in found.rejected] == [("duplicate", row_id(QUESTIONS[1]["question"]))]
    assert "line 61" in found.rejected[0]["detail"]


def test_each_bad_row_is_rejected_with_its_reason_and_line(bucket, storage, tiny_model, tmp_path):
    bad = [{"question": " "}, {"q": "x"}, {"question": 7}, {"question": "long " * 3000}, ["a list"]]
    data = lines([*QUESTIONS, *bad]) + b'{"question": "cut\n' + b'{"question": "\xff"}\n' + b'{"question": "\\ud800"}\n'
    work = prepare_work(tiny_model, put(bucket, "in/p.jsonl", data), max_rejected=0.2)
    found = Prepared(storage, work, tmp_path)
    reasons = [row["reason"] for row in found.rejected]
    assert reasons == ["empty", "missing_field", "malformed", "too_long", *["malformed"] * 4]
    assert all(f"line {61 + n}:" in row["detail"] for n, row in enumerate(found.rejected))
    assert found.facts.rows.total == found.facts.rows.done + found.facts.rows.rejected == 68


def test_too_many_bad_rows_refuse_the_run_with_reasons_and_examples(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines([*QUESTIONS, {"question": ""}, {"no": 1}]))
    with pytest.raises(UserError) as caught:
        prepare.main(context(storage, prepare_work(tiny_model, source), tmp_path))
    assert "2 of 62 rows cannot be used (empty 1, missing_field 1)" in caught.value.message
    assert "line 61" in caught.value.message
    assert "line 62" in caught.value.message
    assert "spec.generation.maxRejected" in caught.value.hint
    assert not [found for found in bucket.list("team/") if found.key.endswith("DONE.json")]


@pytest.mark.parametrize(
    ("name", "data", "message", "hint"),
    [
        ("p.jsonl", b"", "has no rows", "spec.prompts.source"),
        ("p.jsonl", b"\n \n", "has no rows", "spec.prompts.source"),
        ("p.jsonl", b"not json\n", "1 of 1 rows cannot be used (malformed 1)", "Mend the file"),
        ("p.jsonl", lines([{"q": 1, "text": 2}]), "has the field 'question'", "fields that exist: q, text"),
        ("p.jsonl", lines([{"question": "a?"}]), "has the field 'answer'", "spec.prompts.fields.reference"),
        ("p.jsonl.gz", b"no gzip", "cannot be read", "spec.prompts.source"),
        ("p.jsonl.gz", gzip.compress(lines(QUESTIONS))[:-20], "cannot be read", "cut or corrupt"),
        ("p.jsonl.zst", b"no zstd", "cannot be read", "spec.prompts.source"),
        ("p.jsonl.zst", zstandard.compress(lines(QUESTIONS))[:-20], "p.jsonl.zst cannot be read", "cut or corrupt"),
        ("p.parquet", b"no parquet", "cannot be read", "spec.prompts.source"),
        ("p.parquet", table([{"q": 1, "text": 2}]), "has the field 'question'", "fields that exist: q, text"),
        ("p.csv", b"a,b", "no known format", ".jsonl"),
    ],
)
def test_a_file_that_is_no_use_is_refused_by_name(bucket, storage, tiny_model, tmp_path, name, data, message, hint):
    source = put(bucket, f"in/{name}", data)
    with pytest.raises(UserError) as caught:
        prepare.main(context(storage, prepare_work(tiny_model, source), tmp_path))
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("source", ["s3://data/nowhere/p.jsonl", "s3://data/nowhere/*.jsonl"])
def test_a_source_that_is_not_there_is_refused(storage, tiny_model, tmp_path, source):
    with pytest.raises(UserError, match="there is no object"):
        prepare.main(context(storage, prepare_work(tiny_model, source), tmp_path))


def test_a_model_that_is_not_there_is_refused(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    with pytest.raises(UserError, match="does not exist"):
        prepare.main(context(storage, prepare_work("/nowhere/model", source), tmp_path))
    work = prepare_work(tiny_model, source, teacher=Model(name=bucket.uri("no/model")))
    with pytest.raises(UserError, match=r"has no config\.json"):
        prepare.main(context(storage, work, tmp_path))


def test_a_model_in_the_store_is_known_by_its_files(bucket, storage, tiny_model, tmp_path):
    for path in tiny_model.iterdir():
        bucket.upload(path, f"models/tiny/{path.name}")
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    work = prepare_work(tiny_model, source, teacher=Model(name=bucket.uri("models/tiny")))
    assert len(Prepared(storage, work, tmp_path).rows) == 60


@pytest.mark.parametrize(
    ("given", "changes", "message", "hint"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            {},
            r"the weights of .* are quantized \(fp8\), and cannot be trained",
            "Set spec.student.model to the model as it was before its quantization.",
        ),
        (
            {},
            {"router_loss_weight": 0.1},
            "spec.training.routerLossWeight is set, but .* has no experts and no router",
            "Leave spec.training.routerLossWeight out.",
        ),
    ],
)
def test_a_student_that_cannot_be_trained_as_the_run_says_is_refused(
    storage, tiny_model, tmp_path, given, changes, message, hint
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | given))
    work = prepare_work(model, "s3://data/x.jsonl")
    work = work.model_copy(update={"training": work.training.model_copy(update=changes)})
    with pytest.raises(UserError, match=message) as refused:
        prepare.main(context(storage, work, tmp_path))
    assert refused.value.hint == hint


def test_a_context_beyond_the_models_own_is_refused(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    with pytest.raises(UserError, match="takes 2048 tokens"):
        prepare.main(context(storage, prepare_work(tiny_model, source, engine=Engine(max_model_len=4096)), tmp_path))


def test_a_template_that_fails_is_refused(bucket, storage, tmp_path):
    model = tiny.make(tmp_path / "model", template="{{ raise_exception('no') }}")
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    with pytest.raises(UserError, match="chat template"):
        prepare.main(context(storage, prepare_work(model, source), tmp_path))


def test_benchmark_questions_are_stored_and_contamination_is_counted(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    bench = put(
        bucket, "in/b.jsonl", lines([{"q": QUESTIONS[3]["question"], "a": 3}, {"q": "2 + 2?", "a": [4, "four"]}])
    )
    benchmark = Benchmark(name="sums", source=bench, fields=BenchmarkFields(prompt="q", reference="a"))
    found = Prepared(storage, prepare_work(tiny_model, source, benchmarks=(benchmark,)), tmp_path)
    stored = read_benchmarks(found.folder)
    assert [(row["benchmark"], row["reference"]) for row in stored] == [("sums", "3"), ("sums", '[4, "four"]')]
    assert found.facts.metrics["contaminated"] == 1
    assert len(found.rows) == 60


LEAK = "In the end, Ann   has 3 APPLES; how many?"
"""Six words in a row of the question about 3 apples, in other clothes."""


def held_out(bucket: Bucket, *questions: str, name: str = "sums") -> Benchmark:
    rows: list[object] = [{"q": question, "a": 1} for question in questions]
    source = put(bucket, f"in/{name}.jsonl", lines(rows))
    return Benchmark(name=name, source=source, fields=BenchmarkFields(prompt="q", reference="a"))


def test_prompts_that_share_words_with_a_benchmark_are_removed_and_listed(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines([*QUESTIONS, {"question": LEAK, "answer": "3"}]))
    benchmark, question = held_out(bucket, QUESTIONS[3]["question"]), row_id(QUESTIONS[3]["question"])
    against = Decontaminate(against=("sums",), ngram=13)
    work = prepare_work(tiny_model, source, benchmarks=(benchmark,), decontaminate=against, max_rejected=0.0)
    found = Prepared(storage, work, tmp_path)
    assert [(row["reason"], row["id"]) for row in found.rejected] == [
        ("contaminated", question),
        ("contaminated", row_id(LEAK)),
    ]
    assert f"line 61: shares words with the question {question} of sums: 'ann has 3" in found.rejected[1]["detail"]
    assert found.facts.metrics["rejected_contaminated"] == 2
    assert found.facts.metrics["contaminated"] == 0


def test_a_benchmark_that_is_not_named_removes_nothing(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    other, sums = held_out(bucket, "Who wrote this?", name="other"), held_out(bucket, QUESTIONS[3]["question"])
    against = Decontaminate(against=("other",), ngram=13)
    work = prepare_work(tiny_model, source, benchmarks=(other, sums), decontaminate=against)
    found = Prepared(storage, work, tmp_path)
    assert (len(found.rows), found.facts.metrics["contaminated"]) == (60, 1)


def test_a_source_that_is_nothing_but_benchmark_questions_is_refused(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS[:1]))
    against = Decontaminate(against=("sums",), ngram=13)
    benchmark = held_out(bucket, QUESTIONS[0]["question"])
    work = prepare_work(tiny_model, source, benchmarks=(benchmark,), decontaminate=against)
    with pytest.raises(UserError, match=r"1 of 1 rows cannot be used \(contaminated 1\)"):
        prepare.main(context(storage, work, tmp_path))


def test_a_sample_is_the_same_however_the_rows_are_ordered_and_cut_into_files(bucket, storage, tiny_model, tmp_path):
    one = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    put(bucket, "cut/1.jsonl", lines(QUESTIONS[40:]))
    put(bucket, "cut/2.jsonl", lines(QUESTIONS[:40][::-1]))
    first = Prepared(storage, prepare_work(tiny_model, one, limit=7, seed=1), tmp_path)
    cut = Prepared(storage, prepare_work(tiny_model, bucket.uri("cut/*.jsonl"), limit=7, seed=1), tmp_path)
    other = Prepared(storage, prepare_work(tiny_model, one, limit=7, seed=2), tmp_path)
    assert len(first.rows) == 7
    assert first.rows == cut.rows
    assert first.rows != other.rows


def test_rows_that_are_not_drawn_are_counted_and_are_no_rejections(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines([*QUESTIONS, QUESTIONS[0]]))
    found = Prepared(storage, prepare_work(tiny_model, source, limit=7, seed=1, max_rejected=0.0), tmp_path)
    metrics = found.facts.metrics
    assert (metrics["read"], metrics["not_sampled"], metrics["rejected_duplicate"]) == (61, 53, 1)
    assert (found.facts.rows.total, found.facts.rows.done, found.facts.rows.rejected) == (8, 7, 1)
    assert found.facts.prompt_tokens == sum(row["prompt_tokens"] for row in found.rows)


def test_bad_rows_outside_a_sample_count_as_bad_rows(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines([*QUESTIONS, {"question": ""}, {"question": ""}]))
    with pytest.raises(UserError, match="rows cannot be used"):
        prepare.main(context(storage, prepare_work(tiny_model, source, limit=7, seed=1), tmp_path))


def test_rows_lost_between_reading_and_storing_are_noticed(bucket, storage, tiny_model, tmp_path, monkeypatch):
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    monkeypatch.setattr("cgd_stages.prepare.sampling.Sample.drawn", lambda self: iter([]))
    with pytest.raises(RowsLost, match="read 60 rows: kept 0, rejected 0, not sampled 0"):
        prepare.main(context(storage, prepare_work(tiny_model, source, limit=7, seed=1), tmp_path))


def test_a_benchmark_without_references_is_refused(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    benchmark = Benchmark(name="sums", source=source, fields=BenchmarkFields(prompt="question"))
    with pytest.raises(UserError, match="line 1: there is no reference"):
        prepare.main(context(storage, prepare_work(tiny_model, source, benchmarks=(benchmark,)), tmp_path))


def test_the_same_content_is_prepared_once(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    first = Prepared(storage, prepare_work(tiny_model, source), tmp_path)
    second = Prepared(storage, prepare_work(tiny_model, source), tmp_path)
    assert first.done == second.done
    put(bucket, "in/p.jsonl", lines(QUESTIONS[:-1]))
    third = Prepared(storage, prepare_work(tiny_model, source), tmp_path)
    assert third.facts.digest != first.facts.digest


def test_a_teacher_of_another_kind_leaves_the_prompts_content_as_it_is(bucket, storage, tiny_model, tmp_path):
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    other = tiny.make(tmp_path / "other", seed=3)
    first = Prepared(storage, prepare_work(tiny_model, source), tmp_path)
    second = Prepared(storage, prepare_work(tiny_model, source, teacher=Model(name=str(other))), tmp_path)
    assert first.facts.digest != second.facts.digest
    assert first.done.content() == second.done.content()


class Chat(BaseHTTPRequestHandler):
    """Lists one model to whoever has the key."""

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Bearer right"
        body = json.dumps({"data": [{"id": "big"}]}).encode() if known else b"no"
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silence."""


@pytest.mark.parametrize(
    ("key", "model", "message"),
    [("wrong", "big", "does not accept the key"), ("right", "small", "does not serve small, but big")],
)
def test_an_endpoint_is_tried_before_anything_else(storage, tiny_model, tmp_path, monkeypatch, key, model, message):
    monkeypatch.setenv("CGD_TEACHER_API_KEY", key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = Endpoint(url=f"http://127.0.0.1:{server.server_port}/v1", model=model)
    try:
        with pytest.raises(UserError, match=message):
            prepare.main(context(storage, prepare_work(tiny_model, "s3://data/x.jsonl", endpoint=endpoint), tmp_path))
    finally:
        server.shutdown()
        server.server_close()


def test_a_source_of_no_known_kind_is_refused(storage, tiny_model, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare.main(context(storage, prepare_work(tiny_model, "/etc/passwd"), tmp_path))
    assert "s3://bucket/key or configmap://name/key" in caught.value.hint


def test_fields_default_to_a_prompt_alone(bucket, storage, tiny_model, tmp_path):
    source = Prompts(source=put(bucket, "in/p.jsonl", lines([{"prompt": "Why?"}])))
    found = Prepared(storage, prepare_work(tiny_model, "", prompts=source), tmp_path)
    assert [(row["prompt"], row["reference"]) for row in found.rows] == [("Why?", None)]


CHATS = [
    {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{n} apples?"}],
        "n": {"a": str(n)},
    }
    for n in range(8)
]


def with_fields(work, **fields):
    return work.model_copy(update={"prompts": Prompts(source=work.prompts.source, fields=Fields(**fields))})


@pytest.mark.parametrize(("name", "packed"), [("c.jsonl", lines), ("c.parquet", table)])
def test_conversations_and_nested_references_are_stored(bucket, storage, tiny_model, tmp_path, name, packed):
    source = put(bucket, f"in/{name}", packed(CHATS))
    work = with_fields(prepare_work(tiny_model, source), messages="messages", reference="n.a")
    found = Prepared(storage, work, tmp_path)
    assert [(row["prompt"], row["reference"]) for row in found.rows] == [(f"{n} apples?", str(n)) for n in range(8)]
    assert {row["turns"] for row in found.rows} == {'[{"role": "system", "content": "Be brief."}]'}


def test_every_conversation_read_is_kept_or_rejected_with_a_reason(bucket, storage, tiny_model, tmp_path):
    bad = [{"messages": [{"role": "assistant", "content": "4"}]}, {"messages": [{"role": "user", "content": " "}]}]
    source = put(bucket, "in/c.jsonl", lines([*CHATS, *bad, CHATS[0]]))
    work = with_fields(prepare_work(tiny_model, source, max_rejected=0.5), messages="messages")
    found = Prepared(storage, work, tmp_path)
    assert found.facts.rows == Rows(total=11, done=8, rejected=3)
    reasons = {name: n for name, n in found.facts.metrics.items() if name.startswith("rejected_")}
    assert reasons == {"rejected_malformed": 1, "rejected_empty": 1, "rejected_duplicate": 1}


def test_conversations_whose_earlier_thoughts_are_left_out_are_counted(bucket, storage, tiny_model, tmp_path, caplog):
    said = [{"role": "assistant", "content": content} for content in ("4", "<think>2 and 2.</think>4")]
    chats = [
        {"messages": [{"role": "user", "content": "2 + 2?"}, turn, {"role": "user", "content": f"And {n}?"}]}
        for n, turn in enumerate([said[0], said[1], said[1]])
    ]
    source = put(bucket, "in/c.jsonl", lines(chats))
    found = Prepared(storage, with_fields(prepare_work(tiny_model, source), messages="messages"), tmp_path)
    assert found.facts.metrics["thoughts_left_out"] == 2
    assert "2 conversations have thoughts in assistant turns before the prompt" in caplog.text
    assert {row["turns"] for row in found.rows} == {json.dumps([chats[0]["messages"][0], said[0]])}


def test_the_turns_before_the_prompt_count_as_its_tokens(bucket, storage, tiny_model, tmp_path):
    alone = [{"messages": chat["messages"][1:]} for chat in CHATS]
    lengths = [
        sum(row["prompt_tokens"] for row in Prepared(storage, work, tmp_path).rows)
        for name, rows in (("whole", CHATS), ("alone", alone))
        for work in [
            with_fields(prepare_work(tiny_model, put(bucket, f"in/{name}.jsonl", lines(rows))), messages="messages")
        ]
    ]
    assert lengths[0] > lengths[1] + 8 * 2


def test_prompts_of_one_text_are_stored_as_ever(bucket, storage, tiny_model, tmp_path):
    """The hash of these files names the folders of answers that runs share."""
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    found = Prepared(storage, prepare_work(tiny_model, source), tmp_path)
    assert list(found.rows[0]) == ["id", "sample", "prompt", "reference", "prompt_tokens"]
    assert found.done.inputs["prompts"]["fields"] == {"prompt": "question", "reference": "answer"}


def test_a_benchmark_question_in_an_earlier_turn_is_contamination(bucket, storage, tiny_model, tmp_path):
    text = "How many of the nine green apples does Ann keep?"
    turns = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Why?"},
    ]
    source = put(bucket, "in/c.jsonl", lines([*CHATS, {"messages": turns}]))
    held_out = put(bucket, "in/b.jsonl", lines([{"question": text, "answer": "4"}]))
    benchmark = Benchmark(name="b", source=held_out, fields=BenchmarkFields(prompt="question", reference="answer"))
    work = prepare_work(tiny_model, source, benchmarks=(benchmark,))
    prompts = Prompts(source=source, fields=Fields(messages="messages"), decontaminate=Decontaminate(against=("b",)))
    found = Prepared(storage, work.model_copy(update={"prompts": prompts}), tmp_path)
    assert [row["reason"] for row in found.rejected] == ["contaminated"]


def test_a_benchmark_may_have_conversations_and_choices(bucket, storage, tiny_model, tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    asked = put(bucket, "in/b.jsonl", lines([{"messages": turns, "choices": ["Moon", "Mars"], "answer": 1}]))
    fields = BenchmarkFields(messages="messages", reference="answer", choices="choices")
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    work = prepare_work(tiny_model, source, benchmarks=(Benchmark(name="b", source=asked, fields=fields),))
    (question,) = read_benchmarks(Prepared(storage, work, tmp_path).folder)
    assert (question["prompt"], question["reference"]) == ("Which?\n\nA. Moon\nB. Mars", "B")
    assert json.loads(question["turns"]) == turns[:1]


def test_a_question_without_turns_has_no_such_column(bucket, storage, tiny_model, tmp_path):
    """Questions are part of digests."""
    asked = put(bucket, "in/b.jsonl", lines([{"prompt": "Which?", "reference": "B"}]))
    fields = BenchmarkFields(reference="reference")
    source = put(bucket, "in/p.jsonl", lines(QUESTIONS))
    work = prepare_work(tiny_model, source, benchmarks=(Benchmark(name="b", source=asked, fields=fields),))
    (question,) = read_benchmarks(Prepared(storage, work, tmp_path).folder)
    assert list(question) == ["benchmark", "id", "prompt", "reference", "tolerance"]
