"""Names on their way into a path or a selector of the Kubernetes API."""

import ast
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from cluster.conftest import world  # noqa: F401  a fixture

from cgd_operator.kube.kinds import CRD, EVENT, JOB, NODE, POD, RUN, SECRET, InvalidName, Kind, equal, one_of

OPERATOR = Path(__file__).parents[2] / "operator"
STRANGE = [
    "",
    ".",
    "..",
    "../secrets/key",
    "a/b",
    "a%2fb",
    "a%",
    "a?watch=true",
    "a#b",
    "a&b",
    "a;b",
    "a b",
    "a\n",
    "a\nWARNING forged",
    "\x00",
    "\x1b[2J",
    "A",
    "a_b",
    "a,b=c",
    "a..b",
    ".a",
    "-a",
    "a-",
    "ä",
    "\u202ea",
    "\ud800",
    "${NAME}",
    "a" * 254,
]
PLAIN = ["a", "run-1", "0", "a.b-c.d", "x" * 63, "node-1.zone.example"]


@pytest.mark.parametrize("kind", [RUN, JOB, POD, SECRET, EVENT], ids=lambda kind: str(kind.plural))
@pytest.mark.parametrize("strange", STRANGE, ids=ascii)
def test_what_cannot_be_a_name_is_in_no_path(kind: Kind, strange: str) -> None:
    with pytest.raises(InvalidName, match="cannot be the name of a") as refused:
        kind.path("default", strange)
    assert "\n" not in str(refused.value)
    with pytest.raises(InvalidName, match="cannot be the name of a namespace"):
        kind.path(strange, "name")
    with pytest.raises(InvalidName, match="cannot be the name of a namespace"):
        kind.path(strange)


@pytest.mark.parametrize("name", PLAIN)
def test_a_name_is_in_its_path_as_it_is(name: str) -> None:
    assert RUN.path("default", name, "status") == f"/apis/cgd.dev/v1alpha1/namespaces/default/cgdruns/{name}/status"
    assert NODE.path(None, name) == f"/api/v1/nodes/{name}"
    assert CRD.path("ignored", name) == f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
    assert POD.path() == "/api/v1/pods"


def test_no_part_of_a_kind_reaches_beyond_its_place() -> None:
    path = Kind("g/v1", "K", "things/../secrets").path("default", "a", "x?y")
    assert path.count("/") == len(["apis", "g", "v1", "namespaces", "default", "things", "a", "x"])
    assert "?" not in path
    assert unquote(path).endswith("/things/../secrets/a/x?y")


@pytest.mark.parametrize("strange", ["a,b", "a=b", "a)", "a b", "a\n", "!a", "ä", "a" * 254])
def test_a_value_is_all_that_a_selector_takes(strange: str) -> None:
    with pytest.raises(InvalidName, match="a value in a selector"):
        equal("metadata.name", strange)
    with pytest.raises(InvalidName, match="a value in a selector"):
        one_of("cgd.dev/run-uid", ["a", strange])


def test_selectors_of_plain_values() -> None:
    assert equal("metadata.name", "a.b") == "metadata.name=a.b"
    assert one_of("cgd.dev/run-uid", ["a", "b"]) == "cgd.dev/run-uid in (a,b)"


async def test_a_name_that_cannot_be_is_never_asked_for(world: Any) -> None:  # noqa: F811
    since = len(world.embedded.requests) if world.is_embedded else 0
    for strange in STRANGE:
        with pytest.raises(InvalidName):
            await world.client.get(RUN, strange, "default")
        with pytest.raises(InvalidName):
            await world.client.patch(RUN, strange, "default", {})
        with pytest.raises(InvalidName):
            await world.client.delete(RUN, strange, "default")
        with pytest.raises(InvalidName):
            await world.client.log(strange, "default")
        with pytest.raises(InvalidName):
            await world.client.apply(RUN, {"metadata": {"name": strange, "namespace": "default"}})
    assert not world.is_embedded or list(world.embedded.requests)[since:] == []


def test_every_path_of_the_api_is_made_in_one_place() -> None:
    """No f-string holds a piece of such a path but in `Kind.path`, and no `Kind` is made of pieces of a path."""
    found: list[str] = []
    for file in sorted(OPERATOR.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts = [str(one.value) for one in node.values if isinstance(one, ast.Constant)]
                if any(piece in text for text in texts for piece in ("/namespaces/", "/apis/", "/api/")):
                    found.append(f"{file.name}:{node.lineno}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Kind":
                pieces = [one for arg in node.args[1:] for one in ast.walk(arg) if isinstance(one, ast.JoinedStr)]
                found += [f"{file.name}:{one.lineno}" for one in pieces]
    assert found == []


def test_every_selector_of_values_is_made_in_one_place() -> None:
    """An f-string that is given as a selector holds constants alone, or calls what checks its values."""
    found: list[str] = []
    for file in sorted(OPERATOR.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.keyword) and node.arg in ("labels", "fields")):
                continue
            for text in (one for one in ast.walk(node.value) if isinstance(one, ast.JoinedStr)):
                values = [one.value for one in text.values if isinstance(one, ast.FormattedValue)]
                bad = [one for one in values if not isinstance(one, ast.Name | ast.Call)]
                found += [f"{file.name}:{one.lineno}" for one in bad]
    assert found == []
