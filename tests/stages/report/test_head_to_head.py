"""The headline: the trained models against each other, and no more than the corrected tests show."""

import pytest
from support.reading import Read
from support.report_builders import report_data, sample, samples, stage

from cgd_stages.report.head_to_head import headline, rows
from cgd_stages.report.page import render, render_comparison
from cgd_stages.results.comparison import Table, joined, table_of
from cgd_stages.results.formatting import THIN
from cgd_stages.results.head_to_head import head_to_heads
from cgd_stages.results.model import Sample

Outputs = tuple[Sample, ...]


def said(table: Table) -> list[tuple[str, str, str]]:
    sentences = headline(table, head_to_heads(table))
    return [(one["outcome"], *(one[part].replace(THIN, " ") for part in ("claim", "detail"))) for one in sentences]


def told(**evaluations: Outputs) -> list[tuple[str, str, str]]:
    return said(table_of(report_data(evaluations=evaluations)))


CGD, REFINED = samples("+" * 14 + "-" * 6), samples("+" * 4 + "-" * 15 + "+")


def test_the_winner_and_its_lead_are_the_headline() -> None:
    (sentence,) = told(base=CGD, cgd=CGD, refinedsft=REFINED)
    assert sentence == (
        "better",
        "CGD beats Refined SFT by 45.0 points on sums (95 % 13.7 to 68.1)",
        "20 questions in pairs, 10 for CGD and 1 for Refined SFT: exact McNemar test p = 0.012",
    )


def test_a_rival_that_wins_is_named_as_the_winner() -> None:
    (sentence,) = told(base=CGD, cgd=REFINED, refinedsft=CGD)
    assert sentence == (
        "worse",
        "Refined SFT beats CGD by 45.0 points on sums (95 % 13.7 to 68.1)",
        "20 questions in pairs, 10 for Refined SFT and 1 for CGD: exact McNemar test p = 0.012",
    )


def test_models_that_cannot_be_told_apart_are_said_to_be_so_with_what_would_have_shown() -> None:
    (sentence,) = told(cgd=samples("+" * 13 + "-" * 27), refinedsft=samples("+" * 10 + "-" * 30))
    outcome, claim, detail = sentence
    assert (outcome, claim) == ("noise", "CGD and Refined SFT cannot be told apart with 40 questions on sums")
    assert detail.startswith("CGD minus Refined SFT +7.5 points (95 % \u2212")
    assert (
        "exact McNemar test p = 0.25: a difference of 19.4 points would have shown (in 80 % of cases, at level 0.05, "
    )
    assert detail.endswith("where 7.5 % of the questions change sides as here)")


def test_a_handful_of_questions_can_show_nothing_and_it_is_said() -> None:
    ((_, claim, detail),) = told(cgd=samples("+++"), cft=samples("---"))
    assert claim == "CGD and CFT cannot be told apart with 3 questions on sums"
    assert detail.endswith("p = 0.25: no difference could have shown with so few questions")


def test_several_rivals_are_corrected_for_and_it_is_said() -> None:
    found = told(cgd=CGD, refinedsft=REFINED, cft=CGD)
    assert [one[0] for one in found] == ["better", "noise"]
    assert found[0][2].endswith("exact McNemar test p = 0.012, p = 0.023 corrected for 2 pairs (Holm)")


def test_of_many_rivals_one_sentence_says_who_was_beaten_and_who_was_not() -> None:
    lost = samples("-" * 20)
    ((outcome, claim, detail),) = told(base=lost, cgd=CGD, sft=lost, distilledsft=lost, cft=CGD, refinedsft=CGD)
    assert outcome == "better"
    assert claim == (
        "CGD beats SFT and Distilled SFT, and cannot be told apart from Refined SFT and CFT on sums with 20 questions"
    )
    assert detail.startswith(
        "CGD minus SFT +70.0 points (95 % +39.9 to +87.4), minus Distilled SFT +70.0 points (95 % "
    )
    assert detail.endswith("; tests corrected for 4 pairs (Holm)")
    assert detail.count("would have shown") == 2


def test_a_model_that_beats_some_and_is_beaten_by_others_is_neither_better_nor_worse() -> None:
    worst, best = samples("-" * 40), samples("+" * 40)
    middle = samples("+" * 20 + "-" * 20)
    ((outcome, claim, _),) = told(cgd=middle, sft=worst, cft=best, refinedsft=middle, distilledsft=middle)
    assert outcome == "noise"
    assert claim == (
        "CGD beats SFT, and is beaten by CFT, and cannot be told apart from Distilled SFT and Refined SFT on sums with "
        "40 questions"
    )


def test_the_headline_is_of_the_mean_where_several_benchmarks_have_one() -> None:
    def both(marks: str) -> Outputs:
        return samples(marks, benchmark="one") + samples(marks[::-1], benchmark="two")

    ((_, claim, detail),) = told(cgd=both("+" * 10 + "-" * 2), cft=both("-" * 12))
    assert claim.startswith("CGD beats CFT by 83.3 points in the mean of 2 benchmarks (95 % ")
    assert detail == "24 questions in pairs, 20 for CGD and 0 for CFT: exact sign-flip test over questions p < 0.001"


def test_what_is_left_out_is_said() -> None:
    more = (*samples("-" * 4), sample("x", correct=True, grade_error="timeout"))
    ((_, _, detail),) = told(cgd=(*samples("+" * 4), sample("x", correct=True)), cft=more)
    assert detail.endswith("; 1 question left out, with a grade for one of the two alone")


def seeded(seed: int, rate: str = "1e-6", **marks: str) -> Table:
    stages = tuple(
        stage(f"train-{name}", inputs={"objective": name, "training": {"learningRate": rate, "seed": seed}})
        for name in marks
    )
    return table_of(report_data(stages=stages, evaluations={name: samples(mark) for name, mark in marks.items()}))


def test_the_spread_of_the_seeds_stands_beside_the_test_over_questions() -> None:
    runs = {"a": seeded(0, cgd="+++-----", cft="+-------"), "b": seeded(1, cgd="+-------", cft="+-------")}
    ((_, claim, detail),) = said(joined(runs))
    assert claim == "CGD and CFT cannot be told apart with 8 questions on sums"
    assert "exact sign-flip test over questions p = 0.50: " in detail
    assert detail.endswith("; over seeds 25.0 \u00b1 17.7 (2 seeds) and 12.5 \u00b1 0.0 (2 seeds)")


def test_models_of_one_name_are_told_apart_by_their_runs() -> None:
    table = joined({"slow": seeded(0, cgd="+" * 9), "fast": seeded(0, rate="1e-5", cgd="-" * 9)})
    assert said(table)[0][1].startswith("CGD (slow) beats CGD (fast) by 100.0 points on sums")
    assert [(row.one, row.other) for row in rows(head_to_heads(table))] == [("CGD (slow)", "CGD (fast)")]


def test_one_trained_model_has_no_such_headline() -> None:
    assert told(base=CGD, cgd=CGD) == []


def words(html: str) -> str:
    return Read(html).words.replace(THIN, " ")


def test_the_page_opens_with_the_paired_comparison_and_has_it_in_a_table() -> None:
    found = words(render(report_data(evaluations={"base": REFINED, "cgd": CGD, "refinedsft": REFINED, "cft": CGD})))
    first, second = "CGD beats Refined SFT by 45.0 points on sums", "CGD-trained 70.0 %, base 25.0 % on sums"
    assert 0 < found.index(first) < found.index(second)
    assert (
        "Trained models against each other Pairsums CGDminus Refined SFT ▲ +45.0 better+13.7 to +68.1p = 0.023" in found
    )
    assert "CGDminus CFT ≈ \u00b10.0 noise\u221212.6 to +12.6p = 1.0036.7 would have shown20 questions" in found


def test_a_page_of_one_trained_model_has_no_such_table() -> None:
    assert "against each other" not in words(render(report_data()))


def test_the_page_of_several_runs_has_headline_and_table_too() -> None:
    runs = {"a": seeded(0, cgd="+" * 9, cft="-" * 9), "b": seeded(1, cgd="+" * 9, cft="-" * 8 + "+")}
    found = words(render_comparison(joined(runs)))
    assert "CGD beats CFT by 94.4 points on sums" in found
    assert "CGDminus CFT ▲ +94.4 better" in found
    assert "100.0 \u00b1 0.0 (2 seeds)5.6 \u00b1 7.9 (2 seeds)9 questions" in found
    assert "earlier version" not in found


@pytest.mark.parametrize("name", ["old", "<b>older</b>"])
def test_a_run_whose_report_is_too_old_to_be_paired_is_named(name: str) -> None:
    table = joined({"a": seeded(0, cgd="+-", cft="--"), name: seeded(0, rate="1e-5", cgd="++")})
    lines = tuple(
        line.model_copy(
            update={"cells": {k: cell.model_copy(update={"answers": ""}) for k, cell in line.cells.items()}}
        )
        if line.runs == (name,)
        else line
        for line in table.lines
    )
    assert f"{name}: the report is of an earlier version" in words(
        render_comparison(table.model_copy(update={"lines": lines}))
    )
