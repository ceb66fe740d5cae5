"""What is installed is what was looked at: hashes of packages, digests of images, pinned actions."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))
DOCKERFILES = sorted((ROOT / "images").glob("*/Dockerfile"))
UNHASHED = "torch.txt"
"""Of the one package whose file differs by where it is from."""
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_]+)((?: --hash=sha256:[0-9a-f]{64})*)")
DIGEST = f"sha256:{'5a' * 32}"


def requirements(path: Path) -> list[str]:
    """Each on one line, without comments."""
    lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
    return [" ".join(one.split()) for one in "\n".join(lines).replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.name)
def test_each_package_has_one_version_and_its_hashes(path: Path) -> None:
    found = requirements(path)
    assert found
    for one in found:
        matched = REQUIREMENT.fullmatch(one)
        assert matched, one
        assert bool(matched[3]) is (path.name != UNHASHED), one
    if path.name == UNHASHED:
        assert [REQUIREMENT.fullmatch(one)[1] for one in found] == ["torch"]  # type: ignore[index]


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.name)
def test_no_file_says_where_packages_are_from(path: Path) -> None:
    assert "://" not in path.read_text()
    assert not re.search(r"^\s*(-|--)(index|extra-index|find-links|trusted|i |f )", path.read_text(), re.MULTILINE)


def installs() -> Iterator[tuple[str, str]]:
    """Every command that installs a list of packages, and the file that has it."""
    for path in (ROOT / "Makefile", *DOCKERFILES, ROOT / ".ci/run"):
        for line in path.read_text().splitlines():
            if "pip" in line and re.search(r" install .*-r ", line):
                yield path.name, line.strip()


def test_every_list_is_installed_with_its_hashes_checked() -> None:
    found = list(installs())
    assert {name for name, _ in found} == {"Makefile", *(path.name for path in DOCKERFILES)}
    without = [line for _, line in found if "--require-hashes" not in line]
    assert [line.split()[-1] for line in without] == [f"constraints/{UNHASHED}"]


def test_what_the_images_install_beside_is_the_projects_own_wheel_and_from_no_index() -> None:
    for path in DOCKERFILES:
        (line,) = (
            line for line in path.read_text().splitlines() if line.rstrip(" \\").endswith("*.whl") and "pip" in line
        )
        assert "--no-index" in line
        assert "--no-deps" in line


def test_the_installer_itself_is_checked() -> None:
    """`make` takes it from the same file, by the rule that this test reads."""
    (rule,) = re.findall(r"sed -n '(/\^uv.*)' constraints/local.txt", (ROOT / "Makefile").read_text())
    command = ["sed", "-n", rule.replace("$$", "$"), ROOT / "constraints/local.txt"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (one,) = " ".join(text.replace("\\\n", " ").split()).split("  ")
    assert REQUIREMENT.fullmatch(one)
    assert one.startswith("uv==")


def wheel(folder: Path) -> tuple[Path, str]:
    """A package of our own, and its hash."""
    folder.mkdir()
    path = folder / "cgd_trial-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cgd_trial.py", "")
        archive.writestr("cgd_trial-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: cgd-trial\nVersion: 1.0\n")
        archive.writestr(
            "cgd_trial-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("cgd_trial-1.0.dist-info/RECORD", "")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("tool", ["uv", "pip"])
@pytest.mark.parametrize("change", ["", "another file", "no hash"])
def test_another_file_under_the_same_name_and_version_is_refused(tool: str, change: str, tmp_path: Path) -> None:
    """As `make` installs, by uv, and the images' build, by pip."""
    path, digest = wheel(tmp_path / "wheels")
    if change == "another file":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("more.py", "")
    line = "cgd-trial==1.0" if change == "no hash" else f"cgd-trial==1.0 --hash=sha256:{digest}"
    (tmp_path / "list.txt").write_text(line)
    programs = {"uv": [Path(sys.executable).with_name("uv"), "pip"], "pip": [sys.executable, "-m", "pip"]}
    where = ["--no-index", "--find-links", path.parent, "--target", tmp_path / "out"]
    options = ["--no-deps", "--require-hashes", "-r", tmp_path / "list.txt"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    clean |= {"UV_CACHE_DIR": str(tmp_path / "cache"), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run([*programs[tool], "install", *where, *options], env=clean, capture_output=True, text=True)
    assert (done.returncode == 0) is (change == ""), done.stderr
    assert (tmp_path / "out/cgd_trial.py").exists() is (change == "")


# --- images


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that make reads, in a folder of their own."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("images", "operator", ".venv"):
        (tmp_path / name).mkdir()
    for name in ("constraints", "pyproject.toml", "operator/pyproject.toml", "images/pyproject.toml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/ready").touch()
    return tmp_path


def make(folder: Path, *words: str, code: int = 0) -> str:
    clean = {
        key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "BASE_IMAGE", "DIGEST")
    }
    done = subprocess.run(["make", *words], cwd=folder, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_a_pinned_base_is_what_every_image_is_built_on(copy: Path) -> None:
    make(copy, "pin-base", f"DIGEST=echo {DIGEST}")
    assert (copy / "images/base.txt").read_text() == f"docker.io/library/debian:trixie-slim@{DIGEST}\n"
    built = make(copy, "-n", "images")
    assert f"docker build --build-arg BASE=docker.io/library/debian:trixie-slim@{DIGEST} -f" in built


@pytest.mark.parametrize("answer", ["echo latest", "echo sha256:12", "false", "true", f"echo {DIGEST}0"])
def test_what_is_no_digest_is_not_written_down(copy: Path, answer: str) -> None:
    assert "must print sha256:" in make(copy, "pin-base", f"DIGEST={answer}", code=2)
    assert not (copy / "images/base.txt").exists()


def test_no_digest_is_made_up() -> None:
    """Where one stands in the repository, `make pin-base` has written it."""
    for path in (*DOCKERFILES, ROOT / "Makefile"):
        assert "@sha256" not in path.read_text()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_stands_on_the_given_base_alone_and_says_which(path: Path) -> None:
    text = path.read_text()
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BASE}"}
    assert 'org.opencontainers.image.base.name="${BASE}"' in text


# --- the release


def workflows() -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))]


def steps() -> Iterator[dict[str, Any]]:
    return (step for workflow in workflows() for job in workflow["jobs"].values() for step in job["steps"])


def test_every_action_is_pinned_to_a_commit() -> None:
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used
    assert [one for one in used if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", one)] == []


def test_a_release_may_read_the_repository_and_nothing_else() -> None:
    assert [workflow["permissions"] for workflow in workflows()] == [{"contents": "read"}]


def test_nothing_is_pushed_before_it_was_listed_and_scanned() -> None:
    (workflow,) = workflows()
    assert workflow["jobs"]["image"]["needs"] == "base"
    done = [step.get("uses", step.get("run", "")) for step in workflow["jobs"]["image"]["steps"]]
    order = [
        next(index for index, one in enumerate(done) if word in one) for word in ("make images", "sbom", "scan", "push")
    ]
    assert order == sorted(order)
    assert workflow["jobs"]["image"]["env"]["BASE_IMAGE"] == "${{ needs.base.outputs.base }}"


def test_what_is_pushed_is_signed_by_digest_without_a_key() -> None:
    (workflow,) = workflows()
    for name, pushes in (("image", "docker push"), ("chart", "helm push")):
        job = workflow["jobs"][name]
        done = " ".join(step.get("uses", step.get("run", "")) for step in job["steps"])
        assert done.index(pushes) < done.index("cosign sign --yes"), name
        assert job["permissions"]["id-token"] == "write"
        assert "--key" not in done
    assert workflow["jobs"]["chart"]["needs"] == "image"


def test_every_make_target_of_the_release_is_there() -> None:
    asked = {word for step in steps() for word in re.findall(r"^make (\S+)", step.get("run", ""), re.MULTILINE)}
    assert asked == {"pin-base", "images", "dist"}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert asked <= set(targets)


def test_scripts_take_nothing_of_the_event_as_code() -> None:
    """An expression within a script would be replaced before the shell reads it."""
    assert [step["run"] for step in steps() if "${{" in step.get("run", "")] == []
