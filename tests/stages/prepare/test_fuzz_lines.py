"""Some hundred of the strange files of `make fuzz`: read = kept + rejected, and no traceback."""

import io
import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import fuzz_lines
from support.fuzz_lines import FATES, Odd, fate

from cgd_stages.contract import Fields

FIELDS = Fields(prompt="question", reference="answer")


@pytest.mark.parametrize("seed", [1, 2])
def test_every_row_of_a_strange_file_is_kept_or_rejected_or_the_file_is_refused(tmp_path: Path, seed: int) -> None:
    found = fuzz_lines.fates(200, seed, tmp_path)
    assert {name: files for name, files in found.items() if name not in FATES} == {}
    assert found.keys() == FATES.keys()


def test_a_parquet_file_whose_column_has_no_readable_name_is_refused(tmp_path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"question": ["a"]}), sink, store_schema=False)
    named = sink.getvalue().replace(b"question", b"\xffuestion")
    assert fate(Odd("p.parquet", named, FIELDS, None), tmp_path) == "refused"


def test_files_are_the_same_for_a_seed() -> None:
    one, again = (list(itertools.islice(fuzz_lines.mutants(7), 40)) for _ in range(2))
    assert [(odd.name, odd.data) for odd in one] == [(odd.name, odd.data) for odd in again]
    assert {odd.name for odd in one} == {"p.jsonl", "p.jsonl.gz", "p.jsonl.zst", "p.parquet"}


def test_a_lost_row_a_traceback_and_much_memory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Odd("p.jsonl", b'{"question": "q", "answer": "1"}\n', FIELDS, 1)
    assert fate(good, tmp_path) == "rows"
    assert fate(Odd(good.name, good.data, FIELDS, 2), tmp_path) == "2 rows are there, 1 kept and 0 rejected"

    def broken(*_: Any) -> None:
        raise KeyError("oops")

    with monkeypatch.context() as patch:
        patch.setattr(fuzz_lines, "row_of", broken)
        assert fate(good, tmp_path) == "KeyError: 'oops'"
    monkeypatch.setattr(fuzz_lines, "MOST_MEMORY", 0)
    assert all(name.startswith("it took ") for name in fuzz_lines.fates(3, 1, tmp_path))
