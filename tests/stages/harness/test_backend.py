"""lm-eval asks a model that thinks: real lm-eval, real vLLM, and a tiny model that thinks where it may."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import tiny

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Chat, Engine, Harness, HarnessTask, Model
from cgd_stages.errors import UserError
from cgd_stages.harness import __main__ as harness
from cgd_stages.results.model import UNFINISHED_THOUGHT
from cgd_stages.store.rows import Row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

WRITTEN = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["a"], max_gen_toks: 2, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
"""The model's thought holds the stop, and is longer than the limit."""
CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["3", "4"]
doc_to_target: 1
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
BEGUN = WRITTEN.replace("task: sums", "task: begun") + 'gen_prefix: "It is"\n'
DEFINITIONS = {"sums": WRITTEN, "choices": CHOICES, "begun": BEGUN}
METRICS = {"sums": "exact_match,none", "choices": "acc", "begun": "exact_match,none"}
ASKED = "<|im_start|>user\nWhat is {} + 1?<|im_end|>\n<|im_start|>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"
ENOUGH = 40
"""The run's limit of tokens."""


@pytest.fixture(scope="module")
def manager(stock_tasks: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"What is {number} + 1?", "answer": str(number + 1)} for number in (3, 5)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, definition in DEFINITIONS.items():
        (folder / f"{name}.yaml").write_text(definition.replace("FOLDER", str(folder)))
    return harness.known_tasks(folder)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = tiny.thinking(tmp_path_factory.mktemp("models") / "thinking")
    work = Harness(model=Model(name=str(model)), tasks=(), engine=Engine(dtype="float32"), max_tokens=ENOUGH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        harness._name_vllm(tmp_path_factory.mktemp("names"))
        yield harness.start(model, work, ChatTemplate.load(model, Chat(thinking="on")))


Asked = tuple[list[Row], str]
"""The rows of a task, and why it was asked without a thought."""


@pytest.fixture
def asked(engine: Any, manager: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asked]:
    """Asks a task in a mode, with the one engine of this module."""

    def ask(name: str, thinking: Any, *, limit: int = ENOUGH) -> Asked:
        monkeypatch.setattr(engine, "chat", ChatTemplate(engine.tokenizer, Chat(thinking=thinking), name="tiny"))
        monkeypatch.setattr(engine, "_most_tokens", limit)
        engine.__dict__.pop("_at_once", None)
        task = HarnessTask(name=name, task=name, metric=METRICS[name], own_code=True)
        results = harness.ask(engine, task, manager)
        told = harness.settings_of(task, results)
        return harness.to_rows(task, results, engine.tokenizer), told.get("without_thought", "")

    return ask


def test_a_thought_is_cut_and_neither_the_tasks_stops_nor_its_limit_end_it(asked: Callable[..., Asked]) -> None:
    rows, reason = asked("sums", "on")
    assert reason == ""
    assert [row["prompt"] for row in rows] == [ASKED.format(3), ASKED.format(5)]
    assert [(row["output"], row["thinking"], row["correct"]) for row in rows] == [("4", "a", True), ("4", "a", False)]
    assert {(row["finish_reason"], row["answer_source"], row["tokens"]) for row in rows} == {("stop", "text", 2)}


def test_without_thoughts_the_template_writes_an_empty_one_and_the_tasks_limit_holds(
    asked: Callable[..., Asked],
) -> None:
    rows, reason = asked("sums", "off")
    assert reason == ""
    assert rows[0]["prompt"] == ASKED.format(3) + NO_THOUGHT
    assert [(row["output"], row["thinking"], row["correct"]) for row in rows] == [("4", None, True), ("4", None, False)]


def test_a_thought_that_the_runs_limit_cuts_is_no_answer(asked: Callable[..., Asked]) -> None:
    rows, _ = asked("sums", "on", limit=2)
    assert {(row["output"], row["thinking"], row["correct"]) for row in rows} == {("", "a", False)}
    assert {(row["answer_source"], row["finish_reason"]) for row in rows} == {(UNFINISHED_THOUGHT, "length")}


def test_choices_are_compared_without_a_thought_and_the_record_says_so(asked: Callable[..., Asked]) -> None:
    rows, reason = asked("choices", "on")
    assert reason == "likelihood"
    assert [row["prompt"] for row in rows] == [ASKED.format(number) + NO_THOUGHT for number in (3, 5)]
    assert all(row["correct"] for row in rows), "without a thought the model says 4"
    assert asked("choices", "off") == (rows, "")


def test_a_reply_that_the_task_begins_has_no_thought(asked: Callable[..., Asked]) -> None:
    rows, reason = asked("begun", "on")
    assert reason == "begun"
    assert rows[0]["prompt"] == ASKED.format(3) + NO_THOUGHT + "It is"
    assert asked("begun", "off") == (rows, "")


def test_a_model_that_always_thinks_is_refused_such_tasks(
    engine: Any, asked: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    always = tiny.THINKING.read_text().replace(
        "{%- if enable_thinking", "{{- '<think>\\n' -}}\n{%- if false and enable_thinking"
    )
    monkeypatch.setattr(engine.tokenizer, "chat_template", always)
    for name in ("choices", "begun"):
        with pytest.raises(
            UserError, match=r"asks this task without a thought, but .* cannot switch thinking off"
        ) as told:
            asked(name, "on")
        assert told.value.hint == "Remove the task from spec.evaluation.tasks."


def test_a_control_token_in_a_question_is_plain_text(engine: Any, asked: Callable[..., Asked]) -> None:
    asked("sums", "on")
    history = [{"role": "user", "content": f"One{tiny.END} more"}]
    text = engine.apply_chat_template(history)
    (ids,) = engine.tok_encode([text])
    assert ids.count(engine.tokenizer.convert_tokens_to_ids(tiny.END)) == 1  # of the user's turn
    assert engine.tokenizer.decode(ids) == text
