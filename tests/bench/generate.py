"""Benchmarks of generation: `make bench-generate`. Ratios against peers in the same run; nothing here is a test.

    PYTHONPATH=tests python tests/bench/generate.py [throughput | fused | memory]

throughput  our stage, store and markers included, against vLLM's batch runner and a bare `LLM.generate` of everything
            at once: same model, prompts and engine arguments; engine starts excluded; rounds interleaved, median told
fused       critique and refine in one program against two programs, wall clock with imports and engine starts
memory      peak memory of the program at 10,000 and at 100,000 prompts, with an engine that only pretends
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support.stage_builders import RuleEngine, context, generate_with, generate_work, prepared, said, task
from telling import at, begin

from cgd_local import smollm2
from cgd_local.s3 import SeaweedFS
from cgd_stages import contract
from cgd_stages.contract import RunRef, Sampling, Storage
from cgd_stages.engines.base import Engine
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.run import RunStore

console = Console(highlight=False)
ROUNDS, ROWS, TOKENS = 3, 64, 32
ENGINE = contract.Engine(dtype="float32", max_model_len=2048)
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "OMP_WAIT_POLICY": "PASSIVE"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="*", default=["throughput", "fused", "memory"])
    parser.add_argument("--worker", choices=["ours", "batch", "bare", "memory"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        {"ours": _ours, "batch": _batch, "bare": _bare, "memory": _memory}[options.worker]()
        return
    begin()
    benchmarks = {"throughput": throughput, "fused": fused, "memory": memory}
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        s3 = SeaweedFS(Path(folder) / "s3", access_key="bench", secret_key="bench-secret", bucket="bench")
        runner.run(s3.start())
        try:
            os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench-secret"}
            storage = Storage(uri="s3://bench/runs", endpoint=s3.endpoint, region="us-east-1", path_style=True)
            for name in options.what:
                benchmarks[name](storage, Path(folder))
        finally:
            runner.run(s3.stop())


def problems(count: int, seed: int, *, words: tuple[float, float] = (4.0, 0.7)) -> list[str]:
    """Questions whose lengths vary as those of real data do: lognormal, by default 55 words in the middle."""
    rng = random.Random(seed)
    names, things = ("Ann", "Ben", "Carla", "Dmitri", "Emeka"), ("apples", "books", "tickets", "coins", "stamps")
    made = []
    for number in range(count):
        text, wanted = f"Problem {seed}-{number}.", rng.lognormvariate(*words)
        while len(text.split()) < wanted:
            text += (
                f" {rng.choice(names)} has {rng.randrange(2, 90)} {rng.choice(things)} and gives "
                f"{rng.randrange(2, 9)} to {rng.choice(names)}, who had {rng.randrange(2, 90)} before."
            )
        made.append(f"{text} How many {rng.choice(things)} are there now?")
    return made


# --- throughput: workers that wait for a round, so that rounds can be interleaved --------------------------------


def throughput(storage: Storage, folder: Path) -> None:
    names = {
        "ours": "our stage, with S3 and markers",
        "batch": "vLLM's batch runner",
        "bare": "LLM.generate, all at once",
    }
    workers: dict[str, Worker] = {}
    for name in names:  # one start at a time, each with a round to warm up
        at(f"throughput: {names[name]} starts")
        workers[name] = Worker(name, storage, folder)
        workers[name].round(0)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(1, ROUNDS + 1):
        for name, worker in workers.items():
            at(f"throughput: round {number} of {ROUNDS}, {names[name]}")
            told = worker.round(number)
            speeds[name].append(told["tokens"] / told["seconds"])
    for worker in workers.values():
        worker.end()
    median = {name: statistics.median(found) for name, found in speeds.items()}
    shown = Table(title=f"throughput: {ROWS} prompts x at most {TOKENS} tokens, {ROUNDS} rounds", title_justify="left")
    for column in ("", "tokens/s, median", "least", "most", "ours / it"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, found in speeds.items():
        ratio = f"{median['ours'] / median[name]:.3f}"
        shown.add_row(names[name], *(f"{value:.1f}" for value in (median[name], min(found), max(found))), ratio)
    console.print(shown)
    console.print(f"throughput over the batch runner: {median['ours'] / median['batch']:.3f} (aim: 1.0)")
    console.print(f"throughput over LLM.generate: {median['ours'] / median['bare']:.3f} (aim: 0.97)")


class Worker:
    """One engine in a process of its own; a round is asked for by a line on its input, and told on its output."""

    def __init__(self, name: str, storage: Storage, folder: Path) -> None:
        env = {**os.environ, **OFFLINE, **ON_CPU, "BENCH_STORAGE": storage.to_json(), "BENCH_FOLDER": str(folder)}
        if name != "batch":  # the batch runner's engine is a process of its own, always
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        command = [sys.executable, __file__, "--worker", name]
        self._log = (folder / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def round(self, number: int) -> dict[str, float]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                told: dict[str, float] = json.loads(line)
                return told
        raise RuntimeError(Path(self._log.name).read_text()[-3000:])

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _rounds() -> Iterator[list[str]]:
    """The prompts of each round that is asked for: the same for every worker, new ones every round."""
    for line in sys.stdin:
        yield problems(ROWS, int(line))


def _tell(tokens: int, started: float) -> None:
    print(json.dumps({"tokens": tokens, "seconds": time.monotonic() - started}), flush=True)


def _ours() -> None:
    from cgd_stages.chat.template import ChatTemplate
    from cgd_stages.engines.vllm import VllmEngine

    storage = Storage.model_validate_json(os.environ["BENCH_STORAGE"])
    folder, bucket = Path(os.environ["BENCH_FOLDER"]), Bucket(storage)
    engine = _staying(VllmEngine(smollm2.ensure(), ENGINE, ChatTemplate.load(smollm2.ensure())))
    for number, texts in enumerate(_rounds()):
        run = RunRef(namespace="bench", name=f"ours-{number}", uid=str(number))
        prepared(bucket, texts, run)
        work = generate_work(
            smollm2.ensure(), "answer", sampling=(Sampling(max_tokens=TOKENS),), engine=ENGINE, max_rejected=1.0
        )
        given = context(storage, work, folder, run=run)
        started = time.monotonic()
        facts = generate_with(engine, given)["answer"]
        assert facts.rows.total == ROWS
        _tell(facts.generated_tokens, started)


def _staying(engine: Any) -> Engine:
    """An engine that outlives its rounds."""
    engine.close = lambda: None
    found: Engine = engine
    return found


def _arguments() -> dict[str, Any]:
    """Those of our own engine on a CPU."""
    return {
        "model": str(smollm2.ensure()),
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": 64,
        "block_size": 32,
        "seed": 0,
    }


def _bare() -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(**_arguments(), enforce_eager=True, enable_prefix_caching=True, disable_log_stats=True)
    for texts in _rounds():
        started = time.monotonic()
        chats = [[{"role": "user", "content": text}] for text in texts]
        outputs = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=TOKENS), use_tqdm=False)
        _tell(sum(len(output.outputs[0].token_ids) for output in outputs), started)


def _batch() -> None:
    from vllm.entrypoints.launchers import run_batch
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    folder = Path(os.environ["BENCH_FOLDER"])
    given, told = folder / "batch.jsonl", folder / "batch-out.jsonl"
    words = [f"--{name.replace('_', '-')}={value}" for name, value in _arguments().items()]
    words += ["--enforce-eager", "--enable-prefix-caching", "--disable-log-stats"]
    args = run_batch.make_arg_parser(FlexibleArgumentParser()).parse_args(["-i", str(given), "-o", str(told), *words])

    async def rounds() -> None:
        async with build_async_engine_client(args, usage_context=UsageContext.OPENAI_BATCH_RUNNER) as client:
            for texts in _rounds():
                given.write_text(
                    "".join(json.dumps(_batch_request(number, text)) + "\n" for number, text in enumerate(texts))
                )
                started = time.monotonic()
                await run_batch.run_batch(client, args)
                lines = [json.loads(line) for line in told.read_text().splitlines()]
                _tell(sum(line["response"]["body"]["usage"]["completion_tokens"] for line in lines), started)

    asyncio.run(rounds())


def _batch_request(number: int, text: str) -> dict[str, Any]:
    body = {
        "model": str(smollm2.ensure()),
        "messages": [{"role": "user", "content": text}],
        "max_tokens": TOKENS,
        "temperature": 0.0,
    }
    return {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}


# --- fused -------------------------------------------------------------------------------------------------------


def fused(storage: Storage, folder: Path) -> None:
    rows, drafts, rounds, tokens = 12, (300, 600), 3, 64
    seconds: dict[str, list[float]] = {"separate": [], "fused": []}
    hits: list[float] = []
    for number in range(rounds):
        for name, roles in (("separate", [("critique",), ("refine",)]), ("fused", [("critique", "refine")])):
            at(f"fused teacher: round {number + 1} of {rounds}, {name}")
            run = RunRef(namespace=name, name=f"round-{number}", uid=str(number))  # nothing is shared by namespaces
            _answered(storage, folder, run, problems(rows, 100 + number), drafts)
            started = time.monotonic()
            for which in roles:
                _program(storage, folder, run, which, tokens)
            seconds[name].append(time.monotonic() - started)
        facts = RunStore(Bucket(storage), run).input("refine").require().facts
        hits.append(facts.metrics["prompt_tokens_cached"] / max(facts.prompt_tokens, 1))
    shown = Table(
        title=f"fused teacher: {rows} drafts of {drafts[0]}-{drafts[1]} tokens, replies up to {tokens}",
        title_justify="left",
    )
    for column in ("", "seconds, median", "least", "most"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, found in seconds.items():
        shown.add_row(name, *(f"{value:.1f}" for value in (statistics.median(found), min(found), max(found))))
    console.print(shown)
    console.print(f"prefix cache: {statistics.median(hits):.0%} of the refinements' prompt tokens were in it")
    ratio = statistics.median(seconds["fused"]) / statistics.median(seconds["separate"])
    console.print(f"fused over separate: {ratio:.3f} (aim: 0.60 at most)")


def _answered(storage: Storage, folder: Path, run: RunRef, texts: list[str], tokens: tuple[int, int]) -> None:
    """Stored answers of so many tokens; roughly one for each word."""
    rng, bucket = random.Random(run.uid), Bucket(storage)
    prepared(bucket, texts, run)

    def draft(request: Any) -> Any:
        return said(
            request, " ".join(rng.choice(["so", "then", "add", "twice", "minus"]) for _ in range(rng.randint(*tokens)))
        )

    work = generate_work(smollm2.ensure(), "answer", engine=ENGINE, max_rejected=1.0)
    generate_with(RuleEngine(draft), context(storage, work, folder, run=run))


def _program(storage: Storage, folder: Path, run: RunRef, roles: tuple[str, ...], tokens: int) -> None:
    work = generate_work(
        smollm2.ensure(),
        *roles,
        sampling=tuple(Sampling(max_tokens=tokens) for _ in roles),
        engine=ENGINE,
        max_rejected=1.0,
    )
    given = {
        "CGD_TASK": task(storage, work, run=run).to_json(),
        "CGD_SCRATCH": str(folder),
        "CGD_TERMINATION_LOG": str(folder / "words"),
    }
    with (folder / "program.log").open("w") as log:
        command = [sys.executable, "-m", "cgd_stages.generate"]
        subprocess.run(command, env={**os.environ, **OFFLINE, **ON_CPU, **given}, stderr=log, stdout=log, check=True)


# --- memory ------------------------------------------------------------------------------------------------------


def memory(storage: Storage, folder: Path) -> None:
    peaks = {}
    for rows in (10_000, 100_000):
        at(f"memory: {rows:,} prompts")
        prepared(Bucket(storage), problems(rows, 7), RunRef(namespace="bench", name=f"memory-{rows}", uid=str(rows)))
        env = {**os.environ, "BENCH_STORAGE": storage.to_json(), "BENCH_FOLDER": str(folder), "BENCH_ROWS": str(rows)}
        command = [sys.executable, __file__, "--worker", "memory"]
        told = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks[rows] = json.loads(told.splitlines()[-1])
    shown = Table(title="memory: peak of the generate program, engine simulated", title_justify="left")
    for column in ("prompts", "peak MB", "rows/s"):
        shown.add_column(column, justify="right")
    for rows, found in peaks.items():
        shown.add_row(f"{rows:,}", f"{found['mb']:.1f}", f"{rows / found['seconds']:.0f}")
    console.print(shown)
    few, many = peaks.values()
    console.print(f"memory, 100,000 over 10,000 prompts: {many['mb'] / few['mb']:.3f} (aim: 1.10 at most)")


def _memory() -> None:
    storage = Storage.model_validate_json(os.environ["BENCH_STORAGE"])
    rows, folder = int(os.environ["BENCH_ROWS"]), Path(os.environ["BENCH_FOLDER"])
    run = RunRef(namespace="bench", name=f"memory-{rows}", uid=str(rows))
    endpoint = contract.Endpoint(url="http://nowhere", model="none")
    work = contract.Generate(roles=("answer",), sampling=(Sampling(max_tokens=9),), endpoint=endpoint, max_rejected=0.0)
    started = time.monotonic()
    facts = generate_with(Forgetful(batch=64, room=128), context(storage, work, folder, run=run))["answer"]
    assert facts.rows.done == rows
    print(json.dumps({"mb": _peak_mb(), "seconds": time.monotonic() - started}))


def _peak_mb() -> float:
    """Of this program alone: `getrusage` would tell the peak of the process that started it, if that is higher."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


class Forgetful(RuleEngine):
    """Pretends to be a model and keeps nothing of what it was asked."""

    def submit(self, request: Any) -> None:
        super().submit(request)
        self.asked.clear()


if __name__ == "__main__":
    main()
