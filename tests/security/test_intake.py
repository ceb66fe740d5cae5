"""What comes in by files and from models: whatever a line or an answer holds, it is a row or a rejection, and small
files take little memory."""

import gzip
import io
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.stage_builders import (
    RUN,
    RuleEngine,
    context,
    each,
    generate_with,
    generate_work,
    prepare_work,
    prepared,
    stored_rows,
)

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Endpoint, Fields, Sampling
from cgd_stages.engines.base import MOST_TOKENS, Completion, Refused, Request, drive
from cgd_stages.engines.openai import EndpointEngine
from cgd_stages.errors import UserError
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.prepare import intake, sampling
from cgd_stages.prepare.sources import LINE_BYTES, File, Line, read_lines
from cgd_stages.runtime import program
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS, REJECTED, Done, Folder
from cgd_stages.store.rows import Row, from_parquet
from cgd_stages.store.run import RunStore

FIELDS = Fields(prompt="question", reference="answer")
HALF = "\ud83d"
GOOD = b'{"question": "1 + 1?", "answer": "2"}\n'


def read(path: Path, data: bytes) -> list[Line]:
    path.write_bytes(data)
    return list(read_lines([File(path.name, path, "")], "spec.prompts", FIELDS))


def faults(lines: list[Line]) -> list[str]:
    """Reason of each line; empty where it is a row."""
    found = (intake.row_of(line, FIELDS)[1] for line in lines)
    return [fault[0] if fault else "" for fault in found]


@contextmanager
def little_memory(most: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most


# --- lines ------------------------------------------------------------------------------------------------------


def packed(*lines: bytes) -> bytes:
    return gzip.compress(b"".join(lines), compresslevel=1)


def test_a_small_file_that_unpacks_to_a_long_line_costs_no_memory(tmp_path):
    bomb = packed(GOOD, b'{"question": "', b"a" * (64 << 20), b'"}\n', GOOD)
    with little_memory(4 * LINE_BYTES):
        found = read(tmp_path / "p.jsonl.gz", bomb)
    assert [(line.where, line.fault) for line in found[1:2]] == [("p.jsonl.gz line 2", "longer than 4 MiB")]
    assert faults(found) == ["", "malformed", ""]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_that_is_exactly_as_long_as_may_be_is_a_row(tmp_path, end):
    row = b'{"question": "%s"}' % (b"a" * (LINE_BYTES - 16 - len(end))) + end
    assert len(row) == LINE_BYTES
    assert faults(read(tmp_path / "p.jsonl", row)) == [""]
    assert faults(read(tmp_path / "p.jsonl", b" " + row)) == ["malformed"]


@pytest.mark.parametrize("deep", [b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000])
def test_a_line_that_is_nested_deeply_is_rejected(tmp_path, deep):
    found = read(tmp_path / "p.jsonl", GOOD + b'{"question": "a", "answer": ' + deep + b"}\n" + GOOD)
    assert faults(found) == ["", "malformed", ""]


def test_a_reference_that_is_nested_as_deep_as_may_be_is_what_it_holds(tmp_path):
    deep = "[" * 190 + "1, 2" + "]" * 190
    (line,) = read(tmp_path / "p.jsonl", f'{{"question": "a", "answer": {deep}}}'.encode())
    assert intake.row_of(line, FIELDS) == (intake.row_of(line, FIELDS)[0] | {"reference": "[1, 2]"}, None)


@pytest.mark.parametrize("field", ["question", "answer", "other"])
def test_a_line_with_half_of_a_surrogate_pair_is_rejected_whatever_field_holds_it(tmp_path, field):
    row = json.dumps({"question": "a", "answer": "b"} | {field: f"x{HALF}y"}).encode()
    assert faults(read(tmp_path / "p.jsonl", row + b"\n" + GOOD)) == ["malformed", ""]


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    (line,) = read(tmp_path / "p.jsonl", json.dumps({"question": "\U0001f600"}).encode())
    assert line.value == {"question": "\U0001f600"}


def table(**columns: pa.Array) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd", store_schema=False)
    return sink.getvalue()


def test_a_parquet_file_of_few_bytes_that_holds_a_long_text_many_times_costs_no_memory(tmp_path):
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), ["a" * (LINE_BYTES + 1)])
    bomb = table(question=text)
    assert len(bomb) < 2000
    before = pa.default_memory_pool().max_memory()
    with little_memory(4 * LINE_BYTES):
        found = read(tmp_path / "p.parquet", bomb)
    assert pa.default_memory_pool().max_memory() <= max(before, 16 * LINE_BYTES)
    assert faults(found) == ["malformed"] * 1000


LONG = "a" * (LINE_BYTES + 1)
SPARSE: dict[str, Callable[[], pa.Array]] = {
    "list": lambda: pa.array([[LONG]] * 20),
    "one list": lambda: pa.array([[LONG] * 20]),
    "pair": lambda: pa.array([[LONG]] * 20, pa.list_(pa.string(), 1)),
    "struct": lambda: pa.array([{"t": LONG}] * 20),
    "map": lambda: pa.array([[("k", LONG)]] * 20, pa.map_(pa.string(), pa.string())),
    "lists of structs of lists": lambda: pa.array([[{"x": [LONG]}]] * 20),
    "view": lambda: pa.array([LONG] * 20).cast(pa.string_view()),
    "bytes": lambda: pa.array([[LONG.encode()]] * 20),
    "json": lambda: pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array([LONG] * 20)),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_a_long_text_within_another_column_costs_no_memory_either(tmp_path, kind):
    path, column = tmp_path / "p.parquet", SPARSE[kind]()
    pq.write_table(pa.table({"question": pa.array(["q"] * len(column)), "answer": column}), path, compression="zstd")
    count, column = len(column), None
    assert path.stat().st_size < 100_000
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    with little_memory(2 * LINE_BYTES):
        for line in read_lines([File(path.name, path, "")], "spec.prompts", FIELDS):
            assert line.fault == "longer than 4 MiB"
            assert pool.bytes_allocated() - before < 6 * LINE_BYTES
            count -= 1
    assert count == 0


def test_nested_values_of_parquet_are_read_as_they_are(tmp_path):
    given = [{"a": ["x", None], "m": [("k", {"y": "z"})], "f": [[1.5, 2.0]], "t": "u"}, None, {"a": [], "t": ""}]
    kind = pa.struct(
        [
            ("a", pa.list_(pa.string())),
            ("m", pa.map_(pa.string(), pa.struct([("y", pa.string())]))),
            ("f", pa.list_(pa.list_(pa.float64(), 2))),
            ("t", pa.large_string()),
        ]
    )
    column = pa.array(given, kind)
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"question": pa.array(["a", "b", "c"]), "answer": column}), path)
    found = [line.value for line in read_lines([File(path.name, path, "")], "spec.prompts", FIELDS)]
    assert [row["answer"] for row in found if row] == column.to_pylist()


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [(2**31 - 1, pa.date32()), (2**62, pa.timestamp("us")), (1, pa.timestamp("us", tz="Foo/Bar"))],
    ids=["date", "time", "time zone"],
)
def test_a_value_of_parquet_that_python_has_not_is_rejected_alone(tmp_path, numbers, kind):
    whole = pa.array([numbers, None], pa.int32() if kind == pa.date32() else pa.int64())
    sink = io.BytesIO()
    pq.write_table(pa.table({"question": pa.array(["a", "b"]), "answer": whole.cast(kind)}), sink)
    found = read(tmp_path / "p.parquet", sink.getvalue())
    assert faults(found) == ["malformed", ""]
    assert found[0].fault.startswith("a value that cannot be read: ")


def test_rows_of_parquet_that_together_are_large_are_all_read(tmp_path):
    text = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 40, pa.int32()), ["a" * (LINE_BYTES // 2), "b"])
    assert faults(read(tmp_path / "p.parquet", table(question=text))) == [""] * 80


def test_a_text_in_parquet_that_is_no_utf_8_is_rejected_alone(tmp_path):
    bytes_ = pa.array([b"1 + 1?", b"\xff", b"2 + 2?"])
    text = pa.Array.from_buffers(pa.string(), 3, bytes_.buffers())
    assert faults(read(tmp_path / "p.parquet", table(question=text))) == ["", "malformed", ""]


def test_a_reference_in_parquet_that_json_has_not_is_rejected(tmp_path):
    found = read(tmp_path / "p.parquet", table(question=pa.array(["a"]), answer=pa.array([b"\xff"])))
    assert intake.row_of(found[0], FIELDS)[1] == ("malformed", "the field 'answer' is a bytes, which JSON cannot hold")


def finished(bucket: Bucket) -> tuple[Folder, Done]:
    folder = RunStore(bucket, RUN).input("prepare")
    return folder, folder.require()


def stored(folder: Folder, done: Done, prefix: str) -> list[Row]:
    return [row for part in done.under(prefix) for row in from_parquet(folder.read(part))]


def test_prepare_counts_every_such_line_as_rejected_and_ends(bucket, storage, tiny_model, tmp_path):
    rows = [b'{"question": "Ann has %d apples.", "answer": "%d"}\n' % (n, n) for n in range(60)]
    long = b'{"question": "' + b"a" * LINE_BYTES + b'"}\n'
    deep = b'{"question": ' + b"[" * 1000 + b"]" * 1000 + b"}\n"
    half = json.dumps({"question": "a", "answer": HALF}).encode() + b"\n"
    bucket.put("in/p.jsonl.gz", packed(*rows, long, deep, half))
    work = prepare_work(tiny_model, bucket.uri("in/p.jsonl.gz"), max_rejected=0.1)
    facts = prepare.main(context(storage, work, tmp_path))["prepare"]
    assert (facts.rows.total, facts.rows.done, facts.rows.rejected) == (63, 60, 3)
    assert facts.metrics["rejected_malformed"] == 3
    told = [row["detail"].partition(": ")[0] for row in stored(*finished(bucket), REJECTED)]
    assert told == [f"{bucket.uri('in/p.jsonl.gz')} line {number}" for number in (61, 62, 63)]


@pytest.mark.parametrize("seed", [None, 1])
def test_rows_with_much_text_are_looked_at_and_stored_few_at_a_time(
    bucket, storage, tiny_model, tmp_path, monkeypatch, seed
):
    for module in (intake, sampling):
        monkeypatch.setattr(module, "FILE_CHARACTERS", 200)
    monkeypatch.setattr(intake, "BATCH_CHARACTERS", 50)
    questions = [f"Ann has {number} apples and gives some of them away. How many?" for number in range(20)]
    bucket.put(
        "in/p.jsonl", b"".join(json.dumps({"question": one, "answer": "1"}).encode() + b"\n" for one in questions)
    )
    work = prepare_work(tiny_model, bucket.uri("in/p.jsonl"), limit=20, seed=seed)
    prepare.main(context(storage, work, tmp_path))
    folder, done = finished(bucket)
    assert sorted(row["prompt"] for row in stored(folder, done, PARTS)) == sorted(questions)
    assert len(done.under(PARTS)) == 5


class Counting:
    """A tokenizer that remembers the longest text it was given."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.longest = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, texts: str | list[str], **how: Any) -> Any:
        self.longest = max(self.longest, *map(len, [texts] if isinstance(texts, str) else texts))
        return self._inner(texts, **how)


def intake_of(bucket: Bucket, tokenizer: Counting, context_length: int, prompt: str) -> intake.Intake:
    """The intake of one prompt."""
    folder = Folder(bucket, RUN.namespace, "prepare", "d1")
    template = ChatTemplate(tokenizer)
    made = intake.Intake(prepare_work("m", "s3://data/p.jsonl"), template, context_length, folder)
    made._take(made._next(iter([Line("line 1", {"question": prompt, "answer": "1"})]), 1))
    return made


def test_a_prompt_far_beyond_the_context_is_not_tokenised_as_a_whole(bucket, tiny_model):
    tokenizer = Counting(tiny_model)
    taken = intake_of(bucket, tokenizer, 64, "x" * LINE_BYTES)
    assert taken.reasons == {"too_long": 1}
    assert "tokens or more, the student's context has 64" in taken.examples["too_long"]
    assert tokenizer.longest == 16 * 64


@pytest.mark.parametrize(("words", "reasons"), [(1500, {"too_long": 1}), (900, {})])
def test_a_prompt_near_the_context_is_counted_as_a_whole(bucket, tiny_model, words, reasons):
    tokenizer = Counting(tiny_model)
    taken = intake_of(bucket, tokenizer, 1000, "Conclusion " * words)
    assert tokenizer.longest > 11 * words
    assert taken.reasons == reasons
    assert "or more" not in taken.examples.get("too_long", "")


def test_of_the_fields_of_a_source_no_more_are_remembered_than_people_look_at(bucket, monkeypatch):
    monkeypatch.setattr(intake, "COLUMNS", 10)
    folder = Folder(bucket, RUN.namespace, "prepare", "d1")
    taken = intake.Intake(prepare_work("m", "s3://data/p.jsonl"), None, 0, folder)
    for row in range(8):
        names = [f"field-{row}-{column}" for column in range(8)]
        line = Line("", dict.fromkeys([*names, "x" * 300, "question", "answer"], 1))
        taken._count_fields(line)
    assert len(taken.columns) == 10
    assert (taken.columns["question"], taken.columns["answer"]) == (8, 8)
    assert "x" * 300 not in taken.columns


# --- answers ----------------------------------------------------------------------------------------------------


def broken(request: Request) -> Completion:
    return Completion(request.name, f"4{HALF}", "stop", 10**12, 10**12, thinking=f"hm{HALF}", cached_tokens=-1)


def test_half_a_character_in_an_answer_is_replaced_and_the_stage_ends(bucket, storage, tiny_model, tmp_path):
    prepared(bucket, ["1 + 1?", "2 + 2?"])
    engine = RuleEngine(broken)
    made = context(storage, generate_work(tiny_model, "answer"), tmp_path)
    facts = generate_with(engine, made)["answer"]
    assert (facts.rows.done, facts.rows.rejected) == (2, 0)
    rows = stored_rows(bucket, "answer")
    assert {(row["answer"], row["answer_thinking"]) for row in rows} == {("4\ufffd", "hm\ufffd")}
    assert {row["answer_tokens"] for row in rows} == {MOST_TOKENS}


def test_what_is_asked_next_is_what_is_stored(bucket, storage, tiny_model, tmp_path):
    prepared(bucket, ["1 + 1?"])
    generate_with(RuleEngine(), context(storage, generate_work(tiny_model, "answer"), tmp_path))
    engine = RuleEngine(broken)
    generate_with(engine, context(storage, generate_work(tiny_model, "critique", "refine"), tmp_path))
    texts = [message["content"] for request in engine.asked for message in request.messages]
    assert any("\ufffd" in text for text in texts)
    assert not any(HALF in text for text in texts)


def test_a_refusal_in_the_words_of_a_server_can_be_stored():
    engine = RuleEngine(lambda request: Refused(request.name, "endpoint", f"no{HALF}"))
    request = Request("a", [], Sampling(max_tokens=1))
    assert [said.detail for said in drive(engine, each([request]), threading.Event())] == ["no\ufffd"]


@contextmanager
def server(answer: Callable[[], bytes]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = answer()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/v1"
        finally:
            http.shutdown()
            thread.join()


def test_half_a_character_from_an_endpoint_is_replaced():
    told = {"choices": [{"message": {"content": f"4{HALF}"}, "finish_reason": "stop"}]}
    with server(lambda: json.dumps(told).encode()) as url:
        engine = EndpointEngine(Endpoint(url=url, model="m"))
        request = Request("a", [{"role": "user", "content": "2 + 2?"}], Sampling(max_tokens=1))
        (said,) = drive(engine, each([request]), threading.Event())
        engine.close()
    assert isinstance(said, Completion)
    assert said.text == "4\ufffd"


def test_last_words_can_be_written_whatever_an_error_says():
    words, _ = program._failure(UserError(f"it serves {HALF}", hint=f"take {HALF}"), {})
    assert (words.message, words.hint) == ("it serves \ufffd", "take \ufffd")
    assert "\ufffd" in words.to_json()
