"""The table of a comparison: its order, its mean, its marks, and what may not be compared."""

import math
from typing import Any

import pytest
from support.report_builders import report_data, samples, stage

from cgd_stages.errors import UserError
from cgd_stages.report.page import render
from cgd_stages.results.comparison import MEAN, Spread, Table, joined, over_seeds, robustness, table_of
from cgd_stages.results.formatting import THIN
from cgd_stages.results.model import Sample


def outputs(*marks: str) -> tuple[Sample, ...]:
    """Outputs on bench0, bench1, ...: + is right, - is wrong."""
    return tuple(one for i, mark in enumerate(marks) for one in samples(mark, benchmark=f"bench{i}"))


def table(*, critique: dict[str, Any] | None = None, **evaluations: tuple[Sample, ...]) -> Table:
    trained = tuple(stage(f"train-{name}", inputs={"critique": critique or {}}) for name in evaluations)
    return table_of(report_data(stages=trained, evaluations=evaluations))


def test_models_come_in_the_order_of_the_papers_table() -> None:
    names = ["cgd", "extra", "cft", "base", "refinedsft", "sft", "distilledsft"]
    found = table(**dict.fromkeys(names, samples("+-")))
    assert [line.name for line in found.lines] == [
        "base", "SFT", "Distilled SFT", "Refined SFT", "CFT", "CGD", "extra",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("critique", "name"),
    [
        ({"kind": "shuffled", "rate": 0.0}, "CGD (critique: shuffled)"),
        ({"kind": "corrupted", "rate": 0.25}, "CGD (25\u202f% of critiques corrupted)"),
        ({"kind": "miscritique", "rate": 1, "target": "kept"}, "CGD (100\u202f% miscritiques, target kept)"),
    ],
)
def test_an_ablation_is_named(critique: dict[str, Any], name: str) -> None:
    assert table(critique=critique, cgd=samples("+")).lines[0].name == name


@pytest.mark.parametrize(
    ("base", "after", "outcome"), [("-" * 9, "+" * 9, "better"), ("+" * 9, "-" * 9, "worse"), ("+-", "-+", "noise")]
)
def test_a_cell_says_whether_its_difference_to_base_is_noise(base: str, after: str, outcome: str) -> None:
    first, second = table(base=samples(base), cgd=samples(after)).lines
    assert first.cells["sums"].difference is None
    difference = second.cells["sums"].difference
    assert difference is not None
    assert difference.outcome == outcome
    assert difference.value == pytest.approx((after.count("+") - base.count("+")) / len(base))


def test_a_run_without_a_base_has_a_table_without_differences() -> None:
    (line,) = table(cgd=outputs("+-", "++")).lines
    assert [cell.difference for cell in line.cells.values()] == [None, None]
    assert line.mean is not None
    assert line.mean.difference is None


def test_in_the_mean_every_benchmark_has_the_same_weight() -> None:
    found = table(base=outputs("-" * 40, "----"), cgd=outputs("+" * 40, "----"))
    mean = found.lines[1].mean
    assert mean is not None
    assert (mean.accuracy, mean.n) == (0.5, 44)
    assert mean.difference is not None
    assert mean.difference.value == 0.5
    assert mean.difference.outcome == "better"


def test_general_tasks_have_a_column_and_no_part_of_the_mean() -> None:
    data = report_data(
        stages=(stage("harness-base", inputs={"tasks": [{"name": "bench2", "task": "ifeval"}]}),),
        evaluations={"base": outputs("++", "++", "++"), "cgd": outputs("++", "++", "--")},
    )
    found = table_of(data)
    assert found.columns == ("bench0", "bench1", "bench2", "mean")
    assert found.averaged == ("bench0", "bench1")
    assert [line.mean.accuracy for line in found.lines if line.mean] == [1, 1]
    assert [name for name, asked in found.questions.items() if asked.general] == ["bench2"]
    assert "general tasks, asked and graded by lm-eval, are not in it" in render(data)


def test_a_mean_that_gained_a_little_is_noise() -> None:
    mean = table(base=outputs("+---", "+---"), cgd=outputs("++--", "++--")).lines[1].mean
    assert mean is not None
    assert mean.difference is not None
    assert mean.difference.value == 0.25
    assert mean.difference.outcome == "noise"


def test_the_interval_of_a_mean_holds_the_benchmarks_uncertainty_also_where_all_is_right_or_wrong() -> None:
    line = table(cgd=outputs("++++", "----")).lines[0]
    mean, first, second = line.mean, line.cells["bench0"], line.cells["bench1"]
    assert mean is not None
    assert (first.high, second.low) == (1, 0)
    assert mean.low == pytest.approx(0.5 - (1 - first.low) / 2)
    assert mean.high == pytest.approx(0.5 + second.high / 2)


def test_the_mean_of_equal_benchmarks_is_as_certain_as_their_number_says() -> None:
    four, one = (table(cgd=outputs(*["+-" * 50] * k)).lines[0].mean for k in (4, 1))
    assert four is not None
    assert one is not None
    assert one.high - one.low == pytest.approx(2 * (four.high - four.low))


def test_how_much_longer_the_outputs_are_than_the_bases() -> None:
    def written(first: int, second: int) -> tuple[Sample, ...]:
        return samples("++", benchmark="bench0", tokens=first) + samples("+", benchmark="bench1", tokens=second)

    base, trained = table(base=written(100, 300), cgd=written(400, 400)).lines
    assert base.mean is not None
    assert trained.mean is not None
    assert (base.mean.tokens, base.mean.longer) == (200, None)
    assert (trained.cells["bench0"].longer, trained.mean.tokens, trained.mean.longer) == (4, 400, 2)


def test_outputs_of_a_silent_base_are_not_any_times_as_long() -> None:
    _, trained = table(base=samples("-", tokens=0), cgd=samples("+")).lines
    assert trained.cells["sums"].longer is None


def test_a_column_of_means_is_there_where_it_says_more_than_its_benchmark() -> None:
    assert table(base=outputs("+")).columns == ("bench0",)
    assert table(base=outputs("+", "-")).columns == ("bench0", "bench1", MEAN)


def test_the_mean_is_over_the_benchmarks_that_every_model_was_asked() -> None:
    found = table(base=outputs("+", "-", "+"), cgd=outputs("+", "-"))
    assert found.averaged == ("bench0", "bench1")
    assert [line.mean and line.mean.accuracy for line in found.lines] == [0.5, 0.5]


def test_the_best_of_a_column_is_its_highest_and_nothing_where_all_are_alike() -> None:
    found = table(base=outputs("+-", "+"), sft=outputs("++", "+"), cgd=outputs("++", "+"))
    assert found.best("bench0") == 1
    assert math.isnan(found.best("bench1"))


# --- several runs


def run(rate: float | None = None, base: str = "+---", after: str = "++--") -> Table:
    critique = None if rate is None else {"kind": "corrupted", "rate": rate}
    return table(critique=critique, base=samples(base), cgd=samples(after))


def test_bases_with_the_same_results_are_one_line_and_others_are_not() -> None:
    found = joined({"a": run(), "b": run(0.5), "c": run(base="++++")})
    assert [(line.model, line.runs) for line in found.lines] == [
        ("base", ("a", "b")), ("base", ("c",)), ("cgd", ("a",)), ("cgd", ("c",)), ("cgd", ("b",)),
    ]  # fmt: skip


def test_a_difference_stays_one_to_the_base_of_its_own_run() -> None:
    found = joined({"a": run(base="----"), "b": run(base="++++")})
    differences = [line.cells["sums"].difference for line in found.lines if line.model == "cgd"]
    assert [one and one.value for one in differences] == [0.5, -0.5]


def test_runs_that_were_asked_other_questions_are_refused_and_named() -> None:
    other = table(base=samples("+--"), cgd=samples("++-"))
    with pytest.raises(UserError, match=r"sums: 4 in a, 3 others in b; sums: 4 in a, 3 others in c"):
        joined({"a": run(), "b": other, "c": other})


@pytest.mark.parametrize("change", [{"prompt": "What?"}, {"reference": "5"}, {"id": "x"}])
def test_as_many_but_other_questions_are_refused_too(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not asked the same questions"):
        joined({"a": table(base=samples("+")), "b": table(base=samples("+", **change))})


def test_how_often_a_question_was_sampled_does_not_make_it_another() -> None:
    more = samples("+-") + samples("+-", sample=1)
    assert joined({"a": table(base=samples("+-")), "b": table(base=more)}).questions["sums"].n == 2


def test_a_benchmark_of_one_run_alone_is_a_column_but_not_in_the_mean() -> None:
    found = joined({"a": table(base=outputs("+", "-")), "b": table(base=outputs("+"))})
    assert tuple(found.questions) == ("bench0", "bench1")
    assert found.averaged == ("bench0",)


def seeded(seed: int, after: str, rate: str = "1e-6", **more: Any) -> Table:
    inputs = {"objective": "CGD", "training": {"learningRate": rate, "seed": seed}, **more}
    evaluations = {"base": samples("+---"), "cgd": samples(after)}
    return table_of(report_data(stages=(stage("train-cgd", inputs=inputs),), evaluations=evaluations))


def test_trainings_that_differ_in_their_seed_alone_are_taken_together() -> None:
    runs = {"a": seeded(0, "++--"), "b": seeded(1, "+++-"), "c": seeded(2, "++++")}
    (one,) = over_seeds(joined(runs))
    assert (one.name, one.runs) == ("CGD", ("a", "b", "c"))
    assert one.columns["sums"] == Spread(mean=0.75, deviation=0.25)


def test_what_differs_in_more_than_the_seed_or_not_even_in_it_is_not() -> None:
    rates = {"a": seeded(0, "++--"), "b": seeded(1, "+++-", rate="1e-5")}
    rows = {"a": seeded(0, "++--", upstream="x"), "b": seeded(1, "++--", upstream="y")}
    again = {"a": seeded(0, "++--"), "b": seeded(0, "++--")}
    assert [over_seeds(joined(runs)) for runs in (rates, rows, again, {"a": run(), "b": run()})] == [[], [], [], []]


def test_a_benchmark_that_one_of_the_seeds_was_not_asked_has_no_spread() -> None:
    one, other = seeded(0, "++--"), seeded(1, "+++-")
    more = table_of(
        report_data(
            stages=(stage("train-cgd", inputs={"objective": "CGD", "training": {"learningRate": "1e-6", "seed": 2}}),),
            evaluations={"cgd": samples("++--") + samples("+", benchmark="more")},
        )
    )
    assert [found.columns.keys() for found in over_seeds(joined({"a": one, "b": other, "c": more}))] == [{"sums"}]


def test_the_robustness_curve_has_the_uncorrupted_run_at_zero() -> None:
    found = joined({"a": run(0.5, after="+---"), "b": run(), "c": run(0.25)})
    (curve,) = robustness(found)
    assert [(point.rate, point.run, point.accuracy) for point in curve.points] == [
        (0.0, "b", 0.5), (0.25, "c", 0.5), (0.5, "a", 0.25),
    ]  # fmt: skip


def test_variants_of_one_run_are_named_with_their_objective_and_on_the_robustness_curve() -> None:
    made = {
        "cgd": {"objective": "CGD"},
        "cgd-some": {"objective": "CGD", "critique": {"kind": "corrupted", "rate": 0.3}},
        "cgd-few": {"objective": "CGD", "critique": {"kind": "corrupted", "rate": 0.1}},
        "mixed": {"objective": "CGD", "bareShare": 0.25},
        "sft-fast": {"objective": "SFT"},
    }
    evaluations = {"base": samples("----")} | {name: samples("++--") for name in made}
    trained = tuple(stage(f"train-{name}", inputs=inputs) for name, inputs in made.items())
    found = table_of(report_data(stages=trained, evaluations=evaluations))
    assert [line.name.replace(THIN, " ") for line in found.lines[1:]] == [
        "CGD",
        "mixed (CGD, 25 % on the prompt alone)",
        "sft-fast (SFT)",
        "cgd-few (CGD, 10 % of critiques corrupted)",
        "cgd-some (CGD, 30 % of critiques corrupted)",
    ]
    (curve,) = robustness(found)
    assert [(point.rate, point.wrong) for point in curve.points] == [(0.0, 0.0), (0.1, 0.1), (0.3, 0.3)]


def misled(name: str, rate: float, target: str, examples: float = 10.0, after: str = "+---") -> Table:
    """A run with one variant whose rows have miscritiques, `examples` of 40."""
    critique = {"kind": "miscritique", "rate": rate, "target": target}
    facts = {"metrics": {"misled_examples": examples, "train_examples": 40.0}}
    trained = stage(f"train-{name}", inputs={"objective": "CGD", "critique": critique}, facts=facts)
    return table_of(report_data(stages=(trained,), evaluations={"base": samples("+---"), name: samples(after)}))


def test_each_kind_and_target_is_a_curve_from_the_same_clean_training() -> None:
    runs = {
        "clean": run(),
        "refined": misled("cgd-refined", 0.5, "refined", 15.0, after="----"),
        "half": misled("cgd-half", 0.5, "kept"),
        "all": misled("cgd-all", 1.0, "kept", 38.0),
        "corrupted": run(0.25),
    }
    curves = {curve.name: [(at.rate, at.wrong, at.run) for at in curve.points] for curve in robustness(joined(runs))}
    clean = (0.0, 0.0, "clean")
    assert list(curves.items()) == [
        ("another prompt's critique under the opposite verdict", [clean, (0.25, 0.25, "corrupted")]),
        ("miscritique, target kept", [clean, (0.5, 0.25, "half"), (1.0, 0.95, "all")]),
        ("miscritique, target refined from it", [clean, (0.5, 0.375, "refined")]),
    ]


def test_a_matched_variant_with_other_settings_is_on_no_curve() -> None:
    made = {"cgd": {"objective": "CGD"}, "cgd-fast": {"objective": "CGD"}}
    trained = tuple(stage(f"train-{name}", inputs=inputs) for name, inputs in made.items())
    evaluations = {name: samples("+-") for name in made}
    one = table_of(report_data(stages=trained, evaluations={"base": samples("--"), **evaluations}))
    other = table_of(
        report_data(
            stages=(stage("train-cgd", inputs={"critique": {"kind": "corrupted", "rate": 1.0}}),),
            evaluations={"base": samples("--"), "cgd": samples("--")},
        )
    )
    (curve,) = robustness(joined({"one": one, "other": other}))
    assert [point.rate for point in curve.points] == [0.0, 1.0]


def test_without_corrupted_critiques_there_is_no_robustness_curve() -> None:
    assert robustness(joined({"a": run(), "b": run()})) == []


def test_a_table_is_read_from_its_json_as_it_was() -> None:
    found = joined({"a": run(), "b": run(0.5)})
    assert Table.model_validate_json(found.model_dump_json(by_alias=True)) == found
