"""Workers of the grader that go wrong. A room of their own: a spawned process has to import them by name."""

import os
import time
from multiprocessing.connection import Connection
from unittest import mock

from cgd_stages import grading
from cgd_stages.equality import Verdict


def _hang(*_: str) -> Verdict:
    time.sleep(60)
    return Verdict(True, "value")


def _crash(*_: str) -> Verdict:
    os._exit(1)


def hanging(pipe: Connection) -> None:
    with mock.patch.object(grading, "compare", _hang):
        grading._serve(pipe)


def crashing(pipe: Connection) -> None:
    with mock.patch.object(grading, "compare", _crash):
        grading._serve(pipe)
