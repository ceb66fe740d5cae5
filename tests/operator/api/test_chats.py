"""How models are spoken to, as a manifest says it: what the API server and the operator take and refuse alike, and what
every task is told."""

import copy
from typing import Any

import pytest
from support.builders import manifest

from cgd_local import schema
from cgd_operator import yamls
from cgd_operator.api.crd import crd
from cgd_operator.api.spec import InvalidRun, parse_spec
from cgd_operator.planning.dag import Child, Run, plan
from cgd_operator.planning.manifests import configmaps
from cgd_stages import contract
from cgd_stages.contract import Chat

SPEC = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
ENDPOINT = {"endpoint": {"url": "https://t.example/v1", "model": "big"}}
BOTH = {"messages": "m", "prompt": "q", "reference": "r"}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
THOUGHTS = {"student.chat": {"thinking": "on"}}


def server_says(changes: dict[str, Any]) -> str:
    """What the API server says of a manifest; empty: it takes it."""
    spec = copy.deepcopy(manifest(changes)["spec"])
    schema.prune(SPEC, spec)
    schema.default(SPEC, spec)
    return "; ".join(cause.message for cause in schema.validate(SPEC, spec))


def operator_says(changes: dict[str, Any]) -> str:
    try:
        parse_spec(manifest(changes))
    except InvalidRun as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"student.chat": {"thinking": "on"}, "training.thinking": "drop"}, "learn goes with student.chat.thinking on"),
        ({"student.chat": {"thinking": "off"}, "training.thinking": "learn"}, "drop with off"),
        ({"student.chat": {"thinkingBudget": 64}}, "leave it out, or set training.thinking to learn"),
        ({"student.chat": {"thinkingBudget": 64, "thinking": "off"}}, "this student does not think"),
        ({"student.chat": {"thinkingBudget": 64}, "training.thinking": "drop"}, "this student does not think"),
        ({"student.chat": {"template": "chatml"}}, "write the text of a Jinja template"),
        ({"student.chat": {"template": "configmap://only-a-name"}}, "configmap://name/key or s3://bucket/key"),
        ({"teacher.chat": {"template": "s3://bucket-alone"}}, "configmap://name/key or s3://bucket/key"),
        ({"teacher": {**ENDPOINT, "chat": {"template": TEMPLATE}}}, "are for a model that the run serves"),
        ({"teacher": {**ENDPOINT, "chat": {"reasoningParser": "qwen3"}}}, "are for a model that the run serves"),
        (
            {"teacher": {**ENDPOINT, "maxModelLen": 4096}},
            "an engine's other fields are for a model that the run serves",
        ),
        (
            {"teacher": {**ENDPOINT, "tensorParallel": 2}},
            "an engine's other fields are for a model that the run serves",
        ),
        ({"teacher": {**ENDPOINT, "speculative": {"method": "ngram"}}}, "an engine's other fields"),
        ({"teacher": {**ENDPOINT, "chat": {"date": "2026-01-31"}}}, "are for a model that the run serves"),
        ({"prompts.fields": {"messages": "m", "prompt": "nosuch"}}, "messages takes the place of prompt: leave one"),
        (
            {"evaluation.benchmarks": [{"name": "b", "source": "s3://b/c.jsonl", "fields": BOTH}]},
            "messages takes the place of prompt",
        ),
    ],
)
def test_server_and_operator_refuse_with_the_same_words(changes: dict[str, Any], mend: str) -> None:
    assert mend in server_says(changes)
    assert mend in operator_says(changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"student.chat": {"thinking": "maybe"}},
        {"student.chat": {"thinking": True}},
        {"student.chat": {"date": "2026-13-01"}},
        {"student.chat": {"date": "today"}},
        {"student.chat": {"thinkingBudget": 0}},
        {"student.chat": {"template": "{" * 8193}},
        {"student.chat": {"reasoningParser": "qwen9"}},
        {"student.chat": {"reasoningParser": "hf"}},
        {"training.thinking": "learned"},
        {"evaluation.models": ["base", "base"]},
        {"evaluation.tasks": [{"name": "IFEval"}, {"name": "IFEval", "maxTokens": 2048}]},
        {"prompts.decontaminate": {"against": ["arithmetic", "arithmetic"]}},
        {"teacher": {"endpoint": {**ENDPOINT["endpoint"], "omit": ["seed", "seed"]}}},
        {"student.speculative": {"method": "custom_class"}},
        {"student.quantization": "a b"},
        {"generation.answer": {"topK": 0}},
        {"generation.answer": {"minP": "1.5"}},
        {"generation.answer": {"repetition": {"minTokens": 8}}},
        {"teacher": {"endpoint": {**ENDPOINT["endpoint"], "tokenField": "maxTokens"}}},
        {"teacher": {"endpoint": {**ENDPOINT["endpoint"], "omit": ["max_tokens"]}}},
    ],
    ids=str,
)
def test_server_and_operator_refuse_a_wrong_value(changes: dict[str, Any]) -> None:
    assert server_says(changes)
    assert operator_says(changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"student.chat": {"thinking": "on"}, "training.thinking": "learn"},
        {"student.chat": {"thinking": "off"}, "training.thinking": "drop"},
        {"training.thinking": "learn"},
        {"training.thinking": "learn", "student.chat": {"thinkingBudget": 64}},
        {"student.chat": {"thinking": "on", "thinkingBudget": 64}},
        {"student.chat": {"template": TEMPLATE, "templateKwargs": {"reasoning_effort": "low", "tools": False, "n": 2}}},
        {"teacher.chat": {"template": "configmap://templates/teacher.jinja", "reasoningParser": "deepseek_r1"}},
        {"teacher.chat": {"template": "s3://bucket/a/b.jinja", "thinkingBudget": 512, "date": "2024-02-29"}},
        {"teacher": {**ENDPOINT, "chat": {"thinking": "off", "thinkingBudget": 8}}},
        {"teacher": {**ENDPOINT, "shards": 2, "tensorParallel": 1, "dtype": "auto"}},
        {"teacher": {"endpoint": {**ENDPOINT["endpoint"], "timeoutSeconds": 3600}}},
        {"teacher": {"endpoint": {**ENDPOINT["endpoint"], "omit": ["temperature", "seed"], "extraBody": {"a": [0.5]}}}},
        {
            "student": {
                "model": "m",
                "quantization": "fp8",
                "kvCacheDtype": "fp8_e5m2",
                "speculative": {"method": "ngram"},
            }
        },
        {"generation.answer": {"temperature": "1", "topK": 20, "minP": "0.05", "repetition": {"stop": False}}},
    ],
    ids=str,
)
def test_server_and_operator_take_what_is_right(changes: dict[str, Any]) -> None:
    assert server_says(changes) == operator_says(changes) == ""


def test_an_unknown_form_of_thoughts_is_refused_with_the_names_that_exist() -> None:
    for told in (server_says, operator_says):
        said = told({"student.chat": {"reasoningParser": "deepseek-r1"}})
        assert "reasoningParser" in said or "deepseek-r1" in said
        assert all(name in said for name in ("deepseek_r1", "qwen3", "s1"))


def test_on_and_off_without_quotes_are_what_yaml_takes_for_true_and_false() -> None:
    (written,) = yamls.load_all("{student.chat: {thinking: on}, teacher.chat: {thinking: off}}")
    told = operator_says(written)
    assert 'spec.student.chat.thinking: write it in quotes: "on"' in told
    assert 'spec.teacher.chat.thinking: write it in quotes: "off"' in told


def test_what_no_schema_can_say_of_free_objects_the_operator_says() -> None:
    """The API server cannot look into them."""
    kwargs = {"student.chat": {"templateKwargs": {"effort": 0.5, "tools": []}}}
    assert "effort, tools: write text, a whole number, true or false" in operator_says(kwargs)
    body = {"teacher": {"endpoint": {**ENDPOINT["endpoint"], "extraBody": {"stream": True}}}}
    assert "the run sets stream of a request" in operator_says(body)


@pytest.mark.parametrize(
    ("name", "value", "mend"),
    [
        ("add_generation_prompt", False, "the run sets add_generation_prompt of a template: leave it out"),
        ("messages", "x", "the run sets messages of a template"),
        ("return_dict", True, "the run sets return_dict of a template"),
        ("enable_thinking", True, "enable_thinking: set the chat's field thinking to on or off instead"),
        ("thinking", False, "thinking: set the chat's field thinking"),
        ("enable_thinking", "false", "enable_thinking: set the chat's field thinking to on or off instead"),
        ("enable_thinking", "True", "enable_thinking: set the chat's field thinking"),
        ("enable_thinking", 0, "enable_thinking: set the chat's field thinking"),
        ("thinking", 1, "thinking: set the chat's field thinking"),
        ("reasoning", "off", "reasoning: set the chat's field thinking"),
        ("add_vision_id", "False", "add_vision_id: write true or false without quotes"),
    ],
)
def test_variables_that_the_run_sets_itself_are_refused_with_the_field_that_says_it(
    name: str, value: Any, mend: str
) -> None:
    for model in ("student", "teacher"):
        told = operator_says({f"{model}.chat": {"templateKwargs": {name: value}}})
        assert f"spec.{model}.chat.templateKwargs: " in told
        assert mend in told


@pytest.mark.parametrize("day", ["2026-02-30", "2023-02-29", "2100-02-29", "2026-04-31", "0000-01-01"])
def test_a_day_that_does_not_exist_is_refused_before_anything_runs(day: str) -> None:
    """The API server knows it by the format that the schema names."""
    told = operator_says({"student.chat": {"date": day}})
    assert "spec.student.chat.date: " in told
    assert "no day of the calendar" in told
    assert SPEC["properties"]["student"]["properties"]["chat"]["properties"]["date"]["format"] == "date"


def children(changes: dict[str, Any] | None = None) -> dict[str, Child]:
    body = manifest(changes)
    body["metadata"]["creationTimestamp"] = "2026-03-01T23:59:59Z"
    return {child.stage: child for child in plan(Run.of(body))}


def told(made: dict[str, Child]) -> dict[str, list[Chat]]:
    """The chats of the student and of the teacher in every task."""
    found: dict[str, list[Chat]] = {"student": [], "teacher": []}
    for child in made.values():
        match child.task.work:
            case contract.Prepare() as work:
                found["student"] += [work.student_chat, work.training.chat]
                found["teacher"].append(work.teacher_chat)
            case contract.Generate() as work:
                found["student" if work.roles == ("answer",) else "teacher"].append(work.chat)
            case contract.Check() as work:
                found["student"] += [training.chat for training in work.trainings]
            case contract.Train() | contract.Evaluate() | contract.Harness() as work:
                found["student"].append(work.chat)
            case contract.Report() as work:
                found["student"].append(work.student_chat)
                found["teacher"].append(work.teacher_chat)
    return found


EVERYTHING = {
    "training.objectives": ["CGD", "DistilledSFT"],
    "evaluation.tasks": [{"name": "IFEval"}],
    "evaluation.rivals": [{"kind": "SelfRefine"}],
}


@pytest.mark.parametrize(
    ("changes", "thinking", "learned"),
    [
        ({}, "off", "drop"),
        ({"student.chat": {"thinking": "on"}}, "on", "learn"),
        ({"training.thinking": "learn"}, "on", "learn"),
        ({"student.chat": {"thinking": "off"}}, "off", "drop"),
        ({"training.thinking": "drop"}, "off", "drop"),
    ],
)
def test_the_student_answers_learns_and_is_evaluated_in_one_mode(
    changes: dict[str, Any], thinking: Any, learned: str
) -> None:
    made = children(EVERYTHING | changes)
    expected = Chat(thinking=thinking, date="2026-03-01")
    found = told(made)["student"]
    assert found == [expected] * len(found)
    assert len(found) == 2 + 1 + 2 + 2 + 4 + 3 + 1  # prepare, answer, check, train, evaluate, harness, report
    trainings = [child.task.work for child in made.values() if isinstance(child.task.work, contract.Train)]
    assert {work.thinking for work in trainings} == {learned}


def test_the_teacher_thinks_as_it_is_told_to_or_as_its_template_does() -> None:
    assert set(map(str, told(children(EVERYTHING))["teacher"])) == {str(Chat(date="2026-03-01"))}
    given = {"teacher.chat": {"thinking": "on", "date": "2020-02-02", "templateKwargs": {"effort": "high"}}}
    found = told(children(EVERYTHING | given))["teacher"]
    assert found == [Chat(thinking="on", date="2020-02-02", template_kwargs={"effort": "high"})] * 4


def test_an_endpoint_is_told_no_date() -> None:
    assert {chat.date for chat in told(children({"teacher": ENDPOINT}))["teacher"]} == {None}


def test_a_manifest_that_was_never_applied_has_no_date() -> None:
    work = plan(Run.of(manifest()))[0].task.work
    assert isinstance(work, contract.Prepare)
    assert work.student_chat == Chat(thinking="off")


def test_prepare_alone_is_given_the_files_of_templates() -> None:
    given = {"student.chat": {"template": "configmap://templates/s.jinja"}}
    given["teacher.chat"] = {"template": "configmap://templates/t.jinja"}
    made = children(given)
    assert configmaps(made["prepare"].task)["templates"] == {"s.jinja", "t.jinja"}
    assert [stage for stage, child in made.items() if configmaps(child.task)] == ["prepare"]


def shown(changes: dict[str, Any]) -> str:
    work = children(changes)["report"].task.work
    assert isinstance(work, contract.Report)
    return work.spec


def test_the_spec_on_the_page_names_the_mode_where_the_manifest_says_anything_of_chats() -> None:
    assert "thinking" not in shown({})
    for changes in ({"training.thinking": "learn"}, THOUGHTS):
        assert "thinking: 'on'" in shown(changes)
        assert "thinking: learn" in shown(changes)


@pytest.mark.parametrize(
    ("sampling", "entered"),
    [
        ({}, {}),
        ({"topK": 20, "minP": "0.1"}, {"topK": 20, "minP": 0.1}),
        ({"repetition": {"stop": False}}, {"repetition": {"stop": False, "minTokens": 512, "minRepeats": 32}}),
    ],
)
def test_new_fields_of_the_sampling_enter_a_digest_only_where_they_are_given(sampling: Any, entered: Any) -> None:
    spec = parse_spec(manifest({"generation.answer": sampling}))
    before = {"maxTokens": 16384, "temperature": 0.0, "topP": 1.0, "seed": 0}
    assert contract.Sampling.part_of(spec.generation.answer).identity() == before | entered


def test_new_fields_of_engine_and_endpoint_enter_a_digest_only_where_they_are_given() -> None:
    assert contract.Engine(max_num_seqs=4).identity() == {"maxModelLen": None, "dtype": "auto"}
    drafts = contract.Speculative(method="ngram", num_speculative_tokens=4)
    engine = contract.Engine(quantization="fp8", kv_cache_dtype="fp8", speculative=drafts)
    assert engine.identity().keys() == {"maxModelLen", "dtype", "quantization", "kvCacheDtype"}
    endpoint = contract.Endpoint(url="u", model="m", max_concurrency=3, token_field="max_completion_tokens")
    assert endpoint.identity() == {"name": "m", "endpoint": "u"}
    changed = endpoint.model_copy(update={"omit": ("temperature",), "extra_body": {"a": 1}})
    assert changed.identity() == endpoint.identity() | {"omit": ["temperature"], "extraBody": {"a": 1}}
