"""What is sent to the API server reads alike by its JSON reader and by the YAML reader that takes what is applied."""

import json
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cgd_local.requests import read_apply
from cgd_operator.kube.client import encoded

PLANE = 0x10000


def whole(text: str) -> str:
    """A text without half characters, which no API server can keep."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def readings(text: str) -> list[object]:
    """What readers make of a text as a value and as a key: of JSON, the local API server's, and libyaml, of which the
    real one is a translation."""
    sent = encoded({"value": text, f"key {text}": 1}).decode()
    return [json.loads(sent), read_apply(sent), yaml.load(sent, Loader=yaml.CSafeLoader)]


@pytest.mark.parametrize("first", range(0, 0x110000, PLANE), ids=hex)
def test_every_character_is_read_as_it_was_meant(first: int) -> None:
    for start in range(first, first + PLANE, 0x100):
        text = "".join(map(chr, range(start, start + 0x100)))
        assert readings(text) == [{"value": whole(text), f"key {whole(text)}": 1}] * 3


STRANGE = st.text(st.sampled_from('\\"/ud8\n\t:#\x00\x7f\x85\u2028\ufeff\uffff\ud83d\ude00\U0001f600'), max_size=30)


@given(st.text(st.characters(codec=None), max_size=50) | STRANGE)
def test_every_text_is_read_as_it_was_meant(text: str) -> None:
    assert readings(text) == [{"value": whole(text), f"key {whole(text)}": 1}] * 3
