"""What the files of a run's models say: how large the models are, and whether they fit into the GPUs, in the words in
which the stage `prepare` refuses them; and whether the teacher thinks by itself.

It reads config.json, the tokenizer's files and the headers of the safetensors: from a folder, from the hub, or from S3
with the credentials of the environment.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from cgd_cli.estimate import Size
from cgd_operator.planning.dag import Run, plan
from cgd_stages import contract
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.models import fit, resolve
from cgd_stages.models.mixture import UnknownMixture
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.run import RunStore


@dataclass(frozen=True)
class Read:
    """What does not fit, the sizes of student and teacher, and whether a teacher thinks whose mode is left to its
    template; None where the files do not tell it."""

    misfits: list[fit.Misfit]
    student: Size | None
    teacher: Size | None
    teacher_thinks: bool | None = None


def read(run: Run, memory: float) -> Read:
    """Read the files of the run's models. `memory`: bytes of a GPU if the run does not set them. Raises StageError."""
    tasks = [child.task for child in plan(run)]
    task, work = next((task, task.work) for task in tasks if isinstance(task.work, contract.Prepare))
    gpus = fit.Gpus(memory=work.gpu_memory or int(memory), training=work.training)
    store = RunStore(Bucket(task.storage.model_copy(update={"ca_bundle": None})), task.run)  # the path is one in a pod
    models = [("spec.student", work.student, work.student_engine)]
    if work.teacher:
        models.append(("spec.teacher", work.teacher, work.teacher_engine))
    with tempfile.TemporaryDirectory() as scratch:
        served = []
        for where, model, engine in models:
            folder = resolve.fetch(model, store, Path(scratch), weights=False)
            config = fit.read_config(folder, model, where)
            context = fit.context_length(config, engine, model, where)
            served.append(fit.Served(where, model, engine, config, context))
        sizes = [_size(model, store.bucket, Path(scratch)) for model in served]
        thinks = _thinks(work, folder) if work.teacher else None
        return Read(fit.find_misfits(store.bucket, Path(scratch), gpus, served), sizes[0], [*sizes, None][1], thinks)


def _thinks(work: contract.Prepare, folder: Path) -> bool | None:
    """Whether the teacher, whose files are in `folder`, thinks in its mode; None: its template is elsewhere."""
    teacher, chat = work.teacher, work.teacher_chat
    if teacher is None or chat.template_uri:
        return None
    with resolve.reading(teacher, "spec.teacher", "tokenizer"):
        template = ChatTemplate.load(folder, chat, name=teacher.name)
    return template.thinks


def _size(served: fit.Served, bucket: Bucket, scratch: Path) -> Size | None:
    tensors = resolve.tensors(served.model, bucket, scratch)
    try:
        found = fit.parameters_of(served.config, tensors) if tensors else None
    except UnknownMixture:
        return None
    return Size(*found) if found else None
