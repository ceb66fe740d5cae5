"""The command that serves a trained student with vLLM, and one that asks it a question."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from cgd_cli.errors import Wrong
from cgd_cli.view import shell
from cgd_operator.planning.dag import Run

ON_CPUS = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""GiB for keys and values where the run has no GPU; without it a small model takes most of a machine."""


@dataclass(frozen=True)
class Service:
    """A model's server: environment, command and a question for it."""

    environment: dict[str, str]
    command: tuple[str, ...]
    question: tuple[str, ...]

    @property
    def text(self) -> str:
        variables = "".join(f"{name}={value} " for name, value in self.environment.items())
        return f"{variables}{shell(*self.command)}"

    @property
    def asking(self) -> str:
        return shell(*self.question)


def service(run: Run, folder: Path, port: int) -> Service:
    """How vLLM serves the model in a folder as the run has evaluated it: same context, same dtype, same thoughts."""
    student, command = run.resolved.student, ["vllm", "serve", str(folder), "--served-model-name", run.name]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if student.max_model_len:
        command += ["--max-model-len", str(student.max_model_len)]
    if student.dtype != "auto":
        command += ["--dtype", student.dtype]
    if student.tensor_parallel > 1:
        command += ["--tensor-parallel-size", str(student.tensor_parallel)]
    if student.chat.reasoning_parser:
        command += ["--reasoning-parser", student.chat.reasoning_parser]
    asked = {"model": run.name, "messages": [{"role": "user", "content": "What is 17 + 8 - 9?"}], "max_tokens": 256}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    question = ("curl", "-s", url, "-H", "Content-Type: application/json", "-d", json.dumps(asked))
    is_on_cpus = run.spec.placement.accelerator == "none"
    return Service(ON_CPUS if is_on_cpus else {}, tuple(command), question)


def become(service: Service) -> None:
    """Replace this process by the server. Raises Wrong where vLLM is not installed."""
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join((beside, os.environ.get("PATH", os.defpath)))
    if (program := shutil.which(service.command[0], path=path)) is None:
        raise Wrong("vLLM is not installed here: install it, or run the command on a machine that has it")
    os.execve(program, list(service.command), {**os.environ, "PATH": path, **service.environment})  # noqa: S606
