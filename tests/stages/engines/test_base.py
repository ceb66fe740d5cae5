"""Engines: how they are fed, and what is chosen for a CPU."""

import threading

import pytest
from support.stage_builders import GREEDY, RuleEngine, each

from cgd_stages.engines.base import Request, drive
from cgd_stages.engines.vllm_settings import cpu_dtype
from cgd_stages.method.prompts import answer_messages


def requests(count: int) -> list[Request]:
    return [Request(str(n), answer_messages(f"q{n}"), GREEDY) for n in range(count)]


def test_every_request_has_one_outcome():
    outcomes = list(drive(RuleEngine(batch=3, room=4), each(requests(20)), threading.Event()))
    assert sorted(int(outcome.name) for outcome in outcomes) == list(range(20))


def test_the_engine_is_filled_up_before_each_step_and_never_beyond_its_room():
    engine, waiting = RuleEngine(batch=1, room=4), []
    engine.before_step = lambda: waiting.append(4 - engine.room)
    list(drive(engine, each(requests(10)), threading.Event()))
    assert waiting == [4] * 7 + [3, 2, 1]


def test_requests_are_made_only_when_there_is_room():
    made = []

    def lazily():
        for request in requests(10):
            made.append(request.name)
            yield request

    outcomes = drive(RuleEngine(batch=1, room=2), each(lazily()), threading.Event())
    next(outcomes)
    assert made == ["0", "1"]


def test_after_stop_nothing_more_is_asked():
    engine, stop = RuleEngine(batch=1, room=2), threading.Event()
    for _ in drive(engine, each(requests(10)), stop):
        stop.set()
    assert len(engine.asked) == 2


@pytest.mark.parametrize(
    ("wanted", "fast", "chosen"),
    [("auto", True, "auto"), ("auto", False, "float32"), ("bfloat16", False, "bfloat16"), ("float32", True, "float32")],
)
def test_auto_avoids_bfloat16_where_a_cpu_has_no_fast_one(wanted, fast, chosen):
    assert cpu_dtype(wanted, fast_bfloat16=fast) == chosen
