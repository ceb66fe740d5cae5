"""What was written elsewhere is shown as text: no markup is read from it, and no terminal or log obeys it."""

import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from hypothesis import given
from rich.console import RenderableType
from support.builders import SPEC, definition, manifest, run
from support.report_builders import RUN, report_data, samples
from support.stage_builders import generate_work, task
from support.strings import STRANGE, halves

from cgd_cli.comparison import joined_reports, shown
from cgd_cli.data import row_panel
from cgd_cli.estimate import Assumptions
from cgd_cli.price import price_table
from cgd_cli.sizes import GPUS
from cgd_cli.table import table
from cgd_cli.terminal import Terminal, panel, plain
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import POD
from cgd_operator.kube.kinds import RUN as KIND
from cgd_operator.planning.manifests import STAGE_LABEL, UID_LABEL
from cgd_stages.contract import Storage
from cgd_stages.errors import UserError
from cgd_stages.models.fit import Misfit
from cgd_stages.report.__main__ import to_json
from cgd_stages.text.printable import JsonFormatter, LogFormatter, printable

HOSTILE = "[/INST] [red]x\x1b]0;title\x07\x1b[2J\x9b31m\r\b\u202eabc\u2028\ud83d"
"""Ends a markup that was never begun, sets a title, clears the screen, turns letters round, and is half a character."""
SHOWN = r"[/INST] [red]x\x1b]0;title\x07\x1b[2J\x9b31m\r\x08\u202eabc\u2028\ud83d"
OURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\r\x1b\[2K(\x1b\[1A\x1b\[2K)*")
"""What Rich writes for a terminal: styles, the cursor that it hides and shows, and lines that it writes anew."""
OBEYED = {"Cc", "Cs", "Zl", "Zp"}
TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def is_obeyed(letter: str, allowed: str = "") -> bool:
    """By Unicode's own tables: control characters, line ends, halves, and what turns the direction of letters."""
    if letter in allowed:
        return False
    marks = letter in "\u061c\u200e\u200f"
    return unicodedata.category(letter) in OBEYED or unicodedata.bidirectional(letter) in TURNING or marks


def assert_harmless(output: str, allowed: str = "\n") -> None:
    assert [letter for letter in OURS.sub("", output) if is_obeyed(letter, allowed)] == []


def drawn(*renderables: RenderableType, width: int = 200) -> str:
    """What a terminal with colours is given."""
    file = io.StringIO()
    terminal = Terminal(file=file, force_terminal=True, color_system="truecolor", width=width)
    terminal.print(*renderables, sep="\n")
    return file.getvalue()


def words_of(output: str) -> str:
    return " ".join(OURS.sub("", output).split())


# --- the function


def test_every_character_that_a_terminal_obeys_is_shown_and_every_letter_stays() -> None:
    every = [chr(code) for code in range(sys.maxunicode + 1)]
    assert [letter for letter in every if is_obeyed(letter) and printable(letter) == letter] == []
    letters = [one for one in every if unicodedata.category(one)[0] in "LMNPS" or one in " \xa0\u202f\u200c\u200d"]
    assert printable("".join(letters)) == "".join(letters)


@given(halves)
def test_any_text_becomes_one_harmless_line(text: str) -> None:
    line, lines = printable(text), printable(text, lines=True)
    assert_harmless(line, allowed="")
    assert_harmless(lines, allowed="\t\n")
    assert printable(lines) == line == printable(line)
    line.encode()


# --- what the commands draw


def hostile_run(text: str) -> Any:
    stage = {"name": text, "state": text, "reason": text, "message": text, "rows": {"total": 2, "done": 1}}
    condition = {"type": "Succeeded", "status": "False", "reason": "StageFailed", "message": text}
    return manifest() | {"status": {"state": text, "stage": text, "stages": [stage], "conditions": [condition]}}


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        ({"startTime": "2026-01-01T00:00:00Z", "completionTime": "2026-01-01T00:01:00Z"}, "60s"),
        ({"startTime": "2026-01-01T00:00:00", "completionTime": "soon"}, ""),
        ({"startTime": "soon"}, ""),
        ({"startTime": "2026-13-01T00:00:00Z"}, ""),
        ({"startTime": "0001-01-01T00:00:00+14:00"}, ""),
        ({"startTime": 5, "completionTime": ["x"]}, ""),
        ({"startTime": "2026-01-01T00:00:00Z", "completionTime": "9999-12-31T23:59:59-12:00"}, ""),
    ],
    ids=["times", "no zone", "word", "month", "before all time", "no text", "after all time"],
)
def test_times_that_are_none_leave_the_table_whole(times: dict[str, Any], shown: str) -> None:
    stages = [{"name": "prepare", **times}, {"name": "answer", "state": "Running"}]
    output = drawn(table(manifest() | {"status": {"state": "Running", "stages": stages}}), width=200)
    lines = OURS.sub("", output).splitlines()
    assert lines[-2].split()[:2] == ["prepare", "Pending"]
    assert lines[-2].split()[-1] == shown or not shown
    assert lines[-1].split()[:2] == ["answer", "Running"]


@pytest.mark.parametrize("data", [b"[" * 100_000, b"[]", b"\xff", b"9" * 5000, b'{"run": {}, "table": []}'])
def test_a_report_that_is_none_is_told_of_by_its_name(data: bytes) -> None:
    with pytest.raises(UserError, match=r"x\.json: the report has no table"):
        joined_reports({"x.json": data})


def hostile_row(text: str) -> Any:
    texts = ("prompt", "reference", "answer", "critique", "refinement", "distilled", "verdict")
    return dict.fromkeys(texts, text) | {"id": text, "sample": 0}


def hostile_reports(text: str) -> Any:
    data = report_data(
        run=RUN.model_copy(update={"name": text}),
        evaluations={
            "base": samples("+---", benchmark=text),
            "cgd": samples("++--", benchmark=text),
            text: samples("+++-", benchmark=text),
        },
    )
    return {source: to_json(data) for source in ("one.json", text)}


def hostile_price(text: str) -> RenderableType:
    this = run({"evaluation.tasks": [{"name": "own", "metric": "acc"}]})
    assumed = Assumptions(rows=10, student=8e9, teacher=8e9, gpu=GPUS["l40s"])
    return price_table(this, assumed, text, [Misfit(text, text)])


@pytest.mark.parametrize("text", [HOSTILE, *STRANGE])
def test_tables_show_texts_as_they_are(text: str) -> None:
    for shape in (table(hostile_run(text)), plain(text), text, panel(plain(text), text)):
        output = drawn(shape, width=3000)
        assert_harmless(output)
        assert words_of(printable(text)) in words_of(output)


@given(halves)
def test_any_text_is_drawn_harmlessly(text: str) -> None:
    assert_harmless(drawn(text, plain(text, lines=True), panel(plain(text, lines=True), text)))


def test_a_row_is_shown_as_it_is_with_its_lines() -> None:
    output = drawn(row_panel(hostile_row(f"first\n\t{HOSTILE}")))
    assert_harmless(output)
    assert words_of(output).count(SHOWN) == 8
    assert output.count("first") == 8


def test_a_comparison_shows_names_as_they_are() -> None:
    strange = HOSTILE.removesuffix("\ud83d")  # a report is UTF-8
    output = drawn(*shown(joined_reports(hostile_reports(strange))))
    assert_harmless(output)
    assert "[/INST]" in words_of(output)


def test_an_estimate_shows_texts_as_they_are() -> None:
    output = drawn(hostile_price(HOSTILE))
    assert_harmless(output)
    assert words_of(output).count("[/INST]") == 3


def test_a_message_forges_no_line_of_the_table() -> None:
    output = drawn(table(hostile_run("x\n  prepare  Succeeded")), width=3000)
    assert not any(line.strip().startswith("prepare") for line in OURS.sub("", output).splitlines())


# --- the commands, as processes


async def cgd(*words: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors, in colours."""
    env = {**os.environ, "COLUMNS": "400", "FORCE_COLOR": "1", **environment}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cgd_cli", *words,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


WHOLE = HOSTILE.removesuffix("\ud83d")
"""What can be sent in JSON that others read."""


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiServer]:
    """An API server with the run `demo`, whose status, pods and logs are hostile."""
    server = ApiServer()
    await server.start()
    (tmp_path / "kubeconfig").write_text(server.kubeconfig())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    async with await Cluster.connect(manager="test") as client:
        await install(client, definition())
        body = hostile_run(WHOLE)
        del body["metadata"]["uid"], body["metadata"]["generation"]
        made = await client.create(KIND, body)
        status = body["status"]
        status["stages"][0] |= {"name": "answer", "state": "Failed", "child": "demo-answer"}
        status["conditions"][0] |= {"lastTransitionTime": "2026-01-01T00:00:00Z"}
        status |= {"state": "Failed", "stage": "answer"}
        await client.patch(KIND, "demo", "default", {"status": status}, subresource="status")
        labels = {UID_LABEL: made["metadata"]["uid"], STAGE_LABEL: "answer"}
        spec = {"containers": [{"name": "stage", "image": "image"}]}
        pod = {"metadata": {"name": "demo-answer-0", "namespace": "default", "labels": labels}, "spec": spec}
        await client.create(POD, pod)
    server.fault = lambda request: web.Response(text=f"one\n{WHOLE}\n") if request.path.endswith("/log") else None
    yield server
    await server.stop()


async def test_what_a_cluster_tells_is_shown_as_it_is(api: ApiServer) -> None:
    for command, failed in (("status", 0), ("watch", 1), ("logs", 0)):
        code, out, err = await cgd(command, "demo")
        assert (code, err) == (failed, ""), command
        assert_harmless(out)
        assert SHOWN.removesuffix(r"\ud83d") in words_of(out), command
    refusal = {"kind": "Status", "code": 403, "reason": WHOLE, "message": WHOLE}
    api.fault = lambda _: web.json_response(refusal, status=403)
    code, out, err = await cgd("status", "demo")
    assert (code, out) == (1, "")
    assert_harmless(err)
    assert "[/INST]" in err


async def test_a_manifest_is_refused_and_rendered_as_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    spec = {**SPEC, WHOLE: 1}
    path.write_text(yaml.safe_dump(manifest() | {"spec": spec}))
    code, out, err = await cgd("validate", str(path))
    assert (code, out) == (1, "")
    assert_harmless(err)
    assert "[/INST]" in err
    benchmark = SPEC["evaluation"]["benchmarks"][0] | {"instruction": WHOLE}
    spec = {**SPEC, "evaluation": {"benchmarks": [benchmark]}}
    path.write_text(yaml.safe_dump(manifest() | {"spec": spec}))
    code, out, err = await cgd("render", str(path))
    assert (code, err) == (0, "")
    assert_harmless(out)
    read = list(yaml.safe_load_all(out))
    assert "[/INST]" in json.dumps(read)


# --- logs


def formatted(style: str, message: str, *arguments: Any, error: Exception | None = None) -> str:
    info = (type(error), error, None) if error else None
    record = logging.LogRecord("cgd", logging.ERROR, __file__, 1, message, arguments, info)
    return LogFormatter(style).format(record)


@given(halves)
def test_no_text_forges_a_line_of_a_log(text: str) -> None:
    style = "%(levelname)s %(name)s %(message)s"
    assert formatted(style, "run %s", text) == f"ERROR cgd run {printable(text)}"
    first, *others = formatted(style, "run", error=ValueError(text)).split("\n")
    assert first == "ERROR cgd run"
    assert all(line.startswith("    | ") for line in others)
    assert_harmless("".join((first, *others)), allowed="\t")


TASK = task(Storage(uri="s3://data/x", endpoint="http://127.0.0.1:1"), generate_work("/m", "answer")).to_json()
FORGED = "\n12:00:00 INFO forged\x1b[2J"


def output_of(*words: str, **environment: str) -> str:
    """Of a module that fails, its errors."""
    env = {**os.environ, **environment}
    process = subprocess.run([sys.executable, "-m", *words], env=env, capture_output=True, text=True, check=False)
    assert process.returncode
    return process.stderr


@pytest.mark.parametrize("wrong", [json.dumps({FORGED: 1}), None], ids=["refused", "unexpected"])
def test_a_stage_program_logs_what_fails_as_text(tmp_path: Path, wrong: str | None) -> None:
    """Without a task, the shard is no number."""
    given = {"CGD_TASK": wrong or TASK, "JOB_COMPLETION_INDEX": FORGED, "CGD_SCRATCH": str(tmp_path)}
    log = output_of("cgd_stages.report", CGD_TERMINATION_LOG=str(tmp_path / "words"), **given)
    assert_harmless(log)
    assert r"forged\x1b[2J" in log
    assert not any(line.startswith("12:00:00") for line in log.splitlines())
    assert ("    | Traceback" in log) == (wrong is None)


def test_an_error_that_nobody_has_caught_is_told_as_text(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(
        "import warnings\nfrom cgd_stages.text.printable import start_log\nstart_log('%(message)s')\n"
        f"warnings.warn({FORGED!r})\nraise ValueError({FORGED!r})\n"
    )
    log = output_of("fails", PYTHONPATH=str(tmp_path))
    assert_harmless(log)
    assert log.count("forged\\x1b[2J") == 4  # both, each with the line of its source
    assert not any(line.startswith("12:00:00") for line in log.splitlines())


async def test_the_operator_tells_what_ends_it_as_text(api: ApiServer) -> None:
    refusal = {"kind": "Status", "code": 403, "reason": "Forbidden", "message": FORGED}
    api.fault = lambda _: web.json_response(refusal, status=403)
    told = await asyncio.to_thread(output_of, "cgd_operator", CGD_PROGRESS_BIND="127.0.0.1:0")
    assert_harmless(told)
    assert r"\n12:00:00 INFO forged\x1b[2J" in told


def test_a_record_as_json_is_one_line_of_ascii_that_reads_back() -> None:
    record = logging.LogRecord("cgd", logging.ERROR, "", 0, "stage %s\n\x1b[2J", ("\u202eabc",), None)
    record.exc_info = (ValueError, ValueError("one\ntwo"), None)
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert "\n" not in line
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"]) == ("ERROR", "cgd", "stage \u202eabc\n\x1b[2J")
    assert "one\ntwo" in told["error"]
