"""What a run has stored, in the form in which the commands show it."""

import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.panel import Panel

from cgd_cli.terminal import likely, panel, plain
from cgd_operator.planning.dag import Run, plan
from cgd_stages import contract
from cgd_stages.chat.example import IGNORE, Example
from cgd_stages.errors import UserError
from cgd_stages.method.prompts import whole_prompt
from cgd_stages.models import resolve
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import REJECTED, read_rows
from cgd_stages.store.rows import Row, from_parquet
from cgd_stages.store.run import RunStore
from cgd_stages.text.references import in_words
from cgd_stages.training.dataset import Dataset

Manifest = dict[str, Any]

WRITTEN = ("answer", "critique", "refinement", "distilled", "miscritique", "misrefinement")
TEXTS = ("prompt", "reference", *(name for text in WRITTEN for name in (f"{text}_thinking", text)))
"""What a row's panel shows one under another; the turns before a prompt are shown with it."""


def _store(run: Manifest, storage: contract.Storage) -> RunStore:
    meta = run["metadata"]
    return RunStore(Bucket(storage), contract.RunRef(namespace=meta["namespace"], name=meta["name"], uid=meta["uid"]))


def rows(run: Manifest, storage: contract.Storage, *, stage: str, rejected: bool, prefix: str, count: int) -> list[Row]:
    """The first `count` rows of a finished stage whose id begins with `prefix`. Raises StageError."""
    stages = [entry["name"] for entry in run.get("status", {}).get("stages", [])]
    if stages and stage not in stages:
        raise UserError(f"{run['metadata']['name']} has no stage {stage}", hint=likely(stage, stages))
    folder = _store(run, storage).input(stage)
    stored: Iterable[Row] = read_rows(folder)
    if rejected:
        stored = (row for part in folder.require().under(REJECTED) for row in from_parquet(folder.read(part)))
    return list(itertools.islice((row for row in stored if row["id"].startswith(prefix)), count))


def row_panel(row: Row) -> Panel:
    """The texts of a row one under another, each after its thought, and the counts below."""
    body = plain("")
    texts = dict(row)
    if row.get("prompt"):
        texts["prompt"] = whole_prompt(row)
    if row.get("reference"):
        texts["reference"] = in_words(row["reference"])
    for name in TEXTS:
        if texts.get(name):
            body.append_text(plain(f"{name}\n", "bold cyan", lines=True))
            body.append_text(plain(f"{texts[name]}\n\n", lines=True))
    counts = [
        f"{column} {value}"
        for column, value in row.items()
        if column not in (*TEXTS, "turns", "id", "sample") and value not in (None, "")
    ]
    return panel(body.append_text(plain("  ".join(counts), "dim")), f"{row['id']} / {row['sample']}")


def example(run: Manifest, storage: contract.Storage, row: Row, training: str, *, colours: bool) -> Panel:
    """The training example that a training of the run (`CGD`, or a variant's name) makes of a row. Its learned tokens
    are green or, without colours, in double brackets. Raises UserError."""
    works = [child.task.work for child in plan(Run.of(run))]
    trainings = {work.title: work for work in works if isinstance(work, contract.Train)}
    if training not in trainings:
        raise UserError(f"the run does not train {training}", hint=f"It trains {', '.join(trainings)}.")
    work, store = trainings[training], _store(run, storage)
    with tempfile.TemporaryDirectory() as scratch:
        template = resolve.spoken(resolve.pinned(work.student, store), work.chat, store, Path(scratch))
    key = (row["id"], row["sample"])
    dataset = Dataset.of(store, work, template)
    made = next((made for source, made in dataset.examples() if (source["id"], source["sample"]) == key), None)
    if made is None:
        raise UserError(f"{key[0]}/{key[1]} is no row of {training}", hint="Look with --stage refine.")
    if not isinstance(made, Example):
        return panel(plain(str(made), lines=True), f"{row['id']}: no example", border="red")
    text, marks = plain(""), ("", "") if colours else ("[[", "]]")
    if key in dataset.bare:
        text.append_text(plain("The context is the prompt alone (bareShare).\n\n", "bold cyan", lines=True))
    if key in dataset.misled:
        what = f"The critique is a miscritique, the target is {work.critique.target}."
        text.append_text(plain(f"{what}\n\n", "bold cyan", lines=True))
    tokens = zip(made.input_ids, made.labels, strict=True)
    for learned, group in itertools.groupby(tokens, lambda token: token[1] != IGNORE):
        opening, closing = marks if learned else ("", "")
        style = "bold green" if learned else "dim"
        pieces = (template.tokenizer.decode([token]) for token, _ in group)
        text.append_text(plain(f"{opening}{''.join(pieces)}{closing}", style, lines=True))
    count = len(made.input_ids) - made.start
    title = f"{row['id']} / {row['sample']}  {training}: {count} of {len(made.input_ids)} tokens learned"
    title += f", thinking {work.chat.thinking}, thoughts: {work.thinking}" if template.markup else ""
    return panel(text, title)


def report(run: Manifest, storage: contract.Storage, kind: str = "html") -> bytes:
    """The report of a run: its page, or with "json" every figure on it. Raises StageError while there is none."""
    folder = _store(run, storage).input("report")
    (file,) = (part for part in folder.require().parts if part.key == f"report.{kind}")
    return folder.read(file)


def stored_logs(run: Manifest, storage: contract.Storage, stage: str) -> list[tuple[str, str]]:
    """Name and text of the end of each log that the pods of a stage, or of all stages, have stored, oldest first.
    Raises UserError if there is none."""
    children = {str(name): str(child.stage) for child in plan(Run.of(run)) for name in (*child.stages, child.stage)}
    if stage and stage not in children:
        raise UserError(f"{run['metadata']['name']} has no stage {stage}", hint=likely(stage, list(children)))
    logs = _store(run, storage).logs(children.get(stage, ""))
    if not logs:
        of = f"{run['metadata']['name']} has stored no log{f' of {stage}' if stage else ''}"
        raise UserError(of, hint="A log is stored when its program has ended.")
    return [(name, text.decode(errors="replace")) for name, text in logs]


def training_of(run: Manifest, stage: str) -> str:
    """The stage of a training whose model is meant. A run with one training needs no stage. Raises UserError."""
    works = {str(child.stage): child.task.work for child in plan(Run.of(run))}
    trainings = [name for name, work in works.items() if isinstance(work, contract.Train)]
    if stage and stage not in trainings:
        raise UserError(f"{run['metadata']['name']} has no training {stage}", hint=likely(stage, trainings))
    if not stage and len(trainings) > 1:
        hint = f"Name one of them with --stage: {', '.join(trainings)}."
        raise UserError(f"{run['metadata']['name']} trains {len(trainings)} models", hint=hint)
    return stage or trainings[0]


def pull(run: Manifest, storage: contract.Storage, stage: str, folder: Path) -> int:
    """Download the model of a training into a folder; its bytes. Raises StageError."""
    training = training_of(run, stage)
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent) as scratch:
        model = contract.Model(name=f"{resolve.STAGE}{training}")
        made = resolve.fetch(model, _store(run, storage), Path(scratch))
        made.rename(folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
