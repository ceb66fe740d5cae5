"""What a pod with a progress token, or nobody at all, can do to the operator through its progress server."""

import asyncio
import gzip
import json
import logging
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import kopf
import pytest
from cluster.conftest import world  # noqa: F401  a fixture
from support.builders import RELEASE, UID, ended, labels, manifest, pod
from support.patience import PATIENCE

from cgd_operator import handlers, process
from cgd_operator.controller.queue import Loop
from cgd_operator.controller.reconciler import Reconciler
from cgd_operator.facts.due import Due
from cgd_operator.facts.progress import Board
from cgd_operator.http import serving
from cgd_operator.http.progress import Desk, ProgressServer, token
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.clock import Clock
from cgd_operator.kube.kinds import JOB, NAMESPACE, POD, RUN, SECRET, ApiError
from cgd_operator.planning.manifests import UID_LABEL
from cgd_operator.process import operate
from cgd_stages.contract import PROGRESS_TOKEN, Progress, Rows, TrainerStatus
from cgd_stages.runtime.progress import Reporter
from cgd_stages.text.printable import LogFormatter

Json = dict[str, Any]

KEY = b"key of the test, of 32 bytes and more"
OTHER = UID[:-1] + "2"
CHILDREN = {"answer": (("answer",), 2), "teacher": (("critique", "refine"), 1)}
SMALL: Json = {"trainerStatus": {}, "rows": {"total": 10, "done": 1}}


class Stand:
    """A progress server that leads; `told` is what its loop was told."""

    def __init__(self) -> None:
        self.board, self.told = Board(complete=True), list[tuple[str, str, float]]()
        self.board.expect(UID, CHILDREN)
        self.server = ProgressServer()
        self.server.lead(Desk(self.board, KEY, lambda *run: self.told.append(run)))

    async def post(
        self, body: Any = SMALL, path: str = f"default/demo/{UID}/answer", bearer: str = "", server: Any = None
    ) -> tuple[int, str]:
        """The answer's code and message. The bearer is the right one of the run `demo` and the path's stage."""
        bearer = bearer or token(KEY, "default", "demo", UID, path.rsplit("/", 1)[-1])
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST /progress/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bearer}\r\n"
        told = await send(server or self.server, f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        status, _, rest = told.partition(b"\r\n")
        return int(status.split()[1]), rest.partition(b"\r\n\r\n")[2].decode()


async def send(server: Any, data: bytes, *, half: bool = False) -> bytes:
    """Everything that is answered until the server closes; `half`: the caller closes its side when it has sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(data)
        if half:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), PATIENCE)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    stand = Stand()
    await stand.server.start("127.0.0.1", 0)
    yield stand
    await stand.server.stop()


@asynccontextmanager
async def waiting_for(stand: Stand) -> AsyncIterator[ProgressServer]:
    """That of an operator that waits while the stand's leads."""
    other = ProgressServer(leader=lambda: f"127.0.0.1:{stand.server.port}")
    await other.start("127.0.0.1", 0)
    try:
        yield other
    finally:
        await other.stop()


# --- whose a token is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [f"other/demo/{UID}/answer", f"default/other/{UID}/answer", f"default/demo/{OTHER}/answer"],
    ids=["namespace", "run", "uid"],
)
async def test_a_token_opens_no_other_namespace_run_or_uid(stand: Stand, path: str) -> None:
    assert (await stand.post(path=path))[0] == 403
    assert stand.told == []


STRANGE = [
    "..%2F..%2Fkube-system%2Fsecrets%2Fkey",
    "demo%2F..%2F..%2Fsecrets",
    "demo%3FlabelSelector%3Da",
    "demo%23",
    "demo%0AWARNING%20forged",
    "demo%00",
    "..",
    "Demo",
    "d%C3%A9mo",
    "%FF",
    "%252e%252e",
    "a" * 254,
    "-demo",
]


@pytest.mark.parametrize("waits", [False, True], ids=["leads", "waits"])
@pytest.mark.parametrize("part", range(4), ids=["namespace", "run", "uid", "stage"])
async def test_what_cannot_be_a_name_is_refused_before_the_token_is_looked_at(
    stand: Stand, part: int, waits: bool
) -> None:
    async with waiting_for(stand) as other:
        for strange in STRANGE:
            parts = ["default", "demo", UID, "answer"]
            parts[part] = strange
            code, message = await stand.post(path="/".join(parts), server=other if waits else None)
            assert code in (400, 404), (strange, message)  # 404: not even a path of ours
            assert "\n" not in json.loads(message)["message"]
    assert stand.told == []
    assert list(stand.board.runs) == []


def test_no_two_children_sign_the_same_text() -> None:
    parts = [("a", "b", UID, "c"), ("a.b", "", UID, "c"), ("a", "b", UID, "c-d"), ("b", "a", UID, "c")]
    assert len({token(KEY, *one) for one in parts}) == len(parts)


# --- which runs may report ----------------------------------------------------------------------------------------


async def test_reports_of_a_run_that_is_not_known_are_refused_for_now_and_then_for_good(stand: Stand) -> None:
    stand.board.forget(UID)
    stand.board.complete = False
    assert (await stand.post())[0] == 503
    stand.board.complete = True
    assert (await stand.post())[0] == 404
    assert stand.told == []


async def test_a_report_whose_run_ends_while_it_comes_is_not_kept(stand: Stand) -> None:
    body = json.dumps(SMALL).encode()
    head = f"POST /progress/default/demo/{UID}/answer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    bearer = token(KEY, "default", "demo", UID, "answer")
    reader, writer = await asyncio.open_connection("127.0.0.1", stand.server.port)
    writer.write(f"{head}Authorization: Bearer {bearer}\r\n\r\n".encode() + body[:-1])
    allowance = stand.board.allowances[UID]["answer"]
    while not allowance._paid:  # noqa: ASYNC110  the server has looked at the token
        await asyncio.sleep(0.01)
    stand.board.forget(UID)
    writer.write(body[-1:])
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert (stand.board.runs, stand.told) == ({}, [])


@pytest.fixture
def loop(world: Any) -> Loop:  # noqa: F811
    return Loop(Reconciler(world.client, RELEASE, Board(), KEY))


async def test_the_children_of_a_run_may_report_from_their_first_look_until_the_run_is_deleted(
    world: Any,  # noqa: F811
    loop: Loop,
) -> None:
    run = (await world.apply())["metadata"]
    board = loop.reconciler.board
    await loop.reconciler.reconcile("default", "demo")
    assert board.allowances[run["uid"]].keys() == {"prepare"}
    await world.end("prepare")
    await loop.reconciler.reconcile("default", "demo")
    assert board.allowances[run["uid"]].keys() == {"answer"}
    board.put(run["uid"], "answer", Progress(trainer_status=TrainerStatus()))
    loop.gone(("default", "demo"), run["uid"])
    assert (board.allowances, board.runs) == ({}, {})


async def test_an_operator_that_starts_knows_who_may_report_after_its_first_sweep(
    world: Any,  # noqa: F811
    loop: Loop,
) -> None:
    uid = (await world.apply())["metadata"]["uid"]
    await Reconciler(world.client, RELEASE, Board(), KEY).reconcile("default", "demo")
    await loop._sweep()
    assert loop.reconciler.board.complete
    assert loop.reconciler.board.allowances[uid].keys() == {"prepare"}
    await world.client.delete(RUN, "demo", "default")
    await loop._sweep()
    assert loop.reconciler.board.allowances == {}
    assert loop._runs == {}


async def test_a_run_that_has_ended_may_report_no_more(world: Any, loop: Loop) -> None:  # noqa: F811
    await world.apply()
    await loop.reconciler.reconcile("default", "demo")
    await world.end("prepare", "Failed")
    await loop.reconciler.reconcile("default", "demo")
    await loop._sweep()
    assert loop.reconciler.board.allowances == {}
    await loop.stop()


async def test_an_object_with_our_labels_in_another_namespace_is_no_child(
    world: Any,  # noqa: F811
    loop: Loop,
) -> None:
    uid = (await world.apply())["metadata"]["uid"]
    await world.client.create(NAMESPACE, {"metadata": {"name": "other"}})
    strange = {"name": "strange", "namespace": "other", "labels": labels("answer") | {UID_LABEL: uid}}
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "stage", "image": "x"}]}}
    await world.client.create(JOB, {"metadata": strange, "spec": {"template": template}})
    there = (await loop.reconciler.reader.read(None, {uid: "default"}))[uid]
    loop.reconciler.due(await world.get(), there)
    assert loop.reconciler.board.allowances == {}


@pytest.mark.parametrize("known", [True, False])
async def test_only_a_run_that_is_known_is_tried_again(
    world: Any,  # noqa: F811
    loop: Loop,
    known: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refused(*_: Any) -> None:
        raise ApiError(403, "Forbidden", "as the test wants it")

    monkeypatch.setattr(loop.reconciler, "reconcile", refused)
    if known:
        loop.there(("default", "demo"), UID)
    assert (await loop._look("default", "demo", None) is not None) == known


@pytest.mark.parametrize(
    "labels", [{"cgd.dev/run": "demo"}, {"cgd.dev/run": "demo", "cgd.dev/run-uid": OTHER}, {"cgd.dev/run": ""}]
)
async def test_an_object_that_bears_our_labels_without_a_run_makes_no_look(
    world: Any,  # noqa: F811
    loop: Loop,
    labels: Json,
) -> None:
    loop.there(("default", "demo"), UID)
    strange = pod("answer")
    strange["metadata"] |= {
        "namespace": "default",
        "labels": {"app.kubernetes.io/managed-by": "cgd-operator", **labels},
    }
    for kind, event in ((POD, "DELETED"), (POD, "ADDED"), (JOB, "DELETED")):
        loop._happened(kind, event, strange)
    assert [*loop._timers, *loop._first, *loop._waiting, *loop._tasks] == []
    assert loop.reconciler.departed.runs == {}


async def test_the_event_of_a_deletion_ends_what_is_kept_of_a_run() -> None:
    class Heard:
        def __init__(self) -> None:
            self.told: list[str] = []
            self.clock = Clock()

        def changed(self, *_: Any) -> None:
            self.told.append("changed")

        def gone(self, *_: Any) -> None:
            self.told.append("gone")

        def there(self, *_: Any) -> None:
            self.told.append("there")

        def poke(self, *_: Any) -> None:
            self.told.append("poke")

    heard, body = Heard(), manifest()
    for kind in ("ADDED", "DELETED"):
        await handlers.run_changed(body=kopf.Body(body), memo=kopf.Memo(loop=heard), type=kind)
    assert heard.told == ["there", "changed", "poke", "gone"]


async def test_a_pod_whose_token_is_worth_nothing_any_more_sends_ever_more_rarely(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After a restart with a new key such are all pods that run, and each refusal slows the door down."""
    folder = tmp_path / "token"
    monkeypatch.setenv(PROGRESS_TOKEN, str(folder))
    reporter = Reporter()
    reporter._url = f"http://127.0.0.1:{stand.server.port}/progress/default/demo/{UID}/answer"

    async def pauses(bearer: str, count: int) -> list[float]:
        folder.write_text(bearer)
        report = Progress(trainer_status=TrainerStatus())
        return [await asyncio.to_thread(reporter._send, report) for _ in range(count)]

    assert await pauses(token(b"another key", "default", "demo", UID, "answer"), 9) == [
        *(4, 8, 16, 32, 64, 128, 256, 300, 300)
    ]
    assert await pauses(token(KEY, "default", "demo", UID, "answer"), 1) == [2]
    assert await pauses("", 1) == [4]


# --- what a report may say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"trainerStatus": {}, "tokensPerSecond": Infinity}',
        b'{"trainerStatus": {}, "tokensPerSecond": NaN}',
        b'{"trainerStatus": {}, "tokensPerSecond": 1e400}',
        b'{"trainerStatus": {}, "tokensPerSecond": 1e300}',
        b'{"trainerStatus": {}, "tokensPerSecond": -1}',
        b'{"trainerStatus": {"progressPercentage": 101}}',
        b'{"trainerStatus": {"progressPercentage": -1}}',
        b'{"trainerStatus": {"estimatedRemainingSeconds": %d}}' % 2**70,
        b'{"trainerStatus": {}, "rows": {"total": %s}}' % (b"9" * 5000),
        b'{"trainerStatus": {}, "rows": {"total": -1}}',
        b'{"trainerStatus": {}, "shard": 2}',
        b'{"trainerStatus": {}, "shard": -1}',
        b'{"trainerStatus": {}, "stage": "refine"}',
        b'{"trainerStatus": {}, "stage": ""}',
        b'{"trainerStatus": {}, "stage": "answer\\n"}',
        b"[" * 60_000,
        b'{"a": ' * 10_000,
        b"\xff\xfe",
        b"",
        gzip.compress(b'{"trainerStatus": {}}', mtime=0),
        json.dumps({"trainerStatus": {}, **{f"f{number}": 1 for number in range(4000)}}).encode(),
    ],
)
async def test_a_report_is_of_the_childs_stages_and_pods_and_in_finite_numbers(stand: Stand, body: bytes) -> None:
    code, message = await stand.post(body)
    assert code == 422
    assert len(message) < 2000
    assert (stand.board.runs, stand.told) == ({}, [])


async def test_a_body_that_is_too_long_is_refused(stand: Stand) -> None:
    assert (await stand.post(b" " * (serving.BODY_LIMIT + 1)))[0] == 413
    assert stand.board.runs == {}


def test_what_a_board_adds_up_is_a_number_that_a_status_can_hold() -> None:
    board, most = Board(), 10**12
    for shard in range(512):
        rows = Rows(total=most, done=most, rejected=most)
        report = Progress(trainer_status=TrainerStatus(), shard=shard, rows=rows, tokens_per_second=most)
        board.put(UID, "answer", report)
    seen = board.of(UID, "answer")
    assert seen is not None
    assert seen.rows is not None
    assert max(seen.rows.total, seen.rows.done, seen.tokens_per_second or 0) < 2**53


async def test_last_words_with_numbers_that_are_none_leave_the_status_whole(world: Any, loop: Loop) -> None:  # noqa: F811
    run = (await world.apply())["metadata"]
    await loop.reconciler.reconcile("default", "demo")
    for seconds, generated in (("Infinity", 1), ("5e-324", 10**12), ("1", 10**400), ("NaN", 5)):
        words = (
            f'{{"outcome": "done", "stages": {{"prepare": {{"seconds": {seconds}, "generatedTokens": {generated}}}}}}}'
        )
        over = pod("prepare", "Succeeded", terminated=ended(0, words))
        there = (await loop.reconciler.reader.read("default", {run["uid"]: "default"}))[run["uid"]]
        there.pods = [over]
        assert loop.reconciler.due(await world.get(), there) is Due.TELLING


# --- how much one run may take ------------------------------------------------------------------------------------


async def test_a_flood_fills_no_more_than_the_runs_own_share(stand: Stand) -> None:
    """What 2,000 reports of stages and shards at will left in memory was 100 MB."""
    codes = set[int]()
    for number in range(300):
        report = SMALL | {"stage": ["critique", "refine", "x", f"stage-{number}"][number % 4], "shard": number // 4 % 3}
        codes.add((await stand.post(report, f"default/demo/{UID}/teacher"))[0])
    assert codes <= {200, 422, 429}
    assert 429 in codes
    kept = {stage: list(reports.last) for stage, reports in stand.board.runs[UID].items()}
    assert set(kept) <= {"critique", "refine"}
    assert all(shards == [0] for shards in kept.values())
    assert len(stand.told) <= 8 + 2 * 60  # four at once for each pod and stage, then one a second


async def test_a_flood_of_one_child_leaves_the_others_their_reports(stand: Stand) -> None:
    while (await stand.post())[0] != 429:
        pass
    assert (await stand.post(path=f"default/demo/{UID}/teacher"))[0] == 200


def test_a_look_does_not_give_a_child_its_allowance_anew() -> None:
    board = Board()
    board.expect(UID, CHILDREN)
    allowance = board.allowances[UID]["teacher"]
    assert [allowance.may_report(100.0) for _ in range(9)] == [True] * 8 + [False]
    board.expect(UID, CHILDREN)
    assert not board.allowances[UID]["teacher"].may_report(100.0)
    assert board.allowances[UID]["teacher"].may_report(101.0)


def test_a_stage_that_begins_and_ends_again_and_again_is_shown_at_once_only_once() -> None:
    board = Board()
    done, begun = (Rows(total=10, done=count) for count in (10, 1))
    turns = [
        board.put(UID, "critique", Progress(trainer_status=TrainerStatus(), rows=rows)) for rows in [begun, done] * 10
    ]
    assert turns == [True, True] + [False] * 18


# --- connections --------------------------------------------------------------------------------------------------

HALF = b"POST /progress/default/demo/x/answer HTTP/1.1\r\nHost: x\r\n"


async def test_half_sent_headers_are_not_waited_for(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SECONDS", 0.2)
    answers = await asyncio.gather(*(send(stand.server, HALF) for _ in range(100)), return_exceptions=True)
    assert all(one == b"" or isinstance(one, ConnectionResetError) for one in answers)


async def test_nor_are_bodies_of_a_right_token(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SECONDS", 0.2)
    bearer = token(KEY, "default", "demo", UID, "answer")
    head = f"POST /progress/default/demo/{UID}/answer HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bearer}\r\n"
    sent = f"{head}Content-Length: 100\r\n\r\n{{".encode()
    (answer,) = await asyncio.gather(send(stand.server, sent), return_exceptions=True)
    assert answer == b"" or isinstance(answer, ConnectionResetError)
    assert stand.told == []


async def test_one_connection_too_many_ends_the_oldest_and_whoever_is_well_is_answered(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "MOST", 3)
    idle = [await asyncio.open_connection("127.0.0.1", stand.server.port) for _ in range(5)]
    assert (await stand.post())[0] == 200
    assert len(stand.server._listener._open) <= 3
    with suppress(ConnectionResetError):
        assert await asyncio.wait_for(idle[0][0].read(), PATIENCE) == b""
    for _, writer in idle:
        writer.close()


async def test_connections_are_accepted_at_a_bounded_rate(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the door is as good as closed, nobody is refused: who comes waits in the kernel."""
    monkeypatch.setattr(stand.server._listener, "_rate", 0.001)
    monkeypatch.setattr(serving, "AT_ONCE", 3)
    codes = [(await stand.post())[0] for _ in range(4)]
    assert codes == [200] * 4  # one was waited for before, three at once
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stand.post(), 0.3)


@pytest.mark.parametrize(
    ("header", "codes"),
    [("Accept: */*", [b"200"]), ("Expect: something", [b"417"]), ("Expect: 100-continue", [b"100", b"200"])],
)
async def test_a_connection_takes_one_request(stand: Stand, header: str, codes: list[bytes]) -> None:
    request = f"GET /leader HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode()
    answers = (await send(stand.server, request * 50)).split(b"HTTP/")[1:]
    assert [one.split()[1] for one in answers] == codes
    assert b"connection: close" in answers[-1].lower()


BROKEN = {
    "no UTF-8 in a header": b"POST /progress/default/demo/%s/answer HTTP/1.1\r\nHost: x\r\nAuthorization: \xff\xfe"
    b"\r\nContent-Length: 0\r\n\r\n" % UID.encode(),
    "no UTF-8 in another header": b"GET /leader HTTP/1.1\r\nHost: \xff\r\nX: \xfe\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "a header of no form": b"GET /leader HTTP/1.1\r\nHost x\r\n\r\n",
    "a long line": b"GET /leader HTTP/1.1\r\nX: " + b"x" * 10_000 + b"\r\n\r\n",
    "many lines": b"GET /leader HTTP/1.1\r\n" + b"X: x\r\n" * 100 + b"\r\n",
    "a long path": b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
    "no such path": b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n",
    "no such method": b"DELETE /leader HTTP/1.1\r\nHost: x\r\n\r\n",
    "a chunk of no form": b"POST /progress/default/demo/%s/answer HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" % (UID.encode(), token(KEY, "default", "demo", UID, "answer").encode()),
    "a body that breaks off": b"POST /progress/default/demo/%s/answer HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s"
    b"\r\nContent-Length: 100\r\n\r\n{" % (UID.encode(), token(KEY, "default", "demo", UID, "answer").encode()),
}


@pytest.mark.parametrize("waits", [False, True], ids=["leads", "waits"])
@pytest.mark.parametrize("what", BROKEN)
async def test_what_is_no_request_is_the_callers_fault_and_no_news(
    stand: Stand, what: str, waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with waiting_for(stand) as other:
        answer = await send(other if waits else stand.server, BROKEN[what], half=True)
    assert answer == b"" or 400 <= int(answer.split()[1]) < 500 or (waits and answer.split()[1] == b"503"), answer
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []
    assert stand.board.runs == {}


# --- the key ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["kept", "x" * 31])
async def test_a_key_that_can_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """A pod tries keys against its own token, and nobody sees it."""
    monkeypatch.setenv("CGD_PROGRESS_KEY", key)
    with pytest.raises(SystemExit, match=f"CGD_PROGRESS_KEY has {len(key)} bytes, and needs 32"):
        await operate()


def test_a_key_is_bytes_and_need_not_be_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environb, b"CGD_PROGRESS_KEY", b"\xff" * 32)
    assert process._key() == b"\xff" * 32


KEPT = ("cgd-system", "cgd-operator-progress-key")


@pytest.fixture
async def kept(world: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Awaitable[Json | None]]:  # noqa: F811
    """Reads the Secret that keeps the key, as the kubelet does for the operator's pod."""
    monkeypatch.setenv("CGD_PROGRESS_KEY_SECRET", "/".join(KEPT))
    await world.client.create(NAMESPACE, {"metadata": {"name": KEPT[0]}})

    async def read() -> Json | None:
        secret: Json | None = await world.client.get(SECRET, KEPT[1], KEPT[0])
        return secret

    return read


def key_in(secret: Json | None) -> bytes:
    assert secret is not None
    return b64decode(secret["data"]["key"])


async def test_a_new_key_is_kept_for_the_next_process_so_that_tokens_outlive_a_restart(
    world: Any,  # noqa: F811
    kept: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def mounted(stage: str) -> str:
        return _secret_of((await world.children())[stage])

    async with world.operator():
        await world.apply()
        await world.end("prepare")
        await world.until(lambda: begun(world, "answer"))
    key = key_in(await kept())
    assert len(key) == 64
    monkeypatch.setenv("CGD_PROGRESS_KEY", key.decode())
    async with world.operator():
        await world.end("answer")
        await world.until(lambda: begun(world, "teacher"))
    assert await mounted("answer") == await mounted("teacher")
    assert key_in(await kept()) == key


async def begun(world: Any, stage: str) -> bool:  # noqa: F811
    return stage in await world.children()


async def test_a_process_that_was_started_before_the_key_was_kept_must_start_again(world: Any, kept: Any) -> None:  # noqa: F811
    """It cannot read the Secret, and with another key it would refuse all tokens that were given."""
    async with world.operator():
        await world.until(kept)
        with pytest.raises(SystemExit, match="must be started again"):
            await operate()


async def test_a_key_that_no_secret_may_keep_serves_as_long_as_its_process(
    world: Any,  # noqa: F811
    kept: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    create = Cluster.create

    async def refused(self: Cluster, kind: Any, body: Json, **options: Any) -> Json:
        if kind is SECRET and body["metadata"]["namespace"] == KEPT[0]:
            raise ApiError(403, "Forbidden", "exceeded quota: secrets")
        return await create(self, kind, body, **options)

    monkeypatch.setattr(Cluster, "create", refused)
    async with world.operator():
        await world.apply()
        await world.until(lambda: begun(world, "prepare"))
    assert await kept() is None
    assert "ends with this process" in caplog.text


# --- the log ------------------------------------------------------------------------------------------------------


def test_no_text_makes_a_second_line_in_the_log() -> None:
    text = "demo\n2026-01-01 00:00:00 WARNING forged\r\x1b[2J\x85\u2028\x00\u202e"
    try:
        int(text)
    except ValueError:
        record = logging.LogRecord("cgd", logging.ERROR, "", 0, "run %s: %s", (text, text), sys.exc_info())
    first, *rest = LogFormatter("%(levelname)s %(message)s").format(record).split("\n")
    assert first.startswith("ERROR run demo\\n2026")
    assert all(line.startswith("    | ") for line in rest)
    assert not set("\r\x1b\x85\u2028\x00\u202e") & set("".join([first, *rest]))
    assert len(first.splitlines()) == 1


def test_the_operator_logs_through_it() -> None:
    program = (
        "import logging, sys\n"
        "from cgd_operator import process\n"
        "async def operate(namespaces):\n"
        "    logging.getLogger('kopf').warning('a run: %s', 'demo\\nWARNING forged')\n"
        "process.operate = operate\n"
        "sys.argv = ['cgd-operator']\n"
        "process.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stderr.endswith("kopf a run: demo\\nWARNING forged\n")
    assert done.stderr.count("\n") == 1


# --- the tokens' Secret -------------------------------------------------------------------------------------------


async def test_a_new_key_makes_a_new_secret_and_the_same_key_writes_none(world: Any) -> None:  # noqa: F811
    run = await world.apply()
    await Reconciler(world.client, RELEASE, Board(), b"one").reconcile("default", "demo")
    (first,) = (await world.client.list(SECRET, "default"))[0]
    await world.end("prepare")
    await Reconciler(world.client, RELEASE, Board(), b"one").reconcile("default", "demo")
    (same,) = (await world.client.list(SECRET, "default"))[0]
    assert same == first
    await world.end("answer")
    await Reconciler(world.client, RELEASE, Board(), b"two").reconcile("default", "demo")
    secrets = {one["metadata"]["name"] for one in (await world.client.list(SECRET, "default"))[0]}
    assert len(secrets) == 2
    children = await world.children()
    mounted = {stage: _secret_of(child) for stage, child in children.items()}
    assert mounted["prepare"] == mounted["answer"] == first["metadata"]["name"]
    assert {mounted["teacher"]} == secrets - {first["metadata"]["name"]}
    assert first["metadata"]["ownerReferences"][0]["uid"] == run["metadata"]["uid"]


def _secret_of(child: Json) -> str:
    volumes = child["spec"]["template"]["spec"]["volumes"]
    return next(str(one["secret"]["secretName"]) for one in volumes if one["name"] == "progress")


async def test_the_operator_only_creates_secrets(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("CGD_PROGRESS_KEY", "kept " * 8)
    if not world.is_embedded:
        pytest.skip("counts the embedded server's requests")

    async def begun(stage: str) -> bool:
        return stage in await world.children()

    since = len(world.embedded.requests)
    for stage, following in (("prepare", "answer"), ("answer", "teacher")):
        async with world.operator():
            if stage == "prepare":
                await world.apply()
            await world.end(stage)
            await world.until(lambda following=following: begun(following))
    calls = [method for method, path in list(world.embedded.requests)[since:] if "/secrets?" in path]
    assert set(calls) == {"POST"}
    assert len((await world.client.list(SECRET, "default"))[0]) == 1


async def test_a_deleted_runs_token_is_worth_nothing(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    ports: list[int] = []
    start = ProgressServer.start

    async def noted(self: ProgressServer, host: str, port: int) -> None:
        await start(self, host, port)
        ports.append(self.port)

    monkeypatch.setattr(ProgressServer, "start", noted)
    monkeypatch.setenv("CGD_PROGRESS_KEY", KEY.decode())

    async def answers(uid: str, code: int) -> bool:
        url = f"http://127.0.0.1:{ports[0]}/progress/default/demo/{uid}/prepare"
        bearer = {"Authorization": f"Bearer {token(KEY, 'default', 'demo', uid, 'prepare')}"}
        async with aiohttp.ClientSession() as session, session.post(url, json=SMALL, headers=bearer) as answer:
            return answer.status == code

    async with world.operator():
        uid = (await world.apply())["metadata"]["uid"]
        await world.until(world.children)
        await world.until(lambda: answers(uid, 200))
        await world.client.delete(RUN, "demo", "default")
        await world.until(lambda: answers(uid, 404))
        again = (await world.apply())["metadata"]["uid"]
        await world.until(lambda: answers(again, 200))
        assert await answers(uid, 404)


async def test_a_secret_that_is_refused_costs_the_display_and_not_the_run(
    world: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create = world.client.create

    async def full(kind: Any, body: Json, **options: Any) -> Json:
        if kind is SECRET:
            raise ApiError(403, "Forbidden", "exceeded quota: secrets")
        made: Json = await create(kind, body, **options)
        return made

    monkeypatch.setattr(world.client, "create", full)
    await world.apply()
    await Reconciler(world.client, RELEASE, Board(), KEY).reconcile("default", "demo")
    assert set(await world.children()) == {"prepare"}


async def test_a_sweep_that_read_before_a_child_was_made_does_not_silence_it(
    world: Any,  # noqa: F811
    loop: Loop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uid = (await world.apply())["metadata"]["uid"]
    read = loop.reconciler.reader.read

    async def slow(namespace: str | None, places: Any) -> Any:
        objects = await read(namespace, places)
        monkeypatch.setattr(loop.reconciler.reader, "read", read)
        loop.poke("default", "demo")
        while loop._tasks:  # noqa: ASYNC110  the loop keeps no event for a test
            await asyncio.sleep(0.01)
        assert "prepare" in loop.reconciler.board.allowances[uid]
        return objects

    monkeypatch.setattr(loop.reconciler.reader, "read", slow)
    await loop._sweep()
    assert "prepare" in loop.reconciler.board.allowances[uid]
    await loop.stop()
