"""Workers of the grader that go wrong. A room of their own: a spawned process has to import them by name."""

import os
import time
from multiprocessing.connection import Connection
from unittest import mock

from cgd_stages import grading


def _hang(reference: str, answer: str) -> bool:
    time.sleep(60)
    return True


def _crash(reference: str, answer: str) -> bool:
    os._exit(1)


def hanging(pipe: Connection) -> None:
    with mock.patch.object(grading, "equal", _hang):
        grading._serve(pipe)


def crashing(pipe: Connection) -> None:
    with mock.patch.object(grading, "equal", _crash):
        grading._serve(pipe)
