"""Runs that an earlier build has stored the half of go on: into the same folders, and no row is asked for again."""

import importlib.metadata
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import earlier_run
from support.earlier_run import ZIP, Asker, documents, rule
from support.stage_builders import RuleEngine, context, generate_with
from support.train_builders import train_work

from cgd_stages.contract import HarnessTask, StageFacts, StageTask, Storage
from cgd_stages.evaluate import __main__ as evaluate
from cgd_stages.harness import __main__ as harness
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.runtime.program import Context
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import DONE, read_rows
from cgd_stages.store.rows import Row, from_parquet

LM_EVAL = "0.4.13"
"""The version that the tasks were asked with: it is part of a digest."""


class Earlier:
    """What the earlier build has stored, in a store of the test's own."""

    def __init__(self, storage: Storage, bucket: Bucket, folder: Path) -> None:
        self.storage, self.bucket, self.folder = storage, bucket, folder
        with zipfile.ZipFile(ZIP) as packed:
            packed.extractall(folder)
            names = packed.namelist()
        self.objects = {
            name.removeprefix("store/"): (folder / name).read_bytes() for name in names if name.startswith("store/")
        }
        for key, data in self.objects.items():
            bucket.put(key, data)

    def attempt(self, name: str, shard: int = 0) -> Context:
        """A further attempt at one of the tasks, as they were given to the earlier build; prepare has to be told of a
        training since, which is no part of what it stores."""
        told = json.loads((self.folder / "tasks" / f"{name}.json").read_text())
        if told["work"]["kind"] == "prepare":
            told["work"]["training"] = json.loads(train_work(self.folder / "files" / "student").to_json())
        task = StageTask.model_validate(told)
        task = task.model_copy(update={"storage": self.storage})
        files = self.folder / "files"
        made = context(self.storage, task.work, self.folder / "scratch", run=task.run, inputs=files, shard=shard)
        made.task = task
        return made

    def rows(self, stage: str) -> list[Row]:
        """Rows that the earlier build has stored, rejected ones too, in unfinished folders."""
        done = {key.removesuffix(DONE) for key in self.objects if key.endswith(DONE)}
        prefix = f"team/{stage}/"
        under_way = [
            key for key in self.objects if key.startswith(prefix) and not any(key.startswith(one) for one in done)
        ]
        return [row for key in under_way if key.endswith(".parquet") for row in from_parquet(self.objects[key])]

    def folders(self) -> set[str]:
        """Stage and digest of every folder that there is now."""
        keys = [stored.key.split("/") for stored in self.bucket.list("team/")]
        return {"/".join(key[1:3]) for key in keys if key[1] not in {"claims", "runs"}}


@pytest.fixture
def earlier(storage: Storage, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Earlier:
    stored = Earlier(storage, bucket, tmp_path)
    monkeypatch.chdir(tmp_path / "files")  # the student's name is ./student
    return stored


def test_the_prompts_are_not_prepared_again(earlier: Earlier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Today prepare refuses the student of these runs, which has no token that ends a turn."""
    monkeypatch.setattr(prepare, "try_out", lambda *_: None)
    monkeypatch.setattr(prepare, "_open_intake", lambda *_: pytest.fail("prepared again"))
    for name in ("early-prepare", "late-prepare"):
        attempt = earlier.attempt(name)
        assert prepare.main(attempt)["prepare"].rows.done == 20
    assert {stored.key: earlier.bucket.get(stored.key) for stored in earlier.bucket.list("team/")} == earlier.objects


@pytest.mark.parametrize(
    ("name", "roles", "total"),
    [("early-answer", ("answer",), 20), ("late-teacher", ("critique", "refine"), 18 + 16)],
)
def test_generating_asks_only_for_what_is_not_stored(
    earlier: Earlier, name: str, roles: tuple[str, ...], total: int
) -> None:
    stored = {f"{row['id']}-{row['sample']}-{role}" for role in roles for row in earlier.rows(role)}
    folders = earlier.folders()
    ended, interrupted = RuleEngine(rule), RuleEngine(rule)
    generate_with(ended, earlier.attempt(name))
    facts = generate_with(interrupted, earlier.attempt(name, 1))
    asked = [request.name for request in interrupted.asked]
    assert ended.asked == []
    assert asked
    assert stored
    assert not stored & set(asked)
    assert len(stored) + len(asked) == total
    assert earlier.folders() == folders
    for role in roles:
        output = earlier.attempt(name).store.input(role)
        rows = [(row["id"], row["sample"]) for row in read_rows(output)]
        assert len(rows) == len(set(rows)) == output.require().rows.done
        assert output.digest == facts[role].digest


def test_an_evaluation_asks_only_for_what_is_not_stored(earlier: Earlier, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {f"{row['benchmark']}/{row['id']}/{row['sample']}#0" for row in earlier.rows("evaluate-base")}
    folders, engine = earlier.folders(), RuleEngine(rule)
    monkeypatch.setattr(evaluate, "_engine", lambda *_: engine)
    facts = evaluate.main(earlier.attempt("late-evaluate"))["evaluate-base"]
    asked = {request.name for request in engine.asked}
    assert stored
    assert not stored & asked
    assert len(stored) + len(asked) == len(earlier_run.QUESTIONS)
    assert (facts.rows.done, facts.metrics["numbers_accuracy"]) == (len(earlier_run.QUESTIONS), 1.0)
    assert earlier.folders() == folders


def test_lm_eval_is_asked_only_for_the_task_that_is_not_stored(
    earlier: Earlier, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(_: Any, task: HarnessTask, __: Any) -> dict[str, Any]:
        asked.append(task.name)
        return documents(task)

    version: Callable[[str], str] = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: LM_EVAL if name == "lm_eval" else version(name))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(harness, "start", lambda *_: Asker())
    monkeypatch.setattr(harness, "known_tasks", lambda _: None)
    monkeypatch.setattr(harness, "ask", ask)
    folders = earlier.folders()
    facts: StageFacts = harness.main(earlier.attempt("late-harness"))["harness-base"]
    assert asked == ["others"]
    assert facts.rows.done == 8
    assert earlier.folders() == folders
