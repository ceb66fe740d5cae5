"""Pods that were deleted, as they were last, until the status of their run has them.

In memory alone: what an operator that ends has not written is as lost as what no watch has told.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cgd_operator.facts.pods import Gone, last_state
from cgd_operator.planning.manifests import UID_LABEL

MOST = 2048
"""Pods in all: beyond that those of the run that has had some for longest are forgotten."""


@dataclass
class Departed:
    runs: dict[str, dict[str, Gone]] = field(default_factory=dict)
    """By the uids of run and pod."""

    def add(self, pod: dict[str, Any], now: datetime) -> None:
        """A watch says that the pod is deleted; `pod` is its last state."""
        meta = pod["metadata"]
        run = meta["labels"].get(UID_LABEL)
        if run is None:  # no pod of ours, though it is labelled as one
            return
        self.runs.setdefault(run, {})[meta["uid"]] = last_state(pod, now)
        while sum(map(len, self.runs.values())) > MOST:
            del self.runs[next(iter(self.runs))]

    def of(self, run: str) -> tuple[Gone, ...]:
        return tuple(self.runs.get(run, {}).values())

    def told(self, run: str, gone: tuple[Gone, ...]) -> None:
        """The run's status has them now."""
        left = {uid: pod for uid, pod in self.runs.pop(run, {}).items() if pod not in gone}
        if left:
            self.runs[run] = left
