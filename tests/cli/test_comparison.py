"""`cgd compare` over reports in files, as a process and in its parts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.report_builders import RUN, report_data, samples, stage
from typer.testing import CliRunner

from cgd_cli.__main__ import Wrong, app
from cgd_cli.comparison import joined_reports, report_table, shown
from cgd_cli.terminal import Terminal
from cgd_stages.errors import UserError
from cgd_stages.report.__main__ import to_json


def report(
    name: str, *, rate: float | None = None, after: str = "+-+++---", base: str = "++------", **training: Any
) -> bytes:
    critique = {"kind": "matched"} if rate is None else {"kind": "corrupted", "rate": rate}
    return to_json(
        report_data(
            run=RUN.model_copy(update={"name": name}),
            stages=(stage("train-cgd", inputs={"critique": critique, "training": training}),),
            evaluations={"base": samples(base), "cgd": samples(after)},
        )
    )


def told(reports: dict[str, bytes]) -> str:
    console = Terminal(width=120, no_color=True)
    with console.capture() as capture:
        console.print(*shown(joined_reports(reports)), sep="\n")
    return " ".join(capture.get().replace("\u202f", " ").split())


def test_runs_are_compared_in_one_table_with_their_curve() -> None:
    words = told({"a.json": report("clean"), "b.json": report("noisy", rate=0.5, after="+-------")})
    assert "model run n = 8" in words
    assert "base clean, noisy 25.0 %" in words
    assert "CGD clean * 50.0 %" in words
    assert "+25.0 noise" in words
    assert "CGD (50 % of critiques corrupted) noisy 12.5 %" in words
    assert "CGD over the share of wrong critiques" in words
    assert "opposite verdict 0.0 % 0.0 % 50.0 % 21.5 - 78.5 clean" in words


def test_runs_that_differ_in_their_seed_alone_are_taken_together() -> None:
    words = told({"a.json": report("one", seed=1), "b.json": report("two", seed=2, after="+" * 8)})
    assert (
        "Over seeds: mean accuracy and standard deviation, in % model runs sums CGD one, two 75.0 \u00b1 35.4" in words
    )
    assert "Over seeds" not in told({"a.json": report("one", seed=1, epochs=1), "b.json": report("two", seed=2)})


def test_models_of_different_runs_are_compared_question_by_question() -> None:
    words = told({"a.json": report("slow", epochs=1, after="+" * 8), "b.json": report("fast", epochs=2, after="-" * 8)})
    assert "CGD (slow) beats CGD (fast) by 100.0 points on sums (95 % " in words
    assert "8 questions in pairs, 8 for CGD (slow) and 0 for CGD (fast): exact McNemar test p = 0.008." in words
    assert "Trained models against each other pair sums CGD (slow) +100.0 better minus CGD (fast) +" in words
    assert "p = 0.008 n = 8" in words


def test_models_that_cannot_be_told_apart_are_shown_with_what_would_have_shown() -> None:
    words = told({"a.json": report("slow", epochs=1), "b.json": report("fast", epochs=2)})
    assert "CGD (slow) and CGD (fast) cannot be told apart with 8 questions on sums" in words
    assert "\u00b10.0 noise" in words
    assert words.count("would have shown") == 2


def test_a_run_whose_report_is_of_an_earlier_version_is_in_the_table_and_in_no_pair() -> None:
    old = json.loads(report("old", epochs=2, after="+" * 8))
    for line in old["table"]["lines"]:
        line["cells"]["sums"].pop("answers")
    words = told({"a.json": report("new", epochs=1), "b.json": json.dumps(old).encode()})
    assert "CGD old * 100.0 %" in words
    assert "old: the report is of an earlier version and does not say which questions were right" in words
    assert "against each other" not in words


@pytest.mark.parametrize("answers", ["9/1", "1/1", "a lot"])
def test_a_report_whose_answers_do_not_fit_its_questions_is_refused(answers: str) -> None:
    odd = json.loads(report("odd"))
    odd["table"]["lines"][0]["cells"]["sums"]["answers"] = answers
    with pytest.raises(UserError, match=r"odd\.json: the report has no table that this version can read"):
        joined_reports({"a.json": report("a"), "odd.json": json.dumps(odd).encode()})


def test_runs_of_one_name_are_told_apart_by_where_they_came_from() -> None:
    words = told({"old.json": report("same"), "new.json": report("same", after="++++++++")})
    assert "CGD old.json" in words
    assert "CGD new.json" in words


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b'{"run": {}}'])
def test_a_report_of_another_version_is_refused_with_its_name(data: bytes) -> None:
    with pytest.raises(UserError, match=r"old\.json: the report has no table"):
        joined_reports({"new.json": report("a"), "old.json": data})


@pytest.mark.parametrize("figure", ["1e308", "-1e308", "1e999", "NaN", str(10**400)])
@pytest.mark.parametrize("name", ["accuracy", "low", "tokens", "n"])
def test_a_report_whose_figures_cannot_be_is_refused_with_its_name(name: str, figure: str) -> None:
    odd, count = re.subn(rf'"{name}": ?[0-9.]+', f'"{name}": {figure}', report("b", seed=2).decode())
    assert count
    with pytest.raises(
        UserError, match=r"odd\.json: the report has no table that this version can read \(is not valid"
    ):
        joined_reports({"a.json": report("a", seed=1), "odd.json": odd.encode()})


def test_one_run_alone_is_nothing_to_compare() -> None:
    with pytest.raises(UserError, match=r"nothing to compare a\.json with"):
        joined_reports({"a.json": report("a")})


def test_the_command_writes_a_page_beside_the_table(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_bytes(report("clean"))
    files[1].write_bytes(report("noisy", rate=0.3))
    result = CliRunner().invoke(app, ["compare", *map(str, files), "--html", str(tmp_path / "page.html")])
    assert (result.exit_code, result.exception) == (0, None)
    page = (tmp_path / "page.html").read_text()
    assert "2 runs compared" in page
    assert "Robustness against wrong critiques" in page
    assert "30\u202f% wrong" in page


def test_the_command_refuses_other_questions(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_bytes(report("a"))
    files[1].write_bytes(report("b", base="++", after="++"))
    result = CliRunner().invoke(app, ["compare", *map(str, files)])
    assert isinstance(result.exception, UserError)
    assert "sums: 8 in a, 2 others in b" in str(result.exception)


def test_a_report_is_a_page_or_its_figures() -> None:
    result = CliRunner().invoke(app, ["report", "demo", "-o", "report.pdf"])
    assert isinstance(result.exception, Wrong)
    assert "ends in .html or .json" in str(result.exception)


def test_one_report_has_a_table_too() -> None:
    alone, two = report_table("a.json", report("a")), joined_reports({"a.json": report("a"), "b.json": report("b")})
    assert alone.columns == two.columns
    assert {line.model for line in alone.lines} == {"base", "cgd"}, "as for two runs, which share the base"
