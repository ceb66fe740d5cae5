"""What a run has stored, as the commands show it."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.panel import Panel

from cgd_cli.terminal import panel, plain
from cgd_operator.planning.dag import Run, plan
from cgd_stages import contract
from cgd_stages.errors import UserError
from cgd_stages.method.examples import IGNORE, Unusable
from cgd_stages.models import resolve
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import REJECTED, read_rows
from cgd_stages.store.rows import Row, from_parquet
from cgd_stages.store.run import RunStore
from cgd_stages.training.dataset import Dataset

Manifest = dict[str, Any]

TEXTS = ("prompt", "reference", "answer", "critique", "refinement", "distilled")


def _store(run: Manifest, storage: contract.Storage) -> RunStore:
    meta = run["metadata"]
    return RunStore(Bucket(storage), contract.RunRef(namespace=meta["namespace"], name=meta["name"], uid=meta["uid"]))


def rows(run: Manifest, storage: contract.Storage, *, stage: str, rejected: bool, prefix: str, count: int) -> list[Row]:
    """The first `count` rows of a finished stage whose id begins with `prefix`. Raises StageError."""
    folder = _store(run, storage).input(stage)
    stored: Iterable[Row] = read_rows(folder)
    if rejected:
        stored = (row for part in folder.require().under(REJECTED) for row in from_parquet(folder.read(part)))
    found: list[Row] = []
    for row in stored:
        if len(found) == count:
            break
        if row["id"].startswith(prefix):
            found.append(row)
    return found


def row_panel(row: Row) -> Panel:
    """A row: its texts one under another, its counts below."""
    body = plain("")
    for name in TEXTS:
        if row.get(name):
            body.append_text(plain(f"{name}\n", "bold cyan", lines=True))
            body.append_text(plain(f"{row[name]}\n\n", lines=True))
    rest = {key: value for key, value in row.items() if key not in (*TEXTS, "id", "sample") and value not in (None, "")}
    facts = plain("  ".join(f"{key} {value}" for key, value in rest.items()), "dim")
    return panel(body.append_text(facts), f"{row['id']} / {row['sample']}")


def example(run: Manifest, storage: contract.Storage, row: Row, objective: str) -> Panel:
    """The training example that the run's objective makes of a row: the learned tokens are marked. Raises UserError."""
    work, store = _training(run, objective), _store(run, storage)
    with tempfile.TemporaryDirectory() as scratch:
        student = resolve.fetch(resolve.pinned(work.student, store), store, Path(scratch), weights=False)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=False)
    wanted = (row["id"], row["sample"])
    examples = Dataset.of(store, work).examples(tokenizer)
    made = next((made for one, made in examples if (one["id"], one["sample"]) == wanted), None)
    if made is None:
        raise UserError(f"{wanted[0]}/{wanted[1]} is no row of {objective}", hint="Look with --stage refine.")
    if isinstance(made, Unusable):
        return panel(plain(str(made), lines=True), f"{row['id']}: no example", border="red")
    text = plain("")
    for token, label in zip(made.input_ids, made.labels, strict=True):
        style = "dim" if label == IGNORE else "bold green"
        text.append_text(plain(tokenizer.decode([token]), style, lines=True))
    learned = len(made.input_ids) - made.start
    title = f"{row['id']} / {row['sample']}  {objective}: {learned} of {len(made.input_ids)} tokens learned"
    return panel(text, title)


def _training(run: Manifest, objective: str) -> contract.Train:
    works = [child.task.work for child in plan(Run.of(run))]
    found = {work.objective: work for work in works if isinstance(work, contract.Train)}
    if objective not in found:
        raise UserError(f"the run does not train {objective}", hint=f"It trains {', '.join(found)}.")
    return found[objective]


def report(run: Manifest, storage: contract.Storage, kind: str = "html") -> bytes:
    """The report of a run: its page, or with "json" every figure on it. Raises StageError when it has none yet."""
    folder = _store(run, storage).input("report")
    (file,) = (part for part in folder.require().parts if part.key == f"report.{kind}")
    return folder.read(file)
