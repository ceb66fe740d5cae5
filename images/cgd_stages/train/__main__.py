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
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from cgd_stages.chat.example import Example
from cgd_stages.contract import LENGTH, Critique, CritiqueKind, Exit, Model, StageFacts, Train
from cgd_stages.engines.replies import rejection
from cgd_stages.errors import Interrupted, NoTransfer, StageError, TransientError, UserError
from cgd_stages.method.examples import CONTEXTS, TARGETS
from cgd_stages.method.pairs import Pair
from cgd_stages.models import resolve
from cgd_stages.models.fit import read_config
from cgd_stages.runtime.program import Context, run
from cgd_stages.store.benchmarks import read_benchmarks
from cgd_stages.store.folder import REJECTED, Folder, Part
from cgd_stages.store.rows import REJECTION_SCHEMA, Row, file_sha256
from cgd_stages.store.run import Product
from cgd_stages.training import curves, early
from cgd_stages.training.checkpoints import METRICS
from cgd_stages.training.dataset import SOURCE_SAMPLE, Dataset, ExampleCounts, LeftOut
from cgd_stages.training.job import (
    ADAPTER,
    BARE_LOSS,
    BEGUN,
    CHECKPOINTS,
    EXAMPLES,
    HELD_OUT,
    JOB,
    LAUNCHER,
    MODEL,
    QUESTIONS,
    REJECTED_IDS,
    SCORES,
    STOP,
    VALIDATION_LOSS,
    Job,
    ProcessEnd,
    Record,
    inputs_of,
    read_process_ends,
    read_records,
    router_loss_weight,
)
from cgd_stages.training.scores import write_scores
from cgd_stages.training.tensorboard import EVENTS, event_file

log = logging.getLogger(__name__)

CHUNK = 1000
"""Examples in one record batch of the file that the processes read."""
LOOP = "cgd_stages.train.loop"
"""The program that torchrun starts."""
PATIENCE = 0.2
"""Seconds between two looks at torchrun's process."""
LOOK_SECONDS = 2.0
"""Seconds between two looks for the first pod, or for the objects that it stores."""
ABSENT_SECONDS = 600.0
"""The other pods wait so long at most for the first pod's address."""
SILENT_SECONDS = 600.0
"""The other pods give up the first pod when it has stored nothing for so long, and has not written the promise."""
ABLATIONS: dict[CritiqueKind, str] = {
    "matched": "",
    "shuffled": " An ablation: every critique was another prompt's.",
    "generic": " An ablation: every critique was the same placeholder text.",
    "none": " An ablation: the critique was left out.",
    "corrupted": " An ablation: a part of the critiques was replaced by wrong ones.",
    "miscritique": " An ablation: a part of the critiques was replaced by wrong ones of the same drafts.",
}
"""A sentence for the model card."""
_COLUMNS: list[tuple[str, Any]] = [
    ("id", pa.string()),
    ("sample", pa.int32()),
    ("input_ids", pa.list_(pa.int32())),
    ("start", pa.int32()),
]
EXAMPLES_SCHEMA = pa.schema([pa.field(name, kind) for name, kind in _COLUMNS])
PAIRS_SCHEMA = EXAMPLES_SCHEMA.append(pa.field(REJECTED_IDS, pa.list_(pa.int32())))
SCORED_SCHEMA = EXAMPLES_SCHEMA.append(pa.field(SOURCE_SAMPLE, pa.int32()))


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
    """A training stage: its student, its dataset, and the folder for the model."""

    context: Context
    work: Train
    node: Node
    dataset: Dataset
    folder: Folder
    inputs: dict[str, Any]
    student: Model
    """The model that the training starts from."""
    router_loss_weight: float


@dataclass
class MadeExamples:
    """The result of making examples: counts of the rows, and the part with the rejected ones."""

    counts: ExampleCounts
    parts: list[Part] = field(default_factory=list)


def main(context: Context) -> dict[str, StageFacts]:
    context.store = context.store.waiting(context.stop)
    stage = _stage(context)
    if not stage.node.first:
        _follow(stage)
        return {}
    with ExitStack() as until_promised:
        done = context.store.produce(context.task.stage, stage.inputs, lambda _: _lead(stage, until_promised))
    return {context.task.stage: done.facts}


def _stage(context: Context) -> Stage:
    work, task = context.work_of(Train), context.task
    student = resolve.pinned(work.student, context.store)
    dataset = Dataset.of(context.store, work, resolve.spoken(student, work.chat, context.store, context.scratch))
    config = read_config(resolve.fetch(student, context.store, context.scratch, weights=False), student, "spec.student")
    weight = router_loss_weight(work, config)
    inputs = inputs_of(task.stage, dataset, resolve.resolve(student, context.store), weight)
    if work.start:
        # The start's digest says all of it, whatever this run calls the stage.
        student = Model(name=f"{resolve.STAGE}{work.start}", revision=context.store.input(work.start).digest)
        inputs["start"] = student.revision
    folder = context.store.folder(task.stage, inputs)
    node = Node.from_environment(os.environ, work)
    return Stage(context, work, node, dataset, folder, inputs, student, weight)


def _lead(stage: Stage, until_promised: ExitStack) -> Product:
    """The first pod trains with the others, and stores the model."""
    started = time.monotonic()
    made, folder = _get_ready(stage)
    until_promised.enter_context(stage.context.holding())
    _torchrun(stage, folder)
    return _store(stage, made, _facts(stage, made, folder, time.monotonic() - started), folder)


def _follow(stage: Stage) -> None:
    """Any other pod trains with the first, and stays until the first has stored the model."""
    if stage.folder.done():
        log.info("%s is done already: %s", stage.context.task.stage, stage.folder.uri)
        return
    _, folder = _get_ready(stage)
    with stage.context.holding():
        _torchrun(stage, folder)
    _await_promise(stage)
    log.info("pod %d has ended well", stage.node.rank)


def _get_ready(stage: Stage) -> tuple[MadeExamples, Path]:
    """Make the examples, fetch student and newest undamaged checkpoint, and write the job, all in this pod's folder."""
    task, node = stage.context.task, stage.node
    folder = stage.context.scratch / f"{task.stage}-{node.rank}"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier attempt in this pod may have left files
    folder.mkdir(parents=True)
    student = resolve.fetch(stage.student, stage.context.store, stage.context.scratch)
    made = _make_examples(stage, folder)
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
        work=stage.work.model_copy(update={"student": stage.student, "chat": stage.dataset.template.chat}),
        student=str(student),
        student_dtype=stored_dtype(student),
        router_loss_weight=stage.router_loss_weight,
        first_rank=node.rank * node.processes,
        resume=0,
        rows=made.counts.rows,
    )
    resume = job.checkpoints(stage.folder.bucket).fetch(folder / CHECKPOINTS, job.ranks)
    (folder / JOB).write_text(job.model_copy(update={"resume": resume}).to_json())
    _find_first_pod(stage)
    return made, folder


# --- before training --------------------------------------------------------------------------------------------


def _make_examples(stage: Stage, folder: Path) -> MadeExamples:
    """Tokenise every row into the files that the processes map: one of the examples to learn, and one for each loss on
    those that are held out. Raises the errors that `check` would have raised."""
    dataset, counts = stage.dataset, ExampleCounts.of(stage.dataset)
    made, left_out = MadeExamples(counts), list[Row]()
    with ExitStack() as files:
        names, schema = (EXAMPLES, *HELD_OUT.values()), _schema(stage.work)
        write = {name: files.enter_context(_examples_file(folder / name, schema)) for name in names}
        for row, example in dataset.examples():
            counts.add(row, example)
            if isinstance(example, LeftOut):
                left_out.append(rejection(stage.work.stage, row, example.reason, example.detail))
            if not isinstance(example, Example):
                continue
            if row["id"] not in counts.held_out:
                write[EXAMPLES](row, example)
                continue
            write[HELD_OUT[VALIDATION_LOSS]](row, example)
            if dataset.measures_bare and isinstance(bare := dataset.bare_example(row), Example):
                write[HELD_OUT[BARE_LOSS]](row, bare)
    log.info("%s: %d tokens learned", counts.rows, counts.learned)
    if (rejected := counts.rejected + left_out) and stage.node.first:
        made.parts.append(stage.folder.put_rows(REJECTED, rejected, REJECTION_SCHEMA))
    try:
        counts.refuse_unless_enough(stage.dataset.total, stage.work.max_rejected)
    except UserError:
        facts = StageFacts(rows=counts.rows, digest=stage.folder.digest, metrics=counts.metrics())
        stage.context.facts[stage.work.stage] = facts
        raise
    return made


def _schema(work: Train) -> pa.Schema:
    """The columns of the examples' files."""
    if work.objective == "DPO":
        return PAIRS_SCHEMA
    return SCORED_SCHEMA if work.scores else EXAMPLES_SCHEMA


@contextmanager
def _examples_file(path: Path, schema: pa.Schema = EXAMPLES_SCHEMA) -> Iterator[Callable[[Row, Example], None]]:
    """A function that writes a row's example into the file, a chunk of them at a time."""
    chunk: list[Row] = []

    def flush() -> None:
        file.write(pa.RecordBatch.from_pylist(chunk, schema=schema))
        chunk.clear()

    def write(row: Row, example: Example) -> None:
        columns = {"id": row["id"], "sample": row["sample"], "input_ids": example.input_ids, "start": example.start}
        columns |= {REJECTED_IDS: example.rejected} if isinstance(example, Pair) else {}
        chunk.append(columns | {SOURCE_SAMPLE: row.get(SOURCE_SAMPLE, row["sample"])})
        if len(chunk) == CHUNK:
            flush()

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        yield write
        flush()


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


def _find_first_pod(stage: Stage) -> None:
    """Wait until DNS knows the first pod, where the processes meet: its Service names it only while it runs."""
    node, deadline = stage.node, time.monotonic() + ABSENT_SECONDS
    while node.nodes > 1 and not is_known(node.master):
        if time.monotonic() > deadline:
            raise TransientError(
                f"the training's first pod was not found in {ABSENT_SECONDS:g} s: {node.master} has no address",
                hint="That pod does not run (`kubectl describe pod` says why), or the cluster's DNS does not know its "
                "Service. This pod tries again.",
            )
        log.info("waiting for the first pod, %s", node.master)
        time.sleep(LOOK_SECONDS)


def is_known(host: str) -> bool:
    """Whether DNS, or this machine, has an address for the name."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _torchrun(stage: Stage, folder: Path) -> None:
    """Run this pod's processes to their end, and raise their error. After SIGTERM they may store a checkpoint, if they
    have begun a step."""
    command = [sys.executable, "-m", "torch.distributed.run", *stage.node.torchrun()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    environment[LAUNCHER] = str(os.getpid())
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // stage.node.processes)))
    # A session of its own keeps SIGTERM from torchrun, which would kill processes that have a checkpoint to store.
    process = subprocess.Popen([*command, "-m", LOOP, str(folder)], env=environment, start_new_session=True)
    try:
        while process.poll() is None:
            if stage.context.stop.is_set():
                if not (folder / BEGUN).exists():
                    raise Interrupted("SIGTERM: no step was begun")
                (folder / STOP).touch()
            time.sleep(PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise failure(read_process_ends(folder), process.returncode, stage.node)


def failure(process_ends: list[ProcessEnd], code: int, node: Node) -> StageError:
    """The pod's error: what the user must change, else an interruption, else a reason to try again.

    A killed process does not write how it ended, and the others fail because it is gone.
    """
    kinds: dict[int, type[StageError]] = {Exit.PERMANENT: UserError, Exit.INTERRUPTED: Interrupted}
    for exit_code, kind in kinds.items():
        for end in process_ends:
            if end.code == exit_code:
                kind = NoTransfer if end.error == NoTransfer.__name__ else kind
                return kind(end.message, hint=end.hint)
    ranks = range(node.rank * node.processes, (node.rank + 1) * node.processes)
    silent = sorted(set(ranks) - {end.rank for end in process_ends})
    causes = [f"rank {', '.join(map(str, silent))} was killed or ended without a word"] if silent else []
    causes += [f"rank {end.rank}: {end.error}: {end.message}" for end in process_ends if end.code]
    hints = [end.hint for end in process_ends if end.code and end.hint]
    return TransientError(
        f"training in pod {node.rank} broke off (torchrun {code}): {'; '.join(causes)}"[:1500],
        hint=hints[0] if hints else "The next attempt continues from the newest checkpoint.",
    )


# --- after training ---------------------------------------------------------------------------------------------


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


def _facts(stage: Stage, made: MadeExamples, folder: Path, seconds: float) -> StageFacts:
    records = read_records(folder / METRICS)
    exported = curves.best(records, stage.work.validation.select) or records[-1]
    busy = sum(record["seconds"] for record in records)
    tokens = sum(record["tokens"] for record in records)
    learned = sum(record["supervised_tokens"] for record in records)
    return StageFacts(
        rows=made.counts.rows,
        seconds=round(seconds, 3),
        digest=stage.folder.digest,
        output_uri=stage.folder.uri,
        metrics=made.counts.metrics()
        | {
            "steps": len(records),
            "first_loss": records[0]["loss"],
            "final_loss": records[-1]["loss"],
            "exported_step": exported["step"],
            "trained_tokens": tokens,
            "supervised_tokens": learned,
            "tokens_per_second": round(tokens / busy, 1),
        }
        | _of_the_exported(exported, records)
        | _early(records),
    )


def _of_the_exported(exported: Record, records: list[Record]) -> dict[str, float]:
    """The exported model's validation losses and router loss, peak memory and MFU, as far as the training has them."""
    figures: dict[str, float] = {
        name: exported[name] for name in (VALIDATION_LOSS, BARE_LOSS, "router_loss") if name in exported
    }
    figures |= {"peak_memory_bytes": max(record["peak_memory_bytes"] for record in records)}
    shares = [record["mfu"] for record in records if "mfu" in record]
    return figures | ({"mfu": round(sum(shares) / len(shares), 4)} if shares else {})


def _early(records: list[Record]) -> dict[str, float]:
    """The figures of the last early look, if there was any."""
    last = next((record for record in reversed(records) if early.EARLY in record), {})
    return {name: last[name] for name in (early.EARLY, early.BEFORE) if name in last}


def _store(stage: Stage, made: MadeExamples, facts: StageFacts, folder: Path) -> Product:
    """Store the model, its card and its training's curve."""
    (folder / MODEL / "README.md").write_text(model_card(stage.inputs, stage.work, facts))
    bucket, parts = stage.folder.bucket, list(made.parts)
    learned = {resolve.MODEL: folder / MODEL} | ({resolve.ADAPTER: folder / ADAPTER} if stage.work.adapter else {})
    for prefix, files in learned.items():
        for path in sorted(files.iterdir()):
            bucket.upload(path, stage.folder.key(f"{prefix}{path.name}"))
            parts.append(Part(key=f"{prefix}{path.name}", sha256=file_sha256(path)))
    bucket.upload(folder / METRICS, stage.folder.key(METRICS))
    parts.append(Part(key=METRICS, sha256=file_sha256(folder / METRICS), rows=int(facts.metrics["steps"])))
    parts.append(stage.folder.put(EVENTS, event_file(read_records(folder / METRICS)), alone=True))
    log.info("the model is stored: %s/%s", stage.folder.uri, resolve.MODEL)
    settings: dict[str, Any] = {
        "workers": stage.work.workers,
        "processes": stage.node.processes,
        "zeroStage": stage.work.zero_stage,
    }
    devices = {end.device for end in read_process_ends(folder)} - {""}
    settings |= {"deviceName": ", ".join(sorted(devices))} if devices else {}
    shutil.rmtree(folder)
    return Product(facts, parts, settings)


def model_card(inputs: dict[str, Any], work: Train, facts: StageFacts) -> str:
    """The README of the trained model: what it is, its training, and the outcome."""
    student = inputs["student"]
    settings = "\n".join(
        f"| {name} | {value} |" for name, value in inputs["training"].items() if not isinstance(value, dict)
    )
    figures = "\n".join(
        f"| {name} | {value:g} |" for name, value in facts.metrics.items() if not name.startswith(LENGTH)
    )
    held_out = facts.metrics.get("validation_examples", 0.0)
    learned = facts.rows.done - held_out
    started = _start(inputs, work)
    own_answers = f", of the teacher's own answers `{inputs['distill']}`" if "distill" in inputs else ""
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [critique-guided-distillation]
---

# {Path(student["name"]).name}, trained with {work.objective}

Fine-tuned from `{student["name"]}` (revision `{student["revision"]}`){started} on {learned:g} rows. The context was
{CONTEXTS[work.objective]}{_bare(work)}; only {TARGETS[work.objective]} was learned.{_ablation(work.critique)}
Ask it the prompt alone: one pass, no draft, no critique, the chat template unchanged.{_adapter(work)}
{_selection(work, facts)}

| training | |
|---|---|
{settings}
| rows held out | {held_out:g} of {facts.rows.total} |
| rows rejected | {facts.rows.rejected} of {facts.rows.total} |

| outcome | |
|---|---|
{figures}

Digest of this training `{facts.digest}`, of its rows `{inputs["upstream"]}`{own_answers}. The model keeps
the licence of the one it was made from; its data carry the licences of their prompts and of the teacher.
"""


def _start(inputs: dict[str, Any], work: Train) -> str:
    """What the training started from, where that is not the student itself."""
    return f", as another training of the run had left it (`{work.start}`, `{inputs['start']}`)," if work.start else ""


def _bare(work: Train) -> str:
    """Which rows had another context, where some had."""
    return f", but for {work.bare_share:.4g} of the rows the prompt alone" if work.bare_share else ""


def _ablation(critique: Critique) -> str:
    refined = " Behind these, what the teacher refined from them was learned." if critique.target == "refined" else ""
    return ABLATIONS[critique.kind] + refined


def _adapter(work: Train) -> str:
    """What was trained, in a sentence, where it is not all parameters."""
    if not work.adapter:
        return ""
    modules = ", ".join(work.adapter.targets) or "every linear module of the layers"
    return (
        f"\nTrained was a low-rank adapter (rank {work.adapter.rank}, alpha {work.adapter.alpha}, dropout "
        f"{work.adapter.dropout:g}, for {modules}), which is stored beside this folder in `{resolve.ADAPTER}`; this is "
        "the student with the adapter added, rounded once, and the model that was evaluated."
    )


_BARE, _OWN = "given the prompt alone", "in the context in which it was trained"
"""What a validation loss is measured on, in words."""


def _selection(work: Train, facts: StageFacts) -> str:
    """How the stored model was chosen, in a sentence."""
    metrics, select = facts.metrics, work.validation.select
    if not metrics.get("validation_examples"):
        return "It is the model after the last step; no prompts were held out."
    losses = f"{metrics[VALIDATION_LOSS]:.4g}"
    if BARE_LOSS in metrics:
        bare = f"{metrics[BARE_LOSS]:.4g}"
        losses = f"{bare} ({_OWN} {losses})" if select == "bare" else f"{losses} ({_BARE} {bare})"
    rows = f"whose loss on {metrics['validation_examples']:g} rows of held-out prompts is"
    if select == "last":
        return f"It is the model after the last step, {rows} {losses}."
    return (
        f"It is the model after step {metrics['exported_step']:g} of {metrics['steps']:g}, {rows} the least of all "
        f"that were measured {_BARE if select == 'bare' else _OWN}: {losses}. No benchmark had a part in the choice."
    )


if __name__ == "__main__":
    run(main)
