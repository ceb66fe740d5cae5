"""The documents of lm-eval's tasks, as prepare compares them with prompts: read by lm-eval's own code."""

import json
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.stage_builders import context

from cgd_stages.contract import Harness, HarnessTask, Model, Storage
from cgd_stages.errors import UserError
from cgd_stages.harness import __main__ as harness
from cgd_stages.harness.replies import Reply
from cgd_stages.store.bucket import Bucket
from cgd_stages.tasks.documents import documents, mirrored

pytestmark = pytest.mark.filterwarnings("ignore")

WRITTEN = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Answer in one word. {{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
QUERY = "should_decontaminate: true\ndoc_to_decontamination_query: {}\n"
CHOICES = (
    WRITTEN.replace("generate_until", "multiple_choice")
    .replace('"Answer in one word. {{question}}"', "0")
    .replace('"{{answer}}"', "0\ndoc_to_choice: ['Ann has 1.', 'Ann has 2.']")
    .replace('generation_kwargs: {until: ["\\n"]}\n', "")
    .replace("exact_match", "acc")
)
GROUP = "group: both\ntask: [sums, asked]\n"
ROWS = [{"question": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(3)]


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    definitions = {
        "sums": WRITTEN,
        "asked": WRITTEN.replace("task: sums", "task: asked") + QUERY.format("question"),
        "template": WRITTEN.replace("task: sums", "task: template") + QUERY.format('"{{question}}"'),
        "choices": CHOICES.replace("task: sums", "task: choices"),
        "both": GROUP,
        "code": WRITTEN.replace("task: sums", "task: code").replace('"{{answer}}"', "!function code.target"),
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, definition in definitions.items():
        (folder / f"{name}.yaml").write_text(definition)
    (folder / "code.py").write_text("def target(document):\n    return 'ran'\n")
    return TaskManager(include_path=str(folder), include_defaults=False)  # reading lm-eval's own takes seconds


def task(name: str, **changes: Any) -> HarnessTask:
    return HarnessTask(name=name.title(), task=name, metric="exact_match", **changes)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("sums", "Answer in one word. What is 0 + 1?"),
        ("asked", "What is 0 + 1?"),
        ("template", "Answer in one word. What is 0 + 1?"),
        ("choices", "Ann has 1.\nAnn has 2."),
    ],
)
def test_a_question_is_what_the_task_names_for_it_or_what_the_model_reads(manager: Any, name: str, first: str) -> None:
    rows = documents(task(name), manager)
    assert len(rows) == 3
    assert (rows[0]["benchmark"], rows[0]["id"], rows[0]["prompt"]) == (name.title(), f"{name}/0", first)


def test_the_documents_of_a_group_are_those_that_the_harness_asks_under_the_same_ids(manager: Any) -> None:
    from lm_eval.models.dummy import DummyLM

    both = task("both", limit=2)
    rows = documents(both, manager)
    asker = DummyLM()
    asker.tokenizer, asker.chat = (lambda text: {"input_ids": text.split()}), SimpleNamespace(thinks=False, templated=0)
    asker.replies = defaultdict(lambda: Reply.of("", "stop"))
    asked = harness.to_rows(both, harness.ask(asker, both, manager), asker.tokenizer)
    assert len(rows) == 4
    assert [(row["benchmark"], row["id"]) for row in rows] == [(row["benchmark"], row["id"]) for row in asked]
    assert [row["reference"] for row in rows] == [row["reference"] for row in asked]


def test_the_code_of_a_definition_runs_only_where_it_may(manager: Any) -> None:
    with pytest.raises(UserError, match=r"the task code has a function, code\.target"):
        documents(task("code"), manager)
    assert documents(task("code", own_code=True), manager)[0]["reference"] == "ran"


def test_a_task_that_lm_eval_lacks_is_refused(manager: Any) -> None:
    with pytest.raises(UserError, match="has no task 'no_such_task'"):
        documents(task("no_such_task"), manager)


def test_what_a_mirror_changes_in_the_process_is_undone(
    bucket: Bucket, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HOME", "former")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    uri = f"{storage.uri}-mirror"
    bucket.at(uri).put("tasks/sums.yaml", WRITTEN.encode())
    before, folder = dict(os.environ), Path.cwd()
    given = context(storage, Harness(model=Model(name="x"), tasks=(), data=uri), tmp_path)
    with mirrored(given, uri) as definitions:
        assert definitions == Path.cwd() / "tasks"
        assert (os.environ["HF_HOME"], constants.HF_HUB_OFFLINE) == (str(Path.cwd()), True)
    assert (dict(os.environ), Path.cwd(), constants.HF_HUB_OFFLINE) == (before, folder, False)
