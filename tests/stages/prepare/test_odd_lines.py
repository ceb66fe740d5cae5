"""Odd lines: each is a row or a rejection, whichever column and format holds it, and a reference is the text that was
written."""

import gzip
import io
import json
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cgd_stages.contract import Benchmark, BenchmarkFields, Fields
from cgd_stages.errors import UserError
from cgd_stages.prepare.__main__ import read_benchmark
from cgd_stages.prepare.columns import row_of
from cgd_stages.prepare.sources import File, read_lines
from cgd_stages.prepare.values import as_text
from cgd_stages.text.references import any_of, right_answers

PLAIN = Fields(prompt="question", reference="answer")
FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "p.jsonl": bytes,
    "p.jsonl.gz": gzip.compress,
    "p.jsonl.zst": zstandard.compress,
}
HALF, NUL = rb"\ud83d", rb"\u0000"
ODD: dict[str, bytes] = {
    "half a surrogate pair": b'"%s"' % HALF,
    "the other half": rb'"x\ude00y"',
    "half a pair in a list": b'["a", "%s"]' % HALF,
    "half a pair in a name": b'{"%s": 1}' % HALF,
    "NUL": b'"a%sb"' % NUL,
    "NUL in a list": b'["a", ["%s"]]' % NUL,
    "NUL in a name": b'{"%s": 1}' % NUL,
    "NUL as a byte": b'"a\0b"',
    "too large": b"1e999",
    "too small": b"-1e999",
    "too large in a list": b"[1, 1e999]",
    "NaN": b"NaN",
    "infinite": b"-Infinity",
    "thousands of digits": b"9" * 5000,
    "deep list": b"[" * 1000 + b"]" * 1000,
    "deep object": b'{"a":' * 1000 + b"1" + b"}" * 1000,
    "a name twice": b'{"a": 1, "a": 1}',
    "no UTF-8": b'"\xff"',
    "half a pair as UTF-8": b'"\xed\xa0\xbd"',
    "cut": b'"a',
    "byte order mark in the line": b"\xef\xbb\xbf1",
}
GOOD = b'{"question": "1 + 1?", "answer": "2"}'


def looked_at(path: Path, data: bytes, fields: Fields = PLAIN) -> list[str | tuple[str, str | None]]:
    """Of each line the reason of its rejection, or prompt and reference."""
    path.write_bytes(data)
    found = (row_of(line, fields) for line in read_lines([File(path.name, path, "")], "spec.prompts", fields))
    return [fault[0] if fault else (row["prompt"], row["reference"]) for row, fault in found]


def line(**columns: bytes) -> bytes:
    """A line with one column replaced, or with one more."""
    whole = {"question": b'"q"', "answer": b'"a"'} | columns
    return b"{" + b", ".join(b'"%s": %s' % (name.encode(), value) for name, value in whole.items()) + b"}"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("column", ["question", "answer", "other"])
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_value_makes_its_own_line_malformed_in_every_column(tmp_path, odd, column, name):
    data = FORMATS[name](b"\n".join([GOOD, line(**{column: ODD[odd]}), GOOD]))
    assert looked_at(tmp_path / name, data) == [("1 + 1?", "2"), "malformed", ("1 + 1?", "2")]


CHAT = Fields(messages="messages", reference="answer")
CHOICES = Fields(prompt="question", reference="answer", choices="choices")


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_value_in_a_conversation_or_a_choice_is_malformed_too(tmp_path, odd):
    turns = b'[{"role": "user", "content": "q", "name": %s}]' % ODD[odd]
    assert looked_at(tmp_path / "p.jsonl", line(messages=turns), CHAT) == ["malformed"]
    assert looked_at(tmp_path / "p.jsonl", line(choices=b'["a", %s]' % ODD[odd]), CHOICES) == ["malformed"]


@pytest.mark.parametrize("odd", ODD)
def test_a_conversation_as_json_text_is_as_strict(tmp_path, odd):
    if odd in ("no UTF-8", "half a pair as UTF-8"):  # cannot stand in a text
        return
    text = '[{"role": "user", "content": "q", "name": ' + ODD[odd].decode().replace("\0", "\\u0000") + "}]"
    assert looked_at(tmp_path / "p.jsonl", line(messages=json.dumps(text).encode()), CHAT) == ["malformed"]


@pytest.mark.parametrize("lone", [b"\xef\xbb\xbf", b"\0\0\0", b"\xff\xfe", b'"text"', b"1", b"null", b"[]", b"{", b","])
def test_what_stands_alone_on_a_line_is_malformed(tmp_path, lone):
    assert looked_at(tmp_path / "p.jsonl", b"\n".join([GOOD, lone, GOOD]))[1:2] == ["malformed"]


def test_a_byte_order_mark_before_a_line_is_no_part_of_it_and_an_empty_line_is_no_row(tmp_path):
    marked = b"\xef\xbb\xbf" + GOOD
    found = looked_at(tmp_path / "p.jsonl", b"\r\n".join([marked, b"", b" \t", marked, b""]))
    assert found == [("1 + 1?", "2")] * 2


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("27", "27"),
        ("27.0", "27.0"),
        ("27.50", "27.50"),
        ("1e3", "1e3"),
        ("1E-7", "1E-7"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("1e-999", "1e-999"),
        ('"2024-05-01"', "2024-05-01"),
        ('"007"', "007"),
        ('" 4 "', " 4 "),
        ('"NaN"', "NaN"),
        ("true", "true"),
        ("false", "false"),
        ("null", None),
        ('["1", "2"]', '{"any": ["1", "2"]}'),
        ("[1, 2.50]", "[1, 2.50]"),
        ('["a", 2.50]', '["a", 2.50]'),
        ("[[1.0, 2], [null, true]]", "[[1.0, 2], [null, true]]"),
        ('{"value": 1.50, "unit": "\u00b5m"}', '{"value": 1.50, "unit": "\u00b5m"}'),
        (r'"\ud83d\ude00"', "\U0001f600"),
        (r'"a\\u0000b"', r"a\u0000b"),
    ],
)
def test_a_reference_of_json_is_the_text_that_was_written(tmp_path, written, text):
    others = [line(answer=b"27.5"), line(answer=b'"x"'), line(answer=b"null")]
    data = b"\n".join([others[0], line(answer=written.encode()), *others[1:]])
    assert looked_at(tmp_path / "p.jsonl", data)[1] == ("q", text)


def test_numbers_that_count_as_several_answers_keep_their_digits(tmp_path):
    several = Fields(prompt="question", reference="answer", several="any")
    found = looked_at(tmp_path / "p.jsonl", line(answer=b"[1, 2.50, true]"), several)
    assert found == [("q", any_of(["1", "2.50", "true"]))]


def test_choices_keep_their_digits(tmp_path):
    data = line(choices=b'[1.50, 2, "2.0"]', answer=b'"1.50"')
    assert looked_at(tmp_path / "p.jsonl", data, CHOICES) == [("q\n\nA. 1.50\nB. 2\nC. 2.0", "A")]


def test_a_number_as_a_prompt_is_named_as_what_it_is(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(line(question=b"1.50"))
    (found,) = read_lines([File("p.jsonl", tmp_path / "p.jsonl", "")], "spec.prompts", PLAIN)
    assert row_of(found, PLAIN)[1] == ("malformed", "the field 'question' is a float, not a text")


# --- Parquet


def table(column: pa.Array, name: str = "answer") -> bytes:
    columns = {"question": pa.array(["q"] * len(column)), "answer": pa.array(["a"] * len(column))} | {name: column}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def no_utf8(*values: bytes) -> pa.Array:
    column = pa.array(values)
    return pa.Array.from_buffers(pa.string(), len(column), column.buffers())


FLOAT, SINGLE, HALF_FLOAT = pa.float64(), pa.float32(), pa.float16()


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([27, None]), "27"),
        (pa.array([2**63 - 1, None]), "9223372036854775807"),
        (pa.array([27.5, None]), "27.5"),
        (pa.array([27.1, None], SINGLE), "27.1"),
        (pa.array([[27.1, 0.3], None], pa.list_(SINGLE)), "[27.1, 0.3]"),
        (pa.array([{"x": [27.1]}, None], pa.struct([("x", pa.list_(SINGLE))])), '{"x": [27.1]}'),
        (pa.array([[27.1, 0.3], None], pa.large_list(SINGLE)), "[27.1, 0.3]"),
        (pa.array([[27.1, 0.3], None], pa.list_(SINGLE, 2)), "[27.1, 0.3]"),
        (pa.array([[("k", [27.1])], None], pa.map_(pa.string(), pa.list_(SINGLE))), '[["k", [27.1]]]'),
        (pa.array([27.1, None], HALF_FLOAT), "27.1"),
        (pa.array([[0.1, 1024.0], None], pa.list_(HALF_FLOAT)), "[0.1, 1024.0]"),
        (pa.array([27.1, None], SINGLE).dictionary_encode(), "27.1"),
        (pa.array([Decimal("27.50"), None]), "27.50"),
        (pa.array([[Decimal("27.50")], None]), "27.50"),
        (pa.array([date(2024, 5, 1), None]), "2024-05-01"),
        (pa.array([[date(2024, 5, 1), date(2024, 5, 2)], None]), '["2024-05-01", "2024-05-02"]'),
        (pa.array([datetime(2024, 5, 1, 12, 30), None]), "2024-05-01T12:30:00"),  # noqa: DTZ001
        (pa.array([datetime(2024, 5, 1, 12, 30, tzinfo=UTC), None]), "2024-05-01T12:30:00+00:00"),
        (pa.array([time(10, 30), None]), "10:30:00"),
        (pa.array(["2024-05-01", None]), "2024-05-01"),
        (pa.array([True, None]), "true"),
        (pa.array([["1", "2"], None]), '{"any": ["1", "2"]}'),
        (pa.array([[1, 2], None]), "[1, 2]"),
        (pa.array([[("k", 1.5)], None], pa.map_(pa.string(), FLOAT)), '[["k", 1.5]]'),
    ],
    ids=lambda given: str(given.type) if isinstance(given, pa.Array) else "",
)
def test_a_reference_of_parquet_is_its_value_as_a_text(tmp_path, column, text):
    assert looked_at(tmp_path / "p.parquet", table(column)) == [("q", text), ("q", None)]


ODD_COLUMNS: dict[str, pa.Array] = {
    "NUL": pa.array(["a\0b", "a"]),
    "NUL in a list": pa.array([["a", "\0"], ["a"]]),
    "NUL in a name": pa.array([[("\0", "a")], [("k", "a")]], pa.map_(pa.string(), pa.string())),
    "half a pair as UTF-8": no_utf8(b"\xed\xa0\xbd", b"a"),
    "no UTF-8": no_utf8(b"\xff", b"a"),
    "NaN": pa.array([float("nan"), 1.5]),
    "infinite": pa.array([float("inf"), 1.5]),
    "NaN in 32 bits": pa.array([float("nan"), 1.5], SINGLE),
    "NaN in a list": pa.array([[1.0, float("nan")], [1.5]]),
    "a span of time": pa.array([timedelta(days=1), None]),
    "bytes": pa.array([b"\xff", None]),
    "a date beyond Python's": pa.array([2**31 - 1, 0], pa.int32()).cast(pa.date32()),
}


@pytest.mark.parametrize("odd", ODD_COLUMNS)
def test_an_odd_reference_of_parquet_is_malformed_alone(tmp_path, odd):
    first, second = looked_at(tmp_path / "p.parquet", table(ODD_COLUMNS[odd]))
    assert first == "malformed"
    assert second[0] == "q"


@pytest.mark.parametrize("odd", ["NUL", "half a pair as UTF-8", "no UTF-8"])
def test_an_odd_prompt_of_parquet_is_malformed_alone(tmp_path, odd):
    found = looked_at(tmp_path / "p.parquet", table(ODD_COLUMNS[odd], "question"))
    assert found == ["malformed", ("a", "a")]


@pytest.mark.parametrize("pages", [{}, {"dictionary_pagesize_limit": 16, "data_page_size": 16, "write_batch_size": 1}])
def test_conversations_of_parquet_are_read_over_row_groups_and_pages(tmp_path, pages):
    turns = [[{"role": "user", "content": f"question {number}"}] for number in range(50)]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"messages": turns, "answer": ["a"] * 50}), path, row_group_size=20, **pages)
    assert looked_at(path, path.read_bytes(), CHAT) == [(f"question {number}", "a") for number in range(50)]


def test_a_column_of_parquet_that_the_run_does_not_name_rejects_nothing(tmp_path):
    found = looked_at(tmp_path / "p.parquet", table(pa.array([float("nan"), 1.0]), "score"))
    assert found == [("q", "a")] * 2


def test_no_number_in_a_column_that_is_read_makes_its_row_malformed_wherever_it_stands(tmp_path):
    """As in JSON lines."""
    for odd in ("nan", "inf"):
        column = pa.array([{"truth": "5", "score": float(odd)}, {"truth": "6", "score": 1.0}])
        fields = Fields(prompt="question", reference="answer.truth")
        assert looked_at(tmp_path / "p.parquet", table(column), fields) == ["malformed", ("q", "6")]


def test_two_columns_of_one_name_refuse_the_file(tmp_path):
    columns = [pa.array(["q"]), pa.array(["1"]), pa.array(["2"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["question", "answer", "answer"]), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet has several columns of the name 'answer'") as refused:
        list(read_lines([File("p.parquet", tmp_path / "p.parquet", "")], "spec.prompts", PLAIN))
    assert refused.value.hint == "Rename or remove them in the file of spec.prompts.source."


def test_a_conversation_in_parquet_may_be_a_text_of_json_and_is_as_strict(tmp_path):
    texts = ['[{"role": "user", "content": "' + text + '"}]' for text in ("q", r"\ud83d", r"\u0000")]
    found = looked_at(tmp_path / "p.parquet", table(pa.array([*texts, "[" * 100_000]), "messages"), CHAT)
    assert found == [("q", "a"), "malformed", "malformed", "malformed"]


# --- benchmarks, and references as they are read again


def question(tmp_path: Path, **columns: bytes) -> dict[str, Any]:
    path = tmp_path / "b.jsonl"
    path.write_bytes(line(**columns))
    fields = BenchmarkFields(prompt="question", reference="answer", tolerance="within", context="context")
    benchmark = Benchmark(name="b", source="s3://data/b.jsonl", fields=fields)
    (row,) = read_benchmark(benchmark, [File("b.jsonl", path, "")])
    return row


def test_tolerance_and_context_of_a_benchmark_are_what_was_written(tmp_path):
    row = question(tmp_path, within=b"0.10", context=b'["a", 1.50]', answer=b"27.50")
    assert (row["tolerance"], row["reference"], row["prompt"]) == ("0.10", "27.50", '["a", 1.50]\n\nq')


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_line_of_a_benchmark_refuses_the_run_and_is_named(tmp_path, odd):
    with pytest.raises(UserError, match=r"b\.jsonl line 1: ") as refused:
        question(tmp_path, within=ODD[odd])
    assert refused.value.hint == "Mend the file or fields of spec.evaluation.benchmarks b."


@pytest.mark.parametrize("cell", ["0.05", '"4%"', '"1e-1, 0.01"', '"0.1,"', "0"])
def test_a_cell_of_the_tolerance_is_what_the_manifest_may_say_or_several_of_it(tmp_path, cell):
    assert question(tmp_path, within=cell.encode())["tolerance"] == cell.strip('"')


@pytest.mark.parametrize("cell", ["null", '""', '" "'])
def test_a_question_without_a_tolerance_of_its_own_has_the_benchmarks(tmp_path, cell):
    assert question(tmp_path, within=cell.encode())["tolerance"] is None


@pytest.mark.parametrize(
    "cell", ["inf", "1e400", "nan", "-1", "abc", "±0.01", "%", "4 %", ",", "0.1;0.2", [0.1, 0.2], True, -0.5, {}]
)
def test_what_is_no_tolerance_refuses_the_run_with_line_and_value(tmp_path, cell):
    value = cell if isinstance(cell, str) else json.dumps(cell)
    with pytest.raises(UserError, match=rf"b\.jsonl line 1: the field 'within' is '{re.escape(value)}'") as refused:
        question(tmp_path, within=json.dumps(cell).encode())
    assert "Write 0.01, 4%" in refused.value.hint


NO_ANSWERS = [
    "",
    " ",
    [],
    [""],
    [None],
    {},
    {"a": None},
    ["", " "],
    "$$",
    "\\boxed{}",
    "So $\\boxed{ }$.",
    "#### ",
    ".",
]


@pytest.mark.parametrize("blank", NO_ANSWERS, ids=repr)
def test_a_reference_of_a_benchmark_that_says_nothing_refuses_the_run(tmp_path, blank):
    with pytest.raises(UserError, match=r"b\.jsonl line 1: (the reference .* holds no answer|there is no reference)"):
        question(tmp_path, answer=json.dumps(blank).encode())


@pytest.mark.parametrize(
    "short",
    [0, False, "0", "-", "+", "{}", "\u2205", "[]", "\\boxed{0}", ["", "5"], [0], "#### 0", "$x$", "?", "C"],
    ids=repr,
)
def test_a_short_reference_of_a_benchmark_is_one(tmp_path, short):
    assert question(tmp_path, answer=json.dumps(short).encode())["reference"]


def test_what_json_cannot_hold_is_no_text():
    for value in (b"x", float("nan"), [float("inf")], timedelta(1), {1: {2}}):
        with pytest.raises(ValueError, match="which JSON cannot hold"):
            as_text(value)


@pytest.mark.parametrize("text", ['{"any":' + "[" * 100_000, '{"any":' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_a_text_that_only_begins_like_several_references_is_one(text):
    assert right_answers(text) == [text]
