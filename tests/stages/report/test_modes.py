"""The page says how the models were spoken to, where they think, and warns where modes differ."""

import html
import re
from typing import Any

import pytest
from support.report_builders import report_data, sample, samples, stage

from cgd_stages.contract import Chat
from cgd_stages.report.modes import modes
from cgd_stages.report.page import render
from cgd_stages.report.summary import cautions
from cgd_stages.results.model import UNFINISHED_THOUGHT

ON, OFF = ({"chat": {"thinking": thinking, "rendering": "abc"}} for thinking in ("on", "off"))
DATED = {"chat": {"date": "2026-11-29", "rendering": "abc"}}


def words(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def told(**changes: Any) -> dict[str, str]:
    return modes(report_data(**changes))


def test_models_without_thoughts_and_templates_of_their_own_need_no_word() -> None:
    assert told() == {}
    assert "Thinking" not in words(render(report_data()))


@pytest.mark.parametrize(
    ("thinking", "inputs", "said"),
    [("learn", ON, "on, the teacher's thoughts are learned"), ("drop", OFF, "off")],
)
def test_the_students_mode_stands_at_the_top_with_what_is_learned_of_thoughts(
    thinking: Any, inputs: dict[str, Any], said: str
) -> None:
    stages = (stage("answer", inputs=inputs), stage("critique", inputs=ON))
    data = report_data(stages=stages, thinking=thinking)
    assert modes(data) == {"Thinking": said, "Teacher's thinking": "on"}
    assert f"Thinking {said}" in words(render(data))


def test_the_mode_is_known_of_any_stage_that_spoke_to_the_student() -> None:
    assert told(stages=(stage("evaluate-base", inputs=ON),), thinking="learn")["Thinking"].startswith("on")


def test_a_date_is_named_only_where_a_template_writes_it() -> None:
    chat = Chat(date="2026-11-29")
    assert told(stages=(stage("answer"),), student_chat=chat) == {}
    assert told(stages=(stage("answer", inputs=DATED),), student_chat=chat) == {"Date in the templates": "2026-11-29"}


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages }}", "written in the manifest"),
        ("configmap://templates/mine.jinja", "configmap://templates/mine.jinja"),
    ],
)
def test_a_template_that_replaces_the_models_own_is_named(template: str, said: str) -> None:
    assert told(student_chat=Chat(template=template)) == {"Chat template": said}
    assert told(teacher_chat=Chat(template=template)) == {"Teacher's chat template": said}


def test_targets_without_a_thought_are_named_where_thoughts_are_learned() -> None:
    metrics = {"train_examples": 8.0, "validation_examples": 2.0}
    stages = (
        stage("train-sft", facts={"metrics": metrics | {"without_thought": 10.0}}),
        stage("train-cgd", facts={"metrics": metrics | {"without_thought": 0.0}}),
        stage("train-cft", facts={"metrics": metrics}),
    )
    said = [caution for caution in cautions(report_data(stages=stages)) if "no thought of a teacher" in caution]
    assert len(said) == 1
    assert said[0].startswith("SFT: 10 of 10 targets have no thought of a teacher")


def test_tasks_that_were_asked_without_thoughts_are_named_with_the_reason_once_for_all_models() -> None:
    settings = {
        "TruthfulQA": {"metric": "acc", "without_thought": "likelihood"},
        "HumanEval": {"metric": "pass@1", "without_thought": "begun"},
        "IFEval": {"metric": "acc"},
    }
    stages = tuple(stage(f"harness-{model}", settings=settings) for model in ("base", "cgd"))
    asked = [caution for caution in cautions(report_data(stages=stages)) if "asked without thoughts" in caution]
    assert [caution.partition(". ")[0] for caution in asked] == [
        "TruthfulQA: asked without thoughts, because lm-eval compares the likelihoods of its choices",
        "HumanEval: asked without thoughts, because lm-eval writes the beginning of each reply",
    ]


def test_outputs_without_an_answer_because_the_thought_never_ended_are_counted_on_the_page() -> None:
    outputs = (*samples("+++"), sample("x", correct=False, answer_source=UNFINISHED_THOUGHT))
    data = report_data(evaluations={"base": outputs})
    assert (
        "Base on sums: no answer was found in 25.0\u202f% of the outputs; in 25.0\u202f% the thought never ended."
        in cautions(data)
    )
    assert "1 in a thought" in words(render(data))
