"""Progress reports of running stage programs: an HTTP server, a token for every child, the last report of each shard.

The body is the one that Kubeflow Trainer's status server takes, so that transformers reports by itself. Nothing here is
needed for the outcome of a run: a lost report costs a number on a screen.
"""

import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from pydantic import ValidationError

from cgd_stages.contract import Progress, ProgressAnswer, Rows

log = logging.getLogger(__name__)

BODY_LIMIT = 64 * 1024
PASS_ON_SECONDS = 4.0
"""Less than a stage program waits for an answer."""
PASSED_ON = "Cgd-Passed-On"
"""A header of reports that came by another operator: they are not passed on again."""
LEAST_PATIENCE, MOST_PATIENCE = 2.0, 30.0


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


@dataclass
class Reports:
    """Of one stage."""

    since: float
    """When the first came, on the monotonic clock."""
    last: dict[int, Progress] = field(default_factory=dict)
    """By shard."""


@dataclass
class Board:
    """The last report of every shard, by run uid and stage."""

    runs: dict[str, dict[str, Reports]] = field(default_factory=dict)

    def put(self, uid: str, stage: str, report: Progress) -> bool:
        """Take a report; whether it is the stage's first, or the first to say that all rows are done."""
        before = self._is_done(uid, stage)
        stages = self.runs.setdefault(uid, {})
        stages.setdefault(stage, Reports(time.monotonic())).last[report.shard] = report
        return before != self._is_done(uid, stage)

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
        self.runs.pop(uid, None)


def _sum(reports: tuple[Progress, ...]) -> StageProgress:
    rows = [report.rows for report in reports if report.rows]
    total = Rows(
        total=sum(one.total for one in rows),
        done=sum(one.done for one in rows),
        rejected=sum(one.rejected for one in rows),
    )
    percents = [report.trainer_status.progress_percentage for report in reports]
    rates = [report.tokens_per_second for report in reports if report.tokens_per_second is not None]
    etas = [report.trainer_status.estimated_remaining_seconds for report in reports]
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


def token(key: bytes, uid: str, stage: str) -> str:
    """The bearer token of one child of one run: an HMAC, so that nothing has to be stored to check it."""
    return hmac.new(key, f"{uid}/{stage}".encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Desk:
    """Of the operator that leads: notes reports. After each it calls `later(namespace, run, seconds)`: within so many
    seconds the run's status should show it."""

    board: Board
    key: bytes
    later: Callable[[str, str, float], None]

    async def take(self, request: web.Request) -> web.Response:
        uid, stage = request.match_info["uid"], request.match_info["stage"]
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), token(self.key, uid, stage).encode()):
            return web.json_response({"message": "the token is not for this run and stage"}, status=403)
        try:
            report = Progress.model_validate_json(await request.read())
        except ValidationError as error:
            return web.json_response({"message": str(error)}, status=422)
        child, stage = stage, report.stage or stage
        turned = self.board.put(uid, stage, report)
        # stages that share a pod begin and end by what they report: such a change is not to wait for its turn
        patience = LEAST_PATIENCE if turned and stage != child else self.board.patience(uid, stage)
        self.later(request.match_info["namespace"], request.match_info["run"], patience)
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
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        self._session: aiohttp.ClientSession | None = None
        self.host, self.port = "", 0

    async def start(self, host: str, port: int) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PASS_ON_SECONDS))
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        self.host, self.port = host, self._runner.addresses[0][1]
        log.info("progress server listens on %s:%d", host, self.port)

    async def stop(self) -> None:
        await self._runner.cleanup()
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
        if self._desk:
            return await self._desk.take(request)
        if PASSED_ON in request.headers:
            return web.json_response({"message": "this operator leads no more"}, status=503)
        return await self._ask("POST", request.path, await request.read(), request.headers.get("Authorization", ""))

    async def _ask(self, method: str, path: str, body: bytes = b"", bearer: str = "") -> web.Response:
        """What the operator that leads answers."""
        if not (leader := self._leader()):
            return web.json_response({"message": "no operator leads"}, status=503)
        assert self._session is not None
        headers = {PASSED_ON: "yes", "Authorization": bearer, "Content-Type": "application/json"}
        try:
            async with self._session.request(method, f"http://{leader}{path}", data=body, headers=headers) as answer:
                return web.Response(body=await answer.read(), status=answer.status, content_type="application/json")
        except (aiohttp.ClientError, TimeoutError) as error:
            why = f"the operator that leads ({leader}) does not answer: {error or type(error).__name__}"
            return web.json_response({"message": why}, status=503)
