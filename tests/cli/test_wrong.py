"""Wrong invocations of every command: each ends in words that say what to change, and none in a traceback."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cgd_cli.__main__ import app
from cgd_cli.errors import in_words

ROOT = Path(__file__).parents[2]
RUN = str(ROOT / "examples/clouds/aws.yaml")
ON_NAMES = ("status", "suspend", "resume", "retry", "watch", "logs", "rows", "report", "pull", "serve", "compare")
WITHOUT_CLUSTER = "KUBECONFIG names"

WRONG = [
    *(("Missing argument", [word]) for word in ("validate", "render", "plan", *ON_NAMES)),
    *(("No such option", [word, "demo", "--no-such-option"]) for word in ON_NAMES),
    *((WITHOUT_CLUSTER, [word, "demo"]) for word in ON_NAMES),
    *((WITHOUT_CLUSTER, [word]) for word in ("list", "ui")),
    *(("cannot be read", [word, "nowhere.yaml"]) for word in ("validate", "render", "plan")),
    *(("cannot be read", [word, str(ROOT)]) for word in ("validate", "render", "plan")),
    ("No such command", ["valdiate", RUN]),
    ("No such command", ["get"]),
    ("No such option", ["--versoin"]),
    ("exclude each other", ["list", "-A", "-n", "x"]),
    ("exclude each other", ["ui", "-A", "-n", "x"]),
    ("exclude each other", ["logs", "demo", "-f", "--stored"]),
    ("less than or equal to 65535", ["ui", "--port", "70000"]),
    ("greater than or equal to 1", ["serve", "demo", "--port", "0"]),
    ("valid integer", ["ui", "--port", "http"]),
    ("greater than or equal to 1", ["rows", "demo", "-c", "0"]),
    ("valid integer", ["rows", "demo", "-c", "many"]),
    ("ends in .html or .json", ["report", "demo", "-o", "x.pdf"]),
    ("there is no file", ["compare", "report.json"]),
    ("must be one of", ["plan", RUN, "--gpu", "a100"]),
    ("greater than or equal to 1", ["plan", RUN, "--rows", "0"]),
    ("should be a valid number", ["plan", RUN, "--gpu-hour", "2,5"]),
    ("names no number of parameters", ["plan", RUN, "--student-params", "large"]),
    ("asks for no GPU", ["plan", str(ROOT / "examples/quickstart.yaml")]),
    ("has no evaluation.published", ["validate", RUN, "--published", "figures.json"]),
    ("exists: name another file", ["init", "-y", "-o", RUN]),
    ("nowhere/run.yaml cannot be written", ["init", "-y", "-o", "nowhere/run.yaml"]),
    ("cannot be read", ["init", "-y", "-o", "-", "--from", "nowhere.yaml"]),
    (WITHOUT_CLUSTER, ["init", "-y", "-o", "-", "--from", "demo"]),
    ("the input has ended", ["init", "-o", "-"]),
    ("--limit many: spec.prompts.limit", ["init", "-y", "-o", "-", "--limit", "many"]),
    ("--limit 0: spec.prompts.limit", ["init", "-y", "-o", "-", "--limit", "0"]),
    ("Is MATH-500 meant?", ["init", "-y", "-o", "-", "--benchmarks", "MATH500"]),
    ("Is MATH-500 meant?", ["init", "-y", "-o", "-", "--benchmarks", "GSM8K,math-500"]),
    ("--name Llama_8B: metadata.name", ["init", "-y", "-o", "-", "--name", "Llama_8B"]),
    ("a blank and the name of its model", ["init", "-y", "-o", "-", "--teacher", "https://r1.example.com/v1"]),
    ("--objectives cgd: ", ["init", "-y", "-o", "-", "--objectives", "cgd"]),
    ("--objectives CGD,none: ", ["init", "-y", "-o", "-", "--objectives", "CGD,none"]),
    ("set prompts.fields.reference", ["init", "-y", "-o", "-", "--objectives", "SFT"]),
    ("--prompts /data/x.jsonl: ", ["init", "-y", "-o", "-", "--prompts", "/data/x.jsonl"]),
    ("--storage /data: ", ["init", "-y", "-o", "-", "--storage", "/data"]),
    ("--storage none: ", ["init", "-y", "-o", "-", "--storage", "none"]),
    ("--gpus -1: ", ["init", "-y", "-o", "-", "--gpus=-1"]),
]


def told(words: list[str]) -> str:
    """What the user is told; the traceback's place is a failure of the test."""
    done = CliRunner().invoke(app, words, input="")
    assert done.exit_code != 0, done.output
    if isinstance(done.exception, SystemExit):
        return done.output
    assert isinstance(done.exception, Exception)
    said = in_words(done.exception)
    assert said is not None, repr(done.exception)
    return said


@pytest.mark.parametrize(("right", "words"), WRONG, ids=lambda one: " ".join(one) if isinstance(one, list) else "")
def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, right: str, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    said = " ".join(told(words).split())
    assert right in said, said
    assert list(tmp_path.iterdir()) == []
