"""prepare: paraphrases of benchmarks' questions and of lm-eval's tasks, and near-duplicates among the prompts."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.stage_builders import context, prepare_work

from cgd_stages.contract import Benchmark, BenchmarkFields, Decontaminate, HarnessTask, Prompts, StageFacts, Storage
from cgd_stages.errors import UserError
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.prepare.sources import row_id
from cgd_stages.quality.paraphrases import FOUND
from cgd_stages.store.benchmarks import read_benchmarks, read_originals
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import REJECTED, Folder, read_rows
from cgd_stages.store.rows import Row, from_parquet

QUESTION = "Nora sold 48 candles in April and then she sold half as many candles in May. How many did she sell in all?"
NAMES = QUESTION.replace("Nora", "Pavel").replace("she", "he")
OTHER = "A tank holds 300 litres and loses 3 litres every hour. After how many hours is the tank empty at last?"
TASK = """\
task: tanks
dataset_path: json
dataset_kwargs: {data_files: {test: tanks.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
TANKS = HarnessTask(name="tanks", task="tanks", metric="exact_match")


class Prepared:
    """A run of prepare, read back from the store."""

    def __init__(self, storage: Storage, scratch: Path, work: Any) -> None:
        given = context(storage, work, scratch)
        self.facts: StageFacts = prepare.main(given)["prepare"]
        self.folder: Folder = given.store.input("prepare")
        self.done = self.folder.require()
        self.prompts = [row["prompt"] for row in sorted(read_rows(self.folder), key=lambda row: row["prompt"])]
        self.rejected = {row["id"]: row for row in self._under(REJECTED)}
        self.found = self._under(FOUND)

    def _under(self, prefix: str) -> list[Row]:
        return [row for part in self.done.under(prefix) for row in from_parquet(self.folder.read(part))]


def put(bucket: Bucket, name: str, rows: list[dict[str, Any]]) -> str:
    bucket.put(name, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return bucket.uri(name)


def source(bucket: Bucket, *prompts: str, reference: str = "72") -> str:
    return put(bucket, "in/p.jsonl", [{"question": prompt, "answer": reference} for prompt in prompts])


def benchmark(bucket: Bucket) -> Benchmark:
    uri = put(bucket, "in/b.jsonl", [{"q": QUESTION, "a": 72}])
    return Benchmark(name="sums", source=uri, fields=BenchmarkFields(prompt="q", reference="a"))


def work(bucket: Bucket, model: Path, uri: str, **changes: Any) -> Any:
    policy = changes.pop("paraphrases", "remove")
    decontaminate = Decontaminate(against=changes.pop("against", ("sums",)), paraphrases=policy, similarity=0.4)
    return prepare_work(model, uri, benchmarks=(benchmark(bucket),), decontaminate=decontaminate, **changes)


def test_a_prompt_that_paraphrases_a_question_is_rejected_with_the_question(bucket, storage, tiny_model, tmp_path):
    found = Prepared(storage, tmp_path, work(bucket, tiny_model, source(bucket, NAMES, OTHER), max_rejected=0.0))
    assert found.prompts == [OTHER]
    row = found.rejected[row_id(NAMES)]
    assert row["reason"] == "contaminated"
    assert "the prompt has " in row["detail"]
    assert row["detail"].endswith(f"of the word triples of the question {row_id(QUESTION)} of sums")
    assert found.facts.metrics["rejected_contaminated"] == found.facts.metrics["paraphrased"] == 1
    (question,) = found.found
    assert (question["benchmark"], question["question"], question["rows"]) == ("sums", row_id(QUESTION), 1)
    assert (question["id"], question["text"]) == (row_id(NAMES), "prompt")


def test_a_prompt_whose_reference_paraphrases_a_question_is_rejected(bucket, storage, tiny_model, tmp_path):
    uri = source(bucket, "A short one", "And another one", reference=NAMES)
    with pytest.raises(UserError, match=r"2 of 2 rows cannot be used \(contaminated 2\).*the reference has "):
        Prepared(storage, tmp_path, work(bucket, tiny_model, uri))


def test_what_is_kept_is_listed_and_the_rows_are_the_same(bucket, storage, tiny_model, tmp_path):
    uri = source(bucket, NAMES, OTHER)
    kept = Prepared(storage, tmp_path, work(bucket, tiny_model, uri, paraphrases="keep"))
    plain = Prepared(storage, tmp_path, prepare_work(tiny_model, uri, benchmarks=(benchmark(bucket),)))
    assert kept.prompts == sorted([NAMES, OTHER])
    assert (kept.facts.metrics["paraphrased"], kept.facts.metrics["paraphrased_questions"]) == (1, 1)
    assert [row["question"] for row in kept.found] == [row_id(QUESTION)]
    assert kept.done.content() == plain.done.content(), "what follows is found again"
    assert (plain.found, "paraphrased" in plain.facts.metrics) == ([], False)


def test_rows_that_are_not_kept_are_not_listed_where_paraphrases_are(bucket, storage, tiny_model, tmp_path):
    uri = source(bucket, NAMES, *(f"{OTHER} {number}" for number in range(30)))
    given = work(bucket, tiny_model, uri, paraphrases="keep", limit=5, seed=1)
    kept = Prepared(storage, tmp_path, given)
    assert kept.facts.metrics["paraphrased"] == (NAMES in kept.prompts) == 0


# --- tasks of lm-eval -----------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(bucket: Bucket, storage: Storage) -> str:
    uri = f"{storage.uri}-mirror"
    there = bucket.at(uri)
    there.put("tasks/tanks.yaml", TASK.encode())
    there.put("tasks/gone.yaml", TASK.replace("task: tanks", "task: gone").replace("tanks.jsonl", "no.jsonl").encode())
    there.put("tasks/empty.yaml", TASK.replace("task: tanks", "task: empty").encode())
    there.put("tanks.jsonl", (json.dumps({"question": OTHER, "answer": "100"}) + "\n").encode())
    return uri


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("stock_tasks")
def test_prompts_are_compared_with_the_tasks_of_lm_eval_and_what_cannot_be_is_named(
    bucket, storage, tiny_model, tmp_path, mirror, caplog
):
    gone = TANKS.model_copy(update={"name": "gone", "task": "gone"})
    given = work(
        bucket, tiny_model, source(bucket, "Hello", OTHER.replace("litres", "gallons"), OTHER),
        tasks=(TANKS, gone), task_data=mirror, against=("sums", "tanks", "gone"),
    )  # fmt: skip
    folder = Path.cwd()
    found = Prepared(storage, tmp_path, given)
    assert found.prompts == ["Hello"]
    details = [row["detail"] for row in found.rejected.values()]
    assert sorted(detail.split(": ", 1)[1].split()[0] for detail in details) == ["shares", "the"]
    assert all("tanks/0 of tanks" in detail for detail in details)
    assert list(found.done.inputs["unchecked"]) == ["gone"]
    assert "no.jsonl" in found.done.inputs["unchecked"]["gone"]
    assert "no prompt is compared with the task gone of lm-eval" in caplog.text
    assert found.facts.metrics["unchecked_tasks"] == 1
    assert [row["benchmark"] for row in read_originals(found.folder)[0]] == ["sums", "tanks"]
    assert [row["benchmark"] for row in read_benchmarks(found.folder)] == ["sums"], "those that models are asked"
    assert (Path.cwd(), os.environ.get("HF_DATASETS_OFFLINE")) == (folder, None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("stock_tasks")
def test_a_task_that_would_be_refused_on_a_gpu_is_refused_now(bucket, storage, tiny_model, tmp_path, mirror):
    unknown = TANKS.model_copy(update={"task": "no_such_task"})
    given = work(bucket, tiny_model, source(bucket, OTHER), tasks=(unknown,), task_data=mirror, against=("tanks",))
    with pytest.raises(UserError, match="has no task 'no_such_task'"):
        Prepared(storage, tmp_path, given)


# --- near-duplicates ------------------------------------------------------------------------------------------------


def test_of_near_duplicates_the_first_stays_and_the_others_are_rejected(bucket, storage, tiny_model, tmp_path):
    first, second, third = QUESTION, QUESTION.replace("48", "50"), QUESTION.upper()
    uri = source(bucket, second, OTHER, first, third, second)
    found = Prepared(storage, tmp_path, prepare_work(tiny_model, uri, near_duplicates="remove", max_rejected=0.0))
    assert found.prompts == sorted([second, OTHER])
    assert {row["reason"] for row in found.rejected.values()} == {"near_duplicate", "duplicate"}
    assert found.rejected[row_id(first)]["detail"].endswith(f"nearly repeats the prompt {row_id(second)}")
    assert (found.facts.metrics["rejected_near_duplicate"], found.facts.metrics["rejected_duplicate"]) == (2, 1)
    assert found.facts.metrics["read"] == found.facts.rows.done + found.facts.rows.rejected == 5


def test_a_prompt_that_cannot_be_used_is_not_the_one_that_stays(bucket, storage, tiny_model, tmp_path):
    first, second, third = QUESTION, QUESTION.replace("48", "50"), QUESTION.replace("48", "52")
    uri = put(bucket, "in/c.jsonl", [{"q": first, "a": 72}])
    copies = Benchmark(name="copies", source=uri, fields=BenchmarkFields(prompt="q", reference="a"))
    decontaminate = Decontaminate(against=("copies",), ngram=100)
    given = prepare_work(
        tiny_model, source(bucket, first, second, third),
        benchmarks=(copies,), decontaminate=decontaminate, near_duplicates="remove",
    )  # fmt: skip
    found = Prepared(storage, tmp_path, given)
    assert found.prompts == [second]
    assert found.rejected[row_id(first)]["reason"] == "contaminated"
    assert found.rejected[row_id(third)]["detail"].endswith(f"nearly repeats the prompt {row_id(second)}")


def test_one_prompt_that_ten_thousand_others_nearly_repeat(bucket, storage, tiny_model, tmp_path):
    uri = source(bucket, *(QUESTION.replace("48", str(number)) for number in range(10_000)), OTHER)
    found = Prepared(storage, tmp_path, prepare_work(tiny_model, uri, near_duplicates="remove", max_rejected=0.0))
    assert len(found.prompts) == 2
    assert QUESTION.replace("48", "0") in found.prompts
    assert found.facts.metrics["rejected_near_duplicate"] == 9_999


# --- stored runs ----------------------------------------------------------------------------------------------------


def test_prompts_of_earlier_manifests_have_the_inputs_that_they_have_always_had() -> None:
    fields = {"prompt": "prompt", "reference": None}
    plain = {"source": "s3://data/p.jsonl", "fields": fields, "limit": None, "seed": None}
    assert Prompts(source="s3://data/p.jsonl").given() == plain | {"decontaminate": None}
    older = Prompts(source="s3://data/p.jsonl", decontaminate=Decontaminate(against=("a",)), near_duplicates="keep")
    assert older.given() == plain | {"decontaminate": {"against": ("a",), "ngram": 13}}


def test_each_new_option_has_inputs_of_its_own() -> None:
    def given(near_duplicates: Any = None, **changes: Any) -> str:
        decontaminate = Decontaminate(against=("a",), **changes)
        prompts = Prompts(source="s3://data/p.jsonl", decontaminate=decontaminate, near_duplicates=near_duplicates)
        return json.dumps(prompts.given(), sort_keys=True)

    several = [
        given(), given("remove"), given(paraphrases="keep"), given(paraphrases="remove"),
        given(paraphrases="keep", similarity=0.6),
    ]  # fmt: skip
    assert len(set(several)) == 5
    assert given(paraphrases="keep") == given(paraphrases="keep", similarity=0.5)
