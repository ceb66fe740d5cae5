"""The outputs of an evaluated model: their columns, and the figures that a stage reports. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from cgd_stages.contract import Rows, StageFacts
from cgd_stages.results import model, scores
from cgd_stages.store.rows import TURNS, Row

COUNTED = ("accuracy", "low", "high", "n", "outputs", "truncated", "unparsed", "ungraded", "refused", "mean_tokens")
"""The fields of a benchmark's score that the stage reports."""
SCHEMA = pa.schema(
    [
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
        ("thinking", pa.string()),
        TURNS,
    ]
)


@dataclass
class Totals:
    """The outputs of a model so far, of this attempt and earlier ones."""

    samples: list[model.Sample] = field(default_factory=list)
    prompt_tokens: int = 0

    def add(self, row: Row) -> None:
        self.samples.append(model.Sample.of(row))
        self.prompt_tokens += row["prompt_tokens"]

    def facts(self, total: int, seconds: float) -> StageFacts:
        """The stage's facts, if it has no more of its `total` outputs than these."""
        return StageFacts(
            rows=Rows(total=total, done=len(self.samples)),
            prompt_tokens=self.prompt_tokens,
            generated_tokens=sum(sample.tokens for sample in self.samples),
            seconds=round(seconds, 3),
            metrics=metrics(self.samples),
        )


def metrics(samples: Sequence[model.Sample]) -> dict[str, float]:
    """The figures of each benchmark. `low` and `high` are the 95 % interval of the accuracy, `pass_k` is the chance
    that one of k outputs is right, `unfinished` counts the outputs whose thought never ended."""
    figures: dict[str, float] = {}
    for benchmark in sorted({sample.benchmark for sample in samples}):
        score = scores.score("", benchmark, [sample for sample in samples if sample.benchmark == benchmark])
        values = {name: getattr(score, name) for name in COUNTED}
        values |= {f"pass_{pass_at.k}": pass_at.share for pass_at in score.pass_at if pass_at.k > 1}
        values |= {"unfinished": score.unfinished} if score.unfinished else {}
        figures |= {f"{benchmark}_{name}": round(float(value), 6) for name, value in values.items()}
    return figures
