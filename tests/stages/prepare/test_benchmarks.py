"""Benchmarks that are known by name, each loaded from a mirror with the columns that its data set has."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.builders import run
from support.stage_builders import context, prepare_work

from cgd_operator.api.benchmarks import BENCHMARKS, INSTRUCTION
from cgd_operator.planning.dag import plan
from cgd_stages.contract import Benchmark, Prepare, Storage
from cgd_stages.errors import UserError
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.prepare.sources import open_source
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.rows import Row

ROWS: dict[str, list[dict[str, Any]]] = {
    "MATH-500": [
        {"problem": "$1+1$?", "solution": r"It is $\boxed{2}$.", "answer": "2", "subject": "Algebra", "level": 1,
         "unique_id": "test/algebra/1.json"},
    ],
    "GSM8K": [{"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"}],
    "Minerva": [{"question": "How bright is it?", "answer": "1.6e-19"}],
    "OlympiadBench": [
        {"id": 1, "question": "Find $T$.", "solution": ["..."], "final_answer": ["$1$, $-2$"], "context": None,
         "is_multiple_answer": True, "unit": None, "answer_type": "Numerical", "error": None},
        {"id": 2, "question": "Find $K$.", "solution": ["..."], "final_answer": ["0.5"], "context": "Let $T=3$.",
         "is_multiple_answer": False, "unit": None, "answer_type": "Numerical", "error": "1e-1"},
    ],
    "AMC23": [{"id": 0, "question": "How far?", "answer": "27.0", "url": "..."}],
    "AIME24": [{"id": 60, "problem": "How many?", "solution": "...", "answer": "204", "url": "...", "year": "2024"}],
    "AIME25": [{"id": "0", "problem": "Which bases?", "answer": "70"}],
    "TheoremQA": [{"Question": "How large?", "Answer": "3.464", "Answer_type": "float", "Picture": None}],
}  # fmt: skip
EXPECTED: dict[str, list[tuple[str, str, str | None]]] = {
    "MATH-500": [("$1+1$?", "2", None)],
    "GSM8K": [("Two and two?", "2+2=<<2+2=4>>4\n#### 4", None)],
    "Minerva": [("How bright is it?", "1.6e-19", None)],
    "OlympiadBench": [("Find $T$.", '["$1$, $-2$"]', None), ("Let $T=3$.\n\nFind $K$.", '["0.5"]', "1e-1")],
    "AMC23": [("How far?", "27.0", None)],
    "AIME24": [("How many?", "204", None)],
    "AIME25": [("Which bases?", "70", None)],
    "TheoremQA": [("How large?", "3.464", "4%")],
}
"""Question, reference, tolerance."""


def planned(*benchmarks: dict[str, Any]) -> tuple[Benchmark, ...]:
    """The benchmarks of a manifest as prepare is told of them."""
    work = plan(run({"evaluation.benchmarks": list(benchmarks)}))[0].task.work
    assert isinstance(work, Prepare)
    return work.benchmarks


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def read(benchmark: Benchmark, storage: Storage, scratch: Path) -> list[Row]:
    given = context(storage, prepare_work("/model", benchmark.source), scratch)
    return list(prepare.read_benchmark(benchmark, open_source(given, benchmark, "spec")))


def test_every_known_benchmark_is_tried() -> None:
    assert list(BENCHMARKS) == list(ROWS) == list(EXPECTED)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_name_alone_tells_source_columns_instruction_tolerance_and_size(name: str) -> None:
    (benchmark,), known = planned({"name": name}), BENCHMARKS[name]
    assert benchmark.source == known.source
    assert benchmark.source.startswith(f"hf://datasets/{known.repository}@refs/convert/parquet/")
    assert (benchmark.fields, benchmark.tolerance, benchmark.questions) == (
        known.fields, known.tolerance, known.questions,
    )  # fmt: skip
    assert benchmark.instruction == INSTRUCTION


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(("ending", "write"), [("jsonl", jsonl), ("parquet", parquet)])
def test_a_mirror_keeps_the_mapping_of_the_name(
    bucket: Bucket, storage: Storage, tmp_path: Path, name: str, ending: str, write: Any
) -> None:
    bucket.put(f"mirror/part.{ending}", write(ROWS[name]))
    (benchmark,) = planned({"name": name, "source": bucket.uri(f"mirror/*.{ending}")})
    rows = read(benchmark, storage, tmp_path)
    assert [(row["prompt"], row["reference"], row["tolerance"]) for row in rows] == EXPECTED[name]
    assert {row["benchmark"] for row in rows} == {name}


def test_what_a_manifest_says_of_a_known_benchmark_holds() -> None:
    (benchmark,) = planned(
        {
            "name": "MATH-500",
            "fields": {"prompt": "q", "reference": "a"},
            "instruction": "",
            "tolerance": "1%",
            "limit": 9,
        }
    )
    assert (benchmark.fields.prompt, benchmark.fields.reference, benchmark.fields.context) == ("q", "a", None)
    assert (benchmark.instruction, benchmark.tolerance, benchmark.limit) == ("", "1%", 9)
    assert benchmark.source == BENCHMARKS["MATH-500"].source


def test_any_other_name_is_what_the_manifest_says_and_no_more() -> None:
    (benchmark,) = planned({"name": "math-500", "source": "s3://data/m.jsonl", "fields": {"reference": "a"}})
    assert (benchmark.instruction, benchmark.tolerance, benchmark.questions) == ("", None, None)


def test_a_mirror_of_another_size_is_warned_about_unless_a_limit_says_so(
    bucket: Bucket, storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.put("mirror.jsonl", jsonl(ROWS["AIME24"]))
    mirror = {"name": "AIME24", "source": bucket.uri("mirror.jsonl")}
    with caplog.at_level(logging.WARNING):
        read(planned({**mirror, "limit": 1})[0], storage, tmp_path)
        assert not caplog.messages
        read(planned(mirror)[0], storage, tmp_path)
    assert caplog.messages == ["AIME24 has 1 questions, 30 are published"]


@pytest.mark.parametrize("reference", ["", " ", "<think>It may be 4", "<think>It is 4.</think>"])
def test_a_question_whose_reference_says_nothing_is_refused(
    bucket: Bucket, storage: Storage, tmp_path: Path, reference: str
) -> None:
    bucket.put("mirror.jsonl", jsonl([{"problem": "2 + 2?", "answer": reference}]))
    (benchmark,) = planned({"name": "MATH-500", "source": bucket.uri("mirror.jsonl")})
    with pytest.raises(UserError, match=r"line 1: the reference .* holds no answer"):
        read(benchmark, storage, tmp_path)


def test_questions_that_differ_in_their_context_alone_are_two(bucket: Bucket, storage: Storage, tmp_path: Path) -> None:
    rows = [{**ROWS["OlympiadBench"][0], "context": context} for context in ("Let $T=1$.", "Let $T=2$.", None)]
    bucket.put("mirror.jsonl", jsonl(rows))
    (benchmark,) = planned({"name": "OlympiadBench", "source": bucket.uri("mirror.jsonl")})
    assert len({row["id"] for row in read(benchmark, storage, tmp_path)}) == 3
