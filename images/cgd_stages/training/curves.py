"""Which step of a training its validation losses choose, and whether its loss has run away. Pure."""

from collections.abc import Sequence
from statistics import median

from cgd_stages.contract import Exported
from cgd_stages.training.job import BARE_LOSS, VALIDATION_LOSS, Record

BASELINE = 50
"""Steps before the suspicious ones that define a normal loss; after fewer steps no loss is suspicious."""
STREAK = 5
"""Steps in a row whose loss must be high. A single odd batch is no spike: training recovers from it."""
DEVIATIONS = 6.0
"""A high loss is so many standard deviations (1.4826 times the median absolute deviation) above the median..."""
RISE = 0.5
"""...and by this fraction of the median: a curve without noise may wobble."""


def spiked(losses: Sequence[float]) -> bool:
    """Whether the last STREAK losses are all far above the BASELINE before them.

    The baseline is the median of its steps, so that neither noise nor a few earlier outliers move it; a loss that
    rises as slowly as the baseline follows is not a spike. The answer does not depend on the losses' unit.
    """
    baseline, streak = losses[-STREAK - BASELINE : -STREAK], losses[-STREAK:]
    if len(baseline) < BASELINE:
        return False
    middle = median(baseline)
    spread = 1.4826 * median(abs(loss - middle) for loss in baseline)
    return min(streak) > middle + max(DEVIATIONS * spread, RISE * middle)


def measured(records: Sequence[Record]) -> list[Record]:
    """The records of the steps with a validation loss."""
    return [record for record in records if VALIDATION_LOSS in record]


def best(records: Sequence[Record], select: Exported) -> Record | None:
    """The record of the step whose loss chooses the exported model: the least, and the earliest of equals. None where
    no loss chooses: with `last`, or when nothing was held out."""

    def loss(record: Record) -> float:
        own = record[VALIDATION_LOSS]
        return record.get(BARE_LOSS, own) if select == "bare" else own

    return None if select == "last" else min(measured(records), key=loss, default=None)
