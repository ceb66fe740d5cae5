"""Trained models against each other: what is paired, how it is tested, and what the numbers say."""

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from support.report_builders import report_data, sample, samples, stage

from cgd_stages.report.__main__ import to_json
from cgd_stages.results import head_to_head, statistics
from cgd_stages.results.answers import Answers
from cgd_stages.results.comparison import MEAN, Table, joined, table_of
from cgd_stages.results.head_to_head import HeadToHead, head_to_heads, without_answers
from cgd_stages.results.model import Sample

Outputs = tuple[Sample, ...]


def met(**evaluations: Outputs) -> tuple[HeadToHead, ...]:
    return head_to_heads(table_of(report_data(evaluations=evaluations)))


def one(**evaluations: Outputs) -> HeadToHead:
    (pair,) = met(**evaluations)
    return pair


def named(pairs: tuple[HeadToHead, ...]) -> list[tuple[str, str, str]]:
    return [(pair.column, pair.one.model, pair.other.model) for pair in pairs]


def tries(*marks: str, **changes: Any) -> Outputs:
    """For each question its outputs: + is right, - is wrong, ? could not be graded."""
    return tuple(
        sample(f"q{i:02d}", correct=mark == "+", sample=number, grade_error="timeout" * (mark == "?"), **changes)
        for i, question in enumerate(marks)
        for number, mark in enumerate(question)
    )


# --- who meets whom ----------------------------------------------------------------------------------------------


def test_cgd_meets_every_other_trained_model_once_and_neither_the_base_nor_its_rivals_of_more_passes() -> None:
    outputs = dict.fromkeys(["base", "selfrefine", "reflexion", "sft", "refinedsft", "cft", "cgd"], samples("+-"))
    assert named(met(**outputs)) == [("sums", "cgd", other) for other in ("sft", "refinedsft", "cft")]


def test_every_model_that_learned_by_cgd_meets_the_others_and_each_other_once() -> None:
    trained = {"cgd": "CGD", "quarter": "CGD", "half": "CGD", "cft": "CFT"}
    stages = tuple(stage(f"train-{name}", inputs={"objective": kind}) for name, kind in trained.items())
    table = table_of(report_data(stages=stages, evaluations=dict.fromkeys(trained, samples("+-"))))
    assert {(pair.one.model, pair.other.model) for pair in head_to_heads(table)} == {
        ("cgd", "cft"), ("cgd", "quarter"), ("cgd", "half"), ("quarter", "cft"), ("quarter", "half"), ("half", "cft"),
    }  # fmt: skip
    assert sorted(pair.tests for pair in head_to_heads(table)) == [1, 2, 2, 3, 3, 3]


def test_without_cgd_every_two_trained_models_meet() -> None:
    pairs = met(base=samples("+"), sft=samples("+"), refinedsft=samples("+"), cft=samples("+"))
    assert named(pairs) == [("sums", "sft", "refinedsft"), ("sums", "sft", "cft"), ("sums", "refinedsft", "cft")]


@pytest.mark.parametrize("evaluations", [{}, {"base": samples("+"), "cgd": samples("-")}, {"cft": samples("-")}])
def test_one_trained_model_or_none_has_no_opponent(evaluations: dict[str, Outputs]) -> None:
    assert met(**evaluations) == ()


def test_models_that_share_no_question_are_no_pair() -> None:
    assert met(cgd=samples("++"), cft=samples("++", benchmark="other")) == ()
    assert met(cgd=tries("?", "+"), cft=tries("+", "?")) == ()


# --- one output of a question: McNemar ---------------------------------------------------------------------------


def test_the_winner_is_named_with_the_exact_test_and_the_paired_interval() -> None:
    pair = one(cgd=samples("+" * 14 + "-" * 6), cft=samples("+" * 4 + "-" * 15 + "+"))
    assert (pair.n, pair.won, pair.lost, pair.left_out) == (20, 10, 1, 0)
    assert (pair.test, pair.interval, pair.tests) == ("mcnemar", "paired", 1)
    assert pair.p == pair.corrected == pytest.approx(2 * (1 + 11) / 2**11)
    assert pair.difference.value == pytest.approx(9 / 20)
    assert (pair.difference.low, pair.difference.high) == statistics.paired_interval(10, 1, 20)
    assert pair.difference.outcome == "better"
    assert (pair.one.accuracy, pair.other.accuracy) == (0.7, 0.25)
    assert (pair.one.seeds, pair.one.deviation) == (1, None)


def test_two_models_that_cannot_be_told_apart_say_what_would_have_shown() -> None:
    pair = one(cgd=samples("+" * 13 + "-" * 27), cft=samples("+" * 10 + "-" * 30))
    assert (pair.won, pair.lost, pair.p) == (3, 0, 0.25)
    assert pair.difference.outcome == "noise"
    assert pair.detectable == statistics.detectable(40, 3 / 40, 0.05)
    assert pair.detectable is not None
    assert pair.detectable > pair.difference.value


def test_a_pair_turned_round_has_the_same_test_and_the_opposite_difference() -> None:
    first, second = samples("++++--++-+-+++++"), samples("+---+---------+-")
    ahead, behind = one(cgd=first, cft=second), one(cgd=second, cft=first)
    assert (ahead.p, ahead.won, ahead.lost, ahead.detectable) == (behind.p, behind.lost, behind.won, behind.detectable)
    assert ahead.difference.value == -behind.difference.value
    assert (ahead.difference.low, ahead.difference.high) == pytest.approx(
        (-behind.difference.high, -behind.difference.low)
    )
    assert (ahead.difference.outcome, behind.difference.outcome) == ("better", "worse")


def test_of_one_question_nothing_can_be_shown() -> None:
    pair = one(cgd=samples("+"), cft=samples("-"))
    assert (pair.n, pair.p, pair.difference.value, pair.difference.outcome) == (1, 1.0, 1.0, "noise")
    assert pair.detectable is None


def test_models_that_answer_alike_are_within_noise_and_their_interval_is_not_a_point() -> None:
    pair = one(cgd=samples("+-" * 20), cft=samples("+-" * 20))
    assert (pair.p, pair.difference.value, pair.difference.outcome) == (1.0, 0.0, "noise")
    assert pair.difference.low < 0 < pair.difference.high
    assert pair.detectable == statistics.detectable(40, 0.0, 0.05)


# --- several outputs, several seeds: sign flips ------------------------------------------------------------------


def by_hand(differences: list[float]) -> float:
    """The share of all flips of the signs whose sum is as far from 0 as the observed."""
    flips = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(flip >= abs(sum(differences)) - 1e-9 for flip in flips) / len(flips)


def test_several_outputs_count_with_their_share_and_are_tested_over_all_flips() -> None:
    cgd = tries("++++", "+++-", "++--", "+++-", "----", "++++", "++--")
    cft = tries("++--", "+---", "+++-", "----", "----", "+---", "+---")
    pair, differences = one(cgd=cgd, cft=cft), [0.5, 0.5, -0.25, 0.75, 0, 0.75, 0.25]
    assert (pair.test, pair.interval, pair.n, pair.won, pair.lost) == ("signFlips", "resampled", 7, 5, 1)
    assert pair.p == pytest.approx(by_hand(differences))
    assert pair.difference.value == pytest.approx(sum(differences) / 7)
    assert (pair.difference.low, pair.difference.high) == statistics.difference_interval(differences)


def test_models_with_other_numbers_of_outputs_are_compared_by_their_shares() -> None:
    pair = one(cgd=tries("+++", "++-", "---", "+++"), cft=tries("+-", "--", "+-", "++"))
    assert pair.p == pytest.approx(by_hand([1 / 2, 2 / 3, -1 / 2, 0]))
    assert pair.test == "signFlips"
    assert (pair.won, pair.lost) == (2, 1)


def test_below_five_questions_no_interval_is_resampled() -> None:
    pair = one(cgd=tries("++", "+-", "++", "--"), cft=tries("--", "--", "+-", "+-"))
    assert pair.interval == "paired"
    assert (pair.difference.low, pair.difference.high) == statistics.paired_interval(2, 0.5, 4)


def seeded(seed: int, rate: str = "1e-6", **evaluations: Outputs) -> Table:
    stages = tuple(
        stage(f"train-{name}", inputs={"objective": name, "training": {"learningRate": rate, "seed": seed}})
        for name in evaluations
    )
    return table_of(report_data(stages=stages, evaluations=evaluations))


def test_seeds_are_taken_together_question_by_question_with_their_spread_beside() -> None:
    runs = {
        "a": seeded(0, cgd=samples("+++-"), cft=samples("+---")),
        "b": seeded(1, cgd=samples("++--"), cft=samples("+---")),
        "c": seeded(2, cgd=samples("++++"), cft=samples("+--+")),
    }
    (pair,) = head_to_heads(joined(runs))
    assert pair.test == "signFlips"
    assert (pair.one.runs, pair.one.seeds, pair.other.seeds) == (("a", "b", "c"), 3, 3)
    assert (pair.one.accuracy, pair.one.deviation) == (pytest.approx(0.75), pytest.approx(0.25))
    assert pair.other.deviation == pytest.approx(math.sqrt(1 / 48))
    differences = [0, 1, 2 / 3, 0]
    assert pair.difference.value == pytest.approx(sum(differences) / 4)
    assert pair.p == pytest.approx(by_hand(differences))


def test_seeds_of_one_model_meet_the_single_training_of_another() -> None:
    runs = {"a": seeded(0, cgd=samples("+++-"), cft=samples("+---")), "b": seeded(1, cgd=samples("++--"))}
    (pair,) = head_to_heads(joined(runs))
    assert (pair.one.seeds, pair.other.seeds, pair.other.runs) == (2, 1, ("a",))
    assert pair.p == pytest.approx(by_hand([0, 1, 0.5, 0]))


def test_a_training_that_two_runs_evaluated_counts_once() -> None:
    runs = {name: seeded(0, cgd=samples("+++-"), cft=samples("+---")) for name in ("a", "b")}
    (pair,) = head_to_heads(joined(runs))
    assert (pair.one.seeds, pair.test, pair.n) == (1, "mcnemar", 4)


def test_runs_meet_each_other() -> None:
    runs = {"a": seeded(0, cgd=samples("+-")), "b": seeded(0, rate="1e-5", cgd=samples("++"))}
    (pair,) = head_to_heads(joined(runs))
    assert (pair.one.runs, pair.other.runs, pair.won, pair.lost) == (("a",), ("b",), 0, 1)


def test_where_all_flips_are_too_many_some_are_drawn_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = {"cgd": tries(*["+++", "+--"] * 9), "cft": tries(*["++-", "++-"] * 5, *["---", "+--"] * 4)}
    exact = one(**evaluations)
    monkeypatch.setattr(statistics, "EXACT_WORK", 0)
    drawn = one(**evaluations)
    assert (exact.test, drawn.test) == ("signFlips", "drawnFlips")
    assert drawn.p == pytest.approx(exact.p, rel=0.05)
    assert drawn.p == one(**evaluations).p


# --- what is left out --------------------------------------------------------------------------------------------


def test_questions_that_one_of_the_two_has_no_grade_for_are_left_out_and_counted() -> None:
    pair = one(cgd=tries("+", "+", "?", "+", "-"), cft=tries("-", "+", "-", "?"))
    assert (pair.n, pair.left_out, pair.won, pair.lost) == (2, 3, 1, 0)
    assert (pair.one.accuracy, pair.other.accuracy) == (1.0, 0.5)


def test_a_question_without_a_grade_of_both_is_no_difference_between_them() -> None:
    assert one(cgd=tries("+", "?"), cft=tries("-", "?")).left_out == 0


def test_of_several_outputs_those_without_a_grade_are_left_out() -> None:
    pair = one(cgd=tries("+?+", "+--"), cft=tries("+--", "---"))
    assert (pair.n, pair.left_out) == (2, 0)
    assert pair.difference.value == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_a_question_that_one_seed_has_no_grade_for_is_left_out_of_all() -> None:
    runs = {
        "a": seeded(0, cgd=tries("+", "?", "+"), cft=tries("-", "-", "-")),
        "b": seeded(1, cgd=tries("+", "+", "-")),
    }
    (pair,) = head_to_heads(joined(runs))
    assert (pair.n, pair.left_out, pair.difference.value) == (2, 1, 0.75)


# --- several tests, several benchmarks ---------------------------------------------------------------------------


def test_the_rivals_of_one_benchmark_are_corrected_together() -> None:
    cgd = samples("+" * 12 + "-" * 8)
    pairs = met(cgd=cgd, sft=samples("-" * 20), cft=samples("+" * 5 + "-" * 15), refinedsft=samples("+" * 11 + "-" * 9))
    found = {pair.other.model: pair for pair in pairs}
    assert [found[name].p for name in ("sft", "cft", "refinedsft")] == pytest.approx([2 / 2**12, 2 / 2**7, 1.0])
    assert [found[name].corrected for name in ("sft", "cft", "refinedsft")] == pytest.approx([6 / 2**12, 4 / 2**7, 1.0])
    assert {pair.tests for pair in pairs} == {3}
    # Holm's first step is open to one pair that is within noise, so that is tested at the whole level.
    assert {pair.level for pair in pairs} == {0.05}
    assert [found[name].difference.outcome for name in ("sft", "cft", "refinedsft")] == ["better", "better", "noise"]


def test_what_is_significant_alone_may_be_noise_among_several() -> None:
    cgd, same = samples("+" * 6 + "-" * 14), samples("+" * 5 + "-" * 15)
    assert one(cgd=cgd, sft=samples("-" * 20)).difference.outcome == "better"
    among = met(cgd=cgd, sft=samples("-" * 20), cft=same, refinedsft=same)
    assert {pair.difference.outcome for pair in among} == {"noise"}
    assert {pair.level for pair in among} == {0.05 / 3}


def test_benchmarks_are_corrected_apart_and_their_mean_is_tested_by_itself() -> None:
    def both(first: str, second: str) -> Outputs:
        return samples(first, benchmark="large") + samples(second, benchmark="small")

    cgd, cft = both("+" * 9 + "-" * 3, "+--+"), both("+" * 3 + "-" * 9, "--++")
    pairs = {pair.column: pair for pair in met(cgd=cgd, cft=cft)}
    assert list(pairs) == ["large", "small", MEAN]
    assert {pair.tests for pair in pairs.values()} == {1}
    mean = pairs[MEAN]
    assert (mean.n, mean.won, mean.lost, mean.interval, mean.test) == (16, 7, 1, "combined", "signFlips")
    assert mean.difference.value == pytest.approx((0.5 + 0.0) / 2)
    # In the mean a question of the small benchmark weighs three times as much.
    assert mean.p == pytest.approx(by_hand([1] * 6 + [3, -3]))
    half = (pairs["large"].difference.value - pairs["large"].difference.low) ** 2
    half += (pairs["small"].difference.value - pairs["small"].difference.low) ** 2
    assert mean.difference.low == pytest.approx(0.25 - math.sqrt(half) / 2)


def test_a_benchmark_that_one_model_lacks_is_in_no_pair_of_it_and_not_in_the_mean() -> None:
    cgd = samples("+-", benchmark="a") + samples("++", benchmark="b") + samples("--", benchmark="c")
    cft = samples("+-", benchmark="a") + samples("--", benchmark="b")
    assert [pair.column for pair in met(cgd=cgd, cft=cft)] == ["a", "b", MEAN]


def test_where_nothing_is_true_a_winner_is_named_at_most_five_times_in_a_hundred() -> None:
    """Of a thousand small reports with three rivals that are as good as CGD."""
    rng = np.random.default_rng(7)
    chances = rng.beta(0.6, 0.9, (1000, 1, 40))
    right = rng.random((1000, 4, 40)) < chances
    won = (right[:, :1] & ~right[:, 1:]).sum(axis=2)
    lost = (~right[:, :1] & right[:, 1:]).sum(axis=2)
    alarms = [
        min(statistics.holm([statistics.sign_flip([1] * up + [-1] * down) for up, down in zip(*report, strict=True)]))
        < head_to_head.NOISE
        for report in zip(won.tolist(), lost.tolist(), strict=True)
    ]
    assert 0.005 < np.mean(alarms) <= 0.05


# --- as stored ---------------------------------------------------------------------------------------------------


def test_answers_are_read_as_they_were_written() -> None:
    table = table_of(report_data(evaluations={"cgd": tries("++-", "?-+", "???"), "cft": tries("+", "-", "+", "-")}))
    texts = {line.model: line.cells["sums"].answers for line in table.lines}
    assert texts == {"cgd": "2/3 1/2 0/0 0/0", "cft": "1/1 0/1 1/1 0/1"}
    assert Answers.read(texts["cgd"]).graded.tolist() == [3, 2, 0, 0]
    assert Answers.read("").graded.tolist() == []


@pytest.mark.parametrize("answers", ["2/1 0/1", "1/1", "1/1 1/1 1/1", "1 1", "1/1,1/1", "-1/1 0/1", "x"])
def test_answers_that_do_not_fit_the_questions_are_refused(answers: str) -> None:
    stored = json.loads(table_of(report_data(evaluations={"cgd": samples("+-")})).model_dump_json(by_alias=True))
    Table.model_validate(stored)
    stored["lines"][0]["cells"]["sums"]["answers"] = answers
    with pytest.raises(ValidationError, match="answers"):
        Table.model_validate(stored)


def test_reports_without_answers_are_named_and_their_models_meet_nobody() -> None:
    def earlier(table: Table) -> Table:
        stored = json.loads(table.model_dump_json(by_alias=True))
        for line in stored["lines"]:
            line.pop("objective")
            for cell in line["cells"].values():
                cell.pop("answers")
        return Table.model_validate(stored)

    new, other = seeded(0, cgd=samples("+-"), cft=samples("--")), seeded(0, rate="1e-5", cgd=samples("++"))
    table = joined({"new": new, "old": earlier(other)})
    assert without_answers(table) == ("old",)
    assert [(pair.one.runs, pair.other.runs) for pair in head_to_heads(table)] == [(("new",), ("new",))]
    assert without_answers(joined({"a": new, "b": other})) == ()


def test_report_json_has_every_pair() -> None:
    data = report_data(evaluations={"base": samples("+--"), "cgd": samples("++-"), "cft": samples("+--")})
    (stored,) = json.loads(to_json(data))["headToHead"]
    assert HeadToHead.model_validate(stored) == head_to_heads(table_of(data))[0]
    assert (stored["one"]["model"], stored["other"]["name"], stored["leftOut"]) == ("cgd", "CFT", 0)
    assert stored["difference"] | {"low": 0, "high": 0} == {"value": 1 / 3, "low": 0, "high": 0, "outcome": "noise"}
