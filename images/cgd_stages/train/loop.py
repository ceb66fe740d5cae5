"""The training loop: one of the processes that torchrun starts for the launcher, `cgd_stages.train`.

    python -m cgd_stages.train.loop <folder>

The folder is the node's own scratch. It holds `job.json`, the tokenised examples and the fetched checkpoint; the
processes add checkpoints, the model, `metrics.jsonl` and an `end-<rank>.json` each.
"""

from cgd_stages.runtime.supervisor import die_with_the_parent

if __name__ == "__main__":
    die_with_the_parent()  # before the other imports: a killed torchrun cannot end its processes

import logging
import os
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from cgd_stages.contract import Exit
from cgd_stages.errors import StageError
from cgd_stages.keys import without_keys
from cgd_stages.models import flops
from cgd_stages.models.attention import refuse_leaks
from cgd_stages.runtime.program import log_stage
from cgd_stages.runtime.progress import Reporter
from cgd_stages.train import adapter, student
from cgd_stages.train.criterion import Preference, Run, criterion_of, held_out_criterion
from cgd_stages.train.early import EarlyLook
from cgd_stages.train.examples import Examples, examples_in
from cgd_stages.train.group import join_group, refuse_unless_agreed
from cgd_stages.train.reference import measure_reference
from cgd_stages.train.rounds import RoundsInTurn
from cgd_stages.train.saving import Saver
from cgd_stages.train.trainer import Trainer
from cgd_stages.training import early
from cgd_stages.training.batching import Schedule
from cgd_stages.training.job import (
    EXAMPLES,
    HELD_OUT,
    JOB,
    LAUNCHER,
    QUESTIONS,
    SCORES,
    STOP,
    Job,
    ProcessEnd,
)

log = logging.getLogger(__name__)


def start(folder: Path) -> Trainer:
    """Load the student, hand it to DeepSpeed, and go to the checkpoint's step, if there is one."""
    job = Job.model_validate_json((folder / JOB).read_text())

    def examples_of(file: str) -> Examples:
        return examples_in(folder / file, folder / SCORES, job.work)

    examples = examples_of(EXAMPLES)
    held_out = {name: found for name, file in HELD_OUT.items() if (found := examples_of(file)).lengths}
    refuse_unless_agreed("the number of examples", len(examples.lengths))
    refuse_unless_agreed("the checkpoint to continue from", job.resume)
    work = job.work
    torch.manual_seed(work.seed)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    world, free = dist.get_world_size(), student.free_memory(device)
    schedule = Schedule(examples.lengths, work.global_batch_size, work.epochs, work.seed)
    config = student.deepspeed_config(work, world, gpu=device.type == "cuda")
    model = student.load(job, config)
    if work.adapter:
        adapter.add(model, work.adapter, work.seed)
    # Nobody knows how long samples will be.
    longest = schedule.most_tokens(world=world, budget=work.max_sequence_length)
    tokens = max(longest, work.max_sequence_length) if work.on_policy else longest
    student.spare_memory(model, work, tokens=tokens, free=free)
    engine = student.initialize(model, config)
    if work.packing:
        refuse_leaks(engine.module)
    loss = student.TargetLoss(engine)
    if job.router_loss_weight and not loss.has_router:
        log.warning("transformers has no router loss for a %s; it is left out", model.config.model_type)
        job = job.model_copy(update={"router_loss_weight": 0.0})
    has_peak = device.type == "cuda" and work.dtype == "bfloat16"
    peak = flops.peak(torch.cuda.get_device_name(device)) if has_peak else None
    criterion = criterion_of(work)
    trainer = Trainer(
        job=job,
        folder=folder,
        examples=examples,
        schedule=schedule,
        saver=Saver(engine, job, folder),
        reporter=Reporter.from_environment(0) if dist.get_rank() == 0 else Reporter(),
        engine=engine,
        loss=loss,
        device=device,
        criterion=criterion,
        held_out=held_out,
        measure=held_out_criterion(work) if work.on_policy else criterion,
        rounds=RoundsInTurn(job, folder, examples, device) if work.on_policy else None,
        keeper=adapter.Keeper(engine, job) if work.adapter else None,
        cost=student.cost(model),
        peak=peak and peak * world,
    )
    if questions := early.read_questions(folder / QUESTIONS):
        trainer.look = EarlyLook(engine, job, questions, folder / STOP)
    if isinstance(trainer.criterion, Preference):
        # Before the checkpoint is loaded: here the student is what it was at the start.
        run = Run(loss, device, work.packing, balanced=False)
        for name, among in {"": examples, **held_out}.items():
            order = schedule if among is examples else Schedule(among.lengths, len(among.lengths), 1, 0)
            trainer.criterion.reference[among] = measure_reference(engine, run, job, name, among, order)
    if job.resume:
        trainer.records = trainer.saver.load()
    return trainer


def main(folder: Path) -> Exit:
    """Run one process to its end and write how it ended."""
    _die_with_the_launcher()
    _quieten()
    rank = int(os.environ["RANK"])
    end = ProcessEnd(rank=rank, code=Exit.DONE)
    try:
        join_group()
        trainer = start(folder)
        trainer.run()
        trainer.export()
        trainer.reporter.close()
        if trainer.device.type == "cuda":
            end = end.model_copy(update={"device": torch.cuda.get_device_name(trainer.device)})
    except StageError as error:
        name = type(error).__name__
        end = ProcessEnd(rank=rank, code=error.exit, error=name, message=error.message, hint=error.hint)
    except Exception as error:  # the rim: every failure is written down
        log.exception("rank %d has failed", rank)
        message = without_keys(str(error))[-1000:]
        end = ProcessEnd(rank=rank, code=Exit.RETRY, error=type(error).__name__, message=message)
    end.write(folder)
    return Exit(end.code)


def _quieten() -> None:
    """Keep progress bars and warnings of libraries out of the log."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # DeepSpeed calls collectives by their old names, a few times a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _die_with_the_launcher() -> None:
    """Leave as soon as the launcher is gone: torchrun and its processes would go on without it."""
    launcher = os.environ.get(LAUNCHER)

    def watch() -> None:
        while Path(f"/proc/{launcher}").exists():
            time.sleep(1)
        os._exit(Exit.RETRY)

    if launcher:
        threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    log_stage()
    code = main(Path(sys.argv[1]))
    # Not sys.exit: threads of the process group may wait for processes that have failed.
    sys.stderr.flush()
    os._exit(code)
