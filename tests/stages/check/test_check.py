"""The check of the examples on a CPU: what it counts for each objective, and what it refuses."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.stage_builders import context
from support.train_builders import STAGE, quadruple, refined, train_work

from cgd_stages.check import __main__ as check
from cgd_stages.contract import Check, Rows, StageFacts, Storage, Train
from cgd_stages.errors import TransientError, UserError
from cgd_stages.runtime.program import Context
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import REJECTED, Folder
from cgd_stages.store.rows import from_parquet, now
from cgd_stages.store.run import RunStore
from cgd_stages.train.example_files import make_examples
from cgd_stages.train.stage import stage_of
from cgd_stages.training.job import checkpoints_of

PROSE = "Nobody grades this reference: it ends on no answer, and it is long."
ROWS = [quadruple(number, reference=PROSE if number else None) for number in range(10)]


def checking(storage: Storage, scratch: Path, *trainings: Train) -> Context:
    return context(storage, Check(trainings=trainings), scratch)


@pytest.fixture
def two(tiny_model: Path) -> list[Train]:
    return [train_work(tiny_model, common_rows=True), train_work(tiny_model, objective="SFT", common_rows=True)]


def test_rows_and_tokens_of_every_objective_are_told(
    bucket: Bucket, storage: Storage, tmp_path: Path, two: list[Train]
) -> None:
    refined(bucket, ROWS)
    given = checking(storage, tmp_path, *two)
    facts = check.main(given)["check"]
    assert facts.rows == Rows(total=20, done=18, rejected=2)
    assert (facts.metrics["cgd_rejected"], facts.metrics["sft_rejected"]) == (0, 1)
    assert (facts.metrics["cgd_left_out"], facts.metrics["common_examples"]) == (1, 9)
    assert 0 < facts.metrics["cgd_learned_tokens"] < facts.metrics["sft_learned_tokens"]
    assert sum(value for name, value in facts.metrics.items() if name.startswith("sft_length_to_")) == 9
    assert RunStore(bucket, given.task.run).pointer("check").digest == facts.digest


def test_rejected_rows_are_stored_with_the_training_that_leaves_them_out(
    bucket: Bucket, storage: Storage, tmp_path: Path, two: list[Train]
) -> None:
    refined(bucket, ROWS)
    folder = Folder(bucket, "team", "check", check.main(checking(storage, tmp_path, *two))["check"].digest)
    (part,) = folder.require().under(REJECTED)
    assert [(row["id"], row["stage"], row["reason"]) for row in from_parquet(folder.read(part))] == [
        (ROWS[0]["id"], "train-sft", "missing")
    ]


def test_every_objective_that_cannot_be_trained_is_told_at_once(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, [row | {"reference": None} for row in ROWS])
    works = [train_work(tiny_model, objective=one, max_sequence_length=20) for one in ("CGD", "SFT")]
    given = checking(storage, tmp_path, *works)
    with pytest.raises(UserError, match=r"CGD: 10 of 10 .*too_long 10.* SFT: 10 of 10 .*missing 10"):
        check.main(given)
    assert given.facts["check"].rows == Rows(total=20, done=0, rejected=20)


def test_what_was_checked_once_is_not_checked_again(
    bucket: Bucket, storage: Storage, tmp_path: Path, two: list[Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    refined(bucket, ROWS)
    first = check.main(checking(storage, tmp_path, *two))
    monkeypatch.setattr(check, "_count_examples", lambda *_: pytest.fail("checked again"))
    assert check.main(checking(storage, tmp_path, *two)) == first


@pytest.mark.parametrize("change", [{"max_rejected": 0.0}, {"max_sequence_length": 500}, {"objective": "CFT"}])
def test_another_limit_length_or_objective_is_checked_anew(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, change: dict[str, Any]
) -> None:
    refined(bucket, ROWS)
    digests = [
        check.main(checking(storage, tmp_path, train_work(tiny_model, **changes)))["check"].digest
        for changes in ({}, change)
    ]
    assert digests[0] != digests[1]


def test_training_counts_what_the_check_has_counted(
    bucket: Bucket, storage: Storage, tmp_path: Path, two: list[Train]
) -> None:
    refined(bucket, ROWS)
    metrics = check.main(checking(storage, tmp_path, *two))["check"].metrics
    for work in two:
        stage = stage_of(context(storage, work, tmp_path))
        made = make_examples(stage, tmp_path)
        own = {f"{work.objective.lower()}_{name}": value for name, value in made.counts.metrics().items()}
        assert own.items() <= metrics.items()


def begun(bucket: Bucket, storage: Storage, scratch: Path, work: Train) -> None:
    """A training of this layout has stored a checkpoint."""
    given = context(storage, work, scratch)
    given.task = given.task.model_copy(update={"stage": STAGE})
    checkpoints_of(stage_of(given).folder, work).complete(20, [])


@pytest.mark.parametrize(
    ("change", "told"),
    [({"processes_per_worker": 2}, "2 processes, ZeRO 2"), ({"zero_stage": 3}, "1 processes, ZeRO 3")],
)
def test_a_checkpoint_that_the_training_pods_could_not_go_on_from_is_refused(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, change: dict[str, Any], told: str
) -> None:
    refined(bucket, ROWS)
    check.main(checking(storage, tmp_path, train_work(tiny_model)))
    begun(bucket, storage, tmp_path, train_work(tiny_model))
    with pytest.raises(UserError, match=rf"step-000020 was written with 1 processes, ZeRO 2 .* has {told}") as caught:
        check.main(checking(storage, tmp_path, train_work(tiny_model, **change)))
    assert "to train from the start" in caught.value.hint


def test_a_checkpoint_of_this_layout_or_of_another_training_is_no_reason_to_refuse(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, ROWS)
    begun(bucket, storage, tmp_path, train_work(tiny_model))
    begun(bucket, storage, tmp_path, train_work(tiny_model, seed=1, zero_stage=3))
    assert check.main(checking(storage, tmp_path, train_work(tiny_model)))["check"].rows.done == 10


def test_a_training_that_is_done_needs_no_checkpoint_of_its_layout(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, ROWS)
    work = train_work(tiny_model)
    begun(bucket, storage, tmp_path, work)
    given = context(storage, work, tmp_path)
    given.task = given.task.model_copy(update={"stage": STAGE})
    stage_of(given).folder.finish(facts=StageFacts(), parts=[], started=now(), inputs={})
    check.main(checking(storage, tmp_path, train_work(tiny_model, zero_stage=3)))


def test_importing_the_check_imports_no_torch() -> None:
    code = "import sys, cgd_stages.check; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def answered(right: int) -> list[dict[str, Any]]:
    """Rows with references that end on an answer; the first refinements are right."""
    return [
        quadruple(number, reference=f"#### {number}", answer="0", refinement=str(number if number <= right else 0))
        for number in range(1, 11)
    ]


@pytest.mark.parametrize(("right", "least"), [(7, 0.7), (10, 1.0), (0, 0.0)])
def test_refinements_that_are_right_often_enough_are_trained_on(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, right: int, least: float
) -> None:
    refined(bucket, answered(right))
    work = Check(trainings=(train_work(tiny_model),), min_right_refinements=least)
    metrics = check.main(context(storage, work, tmp_path))["check"].metrics
    assert (metrics["right_refinements"], metrics["graded"]) == (right / 10, 10)


def test_refinements_that_are_wrong_too_often_are_refused_also_when_they_were_checked_before(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, answered(6))
    trainings = (train_work(tiny_model),)
    strict, loose = (Check(trainings=trainings, min_right_refinements=least) for least in (0.7, 0.6))
    told = r"60\.0.% of 10 graded refinements are right, less than the 70\.0.% of spec.generation.minRightRefinements"
    for _ in range(2):
        given = context(storage, strict, tmp_path)
        with pytest.raises(UserError, match=told):
            check.main(given)
        assert given.facts["check"].metrics["right_refinements"] == 0.6
        with pytest.raises(TransientError, match="has no output of check"):
            RunStore(bucket, given.task.run).pointer("check")
    assert check.main(context(storage, loose, tmp_path))["check"].metrics["right_refinements"] == 0.6


def test_a_limit_without_references_to_grade_by_is_refused(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, ROWS)
    work = Check(trainings=(train_work(tiny_model),), min_right_refinements=0.5)
    with pytest.raises(UserError, match="no reference ends on an answer"):
        check.main(context(storage, work, tmp_path))
