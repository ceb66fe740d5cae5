"""The example of each training that the page shows: tokens of a real tokenizer, what is read and what is learned."""

import json
from pathlib import Path

import pytest
from support.stage_builders import RUN, context
from support.train_builders import quadruple, refined, train_work

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.check import __main__ as check
from cgd_stages.check import masked
from cgd_stages.contract import Check, Storage, Train, Validation
from cgd_stages.method.examples import row_example
from cgd_stages.report.__main__ import find_outputs, read_masked
from cgd_stages.results.model import MASKED, Masked
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.run import RunStore

ROWS = [quadruple(number) for number in range(6)]


def stored(bucket: Bucket, storage: Storage, scratch: Path, *trainings: Train) -> list[Masked]:
    check.main(context(storage, Check(trainings=trainings), scratch))
    return list(read_masked(find_outputs(RunStore(bucket, RUN), ["check"])))


def test_it_is_the_example_that_the_training_learns_split_where_the_loss_begins(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, ROWS[::-1])
    (shown,) = stored(bucket, storage, tmp_path, train_work(tiny_model))
    template = ChatTemplate.load(tiny_model)
    made = row_example(template, "CGD", ROWS[0], max_length=600)
    assert (shown.stage, shown.title, shown.id) == ("train-cgd", "CGD", ROWS[0]["id"])
    assert (shown.context_tokens, shown.target_tokens) == (made.start, len(made.input_ids) - made.start)
    assert shown.context + shown.target == template.tokenizer.decode(made.input_ids)
    assert shown.target.startswith(ROWS[0]["refinement"])
    assert ROWS[0]["critique"] in shown.context


def test_all_trainings_show_the_first_row_that_they_all_learn(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, [quadruple(number, reference="4" if number > 1 else None) for number in range(6)])
    trainings = [train_work(tiny_model, objective=one, max_rejected=0.5) for one in ("CGD", "SFT")]
    assert [(one.title, one.id) for one in stored(bucket, storage, tmp_path, *trainings)] == [
        ("CGD", ROWS[2]["id"]), ("SFT", ROWS[2]["id"]),
    ]  # fmt: skip


def test_a_row_that_is_held_out_is_not_shown_as_learned(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    rows = [quadruple(number) for number in range(8)]
    refined(bucket, rows)
    work = train_work(tiny_model, validation=Validation(fraction=0.5))
    (shown,) = stored(bucket, storage, tmp_path, work)
    made = context(storage, Check(trainings=(work,)), tmp_path)
    dataset = check.Dataset.of(made.store, work, ChatTemplate.load(tiny_model))
    assert shown.id == min({row["id"] for row in rows} - dataset.held_out)


def test_a_training_of_which_no_kept_row_is_learned_shows_none(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked, "KEPT", 1)
    refined(bucket, [quadruple(number, reference="4" if number else None) for number in range(6)])
    trainings = [train_work(tiny_model, objective=one, max_rejected=0.5) for one in ("CGD", "SFT")]
    assert [one.title for one in stored(bucket, storage, tmp_path, *trainings)] == ["SFT"]


def test_a_check_of_an_earlier_version_has_no_example(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, ROWS)
    stored(bucket, storage, tmp_path, train_work(tiny_model))
    outputs = find_outputs(RunStore(bucket, RUN), ["check"])
    done = outputs["check"].done
    older = done.model_copy(update={"parts": tuple(part for part in done.parts if part.key != MASKED)})
    bucket.put(outputs["check"].folder.key("DONE.json"), older.to_json().encode())
    assert json.loads(older.to_json())["parts"]
    assert list(read_masked(find_outputs(RunStore(bucket, RUN), ["check"]))) == []
