"""Benchmark of on-policy distillation against TRL's DistillationTrainer: `make bench-onpolicy`. Nothing here is a test.

    PYTHONPATH=tests python tests/bench/onpolicy.py [--refresh 8] [--tokens 64] [--rounds 4] [--steps 6]

Same student (SmolLM2-135M, float32), same teacher (the same model, its weights moved a little), same prompts, equally
large batches, samples of at most the same length. Ours are the three programs as pods run them, with the store: one
samples, one scores, one trains. A loop of theirs lasts from a round's scores to the next round's scores: it has the
steps of a round, the hand-over of weights, sampling and scoring. TRL samples, scores and learns in one process, with
transformers' generate, which is its default. Program starts, TRL's first step and our first round are left out, and the
starts are told beside it. Figures: learned tokens per second, and peak memory of each program with its children.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from support.round_player import other_model
from support.stage_builders import RUN, Program
from support.train_builders import quadruple, refined, stored_curve
from telling import at, begin

from cgd_local import smollm2
from cgd_local.s3 import SeaweedFS
from cgd_stages.contract import Engine, Model, OnPolicy, Rollout, Score, StageTask, Storage, Train
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Folder
from generate import ON_CPU, problems

console = Console(highlight=False)
BATCH, TOP_K = 8, 16
NAMES = ("rollout", "score", "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--refresh", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="of TRL")
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl:
        _trl(options.trl, options.tokens, options.steps)
        return
    begin()
    with tempfile.TemporaryDirectory() as scratch, asyncio.Runner() as runner:
        folder, student = Path(scratch), smollm2.ensure_float32()
        teacher = other_model(student, folder / "teacher", by=0.001)
        theirs = _theirs(folder, teacher, options.tokens, options.steps)
        s3 = SeaweedFS(folder / "s3", access_key="bench", secret_key="bench-secret", bucket="bench")
        runner.run(s3.start())
        try:
            os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench-secret"}
            storage = Storage(uri="s3://bench/runs", endpoint=s3.endpoint, region="us-east-1", path_style=True)
            ours = _ours(storage, folder, student, teacher, options)
        finally:
            runner.run(s3.stop())
    _tell(ours, theirs)


def _tell(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    shown = Table(title=f"on-policy: batches of {BATCH}, float32, rounds of ours told one by one", title_justify="left")
    for column in ("", "learned tokens/s, median", "least", "most", "peak MB"):
        shown.add_column(column, justify="left" if not column else "right")
    median = {}
    for name, told in (("ours", ours), ("TRL's DistillationTrainer", theirs)):
        median[name] = statistics.median(told["speeds"])
        figures = (median[name], min(told["speeds"]), max(told["speeds"]))
        shown.add_row(name, *(f"{value:.1f}" for value in figures), f"{told['peak']:.0f}")
    console.print(shown)
    console.print(f"ours: peak MB of {', '.join(f'{name} {mb:.0f}' for name, mb in ours['each'].items())}")
    console.print(f"ours: {ours['start']:.0f} s from the programs' start to the first round's scores; TRL's first step "
                  f"ends after {theirs['start']:.0f} s")  # fmt: skip
    console.print(f"ours: seconds of a loop {ours['loops']}, of which training's steps {ours['steps']}")
    ratio = ours["each"]["train"] / theirs["peak"]
    faster = median["ours"] / median["TRL's DistillationTrainer"]
    console.print(f"learned tokens/s over TRL's: {faster:.2f} (aim: 2)")
    both = [told["per_cpu"] for told in (ours, theirs)]
    console.print(f"learned tokens per second of processor time: ours {both[0]:.1f}, TRL's {both[1]:.1f}, ratio "
                  f"{both[0] / both[1]:.2f}")  # fmt: skip
    console.print(f"peak memory over TRL's: {ours['peak'] / theirs['peak']:.2f} of all three programs together, "
                  f"{ratio:.2f} of the training alone (aim: 0.7)")  # fmt: skip


def _ours(storage: Storage, folder: Path, student: Path, teacher: Path, options: argparse.Namespace) -> dict[str, Any]:
    refresh, count = options.refresh, options.rounds
    bucket, rows = Bucket(storage), count * refresh * BATCH
    refined(bucket, [quadruple(number, prompt=text) for number, text in enumerate(problems(rows, 1))])
    engine = Engine(dtype="float32", max_model_len=1024)
    on_policy = OnPolicy(
        refresh=refresh,
        max_tokens=options.tokens,
        engine=engine,
        teacher=Model(name=str(teacher)),
        teacher_engine=engine,
    )
    work = Train(
        objective="GKD", beta=0.5, top_k=TOP_K, on_policy=on_policy, student=Model(name=str(student)),
        global_batch_size=BATCH, learning_rate=1e-5, zero_stage=0, max_sequence_length=1024, dtype="float32",
        checkpoint_every_steps=10**6, max_rejected=0.1,
    )  # fmt: skip
    works: dict[str, Any] = {
        "rollout": Rollout(training=work),
        "score": Score(
            objective="RefinedSFT", training=work, student=work.student, max_sequence_length=1024,
            model=on_policy.teacher, engine=engine, top_k=TOP_K, max_rejected=0.1,
        ),
        "train": work,
    }  # fmt: skip
    stages = {"rollout": str(work.rollouts), "score": str(work.scored_rollouts), "train": str(work.stage)}
    began = time.monotonic()
    programs = {
        name: Program(
            name, StageTask(run=RUN, stage=stages[name], storage=storage, work=works[name]), folder / name, **ON_CPU,
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
        )
        for name in NAMES
    }  # fmt: skip
    watched = {name: Watched(program._process.pid) for name, program in programs.items()}  # type: ignore[union-attr]
    scored, cpu = list[float](), list[float]()
    for number in range(count):
        scored.append(_when(bucket, f"team/{stages['score']}/", number, programs))
        cpu.append(sum(one.cpu for one in watched.values()))
    ended = {name: program.wait() for name, program in programs.items()}
    for name, end in ended.items():
        assert end.code == 0, (name, end.log[-3000:])
    digest = ended["train"].words.stages[work.stage].digest
    curve = stored_curve(bucket, Folder(bucket, RUN.namespace, work.stage, digest))
    loops = [later - earlier for earlier, later in pairwise(scored)]
    learned = [_sum(curve, number, refresh, "supervised_tokens") for number in range(count - 1)]
    return {
        "speeds": [count / seconds for count, seconds in zip(learned, loops, strict=True)],
        "per_cpu": sum(learned) / (cpu[-1] - cpu[0]),
        "loops": [round(seconds, 1) for seconds in loops],
        "steps": [round(_sum(curve, number, refresh, "seconds"), 1) for number in range(count - 1)],
        "start": scored[0] - began,
        "each": {name: one.peak for name, one in watched.items()},
        "peak": sum(one.peak for one in watched.values()),
    }


def _when(bucket: Bucket, prefix: str, number: int, programs: dict[str, Program]) -> float:
    """The moment at which a round is scored."""
    at(f"ours: round {number + 1}")
    while not any(f"/rounds/{number:05d}/" in stored.key for stored in bucket.list(prefix)):
        for name, program in programs.items():
            code = program._process.poll()
            assert not code, (name, program._log.read_text()[-3000:])
        time.sleep(0.1)
    return time.monotonic()


def _sum(curve: list[dict[str, float]], number: int, refresh: int, name: str) -> float:
    return sum(record[name] for record in curve[number * refresh : (number + 1) * refresh])


class Watched:
    """A process and its children: the most memory that they have had together, in MB, and the seconds of processor time
    that they have used, which a machine that does other things changes little. Looked at five times a second."""

    def __init__(self, pid: int) -> None:
        self.peak = self.cpu = 0.0
        self._process = psutil.Process(pid)
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            with suppress(psutil.NoSuchProcess):  # a child has ended meanwhile
                family = [self._process, *self._process.children(recursive=True)]
                times = [one.cpu_times() for one in family]
                self.cpu = max(self.cpu, sum(each.user + each.system for each in times))
                self.peak = max(self.peak, sum(one.memory_info().rss for one in family) / 2**20)
            time.sleep(0.2)


# --- TRL ----------------------------------------------------------------------------------------------------------


def _theirs(folder: Path, teacher: Path, tokens: int, steps: int) -> dict[str, Any]:
    at("TRL")
    began = time.monotonic()
    command = [sys.executable, __file__, "--trl", str(teacher), "--tokens", str(tokens), "--steps", str(steps)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (folder / "trl.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)
        watched, told, start = Watched(process.pid), list[dict[str, float]](), 0.0
        assert process.stdout
        for line in process.stdout:
            if line.startswith('{"learned"'):
                start = start or time.monotonic() - began
                told.append(json.loads(line))
                at(f"TRL: step {len(told)} of {steps}")
        if process.wait():
            raise RuntimeError((folder / "trl.log").read_text()[-3000:])
    return {
        "speeds": [step["learned"] / step["seconds"] for step in told[1:]],
        "per_cpu": sum(step["learned"] for step in told[1:]) / sum(step["cpu"] for step in told[1:]),
        "peak": watched.peak,
        "start": start,
    }


def _trl(teacher: Path, tokens: int, steps: int) -> None:
    """DistillationTrainer with what makes it fastest here: no gradient checkpointing, evaluation or logged texts."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    warnings.filterwarnings("ignore")
    student = smollm2.ensure_float32()

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started, self.cpu = time.monotonic(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            told = {"learned": learned.pop(), "seconds": time.monotonic() - self.started}
            print(json.dumps(told | {"cpu": time.process_time() - self.cpu}), flush=True)

    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype="float32"),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype="float32"),
        args=DistillationConfig(
            output_dir="trl", per_device_train_batch_size=BATCH, max_steps=steps, max_completion_length=tokens,
            beta=0.5, learning_rate=1e-5, max_grad_norm=1.0, gradient_checkpointing=False, bf16=False, use_cpu=True,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([
            {"prompt": [{"role": "user", "content": text}]} for text in problems(steps * BATCH, 1)
        ]),
        processing_class=AutoTokenizer.from_pretrained(student),
        callbacks=[Turns()],
    )  # fmt: skip
    learned: list[int] = []
    make: Callable[..., dict[str, Any]] = trainer._generate_and_score_completions

    def counted(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        made = make(inputs)
        learned.append(int(made["completion_mask"].sum()))
        return made

    trainer._generate_and_score_completions = counted
    trainer.train()


if __name__ == "__main__":
    main()
