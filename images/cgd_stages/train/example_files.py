"""The files of a training's examples, which its processes map: made anew from the stored rows in every pod."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from cgd_stages.chat.example import Example
from cgd_stages.contract import StageFacts, Train
from cgd_stages.engines.replies import rejection
from cgd_stages.errors import UserError
from cgd_stages.method.pairs import Pair
from cgd_stages.store.folder import REJECTED, Part
from cgd_stages.store.rows import REJECTION_SCHEMA, Row
from cgd_stages.train.stage import Stage
from cgd_stages.training.dataset import SOURCE_SAMPLE, ExampleCounts, LeftOut
from cgd_stages.training.job import BARE_LOSS, EXAMPLES, HELD_OUT, REJECTED_IDS, VALIDATION_LOSS

log = logging.getLogger(__name__)

CHUNK = 1000
"""Examples in one record batch of the file that the processes read."""
_COLUMNS: list[tuple[str, Any]] = [
    ("id", pa.string()),
    ("sample", pa.int32()),
    ("input_ids", pa.list_(pa.int32())),
    ("start", pa.int32()),
]
EXAMPLES_SCHEMA = pa.schema([pa.field(name, kind) for name, kind in _COLUMNS])
PAIRS_SCHEMA = EXAMPLES_SCHEMA.append(pa.field(REJECTED_IDS, pa.list_(pa.int32())))
SCORED_SCHEMA = EXAMPLES_SCHEMA.append(pa.field(SOURCE_SAMPLE, pa.int32()))


@dataclass
class MadeExamples:
    """The result of making examples: counts of the rows, and the part with the rejected ones."""

    counts: ExampleCounts
    parts: list[Part] = field(default_factory=list)


def make_examples(stage: Stage, folder: Path) -> MadeExamples:
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
