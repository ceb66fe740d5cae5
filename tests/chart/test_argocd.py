"""Argo CD's health of a CGDRun: the Lua that Argo CD would run, in the Lua that it runs it in (5.1)."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from lupa.lua51 import LuaRuntime
from support.status_builders import every_state

FOLDER = Path(__file__).parents[2] / "examples/gitops/argocd"
SCRIPT = (FOLDER / "health.lua").read_text()
CASES = yaml.safe_load((FOLDER / "health_test.yaml").read_text())["tests"]
STATES = every_state()


def health(run: dict[str, Any]) -> dict[str, str]:
    """What the script says of an object; it gets it as the global `obj` and has no other library than Argo CD's."""
    lua = LuaRuntime(unpack_returned_tuples=True, register_eval=False, register_builtins=False)
    for name in ("io", "debug", "package", "require", "dofile", "loadfile", "python"):
        lua.globals()[name] = None
    lua.globals()["obj"] = lua.table_from(run, recursive=True)
    return dict(lua.execute(SCRIPT))


def expected(name: str) -> str:
    match name.split():
        case ["succeeded"] | ["suspended", "after", *_]:
            return "Healthy"
        case ["suspended", *_]:
            return "Suspended"
        case ["failed" | "refused" | "cannot", *_] | ["has", "failed", *_]:
            return "Degraded"
    return "Progressing"


@pytest.mark.parametrize("case", CASES, ids=[case["inputPath"] for case in CASES])
def test_the_cases_that_come_with_the_script(case: dict[str, Any]) -> None:
    assert health(yaml.safe_load((FOLDER / case["inputPath"]).read_text())) == case["healthStatus"]


def test_every_case_of_the_folder_is_run() -> None:
    assert {case["inputPath"] for case in CASES} == {f"testdata/{one.name}" for one in FOLDER.glob("testdata/*.yaml")}


@pytest.mark.parametrize("name", STATES)
def test_every_state_of_a_run_has_its_health(name: str) -> None:
    told = health(STATES[name])
    assert told["status"] == expected(name)
    assert told["message"].strip()


def test_a_failure_is_told_in_full() -> None:
    assert health(STATES["failed stage"])["message"].endswith("exit code 3: no such bucket. create it")


def test_a_run_that_never_had_a_status_waits() -> None:
    assert health({"metadata": {"generation": 1}})["status"] == "Progressing"
