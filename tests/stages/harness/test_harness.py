"""Tasks of lm-eval: what is asked and graded is its own; what is stored, gone on with and told is ours."""

import json
import string
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.stage_builders import RUN, context, prepared

from cgd_operator.api.benchmarks import EXECUTED, TASKS
from cgd_stages.contract import Engine, Harness, HarnessTask, Model, Rows, StageFacts, Storage
from cgd_stages.errors import Interrupted, TransientError, UserError
from cgd_stages.harness import __main__ as harness
from cgd_stages.harness import sandboxed
from cgd_stages.harness.replies import Reply
from cgd_stages.runtime.program import Context
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import DONE, Folder, read_rows
from cgd_stages.store.rows import Row, digest_of
from cgd_stages.tasks.documents import without_execution

STAGE = "harness-base"
SUMS = HarnessTask(name="sums", task="sums", metric="exact_match,none")
OTHERS = HarnessTask(name="others", task="others", metric="acc")
DEFINITION = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 3.0}
"""
CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["2", "3"]
doc_to_target: 1
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


STOPPED = (
    DEFINITION.replace("task: sums", "task: stopped")
    .replace('until: ["\\n"]', f"until: {json.dumps(list(string.printable))}")
    .replace("max_gen_toks: 8", "max_gen_toks: 64")
)
"""Asks the same; whatever the model writes is a stop."""


PROGRAMS = """\
task: humaneval
dataset_path: json
dataset_kwargs: {data_files: {test: programs.jsonl}}
test_split: test
unsafe_code: true
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}\\ncheck({{entry_point}})"
generation_kwargs: {until: ["\\ndef"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: !function no_such_module.execute, aggregation: mean, higher_is_better: true}]
filter_list: [{name: made, filter: [{function: custom, filter_fn: !function no_such_module.build}]}]
metadata: {version: 1.0}
"""
HUMANEVAL = HarnessTask(name="HumanEval", task="humaneval", metric="pass@1", executes=True)
ADD = {
    "prompt": "def add(a, b):\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5",
    "entry_point": "add",
}


class Words:
    """A tokenizer that counts words."""

    def __call__(self, text: str) -> dict[str, list[str]]:
        return {"input_ids": text.split()}


class Chat:
    """A chat of a model without thoughts."""

    templated, thinks = True, False


class Asker:
    def __init__(self) -> None:
        self.tokenizer = Words()
        self.chat = Chat()
        self.replies: dict[int, Reply] = {}


def sample(number: int, *, right: float, metric: str = "exact_match", **more: Any) -> dict[str, Any]:
    return {
        "doc_id": number,
        "arguments": [(f"What is {number} + 1 ?", {"until": []})],
        "target": str(number + 1),
        "resps": [[f"It is {number + 1}"]],
        "reply": Reply.of(f"It is {number + 1}", "stop"),
        "filtered_resps": [str(number + 1)],
        "filter": "none",
        "metrics": [metric],
        metric: right,
        **more,
    }


def results(name: str, *samples: dict[str, Any]) -> dict[str, Any]:
    return {
        "samples": {name: list(samples)},
        "results": {name: {"alias": name, "exact_match,none": 0.5, "fn": print}},
        "versions": {name: 3.0},
        "n-shot": {name: 2},
        "n-samples": {name: {"original": 9, "effective": len(samples)}},
        "lm_eval_version": "9.9",
    }


def work_for(model: Path, *tasks: HarnessTask, data: str | None = None) -> Harness:
    return Harness(model=Model(name=str(model)), tasks=tasks, data=data, engine=Engine(dtype="float32"))


def program(storage: Storage, tmp_path: Path, work: Harness) -> Context:
    made = context(storage, work, tmp_path)
    made.task = made.task.model_copy(update={"stage": STAGE})
    return made


def stored(bucket: Bucket, facts: StageFacts) -> list[Row]:
    rows = read_rows(Folder(bucket, RUN.namespace, STAGE, facts.digest))
    return sorted(rows, key=lambda row: (row["benchmark"], row["id"]))


@pytest.fixture(autouse=True)
def _prepared(request: pytest.FixtureRequest) -> None:
    """The run has its prompts, and so its models' revisions."""
    if "bucket" in request.fixturenames:
        prepared(request.getfixturevalue("bucket"), ["What is 1 + 1?"])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that a played lm-eval was asked for; half of each is right."""
    names: list[str] = []

    def ask(_: Any, task: HarnessTask, __: Any) -> dict[str, Any]:
        names.append(task.task)
        metric = task.measure
        return results(task.task, *(sample(number, right=float(number % 2), metric=metric) for number in range(4)))

    monkeypatch.setattr(harness, "start", lambda *_: Asker())
    monkeypatch.setattr(harness, "known_tasks", lambda _: None)
    monkeypatch.setattr(harness, "ask", ask)
    return names


def test_every_document_ends_as_a_row_of_an_evaluation(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, asked: list[str]
) -> None:
    facts = harness.main(program(storage, tmp_path, work_for(tiny_model, SUMS, OTHERS)))[STAGE]
    assert facts.rows == Rows(total=8, done=8)
    assert (facts.metrics["sums_accuracy"], facts.metrics["others_n"]) == (0.5, 4)
    assert (facts.prompt_tokens, facts.generated_tokens) == (8 * 6, 8 * 3)
    row = next(row for row in stored(bucket, facts) if row["benchmark"] == "sums" and row["correct"])
    expected = {
        "id": "sums/1", "prompt": "What is 1 + 1 ?", "reference": "2", "output": "It is 2", "extracted": "2",
        "answer_source": "text", "rule": "lm-eval exact_match,none", "tokens": 3, "passes": 1, "grade_error": "",
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected


def test_versions_shots_and_lm_evals_own_figures_are_kept(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, asked: list[str]
) -> None:
    facts = harness.main(program(storage, tmp_path, work_for(tiny_model, SUMS)))[STAGE]
    told = Folder(bucket, RUN.namespace, STAGE, facts.digest).require().settings["sums"]
    assert told == {
        "task": "sums",
        "metric": "exact_match,none",
        "lm_eval": "9.9",
        "versions": {"sums": 3.0},
        "shots": {"sums": 2},
        "documents": {"sums": 4},
        "results": {"sums": {"alias": "sums", "exact_match,none": 0.5}},
    }


def test_an_interrupted_attempt_loses_the_task_under_way_and_no_other(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, asked: list[str], monkeypatch: Any
) -> None:
    work = work_for(tiny_model, SUMS, OTHERS)
    first = program(storage, tmp_path / "first", work)
    put = Folder.put_rows

    def stopping(self: Folder, *arguments: Any) -> Any:
        first.stop.set()
        return put(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put_rows", stopping)
        with pytest.raises(Interrupted):
            harness.main(first)
    facts = harness.main(program(storage, tmp_path / "second", work))[STAGE]
    assert asked == ["sums", "others"]
    assert facts.rows.done == 8
    harness.main(program(storage, tmp_path / "third", work))
    assert asked == ["sums", "others"]


@pytest.mark.parametrize("damaged", ["parts/", "tasks/"])
@pytest.mark.parametrize("how", ["cut", "empty", "another's", "gone"])
def test_a_task_whose_rows_or_record_are_not_whole_is_asked_for_again_and_no_other(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, asked: list[str], damaged: str, how: str
) -> None:
    work = work_for(tiny_model, SUMS, OTHERS)
    facts = harness.main(program(storage, tmp_path / "first", work))[STAGE]
    folder = Folder(bucket, RUN.namespace, STAGE, facts.digest)
    bucket.delete(folder.key(DONE))
    record = folder.key("tasks/sums.json")
    part = folder.key(json.loads(bucket.get(record) or b"")["part"]["key"])
    key = {"parts/": part, "tasks/": record}[damaged]
    whole = bucket.get(key) or b""
    bucket.put(key, {"cut": whole[:-10], "empty": b"", "another's": b"[1]", "gone": b""}[how])
    if how == "gone":
        bucket.delete(key)
    again = harness.main(program(storage, tmp_path / "second", work))[STAGE]
    assert asked == ["sums", "others", "sums"]
    assert again.rows == Rows(total=8, done=8)
    assert len(stored(bucket, again)) == 8
    assert bucket.get(key) == whole


def test_two_metrics_of_one_task_are_one_question_to_the_model(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, asked: list[str]
) -> None:
    loose = SUMS.model_copy(update={"name": "sums-loose"})
    facts = harness.main(program(storage, tmp_path, work_for(tiny_model, SUMS, loose)))[STAGE]
    assert asked == ["sums"]
    assert {row["benchmark"] for row in stored(bucket, facts)} == {"sums", "sums-loose"}


@pytest.mark.parametrize(
    "change", [{"metric": "acc"}, {"few_shot": 5}, {"limit": 3}, {"task": "other"}, {"name": "another"}]
)
def test_whatever_changes_the_figures_changes_the_folder(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, asked: list[str], change: Row
) -> None:
    inputs = harness._inputs(program(storage, tmp_path, work_for(tiny_model, SUMS)), work_for(tiny_model, SUMS))
    changed = work_for(tiny_model, SUMS.model_copy(update=change))
    assert digest_of(**harness._inputs(program(storage, tmp_path, changed), changed)) != digest_of(**inputs)


def test_only_the_filter_that_is_asked_for_counts() -> None:
    strict = [sample(number, right=0, filter="strict") for number in range(3)]
    loose = [sample(number, right=1, filter="loose") for number in range(3)]
    task = SUMS.model_copy(update={"metric": "exact_match,loose"})
    rows = harness.to_rows(task, results("sums", *strict, *loose), Words())
    assert [row["correct"] for row in rows] == [True] * 3


def test_a_filter_that_is_not_there_is_told_with_those_that_are() -> None:
    task = SUMS.model_copy(update={"metric": "exact_match,strict"})
    with pytest.raises(UserError, match="no filter 'strict', it has none"):
        harness.to_rows(task, results("sums", sample(1, right=1)), Words())


@pytest.mark.parametrize("right", [0.25, None, "yes"])
def test_a_metric_that_is_not_right_or_wrong_is_refused(right: Any) -> None:
    with pytest.raises(UserError, match="its metrics: exact_match") as refused:
        harness.to_rows(SUMS, results("sums", sample(1, right=right)), Words())
    assert "spec.evaluation.tasks" in refused.value.hint


def test_choices_have_no_text_and_pay_for_every_choice() -> None:
    asked = [("What is it ?", " a"), ("What is it ?", " b")]
    likelihoods = [[(-1.5, True)], [(-2.5, False)]]
    one = sample(7, right=1, metric="acc", arguments=asked, resps=likelihoods, filtered_resps=[(-1.5, True)])
    (row,) = harness.to_rows(OTHERS, results("others", one), Words())
    assert (row["output"], row["answer_source"], row["tokens"], row["prompt_tokens"], row["passes"]) == (
        "", "likelihood", 0, 8, 2,
    )  # fmt: skip


def test_an_output_that_was_cut_is_truncated_and_counted(
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = [sample(number, right=0.0, reply=Reply.of("It is", "length")) for number in range(3)]
    answered = results("sums", sample(7, right=1.0), *cut)
    monkeypatch.setattr(harness, "ask", lambda *_: answered)
    facts = harness.main(program(storage, tmp_path, work_for(tiny_model, SUMS)))[STAGE]
    assert (facts.metrics["sums_truncated"], facts.metrics["sums_refused"]) == (3, 0)
    assert [row["finish_reason"] for row in stored(bucket, facts)] == ["length"] * 3 + ["stop"]


def test_a_reply_keeps_why_it_ended_and_one_that_is_cut_at_a_stop_ended_there() -> None:
    from lm_eval.models.utils import postprocess_generated_text

    cut = Reply.of("first\nsecond", "length", thinking="a thought")
    whole = postprocess_generated_text(cut, ["", "Question:"], None)
    stopped = postprocess_generated_text(cut, ["Question:", "\n", "c"], None)
    assert isinstance(whole, Reply)
    assert isinstance(stopped, Reply)
    assert (whole, whole.finish_reason) == ("first\nsecond", "length")
    assert (stopped, stopped.finish_reason) == ("first", "stop")
    assert whole.thinking == stopped.thinking == "a thought"


# --- programs ---------------------------------------------------------------------------------------------------


def written(number: int, reply: str) -> dict[str, Any]:
    """A document of HumanEval and a reply to it."""
    more = {"doc": ADD, "resps": [[reply]], "filtered_resps": [reply], "metrics": ["bypass"]}
    return sample(number, right=999.0, metric="bypass", **more) | {"target": f"{ADD['test']}\ncheck(add)"}


def test_what_a_model_writes_is_right_when_it_passes_the_tests_and_every_row_says_how_it_ended() -> None:
    replies = {
        "    return a + b\n": "sandbox: passed",
        "    return a + b\n```\nThis adds them.": "sandbox: passed",
        "    return a - b\n": "sandbox: AssertionError",
        "    return a +\n": "sandbox: SyntaxError",
        "    open('/etc/passwd')\n    return a + b\n": "sandbox: PermissionError",
        "    raise SystemExit\n": "sandbox: SystemExit",
        "    import os; os._exit(0)\n": "sandbox: ended without a verdict",
    }
    asked = results("humaneval", *(written(number, reply) for number, reply in enumerate(replies)))
    rows = harness.to_rows(HUMANEVAL, harness.graded_by_tests(HUMANEVAL, asked), Words())
    assert [row["rule"] for row in rows] == list(replies.values())
    assert [row["correct"] for row in rows] == [True, True, *[False] * 5]
    assert rows[0]["output"] == "    return a + b\n"


def test_a_program_that_does_not_end_is_a_class_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cgd_stages.harness.sandboxed.execute_all", partial(sandboxed.execute_all, seconds=0.5))
    asked = results("humaneval", written(0, "    while True: pass\n"))
    (row,) = harness.to_rows(HUMANEVAL, harness.graded_by_tests(HUMANEVAL, asked), Words())
    assert (row["rule"], row["correct"]) == ("sandbox: timed out", False)


def test_a_task_of_programs_has_one_metric() -> None:
    other = HUMANEVAL.model_copy(update={"metric": "pass@10"})
    with pytest.raises(UserError, match="humaneval has no metric 'pass@10', only pass@1"):
        harness.graded_by_tests(other, results("humaneval", written(0, "")))


def test_a_pod_that_cannot_lock_programs_in_asks_no_model(
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (lame := tmp_path / "lame.py").write_text("print('unavailable no Landlock', end='')")
    monkeypatch.setattr("cgd_stages.harness.sandboxed.SANDBOX", lame)
    with pytest.raises(UserError, match="cannot be locked in here: no Landlock"):
        harness.main(program(storage, tmp_path, work_for(tiny_model, HUMANEVAL)))
    assert asked == []


# --- lm-eval itself ---------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(storage: Storage, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A folder in the store with two own tasks; what the program does to its process is undone."""
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "NLTK_DATA", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setattr(huggingface_hub.constants, name, getattr(huggingface_hub.constants, name))
    uri = f"{storage.uri}-mirror"
    there = bucket.at(uri)
    there.put("tasks/sums.yaml", DEFINITION.encode())
    there.put("tasks/choices.yaml", CHOICES.encode())
    there.put("tasks/stopped.yaml", STOPPED.encode())
    there.put("tasks/humaneval.yaml", PROGRAMS.encode())
    there.put("programs.jsonl", (json.dumps(ADD) + "\n").encode())
    rows = [{"question": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(3)]
    there.put("sums.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return uri


def test_a_mirror_that_is_empty_is_refused(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, mirror: str
) -> None:
    work = work_for(tiny_model, SUMS, data=f"{mirror}-of-nothing")
    with pytest.raises(UserError, match="there is nothing below s3://"):
        harness.main(program(storage, tmp_path, work))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("stock_tasks")
def test_own_tasks_are_asked_and_graded_by_lm_eval_on_vllm(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, mirror: str
) -> None:
    choices = HarnessTask(name="choices", task="choices", metric="acc", limit=2)
    stopped = SUMS.model_copy(update={"name": "stopped", "task": "stopped"})
    work = work_for(tiny_model, SUMS, choices, HUMANEVAL, stopped, data=mirror)
    facts = harness.main(program(storage, tmp_path, work))[STAGE]
    wrote, *rows = stored(bucket, facts)
    assert (wrote["benchmark"], wrote["correct"]) == ("HumanEval", False)
    assert (wrote["reference"], wrote["rule"][:9]) == (f"{ADD['test']}\ncheck(add)", "sandbox: ")
    assert [row["benchmark"] for row in rows] == ["choices"] * 2 + ["stopped"] * 3 + ["sums"] * 3
    reasons = [row["finish_reason"] for row in rows]
    assert (set(reasons[:5]), set(reasons) - {"stop"}) == ({"stop"}, {"length"})
    assert facts.metrics["sums_truncated"] == reasons.count("length")
    rows = [row for row in rows if row["benchmark"] != "stopped"]
    assert [row["reference"] for row in rows[2:]] == ["1", "2", "3"]
    assert all(row["output"] and "<|im_start|>user\nWhat is" in row["prompt"] for row in rows[2:])
    told = Folder(bucket, RUN.namespace, STAGE, facts.digest).require().settings
    assert told["sums"]["versions"] == {"sums": 3.0}
    assert told["choices"]["documents"] == {"choices": 2}
    known = harness.known_tasks(None)
    assert {one.task for one in TASKS.values()} <= set(known.all_tasks)
    with pytest.raises(UserError, match="has no task 'no_such_task'"):
        harness.ask(Asker(), HarnessTask(name="x", task="no_such_task", metric="acc"), known)
    for name in EXECUTED:
        stock = without_execution(name, known)
        assert (stock["dataset_path"], stock["metric_list"]) == ("openai/openai_humaneval", [{"metric": "bypass"}])
        assert not {"filter_list", "unsafe_code"} & stock.keys()
        assert "{{test}}\ncheck({{entry_point}})" in stock["doc_to_target"]
        assert "!function" not in str(stock)


MIXED = "grades all like the first"


@pytest.mark.parametrize("targets", [([1, 2], "34"), ("34", [1, 2])])
def test_a_task_that_lm_eval_would_grade_by_its_first_reference_is_refused(targets: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=f"sums has documents with one reference .* {MIXED}"):
        harness.same_kind_of_references(SUMS, {"samples": {"sums": [{"target": target} for target in targets]}})


@pytest.mark.parametrize("targets", [("12", "34"), ([1, 2], ["34"]), (1, 0)])
def test_a_task_whose_references_are_of_one_kind_is_taken(targets: tuple[Any, Any]) -> None:
    harness.same_kind_of_references(SUMS, {"samples": {"sums": [{"target": target} for target in targets]}})


def test_data_that_cannot_be_read_are_tried_again_and_the_mend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval

    def away(**_: Any) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(lm_eval, "simple_evaluate", away)
    with pytest.raises(TransientError, match="the data of sums cannot be read: Couldn't reach") as refused:
        harness.ask(Asker(), SUMS, Known())
    assert "spec.evaluation.taskData" in refused.value.hint


class Known:
    """A task manager that knows one task."""

    all_tasks = ("sums",)
