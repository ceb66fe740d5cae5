"""The event file of a training's curve, read back by an independent reading of the format."""

import math
import struct
import zlib
from typing import Any

import pytest

from cgd_stages.training.tensorboard import _checksum, event_file

RECORDS = [
    {"step": 1, "loss": 1.5, "seconds": 2.0, "tokens": 300},
    {"step": 200, "loss": 0.25, "validation_loss": 0.5, "seconds": 3.0, "tokens": 280},
]


def fields(data: bytes) -> list[tuple[int, Any]]:
    """The fields of a message: number and value."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        match key & 7:
            case 0:
                value: Any = varint()
            case 1:
                (value,), at = struct.unpack_from("<d", data, at), at + 8
            case 2:
                size = varint()
                value, at = data[at : at + size], at + size
            case 5:
                (value,), at = struct.unpack_from("<f", data, at), at + 4
        found.append((key >> 3, value))
    return found


def events(data: bytes) -> list[dict[int, Any]]:
    found, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        assert struct.unpack_from("<I", data, at + 8) == (_checksum(data[at : at + 8]),)
        body = data[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", data, at + 12 + length) == (_checksum(body),)
        found.append(dict(fields(body)))
        at += 16 + length
    return found


def scalars(summary: bytes) -> dict[str, float]:
    values = (dict(fields(value)) for number, value in fields(summary) if number == 1)
    return {value[1].decode(): value[2] for value in values}


def test_every_step_is_an_event_with_all_its_figures() -> None:
    version, first, last = events(event_file(RECORDS, ended=1000.0))
    assert version == {1: 995.0, 3: b"brain.Event:2"}
    assert (first[1], first[2], scalars(first[5])) == (997.0, 1, {"loss": 1.5, "seconds": 2.0, "tokens": 300.0})
    assert (last[1], last[2]) == (1000.0, 200)
    assert scalars(last[5]) == {"loss": 0.25, "validation_loss": 0.5, "seconds": 3.0, "tokens": 280.0}


def test_a_curve_without_steps_is_a_file_with_its_version_alone() -> None:
    assert len(events(event_file([], ended=1.0))) == 1


@pytest.mark.parametrize(
    ("data", "crc"), [(b"123456789", 0xE3069283), (b"\0" * 32, 0x8A9136AA), (bytes(range(32)), 0x46DD794E)]
)
def test_the_checksum_is_crc_32c(data: bytes, crc: int) -> None:
    """Test values of RFC 3720, B.4, turned and shifted as TensorFlow does."""
    assert _checksum(data) == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert zlib.crc32(data) != crc, "it is not the common one"


def test_a_figure_too_large_for_the_format_is_infinite_and_one_that_is_none_stays_so() -> None:
    (_, event) = events(event_file([{"step": 1, "seconds": 1.0, "high": 1e39, "low": -1e39, "none": math.nan}], 1.0))
    told = scalars(event[5])
    assert (told["high"], told["low"]) == (math.inf, -math.inf)
    assert math.isnan(told["none"])
