"""The page says which figures may explain an outcome: losses in two contexts, right drafts, verdicts and targets."""

import html
import json
import re
from typing import Any

import pytest
from support.report_builders import QUALITY, report_data, stage

from cgd_stages.report.__main__ import to_json
from cgd_stages.report.page import render
from cgd_stages.report.reasons import reasons
from cgd_stages.results.model import ReportData, Step

LOG = (
    Step(step=1, loss=1.5),
    Step(step=2, loss=0.5, validation_loss=0.1, bare_validation_loss=0.75),
    Step(step=3, loss=0.4, validation_loss=0.2, bare_validation_loss=0.7),
)


BY_BARE = {"validation": {"select": "bare"}}


def trained(log: tuple[Step, ...] = LOG, *, exported: int = 2, **inputs: Any) -> ReportData:
    facts = {"metrics": {"exported_step": float(exported)}}
    train = stage("train-cgd", facts=facts, inputs={"objective": "CGD", "training": BY_BARE, **inputs})
    return report_data(stages=(train,), training={"train-cgd": log})


def figures(report: ReportData) -> dict[str, str]:
    return {reason.name: reason.figure for reason in reasons(report, QUALITY)}


def test_the_distance_between_the_contexts_is_of_the_model_that_was_exported() -> None:
    first, *_ = reasons(trained(), QUALITY)
    assert first.name == "CGD: loss on held-out refinements"
    assert first.figure.startswith("0.10 nats a token in its context, 0.75 on the prompt alone; untrained 1.50 in its")
    assert "distance of 0.65" in first.means
    assert "0.20 nats a token in its context, 0.70" in next(iter(figures(trained(exported=3)).values()))


@pytest.mark.parametrize("log", [(), LOG[:1], (Step(step=2, validation_loss=0.1),)])
def test_without_held_out_prompts_there_is_no_distance(log: tuple[Step, ...]) -> None:
    assert list(figures(trained(log))) == ["Right drafts", "Right verdicts", "Right refinements"]


def test_the_rows_figures_have_their_intervals_and_what_one_verdict_would_reach() -> None:
    assert QUALITY.graded
    found, right = figures(trained()), QUALITY.graded.verdicts_right
    assert found["Right verdicts"].startswith(f"{100 * right.share:.1f}")
    assert f"would reach {100 * QUALITY.graded.constant:.1f}" in found["Right verdicts"]
    assert f"{100 * QUALITY.graded.drafts_right.low:.1f} to" in found["Right drafts"]


def test_a_run_without_cgd_or_without_an_evaluation_has_none() -> None:
    assert reasons(trained(objective="CFT"), QUALITY) == []
    assert reasons(trained().model_copy(update={"evaluations": {}}), QUALITY) == []


def test_page_and_json_have_them() -> None:
    report = trained()
    page = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", render(report, QUALITY))).split())
    assert "What may explain it" in page
    assert "0.10 nats a token in its context, 0.75 on the prompt alone" in page
    assert "What may explain it" not in render(report_data(), QUALITY)
    stored = json.loads(to_json(report, QUALITY))["reasons"]
    assert [reason["name"] for reason in stored] == list(figures(report))
