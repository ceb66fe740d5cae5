"""Everything at once: local cluster, S3, the operator as a process, kubectl."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cgd_local.background import image_environment, upload_model
from cgd_local.cluster import LocalCluster, venv_environment
from cgd_local.pods import exited, launch
from cgd_local.s3 import SeaweedFS
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import RUN

BIN = Path(sys.executable).parent
QUESTIONS = [
    {"question": f"Ann has {n} apples and gives 2 to Ben. How many are left?", "answer": f"#### {n - 2}"}
    for n in range(3, 15)
]


async def until(true: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := await true()):
        assert time.monotonic() < deadline, "it never became true"
        await asyncio.sleep(0.1)
    return answer


class Stand:
    """A machine on which runs are applied, with kubectl as a user has it."""

    def __init__(self, cluster: LocalCluster, s3: SeaweedFS, folder: Path) -> None:
        self.cluster, self.s3, self.folder = cluster, s3, folder
        self.operator: subprocess.Popen[bytes] | None = None

    def start_operator(self) -> None:
        env = venv_environment() | {"KUBECONFIG": str(self.cluster.kubeconfig_path), "CGD_PROGRESS_BIND": "127.0.0.1:0"}
        log = self.folder / "operator.log"
        self.operator = launch([sys.executable, "-m", "cgd_operator"], env, self.folder, log)

    async def kill_operator(self) -> None:
        assert self.operator is not None
        self.operator.kill()
        await exited(self.operator)

    async def stop_operator(self) -> None:
        if self.operator and self.operator.poll() is None:
            self.operator.terminate()
            await exited(self.operator)

    async def kubectl(self, *arguments: str, text: str = "", fails: bool = False) -> str:
        process = await asyncio.create_subprocess_exec(
            str(BIN / "kubectl"),
            *arguments,
            env={**os.environ, "KUBECONFIG": str(self.cluster.kubeconfig_path), "HOME": str(self.folder)},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate(text.encode())
        assert bool(process.returncode) == fails, out.decode()
        return out.decode()

    async def configmap(self, name: str, **files: str) -> None:
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": files}
        await self.kubectl("apply", "--server-side", "-f", "-", text=json.dumps(body))

    async def secret(self, name: str, access_key: str, secret_key: str) -> None:
        keys = {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key}
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": keys}
        await self.kubectl("apply", "--server-side", "-f", "-", text=json.dumps(body))

    async def apply(self, name: str, **changes: Any) -> None:
        await self.kubectl("apply", "-f", "-", text=json.dumps(self.manifest(name, **changes)))

    def manifest(self, name: str, **changes: Any) -> Object:
        fields = {"prompt": "question", "reference": "answer"}
        spec = {
            "student": {"model": "s3://data/models/tiny", "maxModelLen": 2048, "dtype": "float32", "shards": 2},
            "teacher": {"model": "s3://data/models/tiny", "maxModelLen": 2048, "dtype": "float32"},
            "prompts": {"source": "configmap://problems/train.jsonl", "fields": fields},
            "generation": {stage: {"maxTokens": 24} for stage in ("answer", "critique", "refine")}
            | {"maxRejected": "50%"},
            "training": {
                "workers": 2,
                "gpusPerWorker": 1,
                "zeroStage": 2,
                "dtype": "float32",
                "globalBatchSize": 4,
                "learningRate": "1e-3",
                "maxSequenceLength": 2048,
                "checkpointEverySteps": 2,
            },
            "evaluation": {
                "benchmarks": [{"name": "sums", "source": "configmap://problems/heldout.jsonl", "fields": fields}],
                "sampling": {"maxTokens": 24},
            },
            "storage": {
                "uri": f"s3://data/{self.folder.name}",
                "endpoint": self.s3.endpoint,
                "pathStyle": True,
                "credentialsSecretRef": {"name": "keys"},
            },
            "placement": {"accelerator": "none"},
        }
        return {
            "apiVersion": RUN.api_version,
            "kind": RUN.kind,
            "metadata": {"name": name},
            "spec": {**spec, **changes},
        }

    async def run(self, name: str) -> Object:
        run = await self.cluster.client.get(RUN, name, "default")
        assert run is not None
        return run

    async def condition(self, name: str, kind: str) -> Object:
        conditions = (await self.run(name)).get("status", {}).get("conditions", [])
        return next((one for one in conditions if one["type"] == kind), {"status": "Unknown", "message": ""})

    async def ended(self, name: str, seconds: float = 400) -> Object:
        """The run, when it has succeeded or failed."""

        async def over() -> bool:
            return bool((await self.condition(name, "Succeeded"))["status"] != "Unknown")

        await until(over, seconds)
        return await self.run(name)

    def stored(self, prefix: str) -> dict[str, bytes]:
        """Every object below a prefix of this stand's storage."""
        client = self.s3.client()
        found: dict[str, bytes] = {}
        for page in client.get_paginator("list_objects_v2").paginate(
            Bucket="data", Prefix=f"{self.folder.name}/{prefix}"
        ):
            for one in page.get("Contents", []):
                key = one["Key"]
                found[key.removeprefix(f"{self.folder.name}/")] = client.get_object(Bucket="data", Key=key)[
                    "Body"
                ].read()
        return found


def lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
async def stand(s3: SeaweedFS, tiny_model: Path, tmp_path: Path) -> AsyncIterator[Stand]:
    """A cluster with the definitions, the model in S3, the keys and the problems; the operator is not started."""
    environment = image_environment() | {"OMP_NUM_THREADS": "1"}
    async with LocalCluster(tmp_path / "cluster", environment=environment, backoff=0.2) as cluster:
        stand = Stand(cluster, s3, tmp_path)
        await asyncio.to_thread(upload_model, s3, tiny_model, "data", "tiny")
        await stand.kubectl("apply", "--server-side", "-f", str(Path(__file__).parents[2] / "crds"))
        await stand.secret("keys", s3.access_key, s3.secret_key)
        await stand.configmap(
            "problems", **{"train.jsonl": lines(QUESTIONS[:8]), "heldout.jsonl": lines(QUESTIONS[8:])}
        )
        yield stand
        await stand.stop_operator()
