"""The progress channel: real HTTP; a token opens one stage of one run."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from support.builders import UID

from cgd_operator.facts.progress import Board
from cgd_operator.http.progress import Desk, ProgressServer, token
from cgd_stages.contract import Progress, RoundOf, Rows, TrainerStatus

KEY = b"k" * 32
OTHER = UID[:-1] + "2"


def signed(uid: str = UID, stage: str = "answer") -> str:
    return token(KEY, "default", "demo", uid, stage)


def expecting() -> Board:
    board = Board()
    board.expect(UID, {"answer": (("answer",), 1), "teacher": (("critique", "refine"), 1)})
    return board


def report(
    shard: int = 0,
    percent: int | None = None,
    rows: Rows | None = None,
    rate: float | None = None,
    eta: int | None = None,
    at: RoundOf | None = None,
) -> Progress:
    status = TrainerStatus(progress_percentage=percent, estimated_remaining_seconds=eta)
    return Progress(trainer_status=status, shard=shard, rows=rows, tokens_per_second=rate, round=at)


@pytest.fixture
async def server() -> AsyncIterator[tuple[ProgressServer, Board, list[tuple[str, str]]]]:
    board, changed = expecting(), []
    server = ProgressServer()
    server.lead(Desk(board, KEY, lambda namespace, run, _: changed.append((namespace, run))))
    await server.start("127.0.0.1", 0)
    yield server, board, changed
    await server.stop()


async def post(server: ProgressServer, body: Any, bearer: str, stage: str = "answer") -> int:
    url = f"http://127.0.0.1:{server.port}/progress/default/demo/{UID}/{stage}"
    headers = {"Authorization": f"Bearer {bearer}"}
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as response:
        return response.status


async def test_a_report_as_transformers_sends_it_is_taken(server: Any) -> None:
    body = {"trainerStatus": {"progressPercentage": 40, "estimatedRemainingSeconds": 12, "lastUpdatedTime": "x"}}
    assert await post(server[0], body, signed()) == 200
    seen = server[1].of(UID, "answer")
    assert (seen.percent, seen.eta_seconds) == (40, 12)
    assert server[2] == [("default", "demo")]


@pytest.mark.parametrize("bearer", ["", "wrong", signed(stage="teacher"), signed(OTHER)])
async def test_a_token_opens_only_its_own_stage(server: Any, bearer: str) -> None:
    assert await post(server[0], {"trainerStatus": {}}, bearer) == 403
    assert server[1].of(UID, "answer") is None


@pytest.mark.parametrize(
    "body", [{}, {"trainerStatus": {}, "unknown": 1}, {"trainerStatus": {"progressPercentage": "x"}}]
)
async def test_a_body_that_is_not_a_report_is_refused(server: Any, body: Any) -> None:
    assert await post(server[0], body, signed()) == 422


async def test_a_fused_pod_reports_for_both_of_its_stages(server: Any) -> None:
    body = {"trainerStatus": {"progressPercentage": 5}, "stage": "refine"}
    assert await post(server[0], body, signed(stage="teacher"), "teacher") == 200
    assert server[1].of(UID, "refine").percent == 5


@pytest.fixture
async def waiting(server: Any) -> AsyncIterator[ProgressServer]:
    """That of an operator that waits while another one leads."""
    other = ProgressServer(leader=lambda: f"127.0.0.1:{server[0].port}")
    await other.start("127.0.0.1", 0)
    yield other
    await other.stop()


async def test_one_that_waits_passes_reports_on_with_their_token(waiting: ProgressServer, server: Any) -> None:
    body = {"trainerStatus": {"progressPercentage": 40}}
    assert await post(waiting, body, signed()) == 200
    assert server[1].of(UID, "answer").percent == 40
    assert await post(waiting, body, "wrong") == 403
    assert await post(waiting, {}, signed()) == 422


async def test_a_report_is_not_passed_on_for_ever() -> None:
    """As when the Lease still names one that leads no more."""
    lost = ProgressServer(leader=lambda: f"127.0.0.1:{lost.port}")
    await lost.start("127.0.0.1", 0)
    assert await post(lost, {"trainerStatus": {}}, signed()) == 503
    await lost.stop()


@pytest.mark.parametrize("leader", ["", "127.0.0.1:9"])
async def test_without_one_that_leads_a_report_is_refused_for_now(leader: str) -> None:
    alone = ProgressServer(leader=lambda: leader)
    await alone.start("127.0.0.1", 0)
    assert await post(alone, {"trainerStatus": {}}, signed()) == 503
    assert not await alone.leader_answers()
    await alone.stop()


@pytest.mark.parametrize(
    ("text", "loss"), [("1.25", 1.25), ("nan", None), ("inf", None), ("lower", None), ("1e999", None)]
)
async def test_the_loss_of_a_training_is_kept_where_it_is_a_number(server: Any, text: str, loss: float | None) -> None:
    metrics = [{"name": "step", "value": "3"}, {"name": "loss", "value": text}]
    assert await post(server[0], {"trainerStatus": {"metrics": metrics}}, signed()) == 200
    assert server[1].of(UID, "answer").loss == loss


def test_shards_are_added_up() -> None:
    board = Board()
    board.put("u", "answer", report(0, rows=Rows(total=10, done=5), rate=100.4))
    board.put("u", "answer", report(1, rows=Rows(total=10, done=1, rejected=1), rate=50.0))
    seen = board.of("u", "answer")
    assert seen is not None
    assert seen.rows == Rows(total=20, done=6, rejected=1)
    assert (seen.percent, seen.tokens_per_second) == (35, 150)


def test_the_remaining_time_is_that_of_the_slowest_shard_and_known_when_every_shard_knows_its_own() -> None:
    board, rows = Board(), Rows(total=10, done=5)

    def eta() -> int | None:
        seen = board.of("u", "answer")
        return seen.eta_seconds if seen else None

    board.put("u", "answer", report(0, rows=rows, eta=5))
    board.put("u", "answer", report(1, rows=rows))
    assert eta() is None
    board.put("u", "answer", report(1, rows=rows, eta=40))
    assert eta() == 40
    board.put("u", "answer", report(1, rows=Rows(total=10, done=9, rejected=1)))
    assert eta() == 5, "a shard that is through has nothing left"


def test_a_stage_is_in_the_round_that_its_last_shard_is_in_and_waits_where_none_of_those_is_at_work() -> None:
    board = Board()

    def told(*shards: tuple[int, str | None]) -> RoundOf | None:
        for shard, (number, waits_for) in enumerate(shards):
            board.put("u", "rollout-gkd", report(shard, at=RoundOf(number=number, of=9, waits_for=waits_for)))
        seen = board.of("u", "rollout-gkd")
        return seen.round if seen else None

    waits = "train-gkd"
    assert told((3, waits), (2, None)) == RoundOf(number=2, of=9)
    assert told((3, waits), (3, None)) == RoundOf(number=3, of=9)
    assert told((3, waits), (3, waits)) == RoundOf(number=3, of=9, waits_for=waits)
    board.put("u", "answer", report(percent=1))
    seen = board.of("u", "answer")
    assert seen is not None
    assert seen.round is None


def test_a_later_report_of_a_shard_replaces_the_earlier_one() -> None:
    board = Board()
    board.put("u", "answer", report(percent=10))
    board.put("u", "answer", report(percent=20))
    seen = board.of("u", "answer")
    assert seen is not None
    assert seen.percent == 20


def test_the_board_forgets_a_run_that_has_ended() -> None:
    board = Board()
    board.put("u", "answer", report(percent=10))
    board.put("v", "answer", report(percent=10))
    board.forget("u")
    assert board.of("u", "answer") is None
    assert board.of("v", "answer") is not None


async def test_where_many_runs_report_each_is_asked_to_report_more_rarely(server: Any) -> None:
    board, bearer = server[1], {"Authorization": f"Bearer {signed()}"}
    url = f"http://127.0.0.1:{server[0].port}/progress/default/demo/{UID}/answer"
    pauses: list[float] = []
    async with aiohttp.ClientSession(headers=bearer) as session:
        for runs in (1, 200, 5000):
            for number in range(runs - 1):
                board.put(f"u{number}", "answer", report())
            async with session.post(url, json={"trainerStatus": {}}) as answer:
                pauses.append((await answer.json())["nextReportSeconds"])
    assert pauses == [2, 20, 30]


async def test_a_stage_that_shares_its_pod_is_shown_at_once_when_it_begins_or_is_through() -> None:
    board, shown = expecting(), list[float]()
    for number in range(1000):
        board.put(f"u{number}", "answer", report())
    server = ProgressServer()
    server.lead(Desk(board, KEY, lambda _, __, seconds: shown.append(seconds)))
    await server.start("127.0.0.1", 0)
    bearer = signed(stage="teacher")
    for done in (1, 2, 10, 10):
        body = {"trainerStatus": {}, "stage": "critique", "rows": {"total": 10, "done": done}}
        await post(server, body, bearer, "teacher")
    await server.stop()
    assert [round(seconds) for seconds in shown] == [2, 100, 2, 100]
