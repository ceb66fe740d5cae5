"""SECURITY.md says nothing that no test stands behind."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))


@pytest.mark.parametrize(("path", "name"), TESTS)
def test_a_test_that_is_named_is_there(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    functions = [one.name for one in ast.walk(tree) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert name in functions


def test_every_path_that_is_named_is_one_of_a_test() -> None:
    assert TESTS
    named = re.findall(r"`(tests/[^`]*)`", TEXT)
    assert sorted(set(named)) == [f"{path}::{name}" for path, name in TESTS]


def test_every_line_says_whether_it_was_tried() -> None:
    table = TEXT.partition("## What was tried")[2]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows
    for what, tests, tried in rows:
        assert "AT-MERGE" in tests or re.match(r" (tried|read)\b", tried), what


def test_every_value_of_the_chart_that_is_named_is_there() -> None:
    values = (ROOT / "charts/cgd-operator/values.yaml").read_text()
    for name in ("policy", "watchNamespaces", "stages", "egress", "sizeLimit"):
        assert re.search(rf"\b{name}`", TEXT), name
        assert re.search(rf"^ *{name}:", values, re.MULTILINE), name


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / link).exists()
