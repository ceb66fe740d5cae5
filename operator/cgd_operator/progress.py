"""Progress reports of running stage programs: an HTTP server, a token for every child, the last report of each shard.

The body is the one that Kubeflow Trainer's status server takes, so that transformers reports by itself. Nothing here is
needed for the outcome of a run: a lost report costs a number on a screen.
"""

import hashlib
import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web
from pydantic import ValidationError

from cgd_stages.contract import Progress, Rows

log = logging.getLogger(__name__)

BODY_LIMIT = 64 * 1024


@dataclass(frozen=True)
class StageProgress:
    """The reports of a stage's shards, added up."""

    rows: Rows | None
    percent: int | None
    tokens_per_second: int | None
    eta_seconds: int | None


@dataclass
class Board:
    """The last report of every shard, by run uid and stage."""

    reports: dict[tuple[str, str], dict[int, Progress]] = field(default_factory=dict)

    def put(self, uid: str, stage: str, report: Progress) -> None:
        self.reports.setdefault((uid, stage), {})[report.shard] = report

    def of(self, uid: str, stage: str) -> StageProgress | None:
        shards = self.reports.get((uid, stage))
        return _sum(tuple(shards.values())) if shards else None

    def forget(self, uid: str) -> None:
        for key in [key for key in self.reports if key[0] == uid]:
            del self.reports[key]


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
    if reported:
        return min(100, max(0, sum(reported) // len(reported)))
    return 100 * (rows.done + rows.rejected) // rows.total if rows.total else None


def token(key: bytes, uid: str, stage: str) -> str:
    """The bearer token of one child of one run: an HMAC, so that nothing has to be stored to check it."""
    return hmac.new(key, f"{uid}/{stage}".encode(), hashlib.sha256).hexdigest()


class ProgressServer:
    """Takes `POST /progress/<namespace>/<run>/<uid>/<child's stage>`; calls `changed(namespace, run)` after each."""

    def __init__(self, board: Board, key: bytes, changed: Callable[[str, str], None]) -> None:
        self._board, self._key, self._changed = board, key, changed
        app = web.Application(client_max_size=BODY_LIMIT)
        app.router.add_post("/progress/{namespace}/{run}/{uid}/{stage}", self._take)
        self._runner = web.AppRunner(app, access_log=None)
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        log.info("progress server listens on %s:%d", host, self.port)

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        uid, stage = request.match_info["uid"], request.match_info["stage"]
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), token(self._key, uid, stage).encode()):
            return web.json_response({"message": "the token is not for this run and stage"}, status=403)
        try:
            report = Progress.model_validate_json(await request.read())
        except ValidationError as error:
            return web.json_response({"message": str(error)}, status=422)
        self._board.put(uid, report.stage or stage, report)
        self._changed(request.match_info["namespace"], request.match_info["run"])
        return web.json_response({})
