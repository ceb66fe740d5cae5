"""The report page: what it says, and that nothing said in it can break it."""

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from support.reading import Read
from support.report_builders import (
    GRADED,
    HOSTILE,
    QUALITY,
    audit,
    change,
    quadruple,
    repeated,
    report_data,
    sample,
    samples,
    stage,
    steps,
)

from cgd_stages.contract import Rows
from cgd_stages.quality.marks import share
from cgd_stages.quality.review import SHOWN
from cgd_stages.report import page, plots
from cgd_stages.report.page import TEXT_LIMIT, render
from cgd_stages.report.plots import nice_ticks
from cgd_stages.report.summary import objective
from cgd_stages.results.comparison import Table, joined, table_of
from cgd_stages.results.formatting import THIN, count, duration, number, percent, points, probability
from cgd_stages.results.model import (
    Decontamination,
    GradedOutput,
    Paraphrased,
    Quadruples,
    Rejected,
    ReportData,
    Sample,
    StageRecord,
    Step,
)
from cgd_stages.results.scores import EXAMPLES


def read(**changes: Any) -> Read:
    return Read(render(report_data(**changes)))


def hostile() -> ReportData:
    """A run in which every text tries to break out."""
    said = GradedOutput(output=HOSTILE, extracted=HOSTILE, correct=False)
    row = quadruple(prompt=HOSTILE, answer=HOSTILE, critique=HOSTILE, refinement=HOSTILE, reference=HOSTILE)
    one = stage(
        "answer",
        rejections={HOSTILE: 1},
        inputs={"model": {"name": HOSTILE}},
        facts={"output_uri": HOSTILE, "metrics": {HOSTILE: 1.0}},
    )
    return report_data(
        spec=HOSTILE,
        stages=(one,),
        evaluations={name: samples("+-", benchmark=HOSTILE) for name in ("base", "cgd")},
        changes=(change(benchmark=HOSTILE, prompt=HOSTILE, reference=HOSTILE, base=said, after=said),),
        audit=audit(benchmark=HOSTILE, reference=HOSTILE, output=HOSTILE, extracted=HOSTILE, rule=HOSTILE),
        quadruples=Quadruples(total=1, verdicts={"wrong": 1}, shown=(row,)),
    )


def test_the_headline_says_both_accuracies_and_that_the_difference_is_noise() -> None:
    words = read().words
    headline = "CGD-trained some/student 50.0 %, base 25.0 % on sums: no difference seen"
    assert headline in words.replace(THIN, " ")
    assert "8 questions, 3 fixed and 1 broken: a difference within noise (p = 0.62)" in words


@pytest.mark.parametrize(
    ("base", "after", "verdict", "said"),
    [
        ("-" * 12, "+" * 12, "better", "better than chance explains (p < 0.001)"),
        ("+" * 12, "-" * 12, "worse", "worse than chance explains (p < 0.001)"),
        ("+-" * 20, "+-" * 20, "no difference seen", "no question changed sides; gains below 19.0 points cannot be"),
    ],
)
def test_the_headline_claims_no_more_than_the_test_does(base: str, after: str, verdict: str, said: str) -> None:
    words = read(evaluations={"base": samples(base), "cgd": samples(after)}).words
    assert f"on sums: {verdict} {len(base)} questions" in words
    assert said in words


def test_with_several_objectives_each_is_named() -> None:
    words = read(evaluations={"base": samples("+-"), "cgd": samples("++"), "cft": samples("--")}).words
    assert "CGD-trained" in words
    assert "CFT-trained" in words


FIVE = ["cgd", "cft", "distilledsft", "sft", "refinedsft"]
NAMES = ["CGD", "CFT", "Distilled SFT", "SFT", "Refined SFT"]


def test_every_objective_has_a_row_of_scores_and_a_comparison_with_the_base() -> None:
    outputs = {"base": samples("+-")} | {name: samples("++") for name in FIVE}
    words = read(evaluations=outputs).words
    for name in NAMES:
        assert f"{name} 100.0 %" in words
        assert f"{name} minus base" in words


def test_a_rival_is_not_called_trained() -> None:
    words = Read(
        render(report_data(evaluations={"base": samples("+-"), "cgd": samples("++"), "selfrefine": samples("+-")}))
    ).words
    assert "CGD-trained some/student 100.0 %" in words
    assert "Self-Refine 50.0 %" in words


def test_several_outputs_of_a_question_are_told_with_pass_at_k_and_the_tokens_spent() -> None:
    tries = tuple(sample("q1", correct=mark == "+", sample=number, tokens=10) for number, mark in enumerate("+-"))
    longer = tuple(replace(one, tokens=30) for one in tries)
    words = Read(render(report_data(evaluations={"base": tries, "cgd": longer}))).words
    assert "ModelPass@1Pass@2" in words
    assert "base50.0 %5.5 \u2013 94.510 tokens100.0 %20.7 \u2013 100.020 tokens" in words
    assert "CGD50.0 %5.5 \u2013 94.530 tokens100.0 %20.7 \u2013 100.060 tokens" in words
    assert "exact sign-flip test over questions" in words
    assert "It spends 3 times the tokens." in words


def test_every_training_is_told_under_its_own_name_with_its_figures() -> None:
    trained = tuple(stage(f"train-{name}", facts={"metrics": {"final_loss": float(n)}}) for n, name in enumerate(FIVE))
    blocks = page._trainings(report_data(stages=trained, training={one.name: steps(3) for one in trained}))
    told = [(block["objective"], block["metrics"]["final_loss"], block["chart"]["steps"]) for block in blocks]
    assert told == [(name, n, 3) for n, name in enumerate(NAMES)]


BARE = {"bare_examples": 12.0, "train_examples": 40.0, "validation_examples": 8.0}


def test_a_variant_is_named_with_its_objective_and_its_share_of_bare_examples_is_told() -> None:
    inputs = {"objective": "CGD", "critique": {"kind": "shuffled", "rate": 0.0}}
    bare = stage("train-cgd-bare", inputs=inputs, facts={"metrics": BARE})
    assert objective(bare) == "cgd-bare (CGD, critique: shuffled)"
    words = read(stages=(bare,), training={"train-cgd-bare": steps(3)}).words.replace(THIN, " ")
    assert "12 of 48 examples (25.0 %) have the prompt alone as context" in words
    assert "have the prompt alone" not in read(training={"train-cgd": steps(3)}).words


def test_the_examples_with_a_miscritique_are_told_beside_the_rate_and_the_curve_is_drawn() -> None:
    critique = {"kind": "miscritique", "rate": 0.3, "target": "refined"}
    figures = {"misled_examples": 11.0, "train_examples": 40.0, "validation_examples": 8.0}
    name = "train-cgd-mis"
    misled = stage(name, inputs={"objective": "CGD", "critique": critique}, facts={"metrics": figures})
    evaluations = {"base": samples("+---"), "cgd": samples("++--"), "cgd-mis": samples("----")}
    words = read(stages=(misled,), training={name: steps(3)}, evaluations=evaluations).words.replace(THIN, " ")
    assert "11 of 40 learned examples (27.5 %) have a miscritique, 30 % of the rows were to have one" in words
    assert "their target is what the teacher refined from the miscritique." in words
    assert "Robustness against wrong critiques" in words
    assert "have a miscritique" not in read(training={"train-cgd": steps(3)}).words


def test_the_share_of_unfinished_drafts_is_shown_where_they_are_kept() -> None:
    facts = {"rows": Rows(total=48, done=40, rejected=8), "metrics": {"unfinished_length": 3.0}}
    kept, rejected = (stage("answer", inputs={"unfinished": "keep"} if keeps else {}, facts=facts) for keeps in (1, 0))
    (measure,) = page._unfinished((kept,))
    assert (measure[0], measure[1].count, measure[1].n) == ("Unfinished drafts", 3, 40)
    assert measure[3].startswith("3 cut by maxTokens, 0 that loop")
    assert page._unfinished((rejected,)) == []


def test_the_head_names_every_objective() -> None:
    trained = tuple(stage(f"train-{name}") for name in FIVE)
    assert f"Objectives{', '.join(NAMES)}" in read(stages=trained).words


@pytest.mark.parametrize(
    ("critique", "told"),
    [
        ({"kind": "matched", "rate": 0.0}, "CGD"),
        ({"kind": "shuffled", "rate": 0.0}, "CGD (critique: shuffled)"),
        ({"kind": "corrupted", "rate": 0.3}, "CGD (30\u202f% of critiques corrupted)"),
    ],
)
def test_an_ablation_of_the_critique_is_named(critique: dict[str, Any], told: str) -> None:
    assert objective(stage("train-cgd", inputs={"critique": critique})) == told


def test_several_models_are_one_table_with_the_best_of_a_column_marked_in_words() -> None:
    found = read(evaluations={"base": samples("-" * 9), "cgd": samples("+" * 9), "sft": samples("+" + "-" * 8)})
    words = found.words.replace(THIN, " ")
    assert "Modelsums9 questionsTokens base 0.0 %0.0 \u2013 29.9 10 SFT 11.1 %" in words
    assert "CGD ★best: 100.0 %70.1 \u2013 100.0▲ +100.0 better 101.00 \u00d7 base" in words
    assert "≈ +11.1 noise" in words
    assert "sums: intervals, cut outputs, fixed and broken questions" in words


def test_one_pair_of_models_on_one_benchmark_needs_no_table_of_tables() -> None:
    assert "compared" not in read().attributes("class")


def test_a_page_of_several_runs_has_no_curve_where_no_critique_was_corrupted() -> None:
    runs = {"a": table_of(report_data()), "b": table_of(report_data(evaluations={"base": samples("+" * 8)}))}
    found = Read(page.render_comparison(joined(runs)))
    assert "2 runs compared a, b" in found.words
    assert "Robustness" not in found.words


def test_seeds_are_taken_together_on_a_page_of_several_runs() -> None:
    def trained(seed: int, marks: str) -> Table:
        inputs = {"training": {"seed": seed}}
        evaluations = {"base": samples("+---"), "cgd": samples(marks)}
        return table_of(report_data(stages=(stage("train-cgd", inputs=inputs),), evaluations=evaluations))

    found = Read(page.render_comparison(joined({"a": trained(0, "++--"), "b": trained(1, "++++")})))
    assert "Over seeds Modelsums CGDa, b75.0 \u00b1 35.4" in found.words


def test_the_lengths_of_examples_are_bars_in_order_and_not_figures() -> None:
    metrics = {"length_to_1024": 2.0, "length_to_512": 8.0, "final_loss": 1.0}
    found = read(stages=(stage("train-cgd", facts={"metrics": metrics}),))
    assert "Lengths of the examples up to 512 tokens 8 up to 1 024 tokens 2 Quadruples" in found.words
    assert page._lengths(metrics) == [(512, 8, 100), (1024, 2, 25)]


def test_a_check_of_all_trainings_is_no_level_of_the_funnel() -> None:
    assert [level["name"] for level in page._funnel([stage("refine"), stage("check")])] == ["refine"]


def test_many_comparisons_are_summed_up_one_sentence_a_model() -> None:
    def outputs(*marks: str) -> tuple[Sample, ...]:
        return tuple(one for i, mark in enumerate(marks) for one in samples(mark, benchmark=f"bench{i}"))

    base, after = outputs("-" * 8, "-" * 8, "+-", "+-"), outputs("+" * 8, "+" * 8, "+-", "-+")
    words = read(evaluations={"base": base, "cgd": after}).words.replace(THIN, " ")
    assert "CGD-trained some/student 75.0 %, base 25.0 %: the mean of 4 benchmarks" in words
    assert "Better than chance explains on 2, worse on 0, within noise on 2" in words


def test_outputs_that_were_cut_or_not_gradable_are_named_beside_the_headline() -> None:
    cut = read(evaluations={"base": samples("+-", finish_reason="length")}).words
    assert "Base on sums: 100.0" in cut
    assert "cut by the token limit" in cut
    assert "could not be graded" in read(evaluations={"base": samples("-", grade_error="timeout")}).words
    assert (
        "2 questions were never answered" in read(evaluations={"base": samples("--", finish_reason="too_long")}).words
    )
    assert "no answer was found" in read(evaluations={"base": samples("-", answer_source="none")}).words
    assert "sums has only 2 questions" in read(evaluations={"base": samples("+-")}).words


def test_no_text_of_a_model_becomes_markup() -> None:
    html = render(hostile())
    found = Read(html)
    assert len(found.scripts) == 2
    assert "alert(1)" not in found.scripts[1]
    assert found.rows[0]["answer"] == HOSTILE
    assert "<script>alert" not in html
    assert "49" not in found.text.replace("&49", "")  # {{ 7 * 7 }} was not computed
    assert "<!--" not in html
    assert found.text.count("</script><script>alert(1)</script>") >= 5


def test_the_embedded_rows_hold_no_angle_bracket() -> None:
    json_text = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', render(hostile()), re.DOTALL)
    assert json_text
    assert "<" not in json_text[1]


def test_only_our_own_script_may_run_and_nothing_may_be_fetched() -> None:
    html = render(report_data())
    found = Read(html)
    policy = next(content for content in found.attributes("content") if "default-src" in content)
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    paper = 'The method: <a href="https://arxiv.org/abs/2505.11628">'  # it is followed by who clicks on it, alone
    assert html.count(paper) == 1
    assert not re.search(r"https?://|@import|url\(", html.replace(paper, ""))
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert found.attributes("src") == []


def test_every_link_leads_to_a_section_and_no_id_comes_twice() -> None:
    found = read()
    ids = found.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href.removeprefix("#") for href in found.attributes("href") if href.startswith("#")} <= set(ids)


def test_a_run_without_any_output_is_told_and_not_a_crash() -> None:
    names = ("prepare", "answer", "train-cgd", "evaluate-base")
    empty = report_data(
        stages=tuple(StageRecord(name=name) for name in names), training={}, evaluations={}, changes=(), quadruples=None
    )
    words = Read(render(empty)).words
    assert "No comparison of base and trained model" in words
    assert "no output of prepare, answer, train-cgd, evaluate-base" in words
    assert words.count("no output in this run") == 2 * len(names)


def test_a_run_of_no_stages_has_a_page_too() -> None:
    assert Read(render(report_data(stages=(), training={}, evaluations={}, changes=(), quadruples=None))).words


def test_no_page_shows_nan_or_infinity() -> None:
    odd = stage("train-cgd", facts={"metrics": {"loss": math.nan, "rate": math.inf}, "seconds": 0.0})
    log = (Step(step=1, loss=math.nan), Step(step=2, loss=1.0, grad_norm=math.nan), Step(step=3))
    found = read(stages=(odd,), training={"train-cgd": log})
    assert not re.search(r"\b(nan|inf(inity)?|none|null)\b", found.text, re.IGNORECASE)
    assert "2 steps without a finite loss are left out" in found.words
    assert not any(re.search(r"nan|inf", value) for value in found.attributes("d") + found.attributes("style"))


def test_a_training_without_one_finite_loss_has_no_chart() -> None:
    assert "No training log" in read(training={"train-cgd": (Step(step=1),)}).words


@pytest.mark.parametrize("log", [steps(1), steps(2), steps(40), (Step(step=5, loss=1.0), Step(step=9, loss=1.0))])
def test_every_point_of_a_loss_curve_lies_in_its_chart(log: tuple[Step, ...]) -> None:
    found = read(training={"train-cgd": log})
    (data,) = found.attributes("data-points")
    plotted = json.loads(data)
    assert len(plotted) == len(log)
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y, _ in plotted)
    assert plotted[0][2].startswith(f"step {log[0].step} · loss {log[0].loss:.4f}")


def test_the_early_questions_are_told_with_their_counts_and_intervals() -> None:
    looks = {4: 0.125, 10: 0.5}
    log = tuple(
        step.model_copy(
            update={"early_accuracy": looks[step.step], "early_accuracy_before": 0.25, "early_questions": 8}
            if step.step in looks
            else {}
        )
        for step in steps(40)
    )
    found = read(training={"train-cgd": log})
    told = "25.0 % right (2 of 8, 95 % interval 7.1 \u2013 59.1) before the training, 12.5 % right (1 of 8"
    assert told in found.words
    assert "after step 4, 50.0 % right (4 of 8, 95 % interval 21.5 \u2013 78.5) after step 10." in found.words
    assert "Early questions" not in read(training={"train-cgd": steps(40)}).words


OWN_LOSSES, BARE_LOSSES = {10: 1.5, 20: 1.2, 30: 3.5, 40: 1.2}, {10: 1.1, 20: 1.4, 30: 1.0, 40: 1.6}


def validated(bare: dict[int, float], exported: int, select: str) -> dict[str, Any]:
    """A training that was measured four times, and what it says about the exported model."""
    log = tuple(
        step.model_copy(
            update={"validation_loss": OWN_LOSSES.get(step.step), "bare_validation_loss": bare.get(step.step)}
        )
        for step in steps(40)
    )
    trained = stage(
        "train-cgd",
        facts={"metrics": {"exported_step": float(exported), "train_examples": 32.0, "validation_examples": 8.0}},
        inputs={"training": {"validation": {"select": select}}},
    )
    return {"stages": (trained,), "training": {"train-cgd": log}}


@pytest.mark.parametrize(
    ("bare", "exported", "select", "told"),
    [
        ({}, 20, "best", "whose validation loss is the least"),
        (BARE_LOSSES, 30, "bare", "whose validation loss given the prompt alone is the least"),
        (BARE_LOSSES, 20, "best", "whose validation loss in the objective's own context is the least"),
        (BARE_LOSSES, 40, "last", "as the run asks"),
    ],
)
def test_each_validation_loss_is_a_line_and_the_points_of_the_exported_model_are_large(
    bare: dict[int, float], exported: int, select: str, told: str
) -> None:
    found = read(**validated(bare, exported, select))
    points = [
        (str(given["style"]), str(given["class"]).split())
        for tag, given in found.elements
        if tag == "i" and str(given.get("class", "")).startswith("held")
    ]
    lines = [losses for losses in (bare, OWN_LOSSES) if losses]
    assert ["exported" in style for _, style in points] == [step == exported for losses in lines for step in losses]
    assert ["bare" in style for _, style in points] == 4 * [True] * bool(bare) + 4 * [False]
    places = [[float(part) for part in re.findall(r"[\d.]+", place)] for place, _ in points]
    assert [x for x, _ in places] == [round(100 * (step - 1) / 39, 2) for step in (10, 20, 30, 40)] * len(lines)
    assert all(0 <= y <= 100 for _, y in places)
    assert f"Exported is the model after step {exported} (large points), {told}." in found.words
    assert "smallest 1.2 after step 20, last 1.2." in found.words
    assert ("validation loss given the prompt alone: smallest 1 after step 30, last 1.6;" in found.words) == bool(bare)
    (data,) = found.attributes("data-points")
    both = "validation loss given the prompt alone 1.4000 · validation loss in the objective's own context 1.2000"
    assert (both if bare else "validation loss 1.2000") in json.loads(data)[19][2]


def test_a_training_without_held_out_prompts_says_that_the_last_model_is_exported() -> None:
    figures = {"metrics": {"exported_step": 5.0, "train_examples": 9.0, "validation_examples": 0.0}}
    words = read(stages=(stage("train-cgd", facts=figures),), training={"train-cgd": steps(5)}).words
    assert "No prompts were held out, so the model after the last step is exported." in words
    assert "validation loss" not in words


def test_gradient_norm_and_learning_rate_have_small_lines_of_their_own() -> None:
    words = read(training={"train-cgd": steps(5)}).words
    assert "Gradient norm: first 1.5, largest 1.5, last 1.5" in words
    assert "Learning rate: first 1.00e-06" in words
    assert plots.sparks([Step(step=1, loss=1.0, grad_norm=math.nan)]) == []


def test_a_long_training_is_thinned_and_says_so() -> None:
    found = read(training={"train-cgd": steps(5000)})
    assert len(json.loads(found.attributes("data-points")[0])) <= plots.CHART_POINTS + 1
    assert "the log has all" in found.words


def test_bars_of_the_timeline_follow_the_clock() -> None:
    found = read(stages=(stage("prepare", 0, 10), stage("answer", 10, 40)), training={})
    bars = [(attributes["x"], attributes["width"]) for tag, attributes in found.elements if tag == "rect"]
    assert bars == [("0.00", "25.00"), ("25.00", "75.00")]


def test_a_long_pause_between_stages_is_left_out_and_told() -> None:
    found = read(stages=(stage("prepare", 0, 100), stage("answer", 9000, 9100)), training={})
    left, right = (float(str(attributes["width"])) for tag, attributes in found.elements if tag == "rect")
    assert left == pytest.approx(right)
    assert left > 40
    assert "Long pauses between stages are left out" in found.words


def test_rows_are_told_with_the_reasons_of_rejection() -> None:
    words = read(stages=(stage("answer", rejections={"truncated": 3, "empty": 1}),)).words
    assert "10 read = 9 kept + 1 rejected" in words
    assert "truncated 3 empty 1" in words
    assert "do not balance" not in words


def test_books_that_do_not_balance_are_named() -> None:
    lost = stage("answer", facts={"rows": {"total": 10, "done": 5, "rejected": 1}})
    assert "These counts do not balance" in read(stages=(lost,)).words


def test_data_quality_is_a_table_of_shares_with_what_they_are_of() -> None:
    words = Read(render(report_data(), QUALITY)).words.replace(THIN, " ")
    assert "Right refinementsof graded rows: what the student learns to say65.0 %13 of 20" in words
    assert "Right verdictsof verdicts given: the same verdict for every draft would have 72.2 %61.1 %11 of 18" in words
    assert "a critique of another row does by chance in 20.0 %" in words
    assert "on 20 rows: those of an even sample of 30 (of 40) whose reference ends on an answer, without 1" in words
    assert "right4 ✓agrees6 wrong17 ✓agrees missing02" in words
    assert "answer20" in words


def test_the_largest_groups_of_near_duplicates_are_shown_with_two_of_each() -> None:
    words = Read(render(report_data(), QUALITY)).words
    assert "The largest group of near-duplicate prompts 3 prompts, two of them" in words
    assert "Sue has 3 apples.Ann has 5 apples." in words
    alone = QUALITY.model_copy(update={"alike": ()})
    assert "of near-duplicate prompts" not in Read(render(report_data(), alone)).words


def test_accuracy_stands_beside_accuracy_without_the_questions_that_training_has_met() -> None:
    met = Paraphrased(benchmark="sums", question="q00", rows=2, id="r", sample=0, text="prompt", similarity=0.8)
    found = Decontamination(
        paraphrases="keep",
        similarity=0.5,
        compared=("sums", "IFEval"),
        unchecked={"IFEval": "<b>no hub</b>"},
        prepare_rows=2,
        check_rows=2,
        questions=(met,),
    )
    words = Read(render(report_data(decontamination=found))).words.replace(THIN, " ")
    assert "sumsbase25.0 %7.1 \u2013 59.114.3 %2.6 \u2013 51.31 of 8" in words
    assert "2 rows of the training have 50.0 % or more of the word triples" in words
    assert "Not compared with what training learns: IFEval (<b>no hub</b>)." in words
    removed = found.model_copy(update={"paraphrases": "remove", "unchecked": {}})
    words = Read(render(report_data(decontamination=removed))).words.replace(THIN, " ")
    assert "None: prepare has rejected 2 rows and check has left out 2 that have 50.0 % or more" in words
    assert "Not compared" not in words
    assert "in other words" not in Read(render(report_data())).words


def test_bad_data_is_named_at_the_top_with_a_way_to_its_table() -> None:
    found = Read(render(report_data(), QUALITY))
    assert "35.0 % of 20 refinements are wrong" in found.words
    assert found.attributes("href").count("#quality") == 2


@pytest.mark.parametrize(("step", "loss", "known"), [(1, 0.12, True), (1, 0.9, False), (5, 0.12, False)])
def test_a_training_whose_targets_the_untrained_student_could_write_is_named(
    step: int, loss: float, known: bool
) -> None:
    """Only the first step's loss is that of the untrained student."""
    words = read(training={"train-cgd": (Step(step=step, loss=loss), Step(step=step + 1, loss=0.05))}).words
    assert ("CGD: the untrained student's loss, on the first batch, was 0.12 nats a token" in words) is known


def test_all_cautions_are_in_one_folded_box_that_tells_their_number() -> None:
    outputs = {name: samples("+-", finish_reason="length") for name in ("base", "cgd", "cft", "sft")}
    words = Read(render(report_data(evaluations=outputs), QUALITY)).words
    box = words.index("6 reasons to doubt these figures")
    assert box < words.index("35.0 % of 20 refinements") < words.index("sums has only 2 questions")
    assert words.index("sums has only 2 questions") < words.index("Base on sums: 100.0 %")


def test_grades_that_lm_eval_judges_otherwise_are_shown_those_first_that_it_alone_calls_right() -> None:
    words = read(audit=audit()).words
    assert "Grades, judged again by lm-eval 1.2.3" in words
    assert "sumsCGD403 without a box111919 lm-eval takes" in words
    caution = "lm-eval alone calls 1 of 40 audited outputs right: the grader may be mistaken."
    first = "Right by lm-eval alone: 1 output sums \u00b7 CGD \u00b7 q7 \u00b7 grader: wrong \u00b7 lm-eval: right"
    second = "Right by the grader alone: 1 output sums \u00b7 CGD \u00b7 q8 \u00b7 grader: right \u00b7 lm-eval: wrong"
    texts = "Reference#### 4 End of the output wrong by value: 5So it is \\boxed{4}."
    assert "q8 \u00b7 no box \u00b7" in read(audit=audit(boxed=False)).words
    assert words.index(caution) < words.index(first) < words.index(texts) < words.index(second)


def test_published_figures_stand_beside_the_runs_own_and_what_is_missing_is_named() -> None:
    read = Read(render(repeated()))
    assert "#published" in read.attributes("href")
    words = read.words
    for said in (
        "arXiv 2505.11628v4, WebInstruct fine-tuning, LLaMA3.1-8B Instruct",
        "CGD+ CGD (ours) 75.0 %55.1 \u2013 88.0published 54.2\u25b2 +20.8 above it",
        "teacher GPT-4o, not this run\u2019snot in this run",
        "published 32.4its figures give 32.2",
        "2 published averages are not the mean of the figures beside them",
        "CFT: Avg. (G2) 32.4, its figures give 32.2; CFT, teacher GPT-4o: Avg. (G2) 36.4, its figures give 35.4.",
        "Published, and not asked in this run: BBH.",
        "Published, and not trained in this run: CFT.",
        "In this run, and not published there: AIME25, Refined SFT.",
    ):
        assert said in words


def test_without_published_figures_the_page_speaks_of_none() -> None:
    assert "ublished" not in read().words


def test_without_an_audit_the_page_speaks_of_none() -> None:
    assert "judged again" not in read().words


def test_without_a_verdict_nothing_is_said_of_calling_all_the_same() -> None:
    silent = QUALITY.model_copy(update={"graded": GRADED.model_copy(update={"verdicts_right": share(0, 0)})})
    assert "the same verdict" not in Read(render(report_data(), silent)).words


def test_rows_that_cannot_be_graded_are_told_what_they_lack() -> None:
    words = Read(render(report_data(), QUALITY.model_copy(update={"graded": None}))).words
    assert "no row of the sample has a reference that ends on an answer" in words
    assert "Verdicts against drafts" not in words


def test_what_prepare_has_removed_is_told_beside_the_duplicates_that_are_left() -> None:
    cleaned = stage("prepare", rejections={"duplicate": 3, "contaminated": 2, "empty": 1})
    words = Read(render(report_data(stages=(cleaned,)), QUALITY)).words
    assert "removed 3 exact duplicates and 2 prompts that share words with a benchmark." in words


def test_a_very_long_text_is_cut_with_a_note() -> None:
    long = Quadruples(total=1, verdicts={}, shown=(quadruple(critique="x" * 50_000),))
    (row,) = read(quadruples=long).rows
    assert len(row["critique"]) < TEXT_LIMIT + 100
    assert "[cut here: 46\u202f000 more characters]" in row["critique"]


def test_however_long_the_texts_are_the_page_is_small() -> None:
    text = "\u6578" * 100_000
    row = dict.fromkeys(("prompt", "reference", "answer", "critique", "refinement"), text)
    said = GradedOutput(output=text, extracted=text, correct=True)
    shown = tuple(quadruple(f"{i}", **row) for i in range(SHOWN))
    html = render(
        report_data(
            quadruples=Quadruples(total=100_000, verdicts={"wrong": 100_000}, shown=shown),
            changes=(change(prompt=text, reference=text, base=said, after=said),) * EXAMPLES,
            rejected=(Rejected(id="a", sample=0, stage="answer", reason="empty", detail=text, prompt=text),) * 40,
        )
    )
    # Three bytes a character.
    assert len(html.encode()) < 3 * TEXT_LIMIT * (5 * SHOWN + 4 * EXAMPLES + 2 * 40) + 500_000 < 17_000_000


def test_the_sample_of_quadruples_says_of_how_many_it_is() -> None:
    assert "1 of 3\u202f000 rows, an even sample" in read(
        quadruples=Quadruples(total=3000, verdicts={"wrong": 3000}, shown=(quadruple(),))
    ).text.replace("\n", " ")


def test_gpu_hours_are_told_at_the_top_and_stage_by_stage() -> None:
    engine = {"device": "cuda", "tensorParallel": 8, "shards": 1}
    found = read(stages=(stage("prepare", 0, 10), stage("answer", 10, 910, settings=engine)))
    assert "GPU-hours2 Results" in found.words
    assert "prepare10020010\u2013\u2013 answer10020090082" in found.words.replace(THIN, "")


def test_a_run_on_cpus_speaks_of_no_gpu() -> None:
    assert "GPU" not in read().words


def test_the_same_data_give_the_same_bytes() -> None:
    assert render(report_data()) == render(report_data())


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (number(None), "\u2013"),
        (number(math.nan), "\u2013"),
        (number(0), "0"),
        (number(1e-6), "1.00e-06"),
        (number(0.125), "0.125"),
        (number(12.345), "12.3"),
        (number(1234.5), "1\u202f234"),
        (number(123456789.0), "1.23e+08"),
        (count(1234567), "1\u202f234\u202f567"),
        (percent(0.12345), "12.3\u202f%"),
        (percent(math.nan), "\u2013"),
        (points(-0.0425), "\u22124.2"),
        (points(0.1), "+10.0"),
        (points(-1e-9), "\u00b10.0"),
        (duration(None), "\u2013"),
        (duration(59.4), "59\u202fs"),
        (duration(61), "1\u202fmin 01\u202fs"),
        (duration(7322), "2\u202fh 02\u202fmin"),
        (probability(0.0001), "p < 0.001"),
        (probability(0.0123), "p = 0.012"),
        (probability(1.0), "p = 1.00"),
    ],
)
def test_numbers_are_written_for_people(told: str, text: str) -> None:
    assert told == text


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.698, 2.9), (1.0, 1.0), (0.0, 0.0), (1e-9, 2e-9), (3, 9000)])
def test_ticks_are_few_rise_and_span_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert ticks[0] <= low <= high <= ticks[-1]
