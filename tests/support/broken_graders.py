"""Workers of the grader that go wrong. A room of their own: a spawned process has to import them by name."""

import os
import time
from multiprocessing.connection import Connection
from unittest import mock

from cgd_stages.grading import grader
from cgd_stages.grading.compare import Verdict


def _hang(*_: str) -> Verdict:
    while True:  # a deadline counts processor time: sleeping takes none
        pass


def _crash(*_: str) -> Verdict:
    os._exit(1)


def _sleep(*_: str) -> Verdict:
    time.sleep(3)
    return Verdict(True, "value")


def hanging(pipe: Connection, seconds: float) -> None:
    with mock.patch.object(grader, "compare", _hang):
        grader._serve(pipe, seconds)


def crashing(pipe: Connection, seconds: float) -> None:
    with mock.patch.object(grader, "compare", _crash):
        grader._serve(pipe, seconds)


def waiting(pipe: Connection, seconds: float) -> None:
    """Takes longer than its deadline, as on a machine that is busy with something else, but no processor time."""
    with mock.patch.object(grader, "compare", _sleep):
        grader._serve(pipe, seconds)


def never_ready(_: Connection, __: float) -> None:
    time.sleep(60)


def ending_at_once(_: Connection, __: float) -> None:
    os._exit(9)
