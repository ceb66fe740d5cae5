"""The training loop: one of the processes that torchrun starts for the launcher, `cgd_stages.train`.

    python -m cgd_stages.train.loop <folder>

The folder is the node's own scratch. It holds `job.json`, the tokenised examples and the fetched checkpoint; the
processes add checkpoints, the model, `metrics.jsonl` and an `end-<rank>.json` each. DeepSpeed shards and steps. The
loss is our own: the mean negative log-likelihood of the target tokens in the global batch.
"""

from cgd_stages.runtime.supervisor import die_with_the_parent

if __name__ == "__main__":
    die_with_the_parent()  # before the other imports: a killed torchrun cannot end its processes

import logging
import math
import os
import resource
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist

from cgd_stages.contract import Exit
from cgd_stages.errors import GPU_HINT, Interrupted, NoTransfer, StageError, TransientError, UserError
from cgd_stages.keys import without_keys
from cgd_stages.models import flops
from cgd_stages.models.attention import refuse_leaks
from cgd_stages.runtime.pace import Pace
from cgd_stages.runtime.program import log_stage
from cgd_stages.runtime.progress import Reporter
from cgd_stages.train import adapter, student
from cgd_stages.train.batching import Schedule, learning_rate
from cgd_stages.train.criterion import Criterion, Preference, Run, Sums, criterion_of
from cgd_stages.train.early import EarlyLook
from cgd_stages.train.examples import Examples, examples_in
from cgd_stages.train.reference import measure_reference
from cgd_stages.train.saving import Saver
from cgd_stages.training import curves, early
from cgd_stages.training.checkpoints import METRICS
from cgd_stages.training.job import (
    ADAPTER,
    BEGUN,
    BEST,
    EXAMPLES,
    HELD_OUT,
    JOB,
    LAUNCHER,
    MODEL,
    QUESTIONS,
    SCORES,
    STOP,
    VALIDATION_LOSS,
    Job,
    ProcessEnd,
    Record,
    write_records,
)

log = logging.getLogger(__name__)

REPORTED = (
    "step",
    "loss",
    "router_loss",
    "reward_margin",
    "reward_accuracy",
    "grad_norm",
    "learning_rate",
    "supervised_tokens",
    "mfu",
    "peak_memory_bytes",
)
"""Figures of a step that progress reports have."""


@dataclass
class Trainer:
    """One process's part in training. All ranks call every method, in the same order."""

    job: Job
    folder: Path
    examples: Examples
    schedule: Schedule
    saver: Saver
    reporter: Reporter
    engine: Any
    loss: student.TargetLoss
    device: torch.device
    criterion: Criterion
    held_out: dict[str, Examples]
    """The examples of each loss that a validation measures; empty where nothing is held out."""
    look: EarlyLook | None = None
    """None where no early questions are asked."""
    keeper: adapter.Keeper | None = None
    """None where all of the student's parameters are learned."""
    cost: flops.Work | None = None
    peak: float | None = None
    """FLOP/s of all processes' devices together, if they are known."""
    records: list[Record] = field(default_factory=list)
    pace: Pace | None = None
    """This attempt's pace. It begins after the first step, which is slower than the others."""

    def run(self) -> None:
        """Train from the checkpoint's step to the last one."""
        before = self._look_before()
        self._refuse_without_transfer()
        (self.folder / BEGUN).touch()
        for step in range(self.job.resume, self.schedule.steps):
            # What is random in a step (dropout) follows from its number: a checkpoint holds no generator.
            torch.manual_seed(Random(f"{self.job.work.seed}/{step}/{dist.get_rank()}").getrandbits(63))  # noqa: S311
            self._step(step)
            done, last = step + 1, step + 1 == self.schedule.steps
            self._validate(done)
            self._look(done, before)
            self._report()
            stop = self._sum(float((self.folder / STOP).exists())) > 0  # SIGTERM for one pod stops all of them
            if stop:
                self.saver.hurry()
            # After the last step the pod stores the model, which is smaller than a checkpoint.
            if not last and (stop or done % self.job.work.checkpoint_every_steps == 0):
                self.saver.save(done, self.records)
            self.saver.go_on()
            self._refuse_without_transfer()
            if stop and not last:
                self.saver.wait()
                raise Interrupted(
                    f"SIGTERM: stopped after step {done} of {self.schedule.steps}, a checkpoint is stored"
                )
        self.saver.wait()
        if dist.get_rank() == 0:
            write_records(self.folder / METRICS, self.records)

    def _step(self, step: int) -> None:
        """Learn the step's batch and add its record to the curve. Raises UserError when the loss makes no sense."""
        work, started = self.job.work, time.monotonic()
        rate = learning_rate(step, steps=self.schedule.steps, peak=work.learning_rate, warmup_ratio=work.warmup_ratio)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        batch = self.schedule.batch(step)
        learned, units = self.examples.learned(batch), self.criterion.units(self.examples, batch)
        sequences = self.examples.sequence_lengths(batch)
        loss, router_loss, *figures = self._accumulate(step, units, len(sequences))
        loss = self._sum(loss) / units
        self._refuse_unless_finite("loss", loss, step)
        norm = None if work.zero_stage else student.grad_norm(self.engine.module)
        self.engine.step()  # clips the gradients, too
        norm = float(self.engine.get_global_grad_norm() if norm is None else norm)
        self._refuse_unless_finite("gradient norm", norm, step)
        seconds = time.monotonic() - started
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        tokens = sum(sequences)
        self.records.append(
            {
                "step": step + 1,
                "epoch": round((step + 1) / self.schedule.steps_per_epoch, 4),
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "examples": len(batch),
                "tokens": tokens,
                "supervised_tokens": learned,
                "seconds": round(seconds, 4),
                "tokens_per_second": round(tokens / seconds, 1),
                "supervised_tokens_per_second": round(learned / seconds, 1),
                "peak_memory_bytes": float(memory),
            }
        )
        if self.job.router_loss_weight:
            self.records[-1]["router_loss"] = self._sum(router_loss) / len(sequences)
        for name, value in zip(self.criterion.figures, figures, strict=True):
            self.records[-1][name] = self._sum(value) / units
        if self.cost and self.peak:
            flops_of_step = self.cost.flops(sequences, learned)
            self.records[-1]["mfu"] = round(flops_of_step / seconds / self.peak, 4)
        self._refuse_if_spiked()

    def _accumulate(self, step: int, units: int, sequences: int) -> list[float]:
        """Compute the gradients of the step's batch; the result is this rank's part of the summed loss, of the
        sequences' summed router losses, and of the criterion's figures."""
        work, world, rank = self.job.work, dist.get_world_size(), dist.get_rank()
        total = torch.zeros(2 + len(self.criterion.figures), dtype=torch.float64, device=self.device)
        router_share = self.job.router_loss_weight / sequences
        micro_batches = self.schedule.micro_batches(
            step, rank=rank, world=world, budget=work.max_sequence_length, packing=work.packing
        )
        for number, indices in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
            sums = self._sums(self.examples, indices)
            # DeepSpeed takes the mean over ranks, whatever each rank's share of the units.
            whole = sums.loss * (world / units) + sums.router * (world * router_share)
            self.engine.backward(whole, scale_wrt_gas=False)
            # Read once a step, so that a GPU need not wait for every micro-batch.
            total += torch.stack([sums.loss.detach(), sums.router.detach(), *sums.figures])
        return total.tolist()

    def _sums(self, examples: Examples, indices: list[int]) -> Sums:
        """The sums of a micro-batch; in training with the routers' losses."""
        balanced = bool(self.job.router_loss_weight) and self.engine.training
        return self.criterion(Run(self.loss, self.device, self.job.work.packing, balanced), examples, indices)

    def _refuse_unless_finite(self, what: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        self.saver.store_curve(self.records)
        rows = ", ".join(self.examples.key(index) for index in self.schedule.batch(step))
        raise UserError(
            f"the {what} is {value} at step {step + 1}; the rows of the batch (id/sample): {rows}",
            hint="Lower spec.training.learningRate, or look for damaged text in these rows.",
        )

    def _refuse_if_spiked(self) -> None:
        losses = [record["loss"] for record in self.records[-curves.BASELINE - curves.STREAK :]]
        if not self.job.work.stop_on_loss_spike or not curves.spiked(losses):
            return
        high = self.records[-curves.STREAK :]
        batches = [self.schedule.batch(int(record["step"]) - 1) for record in high]
        keys = [", ".join(self.examples.key(index) for index in batch) for batch in batches]
        for record, rows in zip(high, keys, strict=True) if dist.get_rank() == 0 else ():
            log.error("step %d, loss %.4g, rows: %s", record["step"], record["loss"], rows)
        self.saver.store_curve(self.records)
        raise UserError(
            f"the loss is far above what it was since step {high[0]['step']:.0f} "
            f"({', '.join(f'{loss:.4g}' for loss in losses[-curves.STREAK :])}); the rows of the batches (id/sample), "
            f"first to last: {'; '.join(keys)}",
            hint="Lower spec.training.learningRate or raise spec.training.warmupRatio, or look at these rows. "
            "With spec.training.stopOnLossSpike: false the training continues.",
        )

    def _validate(self, done: int) -> None:
        """Measure the losses on the held-out examples every few steps, and keep the best model."""
        validation = self.job.work.validation
        if not self.held_out or (done % validation.every_steps and done < self.schedule.steps):
            return
        started, last = time.monotonic(), self.records[-1]
        for name, examples in self.held_out.items():
            what, loss = name.replace("_", " "), self._mean_loss(examples)
            self._refuse_unless_finite(what, loss, done - 1)
            last[name] = loss
            if dist.get_rank() == 0:
                log.info("%s %.4f after step %d", what, loss, done)
        last["validation_seconds"] = round(time.monotonic() - started, 4)
        if curves.best(self.records, validation.select) is last:
            self._write(self.folder / BEST)

    def _look_before(self) -> float | None:
        """The share of the early questions that the student answers right before its training."""
        if self.look is None:
            return None
        if self.records:
            return self.records[0].get(early.BEFORE)
        look = self.look()
        if look is None:
            raise Interrupted("SIGTERM: no step was begun")
        log.info("early questions: %.1f %% right before the first step", 100 * look.right)
        return look.right

    def _look(self, done: int, before: float | None) -> None:
        """Ask the early questions where it is time, and note what the student answers. A training that began without
        them asks none."""
        work = self.job.work
        if self.look is None or work.early is None or before is None:
            return
        last = self.records[-1]
        if done == 1:
            last[early.BEFORE] = before
        started = time.monotonic()
        if done in early.looks(work.early, self.schedule.steps) and (look := self.look()):
            last |= {early.EARLY: look.right, early.BEFORE: before, early.CUT: look.cut}
            last |= {early.ASKED: len(self.look.questions), "early_seconds": round(time.monotonic() - started, 4)}
            log.info("early questions: %.1f %% right after step %d", 100 * look.right, done)

    def _refuse_without_transfer(self) -> None:
        """Raise NoTransfer, with a checkpoint stored, if the early questions show too small a gain."""
        stop = self.job.work.early.stop_unless if self.job.work.early else None
        judged = early.falls_short(self.records, stop, self.schedule.steps) if stop else None
        if stop is None or judged is None:
            return
        done = int(self.records[-1]["step"])
        if done > self.job.resume:
            self.saver.save(done, self.records)
            self.saver.wait()
        raise NoTransfer(
            f"after step {judged['step']:.0f} of {self.schedule.steps} the student answers {judged[early.EARLY]:.1%} "
            f"of {judged[early.ASKED]:.0f} early questions right, before its training {judged[early.BEFORE]:.1%}; "
            f"spec.training.stopUnless asks for a gain of {stop.gain:g}",
            hint="Try spec.training.bareShare or another learningRate on fewer prompts. Without stopUnless a new run "
            "goes on from the checkpoint that is stored.",
        )

    def _mean_loss(self, examples: Examples) -> float:
        """The mean loss over the target tokens, or pairs, of the examples, of which nothing is learned."""
        work, total = self.job.work, 0.0
        everything = list(range(len(examples.lengths)))
        micro_batches = Schedule(examples.lengths, len(everything), 1, 0).micro_batches(
            0, rank=dist.get_rank(), world=dist.get_world_size(), budget=work.max_sequence_length, packing=work.packing
        )
        self.engine.eval()
        with torch.no_grad():
            for indices in micro_batches:
                total += self._sums(examples, indices).loss.item()
        self.engine.train()
        return self._sum(total) / self.criterion.units(examples, everything)

    def export(self) -> None:
        """Write the resulting model: the best one, or the last where no loss chooses."""
        learned = self.folder / (ADAPTER if self.keeper else MODEL)
        if curves.best(self.records, self.job.work.validation.select) is None:
            self._write(learned)
        elif dist.get_rank() == 0:
            (self.folder / BEST).rename(learned)
        dist.barrier()
        if self.keeper:
            self.keeper.merge(learned, self.folder / MODEL)

    def _write(self, target: Path) -> None:
        """Write what is learned: the model, or its adapter."""
        if self.keeper:
            self.keeper.write(target)
        else:
            student.store(self.job, self.engine, target)

    def _sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def _report(self) -> None:
        """Log the last step and report it to the operator, with an estimate of the remaining time."""
        last, steps = self.records[-1], self.schedule.steps
        step = int(last["step"])
        self.pace = self.pace or Pace()
        eta = self.pace.remaining(step - self.job.resume - 1, steps - step)
        if eta is not None:
            last["eta_seconds"] = round(eta, 1)
        if dist.get_rank() != 0:
            return
        measured = curves.measured(self.records)
        held_out = len(self.held_out[VALIDATION_LOSS].lengths) if measured else 0
        log.info(
            "step %d of %d  loss %.4f  grad norm %.3f  rate %.2e  %.0f tokens/s  %s s to go",
            step, steps, last["loss"], last["grad_norm"], last["learning_rate"], last["tokens_per_second"],
            "?" if eta is None else round(eta),
        )  # fmt: skip
        self.reporter.report(
            self.job.stage,
            self.job.rows.model_copy(update={"done": self.schedule.seen(step) // self.schedule.epochs + held_out}),
            tokens_per_second=last["tokens_per_second"],
            eta=eta,
            metrics={name: last[name] for name in REPORTED if name in last}
            | ({name: measured[-1][name] for name in HELD_OUT if name in measured[-1]} if measured else {})
            | self._early()
            | {"steps": float(steps)},
        )

    def _early(self) -> Record:
        """The last early figures, for progress reports."""
        seen = next((record for record in reversed(self.records) if early.BEFORE in record), {})
        return {name: seen[name] for name in (early.EARLY, early.BEFORE) if name in seen}


def start(folder: Path) -> Trainer:
    """Load the student, hand it to DeepSpeed, and go to the checkpoint's step, if there is one."""
    job = Job.model_validate_json((folder / JOB).read_text())

    def examples_of(file: str) -> Examples:
        return examples_in(folder / file, folder / SCORES, job.work.objective, job.work.top_k)

    examples = examples_of(EXAMPLES)
    held_out = {name: found for name, file in HELD_OUT.items() if (found := examples_of(file)).lengths}
    _agree("the number of examples", len(examples.lengths))
    _agree("the checkpoint to continue from", job.resume)
    work = job.work
    torch.manual_seed(work.seed)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    world, free = dist.get_world_size(), student.free_memory(device)
    schedule = Schedule(examples.lengths, work.global_batch_size, work.epochs, work.seed)
    config = student.deepspeed_config(work, world, gpu=device.type == "cuda")
    model = student.load(job, config)
    if work.adapter:
        adapter.add(model, work.adapter, work.seed)
    tokens = schedule.most_tokens(world=world, budget=work.max_sequence_length)
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
        criterion=criterion_of(work),
        held_out=held_out,
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


def _agree(what: str, value: int) -> None:
    """Raise TransientError unless every process has the same value: pods read the store at different times."""
    everyone = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    if len(set(everyone)) > 1:
        raise TransientError(f"the processes do not agree on {what}: {everyone}", hint="The pods start again.")


def join_group() -> None:
    """Join the process group that torchrun has described in the environment."""
    gpu = take_gpu()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile a shared-memory all-reduce at every first start on a CPU; it serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if gpu else "gloo", verbose=False)


def take_gpu() -> bool:
    """Take this process's GPU; False if torch is built for CPUs alone.

    Raises TransientError if torch is built for GPUs and gets none: the training would take weeks on the CPU.
    """
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    except RuntimeError as error:
        raise TransientError(f"no GPU can be used: {str(error).splitlines()[0]}", hint=GPU_HINT) from error
    return True


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
