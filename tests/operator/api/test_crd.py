"""The generated CustomResourceDefinition: complete, structural, without traps."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cgd_local.schema import default
from cgd_operator.api.crd import crd, to_yaml
from cgd_operator.api.manual import manual

ROOT = Path(__file__).parents[3]


def test_the_committed_manual_is_what_the_models_say() -> None:
    assert (ROOT / "docs/api.md").read_text() == manual(), "run `make crds`"


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for part in ("items", "additionalProperties"):
        if isinstance(schema.get(part), dict):
            yield from nodes(schema[part], f"{path}[]")


SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
NODES = dict(nodes(SCHEMA))


@pytest.mark.parametrize("path", ["crds/cgdruns.yaml", "charts/cgd-operator/files/cgdruns.yaml"])
def test_the_committed_file_is_what_the_models_say(path: str) -> None:
    assert (ROOT / path).read_text() == to_yaml(), "run `make crds`"


@pytest.mark.parametrize("path", NODES)
def test_every_node_is_structural(path: str) -> None:
    node = NODES[path]
    assert not {"$ref", "anyOf", "oneOf", "allOf", "title", "const", "exclusiveMinimum"} & set(node)
    typed = node.get("type") not in (None, "number", "null")
    assert typed or node.get("x-kubernetes-int-or-string"), "no floats, no untyped nodes"
    assert node.get("additionalProperties") is not False


def test_the_default_learning_rate_is_a_string_for_every_yaml_reader() -> None:
    assert "default: '1e-6'" in to_yaml()


@pytest.mark.parametrize("path", [path for path, node in NODES.items() if "default" in node])
def test_a_default_is_whole_so_that_the_rules_of_its_schema_can_be_judged_by_it(path: str) -> None:
    node = NODES[path]
    filled = copy.deepcopy(node["default"])
    default({"type": "object", "properties": {"it": node}}, wrapped := {"it": filled})
    assert wrapped["it"] == node["default"] or path == ".status"


def test_everything_but_suspend_and_what_becomes_of_pods_and_ended_runs_is_immutable() -> None:
    frozen = {rule["fieldPath"] for rule in NODES[".spec"]["x-kubernetes-validations"] if "oldSelf" in rule["rule"]}
    assert frozen == {f".{name}" for name in NODES[".spec"]["properties"]} - {
        ".suspend",
        ".ttlSecondsAfterFinished",
        ".deletionPolicy",
        ".replaceLostPodsAfterSeconds",
    }


def test_conditions_and_stages_are_merged_by_key() -> None:
    assert NODES[".status.conditions"]["x-kubernetes-list-map-keys"] == ["type"]
    assert NODES[".status.stages"]["x-kubernetes-list-map-keys"] == ["name"]


def test_the_columns_are_those_of_the_manual() -> None:
    version = crd()["spec"]["versions"][0]
    columns = version["additionalPrinterColumns"]
    names = [column["name"] for column in columns if not column.get("priority")]
    assert names == ["State", "Stage", "Progress", "ETA", "GPU-Hours", "Age"]
    assert [column["name"] for column in columns if column.get("priority")] == ["Reason", "Message"]


def test_the_file_is_one_document_that_yaml_reads_back() -> None:
    assert yaml.safe_load(to_yaml()) == crd()
