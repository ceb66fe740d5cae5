"""The trainings of a run learn from the same rows: what one objective cannot use, and what keep leaves out, no training
learns. check finds these rows, and train leaves them out."""

from pathlib import Path
from typing import Any

import pytest
from support.stage_builders import RUN, context
from support.train_builders import distilled, quadruple, refined, train_work

from cgd_stages.chat.example import Example
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.check import __main__ as check
from cgd_stages.contract import Check, Objective, Rows, StageFacts, Storage, Train
from cgd_stages.errors import TransientError, UserError
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS, REJECTED, Folder
from cgd_stages.store.rows import Row, digest_of, from_parquet, now, row_schema
from cgd_stages.store.run import RunStore
from cgd_stages.train.example_files import MadeExamples, make_examples
from cgd_stages.train.stage import stage_of
from cgd_stages.training.dataset import Dataset

PROSE = "Nobody grades this reference: it ends on no answer, and it is long."
LONG = "Look again. " * 60 + "\nConclusion: wrong"


def rows(count: int = 10, **odd: Any) -> list[Row]:
    """Rows that every objective can use; the first has other texts."""
    found = [quadruple(number, reference=PROSE) for number in range(count)]
    return [found[0] | odd, *found[1:]]


def works(model: Path, *objectives: Objective, **changes: Any) -> tuple[Train, ...]:
    given = {"common_rows": True, "max_sequence_length": 400, "max_rejected": 0.3} | changes
    return tuple(train_work(model, objective=objective, **given) for objective in objectives)


class Run:
    """A run whose rows are checked, and whose trainings then make their examples."""

    def __init__(self, storage: Storage, scratch: Path, trainings: tuple[Train, ...], **choice: Any) -> None:
        self._storage, self._scratch, self.trainings = storage, scratch, trainings
        self.work = Check(trainings=trainings, **choice)

    def check(self) -> StageFacts:
        return check.main(context(self._storage, self.work, self._scratch))["check"]

    def trained(self, work: Train) -> tuple[set[tuple[str, int]], MadeExamples]:
        """The rows that a training learns."""
        given = context(self._storage, work, self._scratch)
        given.task = given.task.model_copy(update={"stage": work.stage})
        stage = stage_of(given)
        made = make_examples(stage, self._scratch)
        found = {
            (row["id"], row["sample"]) for row, example in stage.dataset.examples() if isinstance(example, Example)
        }
        return found, made


def dataset_of(bucket: Bucket, work: Train) -> Dataset:
    return Dataset.of(RunStore(bucket, RUN), work, ChatTemplate.load(Path(work.student.name)))


def ids(given: list[Row]) -> set[tuple[str, int]]:
    return {(row["id"], row["sample"]) for row in given}


def test_a_row_that_is_too_long_for_one_objective_is_learned_by_none(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    given = rows(critique=LONG)
    refined(bucket, given)
    run = Run(storage, tmp_path, works(tiny_model, "CGD", "SFT", "RefinedSFT"))
    facts = run.check()
    assert facts.rows == Rows(total=30, done=27, rejected=3)
    assert facts.metrics["common_examples"] == 9
    counts = {
        name: facts.metrics.get(name) for name in ("cgd_rejected", "cgd_left_out", "sft_rejected", "sft_left_out")
    }
    assert counts == {"cgd_rejected": 1, "cgd_left_out": None, "sft_rejected": 0, "sft_left_out": 1}
    for work in run.trainings:
        learned, made = run.trained(work)
        assert learned == ids(given[1:])
        assert made.counts.rows == Rows(total=10, done=9, rejected=1)


def test_a_row_without_a_pair_is_left_out_of_dpo_alone_and_counted(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    given = rows(verdict="right")
    refined(bucket, given)
    cgd, dpo = works(tiny_model, "CGD", "DPO")
    run = Run(storage, tmp_path, (cgd, dpo.model_copy(update={"beta": 0.1})))
    facts = run.check()
    assert facts.rows == Rows(total=20, done=19, rejected=1)
    assert (facts.metrics["common_examples"], facts.metrics["dpo_left_out"], facts.metrics["dpo_rejected"]) == (
        10,
        1,
        0,
    )
    learned, made = zip(*map(run.trained, run.trainings), strict=True)
    assert learned == (ids(given), ids(given[1:]))
    assert made[1].counts.left_out == {"right_draft": 1}


def test_the_rows_that_a_training_leaves_out_are_listed_with_the_reason(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, rows(critique=LONG))
    run = Run(storage, tmp_path, works(tiny_model, "CGD", "SFT"))
    run.check()
    cgd, sft = (run.trained(work)[1] for work in run.trainings)
    folder = Folder(bucket, RUN.namespace, "train-sft", "x")
    (part,) = sft.parts
    stored = next(
        from_parquet(bucket.get(one.key) or b"") for one in bucket.list("team/train-sft/") if one.key.endswith(part.key)
    )
    assert [(row["stage"], row["reason"]) for row in stored] == [("train-sft", "unusable")]
    assert stored[0]["detail"].startswith("train-cgd cannot use it: too_long")
    assert [row["reason"] for row in cgd.counts.rejected] == ["too_long"]
    assert folder.done() is None


def test_a_missing_reference_is_missing_for_every_training(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    given = rows(reference=None)
    refined(bucket, given)
    distilled(bucket, {str(row["id"]): "Mine." for row in given[:9]})
    run = Run(storage, tmp_path, works(tiny_model, "CGD", "SFT", "DistilledSFT"))
    assert run.check().metrics["common_examples"] == 8
    for work in run.trainings:
        assert run.trained(work)[0] == ids(given[1:9])


def test_what_a_training_leaves_out_is_in_its_digest_only_where_it_leaves_something_out(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, rows(critique=LONG))
    run = Run(storage, tmp_path, works(tiny_model, "CGD", "SFT"))
    run.check()
    together = [dataset_of(bucket, work).identity() for work in run.trainings]
    alone = [dataset_of(bucket, work.model_copy(update={"common_rows": False})).identity() for work in run.trainings]
    assert together[0] == alone[0]  # it cannot use that row anyway
    assert together[1] == alone[1] | {"leftOut": digest_of(keys=[[f"{0:020x}", 0]])}


def test_a_row_that_several_objectives_cannot_use_is_their_own_to_reject(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, rows(critique=LONG))
    run = Run(storage, tmp_path, works(tiny_model, "CGD", "CFT"))
    assert run.check().rows == Rows(total=20, done=18, rejected=2)
    for work in run.trainings:
        dataset = dataset_of(bucket, work)
        assert not dataset.left_out
        assert "leftOut" not in dataset.identity()
        assert [row["reason"] for row in run.trained(work)[1].counts.rejected] == ["too_long"]


def test_rows_that_every_objective_can_use_change_no_digest(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, rows())
    run = Run(storage, tmp_path, works(tiny_model, "CGD", "SFT"))
    assert run.check().metrics["common_examples"] == 10
    for work in run.trainings:
        alone = work.model_copy(update={"common_rows": False})
        assert dataset_of(bucket, work).identity() == dataset_of(bucket, alone).identity()


def test_a_training_waits_for_the_check(bucket: Bucket, tiny_model: Path) -> None:
    refined(bucket, rows())
    with pytest.raises(TransientError, match="no output of check"):
        dataset_of(bucket, works(tiny_model, "CGD")[0])


def test_objectives_that_have_no_row_in_common_are_refused(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    given = rows(2)
    refined(bucket, [given[0] | {"critique": LONG}, given[1] | {"reference": None}])
    run = Run(storage, tmp_path, works(tiny_model, "CGD", "SFT", max_rejected=0.5))
    with pytest.raises(UserError, match=r"CGD: none of 2 rows is left to learn from \(unusable 1\)"):
        run.check()


# --- keep and select


UNKNOWN = "I do not know."
"""Wrong, without a number that the grader would compare in a process of its own."""


def graded(*right: bool) -> list[Row]:
    return [
        quadruple(
            number, reference=f"#### {number}", answer=UNKNOWN, refinement=f"It is {number}." if good else UNKNOWN
        )
        for number, good in enumerate(right, start=1)
    ]


def test_only_rows_with_a_right_refinement_are_learned_by_every_objective(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    given = graded(True, False, True, True, False)
    refined(bucket, given)
    run = Run(storage, tmp_path, works(tiny_model, "CGD", "CFT", "SFT", max_rejected=0), keep="right")
    facts = run.check()
    assert facts.rows == Rows(total=15, done=9, rejected=6)
    assert (facts.metrics["left_out_wrong"], facts.metrics["common_examples"]) == (2, 3)
    for work in run.trainings:
        learned, made = run.trained(work)
        assert learned == ids([given[0], given[2], given[3]])
        assert made.counts.left_out == {"wrong": 2}
        assert made.counts.rows == Rows(total=5, done=3, rejected=2)


def test_the_rows_that_are_not_kept_are_stored_once(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, graded(True, False))
    facts = Run(storage, tmp_path, works(tiny_model, "CGD", "CFT"), keep="right").check()
    folder = Folder(bucket, RUN.namespace, "check", facts.digest)
    (part,) = folder.require().under(REJECTED)
    assert [(row["id"], row["stage"], row["reason"]) for row in from_parquet(folder.read(part))] == [
        (f"{2:020x}", "check", "wrong")
    ]


def test_a_run_that_keeps_every_row_is_checked_where_it_always_was(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, graded(True, False, True))
    digests = {
        keep: Run(storage, tmp_path, works(tiny_model, "CGD"), keep=keep).check().digest for keep in ("all", "right")
    }
    assert digests["all"] != digests["right"]
    folder = Folder(bucket, RUN.namespace, "check", digests["all"])
    assert sorted(folder.require().inputs) == ["graded", "stage", "trainings"]


def test_keep_without_references_is_refused(bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path) -> None:
    refined(bucket, [row | {"reference": None} for row in graded(True, True)])
    with pytest.raises(UserError, match="no reference ends on an answer"):
        Run(storage, tmp_path, works(tiny_model, "CGD"), keep="right").check()


def test_no_right_refinement_at_all_is_refused(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, graded(False, False))
    with pytest.raises(UserError, match=r"none of 2 rows is left to learn from \(wrong 2\)") as caught:
        Run(storage, tmp_path, works(tiny_model, "CGD"), keep="right").check()
    assert "spec.training.keep" in caught.value.hint


def refined_with(bucket: Bucket, given: list[Row], samples: int) -> None:
    """A finished stage refine that has drawn so many refinements of each answer."""
    schema = row_schema("refine")
    folder = Folder(bucket, RUN.namespace, "refine", digest_of(rows=given, samples=samples))
    part = folder.put_rows(PARTS, given, schema)
    facts = StageFacts.model_validate({"rows": {"total": len(given), "done": len(given)}})
    done = folder.finish(facts=facts, parts=[part], started=now(), inputs={"samples": samples})
    RunStore(bucket, RUN).point_at(done)


def drawn(*right: bool) -> list[Row]:
    """Rows of one prompt, with a refinement of another length each."""
    return [
        quadruple(1, reference="#### 1", answer=UNKNOWN, refinement="It is 1." if good else UNKNOWN)
        | {"sample": sample, "refinement_tokens": 9 - sample}
        for sample, good in enumerate(right)
    ]


@pytest.mark.parametrize(
    ("select", "samples"), [("first", {0, 3}), ("shortest-right", {2, 3}), ("all-right", {1, 2, 3})]
)
def test_the_selected_refinements_are_learned(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, select: str, samples: set[int]
) -> None:
    refined(bucket, rows(1))
    refined_with(bucket, drawn(False, True, True, False, False, False), 3)
    run = Run(storage, tmp_path, works(tiny_model, "CGD", "RefinedSFT"), select=select)
    facts = run.check()
    assert facts.metrics["common_examples"] == len(samples)
    assert facts.metrics["left_out_not_selected"] == 6 - len(samples)
    for work in run.trainings:
        assert run.trained(work)[0] == {(f"{1:020x}", sample) for sample in samples}


def test_own_answers_of_the_teacher_go_round_among_the_answers_of_a_prompt(bucket: Bucket, tiny_model: Path) -> None:
    """Two answers with two refinements each, and one own answer of the teacher."""
    refined(bucket, rows(1))
    refined_with(bucket, drawn(True, True, True, True), 2)
    distilled(bucket, {f"{1:020x}": "Mine."})
    (work,) = works(tiny_model, "DistilledSFT", common_rows=False)
    found = list(dataset_of(bucket, work).examples())
    assert sorted(row["sample"] for row, _ in found) == [0, 1, 2, 3]
    assert all(isinstance(example, Example) for _, example in found)


def test_several_own_answers_are_learned_in_turn(bucket: Bucket, tiny_model: Path) -> None:
    refined(bucket, rows(1))
    refined_with(bucket, drawn(True, True, True, True), 2)
    schema = row_schema("distill")
    own = [
        dict.fromkeys(schema.names) | {"id": f"{1:020x}", "sample": n, "prompt": "?", "distilled": f"Mine {n}."}
        for n in range(2)
    ]
    folder = Folder(bucket, RUN.namespace, "distill", digest_of(own=2))
    facts = StageFacts.model_validate({"rows": {"total": 2, "done": 2}})
    part = folder.put_rows(PARTS, own, schema)
    RunStore(bucket, RUN).point_at(folder.finish(facts=facts, parts=[part], started=now(), inputs={"samples": 2}))
    (work,) = works(tiny_model, "DistilledSFT", common_rows=False)
    rows_found = dataset_of(bucket, work)._rows()
    assert {row["sample"]: row["distilled"] for row in rows_found} == {
        0: "Mine 0.", 1: "Mine 0.", 2: "Mine 1.", 3: "Mine 1."
    }  # fmt: skip


def test_variants_of_one_objective_are_counted_apart_and_share_their_rows(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    given = rows(critique=LONG)
    refined(bucket, given)
    plain, bare = works(tiny_model, "CGD", "CGD", max_rejected=0.3)
    bare = bare.model_copy(update={"name": "cgd-bare", "bare_share": 1.0})
    run = Run(storage, tmp_path, (plain, bare))
    metrics = run.check().metrics
    assert (metrics["cgd_rejected"], metrics["cgd-bare_rejected"]) == (1, 0)
    assert (metrics["cgd-bare_bare_examples"], metrics["common_examples"]) == (9, 9)
    for work in run.trainings:
        learned, made = run.trained(work)
        assert learned == ids(given[1:])
        own = {f"{work.stage.model}_{name}": value for name, value in made.counts.metrics().items()}
        assert own.items() <= metrics.items()


def test_variants_that_differ_in_their_names_alone_are_checked_apart(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, rows())
    (work,) = works(tiny_model, "CGD")
    first, second = (
        Run(storage, tmp_path, (work.model_copy(update={"name": name}),)).check() for name in ("cgd-a", "cgd-b")
    )
    assert first.digest != second.digest
    assert {name.partition("_")[0] for name in second.metrics if name.endswith("train_examples")} == {"cgd-b"}
