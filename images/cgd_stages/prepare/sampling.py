"""An even sample of rows by a seed, in one pass and in memory that does not grow with the rows' texts.

The rows wait in files until the last has come; memory holds an 8-byte key of each, a hash of the seed and the row's id.
The rows with the smallest keys are drawn. So neither the order of the rows nor their division into files matters, and a
larger sample with the same seed contains the smaller one.
"""

import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from cgd_stages.store.rows import Row, from_parquet, to_parquet

FILE_ROWS = 10_000
FILE_CHARACTERS = 256 << 20
"""A file is written when it has this many rows, or this much text."""


def characters(row: Row) -> int:
    """The length of a row's prompt and reference, and of the turns before the prompt."""
    return sum(len(row.get(column) or "") for column in ("prompt", "reference", "turns"))


class Sample:
    """Draws `size` of the rows that are added, or all when they are fewer. Nothing else may use `folder` meanwhile."""

    def __init__(self, seed: int, size: int, folder: Path, schema: pa.Schema) -> None:
        self._seed, self._size, self._folder, self._schema = seed, size, folder, schema
        self._keys = array("Q")
        self._rows: list[Row] = []
        self._files: list[Path] = []
        self._characters = 0

    def add(self, row: Row) -> None:
        self._keys.append(self._key(row))
        self._rows.append(row)
        self._characters += characters(row)
        if len(self._rows) >= FILE_ROWS or self._characters >= FILE_CHARACTERS:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{len(self._files):05d}.parquet"
            path.write_bytes(to_parquet(self._rows, self._schema))
            self._files.append(path)
            self._rows, self._characters = [], 0

    def drawn(self) -> Iterator[tuple[Row, bool]]:
        """Every added row, once and in order, and whether it is drawn. Deletes the files."""
        last = nth_smallest(self._keys, self._size)
        for path in self._files:
            yield from ((row, self._key(row) <= last) for row in from_parquet(path.read_bytes()))
            path.unlink()
        yield from ((row, self._key(row) <= last) for row in self._rows)

    def _key(self, row: Row) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed}/{row['id']}".encode()).digest()[:8], "big")


def nth_smallest(keys: "array[int]", n: int) -> int:
    """The n-th smallest key, n from 1; the largest key when they are fewer than n."""
    if n >= len(keys):
        return max(keys, default=0)
    column = pa.Array.from_buffers(pa.uint64(), len(keys), [None, pa.py_buffer(keys)])
    return keys[pc.partition_nth_indices(column, pivot=n - 1)[n - 1].as_py()]
