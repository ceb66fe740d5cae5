"""What an outage of the store costs: nothing while it is short; and what is stored twice or damaged does no harm."""

import inspect
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.stage_builders import (
    RUN,
    RuleEngine,
    context,
    echo,
    generate_with,
    generate_work,
    prepared,
    stop_after,
    stored_rows,
)

from cgd_stages.contract import Storage
from cgd_stages.engines.base import Reply, Request
from cgd_stages.errors import Interrupted, TransientError, UserError
from cgd_stages.generate.shard_writer import ShardWriter, packed
from cgd_stages.prepare.sources import row_id
from cgd_stages.store import bucket as storage
from cgd_stages.store import part_writer
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS, Folder
from cgd_stages.store.rows import from_parquet, row_schema
from cgd_stages.store.shards import owns

TEXTS = [f"How many pears are {n} pears?" for n in range(40)]


class Weather:
    """Whether the store takes writes; it counts those it refuses."""

    def __init__(self) -> None:
        self.away = False
        self.refused = 0


@pytest.fixture
def weather(monkeypatch):
    """A store that can go away, for writes."""
    state, put = Weather(), inspect.unwrap(Bucket.put)

    @storage.patient
    def put_if_there(self: Bucket, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if state.away:
            state.refused += 1
            raise TransientError("the store is away")
        return bool(put(self, key, data, if_absent=if_absent))

    monkeypatch.setattr(Bucket, "put", put_if_there)
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(part_writer, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(part_writer, "RETRY_SHARE", 1e9)
    monkeypatch.setattr(part_writer, "FLUSH_ROWS", 4)
    return state


@pytest.fixture
def answering(bucket, storage, tmp_path, tiny_model, weather):
    prepared(bucket, TEXTS)
    return lambda **changes: context(storage, generate_work(tiny_model, "answer", **changes), tmp_path)


def between(engine: RuleEngine, weather: Weather, first: int, last: int) -> RuleEngine:
    """The store goes away before the engine's step `first`, and is back before the step `last`."""
    count = iter(range(1000))

    def before() -> None:
        weather.away = first <= next(count) < last

    engine.before_step = before
    return engine


def test_while_the_store_is_away_generating_goes_on(bucket, answering, weather):
    engine = between(RuleEngine(), weather, 2, 9)
    generate_with(engine, answering())
    assert weather.refused > 2
    assert len(engine.asked) == 40
    assert len(stored_rows(bucket, "answer")) == 40


def test_the_end_of_a_stage_waits_for_the_store(bucket, answering, weather):
    engine, steps = RuleEngine(), iter(range(1000))

    def before() -> None:
        if next(steps) == 12:
            weather.away = True
            threading.Timer(0.3, lambda: setattr(weather, "away", False)).start()

    engine.before_step = before
    generate_with(engine, answering())
    assert weather.refused > 2
    assert len(stored_rows(bucket, "answer")) == 40


@pytest.mark.parametrize(("module", "name", "value"), [(storage, "AWAY_SECONDS", -1.0), (part_writer, "HELD_ROWS", 9)])
def test_a_store_that_is_away_for_too_long_ends_the_program(answering, weather, monkeypatch, module, name, value):
    monkeypatch.setattr(storage, "AWAY_SECONDS", 0.5)
    monkeypatch.setattr(module, name, value)
    first = between(RuleEngine(), weather, 2, 1000)
    with pytest.raises(TransientError, match="away"):
        generate_with(first, answering())
    assert len(first.asked) < 40
    weather.away = False
    second = RuleEngine()
    generate_with(second, answering())
    assert {request.name for request in first.asked + second.asked} == {f"{row_id(text)}-0-answer" for text in TEXTS}


def test_sigterm_does_not_claim_that_everything_is_stored_when_it_is_not(answering, weather):
    attempt, engine = answering(), RuleEngine()
    stop_after(engine, 3, attempt.stop)
    stopping = engine.before_step

    def before() -> None:
        weather.away = True
        stopping()

    engine.before_step = before
    with pytest.raises(TransientError, match="away"):
        generate_with(engine, attempt)


def test_what_the_user_must_change_is_told_even_when_the_store_is_away(answering, weather):
    def refuse(request: Request) -> Reply:
        if len(engine.asked) < 12:
            return echo(request)
        attempt.stop.set()
        raise UserError("a wrong key")

    engine, attempt = between(RuleEngine(refuse), weather, 0, 1000), answering()
    with pytest.raises(UserError, match="a wrong key"):
        generate_with(engine, attempt)


def test_a_damaged_part_is_mended_by_the_same_rows(bucket, answering, monkeypatch):
    monkeypatch.setattr(part_writer, "FLUSH_ROWS", 512)
    attempt, engine = answering(), RuleEngine()
    stop_after(engine, 4, attempt.stop)
    with pytest.raises(Interrupted):
        generate_with(engine, attempt)
    (found,) = bucket.list(f"{RUN.namespace}/answer/{attempt.facts['answer'].digest}/parts/")
    whole = bucket.get(found.key)
    bucket.put(found.key, whole[:-10])
    again, engine = answering(), RuleEngine()
    stop_after(engine, 4, again.stop)
    with pytest.raises(Interrupted):
        generate_with(engine, again)
    assert bucket.get(found.key) == whole


def rows_of(texts: list[str]) -> list[dict[str, object]]:
    columns = {"reference": None, "prompt_tokens": 5, "answer_tokens": 1, "answer_finish_reason": "stop"}
    return [{"id": row_id(text), "sample": 0, "prompt": text, "answer": "a", **columns} for text in texts]


def test_rows_of_another_number_of_shards_are_written_anew_once(bucket):
    folder = Folder(bucket, "team", "answer", "d1")
    own = [text for text in TEXTS if owns(row_id(text), 1, 2)]
    # Its name comes before those of the shard's own parts.
    folder.put_rows(f"{PARTS}00000-of-00003-", rows_of(own[:6]), row_schema("answer"))
    for _ in range(3):
        writer = ShardWriter(folder, 1, 2)
        writer.flush()
    folder.put_rows(f"{PARTS}00001-of-00002-", rows_of(own[6:9]), row_schema("answer"))
    writer = ShardWriter(folder, 1, 2)
    writer.flush()
    assert writer.counts["done"] == 9
    assert len(list(bucket.list(folder.key(PARTS)))) == 3


def test_rows_that_the_stage_before_does_not_have_are_left_out(bucket):
    """Another pod of the shard has read another reply of that stage."""
    folder = Folder(bucket, "team", "answer", "d2")
    rows = rows_of(TEXTS[:5])
    folder.put_rows(f"{PARTS}00000-of-00001-", rows, row_schema("answer"))
    writer = ShardWriter(folder, 0, 1, [packed(row) for row in rows[:3]])
    writer.flush()
    listed = [row["id"] for part in writer.parts for row in from_parquet(folder.read(part))]
    assert listed == [row["id"] for row in rows[:3]]


class Answers(BaseHTTPRequestHandler):
    """An S3 server of one object, which is cut off at first, and which lists no objects but a word."""

    protocol_version = "HTTP/1.1"
    cut: int

    def do_GET(self) -> None:
        if "list-type" in self.path:
            self._send(200, b"wait a moment", 13)
            return
        type(self).cut -= 1
        whole = type(self).cut < 0
        self._send(200, b"whole" if whole else b"wh", 5)
        self.close_connection = not whole

    def _send(self, status: int, body: bytes, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Silence."""


@pytest.fixture
def odd(storage, monkeypatch):
    """A bucket of that server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Answers,), {"cut": 2}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("cgd_stages.store.bucket.ATTEMPTS", 3)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    yield Bucket(Storage(uri="s3://data/x", endpoint=endpoint, path_style=True))
    server.shutdown()
    server.server_close()


def test_a_body_that_is_cut_off_is_read_again(odd):
    assert odd.get("key") == b"whole"


def test_an_answer_that_no_store_gives_is_worth_a_retry(odd):
    with pytest.raises(TransientError, match="S3"):
        list(odd.list())
