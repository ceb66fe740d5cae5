"""Outputs of an evaluated model: their columns, and the figures that a stage tells of them. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cgd_stages.contract import Rows, StageFacts
from cgd_stages.results import model, scores
from cgd_stages.store.rows import Row

COUNTED = ("accuracy", "low", "high", "n", "outputs", "truncated", "unparsed", "ungraded", "refused", "mean_tokens")
"""Figures of a benchmark's score that the stage tells."""
_COLUMNS: list[tuple[str, Any]] = [
    ("benchmark", pa.string()),
    ("id", pa.string()),
    ("sample", pa.int32()),
    ("prompt", pa.string()),
    ("reference", pa.string()),
    ("tolerance", pa.string()),
    ("output", pa.string()),
    ("finish_reason", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("tokens", pa.int32()),
    ("passes", pa.int32()),
    ("extracted", pa.string()),
    ("answer_source", pa.string()),
    ("correct", pa.bool_()),
    ("rule", pa.string()),
    ("grade_error", pa.string()),
]
SCHEMA = pa.schema([pa.field(column, kind) for column, kind in _COLUMNS])


@dataclass
class Totals:
    """What the outputs of a model come to, whichever attempt has made them."""

    samples: list[model.Sample] = field(default_factory=list)
    prompt_tokens: int = 0

    def add(self, row: Row) -> None:
        self.samples.append(model.Sample.of(row))
        self.prompt_tokens += row["prompt_tokens"]

    def facts(self, total: int, seconds: float) -> StageFacts:
        """Facts of the stage, of whose `total` outputs these are all that are there."""
        return StageFacts(
            rows=Rows(total=total, done=len(self.samples)),
            prompt_tokens=self.prompt_tokens,
            generated_tokens=sum(sample.tokens for sample in self.samples),
            seconds=round(seconds, 3),
            metrics=metrics(self.samples),
        )


def metrics(samples: Sequence[model.Sample]) -> dict[str, float]:
    """Figures of each benchmark; `low` and `high` bound the accuracy with 95 %, `pass_k` is the chance that one of k
    outputs is right."""
    told: dict[str, float] = {}
    for benchmark in sorted({sample.benchmark for sample in samples}):
        score = scores.score("", benchmark, [sample for sample in samples if sample.benchmark == benchmark])
        values = {name: getattr(score, name) for name in COUNTED}
        values |= {f"pass_{one.k}": one.share for one in score.pass_at if one.k > 1}
        told |= {f"{benchmark}_{name}": round(float(value), 6) for name, value in values.items()}
    return told
