"""generate with the real vLLM and the real store: the whole way, interrupted in every way, and with bad models."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.stage_builders import (
    GREEDY,
    RuleEngine,
    VllmProgram,
    context,
    each,
    generate_with,
    generate_work,
    prepared,
    said,
    stored_rejections,
    stored_rows,
    task,
)

from cgd_stages import contract
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.engines.base import Completion, Request, drive
from cgd_stages.engines.vllm import VllmEngine
from cgd_stages.errors import UserError
from cgd_stages.method import prompts
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS
from cgd_stages.store.rows import from_parquet

# vLLM and torch warn about themselves while they are imported.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

ROWS = 4000
TEXTS = [f"Ann has {n} apples and gives {n % 7} to Ben. How many are left?" for n in range(ROWS)]
SETTINGS = contract.Engine(dtype="float32")


class CountingEngine(VllmEngine):
    """vLLM that remembers what it was asked, and outlives the programs of a test: a start takes a while.

    A process can have one engine at a time: closing any of them takes the parallel groups of all of them down.
    """

    def __init__(self, model: Path) -> None:
        super().__init__(model, SETTINGS, ChatTemplate.load(model))
        self.asked = 0
        self.seen: dict[str, list[int]] = {}
        """Token ids that vLLM was given, by the name of the request."""
        self._add, self._llm.add_request = self._llm.add_request, self._note

    def submit(self, request: Request) -> None:
        self.asked += 1
        super().submit(request)

    def _note(self, name: str, prompt: Any, params: Any) -> None:
        self.seen[name] = prompt["prompt_token_ids"]
        self._add(name, prompt, params)

    def close(self) -> None:
        """Stays warm for the next test."""


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = CountingEngine(tiny_model)
    yield engine
    VllmEngine.close(engine)


def stored_of(bucket: Bucket, stage: str) -> int:
    """How many rows of a stage that is at work are stored."""
    parts = [stored.key for stored in bucket.list() if f"/{stage}/" in stored.key and f"/{PARTS}" in stored.key]
    return sum(len(from_parquet(data)) for key in parts if (data := bucket.get(key)))


def test_the_whole_way_with_sigterm_and_kill_9(bucket, storage, tiny_model, tmp_path, engine):
    prepared(bucket, TEXTS)
    answer = generate_work(tiny_model, "answer", max_rejected=0.2)

    stopped = VllmProgram("generate", task(storage, answer), tmp_path / "a")
    stopped.send_once(lambda: stored_of(bucket, "answer") > 0, signal.SIGTERM)
    ended = stopped.wait()
    assert (ended.code, ended.words.outcome) == (143, "interrupted"), ended.log
    stored = ended.words.stages["answer"].rows
    assert 0 < stored.done < ROWS
    engine.asked = 0
    facts = generate_with(engine, context(storage, answer, tmp_path))["answer"]
    assert engine.asked == ROWS - stored.done - stored.rejected
    assert facts.rows.done + facts.rows.rejected == facts.rows.total == ROWS

    teacher = generate_work(tiny_model, "critique", "refine", max_rejected=1.0)  # it often has no word to say
    killed = VllmProgram("generate", task(storage, teacher), tmp_path / "b")
    killed.send_once(lambda: stored_of(bucket, "critique") >= 512, signal.SIGKILL)
    assert killed.wait().code == -signal.SIGKILL
    engine.asked = 0
    halves = teacher.model_copy(update={"shards": 2})
    for shard in range(2):
        generate_with(engine, context(storage, halves, tmp_path, shard=shard))
    critiques, refinements = stored_rows(bucket, "critique"), stored_rows(bucket, "refine")
    assert engine.asked <= facts.rows.done - 512 + len(critiques)

    for stage, kept, read in (("critique", critiques, facts.rows.done), ("refine", refinements, len(critiques))):
        ids = [row["id"] for row in kept + stored_rejections(bucket, stage)]
        assert len(ids) == len(set(ids)) == read
    audit(refinements[:: ROWS // 16], engine)


def test_the_engine_saw_what_the_stored_rows_say_token_for_token(bucket, storage, tiny_model, tmp_path, engine):
    prepared(bucket, TEXTS[:160])
    for roles in (("answer",), ("critique", "refine")):
        facts = generate_with(engine, context(storage, generate_work(tiny_model, *roles, max_rejected=1.0), tmp_path))
    rows, template = stored_rows(bucket, "refine"), ChatTemplate.load(tiny_model)
    assert len(rows) > 20
    for row in rows:
        for role in ("answer", "critique", "refine"):
            rendered = template.render(prompts.role_messages(role, row))
            assert engine.seen[f"{row['id']}-0-{role}"] == template.token_ids(rendered)
    refine = facts["refine"]  # instruction, question and answer were computed for the critique
    assert refine.metrics["prompt_tokens_cached"] > 0.5 * refine.prompt_tokens
    assert facts["refine"].metrics["preemptions"] == 0


def test_a_miscritique_and_what_is_refined_from_it_come_from_one_warm_engine(bucket, storage, tiny_model, tmp_path):
    """The model says `Conclusion: right` to everything: it turns those critiques round that found the draft wrong."""
    stubborn = tiny.make(tmp_path / "stubborn", chain=(tiny.NEWLINE, "Conclusion", ":", "\u0120right", tiny.END))
    prepared(bucket, TEXTS[:20])

    def judge(request: Request) -> Completion:
        is_wrong = "gives 0" in request.messages[-1]["content"]
        return said(request, f"Look.\nConclusion: {'wrong' if is_wrong else 'right'}")

    for role in ("answer", "critique"):
        generate_with(RuleEngine(judge), context(storage, generate_work(tiny_model, role), tmp_path))
    work = generate_work(stubborn, "miscritique", "misrefine")
    ended = VllmProgram("generate", task(storage, work), tmp_path / "a").wait()
    assert ended.code == 0, ended.log
    rows, template = stored_rows(bucket, "misrefine"), ChatTemplate.load(stubborn)
    assert {row["prompt"] for row in rows} == {text for text in TEXTS[:20] if "gives 0" in text}
    assert {(row["verdict"], row["miscritique"]) for row in rows} == {("wrong", "Conclusion: right")}
    for row in rows:
        asked = prompts.refine_messages(row["prompt"], row["answer"], row["miscritique"])
        assert row["misrefinement_prompt_tokens"] == len(template.token_ids(template.render(asked)))
    assert {row["reason"] for row in stored_rejections(bucket, "miscritique")} == {"not_wrong"}
    facts = ended.words.stages
    assert facts["miscritique"].rows.total == 20
    assert facts["misrefine"].rows.done == facts["miscritique"].rows.done == len(rows) == 3


def audit(rows: list[dict[str, str]], engine: VllmEngine) -> None:
    """What is stored is what the model says when it is asked afresh, and in another batch."""
    for role, column in (("answer", "answer"), ("critique", "critique"), ("refine", "refinement")):
        asked = [Request(row["id"], prompts.role_messages(role, row), GREEDY) for row in rows]
        told = {outcome.name: outcome for outcome in drive(engine, each(asked), threading.Event())}
        for row in rows:
            outcome = told[row["id"]]
            assert isinstance(outcome, Completion)
            assert row[column] == outcome.text
            assert row[f"{column}_tokens"] == outcome.tokens


def test_a_model_that_says_nothing_fails_the_stage(bucket, storage, tmp_path):
    model = tiny.make(tmp_path / "silent", always=tiny.END)
    prepared(bucket, TEXTS[:20])
    ended = VllmProgram("generate", task(storage, generate_work(model, "answer")), tmp_path / "a").wait()
    assert ended.code == 3, ended.log
    assert "rejected, more than the 2.0%" in ended.words.message
    assert "empty" in ended.words.message
    assert ended.words.error == "UserError"
    assert ended.words.stages["answer"].rows.rejected > 0


def test_a_thought_that_the_prompt_opens_and_the_model_never_ends_is_no_answer(bucket, storage, tmp_path):
    opened = tiny.TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    model = tiny.make(tmp_path / "thinker", template=opened)
    prepared(bucket, TEXTS[:20])
    ended = VllmProgram(
        "generate", task(storage, generate_work(model, "answer", max_rejected=1.0)), tmp_path / "a"
    ).wait()
    assert ended.code == 0, ended.log
    assert ended.words.stages["answer"].rows.done == 0
    rejected = stored_rejections(bucket, "answer")
    assert {row["reason"] for row in rejected} <= {"unfinished_thought", "truncated", "repetition"}
    assert [row for row in rejected if row["reason"] == "unfinished_thought"]


def test_prompts_beyond_the_context_and_replies_without_end_are_rejected_alone(bucket, storage, tmp_path):
    model = tiny.make(tmp_path / "endless", always="a", context=256)
    prepared(bucket, ["short?", "long " * 300, "short too?"])
    work = generate_work(model, "answer", max_rejected=1.0, sampling=(contract.Sampling(max_tokens=9),))
    ended = VllmProgram("generate", task(storage, work), tmp_path / "a").wait()
    assert ended.code == 0, ended.log
    facts = ended.words.stages["answer"]
    rejected = stored_rejections(bucket, "answer")
    assert sorted((row["reason"], row["tokens"]) for row in rejected) == [
        ("too_long", 0),
        ("truncated", 9),
        ("truncated", 9),
    ]
    assert (facts.rows.total, facts.rows.done) == (3, 0)


def test_a_context_that_the_model_does_not_have_is_refused(tiny_model):
    with pytest.raises(UserError, match="cannot load the model"):
        VllmEngine(tiny_model, contract.Engine(dtype="float32", max_model_len=1 << 20), ChatTemplate.load(tiny_model))


def test_a_sampled_row_has_the_same_text_in_any_company(engine):
    warm = contract.Sampling(max_tokens=24, temperature=1.0)

    def ask(numbers: list[int]) -> dict[str, str]:
        seeds = {n: warm.model_copy(update={"seed": n}) for n in numbers}
        asked = [Request(str(n), prompts.answer_messages(TEXTS[n]), seeds[n]) for n in numbers]
        told = drive(engine, each(asked), threading.Event())
        return {outcome.name: outcome.text for outcome in told if isinstance(outcome, Completion)}

    together, alone = ask(list(range(12))), ask([5])
    assert alone["5"] == together["5"]
    assert len(set(together.values())) > 6
