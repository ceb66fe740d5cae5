"""The path of an address: what stores and file systems read in several ways is refused with its field, by the API
server and by the operator alike."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from support.builders import manifest

from cgd_local.schema import default, validate
from cgd_operator.api.crd import crd
from cgd_operator.api.spec import InvalidRun, parse_spec

SCHEMA: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
MEND = "take empty parts (//), . and .. out of the path"
BENCHMARK = {"name": "own", "fields": {"reference": "answer"}}
FIELDS: dict[str, tuple[str, str]] = {
    "storage.uri": ("storage.uri", "s3"),
    "prompts.source": ("prompts.source", "s3"),
    "prompts.source of the hub": ("prompts.source", "hf"),
    "student.model": ("student.model", "s3"),
    "teacher.model": ("teacher.model", "s3"),
    "evaluation.taskData": ("evaluation.taskData", "s3"),
    "evaluation.published": ("evaluation.published", "s3"),
    "evaluation.benchmarks.0.source": ("evaluation.benchmarks", "s3"),
    "student.speculative.model": ("student.speculative", "s3"),
    "student.chat": ("student.chat", "s3"),
    "teacher.chat": ("teacher.chat", "s3"),
}
ODD = ["/a", "a//b", "a//", "./a", "a/./b", "a/.", ".", "../a", "a/../b", "a/..", "..", "//"]
PLAIN = ["a", "a/b", "a..b/c", ".a/b", "a./b.", "...", "a/...", "a b/\u00e9", "a/b.jsonl"]


def given_at(field: str, path: str) -> dict[str, Any]:
    place, scheme = FIELDS[field]
    uri = f"s3://data/{path}" if scheme == "s3" else f"hf://datasets/owner/name/{path}"
    if field.endswith("source") and place != "prompts.source":
        return manifest({place: [{**BENCHMARK, "source": uri}]})
    if place == "student.speculative":
        return manifest({place: {"method": "draft_model", "numSpeculativeTokens": 3, "model": uri}})
    return manifest({place: {"template": uri} if place.endswith("chat") else uri})


def refusals(whole: dict[str, Any]) -> list[str]:
    """What the API server says of a manifest."""
    spec = json.loads(json.dumps(whole["spec"]))
    default(SCHEMA, spec)
    return [str(cause) for cause in validate(SCHEMA, spec)]


@pytest.mark.parametrize("path", ODD)
@pytest.mark.parametrize("field", FIELDS)
def test_a_path_that_can_be_read_in_several_ways_is_refused_with_its_field(field: str, path: str) -> None:
    whole = given_at(field, path)
    with pytest.raises(InvalidRun) as caught:
        parse_spec(whole)
    told = [line for line in str(caught.value).splitlines() if MEND in line]
    assert [line.partition(":")[0] for line in told] == [f"spec.{field.removesuffix(' of the hub')}"]
    assert any(MEND in cause for cause in refusals(whole))


@pytest.mark.parametrize("path", PLAIN)
@pytest.mark.parametrize("field", FIELDS)
def test_any_other_path_is_taken(field: str, path: str) -> None:
    whole = given_at(field, path)
    assert parse_spec(whole)
    assert refusals(whole) == []


@pytest.mark.parametrize("uri", ["s3://data", "s3://data/", "s3://data/a/", "s3://data/a/b/"])
def test_a_slash_at_the_end_of_a_folder_is_fine(uri: str) -> None:
    for changes in ({"storage.uri": uri}, {"student.model": uri}):
        assert parse_spec(manifest(changes))
        assert refusals(manifest(changes)) == []


@pytest.mark.parametrize("model", ["/models/a", "./a", "../a", "/models//a", "org/name", "~/a"])
def test_a_path_in_the_image_is_no_address(model: str) -> None:
    assert parse_spec(manifest({"student.model": model})).student.model == model
    assert refusals(manifest({"student.model": model})) == []


@given(some.from_regex(r"\A[a./\n]{0,8}\Z"), some.sampled_from(["storage.uri", "prompts.source", "student.chat"]))
def test_the_api_server_and_the_operator_refuse_the_same_paths(path: str, field: str) -> None:
    whole = given_at(field, path)
    try:
        parse_spec(whole)
    except InvalidRun:
        assert refusals(whole)
    else:
        assert refusals(whole) == []
