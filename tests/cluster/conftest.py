"""An API server with the project's definitions, the operator against it, and somebody who plays the controllers."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from builders import manifest

from cgd_local import pytorchjobs
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_operator.__main__ import operate
from cgd_operator.cluster import JOB, PYTORCHJOB, RUN, Cluster
from cgd_operator.crd import crd
from cgd_operator.manifests import STAGE_LABEL

Json = dict[str, Any]


async def until(true: Callable[[], Awaitable[Any]], seconds: float = 20) -> Any:
    """Ask again until the answer is true; returns it."""
    deadline = time.monotonic() + seconds
    while not (answer := await true()):
        assert time.monotonic() < deadline, "it never became true"
        await asyncio.sleep(0.02)
    return answer


class World:
    """A cluster without controllers: `play` does what they would do."""

    def __init__(self, api: ApiServer, client: Cluster, kubeconfig: Path) -> None:
        self.api, self.client, self.kubeconfig = api, client, kubeconfig
        self.until = until

    async def apply(self, changes: Json | None = None, name: str = "demo") -> Json:
        body = manifest(changes, name=name)
        del body["metadata"]["uid"], body["metadata"]["generation"]
        return await self.client.create(RUN, body)

    async def get(self, name: str = "demo") -> Json:
        run = await self.client.get(RUN, name, "default")
        assert run is not None
        return run

    async def state(self, name: str = "demo") -> str:
        return str((await self.get(name)).get("status", {}).get("state"))

    async def children(self) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for kind in (JOB, PYTORCHJOB):
            for child in (await self.client.list(kind, "default"))[0]:
                stage = child["metadata"]["labels"][STAGE_LABEL]
                assert stage not in found, f"{stage} has two children"
                found[stage] = child
        return found

    async def end(self, stage: str, condition: str = "Complete") -> None:
        """Let a child end as its controller would."""
        child = await until(lambda: self._child(stage))
        kind = PYTORCHJOB if child["kind"] == "PyTorchJob" else JOB
        word = "Succeeded" if kind is PYTORCHJOB and condition == "Complete" else condition
        one = {"type": word, "status": "True", "reason": "Played", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        await self.client.patch(
            kind, child["metadata"]["name"], "default", {"status": {"conditions": [one]}}, subresource="status"
        )

    async def _child(self, stage: str) -> Json | None:
        return (await self.children()).get(stage)

    async def play(self, *stages: str) -> None:
        for stage in stages:
            await self.end(stage)

    def writes(self) -> list[tuple[str, str]]:
        """What the operator wrote so far."""
        return [one for one in self.api.requests if "fieldManager=cgd-operator" in one[1] or one[0] == "DELETE"]

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[None]:
        """The operator, in a thread with a loop of its own: it ends by waiting for every task of its loop."""
        stop = threading.Event()
        thread = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(operate(stop=stop))))
        try:
            yield
        finally:
            stop.set()
            await thread


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    api = ApiServer()
    await api.start()
    path = tmp_path / "kubeconfig"
    path.write_text(api.kubeconfig())
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setenv("CGD_PROGRESS_BIND", "127.0.0.1:0")
    async with await Cluster.connect(str(path), manager="test") as client:
        await install(client, crd())
        await install(client, pytorchjobs.crd())
        yield World(api, client, path)
    await api.stop()
