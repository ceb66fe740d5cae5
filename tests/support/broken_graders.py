"""Workers of the grader that go wrong. A room of their own: a spawned process has to import them by name."""

import os
import time
from multiprocessing.connection import Connection
from unittest import mock

from cgd_stages.grading import grader
from cgd_stages.grading.compare import Verdict


def _hang(*_: str) -> Verdict:
    time.sleep(60)
    return Verdict(True, "value")


def _crash(*_: str) -> Verdict:
    os._exit(1)


def hanging(pipe: Connection) -> None:
    with mock.patch.object(grader, "compare", _hang):
        grader._serve(pipe)


def crashing(pipe: Connection) -> None:
    with mock.patch.object(grader, "compare", _crash):
        grader._serve(pipe)
