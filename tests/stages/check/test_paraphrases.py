"""check: rows that paraphrase a benchmark's question, which a run keeps and lists, or does not learn."""

from pathlib import Path
from typing import Any

import pytest
from support.stage_builders import RUN, context
from support.train_builders import quadruple, train_work

from cgd_stages.check import __main__ as check
from cgd_stages.contract import Check, Decontaminate, StageFacts, StageName, Storage
from cgd_stages.errors import UserError
from cgd_stages.quality.paraphrases import FOUND
from cgd_stages.store.benchmarks import store_originals
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS, Folder, Part
from cgd_stages.store.rows import Row, digest_of, from_parquet, now, row_schema
from cgd_stages.store.run import RunStore
from cgd_stages.training.dataset import read_left_out

QUESTION = "Nora sold 48 candles in April and then she sold half as many candles in May. How many did she sell in all?"
NAMES = QUESTION.replace("Nora", "Pavel").replace("she", "he")
SOLUTION = "In May she sold 48 / 2 = 24 candles, which makes 48 + 24 = 72 candles that Nora sold in both months."
ORIGINALS = [{"benchmark": "sums", "id": "q1", "prompt": QUESTION, "reference": SOLUTION}]


def stored(bucket: Bucket, rows: list[Row], **inputs: Any) -> None:
    """Finished stages prepare, with the questions that rows are compared with, and refine."""
    for stage in ("prepare", "refine"):
        schema = row_schema(stage)
        folder = Folder(bucket, RUN.namespace, stage, digest_of(stage=stage, rows=rows, inputs=inputs))
        parts: list[Part] = [
            folder.put_rows(PARTS, [{name: row[name] for name in schema.names} for row in rows], schema)
        ]
        parts += [store_originals(folder, ORIGINALS)] if stage == "prepare" else []
        facts = StageFacts.model_validate({"rows": {"total": len(rows), "done": len(rows)}})
        RunStore(bucket, RUN).point_at(folder.finish(facts=facts, parts=parts, started=now(), inputs=inputs))


ROWS = [
    *(quadruple(number, reference="1") for number in range(6)),
    quadruple(6, reference="1", prompt=NAMES),
    quadruple(7, reference=SOLUTION.replace("Nora", "Pavel")),
    quadruple(8, reference="1", refinement=f"{NAMES} It is 72."),
]


class Checked:
    def __init__(self, storage: Storage, scratch: Path, model: Path, **changes: Any) -> None:
        decontaminate = Decontaminate(against=("sums",), paraphrases=changes.pop("paraphrases", "keep"))
        training = train_work(model, common_rows=True)
        given = context(storage, Check(trainings=(training,), decontaminate=decontaminate, **changes), scratch)
        self.facts = check.main(given)["check"]
        self.folder = given.store.input("check")
        (part,) = self.folder.require().under(FOUND)
        self.found = from_parquet(self.folder.read(part))
        self.left_out = read_left_out(self.folder, StageName("train-cgd"))


def test_what_is_kept_is_counted_and_learned(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    stored(bucket, ROWS)
    kept = Checked(storage, tmp_path, tiny_model)
    assert (kept.facts.metrics["paraphrased"], kept.facts.metrics["paraphrased_questions"]) == (3, 1)
    (question,) = kept.found
    assert (question["question"], question["rows"]) == ("q1", 3)
    assert kept.left_out == {}
    assert kept.facts.rows.done == 9


def test_what_is_removed_is_learned_by_no_training(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    stored(bucket, ROWS)
    removed = Checked(storage, tmp_path, tiny_model, paraphrases="remove")
    assert sorted(removed.left_out) == [(ROWS[number]["id"], 0) for number in (6, 7, 8)]
    texts = {key: left_out.detail for key, left_out in removed.left_out.items()}
    assert [texts[ROWS[number]["id"], 0].split(" has ")[0] for number in (6, 7, 8)] == [
        "the prompt",
        "the reference",
        "the refinement",
    ]
    assert removed.facts.metrics["left_out_contaminated"] == removed.facts.metrics["paraphrased"] == 3
    rows = removed.facts.rows
    assert (rows.total, rows.done, rows.rejected) == (9, 6, 3)


def test_another_refinement_of_the_answer_is_learned_where_one_is_removed(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    first = quadruple(1, reference="3", refinement=NAMES)
    stored(bucket, [first, first | {"sample": 1, "refinement": "1 + 2 = 3."}, quadruple(2), quadruple(3)], samples=2)
    removed = Checked(storage, tmp_path, tiny_model, paraphrases="remove")
    assert {key: left_out.reason for key, left_out in removed.left_out.items()} == {(first["id"], 0): "contaminated"}


def test_a_row_that_the_run_does_not_choose_is_not_met_by_training(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    first = quadruple(1, reference="3", refinement="1 + 2 = 3.")
    stored(bucket, [first, first | {"sample": 1, "refinement": NAMES}, quadruple(2), quadruple(3)], samples=2)
    kept = Checked(storage, tmp_path, tiny_model)
    assert kept.found == []


def test_a_run_that_is_left_with_nothing_says_why(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    stored(bucket, ROWS[6:])
    with pytest.raises(UserError, match=r"none of 3 rows is left to learn from \(contaminated 3\)"):
        Checked(storage, tmp_path, tiny_model, paraphrases="remove")
