"""Wrong and strange files of prompts: `make fuzz`, and some of them in tests/stages/prepare/test_fuzz_lines.py.

    PYTHONPATH=tests python -m support.fuzz_lines --count 10000 --seed 0

Each file is one of JSON lines (plain, .gz or .zst) or of Parquet whose values, bytes or packed bytes are changed. It is
read as `prepare` reads it: every row that another reader counts is kept or rejected, what is kept can be stored and
comes back as it was, and no error but the refusal of the whole file is raised. A file that ends otherwise is a bug.
"""

import argparse
import base64
import gzip
import io
import json
import random
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cgd_stages.contract import Fields
from cgd_stages.errors import UserError
from cgd_stages.prepare.columns import row_of
from cgd_stages.prepare.sources import LINE_BYTES, File, read_lines
from cgd_stages.store.rows import Row, from_parquet, row_schema, to_parquet

FATES = {
    "rows": "every row is kept or rejected with its reason",
    "refused": "the whole file is refused by its name, as one that is cut or corrupt",
}
MOST_MEMORY = 16 * LINE_BYTES
"""Bytes of Python's memory that a file may take."""
FIELDS = (
    Fields(prompt="question", reference="answer"),
    Fields(prompt="question", reference="answer", several="any"),
    Fields(messages="messages"),
    Fields(prompt="question", reference="meta.value"),
    Fields(prompt="question", reference="answer", choices="choices"),
)
ODD_JSON = (
    rb'"\ud83d"', rb'"\ude00x"', rb'"\u0000"', b'"\0"', b"1e999", b"-1e999", b"1e-999", b"NaN", b"Infinity", b"-0",
    b"27", b"27.50", b"12345678901234567890123", b"9" * 5000, b'"\xff"', b'"\xed\xa0\xbd"', b'"2024-05-01"', b"null",
    b"true", b"[]", b"{}", b'["1", "2"]', b"[[[1.50]]]", b'{"a": 1, "a": 2}', b"[" * 300 + b"]" * 300, b"[" * 100_000,
    b'{"any": ["1"]}', rb'"{\"any\": [1"', b'""', b'" "', b"'a'", b"01", b"1.", b".5", b"+1", b"0x1", b"\xef\xbb\xbf1",
    b'"\xe2\x80\xa8"', b'"\\', b'[{"role": "user", "content": "\\ud83d"}]', rb'"[{\"role\": \"user\"}]"',
    b'[{"role": "user", "content": [{"type": "text", "text": 1.5}]}]',
)  # fmt: skip
AROUND = (b"\xef\xbb\xbf", b"\0", b" ", b"\t", b"\r", b",", b"[", b"]", b"}", b"{", b"\xff\xfe", b"\x0b", b"//")


@dataclass(frozen=True)
class Odd:
    """A changed file. `rows`: how many rows another reader finds in it; None where it may be refused as a whole."""

    name: str
    data: bytes
    fields: Fields
    rows: int | None


def mutants(seed: int) -> Iterator[Odd]:
    """Without end, the same for a seed."""
    dice = random.Random(seed)
    while True:
        make = dice.choice((_json_lines, _json_lines, _packed, _parquet))
        yield make(dice)


def fate(odd: Odd, folder: Path) -> str:
    """What becomes of a file; what is not in FATES is a bug, in words."""
    path = folder / odd.name
    path.write_bytes(odd.data)
    rows: list[Row] = []
    kept = rejected = 0
    try:
        for line in read_lines([File(odd.name, path, "")], "spec.prompts", odd.fields):
            row, fault = row_of(line, odd.fields)
            kept, rejected = kept + (fault is None), rejected + (fault is not None)
            if fault is None:
                rows.append(row | {"prompt_tokens": 1})
        schema = row_schema("prepare", conversations=True)
        stored = [{"turns": None} | row for row in rows]
        if from_parquet(to_parquet(stored, schema)) != [{name: row[name] for name in schema.names} for row in stored]:
            return "a row does not come back as it was"
        if any("\0" in (row[name] or "") for row in rows for name in ("prompt", "reference")):
            return "a row holds NUL"
    except UserError as error:
        return "refused" if odd.rows is None and odd.name in error.message else f"UserError: {error}"
    except Exception as error:  # noqa: BLE001 (to find them is what this is for)
        return f"{type(error).__name__}: {error}"
    if odd.rows not in (None, kept + rejected):
        return f"{odd.rows} rows are there, {kept} kept and {rejected} rejected"
    return "rows"


# --- JSON lines -------------------------------------------------------------------------------------------------


def _row(dice: random.Random) -> dict[str, Any]:
    number = dice.randrange(1000)
    asked = f"Ann has {number} apples. How many?"
    return {
        "question": asked,
        "answer": dice.choice([str(number), number, number + 0.5, None, [str(number), "many"], 1]),
        "choices": ["1", "2", str(number)],
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": str(number)}],
        "meta": {"value": number, "note": "caf\u00e9 \U0001f600"},
    }


def _lines(dice: random.Random) -> bytes:
    lines = [_changed(dice) if dice.random() < 0.7 else _line(_row(dice)) for _ in range(dice.randrange(1, 12))]
    end = dice.choice((b"\n", b"\n", b"\r\n", b"\n\n", b"\n \t\n"))
    return end.join(lines) + dice.choice((b"", end))


def _line(row: dict[str, Any], *, escaped: bool = True) -> bytes:
    return json.dumps(row, ensure_ascii=escaped).encode()


def _changed(dice: random.Random) -> bytes:
    row = _row(dice)
    match dice.randrange(6):
        case 0 | 1:  # another value, in any column or below it
            holder = dice.choice([row, row, row["meta"], row["messages"][0]])
            holder[dice.choice([*holder, "other"])] = "\ue000"
            return _line(row).replace(rb'"\ue000"', dice.choice(ODD_JSON))
        case 2:  # a column is gone, or another's value stands in it
            name, other = dice.choice([*row]), dice.choice([*row])
            row[name] = row[other]
            del row[other]
            return _line(row)
        case 3:  # bytes are changed
            return _damaged(_line(row, escaped=False), dice).replace(b"\n", b"")
        case 4:  # cut, doubled, or two in one
            line = _line(row)
            place = dice.randrange(len(line))
            return dice.choice((line[:place], line[place:], line * 2, line[:place] + b"\n" + line[place:]))
    return dice.choice(AROUND) + _line(row) + dice.choice((b"", dice.choice(AROUND)))


def _damaged(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        place = dice.randrange(len(changed) + 1)
        match dice.randrange(4):
            case 0:
                changed[place : place + 1] = bytes([dice.randrange(256)])
            case 1:
                changed[place:place] = dice.randbytes(dice.choice((1, 4)))
            case 2:
                del changed[place : place + dice.choice((1, 4, 40))]
            case 3:
                changed[place:place] = changed[place : place + 40]
    return bytes(changed)


def _counted(data: bytes) -> int:
    return sum(bool(line.strip()) for line in data.split(b"\n"))


def _json_lines(dice: random.Random) -> Odd:
    data = _lines(dice)
    return Odd("p.jsonl", data, dice.choice(FIELDS), _counted(data))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "p.jsonl.gz": partial(gzip.compress, mtime=0),
    "p.jsonl.zst": zstandard.compress,
}


def _packed(dice: random.Random) -> Odd:
    name, data = dice.choice([*PACKERS]), _lines(dice)
    if dice.random() < 0.02:  # a line that unpacks to 16 MiB
        data = b'{"question": "' + b"a" * (4 * LINE_BYTES) + b'"}\n' + data
    place = dice.randrange(len(data) + 1)
    packed = PACKERS[name](data[:place]) + PACKERS[name](data[place:])
    if dice.random() < 0.5:
        return Odd(name, _damaged(packed, dice), dice.choice(FIELDS), None)
    return Odd(name, packed, dice.choice(FIELDS), _counted(data))


# --- Parquet ----------------------------------------------------------------------------------------------------

TEXTS = ("a", "", " ", "1", "27.50", "a\0b", "\U0001f600", "caf\u00e9", '{"any": ["1"]}', "[" * 5000, "x" * 5000)
NUMBERS = (0.0, -0.0, 27.0, 27.1, 1e300, 1e-300, float("nan"), float("inf"))
VALUES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "text": (pa.string(), TEXTS),
    "large text": (pa.large_string(), TEXTS),
    "text view": (pa.string_view(), TEXTS),
    "bytes": (pa.binary(), (b"a", b"\xff", b"\0", b"")),
    "integer": (pa.int64(), (0, -1, 2**63 - 1)),
    "unsigned": (pa.uint64(), (0, 2**64 - 1)),
    "float": (pa.float64(), NUMBERS),
    "single": (pa.float32(), NUMBERS),
    "half": (pa.float16(), (0.0, 27.1, float("nan"))),
    "decimal": (pa.decimal128(38, 2), (Decimal("27.50"), Decimal("-0.01"))),
    "bool": (pa.bool_(), (True, False)),
    "date": (pa.date32(), (date(2024, 5, 1), date(1, 1, 1))),
    "far date": (pa.date32(), (2**31 - 1, -(2**31))),
    "time": (pa.timestamp("us"), (datetime(2024, 5, 1), 2**62, -(2**62))),  # noqa: DTZ001
    "time with zone": (pa.timestamp("us", "Europe/Paris"), (0, 2**62)),
    "time of nowhere": (pa.timestamp("ns", "No/Where"), (0, 1)),
    "span": (pa.duration("s"), (timedelta(days=1),)),
    "texts": (pa.list_(pa.string()), (["1", "2"], ["1"], [], [None], ["\0"])),
    "singles": (pa.list_(pa.float32()), ([27.1], [float("nan")], [])),
    "struct": (pa.struct([("value", pa.float32()), ("t", pa.string())]), ({"value": 27.1, "t": "a"}, {"t": "\0"})),
    "map": (pa.map_(pa.string(), pa.int64()), ([("k", 1)], [("\0", 1)], [])),
    "nothing": (pa.null(), (None,)),
    "turns": (
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        ([{"role": "user", "content": "q"}], [{"role": "user", "content": "\0"}], [{"role": "tool"}], []),
    ),
}


def _column(dice: random.Random, count: int, *kinds: str) -> pa.Array:
    kind, values = VALUES[dice.choice(kinds or [*VALUES])]
    column = pa.array([dice.choice((*values, None)) for _ in range(count)], kind)
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if kind == pa.string() and dice.random() < 0.1 and count and not column.null_count:
        buffers = column.buffers()
        whole = buffers[2].to_pybytes() if buffers[2] else b""
        return pa.Array.from_buffers(kind, count, [None, buffers[1], pa.py_buffer(whole.replace(b"a", b"\xff"))])
    return column.dictionary_encode() if texts and dice.random() < 0.3 else column


def _parquet(dice: random.Random) -> Odd:
    count, fields = dice.randrange(0, 12), dice.choice(FIELDS)
    columns = {
        "question": _column(dice, count, "text", "text", "large text", "text view", "bytes"),
        "answer": _column(dice, count),
        "messages": _column(dice, count, "turns", "turns", "texts", "text"),
        "choices": _column(dice, count, "texts", "struct", "singles", "text"),
        "meta": _column(dice, count, "struct", "text", "map"),
    }
    if dice.random() < 0.2:
        del columns[dice.choice([*columns])]
    sink = io.BytesIO()
    pq.write_table(
        pa.table(columns),
        sink,
        compression=dice.choice(("none", "snappy", "zstd", "gzip")),
        row_group_size=dice.choice((1, 3, 1000)),
        use_dictionary=dice.choice((True, False)),
        data_page_version=dice.choice(("1.0", "2.0")),
        store_schema=dice.choice((True, False)),
    )
    if dice.random() < 0.4:
        return Odd("p.parquet", _damaged(sink.getvalue(), dice), fields, None)
    return Odd("p.parquet", sink.getvalue(), fields, count)


# --- many -------------------------------------------------------------------------------------------------------


def fates(count: int, seed: int, folder: Path) -> dict[str, list[Odd]]:
    """The files by their fates. A file that takes more than `MOST_MEMORY` is a bug."""
    found: dict[str, list[Odd]] = {}
    chosen = mutants(seed)
    tracemalloc.start()
    try:
        for _ in track(range(count), description="files", transient=True):
            odd = next(chosen)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            name = fate(odd, folder)
            _, peak = tracemalloc.get_traced_memory()
            took = f"it took {(peak - before) >> 20} MiB"
            found.setdefault(took if peak - before > MOST_MEMORY else name, []).append(odd)
    finally:
        tracemalloc.stop()
    return found


def main(count: int, seed: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = fates(count, seed, Path(folder))
    console, table = Console(highlight=False), Table("fate", "files", "meaning")
    for name, meaning in FATES.items():
        table.add_row(name, str(len(found.get(name, []))), meaning)
    console.print(table)
    bugs = {name: files for name, files in found.items() if name not in FATES}
    for name, count_of in Counter({name: len(files) for name, files in bugs.items()}).most_common():
        first = min(bugs[name], key=lambda odd: len(odd.data))
        data = base64.b64encode(first.data[:5000]).decode()
        console.print(f"\n{count_of} times: {name}\n{first.name} with {first.fields}\n{data}", markup=False)
    return len(bugs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    raise SystemExit(min(1, main(given.count, given.seed)))
