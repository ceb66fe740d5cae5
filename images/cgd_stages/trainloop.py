"""The training loop: one process of the many that torchrun starts, see train.py.

    python -m cgd_stages.trainloop <folder>

The folder is the node's own scratch: `job.json` and the tokenised examples go in; checkpoints pass through; the
model, `metrics.jsonl` and one `outcome-<rank>.json` per process come out. DeepSpeed shards and steps; the loss is
ours: negative log-likelihood of the target tokens alone, the mean over all of them in the global batch.
"""

import logging
import math
import os
import shutil
import sys
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist

from cgd_stages import student
from cgd_stages.batching import Schedule, learning_rate
from cgd_stages.checkpoints import METRICS, Checkpoints, name_of
from cgd_stages.contract import Exit
from cgd_stages.errors import Interrupted, StageError, TransientError, UserError
from cgd_stages.folders import Part
from cgd_stages.progress import Reporter
from cgd_stages.storage import Bucket
from cgd_stages.trainjob import (
    CHECKPOINTS,
    EXAMPLES,
    JOB,
    LAUNCHER,
    STOP,
    Job,
    Outcome,
    Record,
    read_records,
    write_records,
)

log = logging.getLogger(__name__)


class Examples:
    """The tokenised examples in the order of their keys, mapped from disk."""

    def __init__(self, path: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._table = table.take(pc.sort_indices(table, [("id", "ascending"), ("sample", "ascending")]))
        self.lengths: list[int] = pc.list_value_length(self._table["input_ids"]).to_numpy().tolist()
        self.starts: list[int] = self._table["start"].to_numpy().tolist()

    def key(self, index: int) -> str:
        return f"{self._table['id'][index]}/{self._table['sample'][index]}"

    def learned(self, indices: list[int]) -> int:
        """Tokens that the loss of these examples is the mean of."""
        return sum(self.lengths[index] - self.starts[index] for index in indices)

    def tensors(self, indices: list[int], *, packing: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What the model is given, and the target mask: `target[i, t]` says that token t+1 is learned from position t.

        Each (examples, longest), padded at the right; packed, (1, tokens): one row, and positions that begin again
        with every example. No example gives one token that nothing is learned from: ranks without work must still
        take part in every collective operation.
        """
        return self._packed(indices) if packing and len(indices) > 1 else self._padded(indices)

    def _padded(self, indices: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        longest = max((self.lengths[index] for index in indices), default=1)
        ids = torch.zeros(max(1, len(indices)), longest, dtype=torch.long)
        attention, target = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, index in enumerate(indices):
            length = self.lengths[index]
            ids[row, :length] = self._ids(index)
            attention[row, :length] = 1
            target[row, self.starts[index] - 1 : length - 1] = True
        padded = any(self.lengths[index] < longest for index in indices)
        return {"input_ids": ids} | ({"attention_mask": attention} if padded else {}), target

    def _packed(self, indices: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Without an attention mask, transformers keeps examples apart wherever positions begin again."""
        ids = torch.cat([self._ids(index) for index in indices])
        positions = torch.cat([torch.arange(self.lengths[index]) for index in indices])
        target, end = torch.zeros_like(ids, dtype=torch.bool), 0
        for index in indices:
            begin, end = end, end + self.lengths[index]
            target[begin + self.starts[index] - 1 : end - 1] = True
        return {"input_ids": ids[None], "position_ids": positions[None]}, target[None]

    def _ids(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self._table["input_ids"][index].values.to_numpy().astype("int64"))


@dataclass
class Trainer:
    """One process's part in training. Every method is called by all ranks, in the same order."""

    job: Job
    folder: Path
    examples: Examples
    schedule: Schedule
    checkpoints: Checkpoints
    reporter: Reporter
    engine: Any
    loss: student.TargetLoss
    device: torch.device
    records: list[Record] = field(default_factory=list)

    def run(self) -> None:
        """Train from the step that the checkpoint holds to the last one."""
        first = self.job.resume
        for step in range(first, self.schedule.steps):
            self._step(step)
            done = step + 1
            if done == self.schedule.steps:  # the model itself is stored next: no checkpoint, which is larger
                self._store_metrics()
            elif done % self.job.work.checkpoint_every_steps == 0:
                self._save(done)
            if self._anyone(asked=(self.folder / STOP).exists()) and done < self.schedule.steps:
                if done % self.job.work.checkpoint_every_steps:
                    self._save(done)
                raise Interrupted(
                    f"SIGTERM: stopped after step {done} of {self.schedule.steps}, a checkpoint is stored"
                )

    def _step(self, step: int) -> None:
        work, started = self.job.work, time.monotonic()
        rate = learning_rate(step, steps=self.schedule.steps, peak=work.learning_rate, warmup_ratio=work.warmup_ratio)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        batch = self.schedule.batch(step)
        learned = self.examples.learned(batch)
        loss = self._sum(self._accumulate(step, learned)) / learned
        self._refuse_unless_finite("loss", loss, step)
        norm = self._apply()
        self._refuse_unless_finite("gradient norm", norm, step)
        seconds = time.monotonic() - started
        tokens = sum(self.examples.lengths[index] for index in batch)
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
            }
        )
        self._tell()

    def _accumulate(self, step: int, learned: int) -> float:
        """Gradients of the whole batch; this rank's part of the summed loss."""
        work, world, rank = self.job.work, dist.get_world_size(), dist.get_rank()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        micro_batches = self.schedule.micro_batches(
            step, rank=rank, world=world, budget=work.max_sequence_length, packing=work.packing
        )
        for number, indices in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
            inputs, target = self.examples.tensors(indices, packing=work.packing)
            on_device = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            loss = self.loss(self.engine, on_device, target.to(self.device))
            # DeepSpeed takes the mean over ranks, whatever share of the tokens each one had.
            self.engine.backward(loss * (world / learned), scale_wrt_gas=False)
            total += loss.detach()  # read once a step: a GPU need not wait for every micro-batch
        return float(total)

    def _apply(self) -> float:
        """Clip, step, and say what the norm of the gradients was before."""
        norm = None if self.job.work.zero_stage else student.grad_norm(self.engine.module)
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return float(norm)

    def _refuse_unless_finite(self, what: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        rows = ", ".join(self.examples.key(index) for index in self.schedule.batch(step))
        raise UserError(
            f"the {what} is {value} at step {step + 1}; the rows of the batch (id/sample): {rows}",
            hint="Lower spec.training.learningRate, or look at these rows for text that is no text.",
        )

    def _sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def _anyone(self, *, asked: bool) -> bool:
        """Whether any process was asked: all of them act on the same answer."""
        return self._sum(float(asked)) > 0

    def _save(self, step: int) -> None:
        """Store a checkpoint: every node uploads its own files, rank 0 writes the promise when all are there."""
        local = self.folder / CHECKPOINTS
        self.engine.save_checkpoint(str(local), tag=name_of(step), save_latest=False)
        files: list[Part] = []
        if dist.get_rank() == self.job.first_rank:
            if dist.get_rank() == 0:
                write_records(local / name_of(step) / METRICS, self.records)
            files = self.checkpoints.upload(step, local / name_of(step), self.job.ranks)
        everyone: list[list[Part]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, files)
        if dist.get_rank() == 0:
            self.checkpoints.complete(step, [part for parts in everyone for part in parts])
            log.info("checkpoint after step %d is stored", step)
        self._store_metrics()
        if dist.get_rank() == self.job.first_rank:
            shutil.rmtree(local / name_of(step))
        dist.barrier()

    def _store_metrics(self) -> None:
        if dist.get_rank() == 0:
            write_records(self.folder / METRICS, self.records)
            self.checkpoints.folder.bucket.upload(self.folder / METRICS, self.checkpoints.folder.key(METRICS))

    def _tell(self) -> None:
        if dist.get_rank() != 0:
            return
        last, steps = self.records[-1], self.schedule.steps
        step = int(last["step"])
        recent = self.records[-20:]
        eta = (steps - step) * sum(record["seconds"] for record in recent) / len(recent)
        seen = self.schedule.seen(step) // self.schedule.epochs
        log.info(
            "step %d of %d  loss %.4f  grad norm %.3f  rate %.2e  %.0f tokens/s  %.0f s to go",
            step, steps, last["loss"], last["grad_norm"], last["learning_rate"], last["tokens_per_second"], eta,
        )  # fmt: skip
        self.reporter.report(
            self.job.stage,
            self.job.rows.model_copy(update={"done": seen}),
            tokens_per_second=last["tokens_per_second"],
            eta=eta,
            metrics={name: last[name] for name in ("step", "loss", "grad_norm", "learning_rate", "supervised_tokens")}
            | {"steps": float(steps)},
        )


def start(folder: Path) -> Trainer:
    """Load the student, hand it to DeepSpeed, and go to the step that the checkpoint holds, if there is one."""
    job = Job.model_validate_json((folder / JOB).read_text())
    examples = Examples(folder / EXAMPLES)
    _agree("the number of examples", len(examples.lengths))
    _agree("the checkpoint to go on from", job.resume)
    work = job.work
    torch.manual_seed(work.seed)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    config = student.deepspeed_config(work, dist.get_world_size())
    model = student.load(job, config)
    loss = student.TargetLoss(model)
    engine = student.initialize(model, config)
    trainer = Trainer(
        job=job,
        folder=folder,
        examples=examples,
        schedule=Schedule(examples.lengths, work.global_batch_size, work.epochs, work.seed),
        checkpoints=job.checkpoints(Bucket(job.storage)),
        reporter=Reporter.from_environment(0) if dist.get_rank() == 0 else Reporter(),
        engine=engine,
        loss=loss,
        device=device,
    )
    if job.resume:
        _resume(trainer)
    return trainer


def _resume(trainer: Trainer) -> None:
    local, name = trainer.folder / CHECKPOINTS, name_of(trainer.job.resume)
    path, _ = trainer.engine.load_checkpoint(str(local), tag=name)
    if path is None:
        raise TransientError(f"DeepSpeed does not load the checkpoint {local / name}", hint="See the pod's log.")
    if dist.get_rank() == 0:
        trainer.records = read_records(local / name / METRICS)
    dist.barrier()
    if dist.get_rank() == trainer.job.first_rank:
        shutil.rmtree(local / name)
    log.info("going on after step %d", trainer.job.resume)


def _agree(what: str, value: int) -> None:
    """Raise TransientError unless every process holds the same value: their pods may have looked at different times."""
    everyone = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    if len(set(everyone)) > 1:
        raise TransientError(f"the processes do not agree on {what}: {everyone}", hint="It is tried again.")


def join_group() -> None:
    """Join the process group that torchrun has announced in the environment."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile a shared-memory all-reduce at every first start on a CPU; it serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if gpu else "gloo", verbose=False)


def main(folder: Path) -> Exit:
    """Run one process to its end and write how it ended."""
    _die_with_the_launcher()
    _quieten()
    rank = int(os.environ["RANK"])
    outcome = Outcome(rank=rank, code=Exit.DONE)
    try:
        join_group()
        trainer = start(folder)
        trainer.run()
        student.export(trainer.job, trainer.engine, trainer.folder)
        trainer.reporter.close()
    except StageError as error:
        name = type(error).__name__
        outcome = Outcome(rank=rank, code=error.exit, error=name, message=error.message, hint=error.hint)
    except Exception as error:  # noqa: BLE001 (the rim: every failure becomes an outcome)
        traceback.print_exc()
        outcome = Outcome(rank=rank, code=Exit.RETRY, error=type(error).__name__, message=str(error)[-1000:])
    outcome.write(folder)
    return Exit(outcome.code)


def _quieten() -> None:
    """Leave the log to the lines that say how training goes."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("botocore").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by their old names, a few times a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _die_with_the_launcher() -> None:
    """When the launcher is killed, torchrun and its processes would go on for nobody: leave at once."""
    launcher = os.environ.get(LAUNCHER)

    def watch() -> None:
        while Path(f"/proc/{launcher}").exists():
            time.sleep(1)
        os._exit(Exit.RETRY)

    if launcher:
        threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    code = main(Path(sys.argv[1]))
    # Not sys.exit: the process group's threads may wait for processes that have failed.
    sys.stderr.flush()
    os._exit(code)
