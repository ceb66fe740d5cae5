"""A training's curve as TensorBoard reads it: an event file, written without TensorBoard's packages.

The format is TensorFlow's: records (`tensorflow/core/lib/io/record_writer.cc`) that hold `Event` messages
(`tensorflow/core/util/event.proto`), of which a curve needs five fields.
"""

import math
import struct
import time
from collections.abc import Sequence

from cgd_stages.training.job import Record

EVENTS = "tensorboard/events.out.tfevents.cgd"
"""The file below a training's folder. TensorBoard knows event files by this part of their name."""
_POLYNOMIAL = 0x82F63B78  # CRC-32C, reversed
_LARGEST = 3.4e38  # of four bytes


def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _table()


def event_file(records: Sequence[Record], ended: float | None = None) -> bytes:
    """One event for each step, with all its figures. `ended`: when the last step ended, in seconds from the epoch;
    default: now. The steps' times are as if nothing had lain between them."""
    began = (time.time() if ended is None else ended) - sum(record.get("seconds", 0.0) for record in records)
    events, at = [_double(1, began) + _bytes(3, b"brain.Event:2")], began
    for record in records:
        at += record.get("seconds", 0.0)
        values = b"".join(
            _bytes(1, _bytes(1, name.encode()) + _float(2, value)) for name, value in record.items() if name != "step"
        )
        events.append(_double(1, at) + _number(2, int(record["step"])) + _bytes(5, values))
    return b"".join(map(_record, events))


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _checksum(length)) + data + struct.pack("<I", _checksum(data))


def _checksum(data: bytes) -> int:
    """CRC-32C, turned and shifted as TensorFlow stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# --- fields of a protocol buffer: their number, with the wire type in the last three bits, and their value


def _varint(value: int) -> bytes:
    head, rest = value & 0x7F, value >> 7
    return bytes([head | 0x80]) + _varint(rest) if rest else bytes([head])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    shown = math.copysign(math.inf, value) if abs(value) > _LARGEST else value
    return _varint(field << 3 | 5) + struct.pack("<f", shown)
