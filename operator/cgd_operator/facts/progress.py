"""What the children of a run report of their progress: who may, and the last report of each shard. Pure."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from cgd_stages.contract import MOST, Progress, Rows

LEAST_PATIENCE, MOST_PATIENCE = 2.0, 30.0
REPORTS_AT_ONCE = 4.0
"""Of each pod and stage; afterwards one a second. A stage program sends one every two seconds, and one more when the
stage begins or is through."""


@dataclass(frozen=True)
class StageProgress:
    """The reports of a stage's shards, added up."""

    rows: Rows | None
    percent: int | None
    tokens_per_second: int | None
    eta_seconds: int | None
    shards: int = 1
    """Those that have reported."""

    @property
    def all_done(self) -> bool:
        return _all_done(self.rows)

    def is_through(self, shards: int) -> bool:
        """Whether every one of so many shards has all its rows."""
        return self.all_done and self.shards >= shards


class Told(NamedTuple):
    """What is kept of a report."""

    rows: Rows | None
    percent: int | None
    tokens_per_second: float | None
    eta_seconds: int | None

    @classmethod
    def by(cls, report: Progress) -> Self:
        status = report.trainer_status
        return cls(
            report.rows, status.progress_percentage, report.tokens_per_second, status.estimated_remaining_seconds
        )


@dataclass
class Reports:
    """Of one stage."""

    since: float
    """When the first came, on the monotonic clock."""
    last: dict[int, Told] = field(default_factory=dict)
    """By shard."""
    turns: int = 0
    """How often the stage began, was through, or was so no more."""


@dataclass
class Allowance:
    """What a child may report, and how often."""

    stages: tuple[str, ...]
    """Those that it carries out."""
    pods: int
    _paid: float = 0.0

    def may_report(self, now: float) -> bool:
        """Whether one more report is in time, at this moment of the monotonic clock. It counts if it is."""
        paid = max(self._paid, now) + 1 / (self.pods * len(self.stages))
        if paid > now + REPORTS_AT_ONCE:
            return False
        self._paid = paid
        return True

    def refusal(self, report: Progress) -> str:
        """Why the report cannot be of this child; "" when it can."""
        if report.stage is not None and report.stage not in self.stages:
            return f"stage is {report.stage!r}, and this child carries out {', '.join(self.stages)}"
        if report.shard >= self.pods:
            return f"shard is {report.shard}, and this child has {self.pods} pods, from 0"
        return ""


@dataclass
class Board:
    """The children that may report, by run uid and child's stage; the last report of every shard, by run uid and
    stage. Of a run it holds no more than its own children's stages and pods can fill."""

    complete: bool = False
    """Every run there is was looked at: whoever is not known here is not there."""
    allowances: dict[str, dict[str, Allowance]] = field(default_factory=dict)
    runs: dict[str, dict[str, Reports]] = field(default_factory=dict)

    def expect(self, uid: str, children: Mapping[str, tuple[tuple[str, ...], int]]) -> None:
        """The children of a run that may report from now on, by their stage: the stages that each carries out, and its
        pods. No others may."""
        known = self.allowances.pop(uid, {})
        expected = {stage: _same(known.get(stage), *child) for stage, child in children.items()}
        if expected:
            self.allowances[uid] = expected

    def allowance(self, uid: str, stage: str) -> Allowance | None:
        return self.allowances.get(uid, {}).get(stage)

    def put(self, uid: str, stage: str, report: Progress) -> bool:
        """Take a report; whether it is the stage's first, or the first to say that all rows are done. A stage turns so
        once for each shard, or somebody makes it turn."""
        before = self._is_done(uid, stage)
        reports = self.runs.setdefault(uid, {}).setdefault(stage, Reports(time.monotonic()))
        reports.last[report.shard] = Told.by(report)
        turned = before != self._is_done(uid, stage)
        reports.turns += turned
        return turned and reports.turns <= 2 * len(reports.last)

    def of(self, uid: str, stage: str) -> StageProgress | None:
        reports = self.runs.get(uid, {}).get(stage)
        return _sum(tuple(reports.last.values())) if reports else None

    def _is_done(self, uid: str, stage: str) -> bool | None:
        """None: nothing is known of it."""
        progress = self.of(uid, stage)
        return progress.all_done if progress else None

    def patience(self, uid: str, stage: str) -> float:
        """Seconds that a report may wait to be shown: a hundredth of the stage's age, from 2 to 30. Where many runs
        report, a tenth of a second for each, so that no more than ten statuses a second are written for it."""
        age = time.monotonic() - self.runs[uid][stage].since
        return max(LEAST_PATIENCE, min(age / 100, MOST_PATIENCE), 0.1 * len(self.runs))

    def forget(self, uid: str) -> None:
        """The run has ended or is deleted: its tokens open nothing any more."""
        self.runs.pop(uid, None)
        self.allowances.pop(uid, None)


def _same(known: Allowance | None, stages: tuple[str, ...], pods: int) -> Allowance:
    """That which is known already, with what it has paid."""
    return known if known and (known.stages, known.pods) == (stages, pods) else Allowance(stages, pods)


def _all_done(rows: Rows | None) -> bool:
    return bool(rows and rows.total and rows.done + rows.rejected >= rows.total)


def _sum(reports: tuple[Told, ...]) -> StageProgress:
    rows = [report.rows for report in reports if report.rows]
    total = Rows(
        total=min(MOST, sum(shard.total for shard in rows)),
        done=min(MOST, sum(shard.done for shard in rows)),
        rejected=min(MOST, sum(shard.rejected for shard in rows)),
    )
    percents = [report.percent for report in reports]
    rates = [report.tokens_per_second for report in reports if report.tokens_per_second is not None]
    etas = [report.eta_seconds for report in reports if not _all_done(report.rows)]
    known = [eta for eta in etas if eta is not None]
    return StageProgress(
        rows=total if rows else None,
        percent=_percent(total, [percent for percent in percents if percent is not None]),
        tokens_per_second=round(sum(rates)) if rates else None,
        eta_seconds=max(known, default=0) if len(known) == len(etas) else None,
        shards=len(reports),
    )


def _percent(rows: Rows, reported: list[int]) -> int | None:
    """From the rows where there are some: what is shown beside them must not say otherwise."""
    if rows.total:
        return percent_of(rows.done + rows.rejected, rows.total)
    return min(100, max(0, sum(reported) // len(reported))) if reported else None


def percent_of(done: int, total: int) -> int:
    return min(100, 100 * done // total)
