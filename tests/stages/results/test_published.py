"""Published figures: what their file may say, and how they stand beside a run's own."""

import json
from decimal import Decimal
from typing import Any

import pytest
from support.report_builders import report_data, samples, stage

from cgd_stages.contract import Published
from cgd_stages.errors import UserError
from cgd_stages.results.beside import Beside, beside
from cgd_stages.results.comparison import table_of
from cgd_stages.results.published import PublishedTable, contradictions, read, same_model

ASKED = Published(uri="configmap://paper/figures.json", student="org/Llama", benchmarks=("sums", "MATH-500", "IFEval"))
ROW: dict[str, Any] = {"method": "CGD", "figures": {"sums": 54.2, "MATH-500": 85.7}, "averages": {"both": 70.0}}
TABLE: dict[str, Any] = {"source": "Table 1", "averages": {"both": ["sums", "MATH-500"]}, "rows": [ROW]}


def text(table: dict[str, Any] | None = None, **row: Any) -> str:
    return json.dumps({"tables": [TABLE | {"rows": [ROW | row]} | (table or {})]})


def tables(*given: dict[str, Any]) -> tuple[PublishedTable, ...]:
    return read(json.dumps({"tables": given}), ASKED)


def test_the_figures_are_read_with_the_digits_that_were_printed() -> None:
    (table,) = read('{"tables": [{"source": "T", "rows": [{"method": "base", "figures": {"sums": 20.0}}]}]}', ASKED)
    assert table.rows[0].figures["sums"].as_tuple() == Decimal("20.0").as_tuple()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{", "it is not JSON: .* line 1 column 2"),
        ("[" * 100_000, "it is not JSON"),
        ('{"tables": [], "tables": []}', "tables stands twice in one object"),
        ("[]", "the file must be an object"),
        ('{"tables": []}', "has no table"),
        (text({"rows": []}), "Table 1, there are no rows"),
        (text({"origin": "x"}), r"tables\.0\.origin: there is no such field"),
        (text({"source": ""}), r"tables\.0\.source"),
        (text(method="CDG"), r"Table 1, row 1: there is no method CDG \(did you mean CGD\?\)"),
        (text(method="PPO"), r"there is no method PPO \(did you mean DPO\?\)"),
        (text(method="REINFORCE"), r"there is no method REINFORCE \(known: base, CGD, CFT, "),
        (text(figures={"MATH500": 1}), r"row 1: there is no benchmark MATH500 \(did you mean MATH-500\?\)"),
        (text(figures={"odd": 1}), r"there is no benchmark odd \(known: sums, MATH-500, IFEval\)"),
        (text(figures={"sums": 100.1}), r"figures\.sums must be a percentage from 0 to 100 \(it is 100\.1\)"),
        (text(figures={"sums": -1}), r"must be a percentage from 0 to 100 \(it is -1\)"),
        (text(figures={"sums": float("nan")}), r"figures\.sums must be a number"),
        (text(figures={"sums": "54.2"}), r'figures\.sums must be a number, a percentage \(it is "54\.2"\)'),
        (text(figures={"sums": True}), r"figures\.sums must be a number"),
        (text(figures={"sums": 0.0000001}), "more than six digits behind the point"),
        (text(figures={}), "row 1: there are no figures"),
        (text(averages={"all": 70}), r"the table has no average all \(known: both\)"),
        (text(critique={"kind": "odd"}), r"critique\.kind: Input should be 'matched'"),
        (text(method="CFT", critique={"kind": "none"}), "only CGD has a critique of another kind"),
        (text({"rows": [ROW, ROW]}), "row 2: there is a row of CGD with this teacher and critique already"),
        (text({"averages": {"both": ["sums"]}}), "average both: it must be of two benchmarks or more"),
        (text({"averages": {"both": ["sums", "odd"]}}), "average both: there is no benchmark odd"),
        (text({"averages": {"sums": ["sums", "IFEval"]}}, averages={}), "sums names an average and a benchmark"),
        (text({"student": "org/Qwen"}), "has figures of org/Qwen, and none of org/Llama"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_the_place_and_what_to_change(given: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        read(given, ASKED)
    assert ASKED.uri in raised.value.message
    assert "spec.evaluation.published" in raised.value.hint


def test_of_many_faults_the_first_are_named() -> None:
    with pytest.raises(UserError, match=r"b0 .*b4 .*; and 3 more$"):
        read(text(figures={f"b{number}": 1 for number in range(8)}), ASKED)


def test_the_tables_of_other_students_are_left_out() -> None:
    mine, any_students, others = TABLE | {"student": "hub/llama"}, TABLE, TABLE | {"student": "org/Qwen"}
    assert [table.student for table in tables(mine, others, any_students)] == ["hub/llama", ""]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("meta-llama/Llama-3.1-8B", "s3://models/copies/llama-3.1-8b/", True),
        ("GPT-4o", "gpt-4o", True),
        ("org/Llama-3.1-8B", "org/Llama-3.1-70B", False),
    ],
)
def test_a_copy_of_a_model_is_known_by_the_last_part_of_its_name(one: str, other: str, same: bool) -> None:
    assert same_model(one, other) is same


@pytest.mark.parametrize(
    ("figures", "average", "said"),
    [
        # They give 66.65. Each may be off by 0.05, and so their mean; the average by half of its own last digit.
        ((50.0, 83.3), "66.7", None),
        ((50.0, 83.3), "66.60", None),
        ((50.0, 83.3), "66.59", "66.65"),
        ((50.0, 83.3), "66.8", "66.7"),
        ((50.0, 83.3), "66.5", "66.7"),
        ((50.0, 83.3), "67", None),
        ((50, 83), "67.0", None),
        ((50, 83), "67.1", "66.5"),
        ((50.0, 83.3), "40.00", "66.65"),
    ],
)
def test_an_average_is_marked_where_no_rounding_explains_it(
    figures: tuple[float, float], average: str, said: str | None
) -> None:
    given = text(figures=dict(zip(("sums", "MATH-500"), figures, strict=True)), averages={"both": 0})
    found = list(contradictions(read(given.replace('"both": 0', f'"both": {average}'), ASKED)))
    assert found == ([f"CGD: both {average}, its figures give {said}"] if said else [])


def test_an_average_without_one_of_its_figures_is_not_judged() -> None:
    assert list(contradictions(read(text(figures={"sums": 1.0}), ASKED))) == []


# --- beside the run's own ---------------------------------------------------------------------------------------------

TRAINED = {
    "cgd": {"objective": "CGD"},
    "cgd-shuffled": {"objective": "CGD", "critique": {"kind": "shuffled", "rate": 0.0}},
    "refinedsft": {"objective": "RefinedSFT"},
}


def compared(*given: dict[str, Any], teacher: str = "org/Teacher") -> Beside:
    """A run whose base has half of 40 sums right, CGD three quarters, and CGD with shuffled critiques none."""
    marks = {"base": "+-" * 20, "cgd": "+++-" * 10, "cgd-shuffled": "-" * 40, "refinedsft": "+-" * 20}
    outputs = {model: samples(mark) + samples(mark, benchmark="IFEval") for model, mark in marks.items()}
    stages = (
        stage("critique", inputs={"model": {"name": teacher}}),
        *(stage(f"train-{name}", inputs=inputs) for name, inputs in TRAINED.items()),
    )
    data = report_data(stages=stages, evaluations=outputs, published=tables(*given))
    return beside(data, table_of(data))


def row(method: str = "CGD", **given: Any) -> dict[str, Any]:
    return {"method": method, "figures": {"sums": 54.2}} | given


def test_each_figure_stands_beside_that_of_the_same_method_and_benchmark() -> None:
    figures = [row("base", figures={"sums": 44.4}), row(figures={"sums": 99.9}), row(critique={"kind": "shuffled"})]
    rows = compared({"source": "T", "rows": figures}).tables[0].rows
    assert [(one.name, one.model) for one in rows] == [
        ("base", "base"), ("CGD", "cgd"), ("cgd-shuffled (CGD, critique: shuffled)", "cgd-shuffled"),
    ]  # fmt: skip
    cells = [one.cells["sums"] for one in rows]
    assert [(cell.published, cell.ours) for cell in cells] == [(0.444, 0.5), (0.999, 0.75), (0.542, 0.0)]
    assert [cell.difference for cell in cells] == pytest.approx([0.056, -0.249, -0.542])
    assert [cell.side for cell in cells] == ["inside", "below", "below"]


def test_what_has_no_counterpart_is_named() -> None:
    found = compared({"source": "T", "rows": [row("CFT"), row("base", figures={"MATH-500": 50.0})]})
    assert found.not_asked == ("MATH-500",)
    assert found.not_run == ("CFT",)
    assert found.not_published == ("IFEval", "Refined SFT", "CGD", "cgd-shuffled (CGD, critique: shuffled)")
    absent, base = found.tables[0].rows
    assert (absent.model, absent.cells["sums"].ours, absent.cells["sums"].printed) == ("", None, "54.2")
    assert (base.cells["sums"].published, base.cells["sums"].ours) == (None, 0.5)


def test_an_average_is_over_the_same_benchmarks_and_one_that_contradicts_its_figures_is_not_compared() -> None:
    averages = {"right": ["sums", "IFEval"], "wrong": ["sums", "IFEval"], "more": ["sums", "MATH-500"]}
    figures = {"figures": {"sums": 60.0, "IFEval": 70.0}, "averages": {"right": 65.0, "wrong": 64.0, "more": 65.0}}
    found = compared({"source": "T", "averages": averages, "rows": [row(**figures)]})
    cells = found.tables[0].rows[0].cells
    assert found.tables[0].columns == ("sums", "IFEval", "right", "wrong", "more")
    assert (cells["right"].ours, cells["right"].gives, cells["right"].side) == (0.75, "", "inside")
    assert (cells["wrong"].ours, cells["wrong"].gives) == (0.75, "65.0")
    assert (cells["wrong"].difference, cells["wrong"].side) == (None, None)
    assert (cells["more"].ours, cells["more"].printed) == (None, "65.0")
    assert found.contradictions == ("CGD: wrong 64.0, its figures give 65.0",)


def test_another_teacher_than_the_runs_is_marked() -> None:
    given = {"source": "T", "teacher": "copy/teacher", "rows": [row("base"), row(), row(teacher="GPT-4o")]}
    assert [(one.teacher, one.other_teacher) for one in compared(given).tables[0].rows] == [
        ("", False), ("copy/teacher", False), ("GPT-4o", True),
    ]  # fmt: skip
