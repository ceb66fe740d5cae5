"""The method: who writes what, who sees what, what is learned.

x is the prompt, y' the student's answer, c the teacher's critique, y^ the teacher's refinement, t the teacher's own
answer to x, r the reference answer. Each stage runs as it
does in a run, on an engine that signs its replies; the tests read what was asked and what was stored.
"""

from pathlib import Path

import pytest
from support.stage_builders import GREEDY, RUN, RuleEngine, context, generate_with, generate_work, said, stored_rows
from transformers import PreTrainedTokenizerFast

from cgd_stages.chat.example import IGNORE
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Benchmark, Evaluate, Model, Rows, StageFacts, Storage
from cgd_stages.engines.base import Completion, Request
from cgd_stages.evaluate import __main__ as evaluate
from cgd_stages.method import prompts
from cgd_stages.method.examples import conversation, row_example
from cgd_stages.prepare.sources import row_id
from cgd_stages.store.benchmarks import store_benchmarks
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS, Folder
from cgd_stages.store.rows import digest_of, now, row_schema
from cgd_stages.store.run import RunStore

QUESTIONS = {f"Question number {n}?": f"REFERENCE-{n}" for n in range(6)}


class Signing(RuleEngine):
    """Signs every reply with its own name and a number that only the prompt determines."""

    def __init__(self, name: str) -> None:
        super().__init__(self._sign)
        self.name = name

    def _sign(self, request: Request) -> Completion:
        verdict = "right" if int(request.name[:20], 16) % 2 else "wrong"
        return said(request, f"{self.name} on {request.name[:6]}\nConclusion: {verdict}")


class Run:
    """A run up to its quadruples: the two models, what each was asked, and the rows."""

    def __init__(self, storage: Storage, bucket: Bucket, model: Path, scratch: Path) -> None:
        with_references(bucket)
        self.student, self.critic, self.teacher = Signing("STUDENT"), Signing("CRITIC"), Signing("TEACHER")
        for engine, role in ((self.student, "answer"), (self.critic, "critique"), (self.teacher, "refine")):
            generate_with(engine, context(storage, generate_work(model, role), scratch))
        self.master = Signing("MASTER")
        generate_with(self.master, context(storage, generate_work(model, "distill"), scratch))
        distilled = {row["id"]: row["distilled"] for row in stored_rows(bucket, "distill")}
        self.rows = [row | {"distilled": distilled[row["id"]]} for row in stored_rows(bucket, "refine")]


def with_references(bucket: Bucket) -> None:
    """A prepared stage whose rows have reference answers, which nobody may be shown."""
    rows = [
        {"id": row_id(text), "sample": 0, "prompt": text, "reference": reference, "prompt_tokens": 5}
        for text, reference in QUESTIONS.items()
    ]
    folder = Folder(bucket, RUN.namespace, "prepare", digest_of(questions=QUESTIONS))
    part = folder.put_rows(PARTS, rows, row_schema("prepare"))
    facts = StageFacts(rows=Rows(total=len(rows), done=len(rows)))
    RunStore(bucket, RUN).point_at(folder.finish(facts=facts, parts=[part], started=now(), inputs={}))


@pytest.fixture
def run(storage, bucket, tiny_model, tmp_path) -> Run:
    return Run(storage, bucket, tiny_model, tmp_path)


def texts(engine: RuleEngine) -> list[str]:
    """Everything an engine was shown, one text a request."""
    return ["\n".join(message["content"] for message in request.messages) for request in engine.asked]


def test_the_student_writes_the_answer_and_the_teacher_critique_and_refinement(run):
    assert len(run.rows) == len(QUESTIONS)
    for row in run.rows:
        assert row["answer"].startswith("STUDENT on ")
        assert row["critique"].startswith("CRITIC on ")
        assert row["refinement"].startswith("TEACHER on ")


def test_the_student_sees_the_prompt_alone(run):
    asked = {request.messages[0]["content"]: request for request in run.student.asked}
    assert set(asked) == set(QUESTIONS)
    assert all([message["role"] for message in request.messages] == ["user"] for request in run.student.asked)


def test_the_critique_sees_the_prompt_and_the_answer_to_it(run):
    for row in run.rows:
        assert prompts.critique_messages(row["prompt"], row["answer"]) in [r.messages for r in run.critic.asked]
    assert not any("TEACHER" in text or "CRITIC" in text for text in texts(run.critic))


def test_the_refinement_sees_the_prompt_the_answer_and_the_critique_of_it(run):
    for row in run.rows:
        shown = prompts.refine_messages(row["prompt"], row["answer"], row["critique"])
        assert shown in [request.messages for request in run.teacher.asked]
    assert not any("TEACHER" in text for text in texts(run.teacher))


def test_the_teachers_own_answer_is_to_the_prompt_alone(run):
    assert {row["distilled"].split(" on ")[0] for row in run.rows} == {"MASTER"}
    assert sorted(texts(run.master)) == sorted(QUESTIONS)
    assert all([message["role"] for message in request.messages] == ["user"] for request in run.master.asked)


def test_nobody_is_shown_the_reference(run):
    for engine in (run.student, run.critic, run.teacher, run.master):
        assert not any("REFERENCE" in text for text in texts(engine))
    assert {row["prompt"]: row["reference"] for row in run.rows} == QUESTIONS


def test_right_drafts_stay_in(run):
    assert {row["id"] for row in run.rows} == {row_id(text) for text in QUESTIONS}
    assert {row["verdict"] for row in run.rows} == {"right", "wrong"}


def test_training_is_conditioned_on_prompt_answer_and_critique_but_not_on_the_refinement(run):
    for row in run.rows:
        shown = prompts.training_context(row["prompt"], row["answer"], row["critique"])
        text = "\n".join(message["content"] for message in shown)
        assert all(row[column] in text for column in ("prompt", "answer", "critique"))
        assert row["refinement"] not in text
        assert row["reference"] not in text


def test_only_the_refinement_is_learned(run, tiny_model):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    for row in run.rows:
        made = row_example(ChatTemplate(tokenizer), "CGD", row, max_length=2048)
        learned = [label for label in made.labels if label != IGNORE]
        assert tokenizer.decode(learned) == row["refinement"] + tokenizer.eos_token
        shown = tokenizer.decode(made.input_ids[: made.start])
        assert all(row[column] in shown for column in ("prompt", "answer", "critique"))
        assert row["refinement"] not in shown
        assert row["reference"] not in tokenizer.decode(made.input_ids)


TABLE = [
    ("CGD", ["prompt", "answer", "critique"], "refinement"),
    ("CFT", ["prompt", "answer"], "critique"),
    ("DistilledSFT", ["prompt"], "distilled"),
    ("SFT", ["prompt"], "reference"),
    ("RefinedSFT", ["prompt"], "refinement"),
]
TEXTS = ("prompt", "answer", "critique", "refinement", "distilled", "reference")


@pytest.mark.parametrize(("objective", "context", "target"), TABLE)
def test_an_objective_is_conditioned_on_its_context_and_learns_its_target_alone(
    run, tiny_model, objective, context, target
):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    for row in run.rows:
        made = row_example(ChatTemplate(tokenizer), objective, row, max_length=2048)
        shown = tokenizer.decode(made.input_ids[: made.start])
        assert [name for name in TEXTS if row[name] in shown] == context
        learned = [label for label in made.labels if label != IGNORE]
        assert tokenizer.decode(learned) == row[target] + tokenizer.eos_token


@pytest.mark.parametrize("objective", ["DistilledSFT", "SFT", "RefinedSFT"])
def test_a_context_of_the_prompt_alone_is_word_for_word_what_evaluation_gives(run, objective):
    for row in run.rows:
        assert conversation(objective, row)[0] == [{"role": "user", "content": row["prompt"]}]


def test_cft_learns_the_critique_under_a_request_of_its_own_in_one_user_turn(run):
    for row in run.rows:
        (asked,) = conversation("CFT", row)[0]
        assert asked["role"] == "user"
        assert asked["content"] == f"{prompts.CFT}\nQuestion:\n{row['prompt']}\n\nSolution:\n{row['answer']}"


def test_at_evaluation_the_model_sees_the_prompt_alone(storage, bucket, tiny_model, tmp_path, monkeypatch):
    questions = [{"benchmark": "own", "id": row_id(x), "prompt": x, "reference": r} for x, r in QUESTIONS.items()]
    folder = Folder(bucket, RUN.namespace, "prepare", digest_of(benchmark=questions))
    part = store_benchmarks(folder, questions)
    RunStore(bucket, RUN).point_at(folder.finish(facts=StageFacts(), parts=[part], started=now(), inputs={}))
    trained = RuleEngine()
    monkeypatch.setattr(evaluate, "_engine", lambda *_: trained)
    benchmarks = (Benchmark(name="own", source=""),)
    evaluate.main(
        context(storage, Evaluate(model=Model(name=str(tiny_model)), benchmarks=benchmarks, sampling=GREEDY), tmp_path)
    )
    assert [r.messages for r in trained.asked] == [[{"role": "user", "content": x}] for x in QUESTIONS]
