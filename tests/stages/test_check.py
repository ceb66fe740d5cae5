"""The check of the examples on a CPU: what it counts for each objective, and what it refuses."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stage_builders import context
from train_builders import quadruple, refined, train_work

from cgd_stages import check, train
from cgd_stages.contract import Check, Rows, Storage, Train
from cgd_stages.errors import UserError
from cgd_stages.folders import REJECTED, Folder, from_parquet, read_pointer
from cgd_stages.program import Context
from cgd_stages.storage import Bucket

ROWS = [quadruple(number, reference="yes" if number else None) for number in range(10)]


def checking(storage: Storage, scratch: Path, *trainings: Train) -> Context:
    return context(storage, Check(trainings=trainings), scratch)


@pytest.fixture
def two(tiny_model: Path) -> list[Train]:
    return [train_work(tiny_model), train_work(tiny_model, objective="SFT")]


def test_rows_and_tokens_of_every_objective_are_told(
    bucket: Bucket, storage: Storage, tmp_path: Path, two: list[Train]
) -> None:
    refined(bucket, ROWS)
    given = checking(storage, tmp_path, *two)
    facts = check.main(given)["check"]
    assert facts.rows == Rows(total=20, done=19, rejected=1)
    assert (facts.metrics["cgd_rejected"], facts.metrics["sft_rejected"]) == (0, 1)
    assert 0 < facts.metrics["sft_learned_tokens"] < facts.metrics["cgd_learned_tokens"]
    assert sum(value for name, value in facts.metrics.items() if name.startswith("sft_length_to_")) == 9
    assert read_pointer(bucket, given.task.run, "check").digest == facts.digest


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
    monkeypatch.setattr(check, "_check", lambda *_: pytest.fail("checked again"))
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
        stage = train._stage(context(storage, work, tmp_path))
        made = train._make_examples(stage, Path(work.student.name), tmp_path)
        own = {f"{work.objective.lower()}_{name}": value for name, value in made.books.metrics().items()}
        assert own.items() <= metrics.items()


def test_importing_the_check_imports_no_torch() -> None:
    code = "import sys, cgd_stages.check; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
