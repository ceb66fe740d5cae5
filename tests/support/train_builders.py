"""Builders for the tests of training: stored quadruples, a task, and a plain loop to compare with."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Model, Objective, RunRef, StageFacts, StageTask, Storage, Train
from cgd_stages.method.examples import row_example
from cgd_stages.store.benchmarks import store_benchmarks
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import DONE, PARTS, Folder
from cgd_stages.store.rows import Row, digest_of, now, row_schema
from cgd_stages.store.run import RunStore
from cgd_stages.train import __main__ as train
from cgd_stages.training.batching import Schedule, learning_rate
from cgd_stages.training.checkpoints import CHECKPOINTS
from cgd_stages.training.job import MODEL, read_records
from support.patience import PATIENCE
from support.ports import free_port
from support.stage_builders import RUN, context

STAGE = "train-cgd"


def quadruple(number: int, **changes: Any) -> Row:
    """A row of refine; longer with the number, so that batches need padding."""
    text = {
        "prompt": f"What is {number} + {number + 1}?",
        "answer": f"It is {number}." * (1 + number % 3),
        "critique": "Add them." * (1 + number % 4) + "\nConclusion: wrong",
        "refinement": f"{number} + {number + 1} = {2 * number + 1}." + " So it is." * (number % 3),
    }
    row: Row = dict.fromkeys(row_schema("refine").names)
    row |= {"id": f"{number:020x}", "sample": 0, "verdict": "wrong", **text}
    return row | {name: 5 for name in row if name.endswith("_tokens")} | changes


def refined(bucket: Bucket, rows: list[Row], run: RunRef = RUN, questions: Sequence[Row] = ()) -> Folder:
    """Finished stages prepare and refine with these rows, and of prepare with these questions of benchmarks; the folder
    of refine."""
    for stage in ("prepare", "refine"):
        schema = row_schema(stage)
        folder = Folder(bucket, run.namespace, stage, digest_of(stage=stage, rows=rows))
        parts = [folder.put_rows(PARTS, [{name: row[name] for name in schema.names} for row in rows], schema)]
        parts += [store_benchmarks(folder, questions)] if questions and stage == "prepare" else []
        facts = StageFacts.model_validate({"rows": {"total": len(rows), "done": len(rows)}})
        RunStore(bucket, run).point_at(folder.finish(facts=facts, parts=parts, started=now(), inputs={}))
    return folder


def question(number: int, reference: str, benchmark: str = "sums") -> Row:
    """A benchmark's question, as prepare stores it; longer with the number."""
    prompt = f"What is {number} + {number + 1}?" + " Think." * (number % 4)
    key = {"benchmark": benchmark, "id": f"{number:020x}"}
    return key | {"prompt": prompt, "reference": reference, "tolerance": None, "turns": None}


def trained(storage: Storage, scratch: Path, model: Path, **changes: Any) -> tuple[list[dict[str, float]], Path]:
    """Train with these settings: the curve, and the folder of the trained model."""
    made = context(storage, train_work(model, **changes), scratch)
    made.task = made.task.model_copy(update={"stage": STAGE})
    train.main(made)
    folder = scratch / f"{STAGE}-0"
    return read_records(folder / "metrics.jsonl"), folder / MODEL


def weights(model: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(model, dtype="auto").named_parameters())


def distilled(bucket: Bucket, answers: dict[str, str], run: RunRef = RUN) -> Folder:
    """A finished stage distill: the teacher's own answers by id."""
    schema = row_schema("distill")
    rows = [
        dict.fromkeys(schema.names) | {"id": i, "sample": 0, "prompt": i, "distilled": a} for i, a in answers.items()
    ]
    folder = Folder(bucket, run.namespace, "distill", digest_of(answers=answers))
    facts = StageFacts.model_validate({"rows": {"total": len(rows), "done": len(rows)}})
    parts = [folder.put_rows(PARTS, rows, schema)]
    RunStore(bucket, run).point_at(folder.finish(facts=facts, parts=parts, started=now(), inputs={}))
    return folder


def misrefined(bucket: Bucket, rows: list[Row], run: RunRef = RUN) -> Folder:
    """A finished stage misrefine with a miscritique of each of these rows of refine, and what followed from it."""
    schema = row_schema("misrefine")
    wrong = [
        {name: row.get(name) for name in schema.names}
        | {"miscritique": f"Trust {row['id']}.\nConclusion: right", "misrefinement": f"Wrongly {row['id']}."}
        | {"misrefinement_thinking": "Wrongly thought."}
        for row in rows
    ]
    folder = Folder(bucket, run.namespace, "misrefine", digest_of(rows=wrong))
    facts = StageFacts.model_validate({"rows": {"total": len(rows), "done": len(rows)}})
    parts = [folder.put_rows(PARTS, wrong, schema)]
    RunStore(bucket, run).point_at(folder.finish(facts=facts, parts=parts, started=now(), inputs={}))
    return folder


def train_work(model: Path, **changes: Any) -> Train:
    given: dict[str, Any] = {
        "student": Model(name=str(model)),
        "global_batch_size": 4,
        "epochs": 2,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.1,
        "max_sequence_length": 600,
        "zero_stage": 2,
        "dtype": "float32",
        "checkpoint_every_steps": 3,
        "max_rejected": 0.1,
    }
    return Train(**(given | changes))


def train_task(storage: Storage, work: Train) -> StageTask:
    return StageTask(run=RUN, stage=STAGE, storage=storage, work=work)


def places(nodes: int) -> list[dict[str, str]]:
    """What Kubeflow writes into the environment of each pod of a job; here all are on this machine."""
    job = {"PET_NNODES": str(nodes), "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    return [job | {"PET_NODE_RANK": str(rank)} for rank in range(nodes)]


def has_checkpoint(bucket: Bucket) -> bool:
    """Whether any training has stored a whole checkpoint."""
    return any(stored.key.endswith(f"/{DONE}") and f"/{CHECKPOINTS}" in stored.key for stored in bucket.list())


def until_gone(folder: Path) -> None:
    """Wait until no process works on the folder any more, though its launcher may have been killed."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if not commands(folder):
            return
        time.sleep(0.1)
    raise AssertionError("processes of the killed pod live on")


def until_torchrun_has_started_processes(folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if any(b"torch.distributed.run" not in command for command in commands(folder)):
            return
        time.sleep(0.1)
    raise AssertionError("torchrun has started no process")


def commands(folder: Path) -> list[bytes]:
    """Of the processes that work on the folder."""
    found = map(_command, Path("/proc").glob("[0-9]*/cmdline"))
    return [command for command in found if str(folder).encode() in command]


def _command(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


Plain = tuple[list[float], list[float], dict[str, torch.Tensor]]
"""Losses and gradient norms of all steps, and the final weights."""


def plain_training(model: Path, rows: list[Row], work: Train) -> Plain:
    """The same training without DeepSpeed, batches, padding or narrowed logits. A mixture's router learns too, with the
    weight that transformers takes from its config."""
    torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine
    template = ChatTemplate.load(model)
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    if work.adapter:
        student = with_adapter(student, work)
    examples = [row_example(template, "CGD", row, max_length=work.max_sequence_length) for row in rows]
    lengths = [len(example.input_ids) for example in examples]
    schedule = Schedule(lengths, work.global_batch_size, work.epochs, work.seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, weight_decay=work.weight_decay)
    losses, norms, weight = [], [], getattr(student, "router_aux_loss_coef", 0.0)
    for step in range(schedule.steps):
        rate = learning_rate(step, steps=schedule.steps, peak=work.learning_rate, warmup_ratio=work.warmup_ratio)
        optimizer.param_groups[0]["lr"] = rate
        batch = [examples[index] for index in schedule.batch(step)]
        learned = sum(label != -100 for example in batch for label in example.labels)
        total = 0.0
        for example in batch:
            asked = {"output_router_logits": True} if weight else {}
            output = student(input_ids=torch.tensor([example.input_ids]), **asked)
            labels = torch.tensor(example.labels[1:])
            loss = cross_entropy(output.logits[0, :-1], labels, reduction="sum", ignore_index=-100) / learned
            (loss + weight * output.aux_loss / len(batch) if weight else loss).backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    assert all(math.isfinite(loss) for loss in losses)
    if work.adapter:
        student = student.merge_and_unload()
    return losses, norms, {name: tensor.detach() for name, tensor in student.named_parameters()}


def with_adapter(student: Any, work: Train) -> Any:
    """The student with the task's adapter on all linear modules of its layers, as users of PEFT make it."""
    from peft import LoraConfig, get_peft_model

    assert work.adapter
    torch.manual_seed(work.seed)
    given = {"r": work.adapter.rank, "lora_alpha": work.adapter.alpha}
    return get_peft_model(student, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **given))


def plain_loss(model: Path, rows: list[Row], objective: Objective = "CGD") -> float:
    """Mean loss of a stored model over the target tokens of rows, taken one by one."""
    template = ChatTemplate.load(model)
    stored = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total = count = 0.0
    for row in rows:
        example = row_example(template, objective, row, max_length=10_000)
        labels = torch.tensor(example.labels[1:])
        with torch.no_grad():
            logits = stored(input_ids=torch.tensor([example.input_ids])).logits[0, :-1]
        total += float(cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
        count += int((labels != -100).sum())
    return total / count


def stored_curve(bucket: Bucket, folder: Folder) -> list[dict[str, float]]:
    """The lines of the stage's `metrics.jsonl`."""
    data = bucket.get(folder.key("metrics.jsonl"))
    assert data is not None
    return [json.loads(line) for line in data.splitlines()]
