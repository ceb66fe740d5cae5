"""Progress reports of running stage programs: an HTTP server, a token for every child, the last report of each shard.

The body is the one that Kubeflow Trainer's status server takes, so that transformers reports by itself. Nothing here is
needed for the outcome of a run: a lost report costs a number on a screen.
"""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import aiohttp
from aiohttp import web
from pydantic import ValidationError

from cgd_operator.names import is_label, is_name, is_uid
from cgd_operator.serving import BODY_LIMIT, Listener
from cgd_stages.contract import MOST, Progress, ProgressAnswer, Rows

log = logging.getLogger(__name__)

PASS_ON_SECONDS = 4.0
"""Less than a stage program waits for an answer."""
PASSED_ON = "Cgd-Passed-On"
"""A header of reports that came by another operator: they are not passed on again."""
LEAST_PATIENCE, MOST_PATIENCE = 2.0, 30.0
REPORTS_AT_ONCE = 4.0
"""Of each pod and stage; afterwards one a second. A stage program sends one every two seconds, and one more when the
stage begins or is through."""
RATE = 200.0
"""Connections in a second: 5,000 runs report 167 times a second."""
TOKEN = re.compile("[0-9a-f]{64}")
OVER = "no child of this run and stage is under way: it has ended, or the run is deleted"


@dataclass(frozen=True)
class StageProgress:
    """The reports of a stage's shards, added up."""

    rows: Rows | None
    percent: int | None
    tokens_per_second: int | None
    eta_seconds: int | None

    @property
    def all_done(self) -> bool:
        rows = self.rows
        return bool(rows and rows.total and rows.done + rows.rejected >= rows.total)


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


def _sum(reports: tuple[Told, ...]) -> StageProgress:
    rows = [report.rows for report in reports if report.rows]
    total = Rows(
        total=min(MOST, sum(one.total for one in rows)),
        done=min(MOST, sum(one.done for one in rows)),
        rejected=min(MOST, sum(one.rejected for one in rows)),
    )
    percents = [report.percent for report in reports]
    rates = [report.tokens_per_second for report in reports if report.tokens_per_second is not None]
    etas = [report.eta_seconds for report in reports]
    return StageProgress(
        rows=total if rows else None,
        percent=_percent(total, [one for one in percents if one is not None]),
        tokens_per_second=round(sum(rates)) if rates else None,
        eta_seconds=max((one for one in etas if one is not None), default=None),
    )


def _percent(rows: Rows, reported: list[int]) -> int | None:
    """From the rows where there are some: what is shown beside them must not say otherwise."""
    if rows.total:
        return percent_of(rows.done + rows.rejected, rows.total)
    return min(100, max(0, sum(reported) // len(reported))) if reported else None


def percent_of(done: int, total: int) -> int:
    return min(100, 100 * done // total)


def key_id(key: bytes) -> str:
    """A name for a key. It is part of the name of what was signed with the key."""
    return _signed(key, "the name of this key")[:8]


def token(key: bytes, namespace: str, run: str, uid: str, stage: str) -> str:
    """The bearer token of one child of one run: an HMAC, so that nothing has to be stored to check it. No part holds a
    line break, as `Sender` sees to, so that no two children sign the same text."""
    return _signed(key, "\n".join((namespace, run, uid, stage)))


def _signed(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Sender:
    """Who a report says that it is from: a child of a run, by its stage, and the token that it has."""

    namespace: str
    run: str
    uid: str
    stage: str
    bearer: str
    """Empty when it is none that was ever given."""

    @classmethod
    def of(cls, request: web.Request) -> Self:
        """Raises ValueError: a part of the path cannot be what it stands for."""
        parts = request.match_info
        for name, possible in (("namespace", is_label), ("run", is_name), ("uid", is_uid), ("stage", is_label)):
            if not possible(parts[name]):
                raise ValueError(f"{parts[name]!r} in the path cannot be the {name} of a run")
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return cls(**parts, bearer=bearer if TOKEN.fullmatch(bearer) else "")

    @property
    def path(self) -> str:
        return f"/progress/{self.namespace}/{self.run}/{self.uid}/{self.stage}"

    def has_token(self, key: bytes) -> bool:
        right = token(key, self.namespace, self.run, self.uid, self.stage)
        return hmac.compare_digest(self.bearer, right)


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)


@dataclass(frozen=True)
class Desk:
    """Of the operator that leads: notes reports. After each it calls `later(namespace, run, seconds)`: within so many
    seconds the run's status should show it."""

    board: Board
    key: bytes
    later: Callable[[str, str, float], None]

    async def take(self, sender: Sender, request: web.Request) -> web.Response:
        """Nothing of a body is looked at before it is known whose it is, and that it is in time."""
        if not sender.has_token(self.key):
            return _refusal(403, "the token is not for this run and stage")
        allowance = self.board.allowance(sender.uid, sender.stage)
        if allowance is None and not self.board.complete:
            return _refusal(503, "the operator has just started and has not seen this run yet: report again")
        if allowance is None:
            return _refusal(404, OVER)
        if not allowance.may_report(time.monotonic()):
            return _refusal(429, "too many reports: one a second for each pod and stage will do")
        try:
            report = Progress.model_validate_json(await request.read())
        except ValidationError as error:
            return _refusal(422, str(error)[:1000])
        if wrong := allowance.refusal(report):
            return _refusal(422, wrong)
        if self.board.allowance(sender.uid, sender.stage) is not allowance:  # it ended while the body came
            return _refusal(404, OVER)
        return self._note(sender, allowance, report)

    def _note(self, sender: Sender, allowance: Allowance, report: Progress) -> web.Response:
        stage = report.stage or allowance.stages[0]
        turned = self.board.put(sender.uid, stage, report)
        # stages that share a pod begin and end by what they report: such a change is not to wait for its turn
        shared = len(allowance.stages) > 1
        patience = LEAST_PATIENCE if turned and shared else self.board.patience(sender.uid, stage)
        self.later(sender.namespace, sender.run, patience)
        answer = ProgressAnswer(next_report_seconds=min(patience, MOST_PATIENCE))
        return web.Response(text=answer.to_json(), content_type="application/json")


class ProgressServer:
    """Takes `POST /progress/<namespace>/<run>/<uid>/<child's stage>`. One that does not lead passes it on to the one
    that does: a Service reaches any of them, and few clients would follow a redirect with their token.

    Args:
        leader: host:port of the progress server of the operator that leads; "" while none is known.
    """

    def __init__(self, leader: Callable[[], str] = lambda: "") -> None:
        self._leader = leader
        self._desk: Desk | None = None
        app = web.Application(client_max_size=BODY_LIMIT)
        app.router.add_post("/progress/{namespace}/{run}/{uid}/{stage}", self._take)
        app.router.add_get("/leader", self._lead)
        self._listener = Listener(app, rate=RATE)
        self._session: aiohttp.ClientSession | None = None

    @property
    def host(self) -> str:
        return self._listener.host

    @property
    def port(self) -> int:
        return self._listener.port

    async def start(self, host: str, port: int) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PASS_ON_SECONDS))
        await self._listener.start(host, port)
        log.info("progress server listens on %s:%d", host, self.port)

    async def stop(self) -> None:
        await self._listener.stop()
        if self._session:
            await self._session.close()

    def lead(self, desk: Desk) -> None:
        self._desk = desk

    async def leader_answers(self) -> bool:
        """Whether an operator leads, and can be reached from here."""
        return self._desk is not None or (await self._ask("GET", "/leader")).status == 200

    async def _lead(self, _: web.Request) -> web.Response:
        return web.json_response({}, status=200 if self._desk else 503)

    async def _take(self, request: web.Request) -> web.Response:
        try:
            sender = Sender.of(request)
        except ValueError as error:
            return _refusal(400, str(error))
        if self._desk:
            return await self._desk.take(sender, request)
        if PASSED_ON in request.headers:
            return _refusal(503, "this operator leads no more")
        return await self._ask("POST", sender.path, await request.read(), sender.bearer)

    async def _ask(self, method: str, path: str, body: bytes = b"", bearer: str = "") -> web.Response:
        """What the operator that leads answers."""
        if not (leader := self._leader()):
            return _refusal(503, "no operator leads")
        assert self._session is not None
        headers = {PASSED_ON: "yes", "Authorization": f"Bearer {bearer}", "Content-Type": "application/json"}
        try:
            async with self._session.request(method, f"http://{leader}{path}", data=body, headers=headers) as answer:
                return web.Response(body=await answer.read(), status=answer.status, content_type="application/json")
        except (aiohttp.ClientError, TimeoutError) as error:
            why = f"the operator that leads ({leader}) does not answer: {error or type(error).__name__}"
            return _refusal(503, why)
