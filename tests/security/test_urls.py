"""A URL with a user and a password is refused in every field that takes a URL, and its words are told nowhere."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from support.builders import manifest
from support.status_builders import NOW

from cgd_local.schema import default, validate
from cgd_operator.api.crd import crd
from cgd_operator.api.fields import without_user
from cgd_operator.api.spec import InvalidRun, parse_spec
from cgd_operator.api.status import CGDRunStatus
from cgd_operator.status import events, render

SCHEMA: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
SECRET = "hunter2"
S3 = "storage.credentialsSecretRef"
HUB = "hubTokenSecretRef"
KEY = "teacher.endpoint.apiKeySecretRef"

FIELDS = [
    ("student.model", f"https://me:{SECRET}@huggingface.co/a/b", HUB),
    ("student.model", f"s3://me:{SECRET}@bucket/model", S3),
    ("teacher.model", f"https://me:{SECRET}@huggingface.co/a/b", HUB),
    ("prompts.source", f"s3://me:{SECRET}@bucket/a.jsonl", S3),
    ("evaluation.taskData", f"s3://me:{SECRET}@bucket/home", S3),
    ("storage.uri", f"s3://me:{SECRET}@bucket/runs", S3),
    ("storage.endpoint", f"https://me:{SECRET}@s3.example.com", S3),
    ("storage.endpoint", f"http://{SECRET}@127.0.0.1:9000", S3),
    ("images.generate", f"https://me:{SECRET}@registry.example/generate:1", "imagePullSecrets"),
    ("images.train", f"https://me:{SECRET}@registry.example/train:1", "imagePullSecrets"),
]
TAKEN = [
    ("student.model", "meta-llama/Llama-3.1-8B-Instruct"),
    ("student.model", "s3://data/models/a@b"),
    ("prompts.source", "hf://datasets/owner/name@main/data/*.parquet"),
    ("prompts.source", "s3://data/me:you@home/a.jsonl"),
    ("storage.endpoint", "https://s3.example.com:9000/@x"),
    ("storage.endpoint", "http://[fe80::1]:9000/a/~b%20c/"),
    ("images.generate", "registry.example:5000/generate@sha256:" + "0" * 64),
]


def spec_of(path: str, value: Any) -> dict[str, Any]:
    return manifest({path: value})


def refusals(whole: dict[str, Any]) -> list[str]:
    """What the API server says of a manifest."""
    spec = json.loads(json.dumps(whole["spec"]))
    default(SCHEMA, spec)
    return [str(cause) for cause in validate(SCHEMA, spec)]


@pytest.mark.parametrize(("path", "url", "secret"), FIELDS)
def test_a_url_with_a_password_is_refused_with_its_field_and_where_it_belongs(path, url, secret):
    with pytest.raises(InvalidRun) as caught:
        parse_spec(spec_of(path, url))
    (told,) = str(caught.value).splitlines()
    assert told.startswith(f"spec.{path}: take user and password out of the URL")
    assert secret in told
    assert SECRET not in str(caught.value)
    assert any(secret in one for one in refusals(spec_of(path, url)))


def test_an_endpoint_of_a_teacher_takes_its_key_from_a_secret():
    endpoint = {"url": f"https://me:{SECRET}@api.example.com/v1", "model": f"https://me:{SECRET}@m"}
    whole = spec_of("teacher", {"endpoint": endpoint})
    with pytest.raises(InvalidRun) as caught:
        parse_spec(whole)
    for field in ("url", "model"):
        assert f"spec.teacher.endpoint.{field}: take user and password out of the URL" in str(caught.value)
    assert str(caught.value).count(KEY) == 2
    assert SECRET not in str(caught.value)
    assert len([one for one in refusals(whole) if KEY in one]) == 2


def test_a_benchmark_s_source_is_a_url_too():
    benchmark = {"name": "own", "source": f"s3://me:{SECRET}@bucket/a.jsonl", "fields": {"reference": "answer"}}
    with pytest.raises(InvalidRun) as caught:
        parse_spec(spec_of("evaluation.benchmarks", [benchmark]))
    assert "spec.evaluation.benchmarks.0.source: take user and password" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("path", ["storage.endpoint", "teacher.endpoint.url"])
@pytest.mark.parametrize("url", [f"https://host/v1?api_key={SECRET}", f"https://host/#{SECRET}"])
def test_a_base_url_has_no_query_that_could_hold_a_key(path, url):
    changes = {path: url, "teacher.model": None, "teacher.endpoint.model": "m"} if "teacher" in path else {path: url}
    with pytest.raises(InvalidRun, match="without \\? and #") as caught:
        parse_spec(manifest(changes))
    assert SECRET not in str(caught.value)
    assert any("without ? and #" in one for one in refusals(manifest(changes)))


@pytest.mark.parametrize("path", ["storage.endpoint", "teacher.endpoint.url"])
@pytest.mark.parametrize(
    "url",
    [
        f"https://me:{SECRET}/@host",
        f"https://me:{SECRET}%40host/",
        f"https://me:{SECRET}\uff20host/",
        f"https://host:80:{SECRET}/",
        f"http://host\r\nX: {SECRET}",
        f"http://host/{SECRET}\0",
        f"http://host/v1 {SECRET}",
        f"http://ho\\{SECRET}/",
    ],
)
def test_a_base_url_is_one_to_every_client(path, url):
    changes = {path: url, "teacher.model": None, "teacher.endpoint.model": "m"} if "teacher" in path else {path: url}
    with pytest.raises(InvalidRun, match="a port that is no number") as caught:
        parse_spec(manifest(changes))
    assert SECRET not in str(caught.value)
    assert any("a port that is no number" in one for one in refusals(manifest(changes)))


@pytest.mark.parametrize(("path", "url"), TAKEN)
def test_an_at_sign_that_is_no_user_s_is_taken(path, url):
    assert parse_spec(spec_of(path, url))
    assert refusals(spec_of(path, url)) == []


def strings(schema: dict[str, Any], path: str = "") -> dict[str, dict[str, Any]]:
    """Every field that takes a text as long as a URL may be."""
    found = {path: schema} if schema.get("type") == "string" and schema.get("maxLength") == 1024 else {}
    for name, child in schema.get("properties", {}).items():
        found |= strings(child, f"{path}.{name}")
    return found | (strings(schema["items"], f"{path}[]") if isinstance(schema.get("items"), dict) else {})


@pytest.mark.parametrize("path", strings(SCHEMA))
def test_every_field_for_a_url_has_the_rule(path):
    rules = [one["message"] for one in strings(SCHEMA)[path]["x-kubernetes-validations"]]
    assert any(one.startswith("take user and password out of the URL, and name the Secret") for one in rules)


@given(some.from_regex(r"\A(s3|https?)://[a-z:@/?#. \n]{0,12}\Z"))
def test_the_api_server_and_the_operator_refuse_the_same_urls(url):
    for path in ("storage.endpoint", "prompts.source", "student.model"):
        whole = spec_of(path, url)
        try:
            parse_spec(whole)
        except InvalidRun:
            assert refusals(whole)
        else:
            assert refusals(whole) == []


@pytest.mark.parametrize(
    "value",
    [f"https://me:{SECRET}@host/" + "a" * 2000, [f"https://me:{SECRET}@host/"], {"url": f"https://me:{SECRET}@host/"}],
)
def test_a_value_that_is_wrong_otherwise_is_told_without_its_password(value):
    whole = spec_of("storage.endpoint", value)
    with pytest.raises(InvalidRun) as caught:
        parse_spec(whole)
    words = str(caught.value)
    assert "://***@host" in words
    told = render.refused(1, words, CGDRunStatus(), NOW)
    whole["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    assert SECRET not in told.model_dump_json() + json.dumps(events.refusal(whole, words, NOW))


def test_a_text_without_a_user_stays_as_it_is():
    text = "see https://host/a@b and hf://datasets/a/b@main, or mail me@host"
    assert without_user(text) == text
