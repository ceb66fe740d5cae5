"""Progress reports of running stage programs: an HTTP server, a token for every child, the last report of each shard.

The body is the one that Kubeflow Trainer's status server takes, so that transformers reports by itself. Nothing here is
needed for the outcome of a run: a lost report costs a number on a screen.
"""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import aiohttp
from aiohttp import web
from pydantic import ValidationError

from cgd_operator.facts.progress import LEAST_PATIENCE, MOST_PATIENCE, Board
from cgd_operator.http.serving import BODY_LIMIT, Listener
from cgd_operator.kube.kinds import is_label, is_name, is_uid
from cgd_stages.contract import Progress, ProgressAnswer

log = logging.getLogger(__name__)

PASS_ON_SECONDS = 4.0
"""Less than a stage program waits for an answer."""
PASSED_ON = "Cgd-Passed-On"
"""A header of reports that came by another operator: they are not passed on again."""
RATE = 200.0
"""Connections in a second: 5,000 runs report 167 times a second."""
TOKEN = re.compile("[0-9a-f]{64}")
OVER = "no child of this run and stage is under way: it has ended, or the run is deleted"


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
    """The child of a run that a report claims to be from, by its stage, and the report's token."""

    namespace: str
    run: str
    uid: str
    stage: str
    bearer: str
    """The token; empty if it cannot be a token of ours."""

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


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)


@dataclass(frozen=True)
class Desk:
    """Stores reports, on the operator that leads. After each report it calls `later(namespace, run, seconds)`: within
    so many seconds the run's status should show it."""

    board: Board
    key: bytes
    later: Callable[[str, str, float], None]

    async def take(self, sender: Sender, request: web.Request) -> web.Response:
        """Answer a report. Its body is read only when its sender is known and is within its rate."""
        right = token(self.key, sender.namespace, sender.run, sender.uid, sender.stage)
        if not hmac.compare_digest(sender.bearer, right):
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
        stage = report.stage or allowance.stages[0]
        turned = self.board.put(sender.uid, stage, report)
        shared = len(allowance.stages) > 1  # such stages begin and end by their reports: show that at once
        patience = LEAST_PATIENCE if turned and shared else self.board.patience(sender.uid, stage)
        self.later(sender.namespace, sender.run, patience)
        answer = ProgressAnswer(next_report_seconds=min(patience, MOST_PATIENCE))
        return web.Response(text=answer.to_json(), content_type="application/json")


class ProgressServer:
    """Takes `POST /progress/<namespace>/<run>/<uid>/<child's stage>`. An operator that does not lead passes reports on
    to the leader: a Service reaches any operator, and few clients would follow a redirect with their token.

    Args:
        leader: host:port of the leader's progress server; "" while no leader is known.
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
        """The leader's answer."""
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
