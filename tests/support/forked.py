"""Stage programs as forks of a process that has imported vLLM. Every fork imports this module, and little else."""

import multiprocessing
import os
import runpy
import signal
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

LIBRARIES = [
    "cgd_stages.runtime.program",
    "cgd_stages.engines.vllm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
]


class Forked:
    """`python -m <module>` in a fork of a process that has imported vLLM and runs no thread; as subprocess.Popen."""

    def __init__(self, module: str, environment: dict[str, str], log: Path) -> None:
        log.write_bytes(b"")
        self._process = _with_vllm().Process(target=_run_module, args=(module, environment, log))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None and self._process.pid:
            os.kill(self._process.pid, number)


@cache
def _with_vllm() -> ForkServerContext:
    """A server of forks that has imported vLLM, and ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    # What libraries read while they are imported. A thread of OpenMP would be missing in the forks.
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with mock.patch.dict(os.environ, quiet):
        forkserver.ensure_running()
    return context


def _run_module(module: str, environment: dict[str, str], log: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
