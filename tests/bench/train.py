"""Benchmark of training against TRL's SFTTrainer: `make bench-train`. Ratios in the same run; nothing here is a test.

    PYTHONPATH=tests python tests/bench/train.py

Same model (SmolLM2-135M, float32), same quadruples (long contexts, short targets, as CGD has them), same batches in the
same order, same optimiser and schedule, one process each. The contenders make one step at a time, in turn, so that a
noisy machine slows them all. Figures: supervised tokens per second, as the median of the ratios on the same batch, peak
memory, the losses' distance.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from telling import at, begin

from cgd_local import smollm2

console = Console(highlight=False)
STEPS, BATCH, LENGTH = 20, 4, 2048
NAMES = {"ours": "ours", "packed": "ours, packed", "trl": "TRL's SFTTrainer"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        (_trl if options.worker == "trl" else _ours)(options.worker, options.rows, options.steps)
        return
    begin()
    smollm2.ensure()
    with tempfile.TemporaryDirectory() as folder:
        _compare(Path(folder), options.steps)


def _compare(folder: Path, steps: int) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in quadruples(steps * BATCH)))
    workers = {name: Worker(name, rows, steps, folder) for name in NAMES}
    told: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for step in range(1, steps + 1):
        for name, worker in workers.items():
            at(f"step {step} of {steps}: {NAMES[name]}")
            told[name].append(worker.step())
    for worker in workers.values():
        worker.end()
    speeds = {name: [one["learned"] / one["seconds"] for one in found] for name, found in told.items()}
    median = {name: statistics.median(found) for name, found in speeds.items()}
    peak = {name: max(one["mb"] for one in found) for name, found in told.items()}
    shown = Table(title=f"training: {steps} steps of {BATCH} examples, float32, one process", title_justify="left")
    for column in ("", "learned tokens/s, median", "least", "most", "peak MB"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, found in speeds.items():
        figures = (f"{median[name]:.1f}", f"{min(found):.1f}", f"{max(found):.1f}", f"{peak[name]:.0f}")
        shown.add_row(NAMES[name], *figures)
    console.print(shown)
    for name in ("ours", "packed"):
        apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(told[name], told["trl"], strict=True))
        console.print(f"{NAMES[name]}: losses at most {apart:.2e} from TRL's (aim: 1e-3)")
        console.print(f"{NAMES[name]}: peak memory over TRL's {peak[name] / peak['trl']:.2f} (aim: 0.80 at most)")
    for name, aim in (("ours", 2.0), ("packed", 2.5)):
        ratios = [ours / trl for ours, trl in zip(speeds[name], speeds["trl"], strict=True)]
        low, middle, high = (f"{value:.2f}" for value in (min(ratios), statistics.median(ratios), max(ratios)))
        console.print(f"{NAMES[name]}: learned tokens/s over TRL's {middle} ({low} to {high}; aim: {aim})")


def quadruples(count: int) -> list[dict[str, str]]:
    """Contexts of some 200 to 700 tokens, targets of a sixth of that, lengths as uneven as those of real answers."""
    rng = random.Random(5)
    words = [
        "so",
        "then",
        "add",
        "twice",
        "minus",
        "the",
        "number",
        "of",
        "apples",
        "and",
        "carry",
        "one",
        "because",
        "it",
        "follows",
        "from",
        "this",
    ]

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(least, most)))

    return [
        {
            "prompt": f"Problem {number}: {text(20, 120)}",
            "answer": text(60, 220),
            "critique": text(60, 200),
            "refinement": text(30, 110),
        }
        for number in range(count)
    ]


class Worker:
    """One contender in a process of its own; makes a step when it is asked to by a line, and tells of it in one."""

    def __init__(self, name: str, rows: Path, steps: int, folder: Path) -> None:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        alone["MASTER_PORT"] = str(29600 + list(NAMES).index(name))
        env = {**os.environ, **alone, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        words = ["--worker", name, "--rows", str(rows), "--steps", str(steps)]
        self._log = folder / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *words], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True,
            )  # fmt: skip

    def step(self) -> dict[str, float]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"loss"'):
                told: dict[str, float] = json.loads(line)
                return told
        raise RuntimeError(self._log.read_text()[-3000:])

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def _tell(loss: float, learned: int, seconds: float) -> None:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(
        json.dumps({"loss": loss, "learned": learned, "seconds": seconds, "mb": int(line.split()[1]) / 1024}),
        flush=True,
    )


def _examples(rows: Path) -> list[Any]:
    """The rows' examples, as CGD makes them, in the order in which our own schedule takes them."""
    from cgd_stages.chat.template import ChatTemplate
    from cgd_stages.method.examples import row_example
    from cgd_stages.training.batching import Schedule

    template = ChatTemplate.load(smollm2.ensure())
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    made = [row_example(template, "CGD", row, max_length=LENGTH) for row in given]
    schedule = Schedule([len(one.input_ids) for one in made], BATCH, 1, 0)
    return [made[index] for step in range(schedule.steps) for index in schedule.batch(step)]


def _in_order() -> Any:
    """Our schedule, but with the batches in the order of the file."""
    from cgd_stages.training.batching import Schedule

    class InOrder(Schedule):
        def batch(self, step: int) -> list[int]:
            return list(range(len(self.lengths)))[step * BATCH : (step + 1) * BATCH]

    return InOrder


def _ours(name: str, rows: Path, steps: int) -> None:
    """The product's own loop, without its store: job and examples are put where the launcher puts them."""
    import pyarrow as pa

    from cgd_stages.contract import Model, Rows, RunRef, Storage, Train
    from cgd_stages.train import loop as trainloop
    from cgd_stages.train.example_files import EXAMPLES_SCHEMA
    from cgd_stages.train.group import join_group
    from cgd_stages.training.job import EXAMPLES, HELD_OUT, JOB, Job

    warnings.filterwarnings("ignore")
    folder = rows.parent / name
    folder.mkdir()
    # In the order of the schedule already: a batch of one epoch is then found by its place.
    examples, model = _examples(rows), str(smollm2.ensure())
    work = Train(
        student=Model(name=model), global_batch_size=BATCH, learning_rate=1e-5, zero_stage=0,
        max_sequence_length=LENGTH, dtype="float32", checkpoint_every_steps=10**6, max_rejected=0.0,
        packing=name == "packed",
    )  # fmt: skip
    table = [
        {"id": f"{number:020d}", "sample": 0, "input_ids": one.input_ids, "start": one.start}
        for number, one in enumerate(examples)
    ]
    for file, content in ((EXAMPLES, table), *((name, []) for name in HELD_OUT.values())):
        with pa.OSFile(str(folder / file), "wb") as sink, pa.ipc.new_file(sink, EXAMPLES_SCHEMA) as out:
            out.write(pa.RecordBatch.from_pylist(content, schema=EXAMPLES_SCHEMA))
    job = Job(
        run=RunRef(namespace="bench", name="bench", uid="1"), stage="train-cgd", digest="0",
        storage=Storage(uri="s3://bench/bench", endpoint="http://127.0.0.1:1"), work=work, student=model,
        student_dtype="float32", first_rank=0, resume=0, rows=Rows(total=len(table), done=len(table)),
    )  # fmt: skip
    (folder / JOB).write_text(job.to_json())
    join_group()
    trainer = trainloop.start(folder)
    trainer.schedule = _in_order()(trainer.schedule.lengths, BATCH, 1, 0)
    for step in range(steps):
        sys.stdin.readline()
        started = time.monotonic()
        trainer._step(step)
        record = trainer.records[-1]
        _tell(record["loss"], int(record["supervised_tokens"]), time.monotonic() - started)


def _trl(_: str, rows: Path, steps: int) -> None:
    """SFTTrainer with what makes it fastest here: no gradient checkpointing, no evaluation, no logging to a file."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    examples = _examples(rows)
    learned = [len(one.input_ids) - one.start for one in examples]

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            sys.stdin.readline()
            self.started = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                batch = learned[(state.global_step - 1) * BATCH : state.global_step * BATCH]
                _tell(float(logs["loss"]), sum(batch), time.monotonic() - self.started)

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(smollm2.ensure(), dtype="float32"),
        args=SFTConfig(
            output_dir=str(rows.parent / "trl"), per_device_train_batch_size=BATCH, max_steps=steps, max_length=LENGTH,
            learning_rate=1e-5, lr_scheduler_type="cosine", warmup_steps=0, max_grad_norm=1.0, weight_decay=0.0,
            completion_only_loss=True, gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list([
            {"input_ids": one.input_ids, "completion_mask": [int(at >= one.start) for at in range(len(one.input_ids))]}
            for one in examples
        ]),
        processing_class=AutoTokenizer.from_pretrained(smollm2.ensure()),
        callbacks=[Turns()],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main()
