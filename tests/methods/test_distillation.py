"""Trainings by other losses, through the stage programs as pods run them: real vLLM scores, real DeepSpeed trains.

Each line would fail if the loss were the likelihood of the refinement: the same rows and settings are trained with
RefinedSFT, and what is asked is what only the other loss teaches.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.method_builders import examples_of, logits_of, logprob, pairs_of
from support.stage_builders import RUN, Program, VllmProgram
from support.train_builders import quadruple, refined, train_work
from transformers import AutoModelForCausalLM

from cgd_stages.contract import Engine, Model, Score, StageTask, Storage, Train, Work, train_stage
from cgd_stages.models import resolve
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.rows import Row
from cgd_stages.store.run import RunStore

pytestmark = [pytest.mark.methods, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]

ROWS = [quadruple(number) for number in range(24)]
SETTINGS: dict[str, Any] = {"epochs": 6, "learning_rate": 2e-3, "global_batch_size": 8, "max_rejected": 0.0}


class World:
    """The programs of one run, each in a process of its own."""

    def __init__(self, bucket: Bucket, storage: Storage, student: Path, folder: Path) -> None:
        self.store, self.storage, self.student, self._folder = RunStore(bucket, RUN), storage, student, folder
        refined(bucket, ROWS)

    def run(self, program: str, stage: str, work: Work) -> None:
        task, folder = StageTask(run=RUN, stage=stage, storage=self.storage, work=work), self._folder / stage
        kind = VllmProgram if program == "score" else Program
        ended = kind(program, task, folder).wait()
        assert ended.code == 0, ended.log

    def train(self, name: str, **changes: Any) -> None:
        work: Train = train_work(self.student, **(SETTINGS | changes))
        self.run("train", train_stage(name), work.model_copy(update={"name": name}))

    def score(self, stage: str, **changes: Any) -> None:
        given: dict[str, Any] = {
            "objective": "RefinedSFT",
            "student": Model(name=str(self.student)),
            "engine": Engine(dtype="float32"),
            "max_sequence_length": 600,
            "top_k": 16,
            "max_rejected": 0.0,
        }
        self.run("score", stage, Score(**(given | changes)))

    def model(self, name: str) -> Any:
        model = Model(name=f"{resolve.STAGE}{train_stage(name)}")
        folder = resolve.fetch(model, self.store, self._folder / "models")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def world(bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path) -> World:
    return World(bucket, storage, tiny_model, tmp_path)


def distance(world: World, teacher: Any, student: Any, rows: Sequence[Row], context: str = "RefinedSFT") -> float:
    """The mean KL(teacher || student) over the whole vocabulary at the refinements' tokens. `context` is the teacher's;
    the student reads the prompt alone."""
    found = []
    read = examples_of(world.student, rows, context, 600)  # type: ignore[arg-type]
    bare = examples_of(world.student, rows, "RefinedSFT", 600)
    with torch.no_grad():
        for told, own in zip(read, bare, strict=True):
            p = logits_of(teacher, told.input_ids, told.start).log_softmax(-1)
            q = logits_of(student, own.input_ids, own.start).log_softmax(-1)
            found.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(found).mean())


def test_a_student_learns_the_teachers_distribution_and_not_its_text_alone(world: World, tmp_path: Path) -> None:
    teacher = tiny.make(tmp_path / "teacher", seed=5)
    world.score("score-refined", model=Model(name=str(teacher)))
    world.train("kd", objective="SupervisedKD", texts="refined", top_k=16)
    world.train("refinedsft", objective="RefinedSFT")
    loaded = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    learned, other = (distance(world, loaded, world.model(name), ROWS) for name in ("kd", "refinedsft"))
    start = AutoModelForCausalLM.from_pretrained(world.student, dtype=torch.float32)
    assert learned < 0.5 * distance(world, loaded, start, ROWS)
    assert learned < 0.5 * other


def test_a_student_learns_what_it_would_write_with_the_critique_in_view(world: World) -> None:
    world.train("cgd", objective="CGD")
    start = Model(name=f"{resolve.STAGE}train-cgd")
    world.score("score-inner", objective="CGD", model=start)
    world.train("inner", objective="ContextDistillation", top_k=16, start="train-cgd")
    world.train("again", objective="RefinedSFT", start="train-cgd")
    teacher, inner, again = (world.model(name) for name in ("cgd", "inner", "again"))
    learned = distance(world, teacher, inner, ROWS, "CGD")
    assert learned < 0.5 * distance(world, teacher, teacher, ROWS, "CGD")
    assert learned < distance(world, teacher, again, ROWS, "CGD")


def test_a_student_prefers_the_refinement_to_its_own_answer_by_more_than_its_text_teaches(world: World) -> None:
    world.train("cgd", objective="CGD")
    world.train("dpo", objective="DPO", beta=0.5, start="train-cgd")
    world.train("again", objective="RefinedSFT", start="train-cgd")
    pairs = pairs_of(world.student, ROWS, train_work(world.student))

    def margin(model: Any) -> float:
        with torch.no_grad():
            gains = [
                logprob(model, one.input_ids, one.start) - logprob(model, one.rejected, one.start) for one in pairs
            ]
        return float(torch.stack(gains).mean())

    before, dpo, again = (margin(world.model(name)) for name in ("cgd", "dpo", "again"))
    assert dpo > before + 5
    assert dpo > again
    inputs = world.store.input("train-dpo").require().inputs
    assert inputs["start"] == world.store.input("train-cgd").digest
