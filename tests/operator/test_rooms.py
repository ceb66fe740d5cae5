"""What is pure loads no client: neither when it is read nor when it is changed does one need a cluster or a store."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = [
    "images/cgd_stages/method",
    "images/cgd_stages/chat",
    "images/cgd_stages/results",
    "operator/cgd_operator/planning",
    "operator/cgd_operator/facts",
    "operator/cgd_operator/status",
]
CLIENTS = ("aiohttp", "boto3", "botocore", "kopf", "kubernetes", "multiprocessing.pool", "requests", "torch", "vllm")


@pytest.mark.parametrize("room", PURE)
def test_a_pure_room_loads_no_client(room: str) -> None:
    folder = ROOT / room
    package = f"{folder.parent.name}.{folder.name}"
    modules = [f"{package}.{file.stem}" for file in folder.glob("*.py") if file.stem != "__init__"]
    assert modules
    script = f"import sys, {', '.join(modules)}\nprint(*(one for one in {CLIENTS} if one in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []


def test_the_operator_s_process_loads_the_asynchronous_client_alone() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "cgd_operator", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    loaded = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    assert "kubernetes.aio.config.kube_config" in loaded
    assert loaded.isdisjoint({"requests", "websocket", "kubernetes.config", "kubernetes.dynamic"})


@pytest.mark.parametrize(
    "program",
    ["prepare", "fetch", "generate", "rollout", "score", "check", "train", "evaluate", "harness", "report", "clean"],
)
def test_every_program_is_a_folder_of_its_own(program: str) -> None:
    assert (ROOT / "images/cgd_stages" / program / "__main__.py").exists()
