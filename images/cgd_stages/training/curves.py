"""The best validation in a training's curve, and whether its loss has run away. Pure."""

from collections.abc import Sequence
from statistics import median

from cgd_stages.training.job import Record

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
    return [record for record in records if "validation_loss" in record]


def best(records: Sequence[Record]) -> Record | None:
    """The record with the least validation loss, the earliest of equals; None when nothing was held out."""
    return min(measured(records), key=lambda record: record["validation_loss"], default=None)
