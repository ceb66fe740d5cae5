"""Which setting would shorten the longest stage of a run. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cgd_cli.estimate import Assumptions, Cost, costs
from cgd_operator.planning.dag import Run

WORTH = 0.9
"""A change that leaves more than this share of the time is not worth saying."""


@dataclass(frozen=True)
class Shorter:
    """The longest stage, and the setting that shortens it the most; None: doubling none of them would."""

    longest: Cost
    field: str | None = None
    now: int = 0
    seconds: float = 0.0
    """Of the stage, with the setting doubled."""
    money: float = 0.0
    """Of the whole run, with the setting doubled."""


def shorter(run: Run, assumptions: Assumptions) -> Shorter | None:
    """None where no stage takes time that is known."""
    stages = costs(run, assumptions)
    longest = max(stages, key=lambda cost: cost.seconds)
    if not longest.seconds:
        return None
    tried = [
        Shorter(longest, field, now, *_outcome(changed, longest, assumptions)) for field, now, changed in _doubled(run)
    ]
    best = min(tried, key=lambda one: one.seconds)
    return best if best.seconds <= WORTH * longest.seconds else Shorter(longest)


def _outcome(run: Run, longest: Cost, assumptions: Assumptions) -> tuple[float, float]:
    stages = costs(run, assumptions)
    return next(cost.seconds for cost in stages if cost.stage == longest.stage), sum(cost.money for cost in stages)


def _doubled(run: Run) -> Iterator[tuple[str, int, Run]]:
    """Each setting that spreads a stage over more GPUs: its field, its value, and the run with twice as much."""
    spec = run.spec
    for part, name in (
        ("student", "shards"),
        ("student", "tensor_parallel"),
        ("teacher", "shards"),
        ("training", "workers"),
    ):
        if part == "teacher" and not spec.teacher.model:
            continue
        owner = getattr(spec, part)
        now = int(getattr(owner, name))
        changed = spec.model_copy(update={part: owner.model_copy(update={name: 2 * now})})
        field = type(owner).model_fields[name].alias or name
        yield f"{part}.{field}", now, replace(run, spec=changed)
