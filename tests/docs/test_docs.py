"""The documentation says nothing that is not there: links, files, commands, rooms, manifests."""

import re
import tomllib
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import grimp
import pytest
import yaml

from cgd_cli.drafting import validate
from cgd_operator.api.spec import parse_spec
from cgd_stages.contract import Objective

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    ROOT / "images/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
WRITE = (ROOT / "docs/write-a-run.md").read_text()
MADE = {"images/base.txt"}
"""What a command makes."""
OBJECTIVES = sorted((ROOT / "examples/objectives").glob("*.yaml"))
RUNS = [
    path
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    if "gitops" not in path.parts and "\nkind: CGDRun\n" in path.read_text()
]
"""The examples that are whole manifests; those of GitOps are built first, and tested with the chart."""
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(text: str, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in fences if name == language]


@PAGE
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@PAGE
def test_every_file_that_is_named_is_there(page: Path) -> None:
    named = set(re.findall(r"`((?:images|operator|tests|charts|crds|examples|findings)/[\w./-]*)`", page.read_text()))
    assert [name for name in named - MADE if not (ROOT / name).exists()] == []


@PAGE
def test_every_command_of_make_that_is_named_is_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:`|^    )make ([a-z]+(?:-[a-z]+)*)", page.read_text(), re.MULTILINE)
    assert set(named) - targets == set()


@PAGE
def test_every_picture_is_small(page: Path) -> None:
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text()):
        assert (page.parent / picture).stat().st_size < 300_000, picture


@pytest.mark.parametrize("page", ["README.md", "docs/write-a-run.md"])
def test_every_manifest_of_a_page_is_valid(page: str, tmp_path: Path) -> None:
    runs = [block for block in blocks((ROOT / page).read_text(), "yaml") if "kind: CGDRun" in block]
    assert runs
    for run in runs:
        (tmp_path / "run.yaml").write_text(run)
        validate(tmp_path / "run.yaml")


def test_every_part_of_a_manifest_is_valid_in_a_run() -> None:
    run = yaml.safe_load((ROOT / "examples/objectives/cgd.yaml").read_text())
    parts = [yaml.safe_load(block) for block in blocks(WRITE, "yaml") if "kind: CGDRun" not in block]
    assert len(parts) >= 3
    for part in parts:
        parse_spec(run | {"spec": run["spec"] | part})


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_the_manifest_of_an_example_is_valid(path: Path) -> None:
    validate(path)


def test_each_objective_has_a_manifest_of_its_own() -> None:
    trained = [objective for path in OBJECTIVES for objective in objectives_of(path)]
    assert sorted(trained) == sorted(get_args(Objective))


def test_the_page_shows_the_manifest_of_cgd_as_it_is() -> None:
    (shown,) = (block for block in blocks(WRITE, "yaml") if "kind: CGDRun" in block)
    assert (ROOT / "examples/objectives/cgd.yaml").read_text().partition("\n")[2] == shown


@pytest.mark.parametrize(("package", "heading"), [("cgd_stages", "of the stages"), ("cgd_operator", "of the operator")])
def test_the_floors_are_those_that_the_linter_holds(package: str, heading: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("containers") == [package])
    section = (ROOT / "docs/architecture.md").read_text().partition(f"### Rooms {heading}")[2].partition("\n##")[0]
    floors = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| \d+ \| ([^|]+) \|", section, re.MULTILINE)]
    assert [sorted(floor) for floor in floors] == [sorted(layer.split(" | ")) for layer in layers]


@pytest.mark.parametrize("package", ["cgd_stages", "cgd_operator"])
def test_every_arrow_is_an_import_and_every_import_follows_from_arrows(package: str) -> None:
    (picture,) = (
        block
        for block in blocks((ROOT / "docs/architecture.md").read_text(), "mermaid")
        if ("prepare" in block) == (package == "cgd_stages")
    )
    drawn = set(arrows(picture.replace('main["__main__"]', "__main__").replace('["cgd_stages.contract"]', "")))
    imported = imports_of(package)
    assert drawn - imported == set()
    assert imported - followed(drawn) == set()


def arrows(picture: str) -> Iterator[tuple[str, str]]:
    """Of lines such as `a & b --> c --> d`."""
    for line in picture.splitlines()[1:]:
        steps = [re.findall(r"\w+", step) for step in line.split("-->")]
        for above, below in pairwise(steps):
            yield from product(above, below)


def imports_of(package: str) -> set[tuple[str, str]]:
    """Which room of the package imports which; of other packages only the contract counts."""
    graph = grimp.build_graph(*{package, "cgd_stages"}, cache_dir=None)
    rooms = graph.find_children(package) | {"cgd_stages.contract"}
    for room in rooms:
        graph.squash_module(room)
    return {
        (room.rpartition(".")[2], below.rpartition(".")[2])
        for room in rooms
        for below in graph.find_modules_directly_imported_by(room) & rooms - {room}
    }


def followed(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows, and those that follow from them."""
    more = {(above, last) for above, below in arrows for first, last in arrows if below == first} | arrows
    return more if more == arrows else followed(more)


def test_the_readme_draws_the_rooms_that_are_there() -> None:
    (house,) = (block for block in blocks((ROOT / "README.md").read_text(), "") if "cgd_stages/" in block)
    source, package = Path(), Path()
    for line in house.splitlines():
        name, text = line.strip().partition(" ")[::2]
        match len(line) - len(line.lstrip()):
            case 0:
                source = ROOT / name.partition("/")[0]
            case 2:
                package = source / name
            case 4:
                assert (package / name).exists(), line
                for module in re.findall(r"[\w.]+", " ".join(re.findall(r"\(([\w., ]+)\)", text))):
                    there = package / name / module
                    assert there.exists() or there.with_suffix(".py").exists(), f"{name}{module}"
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors = [floor for contract in linter["contracts"] for floor in contract.get("layers", ())]
    rooms = {room for floor in floors for room in floor.split(" | ")} - {"__main__"}
    assert {room for room in rooms if not re.search(rf"^    {room}(/|\.py) ", house, re.MULTILINE)} == set()


def objectives_of(path: Path) -> list[str]:
    run: dict[str, Any] = yaml.safe_load(path.read_text())
    return [str(objective) for objective in run["spec"]["training"]["objectives"]]
