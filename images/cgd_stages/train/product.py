"""What a training ends with: its facts, and the stored model with its card and curve."""

import logging
import shutil
from pathlib import Path
from typing import Any

from cgd_stages.contract import LENGTH, Critique, CritiqueKind, StageFacts, Train
from cgd_stages.method.examples import CONTEXTS, TARGETS
from cgd_stages.models import resolve
from cgd_stages.store.folder import Part
from cgd_stages.store.rows import file_sha256
from cgd_stages.store.run import Product
from cgd_stages.train.example_files import MadeExamples
from cgd_stages.train.stage import Stage
from cgd_stages.training import curves, early
from cgd_stages.training.checkpoints import METRICS
from cgd_stages.training.job import (
    ADAPTER,
    BARE_LOSS,
    MODEL,
    VALIDATION_LOSS,
    Record,
    read_process_ends,
    read_records,
)
from cgd_stages.training.tensorboard import EVENTS, event_file

log = logging.getLogger(__name__)

ABLATIONS: dict[CritiqueKind, str] = {
    "matched": "",
    "shuffled": " An ablation: every critique was another prompt's.",
    "generic": " An ablation: every critique was the same placeholder text.",
    "none": " An ablation: the critique was left out.",
    "corrupted": " An ablation: a part of the critiques was replaced by wrong ones.",
    "miscritique": " An ablation: a part of the critiques was replaced by wrong ones of the same drafts.",
}
"""A sentence for the model card."""


def facts_of(stage: Stage, made: MadeExamples, folder: Path, seconds: float) -> StageFacts:
    """The last words of a training of so many seconds, from the curve in its folder."""
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


def store_model(stage: Stage, made: MadeExamples, facts: StageFacts, folder: Path) -> Product:
    """Store the model, its card and its training's curve."""
    (folder / MODEL / "README.md").write_text(model_card(stage.training.inputs, stage.work, facts))
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
