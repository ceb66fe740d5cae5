"""The examples of a training: in the order of their keys, and on disk."""

from pathlib import Path

import pyarrow as pa
import pytest

from cgd_stages.train.example_files import EXAMPLES_SCHEMA
from cgd_stages.train.examples import Examples

KEYS = [(f"{number:04d}", sample) for number in range(150) for sample in (0, 1)]


def tokens(key: tuple[str, int]) -> list[int]:
    return [int(key[0]), key[1], *range(500)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """300 examples in another order, 100 in a record batch."""
    rows = [
        {"id": key[0], "sample": key[1], "input_ids": tokens(key)[: 100 + int(key[0])], "start": 2 + key[1]}
        for key in (KEYS[7 * number % len(KEYS)] for number in range(len(KEYS)))
    ]
    with pa.ipc.new_file(tmp_path / "examples", EXAMPLES_SCHEMA) as file:
        for begin in range(0, len(rows), 100):
            file.write(pa.RecordBatch.from_pylist(rows[begin : begin + 100], schema=EXAMPLES_SCHEMA))
    return tmp_path / "examples"


def test_examples_come_in_the_order_of_their_keys_each_with_its_own_tokens(path: Path) -> None:
    examples = Examples(path)
    assert [examples.key(index) for index in range(300)] == [f"{name}/{sample}" for name, sample in KEYS]
    assert examples.lengths == [100 + int(name) for name, _ in KEYS]
    assert examples.starts == [2 + sample for _, sample in KEYS]
    for index in (0, 7, 299):
        inputs, _ = examples.tensors([index], packing=False)
        assert inputs["input_ids"].tolist() == [tokens(KEYS[index])[: examples.lengths[index]]]


def test_their_tokens_stay_on_disk(path: Path) -> None:
    before = pa.total_allocated_bytes()
    examples = Examples(path)
    assert pa.total_allocated_bytes() - before < 0.1 * 4 * sum(examples.lengths)
