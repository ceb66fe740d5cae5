"""generate: wrong critiques that the teacher writes of the same drafts, and what it refines from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.stage_builders import (
    RuleEngine,
    context,
    generate_with,
    generate_work,
    prepared,
    said,
    stored_rejections,
    stored_rows,
)

from cgd_stages.contract import Role, Rows, Sampling, StageFacts, Storage
from cgd_stages.engines.base import Completion, Request
from cgd_stages.errors import UserError
from cgd_stages.method import prompts
from cgd_stages.store import part_writer
from cgd_stages.store.bucket import Bucket

TEXTS = [f"How many apples are {n} apples?" for n in range(12)]
WRONG_DRAFTS = 8
"""The teacher's critiques find the drafts of the first prompts wrong."""
BOTH: tuple[Role, Role] = ("miscritique", "misrefine")
Ask = Callable[..., dict[str, StageFacts]]


def number(request: Request) -> int:
    """Of the prompt that a request is about."""
    return int(request.messages[-1]["content"].partition("are ")[2].split()[0])


def teacher(turned: Callable[[int], bool] = lambda _: True, always: str = "") -> Callable[[Request], Completion]:
    """A teacher that turns the verdicts of these prompts round, and keeps the others; or that always says one text."""

    def say(request: Request) -> Completion:
        role, wrong = request.name.rpartition("-")[2], number(request) < WRONG_DRAFTS
        if role == "miscritique":
            opposite = turned(number(request))
            return said(request, always or f"Believe me.\nConclusion: {'wrong' if wrong != opposite else 'right'}")
        if role == "critique":
            return said(request, f"Honestly.\nConclusion: {'wrong' if wrong else 'right'}")
        return said(request, f"{role} {request.sampling.seed}")

    return say


@pytest.fixture
def ask(bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Do these roles with an engine, a part for every 4 rows."""
    monkeypatch.setattr(part_writer, "FLUSH_ROWS", 4)
    prepared(bucket, TEXTS)

    def do(engine: RuleEngine, *roles: Role, shard: int = 0, **changes: Any) -> dict[str, StageFacts]:
        work = generate_work(tiny_model, *roles, **changes)
        return generate_with(engine, context(storage, work, tmp_path, shard=shard))

    do(RuleEngine(teacher()), "answer")
    do(RuleEngine(teacher()), "critique", "refine")
    return do


def test_every_critique_gets_one_of_the_opposite_verdict_and_what_is_refined_from_it(bucket: Bucket, ask: Ask) -> None:
    engine = RuleEngine(teacher())
    facts = ask(engine, *BOTH)
    rows, own = stored_rows(bucket, "misrefine"), stored_rows(bucket, "critique")
    assert [row["critique"] for row in rows] == [row["critique"] for row in own]
    told = {"right": "Believe me.\nConclusion: wrong", "wrong": "Believe me.\nConclusion: right"}
    assert [row["miscritique"] for row in rows] == [told[row["verdict"]] for row in rows]
    assert all(row["misrefinement"].startswith("misrefine ") for row in rows)
    assert facts["misrefine"].rows == Rows(total=12, done=12)
    asked = {request.name: request.messages for request in engine.asked}
    for row in rows:
        draft = (row["prompt"], row["answer"])
        assert asked[f"{row['id']}-0-miscritique"] == prompts.miscritique_messages(*draft, row["critique"])
        assert asked[f"{row['id']}-0-misrefine"] == prompts.refine_messages(*draft, row["miscritique"])


def test_what_does_not_turn_the_verdict_round_is_rejected_and_counted_whatever_may_be_rejected(
    bucket: Bucket, ask: Ask
) -> None:
    facts = ask(RuleEngine(teacher(lambda prompt: prompt % 3 == 0)), *BOTH, max_rejected=0.0)
    assert facts["miscritique"].rows == Rows(total=12, done=4, rejected=8)
    assert facts["miscritique"].metrics["rejected_not_wrong"] == 8
    assert facts["misrefine"].rows == Rows(total=4, done=4)
    rejected = stored_rejections(bucket, "miscritique")
    assert {row["reason"] for row in rejected} == {"not_wrong"}
    assert "verdict wrong, of the critique wrong" in {row["detail"].partition(":")[0] for row in rejected}


def test_a_teacher_that_turns_no_verdict_round_is_refused_with_what_to_do(ask: Ask) -> None:
    with pytest.raises(UserError, match="miscritique: the teacher has turned round none of 12 verdicts") as caught:
        ask(RuleEngine(teacher(always="I will not say.")), *BOTH)
    assert "take miscritique out of spec.training" in caught.value.hint


def test_a_miscritique_without_a_text_counts_as_one_that_may_not_be_rejected(ask: Ask) -> None:
    with pytest.raises(UserError, match=r"miscritique: . of 12 rows rejected, more than the 2.0%.* \(empty .\)"):
        ask(RuleEngine(teacher(always="<think>hm</think>")), *BOTH)


def test_several_refinements_of_an_answer_have_as_many_of_its_miscritique_under_the_same_keys(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path, ask: Ask
) -> None:
    drawn: dict[str, Any] = {"samples": 3, "sampling": (Sampling(max_tokens=48, temperature=0.7),) * 2}
    ask(RuleEngine(teacher()), "critique", "refine", **drawn)
    engine = RuleEngine(teacher(lambda prompt: prompt != 1))
    for shard in range(2):
        ask(engine, *BOTH, shards=2, shard=shard, **drawn)
    right, wrong = (
        {(row["id"], row["sample"]) for row in stored_rows(bucket, stage)} for stage in ("refine", "misrefine")
    )
    assert (len(right), len(wrong)) == (36, 33)
    assert wrong < right
    assert sum(request.name.endswith("-miscritique") for request in engine.asked) == 12
