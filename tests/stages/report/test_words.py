"""What the page says word for word: prompts, manifest, places of models; and its first figure."""

import re
import shlex

import pytest
import yaml
from support.reading import Read
from support.report_builders import HOSTILE, RUN, report_data, samples, stage

from cgd_operator.api.spec import parse_spec
from cgd_stages.contract import StageName
from cgd_stages.method import prompts
from cgd_stages.report import figure, words
from cgd_stages.report.page import TEXT_LIMIT, render
from cgd_stages.report.summary import seen
from cgd_stages.results.model import Masked
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
    serve, _, pull = map(shlex.split, found[0].commands.splitlines())
    place = ["first-run", "-n", "team", "--stage", "train-cgd", "-o", "first-run-cgd"]
    assert pull == ["cgd", "pull", *place]
    assert serve == ["cgd", "serve", *place, "--run"]


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


OLDER = {"made by": {"run": "first-try", "uid": "another", "versions": {"vllm": "0.31", "torch": "2.9"}}}
OURS = {"made by": {"run": "first-run", "uid": RUN.uid, "versions": {"vllm": "0.32", "torch": "2.9"}}}


def test_versions_and_devices_are_told_once_and_with_their_stages_where_they_differ() -> None:
    made = report_data(
        stages=(
            stage("answer", settings=OLDER | {"device": "cuda", "deviceName": "NVIDIA H200"}),
            stage("refine", settings=OURS | {"device": "cuda", "deviceName": "NVIDIA H200"}),
            stage("train-cgd", settings=OURS),
            stage("evaluate-base"),
        )
    )
    assert dict(words.made_with(made)) == {
        "vllm": "0.31 (answer); 0.32 (refine, train-cgd)",
        "torch": "2.9",
        "Device": "NVIDIA H200",
    }
    shown = Read(render(made)).words
    assert "vllm0.31 (answer); 0.32 (refine, train-cgd)" in shown
    assert "DeviceNVIDIA H200" in shown


def test_stages_that_another_run_has_made_are_marked_and_named() -> None:
    made = report_data(
        stages=(stage("prepare", settings=OLDER), stage("answer", settings=OLDER), stage("refine", settings=OURS))
    )
    html = render(made)
    assert "Found in the store, made by an earlier run: prepare and answer (by first-try)." in Read(html).words
    assert html.count('class="stage found"') == 2


def test_a_run_that_has_made_everything_itself_has_no_such_mark() -> None:
    html = render(report_data(stages=(stage("prepare", settings=OURS), stage("answer"))))
    assert "Found in the store" not in Read(html).words
    assert 'class="stage found"' not in html


def test_the_example_of_a_training_marks_what_is_learned() -> None:
    shown = Masked(
        stage=StageName("train-cgd"),
        title="CGD",
        id="00",
        sample=0,
        context="<|user|>" + "x" * TEXT_LIMIT + f"{HOSTILE}<|assistant|>",
        target="2 + 2 = 4<|end|>",
        context_tokens=90,
        target_tokens=9,
    )
    html = render(report_data(masked=(shown,)))
    found = Read(html).words
    assert "One example, as the student sees it: 90 tokens read, 9 learned" in found
    assert '<mark class="learned">2 + 2 = 4&lt;|end|&gt;</mark>' in html
    assert "<|assistant|>2 + 2 = 4" in found, "the end of a long context is what stands before the target"
    assert "<|user|>x" not in found
    assert "<script>alert" not in html
    assert "characters before]" in found
    assert "--mask CGD" in found


def test_the_paper_is_a_link() -> None:
    assert '<a href="https://arxiv.org/abs/2505.11628">' in render(report_data())
