"""Progress reports of a run's children: which children may report, and the last report of each shard. Pure."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from cgd_stages.contract import MOST, Progress, RoundOf, Rows

LEAST_PATIENCE, MOST_PATIENCE = 2.0, 30.0
REPORTS_AT_ONCE = 4.0
"""Reports that a pod may send for a stage in a burst; after that, a report per second. A stage program reports every
two seconds, and when a stage begins or ends."""


@dataclass(frozen=True)
class StageProgress:
    """The sum of the reports of a stage's shards."""

    rows: Rows | None
    percent: int | None
    tokens_per_second: int | None
    eta_seconds: int | None
    loss: float | None = None
    """Of a training's last step."""
    shards: int = 1
    """Shards that have reported."""
    round: RoundOf | None = None
    """Of a stage that goes on round by round: the one that its last shard is at."""

    def is_through(self, shards: int) -> bool:
        """Whether all of so many shards have finished their rows."""
        return _all_done(self.rows) and self.shards >= shards


class Told(NamedTuple):
    """The part of a report that is kept."""

    rows: Rows | None
    percent: int | None
    tokens_per_second: float | None
    eta_seconds: int | None
    round: RoundOf | None
    loss: float | None = None

    @classmethod
    def by(cls, report: Progress) -> Self:
        status = report.trainer_status
        left = status.estimated_remaining_seconds
        return cls(report.rows, status.progress_percentage, report.tokens_per_second, left, report.round, _loss(report))


def _loss(report: Progress) -> float | None:
    """None: it names none, or no finite one."""
    texts = (metric.value for metric in report.trainer_status.metrics if metric.name == "loss")
    try:
        loss = float(next(texts, "nan"))
    except ValueError:
        return None
    return loss if math.isfinite(loss) else None


@dataclass
class Reports:
    """The reports of a stage."""

    since: float
    """When the first report came, on the monotonic clock."""
    last: dict[int, Told] = field(default_factory=dict)
    """The last report by shard."""
    turns: int = 0
    """How often the stage changed between under way and finished."""


@dataclass
class Allowance:
    """Which stages a child may report, and how often."""

    stages: tuple[str, ...]
    """The stages that the child carries out."""
    pods: int
    _paid: float = 0.0

    def may_report(self, now: float) -> bool:
        """Whether a report at this moment of the monotonic clock is within the rate. If so, the report is counted."""
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
    """The children that may report, by run uid and the child's stage; the last report of every shard, by run uid and
    stage. The stages and pods of a run's children bound what is stored for the run."""

    complete: bool = False
    """Whether a sweep has seen every run, so that an unknown run does not exist."""
    allowances: dict[str, dict[str, Allowance]] = field(default_factory=dict)
    runs: dict[str, dict[str, Reports]] = field(default_factory=dict)

    def expect(self, uid: str, children: Mapping[str, tuple[tuple[str, ...], int]]) -> None:
        """Set the children of a run that may report from now on. `children`: the stage of each child -> the stages that
        it carries out, and its number of pods."""
        known, expected = self.allowances.pop(uid, {}), dict[str, Allowance]()
        for stage, (stages, pods) in children.items():
            before = known.get(stage)  # while the child is unchanged, its count of reports goes on
            same = before if before and (before.stages, before.pods) == (stages, pods) else None
            expected[stage] = same or Allowance(stages, pods)
        if expected:
            self.allowances[uid] = expected

    def allowance(self, uid: str, stage: str) -> Allowance | None:
        return self.allowances.get(uid, {}).get(stage)

    def put(self, uid: str, stage: str, report: Progress) -> bool:
        """Store a report. Returns whether it is the stage's first report, or the first with all rows done. That happens
        at most twice per shard; further changes come from false reports and return False."""
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
        """Whether the stage has finished its rows; None without a report."""
        progress = self.of(uid, stage)
        return _all_done(progress.rows) if progress else None

    def patience(self, uid: str, stage: str) -> float:
        """Seconds until a report must be shown: a hundredth of the stage's age, from 2 to 30. With many runs that
        report, a tenth of a second per run, so that reports cause at most ten status writes per second."""
        age = time.monotonic() - self.runs[uid][stage].since
        return max(LEAST_PATIENCE, min(age / 100, MOST_PATIENCE), 0.1 * len(self.runs))

    def forget(self, uid: str) -> None:
        """Forget a run that has ended or is deleted: its tokens are refused from now on."""
        self.runs.pop(uid, None)
        self.allowances.pop(uid, None)


def _all_done(rows: Rows | None) -> bool:
    return bool(rows and rows.total and rows.done + rows.rejected >= rows.total)


def _sum(reports: tuple[Told, ...]) -> StageProgress:
    rows = [report.rows for report in reports if report.rows]
    total = Rows(
        total=min(MOST, sum(shard.total for shard in rows)),
        done=min(MOST, sum(shard.done for shard in rows)),
        rejected=min(MOST, sum(shard.rejected for shard in rows)),
    )
    percents = [report.percent for report in reports if report.percent is not None]
    percent = min(100, max(0, sum(percents) // len(percents))) if percents else None
    if total.total:  # agrees with the rows, which are shown beside it
        percent = percent_of(total.done + total.rejected, total.total)
    rates = [report.tokens_per_second for report in reports if report.tokens_per_second is not None]
    etas = [report.eta_seconds for report in reports if not _all_done(report.rows)]
    known = [eta for eta in etas if eta is not None]
    return StageProgress(
        rows=total if rows else None,
        percent=percent,
        tokens_per_second=round(sum(rates)) if rates else None,
        eta_seconds=max(known, default=0) if len(known) == len(etas) else None,
        loss=next((report.loss for report in reports if report.loss is not None), None),
        shards=len(reports),
        round=_last_round([report.round for report in reports if report.round]),
    )


def _last_round(rounds: list[RoundOf]) -> RoundOf | None:
    """The round that some shard has not ended yet. Its stage waits where none of the shards in it is at work."""
    last = [one for one in rounds if one.number == min(each.number for each in rounds)]
    return next((one for one in last if one.waits_for is None), last[0] if last else None)


def percent_of(done: int, total: int) -> int:
    return min(100, 100 * done // total)
