"""The plots of the pages: where things are, and what is told of them."""

import math
import re
from importlib.resources import files

import pytest
from support.report_builders import sample

from cgd_stages.report.plots import Plot, log_ticks, pass_charts, robustness_chart
from cgd_stages.results.comparison import NAMES, Curve, Point
from cgd_stages.results.scores import Score, score


def tried(model: str, *marks: str, tokens: int = 10) -> Score:
    outputs = [
        sample(f"q{question}", sample=number, correct=mark == "+", tokens=tokens)
        for question, tries in enumerate(marks)
        for number, mark in enumerate(tries)
    ]
    return score(model, "sums", outputs)


CGD = f"s{list(NAMES).index('cgd')}"


def heights(plot: Plot, style: str) -> list[float]:
    return [y for kind, _, y in plot["places"] if kind == f"point {style}"]


def test_pass_at_k_rises_with_k_and_lies_in_its_plot_with_its_interval() -> None:
    charts = pass_charts([tried("base", "+---", "----"), tried("cgd", "++--", "+---")])
    for plot in (charts["k"], charts["tokens"]):
        for style in ("s0", CGD):
            ys = heights(plot, style)
            assert ys == sorted(ys, reverse=True)
            assert len(ys) == 3
        assert all(0 <= x <= 100 and 0 <= y <= 100 for _, x, y in plot["places"])
        assert len(plot["lines"]) == len(plot["bands"]) == 2
    assert charts["names"] == [("s0", "base"), (CGD, "CGD")]
    assert [text for text, _ in charts["k"]["x_ticks"]] == ["1", "2", "4"]


def test_the_same_accuracy_for_half_the_tokens_lies_further_left_by_one_doubling() -> None:
    charts = pass_charts([tried("base", "+-", tokens=200), tried("cgd", "+-", tokens=100)])
    places = {(kind, y): x for kind, x, y in charts["tokens"]["places"]}
    assert sorted(places.values()) == [0, 50, 50, 100]
    (_, _, told), *_ = [point for point in charts["tokens"]["points"] if "CGD" in point[2]]
    assert told.startswith("CGD \u00b7 Pass@1 50.0\u202f% (")
    assert told.endswith("100 tokens")


def test_a_model_that_said_nothing_is_drawn_over_k_alone() -> None:
    silent, other = tried("base", "--", "--", tokens=0), tried("cgd", "+-", "--")
    charts = pass_charts([silent, other])
    assert heights(charts["k"], "s0")
    assert heights(charts["tokens"], "s0") == []
    assert pass_charts([silent])["tokens"] is None


def test_a_model_with_one_output_of_a_question_is_a_point_without_a_line() -> None:
    charts = pass_charts([tried("base", "+---"), tried("selfrefine", "+", "-")])
    assert [style for style, _ in charts["k"]["lines"]] == ["s0"]
    assert len(heights(charts["tokens"], "s1")) == 1


def test_a_label_of_its_own_has_a_colour_too() -> None:
    assert pass_charts([tried("mine", "+-")])["names"] == [(f"s{len(NAMES)}", "mine")]


@pytest.mark.parametrize("place", range(len(NAMES) + 1))
def test_every_model_has_a_colour_and_a_line_in_the_style_sheet(place: int) -> None:
    style = (files("cgd_stages.report") / "report.css").read_text()
    assert f".s{place} {{ --series: var(--" in style
    (lines,) = re.findall(r"\.plot path\.line:is\((.*)\) { stroke: var", style)
    assert f".s{place}" in lines.split(", ")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(10, 20, [10, 20]), (120, 900, [200, 500]), (3, 5000, [10, 100, 1000]), (0.4, 0.9, [0.5]), (7, 7, [])],
)
def test_logarithmic_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_logarithmic_ticks_of_a_huge_range_are_few() -> None:
    found = log_ticks(1, 1e18)
    assert len(found) <= 7
    assert all(math.log10(tick).is_integer() for tick in found)


def at(rate: float, accuracy: float, wrong: float | None = None) -> Point:
    return Point(
        rate=rate, wrong=rate if wrong is None else wrong, run="r", accuracy=accuracy, low=accuracy, high=accuracy
    )


def test_curves_of_wrong_critiques_begin_in_one_point_and_tell_which_share_was_wrong() -> None:
    clean = at(0.0, 0.8)
    kept = Curve(name="miscritique, target kept", points=(clean, at(0.5, 0.6, wrong=0.45), at(1.0, 0.4)))
    refined = Curve(name="miscritique, target refined from it", points=(clean, at(0.5, 0.4)))
    chart = robustness_chart([kept, refined])
    assert chart
    plot: Plot = chart["plot"]
    (first, down), (second, steep) = plot["lines"]
    assert (first, second) == ("s7", "s5")
    assert down == "M0.00 0.00 L50.00 50.00 L100.00 100.00"
    assert steep == "M0.00 0.00 L50.00 100.00"
    assert [kind for kind, _, _ in plot["places"]] == ["point ", "point s7", "point s7", "point s5"]
    assert [text for text, _ in plot["x_ticks"]] == ["0\u202f%", "50\u202f%", "100\u202f%"]
    told = [text.replace("\u202f", " ") for text in chart["texts"]]
    assert told[0] == "0 % wrong \u00b7 accuracy 80.0 % (80.0 % to 80.0 %) \u00b7 r"
    assert told[1].startswith("50 % wrong (45.0 % of the examples) \u00b7 accuracy 60.0 %")
    assert told[3].endswith("miscritique, target refined from it \u00b7 r")
