"""Two runs that an earlier build has stored the half of, for the test that a later build goes on from there.

    PYTHONPATH=operator:images:tests python -m support.earlier_run

writes `earlier_run.zip`: every object of the store (`store/`), the tasks of the stages (`tasks/`), and the files that
the runs were given (`files/`). The zip in this folder was written at commit fa6ca2f. It is not written anew when the
code changes: that a later build reads it is what the test is about.

Of the run `early` the answers are under way: shard 0 of 2 has ended, shard 1 was interrupted. Of the run `late` all
else is: critiques and refinements of a fused teacher in 2 shards, an evaluation, and one of two tasks of lm-eval.
"""

import asyncio
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from cgd_local.s3 import SeaweedFS
from cgd_stages.contract import (
    Benchmark,
    BenchmarkFields,
    Engine,
    Evaluate,
    Fields,
    Generate,
    Harness,
    HarnessTask,
    Model,
    Prepare,
    Prompts,
    RunRef,
    Sampling,
    StageTask,
    Storage,
    Work,
)
from cgd_stages.engines.base import Reply, Request
from cgd_stages.errors import Interrupted
from cgd_stages.evaluate import __main__ as evaluate
from cgd_stages.harness import __main__ as harness
from cgd_stages.harness.replies import Reply as Ended
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.runtime.program import Context
from cgd_stages.store import part_writer
from cgd_stages.store.bucket import Bucket
from support.stage_builders import RuleEngine, context, generate_with, said, stop_after

ZIP = Path(__file__).with_suffix(".zip")
STUDENT = "./student"
"""The student's folder, relative to the working directory: its name is part of digests."""
EARLY, LATE = (RunRef(namespace="team", name=name, uid=f"uid-{name}") for name in ("early", "late"))
SHARDS = 2
PROMPTS = [f"How many plums are {number} plums and {number + 1} plums?" for number in range(20)]
QUESTIONS = [{"question": f"What is {number} + 1?", "answer": f"#### {number + 1}"} for number in range(12)]
TASKS = tuple(HarnessTask(name=name, task=name, metric="exact_match,none") for name in ("sums", "others"))


def rule(request: Request) -> Reply:
    """What the models of these runs say: two rows of each role go wrong, a refinement more than a critique."""
    last = request.messages[-1]["content"]
    if request.name.startswith("numbers/"):
        return said(request, rf"It is \boxed{{{int(last.split()[2]) + 1}}}")
    role = request.name.rsplit("-", 1)[-1]
    wrong = {"answer": " 3 plums", "critique": " 5 plums", "refine": " 7 plums"}[role]
    if wrong in str(request.messages):
        return said(request, "")
    return said(request, f"The {role} of it.\nConclusion: wrong")


class Words:
    """A tokenizer that counts words."""

    def __call__(self, text: str) -> dict[str, list[str]]:
        return {"input_ids": text.split()}


class Asker:
    tokenizer = Words()


def documents(task: HarnessTask) -> dict[str, Any]:
    """What a played lm-eval says of a task."""
    samples = [
        {
            "doc_id": number,
            "arguments": [(f"What is {number} + 1 ?", {"until": []})],
            "target": str(number + 1),
            "resps": [[f"It is {number + 1}"]],
            "filtered_resps": [str(number + 1)],
            "filter": "none",
            "reply": Ended.of("It is", "stop"),
            "metrics": [task.measure],
            task.measure: float(number % 2),
        }
        for number in range(4)
    ]
    return {
        "samples": {task.task: samples},
        "results": {task.task: {"alias": task.task, "exact_match,none": 0.5}},
        "versions": {task.task: 3.0},
        "n-shot": {task.task: 2},
        "n-samples": {task.task: {"original": 9, "effective": len(samples)}},
        "lm_eval_version": "9.9",
    }


def _works() -> dict[str, tuple[RunRef, str, Work]]:
    """By name: whose work it is, of which stage, and what there is to do."""
    student, engine = Model(name=STUDENT), Engine(dtype="float32")
    numbers = Benchmark(
        name="numbers",
        source="configmap://given/questions.jsonl",
        fields=BenchmarkFields(prompt="question", reference="answer"),
        instruction="Put the answer in a box.",
    )
    prompts = Prompts(source="configmap://given/prompts.jsonl", fields=Fields(prompt="question", reference="answer"))
    prepared = Prepare(
        prompts=prompts,
        benchmarks=(numbers,),
        student=student,
        student_engine=engine,
        teacher=student,
        teacher_engine=engine,
        max_rejected=0.2,
    )
    asked: dict[str, Any] = {"model": student, "engine": engine, "max_rejected": 0.2}
    early = Generate(roles=("answer",), sampling=(Sampling(max_tokens=32),), shards=SHARDS, **asked)
    late = Generate(roles=("answer",), sampling=(Sampling(max_tokens=48),), **asked)
    teacher = Generate(
        roles=("critique", "refine"),
        sampling=(Sampling(max_tokens=64), Sampling(max_tokens=48)),
        shards=SHARDS,
        **asked,
    )
    evaluated = Evaluate(model=student, benchmarks=(numbers,), sampling=Sampling(max_tokens=16), engine=engine)
    return {
        "early-prepare": (EARLY, "prepare", prepared),
        "early-answer": (EARLY, "answer", early),
        "late-prepare": (LATE, "prepare", prepared),
        "late-answer": (LATE, "answer", late),
        "late-teacher": (LATE, "teacher", teacher),
        "late-evaluate": (LATE, "evaluate-base", evaluated),
        "late-harness": (LATE, "harness-base", Harness(model=student, tasks=TASKS, engine=engine)),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, _store(Path(folder) / "s3") as storage:
        os.chdir(folder)
        _write_files(Path("files"))
        (Path("files") / "student").rename(STUDENT)
        part_writer.FLUSH_ROWS = evaluate.FLUSH_ROWS = 3  # many parts
        tasks = {
            name: StageTask(run=run, stage=stage, storage=storage, work=work)
            for name, (run, stage, work) in _works().items()
        }

        def attempt(name: str, shard: int = 0) -> Context:
            task = tasks[name]
            made = context(storage, task.work, Path("scratch"), run=task.run, inputs=Path("files"), shard=shard)
            made.task = task
            return made

        for name in ("early-prepare", "late-prepare"):
            prepare.main(attempt(name))
        generate_with(RuleEngine(rule), attempt("early-answer"))
        _interrupt(attempt("early-answer", 1), 1, generate_with)
        generate_with(RuleEngine(rule), attempt("late-answer"))
        generate_with(RuleEngine(rule), attempt("late-teacher"))
        _interrupt(attempt("late-teacher", 1), 3, generate_with)
        _interrupt(attempt("late-evaluate"), 2, _evaluate)
        _interrupt(attempt("late-harness"), 0, _ask_lm_eval)
        Path(STUDENT).rename("files/student")
        _pack(Bucket(storage), tasks, Path("files"))


@contextmanager
def _store(folder: Path) -> Iterator[Storage]:
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = SeaweedFS(folder, access_key="test", secret_key="test-secret", bucket="data")
    with asyncio.Runner() as runner:
        runner.run(server.start())
        try:
            yield Storage(uri="s3://data/earlier", endpoint=server.endpoint, path_style=True)
        finally:
            runner.run(server.stop())


def _write_files(folder: Path) -> None:
    """The student, whose words are all one token, and the ConfigMap with prompts (one of them twice) and questions."""
    student, given = folder / "student", folder / "given"
    student.mkdir(parents=True)
    given.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(student / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    (student / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 512,
    }
    (student / "config.json").write_text(json.dumps(config))
    prompts = [{"question": text, "answer": "1"} for text in [*PROMPTS, PROMPTS[0]]]
    for name, rows in (("prompts", prompts), ("questions", QUESTIONS)):
        (given / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _interrupt(attempt: Context, steps: int, ask: Callable[[RuleEngine, Context], object]) -> None:
    """SIGTERM after so many steps of the engine."""
    engine = RuleEngine(rule, batch=2)
    stop_after(engine, steps, attempt.stop)
    with suppress(Interrupted):
        ask(engine, attempt)
        raise AssertionError(f"{attempt.task.stage} was not interrupted")


def _evaluate(engine: RuleEngine, attempt: Context) -> None:
    evaluate._engine = lambda *_: engine
    evaluate.main(attempt)


def _ask_lm_eval(_: RuleEngine, attempt: Context) -> None:
    def ask(_: Any, task: HarnessTask, __: Any) -> dict[str, Any]:
        attempt.stop.set()
        return documents(task)

    harness.start, harness.known_tasks, harness.ask = lambda *_: Asker(), lambda _: None, ask
    harness.main(attempt)


def _pack(bucket: Bucket, tasks: dict[str, StageTask], files: Path) -> None:
    with zipfile.ZipFile(ZIP, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for stored in bucket.list():
            packed.writestr(f"store/{stored.key}", bucket.get(stored.key) or b"")
        for name, task in tasks.items():
            packed.writestr(f"tasks/{name}.json", task.to_json())
        for path in sorted(files.rglob("*")):
            if path.is_file():
                packed.write(path, path)


if __name__ == "__main__":
    main()
