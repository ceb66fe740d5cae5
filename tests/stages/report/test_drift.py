"""Whether the format drifted while mathematics moved: said of every trained model, and no more than the pairs show."""

import json

import pytest
from support.report_builders import report_data, samples, stage

from cgd_stages.report.__main__ import to_json
from cgd_stages.report.drift import Sentence
from cgd_stages.report.page import render
from cgd_stages.report.summary import against_base
from cgd_stages.results.comparison import table_of
from cgd_stages.results.model import ReportData, Sample

TASKS = {"IFEval": "ifeval", "IFEval-loose": "ifeval", "BBH": "bbh_cot_fewshot"}


def asked(**marks: str) -> tuple[Sample, ...]:
    """Outputs on benchmarks by name (`_` for -): + is right, - is wrong."""
    return tuple(one for name, mark in marks.items() for one in samples(mark, benchmark=name.replace("_", "-")))


def run(**evaluations: tuple[Sample, ...]) -> ReportData:
    tasks = [{"name": name, "task": task} for name, task in TASKS.items()]
    return report_data(stages=(stage("harness-base", inputs={"tasks": tasks}),), evaluations=evaluations)


def told(**evaluations: tuple[Sample, ...]) -> list[Sentence]:
    """What is said after the first sentence, which is of mathematics."""
    return said(run(**evaluations))[1:]


def said(data: ReportData) -> list[Sentence]:
    return against_base(data, table_of(data))


def test_a_significant_loss_on_ifeval_is_called_drift_beside_what_mathematics_gained() -> None:
    (one,) = told(base=asked(sums="-" * 20, IFEval="+" * 20), cgd=asked(sums="+" * 20, IFEval="-" * 12 + "+" * 8))
    assert one["outcome"] == "worse"
    assert one["claim"] == "CGD-trained against base, in points: sums +100.0, IFEval \u221260.0, and the format drifted"
    mathematics, form = one["detail"].split("; ")
    assert mathematics.startswith("95 % intervals: sums +")
    assert form == "IFEval \u221278.9 to \u221230.2 (p < 0.001): the format drifted"


@pytest.mark.parametrize(
    ("base", "after", "outcome"), [("+" * 20, "-----" + "+" * 15, "noise"), ("-" * 9, "+" * 9, "better")]
)
def test_without_a_significant_loss_no_more_is_said_than_the_prompts_can_show(
    base: str, after: str, outcome: str
) -> None:
    (one,) = told(base=asked(sums="+-", IFEval=base), cgd=asked(sums="+-", IFEval=after))
    assert one["outcome"] == outcome
    assert one["detail"].endswith(f": no drift that {len(base)} prompts can show")


def test_strict_and_loose_are_judged_each_in_one_sentence() -> None:
    (one,) = told(
        base=asked(sums="+-", IFEval="+" * 20, IFEval_loose="+" * 20),
        cgd=asked(sums="+-", IFEval="-" * 20, IFEval_loose="+" * 20),
    )
    assert "(p < 0.001): the format drifted; IFEval-loose" in one["detail"]
    assert one["detail"].endswith("(p = 1.00): no drift that 20 prompts can show")


def test_every_objective_has_its_own_sentence_and_a_rival_has_none() -> None:
    outputs = asked(sums="+-", IFEval="+-")
    found = said(run(base=outputs, cgd=outputs, sft=outputs, selfrefine=outputs))
    assert [one["claim"].split(" against")[0] for one in found if "against base" in one["claim"]] == [
        "CGD-trained", "SFT-trained",
    ]  # fmt: skip


def test_several_benchmarks_move_as_their_mean_does() -> None:
    (one,) = told(base=asked(a="----", b="++++", IFEval="+"), cgd=asked(a="++++", b="++++", IFEval="+"))[1:]
    assert "in points: the mean of 2 benchmarks +50.0, IFEval \u00b10.0" in one["claim"]
    assert one["detail"].endswith("no drift that 1 prompt can show")


def test_all_other_general_tasks_share_one_sentence() -> None:
    (_, one) = told(base=asked(sums="+", IFEval="+", BBH="+" * 9), cgd=asked(sums="+", IFEval="+", BBH="-" * 9))
    assert one == {
        "outcome": "worse",
        "claim": "Other general tasks: BBH",
        "detail": "CGD-trained worse on BBH (\u2212100.0 points, p = 0.004)",
    }
    (one,) = told(base=asked(sums="+", BBH="+"), cgd=asked(sums="+", BBH="-"))
    assert one["claim"] == "General tasks: BBH"
    assert one["detail"] == "1 of 1 differences within noise (p < 0.05 each)"


def test_nothing_is_said_where_tasks_or_mathematics_or_the_base_are_missing() -> None:
    assert told(base=asked(sums="+"), cgd=asked(sums="-")) == []
    assert told(base=asked(IFEval="+"), cgd=asked(IFEval="-")) == []
    assert told(base=asked(sums="+"), cgd=asked(sums="-", IFEval="-")) == []
    assert told(base=asked(sums="+", IFEval="+"), cgd=asked(IFEval="-"), sft=asked(sums="+")) == []


def test_general_tasks_have_no_part_in_the_sentences_about_the_benchmarks() -> None:
    outputs = asked(a="+-", b="+-", c="+-", d="+-", IFEval="--")
    first, *_ = said(run(base=outputs, cgd=outputs))
    assert first["claim"].endswith("the mean of 4 benchmarks")
    assert "base 50.0" in first["claim"]


def test_page_and_json_say_the_same() -> None:
    data = run(base=asked(sums="+-", IFEval="+" * 20), cgd=asked(sums="++", IFEval="-" * 20))
    summary = json.loads(to_json(data))["summary"]
    assert summary == said(data)
    assert "the format drifted." in render(data)
