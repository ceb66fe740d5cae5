"""kubectl, and what the demo applies with it."""

import asyncio
import json
import os
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from cgd_operator.kube.client import Object

KUBECTL = Path(sysconfig.get_path("scripts")) / "kubectl"


class DemoError(Exception):
    """The demo cannot run; says what to change."""


async def kubectl(kubeconfig: Path, *arguments: str, text: str = "") -> None:
    """Run it with a text as its standard input. Raises DemoError with what it says."""
    process = await asyncio.create_subprocess_exec(
        str(KUBECTL),
        *arguments,
        env={**os.environ, "KUBECONFIG": str(kubeconfig)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    out, _ = await process.communicate(text.encode())
    if process.returncode:
        raise DemoError(f"kubectl {' '.join(arguments)}: {out.decode().strip()}")


async def apply(kubeconfig: Path, objects: Sequence[Object]) -> None:
    """Apply objects as they are, whoever has applied them before."""
    if objects:
        text = "\n---\n".join(map(json.dumps, objects))
        await kubectl(kubeconfig, "apply", "--server-side", "--force-conflicts", "-f", "-", text=text)


def configmaps(files: Iterable[str]) -> list[Object]:
    """The ConfigMaps of files: CONFIGMAP/KEY=PATH. Raises DemoError."""
    data: dict[str, dict[str, str]] = {}
    for file in files:
        try:
            target, path = file.split("=", 1)
            name, key = target.split("/", 1)
            data.setdefault(name, {})[key] = Path(path).read_text()
        except ValueError as error:
            raise DemoError(f"--file {file} must be CONFIGMAP/KEY=PATH and name a UTF-8 text file") from error
        except OSError as error:
            raise DemoError(f"--file {file}: {error.strerror}") from error
    return [object_of("ConfigMap", name, data=content) for name, content in data.items()]


def object_of(kind: str, name: str, **content: Object) -> Object:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, **content}
