"""generate: several answers and refinements of a row are rows of their own, asked for once, however often it stops."""

from collections import Counter
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
    stop_after,
    stored_rejections,
    stored_rows,
)

from cgd_stages.contract import Rows, Sampling, Storage
from cgd_stages.engines.base import Reply, Request
from cgd_stages.errors import Interrupted
from cgd_stages.prepare.sources import row_id
from cgd_stages.runtime.program import Context
from cgd_stages.store import part_writer
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.shards import owns

TEXTS = [f"How many apples are {n} apples?" for n in range(10)]
WARM = Sampling(max_tokens=48, temperature=0.7)

Asking = Callable[..., Context]


@pytest.fixture
def asking(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Asking:
    """The context of one attempt at a stage, with a part for every 4 rows."""
    monkeypatch.setattr(part_writer, "FLUSH_ROWS", 4)
    prepared(bucket, TEXTS)

    def make(*roles: Any, shard: int = 0, samples: int = 3, **changes: Any) -> Context:
        sampling = tuple(WARM for _ in roles)
        work = generate_work(tiny_model, *roles, sampling=sampling, samples=samples, **changes)
        return context(storage, work, tmp_path, shard=shard)

    return make


def by_seed(request: Request) -> Reply:
    """A text that shows which draw it is."""
    return said(request, f"draw {request.sampling.seed}")


def keys(bucket: Bucket, stage: str) -> Counter[tuple[str, int]]:
    return Counter((row["id"], row["sample"]) for row in stored_rows(bucket, stage))


def every(samples: int) -> Counter[tuple[str, int]]:
    return Counter((row_id(text), sample) for text in TEXTS for sample in range(samples))


def test_each_prompt_has_as_many_answers_as_are_asked_for(bucket: Bucket, asking: Asking) -> None:
    facts = generate_with(RuleEngine(by_seed), asking("answer"))["answer"]
    assert keys(bucket, "answer") == every(3)
    assert facts.rows == Rows(total=30, done=30)
    assert len({row["answer"] for row in stored_rows(bucket, "answer")}) == 30


def test_the_answers_of_a_prompt_are_the_same_however_many_are_drawn(bucket: Bucket, asking: Asking) -> None:
    generate_with(RuleEngine(by_seed), asking("answer", samples=1))
    one = {(row["id"], row["sample"]): row["answer"] for row in stored_rows(bucket, "answer")}
    generate_with(RuleEngine(by_seed), asking("answer", samples=3))
    three = {(row["id"], row["sample"]): row["answer"] for row in stored_rows(bucket, "answer")}
    assert one.items() <= three.items()


def test_one_answer_is_stored_where_it_was_before_there_were_several(asking: Asking) -> None:
    digests = {
        samples: generate_with(RuleEngine(), asking("answer", samples=samples))["answer"].digest for samples in (1, 2)
    }
    assert digests[1] != digests[2]
    given = asking("answer", samples=1)
    generate_with(RuleEngine(), given)
    assert "samples" not in given.store.input("answer").require().inputs


@pytest.mark.parametrize("steps", [0, 2, 6])
def test_after_sigterm_only_the_missing_samples_are_asked_for(bucket: Bucket, asking: Asking, steps: int) -> None:
    first, attempt = RuleEngine(by_seed), asking("answer")
    stop_after(first, steps, attempt.stop)
    with pytest.raises(Interrupted):
        generate_with(first, attempt)
    stored = attempt.facts["answer"].rows.done
    assert 0 < stored < 30
    second = RuleEngine(by_seed)
    generate_with(second, asking("answer"))
    assert len(second.asked) == 30 - stored
    assert keys(bucket, "answer") == every(3)


@pytest.mark.parametrize("steps", [1, 7, 17])
def test_a_fused_teacher_that_is_stopped_draws_the_missing_refinements(
    bucket: Bucket, asking: Asking, steps: int
) -> None:
    generate_with(RuleEngine(by_seed), asking("answer", samples=2))
    first, attempt = RuleEngine(by_seed), asking("critique", "refine", samples=3)
    stop_after(first, steps, attempt.stop)
    with pytest.raises(Interrupted):
        generate_with(first, attempt)
    assert attempt.facts["critique"].rows.total == 20
    assert attempt.facts["refine"].rows.total == 60
    stored = sum(facts.rows.done for facts in attempt.facts.values())
    second = RuleEngine(by_seed)
    facts = generate_with(second, asking("critique", "refine", samples=3))
    assert len(second.asked) == 80 - stored
    assert keys(bucket, "critique") == every(2)
    assert keys(bucket, "refine") == every(6)
    assert facts["refine"].rows == Rows(total=60, done=60)


def test_every_refinement_belongs_to_the_answer_that_its_sample_names(bucket: Bucket, asking: Asking) -> None:
    generate_with(RuleEngine(by_seed), asking("answer", samples=2))
    generate_with(RuleEngine(by_seed), asking("critique", samples=1))
    generate_with(RuleEngine(by_seed), asking("refine", samples=3))
    answers = {(row["id"], row["sample"]): row["answer"] for row in stored_rows(bucket, "answer")}
    rows = stored_rows(bucket, "refine")
    assert len(rows) == 60
    assert all(row["answer"] == answers[row["id"], row["sample"] // 3] for row in rows)
    assert len({row["refinement"] for row in rows}) == 60


def test_a_rejected_answer_has_no_draws_further_on(bucket: Bucket, asking: Asking) -> None:
    bad = row_id(TEXTS[0])

    def one_is_cut(request: Request) -> Reply:
        return said(request, "and", "length") if request.name == f"{bad}-1-answer" else by_seed(request)

    facts = generate_with(RuleEngine(one_is_cut), asking("answer", samples=2, max_rejected=0.1))
    assert facts["answer"].rows == Rows(total=20, done=19, rejected=1)
    facts = generate_with(RuleEngine(by_seed), asking("critique", "refine", samples=3))
    assert facts["refine"].rows == Rows(total=57, done=57)
    assert {sample for identity, sample in keys(bucket, "refine") if identity == bad} == {0, 1, 2}


def test_a_rejected_draw_takes_no_other_draw_with_it(bucket: Bucket, asking: Asking) -> None:
    generate_with(RuleEngine(by_seed), asking("answer", samples=1))
    bad = f"{row_id(TEXTS[0])}-1-refine"

    def one_is_empty(request: Request) -> Reply:
        return said(request, "") if request.name == bad else by_seed(request)

    facts = generate_with(RuleEngine(one_is_empty), asking("critique", "refine", samples=3, max_rejected=0.1))
    assert facts["refine"].rows == Rows(total=30, done=29, rejected=1)
    assert [(row["id"], row["sample"]) for row in stored_rejections(bucket, "refine")] == [(row_id(TEXTS[0]), 1)]


def test_shards_share_the_samples_by_their_prompt(bucket: Bucket, asking: Asking) -> None:
    for shard in range(2):
        facts = generate_with(RuleEngine(by_seed), asking("answer", shards=2, shard=shard))["answer"]
        assert facts.rows.total == 3 * sum(owns(row_id(text), shard, 2) for text in TEXTS)
    assert keys(bucket, "answer") == every(3)


def test_another_number_of_shards_goes_on_from_the_stored_samples(bucket: Bucket, asking: Asking) -> None:
    attempt, first = asking("answer", shards=1), RuleEngine(by_seed)
    stop_after(first, 3, attempt.stop)
    with pytest.raises(Interrupted):
        generate_with(first, attempt)
    engines = [RuleEngine(by_seed) for _ in range(2)]
    for shard, engine in enumerate(engines):
        generate_with(engine, asking("answer", shards=2, shard=shard))
    assert sum(len(engine.asked) for engine in engines) == 30 - attempt.facts["answer"].rows.done
    assert keys(bucket, "answer") == every(3)


def test_too_many_rejected_draws_end_the_stage(asking: Asking) -> None:
    def cut(request: Request) -> Reply:
        return said(request, "and", "length") if request.name.endswith("-2-answer") else by_seed(request)

    with pytest.raises(Exception, match=r"of 30 rows rejected, more than the 20.0%"):
        generate_with(RuleEngine(cut), asking("answer", max_rejected=0.2))
