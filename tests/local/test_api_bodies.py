"""The API server's two readers: what is applied goes through one of YAML, everything else through one of JSON."""

from typing import Any

import pytest

from cgd_local.requests import read_apply, read_json
from cgd_local.statuses import ApiError

CONFIGMAP = "/api/v1/namespaces/default/configmaps/texts"


@pytest.mark.parametrize(
    "written",
    [
        r"\ud83d\ude00", r"\ud83d", r"\\\ude00", r"\/",
        "\x00", "\x1f", "\x7f", "\x80", "\x85", "\x9f", "\u2028", "\u2029", "\ufeff", "\ufffe", "\uffff",
    ],
    ids=ascii,
)  # fmt: skip
def test_the_reader_of_applies_does_not_take(written: str) -> None:
    with pytest.raises(ApiError, match="error decoding"):
        read_apply(f'{{"a":"{written}"}}')


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("\U0001f600", "\U0001f600"), ("\U0010ffff", "\U0010ffff"), ("\xa0\ufffd", "\xa0\ufffd"),
        (r"\u0000\u007f\u0085", "\x00\x7f\x85"), (r"\u2028\ufeff\uffff", "\u2028\ufeff\uffff"),
        (r"\\ud83d", r"\ud83d"), (r"\n\t\"", '\n\t"'),
    ],
    ids=ascii,
)  # fmt: skip
def test_the_reader_of_applies_takes(written: str, read: str) -> None:
    assert read_apply(f'{{"a":"{written}"}}') == {"a": read}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"\ud83d\ude00", "\U0001f600"), (r"\ud83d", "\ufffd"), (r"\ude00x\ud83d", "\ufffdx\ufffd"),
        (r"\/\\ud83d", r"/\ud83d"),
    ],
    ids=ascii,
)  # fmt: skip
def test_the_reader_of_json_takes_pairs_of_escapes_and_replaces_halves(written: str, read: str) -> None:
    assert read_json(f'{{"a":"{written}"}}') == {"a": read}


async def test_an_apply_in_ascii_is_refused_where_a_merge_patch_is_taken(client: Any) -> None:
    """The body is what Python's json makes of it."""
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "texts"}, "data": {"a": "\U0001f600"}}
    await client.post(CONFIGMAP.rpartition("/")[0], body)
    refused = await client.apply(CONFIGMAP, body, code=400)
    assert "error decoding YAML" in refused["message"]
    assert (await client.patch(CONFIGMAP, body))["data"] == body["data"]


async def test_a_body_that_is_no_utf_8_is_refused(client: Any) -> None:
    async with client.session.post(client.url + CONFIGMAP.rpartition("/")[0], data=b'{"a":"\xff"}') as answer:
        assert answer.status == 400
