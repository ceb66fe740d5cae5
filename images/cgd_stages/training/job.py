"""The messages between the launcher of a training pod and its processes: files in one folder. Needs no torch."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cgd_stages.contract import Contract, Model, OnPolicy, Rows, RunRef, Storage, Train
from cgd_stages.models import resolve
from cgd_stages.models.fit import read_config
from cgd_stages.models.mixture import router_weight
from cgd_stages.models.resolve import Resolved
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Folder
from cgd_stages.store.rows import digest_of
from cgd_stages.store.run import RunStore
from cgd_stages.training.checkpoints import Checkpoints, Layout
from cgd_stages.training.dataset import Dataset

JOB = "job.json"
EXAMPLES = "examples.arrow"
VALIDATION_LOSS = "validation_loss"
"""In a record: the loss on the held-out examples in the context in which the objective learns."""
BARE_LOSS = "bare_validation_loss"
"""In a record: the loss on the held-out examples given the prompt alone; missing where that is the objective's own
context."""
HELD_OUT = {VALIDATION_LOSS: "validation.arrow", BARE_LOSS: "validation-bare.arrow"}
"""The files of the held-out examples by the loss that they measure. A file has no record where nothing is measured."""
REJECTED_IDS = "rejected_ids"
"""Column of EXAMPLES with the tokens of a pair's other text; `SOURCE_SAMPLE` is that of the sample under which a text
was scored."""
SCORES = "scores.arrow"
"""The log-probabilities that the objective learns from; missing where it needs none."""
QUESTIONS = "early.jsonl"
"""The early questions; missing where the run has none."""
MODEL = "model"
ADAPTER = "adapter"
BEST = "best"
"""The folder of the model (or adapter) that the validation losses so far choose, on the first process's node."""
CHECKPOINTS = "checkpoints"
BEGUN = "begun"
"""A process creates this file before its first step: from then on it has something to store."""
STOP = "stop"
"""The launcher creates this file to ask every process to store a checkpoint and leave."""
LAUNCHER = "CGD_LAUNCHER_PID"
"""Environment variable: the launcher's process id. The training's processes leave when it has ended."""

Record = dict[str, float]
"""One line of `metrics.jsonl`: a step and its figures."""


@dataclass(frozen=True)
class Training:
    """A training as every program that has a part in it finds it: what it learns, from which model, and where it
    stores."""

    work: Train
    dataset: Dataset
    student: Model
    """The model that the training starts from."""
    router_loss_weight: float
    inputs: dict[str, Any]

    @classmethod
    def of(cls, store: RunStore, work: Train, scratch: Path) -> "Training":
        """What its task says, with the finished stages that it reads. Raises TransientError when one has not ended."""
        student = resolve.pinned(work.student, store)
        dataset = Dataset.of(store, work, resolve.spoken(student, work.chat, store, scratch))
        config = read_config(resolve.fetch(student, store, scratch, weights=False), student, "spec.student")
        weight = router_loss_weight(work, config)
        inputs = inputs_of(work.stage, dataset, resolve.resolve(student, store), weight)
        if work.on_policy:
            teacher = resolve.resolve(resolve.pinned(work.on_policy.teacher, store), store)
            inputs["onPolicy"] = _identity(work.on_policy, teacher)
        if work.start:
            # The start's digest says all of it, whatever this run calls the stage.
            student = Model(name=f"{resolve.STAGE}{work.start}", revision=store.input(work.start).digest)
            inputs["start"] = student.revision
        return cls(work, dataset, student, weight, inputs)

    def place(self, store: RunStore) -> Folder:
        """The folder of the trained model, and of its weights on the way."""
        return store.place(self.work.stage, self.inputs)

    @cached_property
    def of_rollouts(self) -> dict[str, Any]:
        """The inputs of the folder with what its student samples."""
        return {"stage": "rollout", "training": digest_of(**self.inputs)}

    @cached_property
    def of_scores(self) -> dict[str, Any]:
        """The inputs of the folder with the teacher's scores of these samples."""
        return {"stage": "score", "training": digest_of(**self.inputs), "topK": self.work.top_k or 0}

    def rollouts(self, store: RunStore) -> Folder:
        assert self.work.rollouts
        return store.place(self.work.rollouts, self.of_rollouts)

    def scored_rollouts(self, store: RunStore) -> Folder:
        assert self.work.scored_rollouts
        return store.place(self.work.scored_rollouts, self.of_scores)


def _identity(on_policy: OnPolicy, teacher: Resolved) -> dict[str, Any]:
    """Everything that determines what the student samples and how it is scored, but for student and texts."""
    return {
        **on_policy.model_dump(by_alias=True, include={"share", "refresh", "max_tokens"}),
        "engine": on_policy.engine.identity(),
        "teacher": teacher.identity(),
        "teacherEngine": on_policy.teacher_engine.identity(),
    }


def inputs_of(stage: str, dataset: Dataset, student: Resolved, router_loss_weight: float) -> dict[str, Any]:
    """Everything that determines the trained weights: the inputs of a training's digest."""
    weights = {
        "epochs",
        "global_batch_size",
        "learning_rate",
        "warmup_ratio",
        "weight_decay",
        "max_sequence_length",
        "dtype",
        "seed",
        "validation",
    } | ({"adapter"} if dataset.work.adapter else set())
    training = dataset.work.model_dump(by_alias=True, include=weights)
    training["validation"] |= {"select": _selection(dataset)}
    return {
        "stage": stage,
        **dataset.identity(),
        "student": student.identity(),
        "training": training | ({"routerLossWeight": router_loss_weight} if router_loss_weight else {}),
    }


def _selection(dataset: Dataset) -> str:
    """What chooses the exported model, as digests name it. `best` is the objective's own context: the name from before
    there was another choice. It stays where the prompt alone chooses the same model, so that its digest stays too."""
    select = dataset.work.validation.select
    own = select == "context" or (select == "bare" and not (dataset.measures_bare and dataset.held_out))
    return "best" if own else select


def router_loss_weight(work: Train, config: Any) -> float:
    """The weight of the router's loss in a training of a student with this config; 0 for a dense one."""
    own = router_weight(config)
    return own if work.router_loss_weight is None else work.router_loss_weight


def checkpoints_of(folder: Folder, work: Train) -> Checkpoints:
    """The checkpoints that this training may continue from."""
    return Checkpoints(folder, Layout.of(work), work.keep_checkpoints)


class Job(Contract):
    """The launcher's message to every process of its node."""

    run: RunRef
    stage: str
    digest: str
    storage: Storage
    work: Train
    student: str
    """Path of the student's files on this node."""
    student_dtype: str
    """The dtype in which the student is stored, and in which the trained model will be."""
    router_loss_weight: float = 0.0
    """Of the router's loss, for each example; 0: it is not computed."""
    first_rank: int
    """Global rank of this node's first process."""
    resume: int
    """Steps of the checkpoint that the launcher has fetched; 0 without one."""
    rows: Rows
    """Rows of the stage; `done` counts the examples."""
    scored_rollouts: str = ""
    """Digest of the folder with the scored samples of the training's own student; "" where it samples nothing."""

    @property
    def ranks(self) -> range:
        """Global ranks of this node's processes."""
        return range(self.first_rank, self.first_rank + self.work.processes_per_worker)

    def checkpoints(self, bucket: Bucket) -> Checkpoints:
        return checkpoints_of(Folder(bucket, self.run.namespace, self.stage, self.digest), self.work)


class ProcessEnd(Contract):
    """How one process ended."""

    rank: int
    code: int
    error: str = ""
    message: str = ""
    hint: str = ""
    device: str = ""
    """The name of its GPU; empty on a CPU."""

    def write(self, folder: Path) -> None:
        (folder / f"end-{self.rank:05d}.json").write_text(self.to_json())


def read_process_ends(folder: Path) -> list[ProcessEnd]:
    """How those processes ended that have written it; a killed process has not."""
    return [ProcessEnd.model_validate_json(path.read_text()) for path in sorted(folder.glob("end-*.json"))]


def write_records(path: Path, records: list[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_records(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]
