"""The API server's time, from the dates of its answers."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from cgd_operator.kube.clock import Clock

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Watch:
    """The clock of a machine, which the test moves."""

    def __init__(self) -> None:
        self.time = NOON.timestamp()

    def __call__(self) -> float:
        return self.time


def date(moment: datetime) -> str:
    return format_datetime(moment, usegmt=True)


def differs(clock: Clock) -> float:
    return clock.now().timestamp() - clock.local()


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_machine_whose_clock_is_wrong_has_the_servers_time(hours: int) -> None:
    clock = Clock(Watch())
    clock.heard(date(NOON + timedelta(hours=hours)), sent=NOON.timestamp())
    assert abs(clock.now() - (NOON + timedelta(hours=hours))) <= timedelta(seconds=1)


def test_answers_that_took_their_time_and_whole_seconds_move_no_clock_that_is_right() -> None:
    watch = Watch()
    clock = Clock(watch)
    for sent, told, received in ((0, 0, 29), (0.9, 0, 0.9), (10.2, 39, 39.5), (50.99, 50, 50.99)):
        watch.time = NOON.timestamp() + received
        clock.heard(date(NOON + timedelta(seconds=told)), sent=NOON.timestamp() + sent)
        assert differs(clock) == 0


def test_a_clock_that_is_set_right_is_believed_again() -> None:
    watch = Watch()
    clock = Clock(watch)
    watch.time += 3600
    clock.heard(date(NOON), sent=watch.time)
    assert differs(clock) < -3598
    watch.time -= 3600
    clock.heard(date(NOON), sent=watch.time)
    assert abs(differs(clock)) <= 1


@pytest.mark.parametrize("text", ["", "soon", "Thu, 32 Jan 2026 12:00:00 GMT", "Thu, 01 Jan 99999 12:00:00 GMT"])
def test_what_is_no_date_changes_nothing(text: str) -> None:
    clock = Clock(Watch())
    clock.heard(text, sent=NOON.timestamp())
    assert differs(clock) == 0


def test_a_wrong_clock_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch()
    clock = Clock(watch)
    watch.time += 3600
    for _ in range(3):
        clock.heard(date(NOON), sent=watch.time)
    (line,) = caplog.messages
    assert line.startswith("the clock of this machine is 3599 s ahead of that of the API server")
