"""Train the student on the stored rows: the objective's target is learned, nothing else.

    CGD_TASK='{...}' python -m cgd_stages.train

Every pod of a training runs this program. It is the launcher: it makes the examples, fetches the student and the
newest checkpoint, starts torchrun on loop.py as the job's environment says, passes SIGTERM on, and turns the end
of its processes into last words and an exit code. The first pod also stores the model and the promise. The others stay
until it has done so: a pod that has succeeded is never started again, and training needs all of them. This module does
not import torch, so that a training that is done already, or that cannot work, ends at once.

Training changes all parameters, or those of an adapter (adapter.py), with AdamW, gradients clipped to norm 1, a linear
warm-up and then a cosine to zero. A step has `globalBatchSize` examples whatever the number of processes; the last step
of an epoch has the rest.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import json
import logging
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

from cgd_stages.contract import StageFacts
from cgd_stages.errors import TransientError
from cgd_stages.models import resolve
from cgd_stages.runtime.program import Context, run
from cgd_stages.store.benchmarks import read_benchmarks
from cgd_stages.store.run import Product
from cgd_stages.train import launch
from cgd_stages.train.example_files import MadeExamples, make_examples
from cgd_stages.train.product import facts_of, store_model
from cgd_stages.train.stage import Stage, stage_of
from cgd_stages.training import early
from cgd_stages.training.job import CHECKPOINTS, JOB, QUESTIONS, SCORES, Job
from cgd_stages.training.scores import write_scores

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Seconds between two looks for the objects that the first pod stores."""
SILENT_SECONDS = 600.0
"""The other pods give up the first pod when it has stored nothing for so long, and has not written the promise."""


def main(context: Context) -> dict[str, StageFacts]:
    context.store = context.store.waiting(context.stop)
    stage = stage_of(context)
    if not stage.node.first:
        _follow(stage)
        return {}
    with ExitStack() as until_promised:
        done = context.store.produce(context.task.stage, stage.training.inputs, lambda _: _lead(stage, until_promised))
    return {context.task.stage: done.facts}


def _lead(stage: Stage, until_promised: ExitStack) -> Product:
    """The first pod trains with the others, and stores the model."""
    started = time.monotonic()
    made, folder = _get_ready(stage)
    until_promised.enter_context(stage.context.holding())
    launch.torchrun(stage, folder)
    return store_model(stage, made, facts_of(stage, made, folder, time.monotonic() - started), folder)


def _follow(stage: Stage) -> None:
    """Any other pod trains with the first, and stays until the first has stored the model."""
    if stage.folder.done():
        log.info("%s is done already: %s", stage.context.task.stage, stage.folder.uri)
        return
    _, folder = _get_ready(stage)
    with stage.context.holding():
        launch.torchrun(stage, folder)
    _await_promise(stage)
    log.info("pod %d has ended well", stage.node.rank)


def _get_ready(stage: Stage) -> tuple[MadeExamples, Path]:
    """Make the examples, fetch student and newest undamaged checkpoint, and write the job, all in this pod's folder."""
    task, node = stage.context.task, stage.node
    folder = stage.context.scratch / f"{task.stage}-{node.rank}"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier attempt in this pod may have left files
    folder.mkdir(parents=True)
    student = resolve.fetch(stage.training.student, stage.context.store, stage.context.scratch)
    made = make_examples(stage, folder)
    if stage.dataset.scores:
        write_scores(stage.dataset.scores, folder / SCORES)
    if stage.work.early:
        stored, template = read_benchmarks(stage.context.store.input("prepare")), stage.dataset.template
        early.write_questions(folder / QUESTIONS, early.choose(stored, stage.work, stage.work.early, template))
    job = Job(
        run=task.run,
        stage=task.stage,
        digest=stage.folder.digest,
        storage=task.storage,
        work=stage.work.model_copy(update={"student": stage.training.student, "chat": stage.dataset.template.chat}),
        student=str(student),
        student_dtype=stored_dtype(student),
        router_loss_weight=stage.training.router_loss_weight,
        first_rank=node.rank * node.processes,
        resume=0,
        rows=made.counts.rows,
        scored_rollouts=stage.training.scored_rollouts(stage.context.store).digest if stage.work.on_policy else "",
    )
    resume = job.checkpoints(stage.folder.bucket).fetch(folder / CHECKPOINTS, job.ranks)
    (folder / JOB).write_text(job.model_copy(update={"resume": resume}).to_json())
    launch.find_first_pod(stage)
    return made, folder


def stored_dtype(model: Path) -> str:
    """The dtype in a model's config. Older ones call it torch_dtype, multimodal ones have it in text_config.

    gpt-oss, whose experts are quantized, may have none.
    """
    config = json.loads((model / "config.json").read_text())
    for fields in (config, config.get("text_config") or {}):
        for name in ("dtype", "torch_dtype"):
            if isinstance(fields.get(name), str):
                return str(fields[name]).removeprefix("torch.")
    return "bfloat16" if config.get("quantization_config") else "float32"


def _await_promise(stage: Stage) -> None:
    """Stay until the first pod has stored the model. Fails when that pod seems lost, so that both start again."""
    folder = stage.folder
    objects, since = 0, time.monotonic()
    while folder.done() is None:
        objects_now = len(list(folder.bucket.list(folder.key())))
        if objects_now != objects:
            objects, since = objects_now, time.monotonic()
        if time.monotonic() - since > SILENT_SECONDS:
            raise TransientError(
                f"all steps are made, but the first pod has stored nothing more of the model for {SILENT_SECONDS:g} s",
                hint="The pods start again and continue from the newest checkpoint.",
            )
        stage.context.stop.wait(LOOK_SECONDS)
        stage.context.check()


if __name__ == "__main__":
    run(main)
