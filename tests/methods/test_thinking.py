"""The runs of examples/thinking on real parts: a small model that was tuned to think, and every stage program of a run
as a process of its own, against a real S3 server.

Outside CI: making the model takes minutes, and so does each run.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.stage_builders import Program, VllmProgram, stored_rejections, stored_rows

from cgd_local import smollm2
from cgd_local.background import image_environment
from cgd_operator.planning.dag import Run, plan
from cgd_stages.chat.thoughts import THINK
from cgd_stages.contract import RunRef, StageFacts, Storage
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.rows import Row
from thinking import __main__ as thinking

pytestmark = [pytest.mark.methods, pytest.mark.timeout(3600), pytest.mark.filterwarnings("ignore")]

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = RunRef(namespace="default", name="thinking", uid="7d1b2c3e-0000-4000-8000-000000000019")
FILES = {
    "quickstart-problems/problems.jsonl": EXAMPLES / "quickstart-problems.jsonl",
    "quickstart-problems/heldout.jsonl": EXAMPLES / "quickstart-heldout.jsonl",
    "conversations/conversations.jsonl": EXAMPLES / "thinking" / "conversations.jsonl",
    "conversations/choices.jsonl": EXAMPLES / "thinking" / "choices.jsonl",
}
"""What `configmap://` names in the manifests."""


@pytest.fixture(scope="session")
def model() -> Path:
    """The small model that thinks, as `python -m thinking` makes it; made once on a machine."""
    folder = smollm2.cache_home() / "models" / thinking.NAME
    source = smollm2.ensure()
    smollm2.make_once(folder, lambda empty: thinking.make(source, empty, thinking.STEPS))
    return folder


class Whole:
    """A run of one of the manifests: what each stage has told at its end, and what is stored."""

    def __init__(self, name: str, model: Path, storage: Storage, bucket: Bucket, folder: Path) -> None:
        self.bucket = bucket
        self.facts: dict[str, StageFacts] = {}
        manifest = yaml.safe_load((EXAMPLES / "thinking" / f"{name}.yaml").read_text())
        for place, path in FILES.items():
            (folder / "inputs" / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / "inputs" / place).write_bytes(path.read_bytes())
        for child in plan(_run(manifest, model)):
            task = child.task.model_copy(update={"storage": storage, "run": RUN})
            kind = task.work.kind
            program = VllmProgram if kind in ("generate", "evaluate") else Program
            environment = image_environment() | {"CGD_INPUTS": str(folder / "inputs")}
            ended = program(kind, task, folder / child.stage, **environment).wait()
            assert ended.code == 0, f"{child.stage}: {ended.words.message} {ended.words.hint}\n{ended.log[-5000:]}"
            self.facts |= ended.words.stages
        (folder / "rows.txt").write_text(self.report())

    def rows(self, stage: str) -> list[Row]:
        return stored_rows(self.bucket, stage, RUN)

    def rejected(self, stage: str) -> list[Row]:
        return stored_rejections(self.bucket, stage, RUN)

    def report(self) -> str:
        """The stored rows in words, for whoever looks at them."""
        lines = []
        for stage, text in (("answer", "answer"), ("critique", "critique"), ("refine", "refinement")):
            kept, lost = self.rows(stage), self.rejected(stage)
            lines.append(f"{stage}: kept {len(kept)}, rejected {[row['reason'] for row in lost]}")
            lines += [f"  {row[f'{text}_thinking']!r} -> {row[text]!r}" for row in kept]
        return "\n".join([*lines, f"check: {self.facts['check'].metrics}"])


def _run(manifest: Any, model: Path) -> Run:
    body = copy.deepcopy(manifest)
    body["metadata"] |= {"namespace": RUN.namespace, "uid": RUN.uid, "generation": 1}
    for place in ("student", "teacher"):
        body["spec"][place]["model"] = str(model)
    return Run.of(body)


def marked(rows: list[Row]) -> list[Row]:
    """Those whose refinement holds a marker: an answer may, and it is not learned."""
    return [row for row in rows if any(mark in row["refinement"] for mark in THINK.marks)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_a_student_that_thinks_answers_learns_and_is_evaluated_thinking(
    model: Path, storage: Storage, bucket: Bucket, folder: Path
) -> None:
    run = Whole("on", model, storage, bucket, folder)
    answers, refinements = run.rows("answer"), run.rows("refine")
    assert sum(bool(row["answer_thinking"]) for row in answers) >= len(answers) / 2
    assert any(row["refinement_thinking"] for row in refinements)
    for row in refinements:
        for name in ("answer", "critique", "refinement"):
            assert not [mark for mark in THINK.marks if mark in (row[f"{name}_thinking"] or "")]
    assert [row["reason"] for row in run.rejected("check")] == ["markers"] * len(marked(refinements))
    endless = {"truncated", "repetition", "unfinished_thought", "empty"}
    assert {row["reason"] for row in run.rejected("answer")} <= endless
    assert run.facts["check"].rows.total == len(refinements)
    assert run.facts["train-cgd"].rows.done > 0


def test_a_student_that_does_not_think_has_no_thought_anywhere(
    model: Path, storage: Storage, bucket: Bucket, folder: Path
) -> None:
    run = Whole("off", model, storage, bucket, folder)
    for row in run.rows("refine"):
        assert [row[f"{name}_thinking"] for name in ("answer", "critique", "refinement")] == [None] * 3
    assert [row["reason"] for row in run.rejected("check")] == ["markers"] * len(marked(run.rows("refine")))


def test_conversations_have_several_answers_and_refinements_of_which_the_right_ones_are_learned(
    model: Path, storage: Storage, bucket: Bucket, folder: Path
) -> None:
    run = Whole("conversations", model, storage, bucket, folder)
    prompts, answers, refinements = (run.rows(stage) for stage in ("prepare", "answer", "refine"))
    assert any(row["turns"] for row in prompts)
    assert len(answers) + len(run.rejected("answer")) == 2 * len(prompts)
    assert len(refinements) + len(run.rejected("refine")) == 2 * len(run.rows("critique"))
    assert {row["sample"] for row in answers} <= {0, 1}
    assert {row["sample"] for row in refinements} <= {0, 1, 2, 3}
