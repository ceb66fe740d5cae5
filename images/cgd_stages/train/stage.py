"""A training stage as its pods see it: this pod's place, the student, the examples, and the folder for the model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cgd_stages.contract import Train
from cgd_stages.errors import UserError
from cgd_stages.runtime.program import Context
from cgd_stages.store.folder import Folder
from cgd_stages.training.dataset import Dataset
from cgd_stages.training.job import Training


@dataclass(frozen=True)
class Node:
    """This pod's place among the pods of the job. Operator and Kubeflow write it into the environment."""

    rank: int
    nodes: int
    processes: int
    master: str
    port: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], work: Train) -> "Node":
        """Read `PET_*`, as torchrun itself does; a single pod needs none of them."""
        nodes = int(environment.get("PET_NNODES") or work.workers)
        if nodes != work.workers:
            raise UserError(f"the job has {nodes} pods, the task {work.workers}", hint="This is a bug of the operator.")
        return cls(
            rank=int(environment.get("PET_NODE_RANK", "0")),
            nodes=nodes,
            processes=work.processes_per_worker,
            master=environment.get("PET_MASTER_ADDR", "127.0.0.1"),
            port=environment.get("PET_MASTER_PORT", "29500"),
        )

    @property
    def first(self) -> bool:
        """Whether this pod is the first: it alone stores rejected rows, the model and the promise."""
        return self.rank == 0

    def torchrun(self) -> list[str]:
        """Arguments of torchrun."""
        processes = ["--nproc-per-node", str(self.processes), "--max-restarts", "0"]
        if self.nodes == 1:
            return ["--standalone", *processes]
        place = ["--nnodes", str(self.nodes), "--node-rank", str(self.rank)]
        return [*place, "--master-addr", self.master, "--master-port", self.port, *processes]


@dataclass(frozen=True)
class Stage:
    """A training stage: what it learns, its place among the pods, and the folder for the model."""

    context: Context
    work: Train
    node: Node
    training: Training
    folder: Folder

    @property
    def dataset(self) -> Dataset:
        return self.training.dataset


def stage_of(context: Context) -> Stage:
    """The stage of this program's task."""
    work = context.work_of(Train)
    training = Training.of(context.store, work, context.scratch)
    folder = context.store.folder(context.task.stage, training.inputs)
    return Stage(context, work, Node.from_environment(os.environ, work), training, folder)
