"""What the page says word for word: prompts, manifest, places of models; and its first figure."""

import re
import shlex

import pytest
import yaml
from support.reading import Read
from support.report_builders import HOSTILE, report_data, samples, stage

from cgd_operator.api.spec import parse_spec
from cgd_stages.contract import StageName
from cgd_stages.method import prompts
from cgd_stages.report import figure, words
from cgd_stages.report.page import render
from cgd_stages.report.summary import seen
from cgd_stages.results.scores import comparisons

SPEC = """\
student: {model: org/student}
teacher: {model: org/teacher}
prompts: {source: s3://data/p.jsonl, fields: {prompt: question}}
storage: {uri: s3://data/runs}
"""


def test_each_prompt_is_shown_as_its_model_got_it() -> None:
    made = report_data(stages=tuple(stage(name) for name in ("answer", "critique", "refine")))
    asked = {one.what: one for one in words.asked(made)}
    assert list(asked["critique"].messages) == prompts.role_messages("critique", prompts.SLOTS)
    assert not asked["critique"].own
    shown = Read(render(made)).words
    for role in ("critique", "refine"):
        for message in asked[role].messages:
            assert " ".join(message["content"].split()) in " ".join(shown.split())


def test_the_manifests_own_words_are_shown_and_marked() -> None:
    own = "Judge the answer {answer} to {prompt}."
    made = report_data(stages=(stage("critique", inputs={"instruction": own}),))
    (asked,) = (one for one in words.asked(made) if one.what == "critique")
    assert asked.own
    assert [message["content"] for message in asked.messages] == ["Judge the answer {y'} to {x}."]
    shown = Read(render(made)).words
    assert "critique the manifest's own words" in " ".join(shown.split())


def test_the_manifest_is_one_that_the_api_takes() -> None:
    made = report_data(spec=SPEC)
    written = yaml.safe_load(words.manifest(made))
    assert (written["kind"], written["metadata"]) == ("CGDRun", {"name": "first-run", "namespace": "team"})
    assert parse_spec(written).student.model == "org/student"


def test_each_trained_model_is_told_with_the_commands_that_serve_it() -> None:
    made = report_data(stages=(stage("answer"), stage("train-cgd"), stage("train-sft")))
    found = words.places(made)
    assert [place.stage for place in found] == [StageName("train-cgd"), StageName("train-sft")]
    assert found[0].uri == "s3://data/team/train-cgd/train-cgd-digest/model"
    pull, serve = map(shlex.split, found[0].commands.splitlines())
    assert pull == ["cgd", "pull", "first-run", "-n", "team", "--stage", "train-cgd", "-o", "first-run-cgd"]
    assert serve == ["vllm", "serve", "first-run-cgd"]


@pytest.mark.parametrize(
    ("metric", "name"), [("supervised_tokens", "Target tokens"), ("some_new_figure", "Some new figure")]
)
def test_a_figure_has_a_name_and_no_raw_key(metric: str, name: str) -> None:
    assert words.named(metric) == name


def test_the_first_figure_has_a_row_for_each_model_and_stands_by_itself() -> None:
    made = report_data(evaluations={"base": samples("+---"), "cgd": samples("+++-")})
    drawn = figure.outcome(made)
    assert drawn is not None
    base, trained = drawn["rows"]
    assert (base.name, trained.name) == ("base", "CGD")
    assert base.low < base.x < base.high
    assert base.x < trained.x
    assert "base 25.0" in drawn["label"]
    html = render(made)
    (svg,) = re.findall(r'<svg id="outcome".*?</svg>', html, re.DOTALL)
    assert "var(" not in svg
    assert "class=" not in svg, "a copy has no style sheet"
    assert "Copy as SVG" in html
    assert "Save as PNG" in html


def test_without_two_models_there_is_no_figure() -> None:
    alone = report_data(evaluations={"base": samples("+-")})
    assert figure.outcome(alone) is None
    assert 'id="outcome"' not in render(alone)


def test_a_hostile_benchmark_stays_text_in_the_figure() -> None:
    outputs = {name: samples("+-", benchmark=HOSTILE) for name in ("base", "cgd")}
    html = render(report_data(evaluations=outputs))
    assert "<script>alert" not in html


@pytest.mark.parametrize(
    ("base", "after", "told"),
    [
        ("+-" * 16, "-+" * 16, "points cannot be seen with 32 questions"),
        ("+-", "-+", "no gain can be seen with 2 questions"),
    ],
)
def test_a_difference_within_noise_says_what_could_have_been_seen(base: str, after: str, told: str) -> None:
    made = report_data(evaluations={"base": samples(base), "cgd": samples(after)})
    (pair,) = comparisons(made)
    assert seen(pair).endswith(told)
    assert seen(pair) in Read(render(made)).words
